//! What happened to each request and stream: one record each, and its projections (access log, metrics).

pub mod labels;
pub mod metrics;
pub mod request;
pub mod stream;

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::identity::Identity;
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::Workload;

use crate::accept::Peer;
use crate::shared::{Failure, Shared};

pub use metrics::Metrics;
pub use request::Exchange;

/// A connection or tunnel that was refused before anything was decided on: one line, and a counter.
pub fn refused(metrics: &Metrics, from: SocketAddr, who: Option<&Identity>, asked: &str, failure: &Failure) {
    metrics.refused(failure.reason);
    tracing::warn!(
        target: "access",
        direction = "waypoint",
        src.addr = %from,
        src.identity = who.map(tracing::field::display),
        dst.asked = asked,
        reason = failure.reason.as_str(),
        blame = ?failure.reason.blame(),
        error = %failure.detail,
        "tunnel refused"
    );
}

/// The workload that a peer is: the one at its address, if that has the identity that the peer proved. For telemetry only.
pub fn source(shared: &Shared, snapshot: &Snapshot, peer: &Peer) -> Option<Arc<Workload>> {
    let address = culvert_model::address::NetworkAddress {
        network: shared.place.network.clone(),
        address: peer.address.ip(),
    };
    snapshot.workload_by_address(&address).filter(|it| it.identity == peer.facts.identity).cloned()
}
