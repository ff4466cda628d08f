//! EndpointSlices of Services without a selector: what they lead to is a pod, or a workload of its own (D20, D22).
//!
//! The address decides which it is: where a pod has it, the endpoint is that pod, with its identity and its tunnel, whether the
//! slice says so or not. What says that it is a pod and is none that is known is left out until the pod is there: nothing is sent
//! to a pod in plaintext because it was named before it was seen.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use culvert_k8s_api::core::{Protocol, Service};
use culvert_k8s_api::discovery::{AddressType, Endpoint, EndpointSlice};
use culvert_k8s_api::status::Phase;
use culvert_k8s_api::values::IntOrString;
use culvert_proto::workload as proto;

use super::Translation;
use super::endpoints::app_protocol;
use super::pods::{health, node_locality, tunnel};
use super::services::ip_bytes;
use super::view::{Key, View};

/// Where slices lead.
#[derive(Default)]
pub(super) struct Slices<'a> {
    /// By pod: the services that it is an endpoint of, each with its ports.
    pods: HashMap<Key<'a>, BTreeMap<String, Vec<proto::Port>>>,
    others: Vec<Other<'a>>,
}

/// An endpoint that is no pod.
struct Other<'a> {
    slice: &'a EndpointSlice,
    endpoint: &'a Endpoint,
    address: IpAddr,
    /// Resource name of the service.
    service: String,
    ports: Vec<proto::Port>,
}

impl<'a> Slices<'a> {
    /// Reads them all.
    pub fn new(view: &View<'a>, out: &mut Translation) -> Self {
        let mut found = Self::default();
        if view.slices.is_empty() {
            return found;
        }
        let pods = pods_by_address(view);
        for ((namespace, name), slice) in &view.slices {
            let of = slice.service().and_then(|service| view.services.get(&(*namespace, service)));
            // Where there is a selector, that decides.
            let Some(service) = of.filter(|service| service.by_slices()) else { continue };
            if slice.address_type == AddressType::Fqdn {
                out.notes.push(format!(
                    "EndpointSlice {namespace}/{name}: nobody resolves names in it; a ServiceEntry can have them"
                ));
                continue;
            }
            let key = format!("{namespace}/{}", view.service_host(namespace, &service.metadata.name));
            let ports = ports(service, slice);
            if !ports.is_empty() {
                found.add(slice, service, &key, &ports, &pods);
            }
        }
        found
    }

    fn add(
        &mut self,
        slice: &'a EndpointSlice,
        service: &Service,
        key: &str,
        ports: &[proto::Port],
        pods: &HashMap<IpAddr, Vec<Candidate<'a>>>,
    ) {
        for endpoint in &slice.endpoints {
            let Some(address) = endpoint.ip() else { continue };
            let named = endpoint.target_ref.as_ref().filter(|_| endpoint.is_pod());
            let is = |pod: &&Candidate<'_>| match named {
                // Many pods have the address of their node, and only a name says which is meant.
                Some(named) if pod.shared => {
                    pod.name.1 == named.name && (named.namespace.is_empty() || pod.name.0 == named.namespace)
                }
                _ => !pod.shared,
            };
            match pods.get(&address).and_then(|at| at.iter().find(is)) {
                Some(pod) => {
                    // A pod is healthy or not for all services; where it is not wanted yet it is no endpoint.
                    if endpoint.ready() || service.spec.publish_not_ready_addresses {
                        let known = self.pods.entry(pod.name).or_default().entry(key.to_owned()).or_default();
                        let new = |port: &&proto::Port| {
                            !known.iter().any(|it| it.service_port == port.service_port)
                        };
                        let new: Vec<proto::Port> = ports.iter().filter(new).copied().collect();
                        known.extend(new);
                    }
                }
                None if named.is_some() => {}
                None => self.others.push(Other {
                    slice,
                    endpoint,
                    address,
                    service: key.to_owned(),
                    ports: ports.to_vec(),
                }),
            }
        }
    }

    /// The services that a pod is an endpoint of by slices.
    pub fn of(&self, namespace: &str, name: &str) -> Vec<(String, proto::PortList)> {
        let services = self.pods.get(&(namespace, name)).into_iter().flatten();
        services.map(|(key, ports)| (key.clone(), proto::PortList { ports: ports.clone() })).collect()
    }

    /// Makes workloads of what is no pod.
    pub fn convert_others(&self, view: &View<'_>, out: &mut Translation) {
        for other in &self.others {
            let workload = other.workload(view);
            out.insert(workload.uid.clone(), proto::address::Type::Workload(workload));
        }
    }
}

impl Other<'_> {
    /// Nothing is known of it but where it is: no identity, no tunnel, no policy.
    fn workload(&self, view: &View<'_>) -> proto::Workload {
        let (meta, settings) = (&self.slice.metadata, view.settings);
        let node = self.endpoint.node_name.clone().unwrap_or_default();
        let ports = proto::PortList { ports: self.ports.clone() };
        proto::Workload {
            uid: format!(
                "{}/discovery.k8s.io/EndpointSlice/{}/{}/{}",
                settings.cluster_id, meta.namespace, meta.name, self.address
            ),
            name: meta.name.clone(),
            namespace: meta.namespace.clone(),
            addresses: vec![ip_bytes(self.address)],
            network: settings.network.clone(),
            tunnel_protocol: tunnel(false).into(),
            trust_domain: settings.trust_domain.clone(),
            locality: node_locality(view, &node),
            node,
            canonical_name: meta.name.clone(),
            canonical_revision: "latest".to_owned(),
            workload_type: proto::WorkloadType::Pod.into(),
            workload_name: meta.name.clone(),
            services: HashMap::from([(self.service.clone(), ports)]),
            status: health(self.endpoint.ready()).into(),
            cluster_id: settings.cluster_id.clone(),
            // Whoever may write slices may write any address: what is known of an address elsewhere stays so.
            network_mode: proto::NetworkMode::HostNetwork.into(),
            ..proto::Workload::default()
        }
    }
}

/// A pod at an address.
struct Candidate<'a> {
    name: Key<'a>,
    /// The address is that of its node.
    shared: bool,
}

fn pods_by_address<'a>(view: &View<'a>) -> HashMap<IpAddr, Vec<Candidate<'a>>> {
    let mut found: HashMap<IpAddr, Vec<Candidate<'a>>> = HashMap::new();
    for (name, pod) in &view.pods {
        let Some(status) = view.world.pods.get(&(name.0.to_owned(), name.1.to_owned())) else { continue };
        if matches!(status.phase, Phase::Succeeded | Phase::Failed) {
            continue;
        }
        for ip in &status.pod_ips {
            let candidate = Candidate { name: *name, shared: pod.spec.host_network };
            found.entry(*ip).or_default().push(candidate);
        }
    }
    found
}

/// The TCP ports of a service that a slice has, where it has them.
fn ports(service: &Service, slice: &EndpointSlice) -> Vec<proto::Port> {
    let of_service = service.spec.ports.iter().filter(|port| port.protocol == Protocol::Tcp);
    let mapped = of_service.filter_map(|port| {
        let name = port.name.as_deref().unwrap_or_default();
        let at = slice.ports.iter().find(|at| at.protocol == Protocol::Tcp && at.name == name)?;
        let target = at.port.unwrap_or(match port.target_port {
            Some(IntOrString::Int(target)) => target,
            _ => port.port,
        });
        Some(proto::Port {
            service_port: port.port.get().into(),
            target_port: target.get().into(),
            app_protocol: app_protocol(port.name.as_deref(), port.app_protocol.as_deref()).into(),
        })
    });
    mapped.collect()
}
