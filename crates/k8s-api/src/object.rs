//! Any object, its key, and how a document becomes one.

use std::fmt;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::core::{Namespace, Node, NodeSpec, Pod, PodSpec, Service, ServiceAccount, ServiceSpec};
use crate::discovery::{self, EndpointSlice};
use crate::gateway::{Gateway, GatewayClass, GatewayClassSpec, GatewaySpec, WrittenStatus};
use crate::manifest::de::{FieldError, Nulls, from_node};
use crate::manifest::tree::{self, Value, path_key};
use crate::meta::ObjectMeta;
use crate::network_policy::{self, NetworkPolicy, OtherNetworkPolicy};
use crate::networking::{ServiceEntry, ServiceEntrySpec, WorkloadEntry, WorkloadEntrySpec};
use crate::routes::{self, ReferenceGrant, Route, RouteType};
use crate::security::{
    AuthorizationPolicy, AuthorizationPolicySpec, PeerAuthentication, PeerAuthenticationSpec,
};
use crate::unenforced::{DestinationRuleSpec, RequestAuthenticationSpec};
use crate::values::{is_dns_label, is_dns_subdomain};

/// An object of a kind the mesh reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind")]
#[allow(missing_docs, reason = "each is its kind")]
pub enum Object {
    Namespace(Namespace),
    ServiceAccount(ServiceAccount),
    Node(Node),
    Pod(Box<Pod>),
    Service(Box<Service>),
    EndpointSlice(Box<EndpointSlice>),
    AuthorizationPolicy(Box<AuthorizationPolicy>),
    PeerAuthentication(Box<PeerAuthentication>),
    ServiceEntry(Box<ServiceEntry>),
    WorkloadEntry(Box<WorkloadEntry>),
    NetworkPolicy(Box<NetworkPolicy>),
    OtherNetworkPolicy(Box<OtherNetworkPolicy>),
    Gateway(Box<Gateway>),
    GatewayClass(Box<GatewayClass>),
    HTTPRoute(Box<Route>),
    GRPCRoute(Box<Route>),
    TCPRoute(Box<Route>),
    TLSRoute(Box<Route>),
    ReferenceGrant(Box<ReferenceGrant>),
}

/// The kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs, reason = "each is its kind")]
pub enum Kind {
    Namespace,
    ServiceAccount,
    Node,
    Pod,
    Service,
    EndpointSlice,
    AuthorizationPolicy,
    PeerAuthentication,
    ServiceEntry,
    WorkloadEntry,
    NetworkPolicy,
    OtherNetworkPolicy,
    Gateway,
    GatewayClass,
    HTTPRoute,
    GRPCRoute,
    TCPRoute,
    TLSRoute,
    ReferenceGrant,
}

/// What makes an object the same object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Empty for kinds without.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What a document turned out to be.
#[derive(Debug)]
pub(crate) enum Decoded {
    Object(Object),
    /// Not ours: the words say what it is.
    Ignored(String),
}

/// One thing wrong with an object, its place given by a path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Invalid {
    pub field: String,
    pub value: String,
    pub reason: String,
    pub expected: String,
}

/// Collects what is wrong, so that one look shows all of it.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    pub found: Vec<Invalid>,
}

/// Why a document is no object: the first thing that did not fit, or all that is wrong.
#[derive(Debug)]
pub(crate) enum DecodeError {
    Shape { prefix: &'static str, error: FieldError },
    Invalid(Vec<Invalid>),
}

/// Kinds that make pods. Their controllers are Kubernetes', and there is none behind a directory.
const POD_MAKERS: [&str; 6] = ["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "CronJob"];

impl Checks {
    pub(crate) fn fail(
        &mut self,
        field: impl Into<String>,
        value: impl fmt::Display,
        reason: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.found.push(Invalid {
            field: field.into(),
            value: value.to_string(),
            reason: reason.into(),
            expected: expected.into(),
        });
    }
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::OtherNetworkPolicy(_) => Kind::OtherNetworkPolicy,
            Self::Gateway(_) => Kind::Gateway,
            Self::GatewayClass(_) => Kind::GatewayClass,
            Self::HTTPRoute(_) => Kind::HTTPRoute,
            Self::GRPCRoute(_) => Kind::GRPCRoute,
            Self::TCPRoute(_) => Kind::TCPRoute,
            Self::TLSRoute(_) => Kind::TLSRoute,
            Self::ReferenceGrant(_) => Kind::ReferenceGrant,
        }
    }

    /// Its metadata.
    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::Namespace(it) => &it.metadata,
            Self::ServiceAccount(it) => &it.metadata,
            Self::Node(it) => &it.metadata,
            Self::Pod(it) => &it.metadata,
            Self::Service(it) => &it.metadata,
            Self::EndpointSlice(it) => &it.metadata,
            Self::AuthorizationPolicy(it) => &it.metadata,
            Self::PeerAuthentication(it) => &it.metadata,
            Self::ServiceEntry(it) => &it.metadata,
            Self::WorkloadEntry(it) => &it.metadata,
            Self::NetworkPolicy(it) => &it.metadata,
            Self::OtherNetworkPolicy(it) => &it.metadata,
            Self::Gateway(it) => &it.metadata,
            Self::GatewayClass(it) => &it.metadata,
            Self::HTTPRoute(it) | Self::GRPCRoute(it) | Self::TCPRoute(it) | Self::TLSRoute(it) => {
                &it.metadata
            }
            Self::ReferenceGrant(it) => &it.metadata,
        }
    }

    /// It as a route, if it is one of any kind.
    pub fn route(&self) -> Option<&Route> {
        match self {
            Self::HTTPRoute(it) | Self::GRPCRoute(it) | Self::TCPRoute(it) | Self::TLSRoute(it) => Some(it),
            _ => None,
        }
    }

    /// Its key.
    pub fn key(&self) -> ObjectKey {
        let metadata = self.metadata();
        let name = match self {
            // One kind here stands for many there, and each may have an object of this name.
            Self::OtherNetworkPolicy(it) => format!("{} {}", it.kind, metadata.name),
            _ => metadata.name.clone(),
        };
        ObjectKey { kind: self.kind(), namespace: metadata.namespace.clone(), name }
    }

    /// Reads a document. Nothing of it is known yet but that it is YAML.
    pub(crate) fn decode(document: &tree::Node) -> Result<Decoded, DecodeError> {
        let (Some(api_version), Some(kind)) = (document.text("apiVersion"), document.text("kind")) else {
            let field = if document.text("apiVersion").is_none() { "apiVersion" } else { "kind" };
            return Err(DecodeError::one(field, "", "is required", "text, as in every Kubernetes manifest"));
        };
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        match (group, api_version, kind) {
            ("", "v1", "Namespace") => {
                Ok(Self::Namespace(Namespace { metadata: metadata(document, false)? }))
            }
            ("", "v1", "Node") => {
                let spec =
                    if document.get("spec").is_some() { core_spec(document)? } else { NodeSpec::default() };
                Ok(Self::Node(Node { metadata: metadata(document, false)?, spec }))
            }
            ("", "v1", "ServiceAccount") => {
                Ok(Self::ServiceAccount(ServiceAccount { metadata: metadata(document, true)? }))
            }
            ("", "v1", "Pod") => {
                let pod = Pod { metadata: metadata(document, true)?, spec: core_spec::<PodSpec>(document)? };
                checked(|checks| check_pod(&pod, checks)).map(|()| Self::Pod(Box::new(pod)))
            }
            ("", "v1", "Service") => {
                let service = Service {
                    metadata: metadata(document, true)?,
                    spec: core_spec::<ServiceSpec>(document)?,
                };
                checked(|checks| check_service(&service, checks)).map(|()| Self::Service(Box::new(service)))
            }
            ("discovery.k8s.io", "discovery.k8s.io/v1", "EndpointSlice") => {
                let slice = endpoint_slice(document)?;
                checked(|checks| slice.check(checks)).map(|()| Self::EndpointSlice(Box::new(slice)))
            }
            ("security.istio.io" | "networking.istio.io", _, _) => {
                Self::decode_mesh(document, api_version, kind)
            }
            ("networking.k8s.io", "networking.k8s.io/v1", "NetworkPolicy") => {
                let metadata = metadata(document, true)?;
                let spec: Option<network_policy::Spec> =
                    document.get("spec").and_then(|node| from_node(node, Nulls::Absent).ok());
                let pod_selector = spec.map(|spec| spec.pod_selector);
                Ok(Self::NetworkPolicy(Box::new(NetworkPolicy { metadata, pod_selector })))
            }
            ("gateway.networking.k8s.io", _, "Gateway" | "GatewayClass") => {
                Self::decode_gateway(document, api_version, kind)
            }
            ("gateway.networking.k8s.io", _, "ReferenceGrant") => {
                known_version(api_version, &["v1", "v1beta1"])?;
                let (metadata, spec) = (metadata(document, true)?, mesh_spec(document)?);
                Ok(Self::ReferenceGrant(Box::new(ReferenceGrant { metadata, spec })))
            }
            ("gateway.networking.k8s.io", _, kind) if RouteType::of_kind(kind).is_some() => {
                Self::decode_route(document, api_version, kind)
            }
            (_, _, restricting) if network_policy::restricts(restricting) => {
                Ok(Self::OtherNetworkPolicy(Box::new(other_network_policy(document, api_version, kind))))
            }
            ("apps" | "batch", _, maker) if POD_MAKERS.contains(&maker) => {
                let reason = "this kind makes pods, and only Kubernetes runs it";
                Err(DecodeError::one("kind", maker, reason, "Pod, where manifests come from a directory"))
            }
            _ => return Ok(Decoded::Ignored(format!("{api_version} {kind} is no kind the mesh reads"))),
        }
        .map(Decoded::Object)
    }

    fn decode_gateway(document: &tree::Node, api_version: &str, kind: &str) -> Result<Self, DecodeError> {
        known_version(api_version, &["v1", "v1beta1"])?;
        let namespaced = kind == "Gateway";
        let metadata = metadata(document, namespaced)?;
        if !namespaced {
            let spec: GatewayClassSpec = core_spec(document)?;
            checked(|checks| spec.check(checks))?;
            return Ok(Self::GatewayClass(Box::new(GatewayClass { metadata, spec })));
        }
        let spec: GatewaySpec = core_spec(document)?;
        checked(|checks| spec.check(checks))?;
        let status = document.get("status").and_then(|it| from_node::<WrittenStatus>(it, Nulls::Absent).ok());
        let status = status.unwrap_or_default().into();
        Ok(Self::Gateway(Box::new(Gateway { metadata, spec, status })))
    }

    /// What does not fit is for the route itself to say: it breaks a rule, and not the object.
    fn decode_route(document: &tree::Node, api_version: &str, kind: &str) -> Result<Self, DecodeError> {
        let of = RouteType::of_kind(kind).unwrap_or(RouteType::Http);
        let versions: &[&str] = match of {
            RouteType::Http => &["v1", "v1beta1"],
            RouteType::Grpc | RouteType::Tcp => &["v1", "v1alpha2"],
            RouteType::Tls => &["v1", "v1alpha3", "v1alpha2"],
        };
        known_version(api_version, versions)?;
        let route = Box::new(routes::read(of, metadata(document, true)?, document));
        Ok(match of {
            RouteType::Http => Self::HTTPRoute(route),
            RouteType::Grpc => Self::GRPCRoute(route),
            RouteType::Tcp => Self::TCPRoute(route),
            RouteType::Tls => Self::TLSRoute(route),
        })
    }

    /// What is wrong with a document of a kind that nothing enforces yet; `None` if it is of another kind.
    pub(crate) fn check_unenforced(document: &tree::Node) -> Option<Result<(), DecodeError>> {
        let group = document.text("apiVersion")?.split_once('/')?.0;
        match (group, document.text("kind")?) {
            ("security.istio.io", "RequestAuthentication") => Some(
                mesh_spec::<RequestAuthenticationSpec>(document)
                    .and_then(|spec| checked(|checks| spec.check(checks))),
            ),
            ("networking.istio.io", "DestinationRule") => Some(
                mesh_spec::<DestinationRuleSpec>(document)
                    .and_then(|spec| checked(|checks| spec.check(checks))),
            ),
            _ => None,
        }
    }

    /// A kind of ours. What it does not know it refuses, since a policy that is skipped fails open.
    fn decode_mesh(document: &tree::Node, api_version: &str, kind: &str) -> Result<Self, DecodeError> {
        let (group, version) = api_version.split_once('/').unwrap_or((api_version, ""));
        let versions: &[&str] =
            if group == "security.istio.io" { &["v1", "v1beta1"] } else { &["v1", "v1beta1", "v1alpha3"] };
        if !versions.contains(&version) {
            let expected = format!("{group}/ and one of {}", versions.join(", "));
            return Err(DecodeError::one("apiVersion", api_version, "unknown version", &expected));
        }
        let known = ["apiVersion", "kind", "metadata", "spec", "status"];
        if let Value::Map(entries) = &document.value
            && let Some((key, _)) = entries.iter().find(|(key, _)| !known.contains(&key.as_str()))
        {
            return Err(DecodeError::one(&path_key(key), "", "unknown field", "metadata or spec"));
        }
        let meta = metadata(document, true)?;
        match (group, kind) {
            ("security.istio.io", "AuthorizationPolicy") => {
                let spec: AuthorizationPolicySpec = mesh_spec(document)?;
                checked(|checks| spec.check(checks))?;
                Ok(Self::AuthorizationPolicy(Box::new(AuthorizationPolicy { metadata: meta, spec })))
            }
            ("security.istio.io", "PeerAuthentication") => {
                let spec: PeerAuthenticationSpec = mesh_spec(document)?;
                checked(|checks| spec.check(checks))?;
                Ok(Self::PeerAuthentication(Box::new(PeerAuthentication { metadata: meta, spec })))
            }
            ("networking.istio.io", "ServiceEntry") => {
                let spec: ServiceEntrySpec = mesh_spec(document)?;
                checked(|checks| spec.check(checks))?;
                Ok(Self::ServiceEntry(Box::new(ServiceEntry { metadata: meta, spec })))
            }
            ("networking.istio.io", "WorkloadEntry") => {
                let spec: WorkloadEntrySpec = mesh_spec(document)?;
                checked(|checks| spec.check("spec", checks))?;
                Ok(Self::WorkloadEntry(Box::new(WorkloadEntry { metadata: meta, spec })))
            }
            _ => {
                let reason = format!("{group} has no kind of this name that the mesh enforces");
                let expected = "AuthorizationPolicy, PeerAuthentication, ServiceEntry or WorkloadEntry";
                Err(DecodeError::one("kind", kind, &reason, expected))
            }
        }
    }
}

impl DecodeError {
    fn one(field: &str, value: &str, reason: &str, expected: &str) -> Self {
        let mut checks = Checks::default();
        checks.fail(field, value, reason, expected);
        Self::Invalid(checks.found)
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

fn known_version(api_version: &str, versions: &[&str]) -> Result<(), DecodeError> {
    let version = api_version.split_once('/').map_or("", |(_, version)| version);
    if versions.contains(&version) {
        return Ok(());
    }
    let expected = format!("gateway.networking.k8s.io/ and one of {}", versions.join(", "));
    Err(DecodeError::one("apiVersion", api_version, "unknown version", &expected))
}

/// Its kind has rules of its own for names, so none is refused.
fn other_network_policy(document: &tree::Node, api_version: &str, kind: &str) -> OtherNetworkPolicy {
    let text = |field| document.get("metadata").and_then(|it| it.text(field)).unwrap_or_default().to_owned();
    let metadata = ObjectMeta { name: text("name"), namespace: text("namespace"), ..ObjectMeta::default() };
    OtherNetworkPolicy { metadata, kind: format!("{api_version} {kind}") }
}

/// The API server fills in what is left out: the namespace.
const DEFAULT_NAMESPACE: &str = "default";

fn metadata(document: &tree::Node, namespaced: bool) -> Result<ObjectMeta, DecodeError> {
    let Some(node) = document.get("metadata") else {
        return Err(DecodeError::one("metadata.name", "", "is required", "a name"));
    };
    let mut meta: ObjectMeta =
        from_node(node, Nulls::Absent).map_err(|error| DecodeError::Shape { prefix: "metadata", error })?;
    if !namespaced {
        meta.namespace.clear();
    } else if meta.namespace.is_empty() {
        DEFAULT_NAMESPACE.clone_into(&mut meta.namespace);
    }
    checked(|checks| check_meta(&meta, namespaced, document.text("kind") == Some("Namespace"), checks))?;
    Ok(meta)
}

fn check_meta(meta: &ObjectMeta, namespaced: bool, is_namespace: bool, checks: &mut Checks) {
    if meta.name.is_empty() {
        checks.fail("metadata.name", "", "is required", "a name");
    } else if !is_dns_subdomain(&meta.name) || (is_namespace && !is_dns_label(&meta.name)) {
        let expected = "lower case letters, digits and -, beginning and ending with a letter or digit";
        checks.fail("metadata.name", &meta.name, "invalid name", expected);
    }
    if namespaced && !is_dns_label(&meta.namespace) {
        let expected = "at most 63 lower case letters, digits and -";
        checks.fail("metadata.namespace", &meta.namespace, "invalid name", expected);
    }
    for (key, value) in &meta.labels {
        let path = format!("metadata.labels{}", dotted(key));
        let edge = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = value.as_bytes();
        let shape = bytes.is_empty()
            || bytes.len() <= 63
                && edge(bytes.first())
                && edge(bytes.last())
                && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b));
        if !shape {
            checks.fail(path, value, "invalid label value", "at most 63 letters, digits, -, _ and .");
        }
    }
}

fn dotted(key: &str) -> String {
    let key = path_key(key);
    if key.starts_with('[') { key } else { format!(".{key}") }
}

fn check_pod(pod: &Pod, checks: &mut Checks) {
    if pod.spec.containers.is_empty() {
        checks.fail("spec.containers", "", "is empty", "at least one container");
    }
    if !is_dns_subdomain(pod.service_account()) {
        // It becomes part of a SPIFFE id.
        let expected = "the name of a service account";
        checks.fail("spec.serviceAccountName", pod.service_account(), "invalid name", expected);
    }
    if let Some(node) = pod.spec.node_name.as_deref().filter(|node| !is_dns_subdomain(node)) {
        checks.fail("spec.nodeName", node, "invalid name", "the name of a node");
    }
    for (index, container) in pod.spec.containers.iter().enumerate() {
        if !is_dns_label(&container.name) {
            let path = format!("spec.containers[{index}].name");
            checks.fail(path, &container.name, "invalid name", "at most 63 lower case letters, digits and -");
        }
    }
}

fn check_service(service: &Service, checks: &mut Checks) {
    let spec = &service.spec;
    if !is_dns_label(&service.metadata.name) {
        let expected = "at most 63 lower case letters, digits and -";
        checks.fail("metadata.name", &service.metadata.name, "invalid name", expected);
    }
    let single = spec.cluster_ip.iter().map(|ip| ("spec.clusterIP".to_owned(), ip));
    let many = spec.cluster_ips.iter().enumerate().map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), ip));
    for (path, ip) in single.chain(many) {
        if !ip.is_empty() && ip != "None" && ip.parse::<std::net::IpAddr>().is_err() {
            checks.fail(path, ip, "invalid value", "an IP address or None");
        }
    }
    for (index, port) in spec.ports.iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        if port.name.is_none() && spec.ports.len() > 1 {
            checks.fail(format!("{path}.name"), "", "is required when there are several ports", "a name");
        }
        let same =
            |other: &&crate::core::ServicePort| other.port == port.port && other.protocol == port.protocol;
        if spec.ports[..index].iter().any(|other| same(&other)) {
            checks.fail(format!("{path}.port"), port.port, "is there twice", "");
        }
    }
}

/// It has its fields beside `metadata`.
fn endpoint_slice(document: &tree::Node) -> Result<EndpointSlice, DecodeError> {
    let metadata = metadata(document, true)?;
    let shape = |error| DecodeError::Shape { prefix: "", error };
    let discovery::Fields { address_type, endpoints, ports } =
        from_node(document, Nulls::Absent).map_err(shape)?;
    Ok(EndpointSlice { metadata, address_type, endpoints, ports })
}

fn core_spec<T: DeserializeOwned + Default>(document: &tree::Node) -> Result<T, DecodeError> {
    match document.get("spec") {
        Some(node) => {
            from_node(node, Nulls::Absent).map_err(|error| DecodeError::Shape { prefix: "spec", error })
        }
        None => Err(DecodeError::one("spec", "", "is required", "a map")),
    }
}

/// A policy without `spec` is one with an empty `spec`, as the API server takes it.
fn mesh_spec<T: DeserializeOwned>(document: &tree::Node) -> Result<T, DecodeError> {
    let empty = tree::Node { line: document.line, value: Value::Map(Vec::new()) };
    let node = document.get("spec").unwrap_or(&empty);
    from_node(node, Nulls::Refused).map_err(|error| DecodeError::Shape { prefix: "spec", error })
}

fn checked(run: impl FnOnce(&mut Checks)) -> Result<(), DecodeError> {
    let mut checks = Checks::default();
    run(&mut checks);
    if checks.found.is_empty() { Ok(()) } else { Err(DecodeError::Invalid(checks.found)) }
}
