//! From Istio's HBONE dialer to a pod behind our proxy.

use crate::interop_go;
use crate::world::{ECHO_PORT, PEER, SERVER, World, eventually};

const HBONE: u16 = 15008;

/// Z51.
#[test]
fn istios_tunnel_is_delivered_to_the_pod_from_the_clients_address() {
    let world = World::start();
    let mut server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let expected = SERVER.identity();
    for (proxy, target) in SERVER.at(HBONE).iter().zip(SERVER.at(ECHO_PORT)) {
        let events = world.tunnel(&credentials, proxy, &target, &["--expect", &expected]).unwrap();
        assert_eq!(interop_go::of(&events, "echo")[0]["payload"], "hello through the tunnel\n");
        let tls = interop_go::of(&events, "tls")[0];
        assert_eq!((&tls["version"], &tls["alpn"]), (&"TLS 1.3".into(), &"h2".into()));
        let remote = server.wait("echo-accepted")["remote"].as_str().unwrap().to_owned();
        let remote: std::net::SocketAddr = remote.parse().unwrap();
        let source = remote.ip().to_canonical().to_string();
        assert!(source == PEER.v4 || source == PEER.v6, "the application sees {source}");
    }
}

#[test]
fn bulk_and_many_streams_cross_unchanged() {
    let world = World::start();
    let _server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(HBONE), SERVER.at(ECHO_PORT));
    let events = world.tunnel(&credentials, &proxy, &target, &["--bytes", "50000000"]).unwrap();
    assert_eq!(interop_go::of(&events, "echo")[0]["bytes"], 50_000_000);
    let events = world.tunnel(&credentials, &proxy, &target, &["--count", "200"]).unwrap();
    assert_eq!(interop_go::of(&events, "echo").len(), 200);
}

/// Z20, Z46, Z47, Z49.
#[test]
fn who_may_not_tunnel_is_refused() {
    let world = World::start();
    let mut server = world.serve_echo();
    let ([proxy, _], [target, _]) = (SERVER.at(HBONE), SERVER.at(ECHO_PORT));
    let peer = PEER.identity();
    let cases: [(&str, Vec<&str>, &str); 6] = [
        (
            "two-identities",
            vec!["--identity", &peer, "--identity", "spiffe://cluster.local/ns/default/sa/other"],
            "2 subject alternative names",
        ),
        (
            "foreign-trust-domain",
            vec!["--identity", "spiffe://elsewhere.example/ns/default/sa/peer"],
            "of a trust domain that is not accepted",
        ),
        ("no-service-account", vec!["--identity", "spiffe://cluster.local/workload/peer"], "workload/peer"),
        ("dns-name-only", vec!["--dns", "peer.default.svc.cluster.local"], "exactly one URI is required"),
        ("expired", vec!["--identity", &peer, "--not-before", "-2h", "--ttl", "-1h"], "xpired"),
        ("not-yet-valid", vec!["--identity", &peer, "--not-before", "1h", "--ttl", "2h"], "yet"),
    ];
    for (name, flags, reason) in &cases {
        let credentials = world.issue(name, flags);
        // In TLS 1.3 the server judges the client after the client's part is done, so what the client sees is an alert or a closed
        // connection, whichever it meets first. The proxy knows the reason.
        let refused = world.tunnel(&credentials, &proxy, &target, &[]);
        assert!(refused.is_err(), "{name} was served: {refused:?}");
        eventually(&format!("the log says why {name} was refused: {reason}"), || {
            world
                .proxy
                .text()
                .lines()
                .any(|line| line.contains("access") && line.contains(reason))
                .then_some(())
        });
    }
    let good = world.issue("peer", &["--identity", &peer]);
    // Our identity, but not the destination the certificate is for, and the proxy's own ports.
    let [elsewhere, _] = PEER.at(ECHO_PORT);
    for authority in [elsewhere.as_str(), "100.64.1.11:15006", "100.64.1.11:15001"] {
        let refused = world.tunnel(&good, &proxy, authority, &[]).unwrap_err();
        assert!(refused.contains("400"), "{authority}: {refused}");
    }
    let closed = world.tunnel(&good, &proxy, "100.64.1.11:1", &[]).unwrap_err();
    assert!(closed.contains("503"), "{closed}");
    world.tunnel(&good, &proxy, &target, &[]).unwrap();
    server.wait("echo-closed");
    assert_eq!(server.of("echo-accepted").len(), 1, "only the last one reached the application");
}

#[test]
fn certificates_are_renewed_from_istios_api_before_they_end() {
    let mut world = World::start_with(&["--ca-ttl", "6s"]);
    let _server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(HBONE), SERVER.at(ECHO_PORT));
    let expected = SERVER.identity();
    let mut serials = std::collections::BTreeSet::new();
    while serials.len() < 4 {
        let issued = world.control.wait_for("certificate", |event| event["identity"] == expected.as_str());
        serials.insert(issued["serial"].as_str().unwrap().to_owned());
        world.tunnel(&credentials, &proxy, &target, &["--expect", &expected]).unwrap();
    }
    world.control.drain();
    assert!(world.control.of("certificate-refused").is_empty(), "{:?}", world.control.seen);
}
