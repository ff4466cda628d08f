//! The kubelet's probes through an agent: whom it lets through, and for how long. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod agent_support;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::Arc;

use agent_support::{World, eventually, routed, run_in};
use culvert_net::redirect::{RedirectConfig, Verdict, verify};
use culvert_net::{NetNs, probes};
use serde_json::json;

const NOBODY: u32 = 65_534;

/// Whether a process of that user can connect to the application. What is captured is refused: no proxy listens, as if STRICT refused it.
fn reaches(from: &NetNs, uid: u32, port: u16) -> bool {
    let mut command = Command::new("bash");
    command.args(["-c", &format!("exec 3<>/dev/tcp/10.2.0.2/{port}")]).uid(uid).stderr(Stdio::null());
    from.run(|| command.stdin(Stdio::null()).status()).unwrap().success()
}

fn listening(pod: &NetNs, ports: &[u16]) -> Vec<TcpListener> {
    ports.iter().map(|port| pod.run(|| TcpListener::bind(("0.0.0.0", *port))).unwrap()).collect()
}

fn at(ip: &str, ports: &[u16]) -> BTreeSet<SocketAddr> {
    ports.iter().map(|port| SocketAddr::new(ip.parse().unwrap(), *port)).collect()
}

/// TRAP4, C42, C50, C52, C53, C54: a probe reaches each port that some probe or hook of the pod declares, by number or name, though plaintext is
/// refused; another port, user or machine does not. It stays so while the agent restarts, after somebody flushed the node's rules, and
/// ends with the pod.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_reach_what_the_pod_declares_and_nothing_else() {
    let (client, node, netns) = routed();
    let mut world = World::on(node.clone());
    let _listening = listening(&netns, &[8080, 8081, 8082, 8083, 9090]);
    let pod = world.incarnation("shop", "pod", "uid-1", "10.2.0.2", netns.clone());
    world.specify(
        &pod,
        &json!([
            {"name": "main", "ports": [{"name": "web", "containerPort": 8080}, {"name": "other", "containerPort": 9090}],
             "readinessProbe": {"httpGet": {"port": "web"}}, "livenessProbe": {"tcpSocket": {"port": 8081}},
             "startupProbe": {"grpc": {"port": 8082}}},
            {"name": "side", "lifecycle": {"preStop": {"httpGet": {"port": 8083}}, "postStart": {"exec": {"command": ["true"]}}},
             "livenessProbe": {"exec": {"command": ["true"]}}},
        ]),
    );
    world.start();
    let _proxy = world.proxy().await;
    eventually("it is enabled", || world.is_enabled(&pod)).await;
    let declared = [8080, 8081, 8082, 8083];
    let rules = RedirectConfig { probe_ports: declared.into(), ..RedirectConfig::default() };
    assert_eq!(verify(&netns, &rules).unwrap(), Verdict::Intact);
    let exact = || {
        for port in declared {
            assert!(reaches(&node, 0, port), "{port}");
            assert!(!reaches(&node, NOBODY, port) && !reaches(&client, 0, port), "{port}");
        }
        assert!(!reaches(&node, 0, 9090));
    };
    exact();
    run_in(&node, "nft", "flush ruleset");
    eventually("the node's rules are back", || probes::targets(&node).len() == 4).await;
    exact();
    world.stop().await;
    exact();
    world.start();
    let _proxy = world.proxy().await;
    exact();
    // The kubelet has nothing to ask where nothing is captured.
    world.namespace("shop", "none");
    eventually("it has left", || probes::targets(&node).is_empty()).await;
    eventually("plaintext is let in", || reaches(&client, 0, 9090)).await;
    world.stop().await;
}

/// TRAP4, C52: an address that is another pod's next. The new pod's entries neither go with the old pod, in whatever order the two are seen,
/// nor has it any of the old one's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_is_reused_takes_nothing_along() {
    let (_client, node, netns) = routed();
    let mut world = World::on(node.clone());
    world.start();
    let _proxy = world.proxy().await;
    let probing = |port: u16| json!([{"name": "main", "readinessProbe": {"tcpSocket": {"port": port}}}]);
    let old = world.incarnation("shop", "old", "uid-old", "10.2.0.2", Arc::new(NetNs::create().unwrap()));
    agent_support::ip(&old.netns, "link set lo up");
    world.specify(&old, &probing(8080));
    eventually("the old one may be probed", || probes::targets(&node) == at("10.2.0.2", &[8080])).await;
    // The new one is seen before the old one is gone.
    let _listening = listening(&netns, &[8080, 8081]);
    let new = world.incarnation("shop", "new", "uid-new", "10.2.0.2", netns.clone());
    world.specify(&new, &probing(8081));
    eventually("both may be probed", || probes::targets(&node) == at("10.2.0.2", &[8080, 8081])).await;
    eventually("it is enabled", || world.is_enabled(&new)).await;
    assert!(reaches(&node, 0, 8081));
    assert!(!reaches(&node, 0, 8080), "the old one's port is not the new one's");
    world.delete(&old);
    eventually("only the new one is left", || probes::targets(&node) == at("10.2.0.2", &[8081])).await;
    assert!(reaches(&node, 0, 8081) && !reaches(&node, 0, 8080));
    world.stop().await;
}
