//! L4 authorization policies as they are enforced (D06, Z58-Z66).

use ipnet::IpNet;
use serde::Serialize;

use crate::Str;

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// `namespace/name`.
    pub key: PolicyKey,
    /// What it selects.
    pub scope: PolicyScope,
    /// What a match means.
    pub action: Action,
    /// Any one group has to match.
    pub groups: Vec<Group>,
    /// Decide and log, but do not enforce.
    pub dry_run: bool,
    /// Set when the message held something this proxy does not know: every target is then denied, and this says why.
    pub undecodable: Option<Str>,
}

/// A policy's name, written `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyKey {
    /// The namespace it lives in.
    pub namespace: Str,
    /// Its name.
    pub name: Str,
}

/// What a policy selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum PolicyScope {
    /// Every workload.
    Global,
    /// Every workload of its namespace.
    Namespace,
    /// The workloads that name it.
    WorkloadSelector,
}

/// What a match means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Action {
    /// Let through; once one exists, what none of them matches is refused.
    Allow,
    /// Refuse.
    Deny,
}

/// Every rule has to match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The rules.
    pub rules: Vec<Rule>,
}

/// Any one match suffices; an empty list matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// The matches.
    pub matches: Vec<Match>,
}

/// Every field that is present has to match; within a field any value suffices, and none of a `not_` field's may.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "each field is the wire's field of the same name")]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccountMatch>,
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    pub source_ips: Vec<IpNet>,
    pub not_source_ips: Vec<IpNet>,
    pub destination_ips: Vec<IpNet>,
    pub not_destination_ips: Vec<IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

/// How a text is compared (Z61).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum StringMatch {
    /// Equal.
    Exact(Str),
    /// Begins with.
    Prefix(Str),
    /// Ends with.
    Suffix(Str),
    /// There is one, whatever it says.
    Presence,
}

/// A service account in a namespace, whatever its trust domain (Z62).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct ServiceAccountMatch {
    /// The namespace.
    pub namespace: Str,
    /// The account.
    pub service_account: Str,
}

impl std::fmt::Display for PolicyKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl Serialize for PolicyKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
