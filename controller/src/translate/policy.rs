//! AuthorizationPolicy to `istio.security.Authorization` (D31 to D37).
//!
//! A rule becomes a group: alternatives of a list are matches of one clause, and `from`, `to` and each `when` are clauses
//! that all have to match (Z58). What a node tunnel cannot judge never widens access: an ALLOW rule that names it is left
//! out (D33); of a DENY rule the rest is enforced, and if nothing is left of a clause it matches anything, so that the
//! rule denies more than was written, never less. (Istio lets such a DENY never fire, D34: this is on purpose not that.)

use culvert_k8s_api::labels;
use culvert_k8s_api::meta::{StringMap, selects};
use culvert_k8s_api::security::{Action, AuthorizationPolicy, Condition, Operation, Rule, Selector, Source};
use culvert_k8s_api::values::{IpBlock, Port};
use culvert_proto::security as proto;
use culvert_proto::security::string_match::MatchType;

use super::view::View;
use super::{PolicyStatus, Translation};

/// The selector of every policy that is enforced by name.
#[derive(Default)]
pub(super) struct Selectors {
    /// Namespace (`None`: all), labels, resource name.
    entries: Vec<(Option<String>, StringMap, String)>,
}

/// A value that the loader would have refused. Policies come from other sources too, and none may be skipped.
struct Bad(String);

/// A part of a rule that a node tunnel cannot judge.
struct HasL7;

impl Selectors {
    /// Resource names of the policies that select a workload.
    pub fn selecting(&self, namespace: &str, labels: &StringMap) -> Vec<String> {
        let found = self.entries.iter().filter(|(of, selector, _)| {
            of.as_deref().is_none_or(|of| of == namespace) && selects(selector, labels)
        });
        found.map(|(_, _, name)| name.clone()).collect()
    }
}

/// Converts every policy.
pub(super) fn convert_all(view: &View<'_>, out: &mut Translation) -> Selectors {
    let mut selectors = Selectors::default();
    for policy in view.policies.values() {
        let (message, status) = convert(policy, &view.settings.root_namespace);
        if let Some(message) = message {
            let resource = format!("{}/{}", message.namespace, message.name);
            if message.scope() == proto::Scope::WorkloadSelector
                && let Some(labels) = Selector::labels(policy.spec.selector.as_ref())
            {
                let root = message.namespace == view.settings.root_namespace;
                let namespace = (!root).then(|| message.namespace.clone());
                selectors.entries.push((namespace, labels.clone(), resource.clone()));
            }
            out.policies.insert(resource, message);
        }
        out.policy_status.push(status);
    }
    selectors
}

fn convert(policy: &AuthorizationPolicy, root: &str) -> (Option<proto::Authorization>, PolicyStatus) {
    let (meta, spec) = (&policy.metadata, &policy.spec);
    let mut status = PolicyStatus {
        kind: "AuthorizationPolicy",
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        accepted: false,
        reason: "Accepted",
        message: String::new(),
        resource: None,
        targeted: false,
        waypoints: Vec::new(),
    };
    if spec.target_ref.is_some() || !spec.target_refs.is_empty() {
        // The rest is said by whoever finds the waypoints.
        status.targeted = true;
        return (None, status);
    }
    let action = match spec.action {
        Action::Allow => proto::Action::Allow,
        Action::Deny => proto::Action::Deny,
        Action::Audit | Action::Custom => {
            status.reason = "UnsupportedValue";
            let action = format!("{:?}", spec.action).to_uppercase();
            status.message =
                format!("spec.action: a node tunnel cannot enforce {action}, so it enforces nothing of it");
            return (None, status);
        }
    };
    let selected = Selector::labels(spec.selector.as_ref()).is_some();
    let scope = match (selected, meta.namespace == root) {
        (true, _) => proto::Scope::WorkloadSelector,
        (false, true) => proto::Scope::Global,
        (false, false) => proto::Scope::Namespace,
    };
    let message = proto::Authorization {
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        groups: Vec::new(),
        dry_run: meta.annotations.get(labels::DRY_RUN).is_some_and(|value| value == "true"),
        extensions: Vec::new(),
    };
    status.accepted = true;
    status.resource = Some(format!("{}/{}", meta.namespace, meta.name));
    (Some(rules(message, policy, &mut status)), status)
}

/// Fills in the groups, and says in the status what is not as written.
fn rules(
    mut message: proto::Authorization,
    policy: &AuthorizationPolicy,
    status: &mut PolicyStatus,
) -> proto::Authorization {
    let deny = policy.spec.action == Action::Deny;
    let mut shortened = Vec::new();
    for (index, rule) in policy.spec.rules.iter().enumerate() {
        match group(rule, deny, &policy.metadata.namespace) {
            Ok((group, whole)) => {
                message.groups.extend(group);
                if !whole {
                    shortened.push(format!("spec.rules[{index}]"));
                }
            }
            Err(Bad(value)) => {
                status.reason = "Invalid";
                status.message =
                    format!("spec.rules[{index}]: invalid value {value:?}: everything it selects is denied");
                return deny_all(message);
            }
        }
    }
    if !shortened.is_empty() {
        let (reason, what) = if deny {
            let what =
                "HTTP fields cannot be judged here, so every connection that the rest matches is denied";
            ("Widened", what)
        } else {
            ("Narrowed", "left out, since HTTP fields cannot be judged here: fewer connections are allowed")
        };
        status.reason = reason;
        status.message = format!("{}: {what}", shortened.join(", "));
    }
    message
}

/// One group without a clause matches every connection.
fn deny_all(mut message: proto::Authorization) -> proto::Authorization {
    message.action = proto::Action::Deny.into();
    message.dry_run = false;
    message.groups = vec![anything()];
    message
}

/// A clause without matches matches anything (Z59); written out, since a peer may take a group without clauses another way.
fn anything() -> proto::Group {
    proto::Group { rules: vec![proto::Rules::default()] }
}

/// The group for a rule and whether it says all that the rule said; `None` if the rule is left out.
fn group(rule: &Rule, deny: bool, namespace: &str) -> Result<(Option<proto::Group>, bool), Bad> {
    let mut rules = Vec::new();
    let mut whole = true;
    let from: Result<Vec<_>, Bad> = rule.from.iter().map(|from| source(&from.source, namespace)).collect();
    let to: Vec<_> = rule.to.iter().map(|to| operation(&to.operation)).collect();
    let when: Result<Vec<_>, Bad> = rule
        .when
        .iter()
        .map(|condition| self::condition(condition, namespace).map(|one| vec![one]))
        .collect();
    for alternatives in [from?, to].into_iter().chain(when?) {
        let l7 = alternatives.iter().any(|(_, l7)| l7.is_some());
        whole &= !l7;
        if l7 && !deny {
            return Ok((None, false));
        }
        let matches: Vec<proto::Match> = alternatives.into_iter().map(|(one, _)| one).collect();
        // An alternative of which nothing is left matches anything, and with it the whole clause.
        if !matches.is_empty() && !matches.contains(&proto::Match::default()) {
            rules.push(proto::Rules { matches });
        }
    }
    let group = if rules.is_empty() { anything() } else { proto::Group { rules } };
    Ok((Some(group), whole))
}

fn source(source: &Source, namespace: &str) -> Result<(proto::Match, Option<HasL7>), Bad> {
    let one = proto::Match {
        namespaces: strings(&source.namespaces),
        not_namespaces: strings(&source.not_namespaces),
        principals: strings(&source.principals),
        not_principals: strings(&source.not_principals),
        source_ips: source.ip_blocks.iter().map(block).collect(),
        not_source_ips: source.not_ip_blocks.iter().map(block).collect(),
        service_accounts: accounts(&source.service_accounts, namespace)?,
        not_service_accounts: accounts(&source.not_service_accounts, namespace)?,
        ..proto::Match::default()
    };
    Ok((one, source.has_l7().then_some(HasL7)))
}

fn operation(operation: &Operation) -> (proto::Match, Option<HasL7>) {
    let one = proto::Match {
        destination_ports: operation.ports.iter().map(|port| port.get().into()).collect(),
        not_destination_ports: operation.not_ports.iter().map(|port| port.get().into()).collect(),
        ..proto::Match::default()
    };
    (one, operation.has_l7().then_some(HasL7))
}

fn condition(condition: &Condition, namespace: &str) -> Result<(proto::Match, Option<HasL7>), Bad> {
    let (yes, no) = (&condition.values, &condition.not_values);
    let mut one = proto::Match::default();
    match condition.key.as_str() {
        "source.ip" => (one.source_ips, one.not_source_ips) = (blocks(yes)?, blocks(no)?),
        "source.namespace" => (one.namespaces, one.not_namespaces) = (strings(yes), strings(no)),
        "source.principal" => (one.principals, one.not_principals) = (strings(yes), strings(no)),
        "source.serviceAccount" => {
            (one.service_accounts, one.not_service_accounts) =
                (accounts(yes, namespace)?, accounts(no, namespace)?);
        }
        "destination.ip" => (one.destination_ips, one.not_destination_ips) = (blocks(yes)?, blocks(no)?),
        "destination.port" => (one.destination_ports, one.not_destination_ports) = (ports(yes)?, ports(no)?),
        _ => return Ok((one, Some(HasL7))),
    }
    Ok((one, None))
}

/// `*` any value at all, `*x` and `x*` its end and its beginning, anything else itself.
fn strings(patterns: &[String]) -> Vec<proto::StringMatch> {
    let one = |pattern: &String| {
        let kind = match (pattern.as_str(), pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
            ("*", _, _) => MatchType::Presence(()),
            (_, Some(end), _) => MatchType::Suffix(end.to_owned()),
            (_, _, Some(start)) => MatchType::Prefix(start.to_owned()),
            (exact, None, None) => MatchType::Exact(exact.to_owned()),
        };
        proto::StringMatch { match_type: Some(kind) }
    };
    patterns.iter().map(one).collect()
}

/// `namespace/name`, or a name in the policy's own namespace (D36).
fn accounts(values: &[String], own: &str) -> Result<Vec<proto::ServiceAccountMatch>, Bad> {
    let one = |value: &String| {
        let (namespace, service_account) = value.split_once('/').unwrap_or((own, value));
        if namespace.is_empty() || service_account.is_empty() || service_account.contains('/') {
            return Err(Bad(value.clone()));
        }
        Ok(proto::ServiceAccountMatch {
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
        })
    };
    values.iter().map(one).collect()
}

fn blocks(values: &[String]) -> Result<Vec<proto::Address>, Bad> {
    values
        .iter()
        .map(|text| text.parse().map(|parsed| block(&parsed)).map_err(|()| Bad(text.clone())))
        .collect()
}

fn block(block: &IpBlock) -> proto::Address {
    let address = match block.0.addr() {
        std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
        std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    proto::Address { address, length: block.0.prefix_len().into() }
}

fn ports(values: &[String]) -> Result<Vec<u32>, Bad> {
    let one = |text: &String| {
        let port = text.parse().ok().and_then(Port::new).ok_or_else(|| Bad(text.clone()))?;
        Ok(port.get().into())
    };
    values.iter().map(one).collect()
}
