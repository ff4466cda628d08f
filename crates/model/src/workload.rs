//! Workloads: the running instances that send and receive.

use std::collections::BTreeMap;
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
    /// The waypoint for traffic addressed to the workload itself (Z38).
    pub waypoint: Option<GatewayAddress>,
    /// The gateway that leads to its network, if that is another one (Z40).
    pub network_gateway: Option<GatewayAddress>,
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
    pub services: BTreeMap<NamespacedHostname, Ports>,
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

impl Ports {
    /// The workload's port for a service's port.
    pub fn target(&self, service_port: u16) -> Option<u16> {
        self.0.iter().find(|p| p.service_port == service_port && p.target_port != 0).map(|p| p.target_port)
    }
}
