//! The rows, as sentences over lists: all ways that a connection may take.

use std::net::{IpAddr, SocketAddr};

use culvert_model::address::{GatewayAddress, GatewayDestination};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::service::{IpFamilies, LoadBalancingMode, Service};
use culvert_model::workload::{Health, NetworkMode, TunnelProtocol, Workload};

use super::{Case, OWN_PORTS, Way};

impl Case {
    pub fn ways(&self) -> Vec<Way> {
        let ip = self.to.ip();
        // Z29
        let own = ip.is_loopback() || ip.is_unspecified() || self.source.addresses.contains(&ip);
        if own && OWN_PORTS.contains(&self.to.port()) {
            return vec![Way::Refused(Reason::SelfCall)];
        }
        // An exact address of a service that the source may see, then a workload's, then a block's, then nobody's.
        let visible = |s: &&Service| !s.namespace_only || s.key.namespace == self.source.namespace;
        let covers = |s: &&Service, exact: bool| {
            s.addresses.iter().any(|a| {
                let whole = a.prefix.prefix_len() == a.prefix.max_prefix_len();
                whole == exact && a.prefix.contains(&ip) && self.source.network.is_empty()
            })
        };
        let at = |exact| self.services.iter().filter(visible).find(|s| covers(s, exact));
        match (at(true), self.workload_at(ip), at(false)) {
            (Some(service), ..) => self.to_service(service),
            (None, Some(workload), _) => self.to_workload(workload, true),
            (None, None, Some(service)) => self.to_service(service),
            (None, None, None) => vec![Way::Passthrough(self.to)],
        }
    }

    /// TRAP16: a host-network pod is not found by its node's address.
    fn workload_at(&self, ip: IpAddr) -> Option<&Workload> {
        let mut all = self.workloads.iter().chain([&self.source]);
        all.find(|w| {
            w.network_mode == NetworkMode::Standard
                && w.addresses.contains(&ip)
                && w.network == self.source.network
        })
    }

    /// Z31, Z34-Z36, Z39.
    fn to_service(&self, service: &Service) -> Vec<Way> {
        if let Some(waypoint) = service.waypoint.as_ref().filter(|w| !self.is_instance(w)) {
            return self.through(waypoint, "service waypoint");
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return match self.workload_at(self.to.ip()) {
                Some(workload) => self.to_workload(workload, false),
                None => vec![Way::Passthrough(self.to)],
            };
        }
        self.to_endpoints(service)
    }

    /// Z38, TRAP11.
    fn to_workload(&self, workload: &Workload, bound: bool) -> Vec<Way> {
        if let Some(waypoint) = workload.waypoint.as_ref().filter(|w| bound && !self.is_instance(w)) {
            return self.through(waypoint, "workload waypoint");
        }
        if self.failed.contains(&workload.uid) {
            return vec![Way::Refused(Reason::NoHealthyUpstream)];
        }
        vec![arrive(workload, &[], self.to.ip(), self.to.port())]
    }

    fn name_of<'a>(&'a self, gateway: &'a GatewayAddress) -> Option<&'a Service> {
        match &gateway.destination {
            GatewayDestination::Hostname(name) => self.services.iter().find(|s| s.key == *name),
            GatewayDestination::Address(address) => {
                self.services.iter().find(|s| s.addresses.iter().any(|a| a.prefix.addr() == address.address))
            }
        }
    }

    /// Z39: the source is an instance of it.
    fn is_instance(&self, gateway: &GatewayAddress) -> bool {
        self.name_of(gateway).is_some_and(|s| self.source.services.contains_key(&s.key))
    }

    /// Z31, Z33, Z44: to any instance that is ready.
    fn through(&self, gateway: &GatewayAddress, kind: &'static str) -> Vec<Way> {
        let Some(service) = self.name_of(gateway) else {
            return vec![Way::Refused(Reason::UnknownWaypoint)];
        };
        let instances = self.workloads.iter().chain([&self.source]).filter(|w| {
            w.services.contains_key(&service.key)
                && w.health == Health::Healthy
                && !self.failed.contains(&w.uid)
                && w.network == self.source.network
        });
        let ways: Vec<Way> = instances
            .map(|w| Way::Tunnel {
                kind,
                peer: SocketAddr::new(w.addresses[0], 15008),
                authority: self.to.to_string(),
                expected: vec![w.identity.clone()],
                to: w.uid.clone(),
            })
            .collect();
        if ways.is_empty() { vec![Way::Refused(Reason::NoHealthyUpstream)] } else { ways }
    }

    /// Z34, Z35, Z40, Z68-Z73.
    fn to_endpoints(&self, service: &Service) -> Vec<Way> {
        let asked = self.to.port();
        let target = |w: &Workload| w.services.get(&service.key).and_then(|ports| ports.target(asked));
        let offering: Vec<&Workload> =
            self.workloads.iter().chain([&self.source]).filter(|w| target(w).is_some()).collect();
        let far = |w: &Workload| w.network != self.source.network;
        let lost = |w: &Workload| far(w) && w.network_gateway.is_none();
        let mute = |w: &Workload| {
            if far(w) {
                !lost(w) && service.subject_alt_names.is_empty()
            } else {
                w.tunnel_protocol == TunnelProtocol::LegacyIstioMtls
            }
        };
        let addressed = |w: &Workload| {
            if w.addresses.is_empty() {
                !w.hostname.is_empty()
            } else {
                w.addresses.iter().any(|a| family_fits(service, *a))
            }
        };
        let usable = |w: &&Workload| {
            let ready = service.load_balancing.allow_unhealthy || w.health == Health::Healthy;
            let there = if far(w) { !lost(w) } else { addressed(w) };
            ready && there && !mute(w) && w.capacity > 0 && !self.failed.contains(&w.uid)
        };
        let group = self.best(service, offering.iter().copied().filter(usable).collect());
        if !group.is_empty() {
            return group.into_iter().map(|w| self.to_endpoint(service, w, target(w).unwrap())).collect();
        }
        let count = |test: &dyn Fn(&Workload) -> bool| offering.iter().filter(|w| test(w)).count();
        let (lost, mute) = (count(&lost), count(&mute));
        vec![Way::Refused(match offering.len() {
            0 if service.ports.iter().all(|p| p.service_port != asked) => Reason::UnknownPort,
            n if n > 0 && lost == n => Reason::UnknownNetworkGateway,
            n if n > 0 && lost + mute == n => Reason::UnsupportedProtocol,
            _ => Reason::NoHealthyUpstream,
        })]
    }

    /// Z69, with the one scope that these worlds have: the node.
    fn best<'a>(&self, service: &Service, usable: Vec<&'a Workload>) -> Vec<&'a Workload> {
        let near = |w: &&&Workload| w.node == self.source.node;
        let on_node: Vec<_> = usable.iter().filter(near).copied().collect();
        match service.load_balancing.mode {
            LoadBalancingMode::Strict => on_node,
            LoadBalancingMode::Failover if !on_node.is_empty() => on_node,
            _ => usable,
        }
    }

    fn to_endpoint(&self, service: &Service, w: &Workload, port: u16) -> Way {
        if w.network != self.source.network {
            let gateway = self.workloads.iter().find(|w| &*w.name == "gateway").unwrap();
            return Way::Tunnel {
                kind: "gateway",
                peer: SocketAddr::new(gateway.addresses[0], 15008),
                authority: format!("{}:{}", service.key.hostname, self.to.port()),
                expected: vec![gateway.identity.clone()],
                to: gateway.uid.clone(),
            };
        }
        // Z72
        let fits = || w.addresses.iter().copied().filter(|a| family_fits(service, *a));
        let address = w
            .addresses
            .iter()
            .copied()
            .find(|a| *a == self.to.ip())
            .or_else(|| fits().find(|a| a.is_ipv4() == self.to.is_ipv4()))
            .or_else(|| fits().next());
        match address {
            Some(address) => arrive(w, &service.subject_alt_names, address, port),
            None => Way::LookUp(w.uid.clone(), port),
        }
    }
}

fn family_fits(service: &Service, address: IpAddr) -> bool {
    match service.ip_families {
        IpFamilies::V4 => address.is_ipv4(),
        IpFamilies::V6 => address.is_ipv6(),
        IpFamilies::Automatic | IpFamilies::Dual => true,
    }
}

/// Z41.
fn arrive(w: &Workload, also: &[Identity], address: IpAddr, port: u16) -> Way {
    let target = SocketAddr::new(address, port);
    match w.tunnel_protocol {
        TunnelProtocol::None => Way::Plain(target, w.uid.clone()),
        TunnelProtocol::LegacyIstioMtls => Way::Refused(Reason::UnsupportedProtocol),
        TunnelProtocol::Hbone => Way::Tunnel {
            kind: "direct",
            peer: SocketAddr::new(address, 15008),
            authority: target.to_string(),
            expected: std::iter::once(&w.identity).chain(also).cloned().collect(),
            to: w.uid.clone(),
        },
    }
}
