//! `security.istio.io` v1 and v1beta1. Unknown fields are refused.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::meta::{ObjectMeta, StringMap};
use crate::values::{IpBlock, Port};

mod check;

/// Who may connect to whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct AuthorizationPolicy {
    /// Name and namespace: the namespace decides the scope (D31).
    pub metadata: ObjectMeta,
    /// The rules.
    pub spec: AuthorizationPolicySpec,
}

/// `spec` of an AuthorizationPolicy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct AuthorizationPolicySpec {
    /// Workloads by label; without one, all of the namespace.
    pub selector: Option<Selector>,
    /// What a waypoint enforces it for (deprecated single form).
    pub target_ref: Option<TargetRef>,
    /// What a waypoint enforces it for.
    pub target_refs: Vec<TargetRef>,
    /// What a match does.
    pub action: Action,
    /// Who is asked, with CUSTOM.
    pub provider: Option<Provider>,
    /// Any of them matches. None: never matches, so an ALLOW denies all.
    pub rules: Vec<Rule>,
}

/// Workloads by label.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// All must be there; empty selects every workload.
    #[serde(default)]
    pub match_labels: StringMap,
}

/// An object that a policy is attached to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct TargetRef {
    /// API group, empty for core.
    #[serde(default)]
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
    /// Namespace; the policy's own if absent.
    #[serde(default)]
    pub namespace: Option<String>,
}

/// External authorizer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provider {
    /// Its name in the mesh configuration.
    pub name: String,
}

/// What a matching policy does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Action {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

/// One rule: all of its parts that are there must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Any source.
    #[serde(deserialize_with = "filled")]
    pub from: Vec<From>,
    /// Any operation.
    #[serde(deserialize_with = "filled")]
    pub to: Vec<To>,
    /// All conditions.
    #[serde(deserialize_with = "filled")]
    pub when: Vec<Condition>,
}

/// One source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    /// Its attributes.
    pub source: Source,
}

/// Attributes of a source: all that are given must match, each by any of its values.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each is a list of values, and its not_ form; the names say of what")]
pub struct Source {
    #[serde(deserialize_with = "filled")]
    pub principals: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_principals: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub request_principals: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_request_principals: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub namespaces: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_namespaces: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub service_accounts: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_service_accounts: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub ip_blocks: Vec<IpBlock>,
    #[serde(deserialize_with = "filled")]
    pub not_ip_blocks: Vec<IpBlock>,
    #[serde(deserialize_with = "filled")]
    pub remote_ip_blocks: Vec<IpBlock>,
    #[serde(deserialize_with = "filled")]
    pub not_remote_ip_blocks: Vec<IpBlock>,
}

/// One operation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct To {
    /// Its attributes.
    pub operation: Operation,
}

/// Attributes of an operation. Only ports mean something at L4.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[allow(missing_docs, reason = "each is a list of values, and its not_ form; the names say of what")]
pub struct Operation {
    #[serde(deserialize_with = "filled")]
    pub hosts: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_hosts: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub ports: Vec<Port>,
    #[serde(deserialize_with = "filled")]
    pub not_ports: Vec<Port>,
    #[serde(deserialize_with = "filled")]
    pub methods: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_methods: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub paths: Vec<String>,
    #[serde(deserialize_with = "filled")]
    pub not_paths: Vec<String>,
}

/// A further condition: an attribute by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Condition {
    /// The attribute, such as `source.ip`.
    pub key: String,
    /// Any of them.
    #[serde(default, deserialize_with = "filled")]
    pub values: Vec<String>,
    /// None of them.
    #[serde(default, deserialize_with = "filled")]
    pub not_values: Vec<String>,
}

/// How a workload takes connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PeerAuthentication {
    /// Name and namespace.
    pub metadata: ObjectMeta,
    /// The modes.
    pub spec: PeerAuthenticationSpec,
}

/// `spec` of a PeerAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PeerAuthenticationSpec {
    /// Workloads by label; without one, all of the namespace, or of the mesh in the root namespace.
    pub selector: Option<Selector>,
    /// For every port.
    pub mtls: Option<MutualTls>,
    /// For single ports of the workload (D41).
    pub port_level_mtls: BTreeMap<String, MutualTls>,
}

/// A mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MutualTls {
    /// The mode.
    pub mode: MtlsMode,
}

/// Which connections are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs, reason = "the names say it")]
pub enum MtlsMode {
    /// What the level above says.
    #[default]
    Unset,
    /// The same as permissive (D42).
    Disable,
    Permissive,
    Strict,
}

/// The attributes a node tunnel can judge in `when` (D35).
pub const L4_CONDITIONS: [&str; 6] = [
    "source.ip",
    "source.namespace",
    "source.principal",
    "source.serviceAccount",
    "destination.ip",
    "destination.port",
];

impl Selector {
    /// The labels, `None` if it selects every workload.
    pub fn labels(this: Option<&Self>) -> Option<&StringMap> {
        this.map(|selector| &selector.match_labels).filter(|labels| !labels.is_empty())
    }
}

impl Source {
    /// True if it names something only HTTP carries.
    pub fn has_l7(&self) -> bool {
        !(self.request_principals.is_empty()
            && self.not_request_principals.is_empty()
            && self.remote_ip_blocks.is_empty()
            && self.not_remote_ip_blocks.is_empty())
    }
}

impl Operation {
    /// True if it names something only HTTP carries.
    pub fn has_l7(&self) -> bool {
        let Self { hosts, not_hosts, ports: _, not_ports: _, methods, not_methods, paths, not_paths } = self;
        [hosts, not_hosts, methods, not_methods, paths, not_paths].iter().any(|list| !list.is_empty())
    }
}

impl Condition {
    /// True if a node tunnel cannot judge it.
    pub fn is_l7(&self) -> bool {
        !L4_CONDITIONS.contains(&self.key.as_str())
    }
}

/// A list that says "any of these": an empty one would say nothing, and be read as "any at all".
fn filled<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
    struct Filled<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Filled<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list with at least one value")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            while let Some(item) = seq.next_element()? {
                items.push(item);
            }
            if items.is_empty() {
                Err(serde::de::Error::custom("is an empty list; remove it or fill it in"))
            } else {
                Ok(items)
            }
        }
    }
    deserializer.deserialize_seq(Filled(std::marker::PhantomData))
}
