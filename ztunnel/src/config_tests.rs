//! The proxy's settings as the program reads them.

use std::ffi::OsString;

use clap::Parser;
use culvert_runtime::config::{LoadError, Loaded, Sources, load};

use super::*;

#[derive(Debug, Parser)]
struct Cli {
    #[arg(long)]
    config: Option<PathBuf>,
    #[command(flatten)]
    proxy: ProxyConfig,
}

const REQUIRED: &str = "--node n --xds-address https://c:15012 --xds-root-cert r --token-file t";

fn start(env: &[(&str, &str)], line: &str) -> Result<Loaded<Cli>, String> {
    let arguments = format!("ztunnel {line}").split_whitespace().map(OsString::from).collect();
    let environment = env.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    load::<Cli>(&Sources { arguments, environment }, PROGRAM).map_err(|error| match error {
        LoadError::Config(errors) => errors.to_string(),
        LoadError::Usage(error) => format!("usage: {error}"),
    })
}

fn proxy(env: &[(&str, &str)], line: &str) -> ProxyConfig {
    start(env, line).unwrap().settings.proxy
}

/// Z118: the variables that ambient's manifests set start this proxy too.
#[test]
fn ambients_variables_are_enough() {
    let env = [
        ("XDS_ADDRESS", "istiod.istio-system.svc:15012"),
        ("XDS_ROOT_CA", "/root.pem"),
        ("TOKEN_FILE", "/token"),
        ("NODE_NAME", "node-1"),
        ("INPOD_UDS", "/zds.sock"),
        ("CLUSTER_DOMAIN", "example.org"),
        ("ISTIO_META_DNS_CAPTURE", "true"),
        ("ISTIO_METAJSON_LABELS", r#"{"team": "a", "n": 3, "DNS_CAPTURE": "false"}"#),
        ("XDS_HEADER_X-Tenant", "blue"),
        ("CA_HEADER_X-Proof", "s3cret"),
        (
            "PROXY_CONFIG",
            "discoveryAddress: elsewhere:1\nconcurrency: 3\nstatusPort: 15090\nproxyAdminPort: 15999\nmeshId: m\nterminationDrainDuration: 7s\nproxyMetadata: {ISTIO_META_NETWORK: net, team: b}\n",
        ),
    ];
    let loaded = start(&env, "").unwrap();
    let json = loaded.effective.to_json();
    let config = loaded.settings.proxy;
    assert_eq!(config.xds_address.as_deref(), Some("https://istiod.istio-system.svc:15012"));
    assert_eq!(config.xds_root_cert, Some("/root.pem".into()));
    assert_eq!(
        (config.zds_socket.to_str(), config.cluster_domain.as_str()),
        (Some("/zds.sock"), "example.org")
    );
    assert_eq!((config.workers.as_str(), config.drain_deadline()), ("3", Duration::from_secs(7)));
    assert_eq!(
        (config.metrics_listen.port(), config.admin_listen.to_string()),
        (15090, "127.0.0.1:15999".into())
    );
    let metadata: Vec<_> = config.node_metadata.iter().map(|it| format!("{}={}", it.key, it.value)).collect();
    assert_eq!(metadata, ["DNS_CAPTURE=true", "NETWORK=net", "n=3", "team=a"]);
    assert_eq!(
        (config.xds_header[0].name.as_str(), config.xds_header[0].value.to_str().unwrap()),
        ("x-tenant", "blue")
    );
    assert_eq!(config.ca_header[0].name, "x-proof");
    assert!(!json.to_string().contains("s3cret"), "{json}");
    assert_eq!(json["workers"]["from"], "variable PROXY_CONFIG");
    assert_eq!(json["xds-root-cert"]["from"], "variable XDS_ROOT_CA");
}

/// Z118: what a variable gets wrong is named with the variable, the value and what would be right.
#[test]
fn wrong_variables_are_named() {
    for (name, value, says) in [
        (
            "SECRET_TTL",
            "1 day",
            "variable SECRET_TTL: certificate-ttl: \"1 day\": \"1 day\" is not a duration: want",
        ),
        ("STATS_ADDR", "15020", "variable STATS_ADDR: metrics-listen: \"15020\": invalid socket address"),
        ("XDS_ADDRESS", "http://x", "variable XDS_ADDRESS: xds-address: \"http://x\": \"http\" is not https"),
        (
            "PROXY_CONFIG",
            "concurency: 2",
            "variable PROXY_CONFIG: unknown key \"concurency\"; the nearest is \"concurrency\"",
        ),
        ("PROXY_CONFIG", "statusPort: 70000", "variable PROXY_CONFIG: statusPort: \"70000\": want a port"),
        ("PROXY_CONFIG", "a: [", "variable PROXY_CONFIG: line "),
        ("ISTIO_METAJSON_X", "1", "variable ISTIO_METAJSON_X: ISTIO_METAJSON_X: \"1\": want a JSON object"),
        ("XDS_HEADER_GRPC-TIMEOUT", "1", "variables XDS_HEADER_*: xds-header: \"GRPC-TIMEOUT=1\": header"),
    ] {
        let line = if name == "XDS_ADDRESS" { "--node n --xds-root-cert r --token-file t" } else { REQUIRED };
        let error = start(&[(name, value)], line).unwrap_err();
        assert!(error.starts_with(says), "{name}: {error}");
    }
    let error = start(&[], "--node n").unwrap_err();
    assert!(error.contains("--xds-address <XDS_ADDRESS>") && error.contains("--token-file"), "{error}");
}

/// Z09.
#[test]
fn the_drain_deadline_follows_the_grace_period_unless_it_is_set() {
    let deadline = |env: &[(&str, &str)]| proxy(env, REQUIRED).drain_deadline().as_secs();
    assert_eq!(deadline(&[]), 5);
    for (grace, seconds) in [("30", 25), ("11", 6), ("10", 9), ("2", 1), ("1", 1), ("0", 1)] {
        assert_eq!(deadline(&[("TERMINATION_GRACE_PERIOD_SECONDS", grace)]), seconds, "{grace}");
    }
    let both = [("TERMINATION_GRACE_PERIOD_SECONDS", "30"), ("CONNECTION_TERMINATION_DEADLINE", "3s")];
    assert_eq!(deadline(&both), 3);
}

/// Z100: a local file needs no control plane, and not both are taken.
#[test]
fn a_local_file_stands_for_the_control_plane() {
    let config = proxy(&[], "--node n --local-xds f.yaml");
    assert!(config.xds_address.is_none() && config.validate().is_ok());
    let error = start(&[("LOCAL_XDS_PATH", "f.yaml")], REQUIRED).unwrap_err();
    assert!(error.contains("cannot be used with"), "{error}");
    let config = proxy(&[], "--node n --local-xds f --ca-address c:1 --token-file t");
    assert!(config.validate().unwrap_err().to_string().contains("ca-root-cert"));
    let many: String = (0..65).map(|n| format!(" --ca-header x-{n}=1")).collect();
    assert!(proxy(&[], &format!("{REQUIRED}{many}")).validate().is_err());
}
