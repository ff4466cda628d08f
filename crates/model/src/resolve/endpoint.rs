//! One endpoint of a service, and the last step to a workload (Z34, Z35, Z41, Z71-Z73).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::gateway::locate;
use super::{Chooser, NeedsDns, OutboundFacts, Refusal, Resolved, TunnelKind, TunnelRoute, speaks_hbone};
use crate::balance::Candidate;
use crate::outcome::Reason;
use crate::service::{IpFamilies, Service};
use crate::snapshot::{Destination, Snapshot};
use crate::wire::HBONE_PORT;
use crate::workload::{TunnelProtocol, Workload};

impl Chooser<'_> {
    /// One of the service's endpoints, or a refusal: a known address is never passed through (Z35).
    pub(super) fn resolve_endpoint(&mut self, service: &Arc<Service>) -> Result<Resolved, Refusal> {
        let port = self.asked.port();
        let (facts, snapshot, families) = (self.facts, self.snapshot, service.ip_families);
        let picked = self.pick(service, &|workload| {
            let target_port = workload.services.get(&service.key)?.target(port)?;
            let way = Way::to(workload, service, facts, snapshot);
            (way == Way::Open).then_some(target_port)
        });
        let Some(Candidate { workload, target_port }) = picked else {
            return Err(self.nothing_picked(service));
        };
        if workload.network != facts.place.network {
            return self.resolve_other_network(service, service, workload);
        }
        Ok(match choose_address(workload, families, self.asked.ip()) {
            Some(address) => at(workload, Some(service), address, target_port),
            None => Resolved::NeedsDns(NeedsDns {
                hostname: workload.hostname.clone(),
                port: target_port,
                workload: workload.clone(),
                service: Some(service.clone()),
            }),
        })
    }

    /// Says why as precisely as it can.
    fn nothing_picked(&self, service: &Service) -> Refusal {
        let port = self.asked.port();
        let (mut all, mut offering, mut stranded, mut unspeakable) = (0_usize, 0_usize, 0_usize, 0_usize);
        for workload in self.snapshot.endpoints(&service.key) {
            all += 1;
            if workload.services.get(&service.key).is_some_and(|ports| ports.target(port).is_some()) {
                offering += 1;
                let way = Way::to(workload, service, self.facts, self.snapshot);
                stranded += usize::from(way == Way::NoGateway);
                unspeakable += usize::from(way == Way::Unspeakable);
            }
        }
        if offering == 0 && !service.ports.iter().any(|p| p.service_port == port) {
            return Refusal::new(Reason::UnknownPort, format!("{} has no port {port}", service.key));
        }
        if offering > 0 && stranded == offering {
            let detail = format!("every endpoint of {} is on a network without a known gateway", service.key);
            return Refusal::new(Reason::UnknownNetworkGateway, detail);
        }
        if offering > 0 && stranded + unspeakable == offering {
            let detail = format!(
                "every endpoint of {} speaks only the sidecars' own mutual TLS, or is on another network and the \
                 service names no identities that its endpoints there have",
                service.key
            );
            return Refusal::new(Reason::UnsupportedProtocol, detail);
        }
        let failed = self.facts.exclude.len();
        let detail = format!(
            "{} has {all} endpoints, {offering} of them with port {port}, and none that is ready, reachable and \
             not among the {failed} that failed",
            service.key
        );
        Refusal::new(Reason::NoHealthyUpstream, detail)
    }
}

/// Whether there is any way to an endpoint. One without is passed over where another has one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// There is.
    Open,
    /// It has no address of a family that the service uses, and no name.
    NoAddress,
    /// It is on another network, and how to get there is not known (Z40).
    NoGateway,
    /// It speaks a protocol that is not spoken here, or nobody could tell who answers for it behind the gateway.
    Unspeakable,
}

impl Way {
    /// An address of a family the service uses, a name, or its network's gateway (Z73).
    pub fn to(
        workload: &Workload,
        service: &Service,
        facts: &OutboundFacts<'_>,
        snapshot: &Snapshot,
    ) -> Self {
        if workload.network != facts.place.network {
            let gateway = workload.network_gateway.as_deref();
            return match gateway.map(|gateway| locate(snapshot, facts, gateway)) {
                None | Some(Destination::Unknown) => Self::NoGateway,
                Some(_) if service.subject_alt_names.is_empty() => Self::Unspeakable,
                Some(_) => Self::Open,
            };
        }
        if workload.tunnel_protocol == TunnelProtocol::LegacyIstioMtls {
            return Self::Unspeakable;
        }
        let mut addresses = workload.addresses.iter();
        let usable = match workload.addresses.is_empty() {
            true => !workload.hostname.is_empty(),
            false => addresses.any(|address| allowed(service.ip_families, address)),
        };
        if usable { Self::Open } else { Self::NoAddress }
    }

    /// Why it cannot be gone, for people.
    pub fn why_not(self) -> Option<&'static str> {
        match self {
            Self::Open => None,
            Self::NoAddress => Some("no address of a family that the service uses"),
            Self::NoGateway => Some("on a network without a known gateway"),
            Self::Unspeakable => {
                Some("speaks only the sidecars' own mutual TLS, or cannot be told apart behind a gateway")
            }
        }
    }
}

/// The address asked for if the workload has it, else one that the service's families allow, of the family asked for if
/// there is one (Z72).
pub(super) fn choose_address(workload: &Workload, families: IpFamilies, asked: IpAddr) -> Option<IpAddr> {
    if workload.addresses.contains(&asked) {
        return Some(asked);
    }
    let allowed = workload.addresses.iter().filter(|address| allowed(families, address));
    let same = allowed.clone().find(|address| address.is_ipv4() == asked.is_ipv4());
    same.or(allowed.into_iter().next()).copied()
}

fn allowed(families: IpFamilies, address: &IpAddr) -> bool {
    match families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::V4 => address.is_ipv4(),
        IpFamilies::V6 => address.is_ipv6(),
    }
}

/// A sidecar's own protocol is not spoken here, and plain bytes would leave the mesh without its encryption.
pub(super) fn refuse_unspeakable(workload: &Workload) -> Result<(), Refusal> {
    if workload.tunnel_protocol == TunnelProtocol::LegacyIstioMtls {
        let detail = format!("{} speaks only the sidecars' own mutual TLS", workload.uid);
        return Err(Refusal::new(Reason::UnsupportedProtocol, detail));
    }
    Ok(())
}

/// The way to a workload at an address (Z41). A peer at a tunnel's end must be that workload, or one that the service itself
/// names.
pub(super) fn at(
    workload: &Arc<Workload>,
    service: Option<&Arc<Service>>,
    address: IpAddr,
    port: u16,
) -> Resolved {
    let target = SocketAddr::new(address, port);
    let (workload, service) = (workload.clone(), service.cloned());
    if !speaks_hbone(&workload) {
        return Resolved::Plain { destination: target, workload, service };
    }
    let mut expected: SmallVec<[_; 2]> = smallvec![workload.identity.clone()];
    expected.extend(service.iter().flat_map(|service| service.subject_alt_names.iter().cloned()));
    Resolved::Tunnel(TunnelRoute {
        peer: SocketAddr::new(address, HBONE_PORT),
        authority: target.to_string(),
        expected,
        kind: TunnelKind::Direct,
        workload,
        service,
        target,
    })
}
