//! Controller, lease, root, webhook, and updates under way.

use super::{Problem, Reason, object};
use crate::cluster::reach::Unreached;
use crate::cluster::seen::{OwnPod, Role, Rollout, Said, Seen, age, seconds};

/// A lease that is not renewed for this much longer than it is good for is stale: nobody took it.
const LEASE_MARGIN: i64 = 5;
/// The root must be replaced long before it ends: certificates live shorter, bundles take time.
const ROOT_SOON: i64 = 30 * 86_400;
/// Clocks further apart than this make certificates begin late or end early for a peer.
const SKEW: i64 = 5;

pub(super) fn find(seen: &Seen, found: &mut Vec<Problem>) {
    controllers(seen, found);
    found.extend(lease(seen));
    found.extend(root(seen));
    found.extend(webhook(seen));
    for (kind, name, rollout) in [
        ("Deployment", "culvert-controller", &seen.controller),
        ("DaemonSet", "culvert-agent", &seen.agent),
        ("DaemonSet", "ztunnel", &seen.proxy),
    ] {
        found.extend(rollout.as_ref().and_then(|it| update(&seen.system, kind, name, it)));
    }
    if seen.skew.abs() > SKEW {
        let way = if seen.skew > 0 { "ahead of" } else { "behind" };
        let message = format!("the clock of this machine is {} {way} the API server's", age(seen.skew.abs()));
        let problem = Problem::warning(Reason::ClockSkew, object("Cluster", "", &seen.name), message);
        found.push(problem.todo("set this machine's clock: ages shown by other tools are off by as much"));
    }
}

fn controllers(seen: &Seen, found: &mut Vec<Problem>) {
    let deployment = || object("Deployment", &seen.system, "culvert-controller");
    let Some(rollout) = &seen.controller else {
        let problem = Problem::error(Reason::ControllerNotReady, deployment(), "there is no controller");
        found.push(problem.todo("culvert install brings it back; proxies go on with what they have"));
        return;
    };
    let all: Vec<&OwnPod> = seen.of_role(Role::Controller).collect();
    let ready = all.iter().filter(|own| own.pod.ready).count();
    if ready == 0 {
        let waits = all.iter().find(|own| !own.pod.why.is_empty());
        let why = waits.map(|own| format!(" ({})", own.pod.why)).unwrap_or_default();
        let message =
            format!("none of {} replicas is ready{why}: nothing new reaches proxies", rollout.desired);
        let since = all.iter().filter_map(|own| own.pod.since).max();
        found.push(
            Problem::error(Reason::ControllerNotReady, deployment(), message).since(since).todo(logs(seen)),
        );
    } else {
        found.extend(all.iter().filter(|own| !own.pod.ready).map(|own| not_ready(seen, own)));
    }
    for own in all.iter().filter(|own| own.pod.ready) {
        let Some(Err(why)) = &own.said else { continue };
        // What is forbidden is among what could not be read.
        if matches!(why, Unreached::Forbidden(_)) {
            continue;
        }
        let message = format!("its pages cannot be read: {why}");
        let pod = object("Pod", &seen.system, &own.pod.name);
        found.push(
            Problem::error(Reason::ControllerUnreachable, pod, message).on(&own.pod.node).todo(logs(seen)),
        );
    }
}

fn not_ready(seen: &Seen, own: &OwnPod) -> Problem {
    let why =
        if own.pod.why.is_empty() { "not ready".to_owned() } else { format!("not ready ({})", own.pod.why) };
    Problem::warning(Reason::ControllerNotReady, object("Pod", &seen.system, &own.pod.name), why)
        .on(&own.pod.node)
        .since(own.pod.since)
        .todo(logs(seen))
}

fn logs(seen: &Seen) -> String {
    format!("culvert logs controller, kubectl -n {} describe pods -l app=culvert-controller", seen.system)
}

fn lease(seen: &Seen) -> Option<Problem> {
    // Said of the controllers already if none runs.
    if !seen.of_role(Role::Controller).any(|own| own.pod.ready) || is_unread(seen, "leases") {
        return None;
    }
    let place = object("Lease", &seen.system, "culvert-leader");
    let todo = "statuses, trust bundles and waypoints are not written meanwhile; culvert logs controller";
    let Some(lease) = seen.lease.as_ref().filter(|lease| !lease.holder.is_empty()) else {
        return Some(Problem::error(Reason::NoLeader, place, "no controller leads").todo(todo));
    };
    let silent = lease.renewed.map(|renewed| seconds(renewed, seen.now));
    if silent.is_some_and(|silent| silent <= lease.seconds + LEASE_MARGIN) {
        return None;
    }
    let message = format!("{} does not renew it, and no other controller took it", lease.holder);
    Some(Problem::error(Reason::LeaseStale, place, message).since(lease.renewed).todo(todo))
}

fn root(seen: &Seen) -> Option<Problem> {
    let ends = seen.root?;
    let left = seconds(seen.now, ends);
    let place = object("ConfigMap", &seen.system, "istio-ca-root-cert");
    if left <= 0 {
        let problem = Problem::error(Reason::RootExpired, place, "the mesh's root certificate has expired");
        return Some(problem.since(Some(ends)).todo("replace the root: no certificate is valid any more"));
    }
    (left < ROOT_SOON).then(|| {
        let message = format!("the mesh's root certificate ends in {}", age(left));
        Problem::warning(Reason::RootExpiring, place, message)
            .todo("add the new root to the bundle first, and sign with it once every proxy has it")
    })
}

fn webhook(seen: &Seen) -> Option<Problem> {
    let webhook = seen.webhook.as_ref()?;
    let place = object("ValidatingWebhookConfiguration", "", &webhook.name);
    let todo = "changes of mesh resources are not checked meanwhile, or refused if failurePolicy is Fail; culvert logs controller, or set webhook.enabled=false";
    if !webhook.bundle {
        let message = "it has no caBundle, so the API server cannot call it";
        return Some(Problem::error(Reason::WebhookNotAnswering, place, message).todo(todo));
    }
    let why = webhook.answered.as_ref()?.as_ref().err()?;
    Some(Problem::error(Reason::WebhookNotAnswering, place, why.clone()).todo(todo))
}

fn update(system: &str, kind: &str, name: &str, rollout: &Rollout) -> Option<Problem> {
    (!rollout.observed || rollout.updated < rollout.desired).then(|| {
        let message = format!("being updated: {} of {} pods are new", rollout.updated, rollout.desired);
        Problem::warning(Reason::RollingUpdate, object(kind, system, name), message)
            .todo(format!("wait: kubectl -n {system} rollout status {}/{name}", kind.to_lowercase()))
    })
}

/// A list that could not be had must not look like an empty one.
pub(super) fn is_unread(seen: &Seen, what: &str) -> bool {
    seen.unread.iter().any(|(unread, _)| unread == what)
}

/// The clocks of nodes, as their agents' pages are dated.
pub(super) fn node_clock(own: &OwnPod) -> Option<Problem> {
    let Some(Ok(Said::Agent(Some(skew)))) = own.said else { return None };
    (skew.abs() > SKEW).then(|| {
        let way = if skew > 0 { "ahead of" } else { "behind" };
        let message = format!("its clock is {} {way} the API server's", age(skew.abs()));
        Problem::warning(Reason::ClockSkew, object("Node", "", &own.pod.node), message)
            .on(&own.pod.node)
            .todo("synchronize it: certificates are valid from and until a time")
    })
}
