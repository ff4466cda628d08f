//! Requests through the waypoint.

use std::collections::BTreeSet;

use culvert_hbone::error::ConnectError;
use culvert_model::outcome::Reason;
use culvert_model::workload::{AppProtocol, TunnelProtocol};
use http::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::apps::{App, ask, get, http1, http2, node_tunnel, read, sent};
use super::soon;
use super::world::{VIP, WEB, World, identity, own_address, pod, route, rule, service, web};
use crate::http::body;

/// One application behind the service, without routes.
pub async fn plain(app_protocol: AppProtocol) -> (World, App) {
    let world = World::new(vec![], vec![], vec![]).await;
    let app = App::start(&world.tasks, "one", "127.0.0.1").await;
    world.know(vec![web(app_protocol)], vec![pod("one", app.address, &[WEB])], vec![]);
    (world, app)
}

/// W16, W22: the address says which service it is, and `Host` stays as it was.
#[tokio::test]
async fn a_request_reaches_the_application_and_its_answer_the_client() {
    for app_protocol in [AppProtocol::Http11, AppProtocol::Unknown] {
        let (world, _app) = plain(app_protocol).await;
        let mut client = http1(&world.tasks, world.tunnel().await).await;
        let post = Request::post("/a/b?q=1").header("host", "web:80").header("x-a", "1");
        let got = ask(&mut client, post.body(sent("question")).unwrap()).await;
        assert_eq!((got.status, got.body.as_str()), (200, "one HTTP/1.1 POST web:80/a/b?q=1 question"));
        assert_eq!((got.header("seen-x-a"), got.header("seen-content-length")), ("1", "8"));
    }
}

/// One connection of the client, one to the application, many requests.
#[tokio::test]
async fn connections_are_used_again() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    for _ in 0..20 {
        assert_eq!(ask(&mut client, get("/")).await.status, 200);
    }
    let connections = app.connections.load(std::sync::atomic::Ordering::Relaxed);
    assert!(connections <= 2, "{connections} connections for 20 requests");
}

/// R18: what comes as HTTP/2 goes as HTTP/2; many requests on one connection go to all endpoints.
#[tokio::test]
async fn requests_of_one_connection_are_balanced() {
    let world = World::new(vec![], vec![], vec![]).await;
    let one = App::start(&world.tasks, "one", "127.0.0.1").await;
    let two = App::start(&world.tasks, "two", "127.0.0.2").await;
    let pods = vec![pod("one", one.address, &[WEB]), pod("two", two.address, &[WEB])];
    world.know(vec![web(AppProtocol::Unknown)], pods, vec![]);
    let client = http2(&world.tasks, world.tunnel().await).await;
    let mut served = BTreeSet::new();
    for _ in 0..50 {
        let request = Request::get("http://web/").body(body::empty()).unwrap();
        let got = read(soon(client.clone().send_request(request)).await.unwrap()).await;
        assert_eq!(got.status, 200);
        assert!(got.body.contains("HTTP/2.0 GET web/"), "{}", got.body);
        served.insert(got.header("x-app").to_owned());
    }
    assert_eq!(served.len(), 2, "50 requests, each for itself");
}

/// An application that declares HTTP/2 is spoken to by HTTP/2, also for a client that speaks HTTP/1.
#[tokio::test]
async fn a_port_that_declares_http2() {
    let (world, _app) = plain(AppProtocol::Http2).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let got = ask(&mut client, get("/")).await;
    assert!(got.body.starts_with("one HTTP/2.0 GET web/"), "{}", got.body);
}

/// The whole path is encrypted: a tunnel to the endpoint, whose identity is pinned. W16, W18.
#[tokio::test]
async fn through_a_tunnel_to_the_endpoint() {
    let world = World::new(vec![], vec![], vec![]).await;
    let ip = own_address(1);
    let app = App::start(&world.tasks, "one", &ip).await;
    node_tunnel(&world.tasks, &world.authority, &ip, &identity("shop", "one")).await;
    let mut one = pod("one", app.address, &[WEB]);
    one.tunnel_protocol = TunnelProtocol::Hbone;
    world.know(vec![web(AppProtocol::Http11)], vec![one.clone()], vec![]);
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    assert_eq!(ask(&mut client, get("/")).await.status, 200);

    one.identity = identity("shop", "other");
    world.shared.workers()[0].evict(&[app.address.ip()].into());
    world.know(vec![web(AppProtocol::Http11)], vec![one], vec![]);
    let got = ask(&mut client, get("/")).await;
    assert_eq!((got.status, got.body.as_str()), (503, "upstream connect error"), "it is somebody else");
}

/// W15, W17.
#[tokio::test]
async fn what_is_not_bound_here_is_refused() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut other = service("shop/other.shop.svc.cluster.local", "198.18.0.9", 80, AppProtocol::Http11);
    other.waypoint = None;
    world.know(vec![web(AppProtocol::Http11), other], vec![pod("one", app.address, &[WEB])], vec![]);
    let client = identity("shop", "client");
    for asked in ["198.18.0.9:80", "198.18.0.1:81", "203.0.113.1:80", "127.0.0.1:80", "nobody.shop:80"] {
        match world.tunnel_to(&client, asked).await {
            Err(ConnectError::Refused { status, .. }) => assert_eq!(status, 400, "{asked}"),
            other => panic!("{asked}: {other:?}"),
        }
    }
    assert!(world.tunnel_to(&client, "web.shop.svc.cluster.local:80").await.is_ok(), "by its name");
    assert!(world.metrics().contains(r#"tunnels_refused_total{reason="wrong_destination"} 4"#));
}

/// W34.
#[tokio::test]
async fn what_no_endpoint_can_answer() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    world.know(vec![web(AppProtocol::Http11)], vec![], vec![]);
    let got = ask(&mut client, get("/")).await;
    assert_eq!((got.status, got.body.as_str()), (503, "no healthy upstream"));

    // A port that nobody listens on.
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", free, &[WEB])], vec![]);
    let got = ask(&mut client, get("/")).await;
    assert_eq!((got.status, got.body.as_str()), (503, "upstream connect error"));

    // Beside one that answers: the client notices nothing.
    let pods = vec![pod("dead", free, &[WEB]), pod("one", app.address, &[WEB])];
    world.know(vec![web(AppProtocol::Http11)], pods, vec![]);
    for _ in 0..20 {
        assert_eq!(ask(&mut client, get("/")).await.status, 200);
    }

    world.know(vec![], vec![], vec![]);
    assert_eq!(ask(&mut client, get("/")).await.status, 503, "the service is gone");
}

/// gRPC is told in its own words.
#[tokio::test]
async fn grpc_is_told_in_its_own_words() {
    let (world, app) = plain(AppProtocol::Grpc).await;
    let client = http2(&world.tasks, world.tunnel().await).await;
    let call = || {
        let request = Request::post("http://web/a.B/Get").header("content-type", "application/grpc");
        request.body(body::empty()).unwrap()
    };
    world.know(vec![web(AppProtocol::Grpc)], vec![], vec![]);
    let got = read(soon(client.clone().send_request(call())).await.unwrap()).await;
    assert_eq!((got.status, got.header("grpc-status")), (200, "14"), "{got:?}");

    let other = rule("/other.Service", &[(WEB, 1)]);
    world.know(vec![web(AppProtocol::Grpc)], vec![pod("one", app.address, &[WEB])], vec![route(vec![other])]);
    let got = read(soon(client.clone().send_request(call())).await.unwrap()).await;
    assert_eq!((got.status, got.header("grpc-status")), (200, "12"), "{got:?}");
}

/// W22.
#[tokio::test]
async fn a_websocket_passes() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let request = Request::get("/upgrade")
        .header("host", "web")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .body(body::empty())
        .unwrap();
    let mut response = soon(client.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 101);
    assert_eq!(response.headers()["upgrade"], "websocket");
    let mut upgraded = TokioIo::new(soon(hyper::upgrade::on(&mut response)).await.unwrap());
    soon(upgraded.write_all(b"frames")).await.unwrap();
    let mut heard = [0; 6];
    soon(upgraded.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"frames");
}

/// An application that changes the protocol when nobody asked is not believed.
#[tokio::test]
async fn nobody_is_upgraded_unasked() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    assert_eq!(ask(&mut client, get("/upgrade")).await.status, 503);
}

/// What HTTP/1 lets people write ambiguously is refused, and the application hears nothing of it.
#[tokio::test]
async fn ambiguous_heads_are_refused() {
    let (world, app) = plain(AppProtocol::Http11).await;
    for head in [
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nxx",
        "GET / HTTP/1.1\r\nhost: a\r\nconnection: host\r\n\r\n",
        "GET http://b/ HTTP/1.1\r\nhost: a\r\n\r\n",
    ] {
        let mut tunnel = world.tunnel().await;
        soon(tunnel.write_all(head.as_bytes())).await.unwrap();
        let mut answer = [0; 10];
        soon(tunnel.read_exact(&mut answer)).await.unwrap();
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.starts_with("HTTP/1.1 4") || answer.starts_with("HTTP/1.1 5"), "{head:?}: {answer}");
    }
    assert_eq!(app.served(), 0);
}

/// A drain lets what is being served finish, and says that no more is taken.
#[tokio::test]
async fn a_drain_says_goodbye() {
    let (world, _app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    assert_eq!(ask(&mut client, get("/")).await.status, 200);
    world.drain.start();
    // Idle, so it is closed at once.
    let closed = async {
        while client.ready().await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    soon(closed).await;
}

/// W70.
#[tokio::test]
async fn metrics_by_istios_names() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    assert_eq!(ask(&mut client, get("/")).await.status, 200);
    drop(client);
    let counted = async {
        while !world.metrics().contains("istio_requests_total{") {
            tokio::task::yield_now().await;
        }
    };
    soon(counted).await;
    let text = world.metrics();
    let line = text.lines().find(|line| line.starts_with("istio_requests_total{")).unwrap();
    for label in [
        r#"reporter="waypoint""#,
        r#"source_principal="spiffe://cluster.local/ns/shop/sa/client""#,
        r#"destination_service="web.shop.svc.cluster.local""#,
        r#"destination_workload="one""#,
        r#"response_code="200""#,
        r#"request_protocol="http""#,
        r#"connection_security_policy="mutual_tls""#,
    ] {
        assert!(line.contains(label), "{label} in {line}");
    }
    assert!(text.contains("istio_request_duration_milliseconds_bucket"), "{text}");
    assert_eq!(app.served(), 1);
}

/// Half a body and then nothing is the client's doing, and not the endpoint's.
#[tokio::test]
async fn a_client_that_leaves_in_the_middle_is_noticed() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut tunnel = world.tunnel().await;
    let head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\nhalf";
    soon(tunnel.write_all(head)).await.unwrap();
    let arrived = async {
        while app.served() == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(arrived).await;
    drop(tunnel);
    let counted = async {
        // Before it had an answer.
        let left = format!("response_flags=\"{}\"", Reason::ClientReset.response_flag());
        while !world.metrics().contains(&left) {
            tokio::task::yield_now().await;
        }
    };
    soon(counted).await;
}

/// A client that gives up while the application does not answer keeps no place.
#[tokio::test]
async fn a_client_that_gives_up_is_noticed() {
    let world = World::with(&["--max-tunnels=1"]).await;
    let app = App::start(&world.tasks, "one", "127.0.0.1").await;
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![]);
    for _ in 0..3 {
        let again = async {
            loop {
                match world.tunnel_to(&identity("shop", "client"), &format!("{VIP}:80")).await {
                    Ok(tunnel) => return tunnel,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        };
        let mut tunnel = soon(Box::pin(again)).await;
        let served = app.served();
        soon(tunnel.write_all(b"GET / HTTP/1.1\r\nhost: web\r\nx-stall: 1\r\n\r\n")).await.unwrap();
        soon(async {
            while app.served() == served {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

/// W15, W25. Traffic that is addressed to a workload itself has policies and no routes.
#[tokio::test]
async fn a_workload_by_its_address() {
    let (world, app) = plain(AppProtocol::Http11).await;
    let mut one = pod("one", app.address, &[WEB]);
    let asked = app.address.to_string();
    let client = identity("shop", "client");
    assert!(world.tunnel_to(&client, &asked).await.is_err(), "it is not bound");
    one.waypoint = web(AppProtocol::Http11).waypoint;
    let nowhere = vec![route(vec![rule("/nowhere", &[(WEB, 1)])])];
    world.know(vec![web(AppProtocol::Http11)], vec![one], nowhere);
    let tunnel = world.tunnel_to(&client, &asked).await.unwrap();
    let mut client = http1(&world.tasks, tunnel).await;
    assert_eq!(ask(&mut client, get("/")).await.status, 200);

    // Made again elsewhere, and its address may be another's.
    let mut moved = pod("one", "127.0.0.9:1".parse().unwrap(), &[WEB]);
    moved.waypoint = web(AppProtocol::Http11).waypoint;
    world.know(vec![web(AppProtocol::Http11)], vec![moved], vec![]);
    assert_eq!(ask(&mut client, get("/")).await.status, 503);
    assert_eq!(app.served(), 1);
}

#[tokio::test]
async fn there_are_only_so_many_tunnels_and_requests() {
    let world = World::with(&["--max-tunnels=1", "--max-requests=1"]).await;
    let app = App::start(&world.tasks, "one", "127.0.0.1").await;
    world.know(vec![web(AppProtocol::Http11)], vec![pod("one", app.address, &[WEB])], vec![]);
    let client = http2(&world.tasks, world.tunnel().await).await;
    match world.tunnel_to(&identity("shop", "client"), "198.18.0.1:80").await {
        Err(ConnectError::Refused { status, .. }) => assert_eq!(status, 503),
        other => panic!("{other:?}"),
    }
    let stalled = Request::get("http://web/").header("x-stall", "1").body(body::empty()).unwrap();
    let held = client.clone().send_request(stalled);
    world.tasks.spawn("held", async move {
        let _ = held.await;
    });
    let arrived = async {
        while app.served() == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(arrived).await;
    let second = Request::get("http://web/").body(body::empty()).unwrap();
    let got = read(soon(client.clone().send_request(second)).await.unwrap()).await;
    assert_eq!((got.status, got.body.as_str()), (503, "overloaded"));
}

/// A service that asks for endpoints nearby: near to the waypoint, whose place the control plane knows. W39.
#[tokio::test]
async fn endpoints_nearby() {
    let world = World::new(vec![], vec![], vec![]).await;
    let near = App::start(&world.tasks, "near", "127.0.0.1").await;
    let far = App::start(&world.tasks, "far", "127.0.0.2").await;
    let mut service = web(AppProtocol::Http11);
    service.load_balancing.mode = culvert_model::service::LoadBalancingMode::Failover;
    service.load_balancing.scopes = [culvert_model::service::Scope::Zone].into_iter().collect();
    let mut pods = vec![pod("near", near.address, &[WEB]), pod("far", far.address, &[WEB])];
    pods[0].locality.zone.0 = "here".into();
    pods[1].locality.zone.0 = "there".into();
    world.know(vec![service], pods.clone(), vec![]);
    let mut known = (*world.shared.state.load_full()).clone();
    known.place = Some(culvert_model::balance::Place::of(&pods[0]));
    world.shared.state.commit(std::sync::Arc::new(known));
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    for _ in 0..20 {
        assert_eq!(ask(&mut client, get("/")).await.header("x-app"), "near");
    }
}
