//! What a waypoint is made of, made and kept by the leader: a Deployment, a Service and a ServiceAccount for each Gateway of our
//! class, an autoscaler and a disruption budget if somebody asks for them (D57 to D65).
//!
//! ```text
//! Gateways (index) ─┐
//! ConfigMaps ───────┼─► keeper (what is wanted, what differs) ──► server-side apply, delete
//! objects of ours ──┘        render, merge: pure
//! ```
//!
//! What it finds out goes into the Gateway's status (`report`), and so does what became of each binding (`bindings`).

use std::sync::Arc;

use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::tasks::Tasks;
use tokio::sync::watch;

use crate::index::Snapshot;
use crate::status::Contribution;
use crate::translate::MeshSettings;
use run::{Provisioner, State};

pub mod bindings;
pub mod keeper;
pub mod merge;
pub mod observed;
pub mod overlay;
pub mod render;
pub mod report;
pub mod run;

/// Starts to provision whenever this replica leads, until `drain` starts. What is to be said of it is for the writer of status.
pub fn start(
    provisioner: Provisioner,
    settings: MeshSettings,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    leading: watch::Receiver<bool>,
    tasks: &Tasks,
    drain: DrainWatcher,
) -> [Contribution; 2] {
    let (state, states) = watch::channel(State::default());
    let (reports, contributions) = bindings::reports();
    let says = bindings::run(reports, settings, snapshots.clone(), states, leading.clone(), drain.clone());
    tasks.spawn("waypoint reports", says);
    tasks.spawn("waypoints", run::run(provisioner, snapshots, leading, state, drain));
    contributions
}
