//! Small worlds for this crate's tests.

use std::sync::Arc;

use culvert_model::address::{GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress};
use culvert_model::identity::Identity;
use culvert_model::service::{IpFamilies, LoadBalancing, Service};
use culvert_model::snapshot::{Snapshot, SnapshotWriter, Update};
use culvert_model::wire::AddressResource;
use culvert_model::workload::{
    AppProtocol, Health, Locality, NetworkMode, Port, Ports, TunnelProtocol, Workload, WorkloadType,
};

/// `cluster.local/ns/<namespace>/sa/<account>`.
pub fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

/// A healthy HBONE pod `namespace/name`; its account is its name.
pub fn workload(namespace: &str, name: &str, addresses: &[&str]) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        identity: identity(namespace, name),
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

/// A service `namespace/hostname` with these addresses and port 80.
pub fn service(name: &str, addresses: &[&str]) -> Service {
    let prefix = |text: &&str| culvert_model::address::NetworkPrefix {
        network: "".into(),
        prefix: text.parse::<std::net::IpAddr>().unwrap().into(),
    };
    Service {
        key: key(name),
        name: name.split(['/', '.']).nth(1).unwrap().into(),
        addresses: addresses.iter().map(prefix).collect(),
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

/// A gateway by the name of its service.
pub fn by_name(name: &str) -> Box<GatewayAddress> {
    Box::new(GatewayAddress { destination: GatewayDestination::Hostname(key(name)), hbone_port: 15008 })
}

/// A gateway by address.
pub fn by_address(text: &str) -> Box<GatewayAddress> {
    let address = NetworkAddress { network: "".into(), address: text.parse().unwrap() };
    Box::new(GatewayAddress { destination: GatewayDestination::Address(address), hbone_port: 15008 })
}

/// What the proxy knows.
pub fn snapshot(
    workloads: impl IntoIterator<Item = Workload>,
    services: impl IntoIterator<Item = Service>,
) -> Arc<Snapshot> {
    let services = services.into_iter().map(AddressResource::Service);
    let addresses = services.chain(workloads.into_iter().map(AddressResource::Workload)).collect();
    Arc::new(SnapshotWriter::new().apply(Update { addresses, ..Update::default() }).snapshot)
}

fn key(name: &str) -> NamespacedHostname {
    let (namespace, hostname) = name.split_once('/').unwrap();
    NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() }
}

fn port((service_port, target_port): (u16, u16)) -> Port {
    Port { service_port, target_port, app_protocol: AppProtocol::Unknown }
}
