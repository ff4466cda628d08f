//! What a CONNECT request's authority means for the pod it arrived at (Z47-Z49). Pure.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_hbone::server::split_authority;
use culvert_model::address::{GatewayAddress, GatewayDestination, NetworkAddress};
use culvert_model::outcome::Reason;
use culvert_model::service::Service;
use culvert_model::snapshot::{Destination, Snapshot};
use culvert_model::workload::Workload;

use crate::config::OWN_PORTS;
use crate::observe::flow::Failure;

/// Where a stream goes inside the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// An address of the pod and the port to connect to there; what policy judges (Z50).
    pub address: SocketAddr,
    /// The service that was asked for by name.
    pub service: Option<Arc<Service>>,
    /// The pod wants a PROXY protocol header first, which names this as the destination (Z53).
    pub proxied: Option<SocketAddr>,
}

/// Reads `authority` as a request to the pod of `workload`, whose HBONE address is `local`.
///
/// The pod is meant by one of its own addresses; by the name of a service that it is an endpoint of, whose port becomes the
/// pod's own (Z48); or, where it is a waypoint, by whatever names it as its waypoint, or anything if it takes PROXY
/// protocol (Z47). Whatever was asked, the connection is to the pod itself.
///
/// # Errors
/// The failure to answer 400 with (Z20).
pub fn target(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    authority: &str,
) -> Result<Target, Failure> {
    let (host, port) = split_authority(authority).ok_or_else(|| {
        Failure::new(Reason::BadRequest, format!("authority {authority:?} is not host:port"))
    })?;
    let (address, service, asked) = match host.parse::<IpAddr>() {
        Ok(ip) => {
            let asked = SocketAddr::new(ip.to_canonical(), port);
            (at_address(snapshot, workload, local, asked)?, None, asked)
        }
        Err(_) => {
            let (address, service) = by_name(snapshot, workload, local, host, port)?;
            (address, Some(service), address)
        }
    };
    if OWN_PORTS.contains(&address.port()) {
        return Err(own_port(address.port()));
    }
    let Some(tunnel) = workload.application_tunnel else {
        return Ok(Target { address, service, proxied: None });
    };
    let handed_to = if tunnel.port == 0 { address.port() } else { tunnel.port };
    if OWN_PORTS.contains(&handed_to) {
        return Err(own_port(handed_to));
    }
    let address = SocketAddr::new(local, handed_to);
    Ok(Target { address, service, proxied: tunnel.proxy_protocol.then_some(asked) })
}

fn at_address(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    asked: SocketAddr,
) -> Result<SocketAddr, Failure> {
    if asked.ip() == local || workload.addresses.contains(&asked.ip()) {
        return Ok(asked);
    }
    let address = NetworkAddress { network: workload.network.clone(), address: asked.ip() };
    let bound_here = match snapshot.destination(&address, &workload.namespace) {
        Destination::Service(service) => serves_for(snapshot, workload, service),
        Destination::Workload(other) => {
            other.waypoint.as_ref().is_some_and(|gateway| stands_behind(snapshot, workload, gateway))
        }
        Destination::Unknown => false,
    };
    if bound_here || workload.application_tunnel.is_some() {
        return Ok(SocketAddr::new(local, asked.port()));
    }
    let detail =
        format!("{} is not an address of this pod ({local}), nor one it is the waypoint of", asked.ip());
    Err(Failure::new(Reason::WrongDestination, detail))
}

fn by_name(
    snapshot: &Snapshot,
    workload: &Workload,
    local: IpAddr,
    host: &str,
    port: u16,
) -> Result<(SocketAddr, Arc<Service>), Failure> {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let named = snapshot.services_named(&host);
    if named.is_empty() {
        return Err(Failure::new(Reason::WrongDestination, format!("{host} is no service that we know")));
    }
    if let Some(service) = named.iter().find(|service| workload.services.contains_key(&service.key)) {
        let target = workload.services.get(&service.key).and_then(|ports| ports.target(port));
        let target =
            target.ok_or_else(|| Failure::new(Reason::UnknownPort, format!("{host} has no port {port}")))?;
        return Ok((SocketAddr::new(local, target), service.clone()));
    }
    let proxied = workload.application_tunnel.is_some();
    match named.iter().find(|service| proxied || serves_for(snapshot, workload, service)) {
        Some(service) => Ok((SocketAddr::new(local, port), service.clone())),
        None => {
            let detail = format!("this pod is no endpoint of {host}, nor its waypoint");
            Err(Failure::new(Reason::WrongDestination, detail))
        }
    }
}

/// Whether the workload is a waypoint of the service.
fn serves_for(snapshot: &Snapshot, workload: &Workload, service: &Service) -> bool {
    let weighted = service.weighted_waypoints.iter().map(|(gateway, _)| gateway);
    service
        .waypoint
        .as_deref()
        .into_iter()
        .chain(weighted)
        .any(|gateway| stands_behind(snapshot, workload, gateway))
}

/// Whether the workload is what a gateway's address leads to.
fn stands_behind(snapshot: &Snapshot, workload: &Workload, gateway: &GatewayAddress) -> bool {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => workload.services.contains_key(key),
        GatewayDestination::Address(address) => match snapshot.destination(address, &workload.namespace) {
            Destination::Workload(named) => named.uid == workload.uid,
            Destination::Service(service) => workload.services.contains_key(&service.key),
            Destination::Unknown => false,
        },
    }
}

fn own_port(port: u16) -> Failure {
    Failure::new(Reason::SelfCall, format!("port {port} belongs to the proxy"))
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
