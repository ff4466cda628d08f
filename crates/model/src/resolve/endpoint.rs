//! One endpoint of a service, and the last step to a workload (Z34, Z35, Z41, Z71-Z73).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::{Chooser, NeedsDns, Refusal, Resolved, TunnelKind, TunnelRoute, speaks_hbone};
use crate::balance::{Candidate, pick};
use crate::outcome::Reason;
use crate::service::{IpFamilies, Service};
use crate::wire::HBONE_PORT;
use crate::workload::{TunnelProtocol, Workload};

impl Chooser<'_> {
    /// One of the service's endpoints, or a refusal: a known address is never passed through (Z35).
    pub(super) fn resolve_endpoint(&mut self, service: &Arc<Service>) -> Result<Resolved, Refusal> {
        let port = self.asked.port();
        let (facts, families) = (self.facts, service.ip_families);
        let candidates = self.snapshot.endpoints(&service.key).filter_map(|workload| {
            let target_port = workload.services.get(&service.key)?.target(port)?;
            let fit = !facts.exclude.contains(&workload.uid) && reachable(workload, families, facts.place);
            fit.then_some(Candidate { workload, target_port })
        });
        let picked = pick(candidates, &service.load_balancing, facts.place, self.load, self.random);
        let Some(Candidate { workload, target_port }) = picked else {
            return Err(self.nothing_picked(service));
        };
        if workload.network != facts.place.network {
            return self.resolve_other_network(service, service, workload);
        }
        refuse_unspeakable(workload)?;
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
        let (mut all, mut offering, mut stranded) = (0_usize, 0_usize, 0_usize);
        for workload in self.snapshot.endpoints(&service.key) {
            all += 1;
            if workload.services.get(&service.key).is_some_and(|ports| ports.target(port).is_some()) {
                offering += 1;
                let away = workload.network != self.facts.place.network && workload.network_gateway.is_none();
                stranded += usize::from(away);
            }
        }
        if offering == 0 && !service.ports.iter().any(|p| p.service_port == port) {
            return Refusal::new(Reason::UnknownPort, format!("{} has no port {port}", service.key));
        }
        if offering > 0 && stranded == offering {
            let detail = format!("every endpoint of {} is on a network without a known gateway", service.key);
            return Refusal::new(Reason::UnknownNetworkGateway, detail);
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

/// Whether there is any way to it: an address of a family the service uses, a name, or its network's gateway (Z73).
fn reachable(workload: &Workload, families: IpFamilies, place: &crate::balance::Place) -> bool {
    if workload.network != place.network {
        return workload.network_gateway.is_some();
    }
    if workload.addresses.is_empty() {
        return !workload.hostname.is_empty();
    }
    workload.addresses.iter().any(|address| allowed(families, address))
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
