//! Streams that are no requests.

use culvert_hbone::error::ConnectError;
use culvert_model::workload::{AppProtocol, TunnelProtocol};
use culvert_proto::waypoint as proto;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::apps::node_tunnel;
use super::soon;
use super::world::{VIP, WEB, World, backend, identity, own_address, pod, route, service, web};

const DB: &str = "shop/db.shop.svc.cluster.local";

/// A listener that is the service's endpoint.
async fn world(app_protocol: AppProtocol) -> (World, TcpListener) {
    let world = World::new(vec![], vec![], vec![]).await;
    let app = TcpListener::bind("127.0.0.1:0").await.unwrap();
    world.know(vec![web(app_protocol)], vec![pod("one", app.local_addr().unwrap(), &[WEB])], vec![]);
    (world, app)
}

/// Half-closes are kept both ways, with and without a protocol that is declared.
#[tokio::test]
async fn bytes_pass_both_ways() {
    for app_protocol in [AppProtocol::Tcp, AppProtocol::Unknown] {
        let (world, app) = world(app_protocol).await;
        let mut tunnel = world.tunnel().await;
        soon(tunnel.write_all(b"question")).await.unwrap();
        soon(tunnel.shutdown()).await.unwrap();
        let (mut accepted, _) = soon(app.accept()).await.unwrap();
        let mut heard = String::new();
        soon(accepted.read_to_string(&mut heard)).await.unwrap();
        assert_eq!(heard, "question");
        accepted.write_all(b"answer").await.unwrap();
        drop(accepted);
        let mut heard = String::new();
        soon(tunnel.read_to_string(&mut heard)).await.unwrap();
        assert_eq!(heard, "answer");
    }
}

/// A server that speaks first is not kept waiting for the client.
#[tokio::test]
async fn a_server_may_speak_first() {
    let (world, app) = world(AppProtocol::Unknown).await;
    let mut tunnel = world.tunnel().await;
    let (mut accepted, _) = soon(app.accept()).await.unwrap();
    accepted.write_all(b"220 ready").await.unwrap();
    let mut heard = [0; 9];
    soon(tunnel.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"220 ready");
}

/// Through a tunnel to the endpoint. W16.
#[tokio::test]
async fn from_tunnel_to_tunnel() {
    let world = World::new(vec![], vec![], vec![]).await;
    let ip = own_address(2);
    let app = TcpListener::bind((ip.as_str(), 0)).await.unwrap();
    node_tunnel(&world.tasks, &world.authority, &ip, &identity("shop", "one")).await;
    let mut one = pod("one", app.local_addr().unwrap(), &[WEB]);
    one.tunnel_protocol = TunnelProtocol::Hbone;
    world.know(vec![web(AppProtocol::Tcp)], vec![one], vec![]);
    let mut tunnel = world.tunnel().await;
    let (mut accepted, _) = soon(app.accept()).await.unwrap();
    soon(tunnel.write_all(b"question")).await.unwrap();
    let mut heard = [0; 8];
    soon(accepted.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"question");
    accepted.write_all(b"answer").await.unwrap();
    let mut heard = [0; 6];
    soon(tunnel.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"answer");
}

/// Whether the destination accepts is what answers the CONNECT.
#[tokio::test]
async fn a_refused_connection_is_a_refused_tunnel() {
    let (world, app) = world(AppProtocol::Tcp).await;
    drop(app);
    match world.tunnel_to(&identity("shop", "client"), &format!("{VIP}:80")).await {
        Err(ConnectError::Refused { status, .. }) => assert_eq!(status, 503),
        other => panic!("{other:?}"),
    }
}

/// W28.
#[tokio::test]
async fn a_tcp_route_leads_elsewhere() {
    let (world, _app) = world(AppProtocol::Unknown).await;
    let db = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rule = proto::StreamRule { backends: vec![backend(DB, 1)] };
    let tcp = proto::Route { kind: "TCPRoute".into(), stream_rules: vec![rule], ..route(vec![]) };
    let services = vec![web(AppProtocol::Unknown), service(DB, "198.18.0.5", 80, AppProtocol::Tcp)];
    world.know(services, vec![pod("db", db.local_addr().unwrap(), &[DB])], vec![tcp]);
    let mut tunnel = world.tunnel().await;
    let (mut accepted, _) = soon(db.accept()).await.unwrap();
    soon(tunnel.write_all(b"hello")).await.unwrap();
    let mut heard = [0; 5];
    soon(accepted.read_exact(&mut heard)).await.unwrap();
    assert_eq!(&heard, b"hello");
}

/// By the server name that the client asks for; the TLS itself passes as it is. W28, R21.
#[tokio::test]
async fn a_tls_route_is_told_by_the_server_name() {
    let (world, _app) = world(AppProtocol::Tls).await;
    let db = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rule = proto::StreamRule { backends: vec![backend(DB, 1)] };
    let tls = proto::Route {
        kind: "TLSRoute".into(),
        hostnames: vec!["*.example.org".into()],
        stream_rules: vec![rule],
        ..route(vec![])
    };
    let services = vec![web(AppProtocol::Tls), service(DB, "198.18.0.5", 80, AppProtocol::Tcp)];
    world.know(services, vec![pod("db", db.local_addr().unwrap(), &[DB])], vec![tls]);
    let hello = |name: &'static str| {
        let certificate = world.authority.certificate(&identity("shop", "client"));
        let mut config = (*culvert_identity::tls::client_config(&certificate, &[])).clone();
        config.enable_sni = true;
        let name = name.try_into().unwrap();
        let mut connection = rustls::ClientConnection::new(std::sync::Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut bytes).unwrap();
        }
        bytes
    };
    let sent = hello("db.example.org");
    let mut tunnel = world.tunnel().await;
    // In two parts, as networks deliver.
    soon(tunnel.write_all(&sent[..10])).await.unwrap();
    soon(tunnel.write_all(&sent[10..])).await.unwrap();
    let (mut accepted, _) = soon(db.accept()).await.unwrap();
    let mut heard = vec![0; sent.len()];
    soon(accepted.read_exact(&mut heard)).await.unwrap();
    assert!(heard == sent);
    let mut tunnel = world.tunnel().await;
    soon(tunnel.write_all(&hello("other.example.com"))).await.unwrap();
    assert!(soon(tunnel.read_u8()).await.is_err(), "nobody's name");
}
