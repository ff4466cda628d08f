//! Connections that are older than a pod's redirection (U12). Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use common::{CLIENT, POD, PROXY_MARK, SOON, World, addr, dial, exchange, listen, listen_any, within};
use culvert_net::redirect::{Established, RedirectConfig, install, remove, set_established};
use culvert_net::socket::{DialOptions, original_destination, socket_for};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Both directions in both families, opened before anything tracks connections.
async fn old_connections(world: &World) -> Vec<(TcpStream, TcpStream)> {
    let mut all = Vec::new();
    for (from, to, ips) in [(&world.client, &world.pod, POD), (&world.pod, &world.client, CLIENT)] {
        for ip in ips {
            let target = addr(ip, 8080);
            let server = listen(to, target);
            let client = dial(from, target, None).await.unwrap();
            let (served, _) = within(server.accept()).await.unwrap();
            all.push((client, served));
        }
    }
    for (client, served) in &mut all {
        exchange(client, served).await;
    }
    all
}

/// Whoever opened a connection, either end may speak first after the change.
async fn go_on(all: &mut [(TcpStream, TcpStream)]) {
    for (client, served) in all {
        exchange(client, served).await;
        exchange(served, client).await;
    }
}

/// U12: joining does not break what is open; new connections are redirected at once; so is a pod that leaves and joins again.
#[tokio::test]
async fn old_connections_of_a_pod_that_joins_go_on() {
    let world = World::new();
    let mut old = old_connections(&world).await;
    set_established(&world.pod, Established::Keep).unwrap();
    install(&world.pod, &RedirectConfig::default()).unwrap();
    go_on(&mut old).await;

    let outbound = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let inbound = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    for ip in CLIENT {
        let _app = dial(&world.pod, addr(ip, 8080), None).await.unwrap();
        let (accepted, _) = within(outbound.accept()).await.unwrap();
        assert_eq!(original_destination(&accepted).unwrap(), addr(ip, 8080));
    }
    for ip in POD {
        let _peer = dial(&world.client, addr(ip, 8080), None).await.unwrap();
        within(inbound.accept()).await.unwrap();
    }
    // Written again, as by an agent that restarts, with other settings.
    install(&world.pod, &RedirectConfig { dns_port: None, ..RedirectConfig::default() }).unwrap();
    go_on(&mut old).await;

    // Leaving: first nothing new is redirected, then nothing at all is left.
    install(&world.pod, &RedirectConfig::default().return_path_only()).unwrap();
    go_on(&mut old).await;
    remove(&world.pod).unwrap();
    go_on(&mut old).await;
}

/// What the proxy carries when a pod leaves goes on until the rules are gone.
#[tokio::test]
async fn redirected_connections_go_on_while_a_pod_leaves() {
    let world = World::new();
    install(&world.pod, &RedirectConfig::default()).unwrap();
    let outbound = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let mut app = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    let (mut accepted, _) = within(outbound.accept()).await.unwrap();
    exchange(&mut app, &mut accepted).await;
    install(&world.pod, &RedirectConfig::default().return_path_only()).unwrap();
    exchange(&mut app, &mut accepted).await;
    // And what is new goes out as it is.
    let server = listen(&world.client, addr(CLIENT[0], 8080));
    let _direct = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    within(server.accept()).await.unwrap();
}

/// A pod that lost its rules for a while: what opened meanwhile does not outlive their return.
#[tokio::test]
async fn connections_from_a_gap_are_cut() {
    let world = World::new();
    let mut old = old_connections(&world).await;
    set_established(&world.pod, Established::Cut).unwrap();
    install(&world.pod, &RedirectConfig::default()).unwrap();
    // Connections that the pod opened: their next packet goes to the proxy's port, where nobody knows them.
    for (from_pod, served) in &mut old[2..] {
        from_pod.write_all(b"x").await.unwrap();
        let ended = within(from_pod.read_u8()).await.unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
        drop(served.write_all(b"y").await);
    }
    // Connections to the pod: the peer's next packet is answered by a reset.
    for (peer, _) in &mut old[..2] {
        peer.write_all(b"x").await.unwrap();
        let ended = within(peer.read_u8()).await.unwrap_err();
        assert_eq!(ended.kind(), ErrorKind::ConnectionReset);
    }
}

/// Why the rules must not look for SYN only, and must not let connections be picked up half-way unredirected: a stray ACK that makes
/// a tracked connection would let the SYN after it go around the proxy.
#[tokio::test]
async fn a_stray_ack_opens_no_way_around_the_proxy() {
    for established in [Established::Keep, Established::Cut] {
        let world = World::new();
        set_established(&world.pod, established).unwrap();
        install(&world.pod, &RedirectConfig::default()).unwrap();
        let target = SocketAddrV4::new(POD[0].parse().unwrap(), 8080);
        let app = listen(&world.pod, SocketAddr::V4(target));
        let inbound = listen_any(&world.pod, 15006, Some(PROXY_MARK));
        let source = SocketAddrV4::new(CLIENT[0].parse().unwrap(), 4000);

        let raw = world.client.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))).unwrap();
        raw.set_read_timeout(Some(SOON)).unwrap();
        raw.send_to(&stray_ack(source, target), &SocketAddr::V4(target).into()).unwrap();
        wait_for_reset(&raw, source.port());

        let options = DialOptions { source: Some(source.into()), ..DialOptions::default() };
        let socket = socket_for(&world.client, target.into(), &options).unwrap();
        let _peer = within(socket.connect(target.into())).await.unwrap();
        tokio::select! {
            redirected = within(inbound.accept()) => drop(redirected.unwrap()),
            _ = app.accept() => panic!("{established:?}: the connection went around the proxy"),
        }
    }
}

/// A TCP header with its checksum.
fn stray_ack(from: SocketAddrV4, to: SocketAddrV4) -> Vec<u8> {
    let mut header = [0_u8; 20];
    header[..2].copy_from_slice(&from.port().to_be_bytes());
    header[2..4].copy_from_slice(&to.port().to_be_bytes());
    header[4..8].copy_from_slice(&1_000_u32.to_be_bytes());
    header[8..12].copy_from_slice(&2_000_u32.to_be_bytes());
    header[12..16].copy_from_slice(&[5 << 4, 0x10, 0xff, 0xff]);
    let pseudo = |ip: &Ipv4Addr| ip.octets();
    let mut sum: u32 = 6 + 20;
    let both = [pseudo(from.ip()), pseudo(to.ip())].concat();
    for pair in both.chunks(2).chain(header.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    header[16..18].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    header.to_vec()
}

fn wait_for_reset(mut raw: &Socket, port: u16) {
    let mut packet = [0; 128];
    loop {
        let n = raw.read(&mut packet).expect("the pod answers a stray ACK with a reset");
        let tcp = &packet[usize::from(packet[0] & 15) * 4..n];
        if tcp[2..4] == port.to_be_bytes() && tcp[13] & 4 != 0 {
            return;
        }
    }
}
