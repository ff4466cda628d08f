//! Policy changed: every open inbound connection is judged again, by the same function that let it in (Z67).

use culvert_model::authorize::{ConnectionFacts, authorize};
use culvert_model::outcome::Reason;
use culvert_model::snapshot::Snapshot;

use crate::observe::Connections;
use crate::observe::flow::{Direction, Failure};

/// Ends the connections that `snapshot` no longer allows; returns how many.
pub fn rejudge(snapshot: &Snapshot, connections: &Connections) -> usize {
    let mut ended = 0;
    for live in connections.all() {
        if live.facts.direction != Direction::Inbound {
            continue;
        }
        // A pod that the control plane no longer names is stopped by the agent, not by policy.
        let Some(workload) = snapshot.workload_by_uid(&live.facts.pod) else { continue };
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
            live.kill(Failure::new(reason, format!("{}{policy}", denial.detail)));
            ended += 1;
        }
    }
    ended
}
