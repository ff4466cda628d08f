//! Policies encoded by Istio's definitions, enforced and answered by our proxy.

use base64::Engine;
use serde_json::json;

use crate::world::{ECHO_PORT, PEER, SERVER, World};

const POLICY: &str = "type.googleapis.com/istio.security.Authorization";

/// TRAP8, Z20, Z50.
#[test]
fn a_denying_policy_is_acknowledged_and_enforced_and_lifted() {
    let mut world = World::start();
    let mut server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(15008), SERVER.at(ECHO_PORT));
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
    server.wait("echo-closed");

    let principal = PEER.identity().trim_start_matches("spiffe://").to_owned();
    world.publish(|manifest| {
        let matches = json!([{"principals": [{"exact": principal}], "destinationPorts": [ECHO_PORT]}]);
        let groups = json!([{"rules": [{"matches": matches}]}]);
        manifest["policies"] =
            json!([{"name": "deny-peer", "namespace": "default", "scope": "NAMESPACE", "action": "DENY", "groups": groups}]);
    });
    world.control.wait_for("ack", |ack| ack["type"] == POLICY);
    let refused = world.tunnel(&credentials, &proxy, &target, &[]).unwrap_err();
    assert!(refused.contains("401"), "{refused}");

    world.publish(|manifest| manifest["policies"] = json!([]));
    world.control.wait_for("ack", |ack| ack["type"] == POLICY);
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
}

/// Z97.
#[test]
fn a_policy_that_cannot_be_understood_is_refused_by_name_and_denies() {
    let mut world = World::start();
    let _server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(15008), SERVER.at(ECHO_PORT));
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();

    // name "new", namespace "default", scope NAMESPACE, and field 99 of a later version.
    let mut bytes = b"\x0a\x03new\x12\x07default\x18\x01".to_vec();
    bytes.extend([0x9a, 0x06, 0x01, b'x']);
    let value = base64::engine::general_purpose::STANDARD.encode(bytes);
    world.publish(|manifest| {
        manifest["raw"] = json!([{"type": POLICY, "name": "default/new", "value": value}])
    });
    let nack = world.control.wait_for("nack", |nack| nack["type"] == POLICY);
    assert!(nack["message"].as_str().unwrap().contains("default/new"), "{nack}");
    let refused = world.tunnel(&credentials, &proxy, &target, &[]).unwrap_err();
    assert!(refused.contains("401"), "{refused}");

    world.publish(|manifest| manifest["raw"] = json!([]));
    world.control.wait_for("ack", |ack| ack["type"] == POLICY);
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
}
