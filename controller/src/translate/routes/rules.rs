//! The rules of an AuthorizationPolicy as a waypoint takes them: all of them, as they are written.

use culvert_k8s_api::labels;
use culvert_k8s_api::security::{Action, AuthorizationPolicy, Condition, Operation, Rule, Source};
use culvert_k8s_api::values::{IpBlock, Port};
use culvert_proto::waypoint as proto;

/// The message but for its targets.
pub(super) fn policy(policy: &AuthorizationPolicy) -> proto::Policy {
    let (meta, spec) = (&policy.metadata, &policy.spec);
    let action = match spec.action {
        Action::Allow => proto::policy::Action::Allow,
        Action::Deny => proto::policy::Action::Deny,
        Action::Audit => proto::policy::Action::Audit,
        Action::Custom => proto::policy::Action::Custom,
    };
    proto::Policy {
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        action: action.into(),
        provider: spec.provider.as_ref().map(|it| it.name.clone()).unwrap_or_default(),
        dry_run: meta.annotations.get(labels::DRY_RUN).is_some_and(|value| value == "true"),
        targets: Vec::new(),
        rules: spec.rules.iter().map(|it| rule(it, &meta.namespace)).collect(),
    }
}

fn rule(it: &Rule, namespace: &str) -> proto::PolicyRule {
    proto::PolicyRule {
        from: it.from.iter().map(|it| source(&it.source, namespace)).collect(),
        to: it.to.iter().map(|it| operation(&it.operation)).collect(),
        when: it.when.iter().map(|it| condition(it, namespace)).collect(),
    }
}

fn source(it: &Source, namespace: &str) -> proto::Source {
    let blocks = |list: &[IpBlock]| list.iter().map(ToString::to_string).collect();
    proto::Source {
        principals: it.principals.clone(),
        not_principals: it.not_principals.clone(),
        request_principals: it.request_principals.clone(),
        not_request_principals: it.not_request_principals.clone(),
        namespaces: it.namespaces.clone(),
        not_namespaces: it.not_namespaces.clone(),
        service_accounts: accounts(&it.service_accounts, namespace),
        not_service_accounts: accounts(&it.not_service_accounts, namespace),
        ip_blocks: blocks(&it.ip_blocks),
        not_ip_blocks: blocks(&it.not_ip_blocks),
        remote_ip_blocks: blocks(&it.remote_ip_blocks),
        not_remote_ip_blocks: blocks(&it.not_remote_ip_blocks),
    }
}

fn operation(it: &Operation) -> proto::Operation {
    let ports = |list: &[Port]| list.iter().map(|port| port.get().into()).collect();
    proto::Operation {
        hosts: it.hosts.clone(),
        not_hosts: it.not_hosts.clone(),
        ports: ports(&it.ports),
        not_ports: ports(&it.not_ports),
        methods: it.methods.clone(),
        not_methods: it.not_methods.clone(),
        paths: it.paths.clone(),
        not_paths: it.not_paths.clone(),
    }
}

fn condition(it: &Condition, namespace: &str) -> proto::Condition {
    let values = |list: &[String]| {
        if it.key == "source.serviceAccount" { accounts(list, namespace) } else { list.to_vec() }
    };
    proto::Condition { key: it.key.clone(), values: values(&it.values), not_values: values(&it.not_values) }
}

/// `namespace/name`; a name alone is of the policy's own namespace (D36).
fn accounts(values: &[String], own: &str) -> Vec<String> {
    let one = |value: &String| if value.contains('/') { value.clone() } else { format!("{own}/{value}") };
    values.iter().map(one).collect()
}
