//! The program as its operator meets it: settings, readiness, a local configuration that changes, profiles, and its end.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(60);
const WORKLOAD: &str =
    "workloads:\n- uid: c//Pod/shop/cart\n  name: cart\n  namespace: shop\n  addresses: [10.0.0.1]\n";

/// A proxy of a node without an agent, with a mesh from a file.
struct Proxy {
    dir: tempfile::TempDir,
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    admin: SocketAddr,
    readiness: SocketAddr,
}

fn vacant() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn ztunnel(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.args(arguments).env_clear().stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

impl Proxy {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (admin, readiness, at) = (vacant(), vacant(), dir.path().display());
        let settings = format!(
            "node: n\nlocal-xds: {at}/mesh.yaml\nzds-socket: {at}/zds.sock\nadmin-listen: {admin}\n\
             readiness-listen: {readiness}\nmetrics-listen: {}\ndrain-deadline: 1s\nlog-level: debug\n",
            vacant()
        );
        std::fs::write(dir.path().join("settings.yaml"), settings).unwrap();
        put(dir.path(), "workloads: nothing\n");
        let file = dir.path().join("settings.yaml").display().to_string();
        let mut process = ztunnel(&["proxy", "--config", &file]).env("LOG_LEVEL", "info").spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { dir, process, lines, admin, readiness }
    }

    /// Reads the log up to a line with this text.
    fn says(&mut self, text: &str) {
        assert!(self.lines.any(|line| line.unwrap().contains(text)), "the log ended before {text:?}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Replaces the mesh as a mounted file is replaced: by a rename.
fn put(dir: &Path, text: &str) {
    std::fs::write(dir.join("next"), text).unwrap();
    std::fs::rename(dir.join("next"), dir.join("mesh.yaml")).unwrap();
}

/// Status and body.
fn ask(address: SocketAddr, method: &str, target: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    write!(stream, "{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// Z06, Z07, Z100, Z112, Z113, Z118.
#[test]
fn from_start_to_end() {
    let mut proxy = Proxy::start();
    // The first file is bad: the program serves, and says what it waits for.
    proxy.says("local configuration is refused");
    let (status, pending) = ask(proxy.readiness, "GET", "/healthz/ready");
    assert_eq!(status, 500);
    assert!(
        pending.contains("first push of the control plane") && pending.contains("node agent snapshot"),
        "{pending}"
    );

    put(proxy.dir.path(), WORKLOAD);
    proxy.says("local configuration is in force");
    let (status, pending) = ask(proxy.readiness, "GET", "/healthz/ready");
    assert_eq!((status, pending.as_str()), (500, "not ready, pending:\nnode agent snapshot\n"));
    let dump =
        || serde_json::from_str::<serde_json::Value>(&ask(proxy.admin, "GET", "/config_dump").1).unwrap();
    let known = dump();
    assert_eq!(known["workloads"][0]["uid"], "c//Pod/shop/cart");
    assert_eq!(
        known["config"]["log-level"],
        serde_json::json!({ "value": "info", "from": "variable LOG_LEVEL" })
    );
    let from = known["config"]["drain-deadline"]["from"].as_str().unwrap();
    assert!(from.ends_with("settings.yaml"), "{from}");

    put(proxy.dir.path(), "workloads: [{uid: x, addresses: [nonsense]}]\n");
    proxy.says("the last good one stays in force");
    let dump =
        || serde_json::from_str::<serde_json::Value>(&ask(proxy.admin, "GET", "/config_dump").1).unwrap();
    assert_eq!(dump()["workloads"], known["workloads"]);
    put(proxy.dir.path(), "services: []\n");
    proxy.says("local configuration is in force");
    assert_eq!(ask(proxy.admin, "GET", "/config_dump").1.matches("c//Pod/shop/cart").count(), 0);

    assert_eq!(ask(proxy.admin, "GET", "/debug/pprof/profile?seconds=1").0, 200);
    assert_eq!(ask(proxy.admin, "GET", "/debug/pprof/heap").0, 409, "sampling is off until it is asked for");
    assert_eq!(ask(proxy.admin, "POST", "/debug/pprof/heap?active=true").0, 200);
    assert!(ask(proxy.admin, "GET", "/").1.contains("<a href=\"/config_dump\">"));

    assert_eq!(ask(proxy.admin, "POST", "/quitquitquit"), (200, "draining\n".to_owned()));
    proxy.says("asked to end");
    let deadline = Instant::now() + SOON;
    let status = loop {
        match proxy.process.try_wait().unwrap() {
            Some(status) => break status,
            None => assert!(Instant::now() < deadline, "it does not end"),
        }
        std::thread::yield_now();
    };
    assert!(status.success(), "{status}");
}

/// Z118: mistakes end the start with code 2 and name the key; what is in force can be printed without a start.
#[test]
fn mistakes_end_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("settings.yaml").display().to_string();
    let start = |settings: &str, command: &str| {
        std::fs::write(&file, settings).unwrap();
        let output = ztunnel(&[command, "--config", &file, "--print-config"]).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.code(), text(output.stdout), text(output.stderr).replace(&file, "FILE"))
    };
    let (code, _, error) = start("node: n\nlocal-xds: f\ndrain-dedline: 5s\n", "proxy");
    assert_eq!(code, Some(2));
    assert_eq!(error, "FILE: unknown key \"drain-dedline\"; the nearest is \"drain-deadline\"\n");
    let (code, _, error) = start("node: n\nlocal-xds: f\npool-idle: long\n", "proxy");
    assert!(code == Some(2) && error.starts_with("FILE: pool-idle: \"long\": "), "{error}");
    let (code, printed, _) = start("node: n\nlocal-xds: f\n", "proxy");
    assert_eq!(code, Some(0));
    assert!(
        printed.contains("pool-idle: \"5m\" # default\n") && printed.contains("node: \"n\" # /"),
        "{printed}"
    );
    // The agent reads its settings in the same way.
    let (code, _, error) = start("node: n\nmanifest: m\nstate: s\n", "agent");
    assert!(code == Some(2) && error.contains("the nearest is \"manifests\""), "{error}");
    let (code, printed, _) = start("node: n\nmanifests: m\nstate: s\n", "agent");
    assert!(
        code == Some(0) && printed.contains("exclude-namespaces: \"kube-system\" # default"),
        "{printed}"
    );
}
