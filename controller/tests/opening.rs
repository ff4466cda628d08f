//! The program while there is no API server: its pages answer, nothing else is served, and it can be ended.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; the lint's own exception stops at #[test] functions"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Free when asked.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn page(address: SocketAddr, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
        .ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// Waits until a page is as wanted.
fn until(address: SocketAddr, path: &str, wanted: impl Fn(&str) -> bool) -> String {
    let started = Instant::now();
    loop {
        let last = page(address, path);
        match last {
            Some(text) if wanted(&text) => return text,
            last => assert!(started.elapsed() < PATIENCE, "{path}: {last:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Controller(Child);

impl Drop for Controller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// D09: a probe that comes before everything was read is answered, not refused.
#[test]
fn pages_answer_while_the_api_server_is_away_and_nothing_else_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let (xds, pages, nobody) = (free(), free(), free());
    let config = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: c, cluster: {{server: \"https://{nobody}\", insecure-skip-tls-verify: true}}}}]\nusers: [{{name: c, user: {{token: t}}}}]\ncontexts: [{{name: c, context: {{cluster: c, user: c}}}}]\n"
    );
    std::fs::write(dir.path().join("config"), config).unwrap();
    let child = Command::new(env!("CARGO_BIN_EXE_controller"))
        .args([
            "--source",
            "kubernetes",
            "--listen",
            &xds.to_string(),
            "--metrics-listen",
            &pages.to_string(),
        ])
        .env("KUBECONFIG", dir.path().join("config"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut controller = Controller(child);
    let ready = until(pages, "/healthz/ready", |text| text.contains("root certificate: Secret"));
    assert!(ready.starts_with("HTTP/1.1 500") && ready.contains("first list of everything"), "{ready}");
    let clients = until(pages, "/debug/clients", |text| text.starts_with("HTTP/1.1 200"));
    assert!(clients.ends_with("{\"clients\":[]}") || clients.contains("[]"), "{clients}");
    assert!(TcpStream::connect(xds).is_err(), "nothing is known, so nothing is served");
    let asked = Instant::now();
    let id = controller.0.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    let status = loop {
        if let Some(status) = controller.0.try_wait().unwrap() {
            break status;
        }
        assert!(asked.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(status.success(), "{status}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}
