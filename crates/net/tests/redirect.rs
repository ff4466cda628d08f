//! Redirection in real namespaces. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::SocketAddr;

use common::{
    CLIENT, POD, PROXY_MARK, World, addr, dial, exchange, ip, listen, listen_any, ns_write, udp, within,
};
use culvert_net::NetNs;
use culvert_net::redirect::{RedirectConfig, Verdict, install, remove, verify};
use culvert_net::socket::{ListenOptions, listen_tcp_any, original_destination};
use tokio::net::UdpSocket;

fn config() -> RedirectConfig {
    RedirectConfig::default()
}

/// TRAP3, C37, C41, C43.
#[tokio::test]
async fn outbound_connections_reach_the_proxy_with_their_destination() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let proxy = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    for target in
        [addr(CLIENT[0], 80), addr(CLIENT[1], 80), addr("198.51.100.7", 443), addr("2001:db8::7", 443)]
    {
        let mut app = dial(&world.pod, target, None).await.unwrap();
        let (mut accepted, _) = within(proxy.accept()).await.unwrap();
        assert_eq!(original_destination(&accepted).unwrap(), target);
        exchange(&mut app, &mut accepted).await;
    }
}

/// C40, Z43.
#[tokio::test]
async fn the_proxys_own_connections_are_not_captured() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let proxy = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    for ip in CLIENT {
        let target = addr(ip, 8080);
        let server = listen(&world.client, target);
        let mut ours = dial(&world.pod, target, Some(PROXY_MARK)).await.unwrap();
        let (mut served, _) = within(server.accept()).await.unwrap();
        // Bits outside the mask do not matter.
        let other_bits = dial(&world.pod, target, Some(0xabc0_0000 | PROXY_MARK)).await.unwrap();
        within(server.accept()).await.unwrap();
        exchange(&mut ours, &mut served).await;
        drop(other_bits);
    }
    // Nobody came to the proxy: the next one it sees is this.
    let target = addr(CLIENT[0], 9);
    let _app = dial(&world.pod, target, None).await.unwrap();
    let (accepted, _) = within(proxy.accept()).await.unwrap();
    assert_eq!(original_destination(&accepted).unwrap(), target);
}

/// TRAP3, C37, C43, C44.
#[tokio::test]
async fn loopback_and_self_calls_are_not_captured() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let _proxy_out = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let _proxy_in = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    for ip in ["127.0.0.1", "127.0.0.53", "::1", POD[0], POD[1]] {
        let target = addr(ip, 8080);
        let server = listen(&world.pod, target);
        let mut app = dial(&world.pod, target, None).await.unwrap();
        let (mut served, peer) = within(server.accept()).await.unwrap();
        assert_eq!(peer, app.local_addr().unwrap());
        exchange(&mut app, &mut served).await;
    }
    // A resolver of the pod's own on loopback, over TCP and UDP.
    let stub = listen(&world.pod, addr("127.0.0.53", 53));
    let _query = dial(&world.pod, addr("127.0.0.53", 53), None).await.unwrap();
    within(stub.accept()).await.unwrap();
}

/// C36, C42: unlike there only at ports that probes declare.
#[tokio::test]
async fn probes_the_tunnel_port_and_excluded_ports_are_not_captured_inbound() {
    let world = World::new();
    // The client plays the node: its address is where probes come from.
    let config = RedirectConfig {
        probe_source: Some(CLIENT[0].parse().unwrap()),
        probe_ports: BTreeSet::from([8080]),
        exclude_inbound_ports: BTreeSet::from([9000]),
        ..config()
    };
    install(&world.pod, &config).unwrap();
    assert_eq!(verify(&world.pod, &config).unwrap(), Verdict::Intact);
    let proxy = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    let app = listen_any(&world.pod, 8080, None);
    let _probe = dial(&world.client, addr(POD[0], 8080), None).await.unwrap();
    within(app.accept()).await.unwrap();
    for port in [15008, 9000] {
        let listener = listen_any(&world.pod, port, None);
        let _peer = dial(&world.client, addr(POD[1], port), None).await.unwrap();
        within(listener.accept()).await.unwrap();
    }
    // From the same client over IPv6, which is not the probes' address, the app's port is captured.
    let _peer = dial(&world.client, addr(POD[1], 8080), None).await.unwrap();
    let (accepted, _) = within(proxy.accept()).await.unwrap();
    assert_eq!(original_destination(&accepted).unwrap(), addr(POD[1], 8080));
    // From the probes' address, a port that no probe declares.
    let _peer = dial(&world.client, addr(POD[0], 8081), None).await.unwrap();
    let (accepted, _) = within(proxy.accept()).await.unwrap();
    assert_eq!(original_destination(&accepted).unwrap(), addr(POD[0], 8081));
}

/// C13: what arrives from a machine or container behind the pod is the pod's own outbound traffic, whatever its port.
#[tokio::test]
async fn what_is_behind_a_virtual_interface_goes_to_the_outbound_port() {
    let world = World::new();
    // The client plays a machine behind the pod's interface.
    let config = RedirectConfig { virtual_interfaces: BTreeSet::from(["eth0".to_owned()]), ..config() };
    install(&world.pod, &config).unwrap();
    assert_eq!(verify(&world.pod, &config).unwrap(), Verdict::Intact);
    let outbound = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let _inbound = listen_any(&world.pod, 15006, Some(PROXY_MARK));
    for ip in POD {
        for port in [80, 15008] {
            let _behind = dial(&world.client, addr(ip, port), None).await.unwrap();
            let (accepted, _) = within(outbound.accept()).await.unwrap();
            assert_eq!(original_destination(&accepted).unwrap(), addr(ip, port));
        }
    }
    // TCP only.
    let server = udp(&world.pod, addr(POD[0], 4000), None);
    udp(&world.client, addr(CLIENT[0], 0), None).send_to(b"plain", addr(POD[0], 4000)).await.unwrap();
    arrives(&server, b"plain").await;
}

/// C45: UDP other than DNS, ICMP, SCTP and whatever else there is: untouched, both ways, though the proxy listens, and also while the
/// guard watches. SCTP needs no support of the kernel's here: its packets are sent and received raw.
#[tokio::test]
async fn other_protocols_are_untouched() {
    use socket2::{Domain, Protocol, Socket, Type};
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let guard = culvert_net::redirect::Guard::open(&world.pod).unwrap();
    guard.guard(&config()).unwrap();
    let raw = |ns: &NetNs, domain, protocol: i32| {
        let socket = ns.run(|| Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))).unwrap();
        socket.set_read_timeout(Some(common::SOON)).unwrap();
        socket
    };
    // SCTP INIT: ports 40000 and 8080, no tag, checksum not looked at; and a number that nobody uses.
    let mut sctp = [&40_000_u16.to_be_bytes()[..], &8080_u16.to_be_bytes(), &[0; 8], &[1, 0, 0, 20]].concat();
    sctp.extend([0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
    for family in [0, 1] {
        let domain = [Domain::IPV4, Domain::IPV6][family];
        for (from, to, source, target) in
            [(&world.pod, &world.client, POD, CLIENT), (&world.client, &world.pod, CLIENT, POD)]
        {
            for (protocol, payload) in [(132, sctp.clone()), (253, b"experiment".to_vec())] {
                let (sender, receiver) = (raw(from, domain, protocol), raw(to, domain, protocol));
                sender.send_to(&payload, &addr(target[family], 0).into()).unwrap();
                let mut buf = vec![std::mem::MaybeUninit::uninit(); 256];
                let (length, seen) = receiver.recv_from(&mut buf).unwrap();
                assert_eq!(seen.as_socket().unwrap().ip(), addr(source[family], 0).ip());
                assert!(length >= payload.len());
            }
            for port in [15001, 15006, 15008, 4000] {
                let server = udp(to, addr(target[family], port), None);
                let client = udp(from, addr(source[family], 0), None);
                client.send_to(b"there", addr(target[family], port)).await.unwrap();
                let seen = arrives(&server, b"there").await;
                assert_eq!(seen, client.local_addr().unwrap());
                server.send_to(b"back", seen).await.unwrap();
                assert_eq!(arrives(&client, b"back").await, addr(target[family], port));
            }
            echo(from, addr(target[family], 0), family == 1);
        }
    }
    assert_eq!(culvert_net::redirect::stopped(&world.pod), Some(0));
}

/// One ICMP echo request and its answer.
fn echo(from: &NetNs, to: SocketAddr, v6: bool) {
    use socket2::{Domain, Protocol, Socket, Type};
    common::ns_write(from, "/proc/sys/net/ipv4/ping_group_range", "0 2147483647");
    let (domain, protocol, kind) = match v6 {
        false => (Domain::IPV4, Protocol::ICMPV4, 8),
        true => (Domain::IPV6, Protocol::ICMPV6, 128),
    };
    let socket = from.run(|| Socket::new(domain, Type::DGRAM, Some(protocol))).unwrap();
    socket.set_read_timeout(Some(common::SOON)).unwrap();
    socket.send_to(&[kind, 0, 0, 0, 0, 0, 0, 1, b'h', b'i'], &to.into()).unwrap();
    let mut buf = [std::mem::MaybeUninit::uninit(); 64];
    let (length, peer) = socket.recv_from(&mut buf).unwrap();
    assert_eq!((length, peer.as_socket().unwrap().ip()), (10, to.ip()));
}

/// C46, R10.
#[tokio::test]
async fn exclusions_bypass_and_ipv4_only() {
    let world = World::new();
    let proxy = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let server = listen_any(&world.client, 8080, None);
    let direct = async |config: &RedirectConfig, target: SocketAddr| {
        install(&world.pod, config).unwrap();
        assert_eq!(verify(&world.pod, config).unwrap(), Verdict::Intact);
        let _app = dial(&world.pod, target, None).await.unwrap();
        within(async {
            tokio::select! { _ = server.accept() => true, _ = proxy.accept() => false }
        })
        .await
    };
    let (v4, v6) = (addr(CLIENT[0], 8080), addr(CLIENT[1], 8080));
    assert!(!direct(&config(), v4).await);
    assert!(!direct(&config(), v6).await);
    let nets = RedirectConfig {
        exclude_outbound: ["10.0.0.0/15", "10.1.0.0/24", "fd00:1::/64"].map(|n| n.parse().unwrap()).to_vec(),
        ..config()
    };
    assert!(direct(&nets, v4).await);
    assert!(direct(&nets, v6).await);
    let other = RedirectConfig { exclude_outbound: vec!["10.1.0.3/32".parse().unwrap()], ..config() };
    assert!(!direct(&other, v4).await);
    let ports = RedirectConfig { exclude_outbound_ports: BTreeSet::from([8080, 8443]), ..config() };
    assert!(direct(&ports, v4).await);
    assert!(direct(&ports, v6).await);
    let v4_only = RedirectConfig { ipv6: false, ..config() };
    assert!(!direct(&v4_only, v4).await);
    assert!(direct(&v4_only, v6).await);

    let inbound = listen_any(&world.pod, 7000, None);
    install(&world.pod, &RedirectConfig { bypass_inbound: true, ..config() }).unwrap();
    let _peer = dial(&world.client, addr(POD[0], 7000), None).await.unwrap();
    within(inbound.accept()).await.unwrap();
    let too_many = RedirectConfig { exclude_inbound_ports: (1..=2000).collect(), ..config() };
    assert!(install(&world.pod, &too_many).is_err());
}

/// C37, C38.
#[tokio::test]
async fn dns_goes_to_the_proxy_and_its_own_queries_go_out() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    for (family, loopback) in ["127.0.0.1", "::1"].into_iter().enumerate() {
        let resolver = addr(CLIENT[family], 53);
        let upstream = udp(&world.client, resolver, None);
        let proxy = udp(&world.pod, addr(loopback, 15053), Some(PROXY_MARK));
        let port = 5000;
        let app = udp(&world.pod, addr(POD[family], port), None);
        for _ in 0..3 {
            app.send_to(b"query", resolver).await.unwrap();
            let from = arrives(&proxy, b"query").await;
            // The proxy asks upstream while the program waits.
            ask_upstream(&world, addr(POD[family], 0), &upstream, resolver).await;
            proxy.send_to(b"answer", from).await.unwrap();
            // The answer must seem to come from the resolver.
            assert_eq!(arrives(&app, b"answer").await, resolver);
        }
        let tcp = listen(&world.pod, addr(loopback, 15053));
        let _query = dial(&world.pod, resolver, None).await.unwrap();
        let (accepted, _) = within(tcp.accept()).await.unwrap();
        assert_eq!(original_destination(&accepted).unwrap(), resolver);

        // Other UDP is untouched (C45).
        let server = udp(&world.client, addr(CLIENT[family], 4000), None);
        app.send_to(b"plain", server.local_addr().unwrap()).await.unwrap();
        arrives(&server, b"plain").await;

        // Trap 2: now the proxy happens to get the program's port. Conntrack still knows the redirected flow of these very
        // addresses and ports; only the zone keeps the query from going to the proxy itself.
        drop(app);
        ask_upstream(&world, addr(POD[family], port), &upstream, resolver).await;
        // And the other way round.
        let app = udp(&world.pod, addr(POD[family], port), None);
        app.send_to(b"again", resolver).await.unwrap();
        arrives(&proxy, b"again").await;
    }
}

async fn ask_upstream(world: &World, from: SocketAddr, upstream: &UdpSocket, resolver: SocketAddr) {
    let own = udp(&world.pod, from, Some(PROXY_MARK));
    own.send_to(b"upstream", resolver).await.unwrap();
    let seen = arrives(upstream, b"upstream").await;
    assert_eq!(seen, own.local_addr().unwrap());
    upstream.send_to(b"result", seen).await.unwrap();
    assert_eq!(arrives(&own, b"result").await, resolver);
}

async fn arrives(at: &UdpSocket, expected: &[u8]) -> SocketAddr {
    let mut buf = [0; 64];
    let (n, from) = within(at.recv_from(&mut buf)).await.unwrap();
    assert_eq!(&buf[..n], expected);
    from
}

/// Rules and routes, as the kernel lists them.
fn state(ns: &NetNs) -> String {
    ["rule", "-6 rule", "route show table all", "-6 route show table all"].map(|a| ip(ns, a)).join("\n")
}

/// C39, C47, C49, C57: in one transaction, and in one table unlike the last.
#[tokio::test]
async fn removal_leaves_nothing_and_both_ways_are_idempotent() {
    let world = World::new();
    let before = state(&world.pod);
    assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Missing);
    remove(&world.pod).unwrap();
    assert_eq!(state(&world.pod), before);

    install(&world.pod, &config()).unwrap();
    let installed = state(&world.pod);
    assert_ne!(installed, before);
    assert!(installed.contains("32764:\tfrom all fwmark 0x111/0xfff lookup 100"), "{installed}");
    install(&world.pod, &config()).unwrap();
    assert_eq!(state(&world.pod), installed);
    assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Intact);
    let rules = culvert_net::nft::read_table(&world.pod, "culvert", &[]).unwrap().comments().len();
    install(&world.pod, &config()).unwrap();
    assert_eq!(culvert_net::nft::read_table(&world.pod, "culvert", &[]).unwrap().comments().len(), rules);

    remove(&world.pod).unwrap();
    assert_eq!(state(&world.pod), before);
    assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Missing);
    let error = culvert_net::nft::read_table(&world.pod, "culvert", &[]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    // And traffic is as before.
    let server = listen_any(&world.client, 8080, None);
    let _app = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    within(server.accept()).await.unwrap();
    remove(&world.pod).unwrap();
}

/// C47.
#[tokio::test]
async fn verification_notices_what_somebody_changed() {
    use culvert_net::nft::{Batch, Chain, Rule};
    let world = World::new();
    let nets =
        ["10.9.0.0/16", "192.168.0.0/24", "192.168.1.0/24", "fd09::/16"].map(|n| n.parse().unwrap()).to_vec();
    let config = RedirectConfig {
        exclude_outbound: nets,
        exclude_inbound_ports: BTreeSet::from([22, 9000]),
        exclude_outbound_ports: BTreeSet::from([3306]),
        ..config()
    };
    let check = || verify(&world.pod, &config).unwrap();
    let altered = |verdict: Verdict| assert!(matches!(verdict, Verdict::Altered(_)), "{verdict:?}");
    install(&world.pod, &config).unwrap();
    assert_eq!(check(), Verdict::Intact);
    // Another configuration is not this one: one expression's value differs.
    altered(verify(&world.pod, &RedirectConfig { inbound_port: 15007, ..config.clone() }).unwrap());
    altered(
        verify(
            &world.pod,
            &RedirectConfig { exclude_outbound_ports: BTreeSet::from([3307]), ..config.clone() },
        )
        .unwrap(),
    );
    altered(
        verify(
            &world.pod,
            &RedirectConfig { exclude_outbound: vec!["10.8.0.0/16".parse().unwrap()], ..config.clone() },
        )
        .unwrap(),
    );

    let mut extra = Batch::new();
    extra.add_rule("culvert", "nat_output", &Rule::new("let all pass").accept()).commit(&world.pod).unwrap();
    altered(check());
    install(&world.pod, &config).unwrap();
    let mut chain = Batch::new();
    chain.add_chain("culvert", &Chain::regular("more")).commit(&world.pod).unwrap();
    altered(check());
    install(&world.pod, &config).unwrap();
    ip(&world.pod, "-6 rule del pref 32764");
    altered(check());
    install(&world.pod, &config).unwrap();
    ip(&world.pod, "route del local default dev lo table 100");
    altered(check());
    install(&world.pod, &config).unwrap();
    assert_eq!(check(), Verdict::Intact);
}

/// C46, Z116.
#[tokio::test]
async fn a_namespace_without_ipv6_is_redirected_for_ipv4() {
    let world = World::new();
    for interface in ["all", "default", "lo"] {
        ns_write(&world.pod, &format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), "1");
    }
    install(&world.pod, &config()).unwrap();
    assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Intact);
    let proxy = listen_any(&world.pod, 15001, Some(PROXY_MARK));
    let _app = dial(&world.pod, addr(CLIENT[0], 80), None).await.unwrap();
    let (accepted, _) = within(proxy.accept()).await.unwrap();
    assert_eq!(original_destination(&accepted).unwrap(), addr(CLIENT[0], 80));
    remove(&world.pod).unwrap();
    assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Missing);
    // A port that is taken is an error, not a reason to listen elsewhere.
    let taken = world.pod.run(|| listen_tcp_any(15001, &ListenOptions::default())).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AddrInUse);
}

/// R03.
#[test]
fn many_namespaces_at_once() {
    let threads: Vec<_> = (0..8)
        .map(|_| {
            std::thread::spawn(|| {
                let home = NetNs::current().unwrap().id();
                let ns = NetNs::create().unwrap();
                ip(&ns, "link set lo up");
                for _ in 0..5 {
                    install(&ns, &config()).unwrap();
                    assert_eq!(verify(&ns, &config()).unwrap(), Verdict::Intact);
                    remove(&ns).unwrap();
                    assert_eq!(verify(&ns, &config()).unwrap(), Verdict::Missing);
                }
                assert_eq!(NetNs::current().unwrap().id(), home);
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
}
