//! From an unmodified program in a captured pod, through our proxy, to Istio's HBONE server.

use serde_json::Value;

use crate::interop_go;
use crate::world::{CLIENT, ECHO_PORT, PEER, SERVICE, SERVICE_PORT, World};

const TLS13: &str = "TLS 1.3";

/// Z15, Z16, Z17.
#[test]
fn a_captured_connection_reaches_istios_server_as_the_pods_identity() {
    let world = World::start();
    let mut server = world.serve_hbone();
    for target in PEER.at(ECHO_PORT) {
        let events = world.dial(&target, &[]).unwrap();
        let echo = interop_go::of(&events, "echo")[0];
        assert_eq!(echo["payload"], "hello through the tunnel\n");
        assert_eq!(echo["halfClosed"], true, "the end of the stream came back through the tunnel");
        let connect = server.wait("connect");
        check_connect(&connect, &target);
        server.wait("echo-closed");
    }
    for tls in server.of("tls") {
        assert_eq!(
            (tls["version"].as_str(), tls["alpn"].as_str(), tls["sni"].as_str()),
            (Some(TLS13), Some("h2"), Some(""))
        );
        assert_eq!(tls["curve"], "X25519MLKEM768");
        assert_eq!(tls["resumed"], false);
    }
}

fn check_connect(connect: &Value, authority: &str) {
    assert_eq!(connect["method"], "CONNECT");
    assert_eq!(connect["protocol"], "HTTP/2.0");
    assert_eq!(connect["authority"], authority);
    assert_eq!(connect["tls"], TLS13);
    assert_eq!(connect["peer"], serde_json::json!([CLIENT.identity()]));
    // Z17: who the source is, and from where it comes.
    let headers = &connect["headers"];
    let baggage = headers["Baggage"].as_str().unwrap_or_else(|| panic!("no baggage in {connect}"));
    assert!(baggage.contains("k8s.namespace.name=default"), "{baggage}");
    let forwarded = headers["Forwarded"].as_str().unwrap_or_else(|| panic!("no forwarded in {connect}"));
    assert!(forwarded.contains(CLIENT.v4) || forwarded.contains(CLIENT.v6), "{forwarded}");
}

#[test]
fn a_service_address_leads_to_its_endpoint() {
    let world = World::start();
    let mut server = world.serve_hbone();
    for address in SERVICE {
        let target = std::net::SocketAddr::new(address.parse().unwrap(), SERVICE_PORT).to_string();
        world.dial(&target, &[]).unwrap();
        let connect = server.wait("connect");
        let authority = connect["authority"].as_str().unwrap();
        assert!(PEER.at(ECHO_PORT).iter().any(|end| end == authority), "{authority} is no endpoint");
    }
}

#[test]
fn bulk_and_many_streams_cross_unchanged() {
    let world = World::start();
    let mut server = world.serve_hbone();
    let [target, _] = PEER.at(ECHO_PORT);
    let events = world.dial(&target, &["--bytes", "50000000"]).unwrap();
    assert_eq!(interop_go::of(&events, "echo")[0]["bytes"], 50_000_000);
    let events = world.dial(&target, &["--count", "200"]).unwrap();
    assert_eq!(interop_go::of(&events, "echo").len(), 200);
    for _ in 0..201 {
        server.wait("echo-closed");
    }
    let handshakes = server.of("tls").len();
    assert!(handshakes < 10, "{handshakes} handshakes for 201 connections: tunnels are not shared");
}

#[test]
fn a_destination_that_istios_server_cannot_reach_ends_without_a_byte() {
    let world = World::start();
    let _server = world.serve_hbone();
    let [target, _] = PEER.at(1);
    // That server answers 200 before it connects, so on the wire a refusal looks like an application that closed at once.
    let failed = world.dial(&target, &[]).unwrap_err();
    assert!(failed.contains("after 0 of 25 bytes"), "{failed}");
}

/// TRAP14, Z92.
#[test]
fn a_server_that_is_not_the_destination_is_a_reset_before_any_byte() {
    let world = World::start();
    let [target, _] = PEER.at(ECHO_PORT);
    let absent = world.dial(&target, &[]).unwrap_err();
    assert!(absent.contains("reset"), "nobody listens: {absent}");
    let (right, other) = (PEER.identity(), CLIENT.identity());
    let cases: [(&str, Vec<&str>); 4] = [
        ("another-identity", vec!["--identity", &other]),
        ("two-identities", vec!["--identity", &right, "--identity", &other]),
        ("dns-name-only", vec!["--dns", "peer.default.svc.cluster.local"]),
        ("expired", vec!["--identity", &right, "--not-before", "-2h", "--ttl", "-1h"]),
    ];
    for (name, flags) in &cases {
        let mut server = world.serve_hbone_as(&world.issue(name, flags));
        let failed = world.dial(&target, &[]).unwrap_err();
        assert!(failed.contains("reset"), "{name}: {failed}");
        server.drain();
        assert!(server.of("connect").is_empty(), "{name}: {:?}", server.seen);
    }
    let _server = world.serve_hbone();
    world.dial(&target, &[]).unwrap();
}
