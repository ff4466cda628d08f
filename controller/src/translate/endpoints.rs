//! Which services a workload is an endpoint of, and at which ports (D22).

use std::collections::{BTreeMap, HashMap};

use culvert_k8s_api::core::{Pod, Protocol, Service};
use culvert_k8s_api::meta::{StringMap, selects};
use culvert_k8s_api::networking::{ServiceEntry, ServiceEntryPort, WorkloadEntrySpec};
use culvert_k8s_api::values::IntOrString;
use culvert_proto::workload::{AppProtocol, Port, PortList};

/// Everything that selects workloads by label, by namespace.
#[derive(Default)]
pub(super) struct Targets<'a> {
    by_namespace: BTreeMap<&'a str, Vec<Target<'a>>>,
}

struct Target<'a> {
    /// `namespace/hostname` of each service that these ports are of.
    keys: Vec<String>,
    selector: &'a StringMap,
    ports: Ports<'a>,
}

enum Ports<'a> {
    Service(&'a Service),
    Entry(&'a ServiceEntry),
}

/// Something with ports by name.
#[derive(Clone, Copy)]
pub(super) enum Endpoint<'a> {
    Pod(&'a Pod),
    Entry(&'a WorkloadEntrySpec),
}

impl<'a> Targets<'a> {
    pub fn add_service(&mut self, namespace: &'a str, key: String, service: &'a Service) {
        let target =
            Target { keys: vec![key], selector: &service.spec.selector, ports: Ports::Service(service) };
        self.by_namespace.entry(namespace).or_default().push(target);
    }

    pub fn add_entry(&mut self, entry: &'a ServiceEntry, selector: &'a StringMap, keys: Vec<String>) {
        let target = Target { keys, selector, ports: Ports::Entry(entry) };
        self.by_namespace.entry(&entry.metadata.namespace).or_default().push(target);
    }

    /// The services of an endpoint with its own ports; one without a usable port is left out (Z71).
    pub fn of(
        &self,
        namespace: &str,
        labels: &StringMap,
        endpoint: Endpoint<'_>,
    ) -> HashMap<String, PortList> {
        let mut services = HashMap::new();
        let selecting = self.by_namespace.get(namespace).into_iter().flatten();
        for target in selecting.filter(|target| selects(target.selector, labels)) {
            let ports = match target.ports {
                Ports::Service(service) => service_ports(service, endpoint),
                Ports::Entry(entry) => entry_ports(entry, endpoint),
            };
            if ports.is_empty() {
                continue;
            }
            for key in &target.keys {
                services.insert(key.clone(), PortList { ports: ports.clone() });
            }
        }
        services
    }
}

fn service_ports(service: &Service, endpoint: Endpoint<'_>) -> Vec<Port> {
    let tcp = service.spec.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let mapped = tcp.filter_map(|port| {
        let own = port.port.get();
        let target = match (endpoint, &port.target_port) {
            (Endpoint::Pod(pod), Some(IntOrString::Name(name))) => pod.named_port(name)?.get(),
            (Endpoint::Entry(entry), Some(IntOrString::Name(name))) => entry.ports.get(name)?.get(),
            (Endpoint::Entry(entry), target) => {
                let named = port.name.as_ref().and_then(|name| entry.ports.get(name));
                match (named, target) {
                    (Some(port), _) | (None, Some(IntOrString::Int(port))) => port.get(),
                    _ => own,
                }
            }
            (Endpoint::Pod(_), Some(IntOrString::Int(port))) => port.get(),
            (Endpoint::Pod(_), None) => own,
        };
        Some(Port {
            service_port: own.into(),
            target_port: target.into(),
            app_protocol: app_protocol(port.name.as_deref(), port.app_protocol.as_deref()).into(),
        })
    });
    mapped.collect()
}

/// The ports of a ServiceEntry at an endpoint: the endpoint's own by name, else the target port, else the same.
pub(super) fn entry_ports(entry: &ServiceEntry, endpoint: Endpoint<'_>) -> Vec<Port> {
    let port = |port: &ServiceEntryPort| {
        let own = match endpoint {
            Endpoint::Entry(entry) => entry.ports.get(&port.name).copied(),
            Endpoint::Pod(_) => None,
        };
        Port {
            service_port: port.number.get().into(),
            target_port: own.or(port.target_port).unwrap_or(port.number).get().into(),
            app_protocol: entry_protocol(&port.protocol).into(),
        }
    };
    tcp_ports(entry).map(port).collect()
}

/// The ports that a node tunnel carries.
pub(super) fn tcp_ports(entry: &ServiceEntry) -> impl Iterator<Item = &ServiceEntryPort> {
    entry.spec.ports.iter().filter(|port| !port.protocol.eq_ignore_ascii_case("UDP"))
}

/// What a service's port speaks: what it says, else the first word of its name.
pub(super) fn app_protocol(name: Option<&str>, explicit: Option<&str>) -> AppProtocol {
    let word = explicit.or_else(|| name.and_then(|name| name.split('-').next())).unwrap_or_default();
    match word.to_ascii_lowercase().as_str() {
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" => AppProtocol::Grpc,
        "tcp" => AppProtocol::Tcp,
        "tls" | "https" | "kubernetes.io/wss" => AppProtocol::Tls,
        _ => AppProtocol::Unknown,
    }
}

/// What a ServiceEntry's port speaks.
pub(super) fn entry_protocol(protocol: &str) -> AppProtocol {
    app_protocol(None, Some(protocol))
}
