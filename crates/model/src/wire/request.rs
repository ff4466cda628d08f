//! `culvert.waypoint.v1.Policy` and [`RequestPolicy`].

use culvert_proto::waypoint as proto;
use prost::Message;

mod condition;
mod values;

use super::unknown::{self, UnknownError};
use super::{ValueError, namespaced};
use crate::Str;
use crate::address::NamespacedHostname;
use crate::policy::PolicyKey;
use crate::request::{Action, BadPattern, Condition, RequestPolicy, Rule, Targets, Test};

/// A decoded policy, and what to tell the control plane about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestPolicyResource {
    /// What to enforce. If `error` is set it denies its targets ([`RequestPolicy::undecodable`]).
    pub policy: RequestPolicy,
    /// Why it was not understood: the text of the NACK.
    pub error: Option<RequestPolicyError>,
}

/// Why a policy was not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestPolicyError {
    /// A field or a value that this waypoint does not know.
    #[error(transparent)]
    Unknown(#[from] UnknownError),
    /// The bytes are no such message.
    #[error("not decodable: {0}")]
    Decode(String),
    /// A field's value.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// The resource's name is not `namespace/name`.
    #[error("policy {0:?} is not named namespace/name")]
    ResourceName(String),
    /// The body names another policy.
    #[error("policy {resource:?} holds {found:?}")]
    Name {
        /// The resource's name.
        resource: String,
        /// What the body calls itself.
        found: String,
    },
    /// CUSTOM without a provider, or a provider without CUSTOM.
    #[error("a policy has a provider if its action is CUSTOM, and only then; this one has {0:?}")]
    Provider(String),
    /// An element that asks for nothing would match everything; whoever wrote it meant something by it.
    #[error("rules[{rule}].{part}[{index}] asks for nothing")]
    Nothing {
        /// Which rule, counted from 0.
        rule: usize,
        /// `from`, `to` or `when`.
        part: &'static str,
        /// Which element.
        index: usize,
    },
    /// A key of `when` that is not known, or is of an experimental kind.
    #[error("the condition {0:?} is not supported")]
    Key(String),
    /// A key of `when` without a usable name in its brackets.
    #[error("the condition {0:?} needs a name in brackets, as in request.headers[x-name]")]
    KeyName(String),
    /// A condition on a pseudo-header that another field is there for.
    #[error("the condition {key:?} is not supported: use {instead}")]
    Pseudo {
        /// The key.
        key: String,
        /// What to use.
        instead: &'static str,
    },
    /// An empty text, which nothing could match.
    #[error("{field} has an empty value")]
    Empty {
        /// The field.
        field: Str,
    },
    /// Neither an address nor a block of them.
    #[error("{field} has {value:?}, which is neither an address nor a CIDR block")]
    Block {
        /// The field.
        field: Str,
        /// What it says.
        value: String,
    },
    /// No port.
    #[error("{field} has {value:?}, which is no port between 0 and 65535")]
    Port {
        /// The field.
        field: Str,
        /// What it says.
        value: String,
    },
    /// Not `account` or `namespace/account`, without stars.
    #[error("{field} has {value:?}, which is neither account nor namespace/account")]
    Account {
        /// The field.
        field: Str,
        /// What it says.
        value: String,
    },
    /// A path that no request can have.
    #[error("{field}: {error}")]
    Path {
        /// The field.
        field: Str,
        /// Why.
        error: BadPattern,
    },
}

/// Decodes one policy; there is always one to enforce.
///
/// What is not understood denies: [`RequestPolicy::undecodable`] says why, and the targets are those in the bytes. Where even
/// these cannot be read, or one of them has a field that is not known, it is everything behind the waypoint.
pub fn decode(name: &str, body: &[u8]) -> RequestPolicyResource {
    match parse(name, body) {
        Ok(policy) => RequestPolicyResource { policy, error: None },
        Err(error) => RequestPolicyResource {
            policy: RequestPolicy {
                key: key(name).unwrap_or_else(|| PolicyKey { namespace: "".into(), name: name.into() }),
                action: Action::Deny,
                dry_run: false,
                targets: readable_targets(body).unwrap_or(Targets::All),
                undecodable: Some(error.to_string().into()),
                rules: Vec::new(),
            },
            error: Some(error),
        },
    }
}

fn key(name: &str) -> Option<PolicyKey> {
    let (namespace, name) = name.split_once('/')?;
    let named = !namespace.is_empty() && !name.is_empty();
    named.then(|| PolicyKey { namespace: namespace.into(), name: name.into() })
}

/// The targets, whatever else the message holds. A new kind of target belongs inside of `Target`, where it is noticed.
fn readable_targets(body: &[u8]) -> Result<Targets, RequestPolicyError> {
    let target = |bytes: &[u8]| {
        unknown::check(bytes, &unknown::REQUEST_TARGET)?;
        proto::Target::decode(bytes).map_err(|error| RequestPolicyError::Decode(error.to_string()))
    };
    let messages = unknown::nested_messages(body, 6)?.into_iter().map(target).collect::<Result<_, _>>()?;
    targets(messages)
}

fn parse(name: &str, body: &[u8]) -> Result<RequestPolicy, RequestPolicyError> {
    let key = key(name).ok_or_else(|| RequestPolicyError::ResourceName(name.to_owned()))?;
    unknown::check(body, &unknown::REQUEST_POLICY)?;
    let message =
        proto::Policy::decode(body).map_err(|error| RequestPolicyError::Decode(error.to_string()))?;
    if message.namespace != *key.namespace || message.name != *key.name {
        let found = format!("{}/{}", message.namespace, message.name);
        return Err(RequestPolicyError::Name { resource: name.to_owned(), found });
    }
    let action = action(&message)?;
    let rule = |(index, message)| rule(&key.namespace, index, message);
    let rules = message.rules.into_iter().enumerate().map(rule).collect::<Result<_, _>>()?;
    let targets = targets(message.targets)?;
    Ok(RequestPolicy { key, action, dry_run: message.dry_run, targets, undecodable: None, rules })
}

fn action(message: &proto::Policy) -> Result<Action, RequestPolicyError> {
    use proto::policy::Action as Wire;
    let action = match Wire::try_from(message.action) {
        Ok(Wire::Custom) if !message.provider.is_empty() => {
            return Ok(Action::Custom(message.provider.as_str().into()));
        }
        Ok(Wire::Allow) => Action::Allow,
        Ok(Wire::Deny) => Action::Deny,
        Ok(Wire::Audit) => Action::Audit,
        Ok(Wire::Custom) => return Err(RequestPolicyError::Provider(String::new())),
        Err(_) => return Err(ValueError::Enum { field: "action", value: message.action }.into()),
    };
    if message.provider.is_empty() {
        Ok(action)
    } else {
        Err(RequestPolicyError::Provider(message.provider.clone()))
    }
}

fn targets(messages: Vec<proto::Target>) -> Result<Targets, RequestPolicyError> {
    if messages.is_empty() {
        return Ok(Targets::All);
    }
    let target = |message: proto::Target| -> Result<NamespacedHostname, RequestPolicyError> {
        if message.service_namespace.is_empty() {
            return Err(ValueError::Missing { field: "targets.service_namespace" }.into());
        }
        let name = format!("{}/{}", message.service_namespace, message.service_hostname);
        Ok(namespaced("targets", &name)?)
    };
    Ok(Targets::Services(messages.into_iter().map(target).collect::<Result<_, _>>()?))
}

fn rule(namespace: &Str, rule: usize, message: proto::PolicyRule) -> Result<Rule, RequestPolicyError> {
    let from = message.from.into_iter().map(|message| values::source(namespace, message));
    let to = message.to.into_iter().map(values::operation);
    let when = message.when.into_iter().map(|message| condition::conditions(namespace, message));
    Ok(Rule {
        from: something(rule, "from", from)?,
        to: something(rule, "to", to)?,
        when: something(rule, "when", when)?.into_iter().flatten().collect(),
    })
}

fn something(
    rule: usize,
    part: &'static str,
    elements: impl Iterator<Item = Result<Vec<Condition>, RequestPolicyError>>,
) -> Result<Vec<Vec<Condition>>, RequestPolicyError> {
    let one = |(index, element): (usize, Result<Vec<Condition>, RequestPolicyError>)| {
        let conditions = element?;
        if conditions.is_empty() {
            return Err(RequestPolicyError::Nothing { rule, part, index });
        }
        Ok(conditions)
    };
    elements.enumerate().map(one).collect()
}

/// Adds what a list asks for; a list without values asks for nothing.
fn push<V>(
    conditions: &mut Vec<Condition>,
    name: &str,
    wanted: bool,
    values: Vec<V>,
    test: impl FnOnce(&Str, Vec<V>) -> Result<Test, RequestPolicyError>,
) -> Result<(), RequestPolicyError> {
    if !values.is_empty() {
        let name: Str = if wanted { name.into() } else { format!("not {name}").into() };
        let test = test(&name, values)?;
        conditions.push(Condition { name, wanted, test });
    }
    Ok(())
}
