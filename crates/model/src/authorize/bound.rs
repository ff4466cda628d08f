//! A bound workload accepts only its waypoints, on HBONE and plaintext alike (design.md): whoever came by another way came
//! past the policies that the waypoint enforces. Istio's tunnel checks nothing here (Z52).
//!
//! "Bound" is what the workload itself names ([`Workload::waypoint`], traffic addressed to workloads); a service's waypoint
//! binds those who use the service's address, not its pods.

use std::sync::Arc;

use crate::address::{GatewayAddress, GatewayDestination};
use crate::identity::Identity;
use crate::snapshot::{Destination, Snapshot};
use crate::workload::Workload;

/// Why somebody who proved to be `identity` may not reach `destination` directly; `None` if they may. A waypoint that is
/// not known lets nobody in. Any workload with a waypoint's account counts as the waypoint.
pub(super) fn refusal(
    snapshot: &Snapshot,
    destination: &Workload,
    identity: Option<&Identity>,
) -> Option<String> {
    let waypoint = destination.waypoint.as_deref()?;
    let mut instances = 0_usize;
    for instance in instances_of(snapshot, waypoint, &destination.namespace) {
        // A waypoint is not bound to itself, or nothing could ever reach it.
        if instance.uid == destination.uid || Some(&instance.identity) == identity {
            return None;
        }
        instances += 1;
    }
    let name = match &waypoint.destination {
        GatewayDestination::Hostname(key) => key.to_string(),
        GatewayDestination::Address(address) => address.address.to_string(),
    };
    let who = identity.map_or_else(|| "a peer without identity".to_owned(), Identity::principal);
    let uid = &destination.uid;
    Some(match instances {
        0 => format!("{uid} accepts only its waypoint {name}, which has no instance that is known"),
        _ => format!("{uid} accepts only its waypoint {name}, which {who} is not"),
    })
}

/// The workloads that a gateway's address stands for, ready or not: one that is ending still has streams to finish.
fn instances_of<'a>(
    snapshot: &'a Snapshot,
    gateway: &'a GatewayAddress,
    namespace: &str,
) -> impl Iterator<Item = &'a Arc<Workload>> {
    let (workload, service) = match &gateway.destination {
        GatewayDestination::Hostname(key) => (None, Some(key)),
        GatewayDestination::Address(address) => match snapshot.destination(address, namespace) {
            Destination::Workload(workload) => (Some(workload), None),
            Destination::Service(service) => (None, Some(&service.key)),
            Destination::Unknown => (None, None),
        },
    };
    workload.into_iter().chain(service.into_iter().flat_map(|key| snapshot.endpoints(key)))
}
