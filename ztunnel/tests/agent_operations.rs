//! What an agent tells people, what it does when rules cannot be written, and a proxy whose agent breaks the protocol. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod agent_support;

use std::fs;
use std::process::{Command, Stdio};

use agent_support::{Pod, World, eventually, get, own_table};
use culvert_net::NetNs;
use culvert_net::redirect::{RedirectConfig, Verdict, verify};
use culvert_net::seqpacket::SeqPacketListener;
use serde_json::json;

/// C71, C76, C77: metrics count proxies, pods and what was done for them; readiness and liveness answer.
#[tokio::test]
async fn an_agent_shows_what_it_does() {
    let mut world = World::new();
    world.start();
    let socket = world.path("state/nodes/node-a/ztunnel.sock");
    eventually("it listens", || socket.exists()).await;
    for path in ["/readyz", "/healthz", "/healthz/ready"] {
        assert_eq!(get(world.ports.readiness, path).await.unwrap().0, 200, "{path}");
    }
    assert_eq!(get(world.ports.admin, "/").await.unwrap().0, 200);
    world.metric_becomes("ztunnel_connected", |it| it == 0.0).await;
    let pod = world.pod("shop", "pod");
    world.metric_becomes("culvert_agent_pods{state=\"pending\"}", |it| it == 1.0).await;
    let proxy = world.proxy().await;
    world.enabled(&pod).await;
    world.metric_becomes("ztunnel_connected", |it| it == 1.0).await;
    world.metric_becomes("culvert_agent_pods{state=\"enrolled\"}", |it| it == 1.0).await;
    world.metric_becomes("culvert_agent_pods{state=\"pending\"}", |it| it == 0.0).await;
    assert_eq!(world.metric("nodeagent_reconcile_events_total{type=\"add\"}").await, Some(1.0));
    assert!(world.metric("culvert_agent_zds_round_trip_seconds_count").await.unwrap() >= 2.0);
    assert_eq!(world.metric("culvert_agent_probe_rules_failed").await, Some(0.0));

    world.describe(&pod, &json!({}), &json!({"culvert.dev/exclude-inbound-ports": "all"}), false);
    world.metric_becomes("culvert_agent_wrong_annotations", |it| it == 1.0).await;
    world.describe(&pod, &json!({}), &json!({}), false);
    world.metric_becomes("culvert_agent_wrong_annotations", |it| it == 0.0).await;
    world.metric_becomes("nodeagent_reconcile_events_total{type=\"update\"}", |it| it >= 2.0).await;
    culvert_net::redirect::remove(&pod.netns).unwrap();
    world.metric_becomes("culvert_agent_rules_healed_total", |it| it >= 1.0).await;
    world.delete(&pod);
    world.metric_becomes("nodeagent_reconcile_events_total{type=\"delete\"}", |it| it == 1.0).await;
    world.metric_becomes("culvert_agent_pods{state=\"enrolled\"}", |it| it == 0.0).await;
    drop(proxy);
    world.metric_becomes("ztunnel_connected", |it| it == 0.0).await;
    world.stop().await;
    assert!(get(world.ports.readiness, "/readyz").await.is_none());
}

/// C32, differently: a pod that is deleted by force goes on for a moment, and so do its rules: what it says then reaches no listener, and
/// does not go around the mesh. One that only leaves the mesh loses them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_pod_keeps_its_rules_to_its_end() {
    let mut world = World::new();
    world.namespace("shop", "ambient");
    let (deleted, ended, left) =
        (world.pod("shop", "deleted"), world.pod("shop", "ended"), world.pod("shop", "left"));
    world.start();
    let proxy = world.proxy().await;
    for pod in [&deleted, &ended, &left] {
        world.enabled(pod).await;
    }
    fs::remove_file(world.status_path(&deleted)).unwrap();
    fs::remove_file(world.path("manifests/pod-shop-ended.yaml")).unwrap();
    world.describe(&left, &json!({"istio.io/dataplane-mode": "none"}), &json!({}), false);
    for pod in [&deleted, &ended, &left] {
        eventually("the proxy is told", || !proxy.has(pod)).await;
    }
    let rules = |pod: &Pod| verify(&pod.netns, &RedirectConfig::default()).unwrap();
    eventually("its rules are gone", || rules(&left) == Verdict::Missing).await;
    assert_eq!((rules(&deleted), rules(&ended)), (Verdict::Intact, Verdict::Intact));
    // It was not the end: it is found again, outside.
    world.describe(&ended, &json!({"istio.io/dataplane-mode": "none"}), &json!({}), false);
    eventually("its rules are gone", || rules(&ended) == Verdict::Missing).await;
    assert_eq!(rules(&deleted), Verdict::Intact);
    world.stop().await;
}

/// C06: an agent that is told to exclude a namespace takes the pods out that its predecessor enrolled there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_that_is_excluded_later_leaves() {
    let mut world = World::new();
    let (pod, other) = (world.pod("shop", "pod"), world.pod("shop", "other"));
    world.start();
    let _proxy = world.proxy().await;
    world.enabled(&pod).await;
    world.enabled(&other).await;
    world.stop().await;
    world.excluded.push("shop".into());
    world.start();
    let _proxy = world.proxy().await;
    for pod in [&pod, &other] {
        eventually("it is not reported", || world.report(pod).is_none()).await;
        eventually("its rules are gone", || {
            verify(&pod.netns, &RedirectConfig::default()).unwrap() == Verdict::Missing
        })
        .await;
    }
    world.stop().await;
}

/// C25, C28, differently: rules that cannot be written to a running pod, or a namespace that cannot be opened, make it pending with the reason,
/// and are tried again until they are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_that_cannot_be_written_are_tried_again() {
    let mut world = World::new();
    let (pod, lost) = (world.pod("outside", "pod"), world.pod("outside", "lost"));
    let mut owner = own_table(&world, &pod.netns);
    let taken = || {
        let listed = pod.netns.run(|| Command::new("nft").args(["list", "tables"]).output()).unwrap();
        String::from_utf8(listed.stdout).unwrap().contains("culvert")
    };
    eventually("the table is taken", taken).await;
    fs::remove_file(world.netns_path(&lost)).unwrap();
    fs::write(world.netns_path(&lost), "no namespace").unwrap();
    world.start();
    let _proxy = world.proxy().await;
    world.namespace("outside", "ambient");
    for (pod, reason) in [(&pod, "nf_tables refused"), (&lost, "not a network namespace")] {
        eventually("it is pending", || {
            world.report(pod).is_some_and(|(is, why)| {
                is == "pending" && why.is_some_and(|it| it.to_lowercase().contains(reason))
            })
        })
        .await;
    }
    world.metric_becomes("culvert_agent_pods{state=\"pending\"}", |it| it == 2.0).await;
    drop(owner.stdin.take());
    owner.wait().unwrap();
    world.enabled(&pod).await;
    world.mount(&lost);
    world.enabled(&lost).await;
    assert_eq!(verify(&pod.netns, &RedirectConfig::default()).unwrap(), Verdict::Intact);
    world.stop().await;
}

/// Z54: the label makes the rules leave what arrives alone, and the proxy is told.
#[tokio::test]
async fn a_pod_that_ends_tunnels_itself_keeps_its_inbound() {
    let mut world = World::new();
    world.start();
    let proxy = world.proxy().await;
    let pod = world.pod("shop", "pod");
    world.enabled(&pod).await;
    let told = || proxy.seen.lock().pods[&pod.uid].0.native_tunnel;
    assert!(!told());
    world.describe(&pod, &json!({"networking.istio.io/tunnel": "http"}), &json!({}), false);
    let outbound_only = RedirectConfig { bypass_inbound: true, ..RedirectConfig::default() };
    eventually("what arrives is left alone", || {
        verify(&pod.netns, &outbound_only).unwrap() == Verdict::Intact
    })
    .await;
    eventually("the proxy knows", told).await;
    world.describe(&pod, &json!({}), &json!({}), false);
    eventually("the proxy knows again", || !told()).await;
    let all = RedirectConfig::default();
    eventually("what arrives is captured", || verify(&pod.netns, &all).unwrap() == Verdict::Intact).await;
    assert!(world.is_enabled(&pod));
    world.stop().await;
}

/// C70: the process ends, with an error, when its agent breaks the protocol; while the agent is only away it goes on.
#[tokio::test]
async fn a_proxy_whose_agent_breaks_the_protocol_ends() {
    let world = World::new();
    let own = NetNs::create().unwrap();
    agent_support::ip(&own, "link set lo up");
    fs::write(world.path("token"), "none").unwrap();
    let path = |sub: &str| world.path(sub).display().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ztunnel"));
    command.args([
        "--log-level",
        "error",
        "proxy",
        "--node",
        "node-a",
        "--xds-address",
        "https://127.0.0.1:15012",
    ]);
    command.args(["--xds-server-name", "controller.test", "--xds-root-cert", &path("root.pem")]);
    command.args(["--token-file", &path("token"), "--zds-socket", &path("sock")]);
    command.args(["--drain-deadline", "1s"]).stdin(Stdio::null()).stderr(Stdio::null());
    let mut proxy = own.run(|| command.spawn()).unwrap();
    for polite in [true, false] {
        let listener = SeqPacketListener::bind(world.path("sock")).unwrap();
        let connection = listener.accept().await.unwrap();
        connection.recv().await.unwrap().unwrap();
        assert!(proxy.try_wait().unwrap().is_none());
        if !polite {
            connection.send(&[0xff; 9], None).await.unwrap();
            assert!(connection.recv().await.unwrap().is_none());
        }
    }
    let mut ended = None;
    eventually("the process has ended", || {
        ended = proxy.try_wait().unwrap();
        ended.is_some()
    })
    .await;
    assert!(!ended.unwrap().success());
}
