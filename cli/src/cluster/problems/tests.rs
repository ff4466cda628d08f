//! Each fault that issue 5 names, and what is said of it.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::{Problem, Reason, Severity, problems};
use crate::cluster::reach::Unreached;
use crate::cluster::seen::{
    Certificate, Connected, ControllerPage, Lease, Node, OwnPod, Policy, PolicyStatus, Progress, Role,
    Rollout, Said, Seen, SeenPod, Waypoint, Webhook,
};

const SYSTEM: &str = "culvert-system";

fn now() -> Timestamp {
    "2026-11-30T12:00:00Z".parse().unwrap()
}

fn ago(seconds: i64) -> Timestamp {
    now() - SignedDuration::from_secs(seconds)
}

fn own(role: Role, name: &str, node: &str, said: Said) -> OwnPod {
    let pod = SeenPod {
        namespace: SYSTEM.into(),
        name: name.into(),
        node: node.into(),
        phase: "Running".into(),
        ready: true,
        since: Some(ago(600)),
        created: Some(ago(700)),
        ..SeenPod::default()
    };
    OwnPod { role, pod, said: Some(Ok(said)) }
}

fn enrolled(name: &str, node: &str) -> SeenPod {
    SeenPod {
        namespace: "shop".into(),
        name: name.into(),
        node: node.into(),
        phase: "Running".into(),
        ready: true,
        created: Some(ago(300)),
        annotations: BTreeMap::from([("ambient.istio.io/redirection".into(), "enabled".into())]),
        ..SeenPod::default()
    }
}

fn certificate(end: i64) -> Certificate {
    Certificate {
        identity: "spiffe://cluster.local/ns/shop/sa/web".into(),
        state: "Available".into(),
        not_before: Some(ago(3_600)),
        not_after: Some(ago(-end)),
        ..Certificate::default()
    }
}

fn connected(pod: &str, node: &str, behind: Option<i64>) -> Connected {
    let progress = Progress {
        acked_generation: Some(7),
        behind_since: behind.map(ago),
        sent: 3,
        nacked: 0,
        last_nack: None,
    };
    Connected {
        node: node.into(),
        namespace: SYSTEM.into(),
        pod: pod.into(),
        version: "0.1.0".into(),
        connected: ago(500),
        types: BTreeMap::from([("Address".into(), progress.clone()), ("Authorization".into(), progress)]),
    }
}

/// Two nodes, one controller, a pod on each node, and nothing wrong.
fn well() -> Seen {
    let node = |name: &str| Node {
        name: name.into(),
        ready: true,
        since: Some(ago(900)),
        renewed: Some(ago(8)),
        linux: true,
        ..Node::default()
    };
    let page = ControllerPage {
        version: "0.1.0".into(),
        generation: 7,
        proxies: vec![connected("zt-a", "a", None), connected("zt-b", "b", None)],
    };
    let rollout =
        |desired| Some(Rollout { desired, updated: desired, observed: true, version: "0.1.0".into() });
    Seen {
        now: now(),
        name: "https://198.18.0.1:6443".into(),
        kubernetes: Some("v1.36.3".into()),
        system: SYSTEM.into(),
        controller: rollout(1),
        agent: rollout(2),
        proxy: rollout(2),
        excluded: vec!["kube-system".into(), SYSTEM.into()],
        lease: Some(Lease { holder: "ctl-1".into(), renewed: Some(ago(4)), seconds: 15 }),
        nodes: vec![node("a"), node("b")],
        own: vec![
            own(Role::Controller, "ctl-1", "a", Said::Controller(page, Vec::new())),
            own(Role::Agent, "ag-a", "a", Said::Agent(Some(0))),
            own(Role::Agent, "ag-b", "b", Said::Agent(Some(1))),
            own(Role::Proxy, "zt-a", "a", Said::Proxy(vec![certificate(80_000)])),
            own(Role::Proxy, "zt-b", "b", Said::Proxy(vec![certificate(80_000)])),
        ],
        namespaces: BTreeMap::from([(
            "shop".into(),
            BTreeMap::from([("istio.io/dataplane-mode".into(), "ambient".into())]),
        )]),
        pods: vec![enrolled("web-1", "a"), enrolled("web-2", "b")],
        root: Some(ago(-300 * 86_400)),
        webhook: Some(Webhook { name: "culvert-validator".into(), bundle: true, answered: Some(Ok(())) }),
        waypoints: Some(vec![waypoint(Some(true))]),
        bound: BTreeMap::from([("shop/w".into(), BTreeSet::from(["namespace shop".into()]))]),
        policies: vec![Policy {
            kind: "AuthorizationPolicy".into(),
            namespace: "shop".into(),
            name: "p".into(),
            refused: Vec::new(),
        }],
        ..Seen::default()
    }
}

fn waypoint(programmed: Option<bool>) -> Waypoint {
    Waypoint {
        namespace: "shop".into(),
        name: "w".into(),
        programmed,
        reason: "R".into(),
        message: "m".into(),
        created: Some(ago(600)),
        ..Waypoint::default()
    }
}

/// What is found after something was changed in a mesh that is well.
fn after(change: impl FnOnce(&mut Seen)) -> Vec<Problem> {
    let mut seen = well();
    change(&mut seen);
    problems(&seen)
}

/// The one problem that is found.
fn only(change: impl FnOnce(&mut Seen)) -> Problem {
    let mut found = after(change);
    assert_eq!(found.len(), 1, "{found:#?}");
    found.remove(0)
}

fn pod<'a>(seen: &'a mut Seen, name: &str) -> &'a mut OwnPod {
    seen.own.iter_mut().find(|own| own.pod.name == name).unwrap()
}

fn page(seen: &mut Seen) -> &mut ControllerPage {
    match &mut pod(seen, "ctl-1").said {
        Some(Ok(Said::Controller(page, _))) => page,
        _ => panic!("a controller"),
    }
}

#[test]
fn a_mesh_that_is_well_has_no_problems() {
    assert_eq!(problems(&well()), []);
}

#[test]
fn an_api_server_that_does_not_answer_is_all_that_is_said() {
    let seen = Seen {
        away: Some("connection refused".into()),
        name: "https://x".into(),
        now: now(),
        ..Seen::default()
    };
    let found = problems(&seen);
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].reason, Reason::ApiServerUnreachable);
    assert!(found[0].line(now()).contains("https://x: the API server does not answer: connection refused"));
}

#[test]
fn a_cluster_without_the_mesh_says_so() {
    let seen = Seen { now: now(), system: SYSTEM.into(), kubernetes: Some("v".into()), ..Seen::default() };
    assert_eq!(problems(&seen)[0].reason, Reason::NotInstalled);
    // Not known is not the same as not there.
    let seen = Seen { unread: vec![("deployments".into(), "forbidden".into())], ..seen };
    assert_eq!(problems(&seen)[0].reason, Reason::CannotRead);
}

#[test]
fn what_was_not_read_is_one_line_for_each_reason_why() {
    let problem = only(|seen| {
        seen.unread = vec![("nodes".into(), "forbidden".into()), ("gateways".into(), "forbidden".into())];
    });
    assert_eq!((problem.reason, problem.severity), (Reason::CannotRead, Severity::Warning));
    assert!(problem.message.contains("nodes, gateways: forbidden"), "{}", problem.message);
}

#[test]
fn a_controller_that_was_killed_is_named_before_and_after_the_kubelet_saw_it() {
    let killed = only(|seen| {
        let own = pod(seen, "ctl-1");
        own.pod.ready = false;
        own.pod.why = "Error".into();
        own.pod.since = Some(ago(3));
        own.said = Some(Err(Unreached::NoAnswer("connection refused".into())));
    });
    assert_eq!((killed.reason, killed.since), (Reason::ControllerNotReady, Some(ago(3))));
    assert!(
        killed.line(now()).contains("none of 1 replicas is ready (Error)")
            && killed.line(now()).contains(", for 3s;")
    );
    let unseen = only(|seen| pod(seen, "ctl-1").said = Some(Err(Unreached::NoAnswer("refused".into()))));
    assert_eq!(unseen.reason, Reason::ControllerUnreachable);
    let gone = after(|seen| seen.controller = None);
    assert_eq!(gone[0].reason, Reason::ControllerNotReady);
    // One of several.
    let one = only(|seen| {
        seen.controller.as_mut().unwrap().desired = 2;
        seen.controller.as_mut().unwrap().updated = 2;
        let mut second = pod(seen, "ctl-1").clone();
        second.pod.name = "ctl-2".into();
        second.pod.ready = false;
        second.said = None;
        seen.own.push(second);
        // Nobody can say that a proxy is connected to none while one replica was not asked.
        page(seen).proxies.pop();
    });
    assert_eq!(
        (one.reason, one.severity, one.object.name.as_str()),
        (Reason::ControllerNotReady, Severity::Warning, "ctl-2")
    );
}

#[test]
fn a_mesh_without_leader_says_so() {
    assert_eq!(only(|seen| seen.lease = None).reason, Reason::NoLeader);
    assert_eq!(only(|seen| seen.lease.as_mut().unwrap().holder.clear()).reason, Reason::NoLeader);
    let stale = only(|seen| seen.lease.as_mut().unwrap().renewed = Some(ago(40)));
    assert_eq!((stale.reason, stale.since), (Reason::LeaseStale, Some(ago(40))));
    assert_eq!(after(|seen| seen.lease.as_mut().unwrap().renewed = Some(ago(18))), []);
    // A lease that may not be read says nothing.
    let unread = only(|seen| {
        seen.lease = None;
        seen.unread.push(("leases".into(), "forbidden".into()));
    });
    assert_eq!(unread.reason, Reason::CannotRead);
}

#[test]
fn an_agent_that_is_missing_or_was_killed_is_named_with_its_node() {
    let missing = only(|seen| seen.own.retain(|own| own.pod.name != "ag-b"));
    assert_eq!((missing.reason, missing.node.as_deref()), (Reason::AgentMissing, Some("b")));
    let killed = only(|seen| {
        pod(seen, "ag-b").pod.ready = false;
        pod(seen, "ag-b").pod.why = "CrashLoopBackOff".into();
    });
    assert_eq!((killed.reason, killed.node.as_deref()), (Reason::AgentNotReady, Some("b")));
    assert!(killed.message.contains("CrashLoopBackOff"));
    let unseen = only(|seen| pod(seen, "ag-b").said = Some(Err(Unreached::NoAnswer("refused".into()))));
    assert_eq!(unseen.reason, Reason::AgentUnreachable);
}

#[test]
fn a_proxy_that_is_missing_is_an_error_where_pods_need_it() {
    let needed = only(|seen| seen.own.retain(|own| own.pod.name != "zt-b"));
    assert_eq!((needed.reason, needed.severity), (Reason::ProxyMissing, Severity::Error));
    assert!(needed.action.contains("1 enrolled pod"), "{}", needed.action);
    let idle = only(|seen| {
        seen.own.retain(|own| own.pod.name != "zt-b");
        seen.pods.pop();
    });
    assert_eq!((idle.reason, idle.severity), (Reason::ProxyMissing, Severity::Warning));
}

#[test]
fn a_proxy_that_was_killed_is_named() {
    let killed = only(|seen| {
        pod(seen, "zt-a").pod.ready = false;
        pod(seen, "zt-a").pod.since = Some(ago(2));
        page(seen).proxies.remove(0);
    });
    assert_eq!(
        (killed.reason, killed.node.as_deref(), killed.since),
        (Reason::ProxyNotReady, Some("a"), Some(ago(2)))
    );
    let unseen =
        only(|seen| pod(seen, "zt-a").said = Some(Err(Unreached::NoAnswer("lost connection to pod".into()))));
    assert_eq!(unseen.reason, Reason::ProxyUnreachable);
    let cut = only(|seen| drop(page(seen).proxies.remove(0)));
    assert_eq!((cut.reason, cut.object.name.as_str()), (Reason::ProxyNotConnected, "zt-a"));
}

/// K15.
#[test]
fn a_proxy_that_is_behind_or_refuses_is_named() {
    let behind = only(|seen| page(seen).proxies[1] = connected("zt-b", "b", Some(20)));
    assert_eq!((behind.reason, behind.since), (Reason::ProxyBehind, Some(ago(20))));
    assert!(behind.message.contains("generation 7"));
    // A change that was made a moment ago.
    assert_eq!(after(|seen| page(seen).proxies[1] = connected("zt-b", "b", Some(2))), []);
    let refused = only(|seen| {
        let types = &mut page(seen).proxies[0].types;
        types.get_mut("Address").unwrap().last_nack = Some("bad address".into());
    });
    assert_eq!(refused.reason, Reason::ProxyRefused);
    assert!(refused.message.contains("bad address"));
}

/// K04.
#[test]
fn certificates_that_end_are_named() {
    let with = |change: fn(&mut Certificate)| {
        only(|seen| {
            let mut it = certificate(80_000);
            change(&mut it);
            pod(seen, "zt-b").said = Some(Ok(Said::Proxy(vec![it])));
        })
    };
    let expired = with(|it| it.not_after = Some(ago(5)));
    assert_eq!((expired.reason, expired.since), (Reason::CertificateExpired, Some(ago(5))));
    let soon = with(|it| it.not_after = Some(ago(-300)));
    assert_eq!((soon.reason, soon.severity), (Reason::CertificateExpiring, Severity::Warning));
    let none = with(|it| {
        it.state = "Unavailable".into();
        it.last_error = Some("refused".into());
        (it.not_before, it.not_after) = (None, None);
    });
    assert_eq!(none.reason, Reason::CertificateUnavailable);
    assert!(none.line(now()).contains("no certificate: refused"));
    assert_eq!(only(|seen| seen.root = Some(ago(1))).reason, Reason::RootExpired);
    assert_eq!(only(|seen| seen.root = Some(ago(-86_400))).reason, Reason::RootExpiring);
}

#[test]
fn of_a_node_that_is_down_only_that_is_said() {
    let down = only(|seen| {
        seen.nodes[1].ready = false;
        seen.nodes[1].since = Some(ago(50));
        seen.nodes[1].why = "Kubelet stopped posting node status.".into();
        for name in ["ag-b", "zt-b"] {
            pod(seen, name).pod.ready = false;
            pod(seen, name).said = Some(Err(Unreached::Kubelet("refused".into())));
        }
        page(seen).proxies.pop();
        seen.pods[1].annotations.clear();
    });
    assert_eq!(
        (down.reason, down.object.name.as_str(), down.since),
        (Reason::NodeNotReady, "b", Some(ago(50)))
    );
}

#[test]
fn a_kubelet_that_is_away_is_named_before_its_node_is_not_ready() {
    let dial = || Unreached::Kubelet("dial tcp 198.18.0.12:10250: connect: connection refused".into());
    let first = only(|seen| pod(seen, "zt-b").said = Some(Err(dial())));
    assert_eq!((first.reason, first.node.as_deref()), (Reason::KubeletUnreachable, Some("b")));
    assert!(first.message.contains("10250"));
    let silent = only(|seen| seen.nodes[1].renewed = Some(ago(30)));
    assert_eq!((silent.reason, silent.since), (Reason::KubeletUnreachable, Some(ago(30))));
}

#[test]
fn a_rolling_update_is_named_and_its_second_proxy_is_no_fault() {
    let update = only(|seen| {
        let rollout = seen.proxy.as_mut().unwrap();
        rollout.updated = 1;
        // The new one comes while the old one still serves.
        let mut new = pod(seen, "zt-a").clone();
        new.pod.name = "zt-a2".into();
        new.pod.ready = false;
        new.said = None;
        seen.own.push(new);
    });
    assert_eq!((update.reason, update.severity), (Reason::RollingUpdate, Severity::Warning));
    assert!(update.line(now()).contains("1 of 2 pods are new"));
    assert_eq!(only(|seen| seen.agent.as_mut().unwrap().observed = false).reason, Reason::RollingUpdate);
}

#[test]
fn a_pod_that_should_be_in_the_mesh_and_is_not_is_named() {
    let plain = only(|seen| seen.pods[0].annotations.clear());
    assert_eq!(
        (plain.reason, plain.object.name.as_str(), plain.node.as_deref()),
        (Reason::PodNotEnrolled, "web-1", Some("a"))
    );
    let pending = only(|seen| {
        seen.pods[0].annotations.insert("ambient.istio.io/redirection".into(), "pending".into());
    });
    assert_eq!((pending.reason, pending.severity), (Reason::PodPending, Severity::Error));
    let stuck = only(|seen| {
        seen.pods[0].annotations.clear();
        seen.pods[0].phase = "Pending".into();
        seen.pods[0].why = "ContainerCreating".into();
    });
    assert_eq!((stuck.reason, stuck.severity), (Reason::PodPending, Severity::Warning));
    let stray = only(|seen| {
        seen.pods[0].labels.insert("istio.io/dataplane-mode".into(), "none".into());
    });
    assert_eq!((stray.reason, stray.severity), (Reason::PodStillEnrolled, Severity::Warning));
    // One that was just made is joining; one that ended, or shares its node's network, never does.
    for change in [
        (|pod: &mut SeenPod| pod.created = Some(ago(3))) as fn(&mut SeenPod),
        |pod| (pod.phase, pod.why) = ("Pending".into(), "ImagePullBackOff".into()),
        |pod| pod.phase = "Succeeded".into(),
        |pod| pod.host_network = true,
        |pod| pod.deleted = true,
        |pod| pod.namespace = "kube-system".into(),
    ] {
        assert_eq!(
            after(|seen| {
                seen.pods[0].annotations.clear();
                change(&mut seen.pods[0]);
            }),
            []
        );
    }
}

#[test]
fn a_webhook_that_does_not_answer_is_named() {
    let silent =
        only(|seen| seen.webhook.as_mut().unwrap().answered = Some(Err("failed calling webhook".into())));
    assert_eq!(silent.reason, Reason::WebhookNotAnswering);
    assert_eq!(
        only(|seen| seen.webhook.as_mut().unwrap().bundle = false).reason,
        Reason::WebhookNotAnswering
    );
    assert_eq!(after(|seen| seen.webhook = None), []);
}

#[test]
fn a_policy_that_is_not_in_force_as_written_is_named_once() {
    let status = |reason: &str, accepted| PolicyStatus {
        kind: "AuthorizationPolicy".into(),
        namespace: "shop".into(),
        name: "p".into(),
        accepted,
        reason: reason.into(),
        message: "spec.action".into(),
    };
    let with = |status: PolicyStatus| {
        after(|seen| {
            let refused = ("ZtunnelAccepted".into(), status.reason.clone(), "m".into(), None);
            if !status.accepted {
                seen.policies[0].refused.push(refused);
            }
            match &mut pod(seen, "ctl-1").said {
                Some(Ok(Said::Controller(_, policies))) => policies.push(status),
                _ => panic!("a controller"),
            }
        })
    };
    assert_eq!(with(status("Accepted", true)), []);
    let refused = with(status("UnsupportedValue", false));
    assert_eq!((refused.len(), refused[0].reason), (1, Reason::PolicyNotAccepted));
    let invalid = with(status("Invalid", true));
    assert_eq!((invalid[0].reason, invalid[0].severity), (Reason::PolicyNotAccepted, Severity::Error));
    let widened = with(status("Widened", true));
    assert_eq!((widened[0].reason, widened[0].severity), (Reason::PolicyNotAsWritten, Severity::Warning));
    // By its conditions alone, when no controller was asked.
    let condition = only(|seen| {
        seen.policies[0].refused.push((
            "ZtunnelAccepted".into(),
            "Invalid".into(),
            "why".into(),
            Some(ago(9)),
        ));
    });
    assert_eq!((condition.reason, condition.since), (Reason::PolicyNotAccepted, Some(ago(9))));
    assert!(condition.message.contains("Invalid: why"));
}

/// K14.
#[test]
fn a_waypoint_that_is_missing_or_not_programmed_is_named() {
    let missing = only(|seen| seen.waypoints = Some(Vec::new()));
    assert_eq!((missing.reason, missing.object.name.as_str()), (Reason::WaypointMissing, "w"));
    assert!(missing.message.contains("namespace shop"));
    assert_eq!(only(|seen| seen.waypoints = None).reason, Reason::WaypointMissing);
    let refused = only(|seen| seen.waypoints = Some(vec![waypoint(Some(false))]));
    assert_eq!((refused.reason, refused.severity), (Reason::WaypointNotProgrammed, Severity::Error));
    let unused = only(|seen| {
        seen.waypoints = Some(vec![waypoint(None)]);
        seen.bound.clear();
    });
    assert_eq!((unused.reason, unused.severity), (Reason::WaypointNotProgrammed, Severity::Warning));
    assert_eq!(
        after(|seen| seen.waypoints = Some(vec![Waypoint { created: Some(ago(5)), ..waypoint(None) }])),
        []
    );
}

#[test]
fn clocks_that_differ_are_named() {
    let node = only(|seen| pod(seen, "ag-b").said = Some(Ok(Said::Agent(Some(-90)))));
    assert_eq!((node.reason, node.object.name.as_str()), (Reason::ClockSkew, "b"));
    assert!(node.message.contains("90s behind"));
    assert_eq!(only(|seen| seen.skew = 30).reason, Reason::ClockSkew);
}

#[test]
fn the_worst_comes_first() {
    let found = after(|seen| {
        seen.skew = 30;
        seen.pods[0].annotations.clear();
        seen.lease = None;
    });
    let reasons: Vec<_> = found.iter().map(|problem| problem.reason).collect();
    assert_eq!(reasons, [Reason::NoLeader, Reason::PodNotEnrolled, Reason::ClockSkew]);
}
