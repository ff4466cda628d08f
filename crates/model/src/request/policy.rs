//! AuthorizationPolicies as a waypoint enforces them, made ready for judging.

use std::sync::Arc;

use ipnet::IpNet;

use super::{PathPattern, TextPattern};
use crate::Str;
use crate::address::NamespacedHostname;
use crate::policy::{PolicyKey, ServiceAccountMatch, StringMatch};

/// One policy. Made by [`crate::wire::request::decode`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPolicy {
    /// `namespace/name`.
    pub key: PolicyKey,
    /// What a match means.
    pub action: Action,
    /// Decide and log, but do not enforce.
    pub dry_run: bool,
    /// What it is for.
    pub targets: Targets,
    /// Set when the message held something that is not understood: every target is then denied, and this says why.
    pub undecodable: Option<Str>,
    /// Any one suffices; none matches nothing.
    pub(crate) rules: Vec<Rule>,
}

/// What a match means (W53).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Let through; once one exists, what none of them matches is refused.
    Allow,
    /// Refuse.
    Deny,
    /// Note in the log.
    Audit,
    /// Ask this provider, which may refuse.
    Custom(Str),
}

impl Action {
    /// `allow`, `deny`, `audit` or `ask`.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Audit => "audit",
            Self::Custom(_) => "ask",
        }
    }
}

/// What a policy is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Targets {
    /// Everything behind the waypoint.
    All,
    /// These services.
    Services(Vec<NamespacedHostname>),
}

impl RequestPolicy {
    /// Whether it is for `service`; `None` for traffic that is addressed to a workload.
    pub fn applies_to(&self, service: Option<&NamespacedHostname>) -> bool {
        match &self.targets {
            Targets::All => true,
            Targets::Services(services) => service.is_some_and(|service| services.contains(service)),
        }
    }
}

/// The policies of one service, sorted by what they do and then by name. Made once for each change, not for each request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    pub(super) undecodable: Vec<Arc<RequestPolicy>>,
    pub(super) custom: Vec<Arc<RequestPolicy>>,
    pub(super) deny: Vec<Arc<RequestPolicy>>,
    pub(super) allow: Vec<Arc<RequestPolicy>>,
    pub(super) audit: Vec<Arc<RequestPolicy>>,
    /// Whether any policy is on trial: looking for them is rarely worth a walk.
    pub(super) any_trial: bool,
}

impl PolicySet {
    /// Those of `policies` that are for `service`; see [`RequestPolicy::applies_to`].
    pub fn new<'a>(
        policies: impl IntoIterator<Item = &'a Arc<RequestPolicy>>,
        service: Option<&NamespacedHostname>,
    ) -> Self {
        let mut set = Self::default();
        for policy in policies.into_iter().filter(|policy| policy.applies_to(service)) {
            let list = match &policy.action {
                _ if policy.undecodable.is_some() => &mut set.undecodable,
                Action::Custom(_) => &mut set.custom,
                Action::Deny => &mut set.deny,
                Action::Allow => &mut set.allow,
                Action::Audit => &mut set.audit,
            };
            list.push(policy.clone());
            set.any_trial |= policy.dry_run;
        }
        for list in [&mut set.undecodable, &mut set.custom, &mut set.deny, &mut set.allow, &mut set.audit] {
            list.sort_by(|a, b| a.key.cmp(&b.key));
        }
        set
    }

    /// Whether nothing is asked of anyone.
    pub fn is_empty(&self) -> bool {
        let lists = [&self.undecodable, &self.custom, &self.deny, &self.allow, &self.audit];
        lists.into_iter().all(Vec::is_empty)
    }
}

/// All three; of `from` and of `to` any one suffices, and an empty one matches everything. Of one, all conditions are required.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) from: Vec<Vec<Condition>>,
    pub(crate) to: Vec<Vec<Condition>>,
    pub(crate) when: Vec<Condition>,
}

/// One list of values of a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Condition {
    /// As the policy writes it: `not_paths`, `request.headers[x-a]`.
    pub(crate) name: Str,
    /// Any of these values is wanted; `false`: none of them is.
    pub(crate) wanted: bool,
    pub(crate) test: Test,
}

/// What is compared, and with which values. Never without a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Test {
    Principal(Vec<StringMatch>),
    Namespace(Vec<TextPattern>),
    ServiceAccount(Vec<ServiceAccountMatch>),
    TrustDomain(Vec<StringMatch>),
    SourceAddress(Vec<IpNet>),
    RemoteAddress(Vec<IpNet>),
    DestinationAddress(Vec<IpNet>),
    DestinationPort(Vec<u16>),
    /// In lower case.
    ServerName(Vec<StringMatch>),
    RequestPrincipal(Vec<StringMatch>),
    /// The names from the outside in.
    Claim(Vec<Str>, Vec<StringMatch>),
    /// In lower case.
    Host(Vec<StringMatch>),
    Method(Vec<StringMatch>),
    Path(Vec<PathPattern>),
    /// The name in lower case.
    Header(Str, Vec<StringMatch>),
}
