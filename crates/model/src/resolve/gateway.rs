//! Waypoints, and the gateways of other networks (Z31-Z33, Z38-Z40, Z44).

use std::net::SocketAddr;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::endpoint::choose_address;
use super::{Chooser, InnerRoute, OutboundFacts, Refusal, Resolved, TunnelKind, TunnelRoute};
use crate::address::{GatewayAddress, GatewayDestination};
use crate::identity::Identity;
use crate::outcome::Reason;
use crate::service::{IpFamilies, Service};
use crate::snapshot::{Destination, Snapshot};
use crate::workload::Workload;

/// What a gateway is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Waypoint,
    NetworkGateway,
}

/// One instance of a gateway.
struct Instance {
    peer: SocketAddr,
    expected: SmallVec<[Identity; 2]>,
    workload: Arc<Workload>,
}

impl Role {
    fn name(self) -> &'static str {
        match self {
            Self::Waypoint => "waypoint",
            Self::NetworkGateway => "gateway",
        }
    }

    fn unknown(self) -> Reason {
        match self {
            Self::Waypoint => Reason::UnknownWaypoint,
            Self::NetworkGateway => Reason::UnknownNetworkGateway,
        }
    }
}

impl<'a> Chooser<'a> {
    /// The waypoint for this connection to a service: by weight where there are several (Z32), otherwise the one. `None`
    /// also where all weights are 0.
    pub(super) fn waypoint_of<'s>(&mut self, service: &'s Service) -> Option<&'s GatewayAddress> {
        if service.weighted_waypoints.is_empty() {
            return service.waypoint.as_deref();
        }
        let total: u64 = service.weighted_waypoints.iter().map(|(_, weight)| u64::from(*weight)).sum();
        if total == 0 {
            return None;
        }
        let point = (self.random)(total);
        let mut passed = 0;
        let chosen = service.weighted_waypoints.iter().find(|(_, weight)| {
            passed += u64::from(*weight);
            point < passed
        });
        chosen.map(|(waypoint, _)| waypoint)
    }

    /// A waypoint's own traffic does not go through it again (Z39): the source is one of its instances.
    pub(super) fn source_is(&self, gateway: &GatewayAddress) -> bool {
        let source = self.facts.source;
        match self.locate(gateway) {
            Destination::Service(service) => source.services.contains_key(&service.key),
            Destination::Workload(workload) => workload.uid == source.uid,
            Destination::Unknown => false,
        }
    }

    /// A tunnel to one instance of a waypoint, which is asked for what the application asked for (Z31, Z33). A service's
    /// waypoint that has instances on other networks only is reached through the gateway there, by the service's name.
    pub(super) fn resolve_waypoint(
        &mut self,
        waypoint: &GatewayAddress,
        kind: TunnelKind,
        service: Option<&Arc<Service>>,
    ) -> Result<Resolved, Refusal> {
        if let (Some(service), Some((behind, far))) = (service, self.far_waypoint(waypoint)) {
            return self.resolve_other_network(service, behind, far);
        }
        let Instance { peer, expected, workload } = self.instance(waypoint, Role::Waypoint)?;
        if workload.network != self.facts.place.network {
            let detail = format!("waypoint {} is on another network, which is not supported", workload.uid);
            return Err(Refusal::new(Reason::UnsupportedProtocol, detail));
        }
        Ok(Resolved::Tunnel(TunnelRoute {
            peer,
            authority: self.asked.to_string(),
            expected,
            kind,
            workload,
            service: service.cloned(),
            target: self.asked,
        }))
    }

    /// A waypoint's service and one of its instances on another network, if none is on ours.
    fn far_waypoint(&mut self, waypoint: &GatewayAddress) -> Option<(&'a Arc<Service>, &'a Arc<Workload>)> {
        let Destination::Service(service) = self.locate(waypoint) else { return None };
        let home = &self.facts.place.network;
        if self.snapshot.endpoints(&service.key).any(|workload| workload.network == *home) {
            return None;
        }
        let port = waypoint.hbone_port;
        let picked = self.pick(service, &|workload| workload.network_gateway.is_some().then_some(port))?;
        Some((service, picked.workload))
    }

    /// A tunnel through the gateway of the endpoint's network, and in it one to the service there (Z26, Z40). What answers
    /// is an endpoint of `behind`: the service itself, or its waypoint's.
    pub(super) fn resolve_other_network(
        &mut self,
        service: &Arc<Service>,
        behind: &Arc<Service>,
        endpoint: &Arc<Workload>,
    ) -> Result<Resolved, Refusal> {
        let Some(gateway) = &endpoint.network_gateway else {
            let detail = format!("network {:?} of {} has no known gateway", endpoint.network, endpoint.uid);
            return Err(Refusal::new(Reason::UnknownNetworkGateway, detail));
        };
        // The gateway there may choose any endpoint, so only what the service as a whole is known by can be expected.
        let inner: SmallVec<[Identity; 2]> = behind.subject_alt_names.iter().cloned().collect();
        if inner.is_empty() {
            let detail =
                format!("{} names no identities that its endpoints on other networks have", behind.key);
            return Err(Refusal::new(Reason::UnsupportedProtocol, detail));
        }
        let Instance { peer, expected, workload } = self.instance(gateway, Role::NetworkGateway)?;
        let authority = format!("{}:{}", service.key.hostname, self.asked.port());
        Ok(Resolved::Tunnel(TunnelRoute {
            peer,
            authority: authority.clone(),
            expected,
            kind: TunnelKind::Gateway(InnerRoute { authority, expected: inner }),
            workload,
            service: Some(service.clone()),
            target: self.asked,
        }))
    }

    fn locate(&self, gateway: &GatewayAddress) -> Destination<'a> {
        locate(self.snapshot, self.facts, gateway)
    }

    /// Chooses one instance that is not excluded.
    fn instance(&mut self, gateway: &GatewayAddress, role: Role) -> Result<Instance, Refusal> {
        match self.locate(gateway) {
            Destination::Service(service) => self.instance_of(service, gateway, role),
            Destination::Workload(workload) => {
                if self.facts.exclude.contains(&workload.uid) {
                    let detail = format!("{} {} failed", role.name(), workload.uid);
                    return Err(Refusal::new(Reason::NoHealthyUpstream, detail));
                }
                self.instance_at(workload, None, gateway.hbone_port, role)
            }
            Destination::Unknown => {
                let detail = format!("{} {} is not known", role.name(), written(gateway));
                Err(Refusal::new(role.unknown(), detail))
            }
        }
    }

    fn instance_of(
        &mut self,
        service: &Arc<Service>,
        gateway: &GatewayAddress,
        role: Role,
    ) -> Result<Instance, Refusal> {
        let home = &self.facts.place.network;
        let picked = self.pick(service, &|workload| {
            let ports = workload.services.get(&service.key)?;
            let near = role == Role::NetworkGateway || workload.network == *home;
            let fit = near && !workload.addresses.is_empty();
            fit.then(|| ports.target(gateway.hbone_port).unwrap_or(gateway.hbone_port))
        });
        let Some(picked) = picked else {
            let role = role.name();
            let detail =
                format!("{role} {} has no instance that is ready, near and did not fail", service.key);
            return Err(Refusal::new(Reason::NoHealthyUpstream, detail));
        };
        self.instance_at(picked.workload, Some(service), picked.target_port, role)
    }

    fn instance_at(
        &self,
        workload: &Arc<Workload>,
        service: Option<&Arc<Service>>,
        port: u16,
        role: Role,
    ) -> Result<Instance, Refusal> {
        let families = service.map_or(IpFamilies::Automatic, |service| service.ip_families);
        let Some(address) = choose_address(workload, families, self.asked.ip()) else {
            let detail = format!("{} {} has no usable address", role.name(), workload.uid);
            return Err(Refusal::new(role.unknown(), detail));
        };
        let mut expected: SmallVec<[Identity; 2]> = smallvec![workload.identity.clone()];
        expected.extend(service.iter().flat_map(|service| service.subject_alt_names.iter().cloned()));
        Ok(Instance { peer: SocketAddr::new(address, port), expected, workload: workload.clone() })
    }
}

/// What a gateway's address means. The control plane named it, so by name it is found even where the client could not see it.
pub(super) fn locate<'a>(
    snapshot: &'a Snapshot,
    facts: &OutboundFacts<'_>,
    gateway: &GatewayAddress,
) -> Destination<'a> {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => {
            snapshot.service_by_key(key).map_or(Destination::Unknown, Destination::Service)
        }
        GatewayDestination::Address(address) => snapshot.destination(address, &facts.source.namespace),
    }
}

pub(super) fn written(gateway: &GatewayAddress) -> String {
    match &gateway.destination {
        GatewayDestination::Hostname(key) => key.to_string(),
        GatewayDestination::Address(address) => {
            format!("{} on network {:?}", address.address, address.network)
        }
    }
}
