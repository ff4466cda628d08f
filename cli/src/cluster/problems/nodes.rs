//! Nodes, and the agent and the proxy of each.

use std::collections::BTreeMap;

use super::control_plane::{is_unread, node_clock};
use super::{Problem, Reason, Severity, object};
use crate::cluster::reach::Unreached;
use crate::cluster::seen::{Certificate, Enrolment, Node, OwnPod, Role, Said, Seen, SeenPod, age, seconds};

/// A kubelet renews its node's lease every 10 s; the node is NotReady after 40.
const KUBELET_SILENT: i64 = 25;
/// A change is in force everywhere within 1 s; a proxy re-judges what is open for at most 5 s before it says so.
const BEHIND: i64 = 6;
/// A proxy that has just become ready may be between two streams.
const CONNECTING: i64 = 5;

pub(super) fn find(seen: &Seen, found: &mut Vec<Problem>) {
    let mut enrolled: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in seen.pods.iter().filter(|pod| !matches!(seen.enrolment(pod), Enrolment::Outside)) {
        *enrolled.entry(&pod.node).or_default() += 1;
    }
    for node in seen.nodes.iter().filter(|node| node.linux) {
        if !node.ready {
            found.push(not_ready(node));
            continue;
        }
        let pods = enrolled.get(node.name.as_str()).copied().unwrap_or_default();
        if let Some(problem) = kubelet(seen, node) {
            found.push(problem);
        }
        agent(seen, node, found);
        proxy(seen, node, pods, found);
    }
}

fn not_ready(node: &Node) -> Problem {
    let why = if node.why.is_empty() { "it does not say why" } else { &node.why };
    let place = object("Node", "", &node.name);
    Problem::error(
        Reason::NodeNotReady,
        place,
        format!("not ready ({why}); nothing is known of what runs on it"),
    )
    .on(&node.name)
    .since(node.since)
    .todo(format!("kubectl describe node {}", node.name))
}

/// The kubelet forwards no ports, or has not renewed the node's lease.
fn kubelet(seen: &Seen, node: &Node) -> Option<Problem> {
    let refused = seen.own.iter().filter(|own| own.pod.node == node.name).find_map(|own| match &own.said {
        Some(Err(Unreached::Kubelet(why))) => Some(why.clone()),
        _ => None,
    });
    let silent = node.renewed.is_some_and(|renewed| seconds(renewed, seen.now) > KUBELET_SILENT);
    let message = match (refused, silent) {
        (Some(why), _) => format!("its kubelet does not answer ({why})"),
        (None, true) => "its kubelet does not renew the node's lease".to_owned(),
        (None, false) => return None,
    };
    Some(
        Problem::error(Reason::KubeletUnreachable, object("Node", "", &node.name), message)
            .on(&node.name)
            .since(node.renewed.filter(|_| silent))
            .todo("pods that run are in the mesh as before, no new ones start; see the kubelet's log on the node"),
    )
}

/// The pods of a role on a node that count: a ready one if there is any.
fn on<'a>(seen: &'a Seen, role: Role, node: &str) -> Vec<&'a OwnPod> {
    seen.of_role(role).filter(|own| own.pod.node == node).collect()
}

fn agent(seen: &Seen, node: &Node, found: &mut Vec<Problem>) {
    let agents = on(seen, Role::Agent, &node.name);
    let todo = "pods that are in the mesh stay there, new ones do not start";
    if agents.is_empty() {
        let message = "no agent runs on it";
        found.push(missing(
            seen,
            Reason::AgentMissing,
            node,
            Severity::Error,
            message,
            todo,
            "culvert-agent",
        ));
        return;
    }
    if !agents.iter().any(|own| own.pod.ready) {
        found.extend(agents.iter().map(|own| unready(seen, Reason::AgentNotReady, own, "agent", todo)));
        return;
    }
    for own in agents.iter().filter(|own| own.pod.ready) {
        match &own.said {
            Some(Err(why)) => found.extend(unreachable(seen, Reason::AgentUnreachable, own, "agent", why)),
            _ => found.extend(node_clock(own)),
        }
    }
}

fn proxy(seen: &Seen, node: &Node, pods: usize, found: &mut Vec<Problem>) {
    let proxies = on(seen, Role::Proxy, &node.name);
    let severity = if pods > 0 { Severity::Error } else { Severity::Warning };
    let todo = format!("{} are cut off from the mesh meanwhile", count(pods, "enrolled pod"));
    if proxies.is_empty() {
        found.push(missing(
            seen,
            Reason::ProxyMissing,
            node,
            severity,
            "no proxy runs on it",
            &todo,
            "ztunnel",
        ));
        return;
    }
    if !proxies.iter().any(|own| own.pod.ready) {
        let unready =
            |own: &&OwnPod| Problem { severity, ..unready(seen, Reason::ProxyNotReady, own, "proxy", &todo) };
        found.extend(proxies.iter().map(unready));
        return;
    }
    for own in proxies.iter().filter(|own| own.pod.ready) {
        match &own.said {
            Some(Err(why)) => found.extend(unreachable(seen, Reason::ProxyUnreachable, own, "proxy", why)),
            Some(Ok(Said::Proxy(list))) => {
                found.extend(list.iter().filter_map(|it| certificate(seen, &own.pod, it)))
            }
            _ => {}
        }
        following(seen, &own.pod, found);
    }
}

/// Whether it has what the controllers have.
fn following(seen: &Seen, pod: &SeenPod, found: &mut Vec<Problem>) {
    let place = || object("Pod", &pod.namespace, &pod.name);
    let streams: Vec<_> = seen.connected().filter(|(_, _, proxy)| proxy.pod == pod.name).collect();
    if streams.is_empty() {
        let controllers: Vec<_> = seen.of_role(Role::Controller).collect();
        let all_asked = controllers.iter().all(|own| matches!(own.said, Some(Ok(_))));
        let settled = pod.since.is_none_or(|since| seconds(since, seen.now) > CONNECTING);
        if !controllers.is_empty() && all_asked && settled {
            let message = "the proxy is connected to no controller";
            let problem = Problem::error(Reason::ProxyNotConnected, place(), message).on(&pod.node);
            found.push(problem.todo(format!("it goes on with what it has; culvert logs proxy/{}", pod.node)));
        }
        return;
    }
    // One that reconnects may have two streams for a moment: the one that is further on counts.
    let behind = streams.iter().map(|(_, _, proxy)| proxy.behind_since()).min_by_key(|since| since.is_some());
    if let Some(Some(since)) = behind
        && seconds(since, seen.now) > BEHIND
    {
        let message = format!("the proxy does not have {}", newest(seen));
        let problem = Problem::error(Reason::ProxyBehind, place(), message).on(&pod.node).since(Some(since));
        found.push(problem.todo(format!("culvert get proxies -o wide, culvert logs proxy/{}", pod.node)));
    }
    let refused =
        streams.iter().flat_map(|(_, _, proxy)| proxy.types.values()).find_map(|it| it.last_nack.as_ref());
    if let Some(why) = refused {
        let message = format!("the proxy refused resources: {why}");
        let problem = Problem::error(Reason::ProxyRefused, place(), message).on(&pod.node);
        found.push(problem.todo("what it refused is denied; mend the object that is named"));
    }
}

fn newest(seen: &Seen) -> String {
    seen.generation().map_or_else(|| "the newest generation".to_owned(), |it| format!("generation {it}"))
}

fn certificate(seen: &Seen, proxy: &SeenPod, certificate: &Certificate) -> Option<Problem> {
    let why = certificate.last_error.as_deref().map(|why| format!(": {why}")).unwrap_or_default();
    let left = certificate.not_after.map(|end| seconds(seen.now, end));
    let life = certificate.not_before.zip(certificate.not_after).map(|(begin, end)| seconds(begin, end));
    let expired = left.is_some_and(|left| left <= 0);
    // Renewal is due at half of the lifetime, so in the last fifth it has failed for long.
    let soon = left.zip(life).is_some_and(|(left, life)| left * 5 < life);
    let (reason, message) = if expired {
        (Reason::CertificateExpired, format!("certificate expired{why}"))
    } else if certificate.state == "Unavailable" {
        (Reason::CertificateUnavailable, format!("no certificate{why}"))
    } else if soon {
        (Reason::CertificateExpiring, format!("certificate ends in {} and was not renewed{why}", age(left?)))
    } else {
        return None;
    };
    let place = object("Certificate", "", &certificate.identity);
    let problem = Problem::error(reason, place, message)
        .on(&proxy.node)
        .since(certificate.not_after.filter(|_| expired));
    let problem = if soon && !expired { Problem { severity: Severity::Warning, ..problem } } else { problem };
    Some(problem.todo(format!("culvert logs proxy/{} and culvert logs controller say why", proxy.node)))
}

fn missing(
    seen: &Seen,
    reason: Reason,
    node: &Node,
    severity: Severity,
    message: &str,
    consequence: &str,
    set: &str,
) -> Problem {
    // Whether the list of pods is all there is, is said of the list.
    let unsure = if is_unread(seen, "pods of the mesh") { " as far as could be read" } else { "" };
    let place = object("Node", "", &node.name);
    let problem = Problem { severity, ..Problem::error(reason, place, format!("{message}{unsure}")) };
    problem.on(&node.name).todo(format!("{consequence}; kubectl -n {} describe daemonset {set}", seen.system))
}

fn unready(seen: &Seen, reason: Reason, own: &OwnPod, what: &str, consequence: &str) -> Problem {
    let why = if own.pod.why.is_empty() { String::new() } else { format!(" ({})", own.pod.why) };
    let place = object("Pod", &seen.system, &own.pod.name);
    Problem::error(reason, place, format!("the {what} is not ready{why}"))
        .on(&own.pod.node)
        .since(own.pod.since)
        .todo(format!("{consequence}; culvert logs {what}/{}", own.pod.node))
}

/// Not for what the kubelet is to blame for, or what may not be asked: that is said elsewhere.
fn unreachable(seen: &Seen, reason: Reason, own: &OwnPod, what: &str, why: &Unreached) -> Option<Problem> {
    if matches!(why, Unreached::Kubelet(_) | Unreached::Forbidden(_)) {
        return None;
    }
    let place = object("Pod", &seen.system, &own.pod.name);
    let problem =
        Problem::error(reason, place, format!("the {what} does not answer: {why}")).on(&own.pod.node);
    Some(problem.todo(format!("culvert logs {what}/{}", own.pod.node)))
}

/// `1 enrolled pod`, `2 enrolled pods`.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
