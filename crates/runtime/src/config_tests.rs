//! Sources in every combination that matters, and every kind of mistake.

use super::*;
use clap::Parser;
use std::io::Write;
use std::time::Duration;

#[derive(Debug, Parser)]
#[command(name = "program")]
struct Cli {
    #[arg(long, global = true)]
    config: Option<PathBuf>,
    #[arg(long, global = true, env = "TEST_LOG", default_value = "info", value_parser = ["info", "debug"])]
    log: String,
    #[command(subcommand)]
    command: Sub,
}

#[derive(Debug, clap::Subcommand)]
enum Sub {
    Serve(Serve),
    Other {
        #[arg(long)]
        only_here: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
struct Serve {
    #[arg(long, env = "TEST_NODE")]
    node: String,
    #[arg(long, env = "TEST_PORT", default_value = "80")]
    port: u16,
    #[arg(long, env = "TEST_PATIENCE", default_value = "5s", value_parser = crate::units::parse_duration)]
    patience: Duration,
    #[arg(long, env = "TEST_PEERS", value_delimiter = ',')]
    peers: Vec<u8>,
    #[arg(long, required_unless_present = "local")]
    remote: Option<String>,
    #[arg(long)]
    local: Option<String>,
    #[arg(long)]
    header: Vec<String>,
    #[arg(long)]
    fast: bool,
}

const EXTRA: Program = Program {
    layers: |environment| {
        let value = environment.get("TEST_EXTRA").cloned();
        Ok(value
            .map(|value| Layer {
                origin: "variable TEST_EXTRA".into(),
                entries: vec![("port".into(), vec![value])],
            })
            .into_iter()
            .collect())
    },
    secrets: &["header"],
};

fn start(yaml: Option<&str>, env: &[(&str, &str)], line: &str) -> Result<Loaded<Cli>, String> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(yaml.unwrap_or_default().as_bytes()).unwrap();
    let name = file.path().display().to_string();
    let mut arguments: Vec<OsString> = format!("program {line}").split_whitespace().map(Into::into).collect();
    if yaml.is_some() {
        arguments.push(format!("--config={name}").into());
    }
    let environment = env.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    load::<Cli>(&Sources { arguments, environment }, EXTRA).map_err(|error| match error {
        LoadError::Config(errors) => errors.to_string().replace(&name, "FILE"),
        LoadError::Usage(error) => format!("usage: {error}"),
    })
}

fn serve(loaded: &Loaded<Cli>) -> &Serve {
    match &loaded.settings.command {
        Sub::Serve(serve) => serve,
        Sub::Other { .. } => panic!("not the command that was called"),
    }
}

fn from<'a>(loaded: &'a Loaded<Cli>, name: &str) -> (&'a [String], &'a str) {
    let setting = loaded.effective.0.iter().find(|setting| setting.name == name).unwrap();
    (&setting.values, &setting.from)
}

/// Z118: flags over variables over the file over defaults, and it can be asked which one it was.
#[test]
fn higher_sources_win_and_are_named() {
    let yaml = "node: file\nport: 1\npatience: 250ms\npeers: [1, 2]\nremote: there\nlog: debug\nfast: true\n";
    let env = [("TEST_NODE", "variable"), ("TEST_PORT", "2"), ("TEST_PATIENCE", "")];
    let loaded = start(Some(yaml), &env, "serve --port 3").unwrap();
    let settings = serve(&loaded);
    assert_eq!(
        (settings.node.as_str(), settings.port, settings.patience),
        ("variable", 3, Duration::from_millis(250))
    );
    assert_eq!(
        (&settings.peers[..], settings.fast, loaded.settings.log.as_str()),
        (&[1, 2][..], true, "debug")
    );
    assert_eq!(from(&loaded, "port"), (&["3".to_owned()][..], "command line"));
    assert_eq!(from(&loaded, "node").1, "variable TEST_NODE");
    assert!(from(&loaded, "patience").1.starts_with('/'), "an empty variable says nothing");
    assert_eq!(from(&loaded, "local"), (&[][..], "default"));

    let loaded =
        start(Some("port: 1\n"), &[("TEST_EXTRA", "7"), ("TEST_PEERS", "4,5")], "serve --node n --local l")
            .unwrap();
    assert_eq!((serve(&loaded).port, &serve(&loaded).peers[..]), (7, &[4, 5][..]));
    assert_eq!(from(&loaded, "port").1, "variable TEST_EXTRA");
    assert_eq!(from(&loaded, "log"), (&["info".to_owned()][..], "default"));
    let loaded = start(None, &[("TEST_EXTRA", "7"), ("TEST_PORT", "8")], "serve --node n --local l").unwrap();
    assert_eq!(serve(&loaded).port, 8);
}

/// Z118: a key that is no setting stops the start, with the nearest that is one.
#[test]
fn unknown_keys_are_refused_with_the_nearest() {
    let error = start(Some("node: n\nremote: r\npatiense: 5s\nPEERS: 1\n"), &[], "serve").unwrap_err();
    let want = "FILE: unknown key \"PEERS\"; the nearest is \"peers\"\nFILE: unknown key \"patiense\"; the nearest is \"patience\"";
    let mut lines: Vec<_> = error.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.join("\n"), want);
    assert_eq!(
        start(Some("zzz: 1"), &[], "serve --node n --local l").unwrap_err(),
        "FILE: unknown key \"zzz\""
    );
    // A setting of another subcommand is none of this one.
    assert!(start(Some("only-here: x"), &[], "other").is_ok());
    assert!(start(Some("only-here: x"), &[], "serve --node n --local l").is_err());
    assert!(start(Some("config: x"), &[], "serve --node n --local l").is_err());
}

/// Z118: every wrong value is reported at once, with its place, itself and what would be right.
#[test]
fn every_wrong_value_is_reported_with_its_place() {
    let yaml = "patience: soon\npeers: [1, 300]\nlog: loud\nfast: 1\n";
    let error = start(Some(yaml), &[("TEST_PORT", "70000")], "serve").unwrap_err();
    let starts = [
        "FILE: fast: \"1\": want true or false",
        "FILE: log: \"loud\": want one of info, debug",
        "FILE: patience: \"soon\": \"soon\" is not a duration: want a whole number and one of",
        "FILE: peers: \"1,300\": 300 is not in 0..=255",
        "variable TEST_PORT: port: \"70000\": 70000 is not in 0..=65535",
    ];
    let mut lines: Vec<_> = error.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines.len(), starts.len(), "{lines:#?}");
    for (line, start) in lines.iter().zip(starts) {
        assert!(line.starts_with(start), "{line} should start with {start}");
    }
    assert!(
        start(None, &[], "serve").unwrap_err().contains("--node <NODE>"),
        "what is required is named by clap"
    );
    assert!(start(None, &[], "serve --node n --port x").unwrap_err().contains("'x' for '--port <PORT>'"));
}

#[test]
fn files_that_are_no_settings() {
    let line = "serve --node n --local l";
    for (yaml, says) in [
        ("port: 1\nport: 2\n", "FILE: line 2: "),
        ("- port\n", "FILE: line 1: "),
        ("port: [\n", "FILE: line "),
        ("port:\n", "FILE: port: \"null\": want a value"),
        ("peers: [[1]]\n", "FILE: peers: \"[[1]]\": want a value"),
        ("port: [1, 2]\n", "FILE: port: \"1,2\": one value is enough"),
    ] {
        let error = start(Some(yaml), &[], line).unwrap_err();
        assert!(error.starts_with(says), "{yaml:?}: {error}");
    }
    assert!(start(Some("# nothing\n"), &[], line).is_ok());
    assert!(start(Some(r#"{"port": 9}"#), &[], line).is_ok(), "JSON is YAML");
    assert!(start(Some(&" ".repeat(1 << 20)), &[], line).is_ok());
    assert!(start(Some(&"#".repeat((1 << 20) + 1)), &[], line).unwrap_err().contains("longer than"));
    let missing = [(FILE_VARIABLE, "/nonexistent/settings.yaml")];
    assert!(start(None, &missing, line).unwrap_err().starts_with("/nonexistent/settings.yaml: "));
}

/// What is shown can be used as a file again, and holds no secret.
#[test]
fn what_is_shown_is_a_file_without_secrets() {
    let yaml = "header:\n  authorization: Bearer s3cret\n  plain: x\nfast: false\n";
    let loaded = start(Some(yaml), &[], "serve --node n:1 --local l --peers 1,2").unwrap();
    assert_eq!(serve(&loaded).header, ["authorization=Bearer s3cret", "plain=x"]);
    let (text, json) = (loaded.effective.to_yaml(), loaded.effective.to_json());
    assert!(!text.contains("s3cret") && !json.to_string().contains("s3cret"), "{text}\n{json}");
    assert_eq!(json["peers"], serde_json::json!({ "value": ["1", "2"], "from": "command line" }));
    assert_eq!(json["remote"]["value"], serde_json::Value::Null);
    let again = start(Some(&text), &[], "serve").unwrap();
    assert_eq!((serve(&again).node.as_str(), &serve(&again).peers[..]), ("n:1", &[1, 2][..]));
}
