//! `istio.security.Authorization` (D06) and [`Policy`].

use culvert_proto::security as proto;
use ipnet::IpNet;
use prost::Message;

use super::unknown::{self, UnknownError};
use super::{ValueError, ip, ip_bytes, port_number};
use crate::Str;
use crate::policy::{
    Action, Group, Match, Policy, PolicyKey, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};

/// A decoded policy, and what to tell the control plane about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyResource {
    /// What to enforce. If `error` is set it denies its whole scope ([`Policy::undecodable`]).
    pub policy: Policy,
    /// Why it was not understood: the text of the NACK.
    pub error: Option<PolicyError>,
}

/// Why a policy was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// A field, a value or an extension that this proxy does not know.
    #[error(transparent)]
    Unknown(#[from] UnknownError),
    /// The bytes are no such message.
    #[error("not decodable: {0}")]
    Decode(String),
    /// A field's value.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// A text match of no kind.
    #[error("{field} has a match of no kind")]
    EmptyMatch {
        /// The field.
        field: &'static str,
    },
    /// The resource's name is not `namespace/name`.
    #[error("policy {0:?} is not named namespace/name")]
    ResourceName(String),
    /// The body names another policy: workloads would name one and get the other.
    #[error("policy {resource:?} holds {found:?}")]
    Name {
        /// The resource's name.
        resource: String,
        /// What the body calls itself.
        found: String,
    },
}

/// Decodes one policy; there is always one to enforce.
///
/// What is not understood denies: [`Policy::undecodable`] says why, and the scope is the one in the bytes. Where even that
/// cannot be read, or names a scope that is not known, it is [`PolicyScope::Global`]: the policy's targets could be any
/// workload, and leaving one out would be letting it through.
pub fn decode(name: &str, body: &[u8]) -> PolicyResource {
    let parsed = parse(name, body);
    match parsed {
        Ok(policy) => PolicyResource { policy, error: None },
        Err(error) => PolicyResource {
            policy: Policy {
                key: key(name).unwrap_or_else(|| PolicyKey { namespace: "".into(), name: name.into() }),
                scope: readable_scope(name, body),
                action: Action::Deny,
                groups: Vec::new(),
                dry_run: false,
                undecodable: Some(error.to_string().into()),
            },
            error: Some(error),
        },
    }
}

/// The message that describes a policy; an undecodable one is sent as a policy that denies everything in its scope.
pub fn encode(policy: &Policy) -> proto::Authorization {
    let undecodable = policy.undecodable.is_some();
    let all = [Group { rules: vec![Rule::default()] }];
    let groups = if undecodable { &all[..] } else { &policy.groups[..] };
    proto::Authorization {
        name: policy.key.name.to_string(),
        namespace: policy.key.namespace.to_string(),
        scope: match policy.scope {
            PolicyScope::Global => proto::Scope::Global,
            PolicyScope::Namespace => proto::Scope::Namespace,
            PolicyScope::WorkloadSelector => proto::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            Action::Allow if !undecodable => proto::Action::Allow,
            Action::Allow | Action::Deny => proto::Action::Deny,
        }
        .into(),
        groups: groups.iter().map(encode_group).collect(),
        dry_run: policy.dry_run && !undecodable,
        extensions: Vec::new(),
    }
}

fn key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/')?;
    (!name.is_empty()).then(|| PolicyKey { namespace: namespace.into(), name: name.into() })
}

fn readable_scope(name: &str, body: &[u8]) -> PolicyScope {
    let Some(key) = key(name) else { return PolicyScope::Global };
    match unknown::last_number(body, 3) {
        // A namespace's policy without a namespace would select nothing.
        Ok(Some(1)) if !key.namespace.is_empty() => PolicyScope::Namespace,
        Ok(Some(2)) => PolicyScope::WorkloadSelector,
        Ok(_) | Err(_) => PolicyScope::Global,
    }
}

fn parse(name: &str, body: &[u8]) -> Result<Policy, PolicyError> {
    let key = key(name).ok_or_else(|| PolicyError::ResourceName(name.to_owned()))?;
    unknown::check(body, &unknown::AUTHORIZATION)?;
    let message =
        proto::Authorization::decode(body).map_err(|error| PolicyError::Decode(error.to_string()))?;
    if message.namespace != *key.namespace || message.name != *key.name {
        let found = format!("{}/{}", message.namespace, message.name);
        return Err(PolicyError::Name { resource: name.to_owned(), found });
    }
    let scope = match proto::Scope::try_from(message.scope) {
        Ok(proto::Scope::Global) => PolicyScope::Global,
        Ok(proto::Scope::Namespace) => PolicyScope::Namespace,
        Ok(proto::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
        Err(_) => return Err(ValueError::Enum { field: "scope", value: message.scope }.into()),
    };
    let action = match proto::Action::try_from(message.action) {
        Ok(proto::Action::Allow) => Action::Allow,
        Ok(proto::Action::Deny) => Action::Deny,
        Err(_) => return Err(ValueError::Enum { field: "action", value: message.action }.into()),
    };
    let groups = message.groups.into_iter().map(group).collect::<Result<_, _>>()?;
    Ok(Policy { key, scope, action, groups, dry_run: message.dry_run, undecodable: None })
}

fn group(message: proto::Group) -> Result<Group, PolicyError> {
    let rule = |rules: proto::Rules| {
        Ok(Rule { matches: rules.matches.into_iter().map(one_match).collect::<Result<_, PolicyError>>()? })
    };
    Ok(Group { rules: message.rules.into_iter().map(rule).collect::<Result<_, PolicyError>>()? })
}

fn one_match(message: proto::Match) -> Result<Match, PolicyError> {
    Ok(Match {
        namespaces: texts("namespaces", message.namespaces)?,
        not_namespaces: texts("not_namespaces", message.not_namespaces)?,
        principals: texts("principals", message.principals)?,
        not_principals: texts("not_principals", message.not_principals)?,
        service_accounts: accounts(message.service_accounts),
        not_service_accounts: accounts(message.not_service_accounts),
        source_ips: blocks("source_ips", &message.source_ips)?,
        not_source_ips: blocks("not_source_ips", &message.not_source_ips)?,
        destination_ips: blocks("destination_ips", &message.destination_ips)?,
        not_destination_ips: blocks("not_destination_ips", &message.not_destination_ips)?,
        destination_ports: ports("destination_ports", &message.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &message.not_destination_ports)?,
    })
}

fn texts(field: &'static str, matches: Vec<proto::StringMatch>) -> Result<Vec<StringMatch>, PolicyError> {
    use proto::string_match::MatchType;
    let text = |message: proto::StringMatch| match message.match_type {
        Some(MatchType::Exact(text)) => Ok(StringMatch::Exact(text.into())),
        Some(MatchType::Prefix(text)) => Ok(StringMatch::Prefix(text.into())),
        Some(MatchType::Suffix(text)) => Ok(StringMatch::Suffix(text.into())),
        Some(MatchType::Presence(_)) => Ok(StringMatch::Presence),
        None => Err(PolicyError::EmptyMatch { field }),
    };
    matches.into_iter().map(text).collect()
}

fn accounts(matches: Vec<proto::ServiceAccountMatch>) -> Vec<ServiceAccountMatch> {
    let account = |message: proto::ServiceAccountMatch| ServiceAccountMatch {
        namespace: message.namespace.into(),
        service_account: message.service_account.into(),
    };
    matches.into_iter().map(account).collect()
}

/// A block that is no block is an error here, while others drop it (Z65): dropping could widen what the policy allows.
fn blocks(field: &'static str, addresses: &[proto::Address]) -> Result<Vec<IpNet>, PolicyError> {
    let block = |message: &proto::Address| {
        let address = ip(field, &message.address)?;
        let mapped = if address.is_ipv4() && message.address.len() == 16 { 96 } else { 0 };
        let length = message.length.checked_sub(mapped).and_then(|bits| u8::try_from(bits).ok());
        length
            .and_then(|bits| IpNet::new(address, bits).ok())
            .map(|net| net.trunc())
            .ok_or_else(|| ValueError::Prefix { field, address, length: message.length }.into())
    };
    addresses.iter().map(block).collect()
}

fn ports(field: &'static str, ports: &[u32]) -> Result<Vec<u16>, PolicyError> {
    ports.iter().map(|port| port_number(field, *port).map_err(PolicyError::from)).collect()
}

fn encode_group(group: &Group) -> proto::Group {
    let rule = |rule: &Rule| proto::Rules { matches: rule.matches.iter().map(encode_match).collect() };
    proto::Group { rules: group.rules.iter().map(rule).collect() }
}

fn encode_match(found: &Match) -> proto::Match {
    proto::Match {
        namespaces: encode_texts(&found.namespaces),
        not_namespaces: encode_texts(&found.not_namespaces),
        principals: encode_texts(&found.principals),
        not_principals: encode_texts(&found.not_principals),
        source_ips: encode_blocks(&found.source_ips),
        not_source_ips: encode_blocks(&found.not_source_ips),
        destination_ips: encode_blocks(&found.destination_ips),
        not_destination_ips: encode_blocks(&found.not_destination_ips),
        destination_ports: found.destination_ports.iter().map(|p| u32::from(*p)).collect(),
        not_destination_ports: found.not_destination_ports.iter().map(|p| u32::from(*p)).collect(),
        service_accounts: encode_accounts(&found.service_accounts),
        not_service_accounts: encode_accounts(&found.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn encode_texts(matches: &[StringMatch]) -> Vec<proto::StringMatch> {
    use proto::string_match::MatchType;
    let owned = |text: &Str| text.to_string();
    let text = |found: &StringMatch| proto::StringMatch {
        match_type: Some(match found {
            StringMatch::Exact(text) => MatchType::Exact(owned(text)),
            StringMatch::Prefix(text) => MatchType::Prefix(owned(text)),
            StringMatch::Suffix(text) => MatchType::Suffix(owned(text)),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    };
    matches.iter().map(text).collect()
}

fn encode_accounts(matches: &[ServiceAccountMatch]) -> Vec<proto::ServiceAccountMatch> {
    let account = |found: &ServiceAccountMatch| proto::ServiceAccountMatch {
        namespace: found.namespace.to_string(),
        service_account: found.service_account.to_string(),
    };
    matches.iter().map(account).collect()
}

fn encode_blocks(blocks: &[IpNet]) -> Vec<proto::Address> {
    let block =
        |net: &IpNet| proto::Address { address: ip_bytes(net.addr()), length: net.prefix_len().into() };
    blocks.iter().map(block).collect()
}
