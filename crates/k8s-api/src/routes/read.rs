//! From a document to a route. Reading never fails: what does not fit is a [`Fault`] of the rule that it stands in.

use serde::de::DeserializeOwned;

use super::filters::{self, PathChange};
use super::raw::{RawParent, RawRef, RawTimeouts};
use super::values::Millis;
use super::{
    BackendRef, Fault, Filter, HttpRule, ParentRef, PathMatch, Route, RouteSpec, RouteType, StreamRule,
};
use crate::manifest::de::{Nulls, from_node};
use crate::manifest::tree::{Node, Value, path_key};
use crate::meta::ObjectMeta;
use crate::values::{is_dns_label, is_dns_subdomain};

/// Bounds of lists, as the Gateway API has them: a route costs whoever carries it out no more than they allow.
const RULES: usize = 16;
const MATCHES: usize = 64;
const PARENTS: usize = 32;
pub(super) const FEW: usize = 16;
pub(super) const ONE_IN: usize = 64;
const HOSTS: usize = 1024;
const MAX_WEIGHT: u32 = 1_000_000;

/// Reads a document of one of these kinds.
pub(crate) fn read(of: RouteType, metadata: ObjectMeta, document: &Node) -> Route {
    let mut reader = Reader::default();
    let mut spec = RouteSpec::default();
    match document.get("spec") {
        Some(node) => reader.spec(of, node, &mut spec),
        None => reader.wrong(document, "spec", "", "is required", "a map"),
    }
    spec.faults = reader.faults;
    Route { of, metadata, spec }
}

#[derive(Default)]
pub(super) struct Reader {
    faults: Vec<Fault>,
}

impl Reader {
    fn spec(&mut self, of: RouteType, node: &Node, spec: &mut RouteSpec) {
        self.known("spec", node, &["parentRefs", "hostnames", "rules"]);
        for (path, node) in self.list("spec.parentRefs", node.get("parentRefs"), PARENTS) {
            let parent = self.take::<RawParent>(&path, node).map(|raw| ParentRef {
                group: raw.group.unwrap_or_else(|| super::GROUP.to_owned()),
                kind: raw.kind.unwrap_or_else(|| "Gateway".to_owned()),
                namespace: raw.namespace,
                name: raw.name,
                section_name: raw.section_name,
                port: raw.port,
            });
            spec.parents
                .extend(parent.filter(|it| self.named(&path, node, &it.name, it.namespace.as_deref())));
        }
        for (path, node) in self.list("spec.hostnames", node.get("hostnames"), HOSTS) {
            let Some(host) = self.take::<String>(&path, node) else { continue };
            if is_dns_subdomain(host.strip_prefix("*.").unwrap_or(&host)) {
                spec.hostnames.push(host);
            } else {
                self.wrong(node, &path, &host, "invalid value", "a DNS name, or *. and a DNS name");
            }
        }
        // What is wrong with a rule is the rule's own.
        let outside = std::mem::take(&mut self.faults);
        let http = matches!(of, RouteType::Http | RouteType::Grpc);
        let rules = self.list("spec.rules", node.get("rules"), RULES);
        let of_list = std::mem::replace(&mut self.faults, outside);
        self.faults.extend(of_list);
        let none = rules.is_empty();
        for (path, node) in rules {
            let mut own = Self::default();
            if http {
                let mut rule = own.http_rule(of, &path, node);
                rule.faults = own.faults;
                spec.http.push(rule);
            } else {
                let mut rule = own.stream_rule(&path, node);
                rule.faults = own.faults;
                spec.streams.push(rule);
            }
        }
        if none && of == RouteType::Http {
            // What the API server fills in.
            spec.http.push(HttpRule::default());
        }
    }

    fn http_rule(&mut self, of: RouteType, path: &str, node: &Node) -> HttpRule {
        const HTTP: &[&str] =
            &["name", "matches", "filters", "backendRefs", "timeouts", "retry", "sessionPersistence"];
        const GRPC: &[&str] = &["name", "matches", "filters", "backendRefs", "sessionPersistence"];
        self.known(path, node, if of == RouteType::Http { HTTP } else { GRPC });
        let at = |field: &str| format!("{path}.{field}");
        let mut rule = HttpRule { name: self.name(path, node), ..HttpRule::default() };
        for (path, node) in self.list(&at("matches"), node.get("matches"), MATCHES) {
            rule.matches.push(match of {
                RouteType::Http => self.http_match(&path, node),
                _ => self.grpc_match(&path, node),
            });
        }
        rule.filters = self.filters(of, &at("filters"), node.get("filters"));
        rule.backends = self.backends(Some(of), path, node);
        if let Some(node) = node.get("timeouts") {
            let times = self.take::<RawTimeouts>(&at("timeouts"), node).unwrap_or_default();
            (rule.request_timeout, rule.backend_timeout) = (times.request, times.backend_request);
            let longer = |whole: Millis, each: Millis| whole.0 != 0 && each > whole;
            if times.request.zip(times.backend_request).is_some_and(|(whole, each)| longer(whole, each)) {
                let field = at("timeouts.backendRequest");
                self.wrong(
                    node,
                    &field,
                    "",
                    "is longer than that of the request",
                    "at most timeouts.request",
                );
            }
        }
        rule.retry = node.get("retry").and_then(|node| self.retry(&at("retry"), node));
        let session = node.get("sessionPersistence");
        rule.session = session.and_then(|node| self.session(&at("sessionPersistence"), node));
        self.consistent(path, node, &rule);
        rule
    }

    fn stream_rule(&mut self, path: &str, node: &Node) -> StreamRule {
        self.known(path, node, &["name", "backendRefs"]);
        let rule = StreamRule {
            name: self.name(path, node),
            backends: self.backends(None, path, node),
            faults: Vec::new(),
        };
        if rule.backends.is_empty() && self.faults.is_empty() {
            self.wrong(node, &format!("{path}.backendRefs"), "", "is required", "at least one");
        }
        rule
    }

    fn name(&mut self, path: &str, node: &Node) -> Option<String> {
        let (path, node) = (format!("{path}.name"), node.get("name")?);
        let name = self.take::<String>(&path, node)?;
        if is_dns_subdomain(&name) {
            return Some(name);
        }
        self.wrong(node, &path, &name, "invalid name", "lower case letters, digits, - and .");
        None
    }

    /// Filters that do not go together, or not with what else the rule says.
    fn consistent(&mut self, path: &str, node: &Node, rule: &HttpRule) {
        let prefix = rule.matches.iter().all(|it| matches!(it.path, None | Some(PathMatch::Prefix(_))));
        let lists = std::iter::once((format!("{path}.filters"), &rule.filters)).chain(
            rule.backends
                .iter()
                .enumerate()
                .map(|(index, it)| (format!("{path}.backendRefs[{index}].filters"), &it.filters)),
        );
        for (path, filters) in lists {
            let count = |is: fn(&Filter) -> bool| filters.iter().filter(|it| is(it)).count();
            let once = [
                count(|it| matches!(it, Filter::RequestHeaders(_))),
                count(|it| matches!(it, Filter::ResponseHeaders(_))),
                count(|it| matches!(it, Filter::Redirect(_))),
                count(|it| matches!(it, Filter::Rewrite(_))),
                count(|it| matches!(it, Filter::Cors(_))),
            ];
            if once.iter().any(|count| *count > 1) {
                self.wrong(node, &path, "", "has a filter twice that may be there once", "");
            }
            if once[2] > 0 && once[3] > 0 {
                self.wrong(node, &path, "", "has RequestRedirect beside URLRewrite", "one of them");
            }
            let replaces = |it: &Filter| match it {
                Filter::Redirect(it) => matches!(it.path, Some(PathChange::Prefix(_))),
                Filter::Rewrite(it) => matches!(it.path, Some(PathChange::Prefix(_))),
                _ => false,
            };
            if !prefix && filters.iter().any(replaces) {
                let reason = "replaces a prefix, and not every match of the rule is of a prefix";
                self.wrong(node, &path, "", reason, "matches of type PathPrefix alone");
            }
        }
        let redirects = rule.filters.iter().any(|it| matches!(it, Filter::Redirect(_)));
        if redirects && !rule.backends.is_empty() {
            let field = format!("{path}.backendRefs");
            self.wrong(node, &field, "", "stand beside a redirect, so nothing would go there", "none");
        }
    }

    fn filters(&mut self, of: RouteType, path: &str, node: Option<&Node>) -> Vec<Filter> {
        let mut all = Vec::new();
        for (path, node) in self.list(path, node, FEW) {
            let Some(raw) = self.take::<filters::Raw>(&path, node) else { continue };
            match raw.filter() {
                Ok(Filter::Redirect(_) | Filter::Rewrite(_) | Filter::Cors(_)) if of == RouteType::Grpc => {
                    let expected =
                        "RequestHeaderModifier, ResponseHeaderModifier, RequestMirror or ExtensionRef";
                    self.wrong(node, &format!("{path}.type"), "", "is no filter of a GRPCRoute", expected);
                }
                Ok(filter) => all.push(filter),
                Err((field, value, reason, expected)) => {
                    self.wrong(node, &format!("{path}.{field}"), &value, &reason, expected);
                }
            }
        }
        all
    }

    /// `of` says which filters a backend may have; without it none.
    fn backends(&mut self, of: Option<RouteType>, path: &str, rule: &Node) -> Vec<BackendRef> {
        let mut all = Vec::new();
        for (path, node) in self.list(&format!("{path}.backendRefs"), rule.get("backendRefs"), FEW) {
            let mut plain = node.clone();
            let mut weight = 1;
            if let Some(node) = node.get("weight") {
                weight = self.take::<u32>(&format!("{path}.weight"), node).unwrap_or(0);
                if weight > MAX_WEIGHT {
                    let value = weight.to_string();
                    self.wrong(node, &format!("{path}.weight"), &value, "invalid value", "0 to 1000000");
                }
            }
            let filters = match of {
                Some(of) => self.filters(of, &format!("{path}.filters"), node.get("filters")),
                None => Vec::new(),
            };
            // The rest is a reference.
            if let Value::Map(entries) = &mut plain.value {
                entries.retain(|(key, _)| key != "weight" && !(of.is_some() && key == "filters"));
            }
            let Some(raw) = self.take::<RawRef>(&path, &plain) else { continue };
            let target = raw.object("Service");
            if self.named(&path, node, &target.name, target.namespace.as_deref()) {
                all.push(BackendRef { target, weight, filters });
            }
        }
        all
    }

    /// Whether these can be names at all: they become part of a host name and of a resource's name.
    fn named(&mut self, path: &str, node: &Node, name: &str, namespace: Option<&str>) -> bool {
        let good = is_dns_subdomain(name);
        if !good {
            self.wrong(node, &format!("{path}.name"), name, "invalid name", "the name of an object");
        }
        let of_namespace = namespace.is_none_or(is_dns_label);
        if !of_namespace {
            let namespace = namespace.unwrap_or_default();
            self.wrong(
                node,
                &format!("{path}.namespace"),
                namespace,
                "invalid name",
                "the name of a namespace",
            );
        }
        good && of_namespace
    }

    pub fn take<T: DeserializeOwned>(&mut self, path: &str, node: &Node) -> Option<T> {
        match from_node(node, Nulls::Absent) {
            Ok(read) => Some(read),
            Err(error) => {
                let inner = error.field();
                let dot = if inner.is_empty() || inner.starts_with('[') { "" } else { "." };
                self.faults.push(Fault {
                    line: error.line,
                    field: format!("{path}{dot}{inner}"),
                    value: clip(&error.value),
                    reason: error.reason,
                    expected: error.expected,
                });
                None
            }
        }
    }

    pub fn known(&mut self, path: &str, node: &Node, known: &[&str]) {
        let Value::Map(entries) = &node.value else {
            return self.wrong(node, path, "", "is no map", "a map");
        };
        for (key, value) in entries {
            if value.value != Value::Null && !known.contains(&key.as_str()) {
                let expected = format!("one of {}", known.join(", "));
                self.wrong(value, &format!("{path}.{}", path_key(key)), "", "unknown field", &expected);
            }
        }
    }

    /// The items of a list with their paths, at most `most` of them.
    pub fn list<'n>(&mut self, path: &str, node: Option<&'n Node>, most: usize) -> Vec<(String, &'n Node)> {
        let Some(node) = node else { return Vec::new() };
        let items = match &node.value {
            Value::Seq(items) => items.as_slice(),
            Value::Null => &[],
            _ => {
                self.wrong(node, path, "", "is no list", "a list");
                &[]
            }
        };
        if items.len() > most {
            self.wrong(node, path, "", &format!("has {} items", items.len()), &format!("at most {most}"));
        }
        let item = |(index, node)| (format!("{path}[{index}]"), node);
        items.iter().take(most).enumerate().map(item).collect()
    }

    pub fn wrong(&mut self, node: &Node, field: &str, value: &str, reason: &str, expected: &str) {
        self.faults.push(Fault {
            line: node.line,
            field: field.to_owned(),
            value: clip(value),
            reason: reason.to_owned(),
            expected: expected.to_owned(),
        });
    }
}

/// A value is quoted to find it; a page of text would hide it.
fn clip(text: &str) -> String {
    text.chars().take(120).collect()
}
