//! Workloads: the running instances that send and receive.

use std::net::IpAddr;

use serde::Serialize;
use smallvec::SmallVec;

use crate::Str;
use crate::address::{GatewayAddress, NamespacedHostname};
use crate::identity::Identity;

/// One running instance: a pod, a WorkloadEntry, an endpoint or a gateway (D03).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Workload {
    /// `cluster/group/kind/namespace/name[/section]` (D08): the resource's name on the wire.
    pub uid: Str,
    /// The pod's name.
    pub name: Str,
    /// The pod's namespace.
    pub namespace: Str,
    /// Its addresses, none of them shared unless `network_mode` is host.
    pub addresses: SmallVec<[IpAddr; 2]>,
    /// A DNS name that stands for its address when it has none (Z42).
    pub hostname: Str,
    /// The network the addresses are reachable on; empty is the default network.
    pub network: Str,
    /// How to speak to it.
    pub tunnel_protocol: TunnelProtocol,
    /// Who it is.
    pub identity: Identity,
    /// The waypoint for traffic addressed to the workload itself (Z38). Boxed, as few have one.
    pub waypoint: Option<Box<GatewayAddress>>,
    /// The gateway that leads to its network, if that is another one (Z40).
    pub network_gateway: Option<Box<GatewayAddress>>,
    /// The node it runs on.
    pub node: Str,
    /// `service.istio.io/canonical-name` or what stands for it (D28).
    pub canonical_name: Str,
    /// `service.istio.io/canonical-revision` or what stands for it (D28).
    pub canonical_revision: Str,
    /// What made it.
    pub workload_type: WorkloadType,
    /// Name of what made it, for telemetry.
    pub workload_name: Str,
    /// It ends HBONE itself (Z54).
    pub native_tunnel: bool,
    /// How the local proxy hands decapsulated bytes over (Z53).
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, with its own target ports.
    pub services: ServicePorts,
    /// Names (`namespace/name`) of the policies that select it. A name that is not known denies (design.md, fail closed).
    pub authorization_policies: SmallVec<[Str; 2]>,
    /// Kubernetes readiness (Z70).
    pub health: Health,
    /// The cluster it runs in.
    pub cluster_id: Str,
    /// Where it runs.
    pub locality: Locality,
    /// Whether its address is its node's (D21).
    pub network_mode: NetworkMode,
    /// Relative weight in load balancing, at least 1 unless it must get nothing (Z68).
    pub capacity: u32,
    /// What only our own control plane says of it; nothing from another one.
    pub pod: Option<Box<PodFacts>>,
}

/// What our control plane says of a pod beyond the workload API.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct PodFacts {
    /// `metadata.uid`: another one is another pod, whatever its name and address.
    pub uid: Str,
    /// Whether the network itself restricts the pod.
    pub network_policies: NetworkPolicies,
}

/// What is known of the NetworkPolicies that select a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum NetworkPolicies {
    /// The control plane cannot see all that the network enforces, or does not say.
    Unknown,
    /// None selects it.
    None,
    /// At least one selects it.
    Selected,
}

/// How a peer reaches a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    /// mTLS and HTTP/2 CONNECT at port 15008.
    Hbone,
    /// A sidecar's own mTLS, which a node tunnel does not speak.
    LegacyIstioMtls,
}

/// What made a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum WorkloadType {
    /// A Deployment's pod.
    Deployment,
    /// A CronJob's pod.
    CronJob,
    /// A bare pod.
    Pod,
    /// A Job's pod.
    Job,
}

/// Readiness as the control plane sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Health {
    /// Takes traffic.
    Healthy,
    /// Takes none, unless its service says otherwise.
    Unhealthy,
}

/// Whose address a workload uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum NetworkMode {
    /// Its own.
    Standard,
    /// Its node's: not found by address.
    HostNetwork,
}

/// Region, zone and subzone; empty where unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Str2,
    /// `topology.kubernetes.io/zone`.
    pub zone: Str2,
    /// `topology.istio.io/subzone`.
    pub subzone: Str2,
}

/// A [`Str`] that defaults to the empty string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Str2(pub Str);

impl Default for Str2 {
    fn default() -> Self {
        Self(Str::from(""))
    }
}

/// Hand-over of decapsulated bytes to a gateway that speaks PROXY protocol (Z53).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ApplicationTunnel {
    /// `true` = PROXY protocol v2 before the bytes.
    pub proxy_protocol: bool,
    /// The port to hand over to; 0 = the port asked for.
    pub port: u16,
}

/// A small map from service to ports, ordered by service. A tree's node has room for eleven entries, 720 bytes of it
/// unused in the usual workload of one service; with 100,000 workloads that is most of what the mesh weighs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServicePorts(Box<[(NamespacedHostname, Ports)]>);

/// Service port to target port, and what is spoken there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Ports(pub SmallVec<[Port; 2]>);

/// One port of a service at one workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Port {
    /// The port clients ask for.
    pub service_port: u16,
    /// The port the workload listens on.
    pub target_port: u16,
    /// What is spoken there.
    pub app_protocol: AppProtocol,
}

/// Application protocol of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum AppProtocol {
    Unknown,
    Http11,
    Http2,
    Grpc,
    Tcp,
    Tls,
}

impl Workload {
    /// What is known of the NetworkPolicies that select it.
    pub fn network_policies(&self) -> NetworkPolicies {
        self.pod.as_ref().map_or(NetworkPolicies::Unknown, |pod| pod.network_policies)
    }
}

impl ServicePorts {
    /// The ports at one service.
    pub fn get(&self, service: &NamespacedHostname) -> Option<&Ports> {
        let at = self.0.binary_search_by(|(key, _)| key.cmp(service)).ok()?;
        Some(&self.0[at].1)
    }

    /// Whether it is an endpoint of this service.
    pub fn contains_key(&self, service: &NamespacedHostname) -> bool {
        self.get(service).is_some()
    }

    /// Adds or replaces one service, and returns the ports it had there. Costs a copy of the map: many are better collected.
    pub fn insert(&mut self, service: NamespacedHostname, ports: Ports) -> Option<Ports> {
        match self.0.binary_search_by(|(key, _)| key.cmp(&service)) {
            Ok(at) => Some(std::mem::replace(&mut self.0[at].1, ports)),
            Err(at) => {
                let mut all = std::mem::take(&mut self.0).into_vec();
                all.reserve_exact(1);
                all.insert(at, (service, ports));
                self.0 = all.into_boxed_slice();
                None
            }
        }
    }

    /// How many services there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it is an endpoint of none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The services in order.
    pub fn keys(&self) -> impl Iterator<Item = &NamespacedHostname> {
        self.0.iter().map(|(key, _)| key)
    }

    /// Services and ports in order.
    pub fn iter(&self) -> impl Iterator<Item = (&NamespacedHostname, &Ports)> {
        self.0.iter().map(|(key, ports)| (key, ports))
    }
}

/// Of two entries for one service the later stands.
impl FromIterator<(NamespacedHostname, Ports)> for ServicePorts {
    fn from_iter<I: IntoIterator<Item = (NamespacedHostname, Ports)>>(entries: I) -> Self {
        let mut all: Vec<_> = entries.into_iter().collect();
        // Stable, so equal keys stay in the order they came in.
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.reverse();
        all.dedup_by(|(a, _), (b, _)| a == b);
        all.reverse();
        Self(all.into_boxed_slice())
    }
}

impl IntoIterator for ServicePorts {
    type Item = (NamespacedHostname, Ports);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_vec().into_iter()
    }
}

impl Serialize for ServicePorts {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl Ports {
    /// The workload's port for a service's port.
    pub fn target(&self, service_port: u16) -> Option<u16> {
        self.0.iter().find(|p| p.service_port == service_port && p.target_port != 0).map(|p| p.target_port)
    }
}
