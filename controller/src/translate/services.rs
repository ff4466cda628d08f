//! Service to `istio.workload.Service` (D02, D24, D25).

use std::net::IpAddr;

use culvert_k8s_api::core::{InternalTrafficPolicy, IpFamily, Protocol, Service, ServiceType};
use culvert_k8s_api::labels;
use culvert_k8s_api::values::IntOrString;
use culvert_model::service::Affinity;
use culvert_model::wire::service::encode_affinity;
use culvert_proto::workload as proto;
use culvert_proto::workload::load_balancing::{HealthPolicy, Mode, Scope};

use super::Translation;
use super::endpoints::{Targets, app_protocol};
use super::entries::Hosts;
use super::view::View;
use super::waypoints::{Asks, Traffic};

/// Everything that selects workloads.
pub(super) fn targets<'a>(view: &View<'a>, entries: &Hosts<'a>) -> Targets<'a> {
    let mut targets = Targets::default();
    for ((namespace, name), service) in &view.services {
        if service.spec.type_ != ServiceType::ExternalName {
            let key = format!("{namespace}/{}", view.service_host(namespace, name));
            targets.add_service(namespace, key, service);
        }
    }
    for entry in view.service_entries.values() {
        if let Some(selector) = &entry.spec.workload_selector {
            targets.add_entry(entry, &selector.labels, entries.keys_of(entry));
        }
    }
    targets
}

/// Converts every service.
pub(super) fn convert_all(view: &View<'_>, out: &mut Translation) {
    for ((namespace, name), service) in &view.services {
        if service.spec.type_ == ServiceType::ExternalName {
            out.notes.push(format!("Service {namespace}/{name}: ExternalName is left to DNS"));
            continue;
        }
        let addresses = addresses(view, service);
        if addresses.is_empty() && !service.is_headless() {
            // Without an address it would look headless, and names would be answered with its endpoints.
            out.notes.push(format!("Service {namespace}/{name}: has no address yet, so it is not sent"));
            continue;
        }
        let hostname = view.service_host(namespace, name);
        let key = format!("{namespace}/{hostname}");
        let message = convert(view, service, hostname, &addresses);
        out.insert(key, proto::address::Type::Service(message));
    }
}

fn addresses(view: &View<'_>, service: &Service) -> Vec<IpAddr> {
    if service.is_headless() {
        return Vec::new();
    }
    let key = (service.metadata.namespace.clone(), service.metadata.name.clone());
    match view.world.services.get(&key) {
        Some(status) if !status.cluster_ips.is_empty() => status.cluster_ips.clone(),
        _ => service.written_ips(),
    }
}

fn convert(view: &View<'_>, service: &Service, hostname: String, addresses: &[IpAddr]) -> proto::Service {
    let meta = &service.metadata;
    let network = &view.settings.network;
    let (waypoint, weighted_waypoints) = view.waypoint(Asks { meta, traffic: Traffic::Service });
    let tcp = service.spec.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let ports = tcp.map(|port| proto::Port {
        service_port: port.port.get().into(),
        target_port: match &port.target_port {
            Some(IntOrString::Int(target)) => target.get().into(),
            // By name it differs from endpoint to endpoint: each says its own.
            Some(IntOrString::Name(_)) => 0,
            None => port.port.get().into(),
        },
        app_protocol: app_protocol(port.name.as_deref(), port.app_protocol.as_deref()).into(),
    });
    proto::Service {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        hostname,
        addresses: addresses.iter().map(|ip| network_address(network, *ip)).collect(),
        ports: ports.collect(),
        subject_alt_names: Vec::new(),
        waypoint,
        load_balancing: load_balancing(view, service),
        ip_families: ip_families(service, addresses).into(),
        extensions: encode_affinity(affinity(service)).into_iter().collect(),
        canonical: true,
        ingress_use_waypoint: false,
        weighted_waypoints,
        visibility: proto::service::Visibility::Public.into(),
    }
}

pub(super) fn network_address(network: &str, ip: IpAddr) -> proto::NetworkAddress {
    proto::NetworkAddress { network: network.to_owned(), address: ip_bytes(ip), length: None }
}

pub(super) fn ip_bytes<T: From<Vec<u8>>>(ip: IpAddr) -> T {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec().into(),
        IpAddr::V6(v6) => v6.octets().to_vec().into(),
    }
}

/// Made anew for each service: two services never share one (R11).
fn load_balancing(view: &View<'_>, service: &Service) -> Option<proto::LoadBalancing> {
    let namespace = service.metadata.namespace.as_str();
    let annotation = service.metadata.annotations.get(labels::TRAFFIC_DISTRIBUTION);
    let of_namespace = || view.namespaces.get(namespace)?.annotations.get(labels::TRAFFIC_DISTRIBUTION);
    let wish = service.spec.traffic_distribution.as_ref().or(annotation).or_else(of_namespace);
    let near = [Scope::Network, Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node];
    let (mode, scopes): (Mode, &[Scope]) =
        match (service.spec.internal_traffic_policy, wish.map(String::as_str)) {
            (Some(InternalTrafficPolicy::Local), _) => (Mode::Strict, &[Scope::Node]),
            (_, Some("PreferClose" | "PreferSameZone")) => (Mode::Failover, &near[..3]),
            (_, Some("PreferSameNode")) => (Mode::Failover, &near),
            _ => (Mode::UnspecifiedMode, &[]),
        };
    let health = if service.spec.publish_not_ready_addresses {
        HealthPolicy::AllowAll
    } else {
        HealthPolicy::OnlyHealthy
    };
    let says_something = mode != Mode::UnspecifiedMode || health != HealthPolicy::OnlyHealthy;
    says_something.then(|| proto::LoadBalancing {
        routing_preference: scopes.iter().map(|scope| (*scope).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

/// Any other value than the one that Kubernetes knows is its own default.
fn affinity(service: &Service) -> Affinity {
    match service.spec.session_affinity.as_deref() {
        Some("ClientIP") => Affinity::ClientAddress,
        Some(_) | None => Affinity::None,
    }
}

fn ip_families(service: &Service, addresses: &[IpAddr]) -> proto::IpFamilies {
    let said = &service.spec.ip_families;
    let (v4, v6) = if said.is_empty() {
        (addresses.iter().any(IpAddr::is_ipv4), addresses.iter().any(IpAddr::is_ipv6))
    } else {
        (said.contains(&IpFamily::IPv4), said.contains(&IpFamily::IPv6))
    };
    match (v4, v6) {
        (true, true) => proto::IpFamilies::Dual,
        (true, false) => proto::IpFamilies::Ipv4Only,
        (false, true) => proto::IpFamilies::Ipv6Only,
        (false, false) => proto::IpFamilies::Automatic,
    }
}
