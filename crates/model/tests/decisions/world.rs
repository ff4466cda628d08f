//! Small worlds, written as a test reads.

use std::net::IpAddr;

use culvert_model::address::{
    GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress, NetworkPrefix,
};
use culvert_model::identity::Identity;
use culvert_model::policy::{Action, Group, Match, Policy, PolicyKey, PolicyScope, Rule};
use culvert_model::service::{IpFamilies, LoadBalancing, Service};
use culvert_model::snapshot::{Snapshot, SnapshotWriter, Update};
use culvert_model::wire::AddressResource;
use culvert_model::workload::*;

/// A healthy HBONE pod `namespace/name` with these addresses; its account is its name.
pub fn workload(namespace: &str, name: &str, addresses: &[&str]) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        identity: Identity::new("cluster.local", namespace, name).unwrap(),
        waypoint: None,
        network_gateway: None,
        node: "node-1".into(),
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        workload_type: WorkloadType::Pod,
        workload_name: name.into(),
        native_tunnel: false,
        application_tunnel: None,
        services: Default::default(),
        authorization_policies: Default::default(),
        health: Health::Healthy,
        cluster_id: "Kubernetes".into(),
        locality: Locality::default(),
        network_mode: NetworkMode::Standard,
        capacity: 1,
        pod: None,
    }
}

/// Makes it an endpoint of `namespace/hostname`, with (service port, target port).
pub fn serve(mut workload: Workload, service: &str, ports: &[(u16, u16)]) -> Workload {
    workload.services.insert(key(service), Ports(ports.iter().map(|p| port(*p)).collect()));
    workload
}

/// A service `namespace/hostname` with these addresses (or blocks) and port 80.
pub fn service(name: &str, addresses: &[&str]) -> Service {
    Service {
        key: key(name),
        name: name.split(['/', '.']).nth(1).unwrap().into(),
        addresses: addresses.iter().map(|a| prefix(a)).collect(),
        ports: [port((80, 8080))].into_iter().collect(),
        subject_alt_names: Default::default(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancing: LoadBalancing::default(),
        ip_families: IpFamilies::Automatic,
        canonical: false,
        ingress_use_waypoint: false,
        namespace_only: false,
    }
}

pub fn port((service_port, target_port): (u16, u16)) -> Port {
    Port { service_port, target_port, app_protocol: AppProtocol::Unknown }
}

pub fn key(name: &str) -> NamespacedHostname {
    let (namespace, hostname) = name.split_once('/').unwrap();
    NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() }
}

pub fn prefix(text: &str) -> NetworkPrefix {
    let prefix = text.parse().unwrap_or_else(|_| text.parse::<IpAddr>().unwrap().into());
    NetworkPrefix { network: "".into(), prefix }
}

pub fn address(text: &str) -> NetworkAddress {
    NetworkAddress { network: "".into(), address: text.parse().unwrap() }
}

/// A gateway by the name of its service, HBONE port 15008.
pub fn by_name(name: &str) -> Box<GatewayAddress> {
    Box::new(GatewayAddress { destination: GatewayDestination::Hostname(key(name)), hbone_port: 15008 })
}

/// A gateway by address, HBONE port 15008.
pub fn by_address(text: &str) -> Box<GatewayAddress> {
    Box::new(GatewayAddress { destination: GatewayDestination::Address(address(text)), hbone_port: 15008 })
}

pub fn policy_key(name: &str) -> PolicyKey {
    let (namespace, name) = name.split_once('/').unwrap();
    PolicyKey { namespace: namespace.into(), name: name.into() }
}

/// A policy whose groups are lists of rules, each a list of matches.
pub fn policy(name: &str, scope: PolicyScope, action: Action, groups: Vec<Vec<Vec<Match>>>) -> Policy {
    let rule = |matches| Rule { matches };
    let groups = groups.into_iter().map(|rules| Group { rules: rules.into_iter().map(rule).collect() });
    Policy {
        key: policy_key(name),
        scope,
        action,
        groups: groups.collect(),
        dry_run: false,
        undecodable: None,
    }
}

#[derive(Default)]
pub struct World {
    update: Update,
}

impl World {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn workload(mut self, workload: Workload) -> Self {
        self.update.addresses.push(AddressResource::Workload(workload));
        self
    }

    pub fn service(mut self, service: Service) -> Self {
        self.update.addresses.push(AddressResource::Service(service));
        self
    }

    pub fn policy(mut self, policy: Policy) -> Self {
        self.update.policies.push(policy);
        self
    }

    pub fn snapshot(self) -> Snapshot {
        SnapshotWriter::new().apply(self.update).snapshot
    }
}
