//! Bodies, and what becomes of a request that takes too long or has to be sent again.

use bytes::Bytes;
use culvert_model::workload::AppProtocol;
use culvert_proto::waypoint as proto;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::apps::{ask, get, http1, http2, sent};
use super::requests::plain;
use super::soon;
use super::world::{WEB, pod, route, rule, web};
use crate::http::body;

fn within(milliseconds: u64) -> Option<proto::Timeouts> {
    Some(proto::Timeouts { request_ms: milliseconds, backend_ms: 0 })
}

/// W36.
#[tokio::test]
async fn what_takes_too_long_is_a_504() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let rules = vec![proto::HttpRule { timeouts: within(50), ..rule("/", &[(WEB, 1)]) }];
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![route(rules)]);
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let stalled = Request::get("/").header("host", "web").header("x-stall", "1").body(body::empty()).unwrap();
    assert_eq!(ask(&mut client, stalled).await.status, 504);
    let backend = Some(proto::Timeouts { request_ms: 0, backend_ms: 50 });
    let rules = vec![proto::HttpRule { timeouts: backend, ..rule("/", &[(WEB, 1)]) }];
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![route(rules)]);
    let stalled = Request::get("/").header("host", "web").header("x-stall", "1").body(body::empty()).unwrap();
    assert_eq!(ask(&mut client, stalled).await.status, 504);
}

/// A request is sent again with its whole body, as often as its rule says and no more. W34, W36.
#[tokio::test]
async fn a_failed_request_is_repeated() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let retry = |attempts| Some(proto::Retry { attempts, codes: vec![503], backoff_ms: 1 });
    let asked = |fails: usize, body: Vec<u8>| {
        let request = Request::post("/").header("host", "web").header("x-fail", fails.to_string());
        request.body(sent(body)).unwrap()
    };
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    for (attempts, fails, length, status, served) in
        [(2, 2, 1000, 200, 3), (1, 9, 1000, 503, 2), (3, 9, 100_000, 503, 1), (0, 9, 0, 503, 1)]
    {
        let rules = vec![proto::HttpRule { retry: retry(attempts), ..rule("/", &[(WEB, 1)]) }];
        world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![route(rules)]);
        app.requests.store(0, std::sync::atomic::Ordering::Relaxed);
        let got = ask(&mut client, asked(fails, vec![b'x'; length])).await;
        assert_eq!((got.status, app.served()), (status, served), "{attempts} {fails} {length}");
        assert!(got.body.ends_with(&format!(" {}", "x".repeat(length))), "the whole body each time");
    }
}

/// A rule that repeats what failed does so a few times also where nobody listens.
#[tokio::test]
async fn a_dead_endpoint_is_asked_a_few_times() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let retry = Some(proto::Retry { attempts: 3, codes: vec![503], backoff_ms: 1 });
    let rules = vec![proto::HttpRule { retry, ..rule("/", &[(WEB, 1)]) }];
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", free, &[WEB])], vec![route(rules)]);
    assert_eq!(ask(&mut client, get("/")).await.status, 503);
}

/// A body is passed on also where it is unusual, and no answer is given to another question.
#[tokio::test]
async fn a_get_may_have_a_body() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut tunnel = world.tunnel().await;
    let asked = b"GET /_search HTTP/1.1\r\nhost: web\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    soon(tunnel.write_all(asked)).await.unwrap();
    let mut said = String::new();
    soon(tunnel.read_to_string(&mut said)).await.unwrap();
    assert!(said.contains("GET web/_search hello"), "{said}");
}

/// A body of these frames, as a stream of unknown length.
fn frames(data: Vec<Bytes>, trailers: Option<HeaderMap>) -> body::Body {
    let data = data.into_iter().map(Frame::data).chain(trailers.map(Frame::trailers));
    StreamBody::new(futures_util::stream::iter(data.map(Ok))).boxed_unsync()
}

/// Bodies of any length pass as they come, and trailers after them, which is how gRPC tells how it went.
#[tokio::test]
async fn bodies_stream_and_trailers_follow() {
    let (world, _app) = plain(AppProtocol::Grpc).await;
    let mut client = http2(&world.tasks, world.tunnel().await).await;
    let chunk = Bytes::from(vec![b'x'; 64 << 10]);
    let trailers: HeaderMap = [("grpc-status".parse().unwrap(), "5".parse().unwrap())].into_iter().collect();
    let request = Request::post("http://web/stream").header("content-type", "application/grpc");
    let request = request.body(frames(vec![chunk; 100], Some(trailers))).unwrap();
    let response = soon(client.send_request(request)).await.unwrap();
    let collected = soon(response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "5");
    assert_eq!(collected.to_bytes().len(), 100 * (64 << 10));
    drop(client);
    let counted = async {
        while !world.metrics().contains(r#"grpc_response_status="5""#) {
            tokio::task::yield_now().await;
        }
    };
    soon(counted).await;
}

#[tokio::test]
async fn bodies_stream_over_http1_too() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let chunk = Bytes::from(vec![b'x'; 64 << 10]);
    for _ in 0..3 {
        let request = Request::post("/stream").header("host", "web");
        let request = request.body(frames(vec![chunk.clone(); 50], None)).unwrap();
        let got = ask(&mut client, request).await;
        assert_eq!((got.status, got.body.len()), (200, 50 * (64 << 10)));
    }
}

/// What breaks off in the middle never looks like an end, nor does what takes too long.
#[tokio::test]
async fn half_a_response_is_no_response() {
    for (header, http) in [("x-break", 1), ("x-break", 2), ("x-hang", 1), ("x-hang", 2)] {
        let (world, app) = plain(AppProtocol::Http11).await;
        let rules = vec![proto::HttpRule { timeouts: within(200), ..rule("/", &[(WEB, 1)]) }];
        world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![route(rules)]);
        let chunks = vec![Bytes::from_static(b"some"), Bytes::from_static(b"more")];
        let request = Request::post("http://web/stream").header(header, "1");
        let request = request.body(frames(chunks, None)).unwrap();
        let response = match http {
            1 => {
                let mut client = http1(&world.tasks, world.tunnel().await).await;
                let (mut parts, body) = request.into_parts();
                parts.uri = "/stream".parse().unwrap();
                parts.headers.insert("host", "web".parse().unwrap());
                soon(client.send_request(Request::from_parts(parts, body))).await
            }
            _ => {
                let mut client = http2(&world.tasks, world.tunnel().await).await;
                soon(client.send_request(request)).await
            }
        };
        let response = response.unwrap();
        // It may break before its head has come.
        if response.status() == 200 {
            assert!(soon(response.into_body().collect()).await.is_err(), "{header} HTTP/{http}");
        } else {
            assert_eq!((response.status().as_u16(), header), (503, "x-break"), "HTTP/{http}");
        }
    }
}
