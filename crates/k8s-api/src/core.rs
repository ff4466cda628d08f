//! Core kinds. Unknown fields are accepted and ignored.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::meta::{ObjectMeta, StringMap};
use crate::values::{IntOrString, Port};

/// v1 Namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Name and labels.
    pub metadata: ObjectMeta,
}

/// v1 ServiceAccount.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceAccount {
    /// Name and namespace.
    pub metadata: ObjectMeta,
}

/// v1 Node: its labels give locality (D23).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Name and labels.
    pub metadata: ObjectMeta,
    /// What keeps pods away from it.
    #[serde(default)]
    pub spec: NodeSpec,
}

/// `spec` of a Node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// What a pod must tolerate to come here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub taints: Vec<Taint>,
}

/// A taint of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// Its name.
    pub key: String,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`.
    pub effect: String,
}

/// v1 Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Name, namespace, labels, annotations.
    pub metadata: ObjectMeta,
    /// What runs.
    pub spec: PodSpec,
}

/// `spec` of a Pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodSpec {
    /// The node it runs on; without one the sandbox chooses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    /// Its identity; [`Pod::service_account`] gives the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service_account_name: Option<String>,
    /// Shares the node's network namespace; never joins (C03).
    #[serde(default)]
    pub host_network: bool,
    /// Name of the host, used with `subdomain`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Subdomain of the host's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdomain: Option<String>,
    /// What follows the end of a container.
    #[serde(default)]
    pub restart_policy: RestartPolicy,
    /// Seconds between being asked to end and being killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub termination_grace_period_seconds: Option<u32>,
    /// At least one.
    pub containers: Vec<Container>,
    /// Read only to count them: without Kubernetes nobody runs them, and whoever starts the pod says so.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub init_containers: Vec<Container>,
}

/// What follows the end of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum RestartPolicy {
    #[default]
    Always,
    OnFailure,
    Never,
}

/// A container of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// Unique in the pod.
    pub name: String,
    /// Not used outside Kubernetes.
    #[serde(default)]
    pub image: String,
    /// Program and first arguments.
    #[serde(default)]
    pub command: Vec<String>,
    /// More arguments.
    #[serde(default)]
    pub args: Vec<String>,
    /// Environment.
    #[serde(default)]
    pub env: Vec<EnvVar>,
    /// Working directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Ports by name; a name is what a service may target (D22).
    #[serde(default)]
    pub ports: Vec<ContainerPort>,
    /// When it may receive traffic.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness_probe: Option<Probe>,
    /// When it is restarted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness_probe: Option<Probe>,
    /// When the other two begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup_probe: Option<Probe>,
    /// What the kubelet does after its start and before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lifecycle: Option<Lifecycle>,
}

/// Hooks of a container, as far as they come over the network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Lifecycle {
    /// After its start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_start: Option<Probe>,
    /// Before its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pre_stop: Option<Probe>,
}

/// One variable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvVar {
    /// Its name.
    pub name: String,
    /// Its value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Where its value comes from instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_from: Option<EnvVarSource>,
}

/// Source of a variable's value. Only the pod's own fields: config maps and secrets are not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EnvVarSource {
    /// A field of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field_ref: Option<FieldRef>,
}

/// A field of the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldRef {
    /// Such as `metadata.name` or `status.podIP`.
    pub field_path: String,
}

/// A declared port of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// Referred to by `targetPort`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port.
    pub container_port: Port,
    /// TCP if not given.
    #[serde(default)]
    pub protocol: Protocol,
}

/// Transport of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// The only one the mesh carries (C45).
    #[default]
    Tcp,
    /// Untouched.
    Udp,
    /// Untouched.
    Sctp,
}

/// A probe. Absent timings have Kubernetes' defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// Connects.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tcp_socket: Option<TcpSocketAction>,
    /// Asks by HTTP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http_get: Option<HttpGetAction>,
    /// Asks by gRPC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grpc: Option<GrpcAction>,
    /// Seconds before the first; 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_delay_seconds: Option<u32>,
    /// Seconds between two; 10.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period_seconds: Option<u32>,
    /// Seconds for an answer; 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// Failures in a row that count; 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<u32>,
}

/// A probe that connects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpSocketAction {
    /// Number, or name of a container port.
    pub port: IntOrString,
}

/// A probe that asks by gRPC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrpcAction {
    /// The port.
    pub port: Port,
}

/// A probe that asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpGetAction {
    /// Another machine than the pod's own address; then it is no probe of the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Number, or name of a container port.
    pub port: IntOrString,
    /// `/` if not given.
    #[serde(default)]
    pub path: Option<String>,
}

/// v1 Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Name, namespace, labels, annotations.
    pub metadata: ObjectMeta,
    /// What it stands for.
    pub spec: ServiceSpec,
}

/// `spec` of a Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// Pods by label; empty selects none.
    pub selector: StringMap,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// An address, `None` for headless, or absent: assigned.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// All addresses, one a family, or `["None"]`.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// Families wanted, in order.
    pub ip_families: Vec<IpFamily>,
    /// How many of them.
    pub ip_family_policy: Option<IpFamilyPolicy>,
    /// Kind of service.
    #[serde(rename = "type")]
    pub type_: ServiceType,
    /// Target of an ExternalName service.
    pub external_name: Option<String>,
    /// Endpoints that are not ready are used too (D25).
    pub publish_not_ready_addresses: bool,
    /// `Local`: only endpoints of the client's node (D24).
    pub internal_traffic_policy: Option<InternalTrafficPolicy>,
    /// `PreferClose`, `PreferSameZone`, `PreferSameNode` (D24); a value of a later Kubernetes is a hint, and ignored.
    pub traffic_distribution: Option<String>,
    /// `None` or `ClientIP`: connections from one address go to one endpoint. How long an idle client is remembered
    /// (`sessionAffinityConfig`) is a least, which keeping it for good satisfies.
    pub session_affinity: Option<String>,
}

/// A port of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Needed when there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port clients use.
    pub port: Port,
    /// The endpoint's port; the same if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_port: Option<IntOrString>,
    /// TCP if not given.
    #[serde(default)]
    pub protocol: Protocol,
    /// What is spoken, over the port's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub app_protocol: Option<String>,
}

/// An IP family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum IpFamily {
    IPv4,
    IPv6,
}

/// How many families a service has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum IpFamilyPolicy {
    SingleStack,
    PreferDualStack,
    RequireDualStack,
}

/// Kind of a service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum ServiceType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
    ExternalName,
}

/// Which endpoints a client in the cluster may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum InternalTrafficPolicy {
    Cluster,
    Local,
}

impl Container {
    fn probes(&self) -> impl Iterator<Item = &Probe> {
        let hooks = self.lifecycle.iter().flat_map(|it| [&it.post_start, &it.pre_stop]);
        [&self.readiness_probe, &self.liveness_probe, &self.startup_probe].into_iter().chain(hooks).flatten()
    }
}

impl Probe {
    /// The port of the pod that it asks, if it asks the pod itself and not a command.
    fn port_in(&self, container: &Container) -> Option<Port> {
        if let Some(grpc) = &self.grpc {
            return Some(grpc.port);
        }
        let port = match (&self.http_get, &self.tcp_socket) {
            (Some(get), _) if get.host.is_some() => return None,
            (Some(get), _) => &get.port,
            (None, Some(socket)) => &socket.port,
            (None, None) => return None,
        };
        match port {
            IntOrString::Int(number) => Some(*number),
            IntOrString::Name(name) => container
                .ports
                .iter()
                .find(|port| port.protocol == Protocol::Tcp && port.name.as_deref() == Some(name))
                .map(|port| port.container_port),
        }
    }
}

impl Pod {
    /// Its service account: `default` unless named.
    pub fn service_account(&self) -> &str {
        match self.spec.service_account_name.as_deref() {
            None | Some("") => "default",
            Some(name) => name,
        }
    }

    /// The TCP ports of this pod that its kubelet connects to: those of probes and hooks, named or not. A name that no port has counts
    /// for nothing, as it does for the kubelet.
    pub fn probe_ports(&self) -> BTreeSet<Port> {
        let containers = self.spec.init_containers.iter().chain(&self.spec.containers);
        containers.flat_map(|container| container.probes().filter_map(|it| it.port_in(container))).collect()
    }

    /// The TCP port of a container port's name, the first declared winning.
    pub fn named_port(&self, name: &str) -> Option<Port> {
        self.spec
            .containers
            .iter()
            .flat_map(|container| &container.ports)
            .find(|port| port.protocol == Protocol::Tcp && port.name.as_deref() == Some(name))
            .map(|port| port.container_port)
    }
}

impl Service {
    /// True if it asks for no virtual address of its own.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip.as_deref() == Some("None")
            || self.spec.cluster_ips.first().is_some_and(|ip| ip == "None")
    }

    /// The addresses written in the manifest; empty means that they are assigned.
    pub fn written_ips(&self) -> Vec<IpAddr> {
        let texts = if self.spec.cluster_ips.is_empty() {
            self.spec.cluster_ip.as_slice()
        } else {
            self.spec.cluster_ips.as_slice()
        };
        texts.iter().filter_map(|text| text.parse().ok()).collect()
    }
}
