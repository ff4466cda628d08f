//! Pods that should be in the mesh, policies and waypoints.

use std::collections::BTreeSet;

use super::control_plane::is_unread;
use super::{Object, Problem, Reason, Severity, object};
use crate::cluster::seen::{Enrolment, Policy, PolicyStatus, Role, Said, Seen, SeenPod, Waypoint, seconds};

/// A pod that was just made, or whose namespace was just labelled, is joining.
const JOINING: i64 = 15;
/// What a container waits for while its pod has no sandbox.
const SANDBOX: [&str; 2] = ["", "ContainerCreating"];
/// A Gateway that was just made is being provisioned.
const PROVISIONING: i64 = 60;

pub(super) fn find(seen: &Seen, found: &mut Vec<Problem>) {
    // Of pods on nodes that are not there nothing is known.
    let down: BTreeSet<&str> = seen.nodes.iter().filter(|it| !it.ready).map(|it| it.name.as_str()).collect();
    let known = seen.pods.iter().filter(|pod| !down.contains(pod.node.as_str()));
    found.extend(known.filter_map(|pod| enrolment(seen, pod)));
    policies(seen, found);
    waypoints(seen, found);
}

fn enrolment(seen: &Seen, pod: &SeenPod) -> Option<Problem> {
    let place = || object("Pod", &pod.namespace, &pod.name);
    let young = pod.created.is_some_and(|created| seconds(created, seen.now) < JOINING);
    let agent = if pod.node.is_empty() { "agent/NODE".to_owned() } else { format!("agent/{}", pod.node) };
    let problem = match seen.enrolment(pod) {
        Enrolment::Enabled | Enrolment::Outside => return None,
        _ if young => return None,
        Enrolment::Stray => {
            let message = "no label asks for it to be in the mesh, and it still is";
            Problem::warning(Reason::PodStillEnrolled, place(), message).todo(format!("culvert logs {agent}"))
        }
        Enrolment::Pending => {
            let message = "its rules are in place and the proxy does not serve it: it reaches nobody";
            Problem::error(Reason::PodPending, place(), message).todo(format!("culvert logs {agent}"))
        }
        // It has no address that could be in the mesh. Where its sandbox is not made, that may be the CNI plugin's doing; what else
        // keeps a pod from starting is none of the mesh's.
        Enrolment::Missing if pod.phase == "Pending" => {
            if pod.node.is_empty() || !SANDBOX.contains(&pod.why.as_str()) {
                return None;
            }
            Problem::warning(
                Reason::PodPending,
                place(),
                "its sandbox is not made, which waits for the node's agent",
            )
            .todo(format!("kubectl -n {} describe pod {}, culvert logs {agent}", pod.namespace, pod.name))
        }
        Enrolment::Missing => {
            let message = "it is labelled to be in the mesh and is not: its traffic is plain";
            Problem::error(Reason::PodNotEnrolled, place(), message).todo(format!("culvert logs {agent}"))
        }
    };
    let since = pod.since.or(pod.created);
    Some(if pod.node.is_empty() { problem.since(since) } else { problem.on(&pod.node).since(since) })
}

fn policies(seen: &Seen, found: &mut Vec<Problem>) {
    let mut told: BTreeSet<Object> = BTreeSet::new();
    // Replicas agree but for moments: the first that was asked speaks for all.
    let first = seen.of_role(Role::Controller).find_map(|own| match &own.said {
        Some(Ok(Said::Controller(_, policies))) => Some(policies),
        _ => None,
    });
    for status in first.into_iter().flatten() {
        let Some(problem) = judged(status) else { continue };
        told.insert(problem.object.clone());
        found.push(problem);
    }
    for policy in &seen.policies {
        let place = object(&policy.kind, &policy.namespace, &policy.name);
        if !told.contains(&place) {
            found.extend(conditions(policy, place));
        }
    }
}

fn judged(status: &PolicyStatus) -> Option<Problem> {
    let place = object(&status.kind, &status.namespace, &status.name);
    let edit = format!("kubectl -n {} edit {} {}", status.namespace, status.kind.to_lowercase(), status.name);
    let message = format!("{}: {}", status.reason, status.message);
    match status.reason.as_str() {
        "Accepted" => None,
        "Invalid" => Some(Problem::error(Reason::PolicyNotAccepted, place, message).todo(edit)),
        _ if !status.accepted => Some(Problem::error(Reason::PolicyNotAccepted, place, message).todo(edit)),
        _ => Some(Problem::warning(Reason::PolicyNotAsWritten, place, message).todo(edit)),
    }
}

fn conditions(policy: &Policy, place: Object) -> Option<Problem> {
    let (kind, reason, message, since) = policy.refused.first()?;
    let about = if policy.kind.ends_with("Policy") || policy.kind.ends_with("Authentication") {
        Reason::PolicyNotAccepted
    } else {
        Reason::ResourceNotAccepted
    };
    let edit = format!("kubectl -n {} edit {} {}", policy.namespace, policy.kind.to_lowercase(), policy.name);
    let problem = Problem::error(about, place, format!("{kind} is False: {reason}: {message}"));
    Some(problem.since(*since).todo(edit))
}

fn waypoints(seen: &Seen, found: &mut Vec<Problem>) {
    let all = seen.waypoints.as_deref().unwrap_or_default();
    found.extend(all.iter().filter_map(|waypoint| unprogrammed(seen, waypoint)));
    if is_unread(seen, "gateways") {
        return;
    }
    let there: BTreeSet<String> = all.iter().map(|it| format!("{}/{}", it.namespace, it.name)).collect();
    for (name, who) in seen.bound.iter().filter(|(name, _)| !there.contains(*name)) {
        let (namespace, waypoint) = name.split_once('/').unwrap_or(("", name));
        let first = who.first().map(String::as_str).unwrap_or_default();
        let more = if who.len() > 1 { format!(" and {} more", who.len() - 1) } else { String::new() };
        let message =
            format!("{first}{more} should be reached through it, and it does not exist: they are refused");
        found.push(
            Problem::error(Reason::WaypointMissing, object("Gateway", namespace, waypoint), message).todo(format!(
                "culvert waypoint apply -n {namespace} --name {waypoint}, or remove label istio.io/use-waypoint"
            )),
        );
    }
}

fn unprogrammed(seen: &Seen, waypoint: &Waypoint) -> Option<Problem> {
    let young = waypoint.created.is_some_and(|created| seconds(created, seen.now) < PROVISIONING);
    let name = format!("{}/{}", waypoint.namespace, waypoint.name);
    let message = match waypoint.programmed {
        Some(true) => return None,
        _ if young => return None,
        Some(false) => format!("not programmed: {}: {}", waypoint.reason, waypoint.message),
        None => "nobody has taken it up".to_owned(),
    };
    let severity = if seen.bound.contains_key(&name) { Severity::Error } else { Severity::Warning };
    let place = object("Gateway", &waypoint.namespace, &waypoint.name);
    let problem = Problem { severity, ..Problem::error(Reason::WaypointNotProgrammed, place, message) };
    let todo = format!("culvert waypoint status -n {} {}", waypoint.namespace, waypoint.name);
    Some(problem.since(waypoint.since.or(waypoint.created)).todo(todo))
}
