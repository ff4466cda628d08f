//! The admin server over real loopback sockets.

use super::*;
use crate::drain::{self, Drained};
use crate::telemetry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SOON: Duration = Duration::from_secs(10);

struct Running {
    address: SocketAddr,
    drain: drain::DrainTrigger,
    tasks: Tasks,
}

fn start(server: AdminServer) -> Running {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (trigger, watcher) = drain::channel();
    let tasks = Tasks::new("test");
    tasks.spawn("admin", async move { server.serve(listener, watcher).await.unwrap() });
    tasks.close();
    Running { address, drain: trigger, tasks }
}

impl Running {
    async fn exchange(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).unwrap()
    }

    async fn request(&self, method: &str, target: &str, more: &str) -> (u16, String) {
        let answer = self
            .exchange(&format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n"))
            .await;
        let status = answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
    }

    async fn stop(self) {
        assert_eq!(self.drain.drain(SOON).await, Drained::Completely);
        assert_eq!(self.tasks.wait(SOON).await, crate::tasks::Waited::Finished);
        assert_eq!(self.tasks.panics(), 0);
    }
}

fn echo() -> AdminServer {
    AdminServer::new().route("POST", "/echo", "says it again", |request| async move {
        text(StatusCode::OK, format!("{} {}", request.query("q").unwrap_or("-"), request.body.len()))
    })
}

/// Z113.
#[tokio::test]
async fn routes_and_index() {
    let server = start(echo().metrics(&Metrics::for_process("test", "0")));
    assert_eq!(server.request("POST", "/echo?a=b&q=x%20y+z%zz", "").await, (200, "x y z%zz 0".to_owned()));
    assert_eq!(server.request("GET", "/echo", "").await.0, 405);
    assert_eq!(server.request("GET", "/nothing", "").await.0, 404);
    let (status, index) = server.request("GET", "/", "").await;
    assert!(status == 200 && index.contains("/echo") && index.contains("says it again"), "{index}");
    let (status, metrics) = server.request("GET", "/metrics", "").await;
    assert!(status == 200 && metrics.ends_with("# EOF\n"), "{metrics}");
    assert_eq!(server.request("HEAD", "/metrics", "").await, (200, String::new()));
    server.stop().await;
}

/// Z06.
#[tokio::test]
async fn readiness_lists_what_is_pending() {
    let readiness = Readiness::new();
    let task = readiness.register("xds");
    let server = start(AdminServer::new().readiness(readiness));
    assert_eq!(
        server.request("GET", "/healthz/ready", "").await,
        (500, "not ready, pending:\nxds\n".to_owned())
    );
    task.done();
    assert_eq!(server.request("GET", "/healthz/ready", "").await, (200, "ready\n".to_owned()));
    server.stop().await;
}

/// Z07. Z113: a GET, or a page in a browser, ends nothing.
#[tokio::test]
async fn quitting_is_asked_for_by_post_only() {
    let quit = Arc::new(Notify::new());
    let server = start(AdminServer::new().quit(quit.clone()));
    assert_eq!(server.request("GET", "/quitquitquit", "").await.0, 405);
    assert_eq!(server.request("POST", "/quitquitquit", "origin: http://evil\r\n").await.0, 403);
    let asked = quit.notified();
    tokio::pin!(asked);
    assert!(futures_util::poll!(&mut asked).is_pending());
    assert_eq!(server.request("POST", "/quitquitquit", "").await, (200, "draining\n".to_owned()));
    asked.await;
    let (_, index) = server.request("GET", "/", "").await;
    assert!(index.contains("<td>/quitquitquit<td>POST"), "no link to it: {index}");
    server.stop().await;
}

/// Z113. Z109.
#[tokio::test]
async fn the_log_filter_is_changed_but_not_by_a_browser() {
    let (_dispatch, telemetry) = telemetry::build(telemetry::Format::Text, "info", io::sink()).unwrap();
    let server = start(AdminServer::new().logging(&telemetry.filter()));
    assert_eq!(server.request("POST", "/logging?level=debug", "").await, (200, "debug\n".to_owned()));
    assert_eq!(server.request("POST", "/logging?level=a=b=c", "").await.0, 400);
    assert_eq!(server.request("POST", "/logging", "").await.0, 400);
    assert_eq!(server.request("POST", "/logging?level=off", "origin: http://evil\r\n").await.0, 403);
    assert_eq!(server.request("GET", "/logging", "").await, (200, "debug\n".to_owned()));
    assert_eq!(server.request("POST", "/logging?level=info,a::b=trace", "").await.0, 200);
    assert!(server.request("GET", "/logging", "").await.1.contains("a::b=trace"), "per module");
    assert_eq!(server.request("POST", "/logging?reset", "").await, (200, "info\n".to_owned()));
    server.stop().await;
}

#[tokio::test]
async fn bodies_and_heads_are_bounded() {
    let server = start(echo());
    let body = "x".repeat(MAX_BODY_BYTES);
    let most = format!("content-length: {MAX_BODY_BYTES}\r\n\r\n{body}");
    assert_eq!(server.request("POST", "/echo", &most).await, (200, format!("- {MAX_BODY_BYTES}")));
    let more = format!("content-length: {}\r\n", MAX_BODY_BYTES + 1);
    assert_eq!(server.request("POST", "/echo", &more).await.0, 413);
    let head = format!("x: {}\r\n", "x".repeat(MAX_HEAD_BYTES));
    assert_eq!(server.request("POST", "/echo", &head).await.0, 431);
    server.stop().await;
}

#[tokio::test]
async fn silent_connections_are_cut_and_make_room() {
    let server = start(echo());
    let mut silent = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    // All places are taken by connections that say nothing, so this is served only once the head timeout has cut one.
    let begun = std::time::Instant::now();
    assert_eq!(server.request("POST", "/echo", "").await.0, 200);
    assert!(begun.elapsed() > HEAD_TIMEOUT / 2, "the places were not taken");
    drop(silent);
    server.stop().await;
}
