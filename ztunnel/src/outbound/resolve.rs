//! The decision, taken from one snapshot by [`culvert_model::resolve`], and written into the flow.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::Str;
use culvert_model::balance::Place;
use culvert_model::resolve::{OutboundFacts, Resolved, resolve};
use culvert_model::workload::Workload;

use crate::config::OWN_PORTS;
use crate::observe::Flow;
use crate::observe::flow::Failure;
use crate::pods::Pod;

/// Where the connection goes; `failed` are endpoints that could not be reached a moment ago.
pub fn decide(
    pod: &Pod,
    source: &Arc<Workload>,
    destination: SocketAddr,
    failed: &[Str],
    flow: &mut Flow,
) -> Result<Resolved, Failure> {
    let snapshot = pod.shared.state.load();
    let place = Place {
        network: source.network.clone(),
        locality: source.locality.clone(),
        node: source.node.clone(),
        cluster: source.cluster_id.clone(),
    };
    let facts = OutboundFacts {
        source,
        client: flow.source.address.ip(),
        original_destination: destination,
        place: &place,
        own_ports: &OWN_PORTS,
        exclude: failed,
    };
    let seen = &*pod.shared.endpoints;
    let resolved = resolve(&snapshot, &facts, seen, &mut |bound| fastrand::u64(..bound.max(1)))
        .map_err(|refusal| Failure::new(refusal.reason, refusal.detail))?;
    match &resolved {
        Resolved::Passthrough { .. } => {}
        Resolved::NeedsDns(needed) => {
            flow.destination.workload = Some(needed.workload.clone());
            flow.service = needed.service.clone();
        }
        Resolved::Plain { workload, service, .. } => {
            flow.destination.workload = Some(workload.clone());
            flow.service = service.clone();
        }
        Resolved::Tunnel(route) => {
            flow.destination.workload = Some(route.workload.clone());
            flow.service = route.service.clone();
            flow.tunnel = Some(route.peer);
        }
    }
    Ok(resolved)
}
