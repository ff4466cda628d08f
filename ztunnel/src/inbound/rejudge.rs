//! Policy changed: every open inbound connection is judged again, by the same function that let it in (Z67).

use culvert_model::authorize::{ConnectionFacts, authorize};
use culvert_model::outcome::Reason;
use culvert_model::snapshot::Snapshot;

use crate::config::SameNode;
use crate::observe::flow::{Direction, Failure};
use crate::observe::{Connections, Live};
use crate::outbound::unrestricted;
use crate::pods::Shared;

/// Ends the connections that `snapshot` no longer allows; returns how many.
pub fn rejudge(snapshot: &Snapshot, connections: &Connections, same_node: SameNode) -> usize {
    let mut ended = 0;
    for live in connections.all() {
        if let Some(failure) = refused(snapshot, &live, same_node) {
            live.kill(failure);
            ended += 1;
        }
    }
    ended
}

/// Judges a connection once more, now that it is listed: what changed while the pod was being dialled did not see it.
pub fn judge_again(shared: &Shared, live: &Live) {
    if let Some(failure) = refused(&shared.state.load(), live, shared.config.same_node) {
        live.kill(failure);
    }
}

fn refused(snapshot: &Snapshot, live: &Live, same_node: SameNode) -> Option<Failure> {
    if live.facts.direction != Direction::Inbound {
        return None;
    }
    // A pod that the control plane no longer names is stopped by the agent, not by policy.
    let workload = snapshot.workload_by_uid(&live.facts.pod)?;
    let facts = ConnectionFacts {
        identity: live.facts.identity.as_ref(),
        source: live.facts.source,
        destination: live.facts.destination,
    };
    if let Err(denial) = authorize(snapshot, workload, &facts) {
        let policy = denial.policy.as_ref().map(|p| format!(" ({p})")).unwrap_or_default();
        let reason = match denial.reason {
            Reason::AuthorizationPolicy => Reason::AuthorizationPolicyLate,
            other => other,
        };
        return Some(Failure::new(reason, format!("{}{policy}", denial.detail)));
    }
    // Handed over past the interfaces at which the network enforces its own policies: it may go on only while there are none.
    let source = snapshot.workload_by_uid(live.facts.handed_in_by.as_deref()?)?;
    let why = unrestricted(same_node, source, workload).err()?;
    Some(Failure::new(Reason::NetworkPolicy, format!("handed over on this node, and now {why}")))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use culvert_model::policy::{Action, Group, Match, Policy, PolicyKey, PolicyScope, Rule, StringMatch};
    use culvert_model::snapshot::{SnapshotWriter, Update};
    use culvert_model::wire::AddressResource;
    use culvert_model::workload::Workload;

    use super::*;
    use crate::observe::{Flow, Live, Metrics, Observer, Tracked};
    use crate::world::{by_name, identity, workload};

    fn cart() -> Workload {
        workload("shop", "cart", &["100.64.1.9"])
    }

    fn deny(namespace: &str) -> Policy {
        let one = Match { namespaces: vec![StringMatch::Exact(namespace.into())], ..Match::default() };
        Policy {
            key: PolicyKey { namespace: "shop".into(), name: "no".into() },
            scope: PolicyScope::Namespace,
            action: Action::Deny,
            groups: vec![Group { rules: vec![Rule { matches: vec![one] }] }],
            dry_run: false,
            undecodable: None,
        }
    }

    fn snapshot(workload: Option<Workload>, policies: Vec<Policy>) -> Snapshot {
        let addresses = workload.into_iter().map(AddressResource::Workload).collect();
        SnapshotWriter::new().apply(Update { addresses, policies, ..Update::default() }).snapshot
    }

    fn observer() -> Observer {
        let metrics = Metrics::new(&mut prometheus_client::registry::Registry::default());
        Observer { metrics, connections: Arc::new(Connections::default()) }
    }

    /// An open connection of a client in `namespace` with the pod `cart`.
    fn open(observer: &Observer, direction: Direction, namespace: &str) -> (Tracked, Arc<Live>) {
        let ends = ("100.64.2.7:40000".parse().unwrap(), "100.64.1.9:8080".parse().unwrap());
        let mut flow = Flow::new(direction, ends.0, ends.1);
        flow.source.identity = Some(identity(namespace, "client"));
        flow.source.workload = Some(Arc::new(cart()));
        flow.destination.workload = Some(Arc::new(cart()));
        let mut tracked = observer.begin(flow);
        let live = tracked.opened();
        (tracked, live)
    }

    /// Z67: what the policy now refuses ends, with the policy's name; everything else goes on.
    #[test]
    fn only_what_is_refused_ends() {
        let observer = observer();
        let (_a, refused) = open(&observer, Direction::Inbound, "bank");
        let (_b, allowed) = open(&observer, Direction::Inbound, "shop");
        let (_c, outbound) = open(&observer, Direction::Outbound, "bank");
        assert_eq!(rejudge(&snapshot(Some(cart()), vec![]), &observer.connections, SameNode::Auto), 0);
        assert_eq!(
            rejudge(&snapshot(Some(cart()), vec![deny("bank")]), &observer.connections, SameNode::Auto),
            1
        );
        let why = refused.killed_for().expect("ended");
        assert_eq!(why.reason, Reason::AuthorizationPolicyLate);
        assert!(why.detail.contains("shop/no"), "{why}");
        assert!(allowed.killed_for().is_none(), "still allowed");
        assert!(outbound.killed_for().is_none(), "the other end's policy is the other end's to judge");
    }

    /// A policy that cannot be read, or a binding to a waypoint, keeps its own reason.
    #[test]
    fn other_reasons_stay_what_they_are() {
        for (workload, policies, reason) in [
            (
                cart(),
                vec![Policy { undecodable: Some("field 99".into()), ..deny("x") }],
                Reason::PolicyUnavailable,
            ),
            (
                Workload { waypoint: Some(by_name("shop/w.shop.svc.cluster.local")), ..cart() },
                vec![],
                Reason::WaypointRequired,
            ),
        ] {
            let observer = observer();
            let (_held, live) = open(&observer, Direction::Inbound, "shop");
            assert_eq!(
                rejudge(&snapshot(Some(workload), policies), &observer.connections, SameNode::Auto),
                1
            );
            assert_eq!(live.killed_for().map(|f| f.reason), Some(reason));
        }
    }

    /// A pod that the control plane no longer names is the agent's to stop.
    #[test]
    fn a_pod_that_is_no_longer_known_is_left_alone() {
        let observer = observer();
        let (_held, live) = open(&observer, Direction::Inbound, "bank");
        assert_eq!(rejudge(&snapshot(None, vec![deny("bank")]), &observer.connections, SameNode::Auto), 0);
        assert!(live.killed_for().is_none());
    }
}
