//! May this connection reach the pod? Decided by [`culvert_model::authorize`] on the port that the pod will see (Z50).

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::authorize::{ConnectionFacts, DryRun, Permit, authorize};
use culvert_model::identity::Identity;
use culvert_model::policy::{Action, PolicyKey};
use culvert_model::workload::Workload;
use smallvec::SmallVec;

use crate::observe::Flow;
use crate::observe::flow::Failure;
use crate::pods::Pod;

/// Decides, and writes what decided into the flow.
pub fn decide(
    pod: &Pod,
    workload: &Arc<Workload>,
    identity: Option<&Identity>,
    source: SocketAddr,
    destination: SocketAddr,
    flow: &mut Flow,
) -> Result<Permit, Failure> {
    let snapshot = pod.shared.state.load();
    let facts = ConnectionFacts { identity, source, destination };
    match authorize(&snapshot, workload, &facts) {
        Ok(permit) => {
            flow.policy = permit.by().cloned();
            flow.dry_run = dry_run(permit.dry_run());
            Ok(permit)
        }
        Err(denial) => {
            flow.policy = denial.policy.clone();
            flow.dry_run = dry_run(&denial.dry_run);
            Err(Failure::new(denial.reason, denial.detail))
        }
    }
}

fn dry_run(outcomes: &[DryRun]) -> SmallVec<[(PolicyKey, &'static str); 1]> {
    let word = |action| match action {
        Action::Allow => "allow",
        Action::Deny => "deny",
    };
    outcomes.iter().map(|outcome| (outcome.policy.clone(), word(outcome.would))).collect()
}
