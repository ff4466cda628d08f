//! What the fields of a policy must be, beyond their shape. Everything wrong is found, not the first alone.

use super::{
    Action, AuthorizationPolicySpec, Condition, L4_CONDITIONS, Operation, PeerAuthenticationSpec, Rule,
    Selector, Source,
};
use crate::object::Checks;
use crate::values::{IpBlock, Port, is_dns_label, is_dns_subdomain};

impl AuthorizationPolicySpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let targeted = self.target_ref.is_some() || !self.target_refs.is_empty();
        if targeted && self.selector.is_some() {
            checks.fail("spec.selector", "", "cannot stand beside targetRefs", "one of them");
        }
        if self.target_ref.is_some() && !self.target_refs.is_empty() {
            checks.fail("spec.targetRef", "", "cannot stand beside targetRefs", "one of them");
        }
        if (self.action == Action::Custom) != self.provider.is_some() {
            checks.fail("spec.provider", "", "goes with action CUSTOM, and only with it", "");
        }
        for (index, rule) in self.rules.iter().enumerate() {
            rule.check(&format!("spec.rules[{index}]"), checks);
        }
    }
}

impl Rule {
    fn check(&self, path: &str, checks: &mut Checks) {
        for (index, from) in self.from.iter().enumerate() {
            from.source.check(&format!("{path}.from[{index}].source"), checks);
        }
        for (index, to) in self.to.iter().enumerate() {
            if to.operation == Operation::default() {
                checks.fail(
                    format!("{path}.to[{index}].operation"),
                    "",
                    "is empty",
                    "at least one attribute",
                );
            }
        }
        for (index, condition) in self.when.iter().enumerate() {
            condition.check(&format!("{path}.when[{index}]"), checks);
        }
    }
}

impl Source {
    fn check(&self, path: &str, checks: &mut Checks) {
        if *self == Self::default() {
            checks.fail(path, "", "is empty", "at least one attribute");
        }
        let accounts = !(self.service_accounts.is_empty() && self.not_service_accounts.is_empty());
        let others = [&self.principals, &self.not_principals, &self.namespaces, &self.not_namespaces];
        if accounts && others.iter().any(|list| !list.is_empty()) {
            let reason = "cannot stand beside principals or namespaces in one source";
            checks.fail(format!("{path}.serviceAccounts"), "", reason, "");
        }
        let principals = [("principals", &self.principals), ("notPrincipals", &self.not_principals)];
        for (name, value, at) in each(path, &principals) {
            check_principal(name, value, at, checks);
        }
        let patterns = [
            ("namespaces", &self.namespaces),
            ("notNamespaces", &self.not_namespaces),
            ("requestPrincipals", &self.request_principals),
            ("notRequestPrincipals", &self.not_request_principals),
        ];
        for (name, value, at) in each(path, &patterns) {
            check_pattern(name, value, at, checks);
        }
        let accounts =
            [("serviceAccounts", &self.service_accounts), ("notServiceAccounts", &self.not_service_accounts)];
        for (name, value, at) in each(path, &accounts) {
            check_service_account(name, value, at, checks);
        }
    }
}

impl Condition {
    fn check(&self, path: &str, checks: &mut Checks) {
        if self.values.is_empty() && self.not_values.is_empty() {
            checks.fail(path, &self.key, "has neither values nor notValues", "at least one");
        }
        if !known_attribute(&self.key) {
            let expected = "an attribute such as source.ip, source.principal or destination.port";
            checks.fail(format!("{path}.key"), &self.key, "unknown attribute", expected);
            return;
        }
        let lists = [("values", &self.values), ("notValues", &self.not_values)];
        for (name, value, at) in each(path, &lists) {
            match self.key.as_str() {
                "source.ip" | "destination.ip" | "remote.ip" => {
                    if value.parse::<IpBlock>().is_err() {
                        checks.fail(
                            at,
                            value,
                            "invalid value",
                            "an IP address or a network such as 10.0.0.0/8",
                        );
                    }
                }
                "destination.port" => {
                    if value.parse().ok().and_then(Port::new).is_none() {
                        checks.fail(at, value, "invalid value", "a port from 1 to 65535");
                    }
                }
                "source.principal" => check_principal(name, value, at, checks),
                "source.serviceAccount" => check_service_account(name, value, at, checks),
                _ => check_pattern(name, value, at, checks),
            }
        }
    }
}

impl PeerAuthenticationSpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        if self.port_level_mtls.is_empty() {
            return;
        }
        if Selector::labels(self.selector.as_ref()).is_none() {
            checks.fail(
                "spec.portLevelMtls",
                "",
                "needs a selector that names workloads",
                "spec.selector.matchLabels",
            );
        }
        for port in self.port_level_mtls.keys() {
            if port.parse().ok().and_then(Port::new).is_none() {
                checks.fail(
                    format!("spec.portLevelMtls.{port}"),
                    port,
                    "invalid value",
                    "a port from 1 to 65535",
                );
            }
        }
    }
}

fn each<'a>(
    path: &str,
    lists: &[(&'static str, &'a Vec<String>)],
) -> impl Iterator<Item = (&'static str, &'a str, String)> {
    let all = lists.iter().flat_map(|(name, list)| {
        list.iter()
            .enumerate()
            .map(move |(index, value)| (*name, value.as_str(), format!("{path}.{name}[{index}]")))
    });
    all.collect::<Vec<_>>().into_iter()
}

fn check_pattern(_name: &str, value: &str, at: String, checks: &mut Checks) {
    let inner = value.strip_prefix('*').or_else(|| value.strip_suffix('*')).unwrap_or(value);
    if value.is_empty() || inner.contains('*') {
        checks.fail(at, value, "invalid value", "text with at most one *, at its start or its end");
    }
}

fn check_principal(name: &str, value: &str, at: String, checks: &mut Checks) {
    if value.starts_with("spiffe:") {
        // Compared without the scheme (Z61), so that it could never match.
        checks.fail(at, value, "is written without spiffe://", "such as cluster.local/ns/default/sa/client");
    } else {
        check_pattern(name, value, at, checks);
    }
}

fn check_service_account(_name: &str, value: &str, at: String, checks: &mut Checks) {
    let ok = match value.split_once('/') {
        Some((namespace, name)) => is_dns_label(namespace) && is_dns_subdomain(name),
        None => is_dns_subdomain(value),
    };
    if !ok {
        checks.fail(at, value, "invalid value", "name or namespace/name of a service account, without *");
    }
}

fn known_attribute(key: &str) -> bool {
    let exact = [
        "remote.ip",
        "connection.sni",
        "source.trustDomain",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.presenter",
    ];
    let indexed = ["request.headers[", "request.auth.claims[", "experimental.envoy.filters."];
    L4_CONDITIONS.contains(&key)
        || exact.contains(&key)
        || indexed.iter().any(|prefix| key.starts_with(prefix))
}
