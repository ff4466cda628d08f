//! The node agent against real namespaces and a proxy that only speaks its protocol. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod agent_support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use agent_support::{Pod, World, eventually, ip, routed};
use culvert_net::NetNs;
use culvert_net::redirect::{self, RedirectConfig, Verdict, verify};
use serde_json::json;

fn untouched(pod: &Pod) -> bool {
    !redirect::is_installed(&pod.netns).unwrap()
}

/// C01, C08, C09, C23, C30, C31, C62: a pod that starts in a namespace that joins; running pods when their namespace is labelled, and
/// when they are; each is handed over with its name, service account and namespace, and reported last.
#[tokio::test]
async fn new_and_running_pods_join() {
    let mut world = World::new();
    let before = world.pod("outside", "before");
    let own = world.pod("outside", "own");
    world.start();
    let proxy = world.proxy().await;
    let new = world.pod("shop", "new");
    world.enabled(&new).await;
    let (info, netns) = proxy.seen.lock().pods["uid-new"].clone();
    assert_eq!((info.name.as_str(), info.namespace.as_str()), ("new", "shop"));
    assert_eq!((info.service_account.as_str(), netns), ("sa-new", new.netns.id()));
    assert!(untouched(&before) && untouched(&own) && world.report(&before).is_none());

    world.describe(&own, &json!({"istio.io/dataplane-mode": "ambient"}), &json!({}), false);
    world.enabled(&own).await;
    assert!(untouched(&before));
    world.namespace("outside", "ambient");
    world.enabled(&before).await;
    assert_eq!(proxy.seen.lock().pods.len(), 3);
    // A pod of another node is another agent's.
    let elsewhere = world.pod("shop", "elsewhere");
    world.raw_status(&elsewhere, &json!({"nodeName": "node-b", "phase": "Running", "podIPs": ["100.64.2.2"], "netns": world.netns_path(&elsewhere)}));
    let last = world.pod("shop", "last");
    world.enabled(&last).await;
    world.not_reported(&elsewhere).await;
    world.stop().await;
}

/// C07, C08, C32, C49: by the namespace's label and by the pod's own. The report goes first and the proxy keeps the pod for those
/// who still take it for one of the mesh; then nothing of the rules is left.
#[tokio::test]
async fn running_pods_leave() {
    let mut world = World::new();
    world.start();
    let proxy = world.proxy().await;
    let (by_pod, by_namespace) = (world.pod("shop", "by-pod"), world.pod("shop", "by-namespace"));
    world.enabled(&by_pod).await;
    world.enabled(&by_namespace).await;
    let leave = async |pod: &Pod, other: Option<&Pod>| {
        world.not_reported(pod).await;
        assert!(proxy.has(pod), "the proxy lost the pod before peers could know");
        let way_back = RedirectConfig::default().return_path_only();
        eventually("nothing is redirected", || verify(&pod.netns, &way_back).unwrap() == Verdict::Intact)
            .await;
        eventually("nothing is left", || untouched(pod) && !proxy.has(pod)).await;
        assert!(!ip(&pod.netns, "rule").contains("32764"));
        assert!(other.is_none_or(|other| world.is_enabled(other) && proxy.has(other)));
    };
    world.describe(&by_pod, &json!({"istio.io/dataplane-mode": "none"}), &json!({}), false);
    leave(&by_pod, Some(&by_namespace)).await;
    world.namespace("shop", "none");
    leave(&by_namespace, None).await;
    // And back.
    world.namespace("shop", "ambient");
    world.enabled(&by_namespace).await;
    assert!(untouched(&by_pod));
    world.stop().await;
}

/// U12: what a running pod has open when it joins goes on, in both directions, and when it leaves again; so it does when the agent
/// restarts in between.
#[tokio::test]
async fn open_connections_survive_joining_and_leaving() {
    let (client, node, netns) = routed();
    let mut world = World::on(node);
    let pod = world.pod_in("outside", "pod", netns);
    let mut open = Vec::new();
    for (from, to, address) in
        [(&client, &pod.netns, "10.2.0.2:8080"), (&pod.netns, &client, "10.1.0.2:8080")]
    {
        let server = to.run(|| TcpListener::bind(address)).unwrap();
        let dialed = from.run(|| TcpStream::connect(address)).unwrap();
        let (served, _) = server.accept().unwrap();
        dialed.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        served.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        open.push((dialed, served));
    }
    let mut go_on = || {
        let mut buf = [0; 4];
        for (a, b) in &mut open {
            a.write_all(b"ping").unwrap();
            b.read_exact(&mut buf).unwrap();
            b.write_all(b"pong").unwrap();
            a.read_exact(&mut buf).unwrap();
        }
    };
    go_on();
    world.start();
    let proxy = world.proxy().await;
    world.namespace("outside", "ambient");
    world.enabled(&pod).await;
    go_on();
    world.stop().await;
    drop(proxy);
    world.start();
    let proxy = world.proxy().await;
    world.enabled(&pod).await;
    go_on();
    world.namespace("outside", "none");
    world.not_reported(&pod).await;
    go_on();
    eventually("nothing is left", || untouched(&pod) && !proxy.has(&pod)).await;
    go_on();
    world.stop().await;
}

/// C26: a pod that ended leaves, though Kubernetes has taken its address away; one without an address waits.
#[tokio::test]
async fn pods_that_ended_or_have_no_address_are_not_enrolled() {
    let mut world = World::new();
    world.start();
    let proxy = world.proxy().await;
    let (job, young) = (world.pod("shop", "job"), world.pod("shop", "young"));
    world.enabled(&job).await;
    world.status(&young, "Pending", &[]);
    world.status(&job, "Succeeded", &[]);
    world.not_reported(&job).await;
    eventually("the proxy drops the job", || !proxy.has(&job)).await;
    world.status(&young, "Pending", &["100.64.1.3"]);
    world.enabled(&young).await;
    // Deleted: its status and namespace go.
    fs::remove_file(world.netns_path(&young)).unwrap();
    fs::remove_file(world.status_path(&young)).unwrap();
    world.not_reported(&young).await;
    eventually("the proxy drops it", || !proxy.has(&young)).await;
    world.stop().await;
}

/// R04, R05. C03, C04, C05, C06: host network, sidecar, the tunnel itself, an excluded namespace.
#[tokio::test]
async fn pods_that_never_join() {
    let mut world = World::new();
    world.namespace("kube-system", "ambient");
    world.namespace("culvert-system", "ambient");
    let ambient = json!({"istio.io/dataplane-mode": "ambient"});
    let host = world.pod("shop", "host");
    world.describe(&host, &ambient, &json!({}), true);
    world.raw_status(&host, &json!({"phase": "Running", "podIPs": ["198.18.0.11"]}));
    let sidecar = world.pod("shop", "sidecar");
    world.describe(&sidecar, &ambient, &json!({"sidecar.istio.io/status": "{}"}), false);
    let system = world.pod("kube-system", "system");
    world.describe(&system, &ambient, &json!({}), false);
    let tunnel = world.pod("culvert-system", "tunnel");
    world.describe(&tunnel, &json!({"app": "ztunnel"}), &json!({}), false);
    let joins = world.pod("shop", "joins");
    world.start();
    let proxy = world.proxy().await;
    world.enabled(&joins).await;
    assert_eq!(proxy.seen.lock().pods.keys().collect::<Vec<_>>(), ["uid-joins"]);
    for pod in [&host, &sidecar, &system, &tunnel] {
        assert!(untouched(pod) && world.report(pod).is_none(), "{}", pod.name);
    }
    world.stop().await;
}

/// C11, C12, C14: DNS capture, inbound bypass and exclusions follow the pod's annotations while it runs; a wrong one is reported and
/// excludes nothing.
#[tokio::test]
async fn annotations_change_the_rules_of_a_running_pod() {
    let mut world = World::new();
    world.start();
    let _proxy = world.proxy().await;
    let pod = world.pod("shop", "pod");
    world.enabled(&pod).await;
    let becomes = async |annotations: serde_json::Value, rules: RedirectConfig, error: Option<&str>| {
        world.describe(&pod, &json!({}), &annotations, false);
        eventually(&format!("{annotations} is in force"), || {
            let reported = world.report(&pod).is_some_and(|(redirection, why)| {
                redirection == "enabled" && why.is_some() == error.is_some()
            });
            reported && verify(&pod.netns, &rules).unwrap() == Verdict::Intact
        })
        .await;
        if let Some(error) = error {
            let (_, why) = world.report(&pod).unwrap();
            assert!(why.as_ref().unwrap().contains(error), "{why:?}");
        }
    };
    let default = RedirectConfig::default;
    becomes(
        json!({"ambient.istio.io/dns-capture": "false"}),
        RedirectConfig { dns_port: None, ..default() },
        None,
    )
    .await;
    becomes(
        json!({"ambient.istio.io/bypass-inbound-capture": "true"}),
        RedirectConfig { bypass_inbound: true, ..default() },
        None,
    )
    .await;
    let excluded = RedirectConfig {
        exclude_outbound_ports: BTreeSet::from([443, 3306]),
        exclude_outbound: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
        exclude_inbound_ports: BTreeSet::from([9090]),
        ..default()
    };
    let good = json!({
        "culvert.dev/exclude-outbound-ports": "3306, 443",
        "culvert.dev/exclude-outbound-cidrs": "fd00::/8,10.0.0.0/8",
        "culvert.dev/exclude-inbound-ports": "9090",
    });
    becomes(good, excluded.clone(), None).await;
    let bad = json!({
        "culvert.dev/exclude-outbound-ports": "3306, https",
        "culvert.dev/exclude-outbound-cidrs": "fd00::/8,10.0.0.0/8",
    });
    let kept = RedirectConfig { exclude_outbound: excluded.exclude_outbound, ..default() };
    becomes(bad, kept, Some("\"https\"")).await;
    becomes(json!({}), default(), None).await;
    world.stop().await;
}

/// C27, C68: another address is no reason to touch rules or to tell the proxy.
#[tokio::test]
async fn a_pods_address_changes() {
    let mut world = World::new();
    world.start();
    let proxy = world.proxy().await;
    let pod = world.pod("shop", "pod");
    world.enabled(&pod).await;
    // The last of its pass: what the proxy is told again because it is new to the agent has been told.
    let last = world.pod("shop", "z-last");
    world.enabled(&last).await;
    let told = proxy.events();
    world.status(&pod, "Running", &["100.64.1.77", "fd00:64:1::77"]);
    let next = world.pod("shop", "next");
    world.enabled(&next).await;
    world.enabled(&pod).await;
    assert_eq!(proxy.events(), [told, vec!["add uid-next".to_owned()]].concat());
    world.stop().await;
}

/// C33, C60, C63, C66, C67, C81, H16: agent and proxy restart in any order. Rules and reports stay, and every proxy is first told of all pods.
#[tokio::test]
async fn agent_and_proxy_restart_in_any_order() {
    let mut world = World::new();
    let pods = [world.pod("shop", "one"), world.pod("shop", "two")];
    world.start();
    // Before any proxy: rules, but not reported as usable.
    for pod in &pods {
        eventually("it waits for a proxy", || world.report(pod).is_some()).await;
        assert_eq!(world.report(pod).unwrap().0, "pending");
        assert_eq!(verify(&pod.netns, &RedirectConfig::default()).unwrap(), Verdict::Intact);
    }
    let mut proxy = world.proxy().await;
    for pod in &pods {
        world.enabled(pod).await;
    }
    let stay = |world: &World| {
        for pod in &pods {
            assert!(world.is_enabled(pod), "{:?}", world.report(pod));
            assert_eq!(verify(&pod.netns, &RedirectConfig::default()).unwrap(), Verdict::Intact);
        }
    };
    for round in 0..4 {
        match round {
            // The agent alone; its proxy finds it again.
            0 => {
                world.stop().await;
                stay(&world);
                world.start();
            }
            // The proxy alone.
            1 => drop(proxy),
            // The agent first, then the proxy; and the other way round.
            2 => {
                world.stop().await;
                stay(&world);
                drop(proxy);
                world.start();
            }
            _ => {
                drop(proxy);
                world.stop().await;
                stay(&world);
                world.start();
            }
        }
        proxy = world.proxy().await;
        stay(&world);
        let told = proxy.events();
        let snapshot = told.iter().position(|it| it == "snapshot").unwrap();
        let mut before = told[..snapshot].to_vec();
        before.sort();
        assert_eq!(before, ["add uid-one", "add uid-two"]);
        assert!(pods.iter().all(|pod| proxy.has(pod)));
        // The agent goes on working with it.
        let new = world.pod("shop", &format!("new-{round}"));
        world.enabled(&new).await;
        fs::remove_file(world.netns_path(&new)).unwrap();
        fs::remove_file(world.status_path(&new)).unwrap();
        world.not_reported(&new).await;
        eventually("the proxy drops it", || !proxy.has(&new)).await;
        stay(&world);
    }
    world.stop().await;
}

/// C09, C22, C69, D48: a proxy that cannot serve a pod makes it pending, with the reason, also when it says so while it takes the
/// snapshot of pods that another proxy served; the agent tries again.
#[tokio::test]
async fn a_refused_pod_is_pending_and_tried_again() {
    let mut world = World::new();
    world.start();
    let proxy = world.refusing_proxy(&["uid-pod"]).await;
    let pod = world.pod("shop", "pod");
    let refused = || {
        world
            .report(&pod)
            .is_some_and(|(is, why)| is == "pending" && why.unwrap().contains("ports are taken"))
    };
    eventually("the refusal is reported", refused).await;
    assert_eq!(verify(&pod.netns, &RedirectConfig::default()).unwrap(), Verdict::Intact);
    proxy.seen.lock().refuses.clear();
    world.enabled(&pod).await;

    drop(proxy);
    let successor = world.refusing_proxy(&["uid-pod"]).await;
    eventually("the successor's refusal is reported", refused).await;
    // Not served, and still not let through.
    culvert_net::redirect::remove(&pod.netns).unwrap();
    eventually("rules are mended", || {
        verify(&pod.netns, &RedirectConfig::default()).unwrap() == Verdict::Intact
    })
    .await;
    successor.seen.lock().refuses.clear();
    world.enabled(&pod).await;
    world.stop().await;
}

/// What a former agent left of pods that should not be enrolled any more is taken away: rules, report, and the proxy's serving (C32,
/// C67); also if that agent ended between taking the report and the rules.
#[tokio::test]
async fn pods_that_left_while_no_agent_ran() {
    let mut world = World::new();
    let (stays, leaves, half, gone) = (
        world.pod("shop", "stays"),
        world.pod("shop", "leaves"),
        world.pod("shop", "half"),
        world.pod("shop", "gone"),
    );
    world.start();
    let proxy = world.proxy().await;
    for pod in [&stays, &leaves, &half, &gone] {
        world.enabled(pod).await;
    }
    world.stop().await;
    drop(proxy);
    for pod in [&leaves, &half] {
        world.describe(pod, &json!({"istio.io/dataplane-mode": "none"}), &json!({}), false);
    }
    fs::remove_file(world.path("state/nodes/node-a/redirection/uid-half.json")).unwrap();
    fs::remove_file(world.status_path(&gone)).unwrap();
    world.start();
    let proxy = world.proxy().await;
    let told: BTreeSet<String> = proxy.events().into_iter().collect();
    assert_eq!(told.into_iter().collect::<Vec<_>>(), ["add uid-stays", "snapshot"]);
    for pod in [&leaves, &half] {
        assert!(untouched(pod) && world.report(pod).is_none());
        assert!(!ip(&pod.netns, "rule").contains("32764"));
    }
    assert!(world.report(&gone).is_none());
    world.enabled(&stays).await;
    world.stop().await;
}

/// C24, C34, trap 5: a namespace that is new, under a pod that is reported enabled: after a reboot, or a sandbox made again while the
/// agent runs. The report says pending until rules stand and the proxy has the new namespace.
#[tokio::test]
async fn a_pod_whose_namespace_is_new_is_enrolled_again() {
    let mut world = World::new();
    let mut pod = world.pod("shop", "pod");
    world.start();
    let proxy = world.proxy().await;
    world.enabled(&pod).await;
    world.stop().await;
    drop(proxy);

    let replace = |world: &World, pod: &mut Pod| {
        pod.netns = Arc::new(NetNs::create().unwrap());
        ip(&pod.netns, "link set lo up");
        world.mount(pod);
    };
    replace(&world, &mut pod);
    world.start();
    eventually("rules stand", || verify(&pod.netns, &RedirectConfig::default()).unwrap() == Verdict::Intact)
        .await;
    assert_eq!(world.report(&pod).unwrap().0, "pending");
    let proxy = world.proxy().await;
    world.enabled(&pod).await;
    assert!(proxy.has(&pod));
    world.stop().await;

    world.start();
    let proxy = world.proxy().await;
    replace(&world, &mut pod);
    eventually("the proxy has the new namespace", || proxy.has(&pod)).await;
    world.enabled(&pod).await;
    world.stop().await;
}

/// A manifest that turned bad un-enrols nobody: not while the agent runs, not when it starts beside it, and not even when it starts
/// without what it knew before. The same for a pod's status.
#[tokio::test]
async fn bad_files_unenrol_nobody() {
    let mut world = World::new();
    let pod = world.pod("shop", "pod");
    world.start();
    let proxy = world.proxy().await;
    world.enabled(&pod).await;

    world.manifest("ns-shop.yaml", "metadata: {");
    fs::write(world.status_path(&pod), "{").unwrap();
    let next = world.pod("shop", "next");
    world.enabled(&next).await;
    world.enabled(&pod).await;
    world.status(&pod, "Running", &["100.64.1.2"]);

    world.stop().await;
    drop(proxy);
    world.start();
    let proxy = world.proxy().await;
    assert!(proxy.has(&pod) && proxy.has(&next));
    world.enabled(&pod).await;

    world.stop().await;
    drop(proxy);
    fs::remove_dir_all(world.path("state/nodes/node-a/manifests")).unwrap();
    world.start();
    let _proxy = world.proxy().await;
    // Whether it joins is not known; that it did is.
    world.enabled(&pod).await;
    world.namespace("shop", "ambient");
    let last = world.pod("shop", "last");
    world.enabled(&last).await;
    world.enabled(&pod).await;
    world.stop().await;
}
