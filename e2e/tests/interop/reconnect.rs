//! What our proxy says to Istio's control plane and node agent, at first and when they come back.

use crate::world::{ECHO_PORT, PEER, SERVER, World, eventually};

/// Z94, Z96.
#[test]
fn the_first_stream_names_the_node_and_a_second_one_what_is_held() {
    let mut world = World::start();
    let _server = world.serve_hbone();
    let first: Vec<_> = world.control.of("subscribe").into_iter().cloned().collect();
    assert_eq!(first.len(), 2, "{first:?}");
    assert!(
        first.iter().all(|event| event["wildcard"] == true && event["initialVersions"] == 0),
        "{first:?}"
    );
    let node =
        first.iter().find_map(|event| event["node"].as_str()).expect("the first request names the node");
    assert!(node.starts_with("ztunnel~"), "{node}");
    assert!(first.iter().any(|event| event["metadata"]["NODE_NAME"] == "left"), "{first:?}");
    let stream = world.control.of("stream")[0].clone();
    assert_eq!(stream["headers"]["authorization"], "Bearer a-token-for-left");

    world.control.tell("disconnect");
    let held = world.control.wait_for("subscribe", |event| {
        event["stream"] != first[0]["stream"] && event["type"] == "type.googleapis.com/istio.workload.Address"
    });
    assert_eq!(held["initialVersions"], 4, "three workloads and a service: {held}");
    let answer = world
        .control
        .wait_for("response", |event| event["stream"] == held["stream"] && event["type"] == held["type"]);
    assert_eq!(answer["resources"], serde_json::json!([]), "nothing is sent twice");
    world.control.wait_for("ack", |event| event["stream"] == held["stream"]);
    let [target, _] = PEER.at(ECHO_PORT);
    world.dial(&target, &[]).unwrap();
    assert!(world.control.of("stray-nonce").is_empty());
    assert!(world.control.of("nack").is_empty());
}

/// Z12.
#[test]
fn the_proxy_follows_the_agent() {
    let mut world = World::start();
    let _server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(15008), SERVER.at(ECHO_PORT));
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();

    // The same namespace again changes nothing (C68).
    let netns = world.netns(&SERVER).display().to_string();
    let add = format!("add uid-server default server server {netns}");
    world.agent.tell(&add);
    let ack = world.agent.wait_for("ack", |ack| ack["for"] == "add" && ack["uid"] == "uid-server");
    assert_eq!(ack["error"], "");
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();

    world.agent.tell("del uid-server");
    let ack = world.agent.wait_for("ack", |ack| ack["for"] == "del");
    assert_eq!(ack["error"], "");
    let refused =
        eventually("the pod's listeners close", || world.tunnel(&credentials, &proxy, &target, &[]).err());
    assert!(refused.contains("refused") || refused.contains("reset"), "{refused}");
    world.agent.tell(&add);
    let ack = world.agent.wait_for("ack", |ack| ack["for"] == "add" && ack["uid"] == "uid-server");
    assert_eq!(ack["error"], "");
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
}

/// C61, C70.
#[test]
fn the_proxy_finds_the_agent_again_and_keeps_serving() {
    let mut world = World::start();
    let _server = world.serve_echo();
    let credentials = world.issue("peer", &["--identity", &PEER.identity()]);
    let ([proxy, _], [target, _]) = (SERVER.at(15008), SERVER.at(ECHO_PORT));
    world.agent.tell("disconnect");
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
    world.agent.wait("hello");
    for kind in ["add", "add", "snapshot"] {
        let ack = world.agent.wait("ack");
        assert_eq!((&ack["for"], &ack["error"]), (&kind.into(), &"".into()));
    }
    world.tunnel(&credentials, &proxy, &target, &[]).unwrap();
}
