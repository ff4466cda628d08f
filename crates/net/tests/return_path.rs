//! Delivery to the application from the client's address, and the way back. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use common::{
    CLIENT, POD, PROXY_MARK, SOON, World, addr, dial, exchange, listen, listen_any, ns_write, within,
};
use culvert_net::redirect::{RedirectConfig, install};
use culvert_net::socket::{DialError, DialOptions, canonical, connect, original_destination};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

fn config() -> RedirectConfig {
    RedirectConfig::default()
}

/// C35, C39, Z51. Trap 1: without any one of the four parts of the return path this hangs or is reset.
#[tokio::test]
async fn inbound_is_delivered_from_the_clients_address_and_answers_come_back() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let proxy = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    for (client_ip, pod_ip) in CLIENT.into_iter().zip(POD) {
        let target = addr(pod_ip, 8080);
        let app = listen(&world.pod, target);
        let mut client = dial(&world.client, target, None).await.unwrap();
        let (mut inbound, peer) = within(proxy.accept()).await.unwrap();
        let peer = canonical(peer);
        assert_eq!(peer, client.local_addr().unwrap());
        assert_eq!(original_destination(&inbound).unwrap(), target);

        // A port of the kernel's choice, which may happen to be the client's own.
        for port in [0, peer.port()] {
            let source = SocketAddr::new(peer.ip(), port);
            let options = DialOptions {
                mark: Some(PROXY_MARK),
                source: Some(source),
                nodelay: true,
                ..Default::default()
            };
            let mut upstream = connect(&world.pod, target, &options, SOON).await.unwrap();
            let (mut served, seen) = within(app.accept()).await.unwrap();
            assert_eq!(seen.ip(), addr(client_ip, 0).ip());
            exchange(&mut client, &mut inbound).await;
            exchange(&mut upstream, &mut served).await;
            // More than one segment and window updates, both ways, and the end arrives.
            bulk(&mut upstream, &mut served).await;
            bulk(&mut served, &mut upstream).await;
            drop(upstream);
            drop(served);
        }
        exchange(&mut client, &mut inbound).await;
    }
}

/// R07, C12: a pod that takes its plaintext itself still gets what comes through the tunnel, from the client's address.
#[tokio::test]
async fn bypassing_inbound_capture_leaves_the_tunnel_its_way_back() {
    let world = World::new();
    let config = RedirectConfig { bypass_inbound: true, ..config() };
    install(&world.pod, &config).unwrap();
    let tunnel = listen_any(&world.pod, 15008, Some(PROXY_MARK));
    for (client_ip, pod_ip) in CLIENT.into_iter().zip(POD) {
        let target = addr(pod_ip, 8080);
        let app = listen(&world.pod, target);
        // Plaintext goes straight to the application.
        let mut client = dial(&world.client, target, None).await.unwrap();
        let (mut served, peer) = within(app.accept()).await.unwrap();
        assert_eq!(peer, client.local_addr().unwrap());
        exchange(&mut client, &mut served).await;
        // The tunnel ends here, and what it carries is delivered.
        let mut peer = dial(&world.client, addr(pod_ip, 15008), None).await.unwrap();
        let (mut inbound, _) = within(tunnel.accept()).await.unwrap();
        let source = Some(addr(client_ip, 0));
        let options = DialOptions { mark: Some(PROXY_MARK), source, ..Default::default() };
        let mut upstream = connect(&world.pod, target, &options, SOON).await.unwrap();
        let (mut served, seen) = within(app.accept()).await.unwrap();
        assert_eq!(seen.ip(), addr(client_ip, 0).ip());
        exchange(&mut peer, &mut inbound).await;
        exchange(&mut upstream, &mut served).await;
        bulk(&mut served, &mut upstream).await;
    }
}

async fn bulk(from: &mut TcpStream, to: &mut TcpStream) {
    let data = vec![b'x'; 1 << 20];
    let mut got = vec![0; data.len()];
    let (sent, received) =
        within(async { tokio::join!(from.write_all(&data), to.read_exact(&mut got)) }).await;
    sent.unwrap();
    received.unwrap();
    assert_eq!(got, data);
}

#[tokio::test]
async fn a_spoofed_dial_that_nobody_answers_is_refused() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    for (client_ip, pod_ip) in CLIENT.into_iter().zip(POD) {
        let options =
            DialOptions { mark: Some(PROXY_MARK), source: Some(addr(client_ip, 0)), ..Default::default() };
        let error = connect(&world.pod, addr(pod_ip, 8080), &options, SOON).await.unwrap_err();
        assert!(matches!(error, DialError::Refused(_)), "{error}");
    }
}

/// TRAP3, Z51.
#[tokio::test]
async fn a_dial_from_the_destination_itself_is_an_ordinary_self_call() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    for ip in POD {
        let target = addr(ip, 8080);
        let app = listen(&world.pod, target);
        let options = DialOptions { mark: Some(PROXY_MARK), source: Some(addr(ip, 0)), ..Default::default() };
        let mut dialed = connect(&world.pod, target, &options, SOON).await.unwrap();
        let (mut served, peer) = within(app.accept()).await.unwrap();
        assert_eq!(peer.ip(), target.ip());
        exchange(&mut dialed, &mut served).await;
    }
}

/// Z56.
/// One client with many connections: the kernel chooses ports for the dials, some of which the client has as well.
#[tokio::test]
async fn many_plaintext_connections_of_one_client() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let proxy = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    let target = addr(POD[0], 8080);
    let app = listen(&world.pod, target);
    // 100 ports on each side: the dials take ports of the clients for certain.
    for ns in [&world.client, &world.pod] {
        ns_write(ns, "/proc/sys/net/ipv4/ip_local_port_range", "40000 40099");
    }
    let mut all = Vec::new();
    for _ in 0..45 {
        let client = dial(&world.client, target, None).await.unwrap();
        let (inbound, peer) = within(proxy.accept()).await.unwrap();
        let source = SocketAddr::new(canonical(peer).ip(), 0);
        let options = DialOptions { mark: Some(PROXY_MARK), source: Some(source), ..Default::default() };
        let upstream = connect(&world.pod, target, &options, SOON).await.unwrap();
        let (served, _) = within(app.accept()).await.unwrap();
        all.push((client, inbound, upstream, served));
    }
    let ports = |f: fn(&(TcpStream, TcpStream, TcpStream, TcpStream)) -> &TcpStream| -> BTreeSet<u16> {
        all.iter().map(|c| f(c).local_addr().unwrap().port()).collect()
    };
    assert!(
        ports(|c| &c.0).intersection(&ports(|c| &c.2)).count() > 0,
        "no port is shared: this proves nothing"
    );
    for (client, inbound, upstream, served) in &mut all {
        exchange(client, inbound).await;
        exchange(upstream, served).await;
    }
}

/// A pod that leaves the mesh: nothing is redirected any more, and what its proxy still delivers is answered.
#[tokio::test]
async fn leaving_redirects_nothing_and_keeps_the_way_back() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    install(&world.pod, &config().return_path_only()).unwrap();
    let _proxy = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    for (client_ip, pod_ip) in CLIENT.into_iter().zip(POD) {
        let target = addr(pod_ip, 8080);
        let app = listen(&world.pod, target);
        let mut client = dial(&world.client, target, None).await.unwrap();
        let (mut direct, _) = within(app.accept()).await.unwrap();
        exchange(&mut client, &mut direct).await;

        let options =
            DialOptions { mark: Some(PROXY_MARK), source: Some(addr(client_ip, 0)), ..Default::default() };
        let mut upstream = connect(&world.pod, target, &options, SOON).await.unwrap();
        let (mut served, seen) = within(app.accept()).await.unwrap();
        assert_eq!(seen.ip(), addr(client_ip, 0).ip());
        exchange(&mut upstream, &mut served).await;
        // Outbound goes where it was sent, not to the proxy.
        let outside = listen(&world.client, addr(client_ip, 9090));
        let mut out = dial(&world.pod, addr(client_ip, 9090), None).await.unwrap();
        let (mut reached, _) = within(outside.accept()).await.unwrap();
        exchange(&mut out, &mut reached).await;
    }
}
