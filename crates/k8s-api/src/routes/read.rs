//! From a document to a route. Reading never fails: what does not fit is a [`Fault`] of the rule that it stands in.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::filters::{self, PathChange};
use super::values::{HeaderName, Millis, Pattern, is_path, is_value};
use super::{
    BackendRef, Fault, Filter, HttpMatch, HttpRule, ObjectRef, ParentRef, PathMatch, Retry, Route, RouteSpec,
    RouteType, SessionBy, SessionPersistence, StreamRule, TextMatch, ValueMatch,
};
use crate::manifest::de::{Nulls, from_node};
use crate::manifest::tree::{Node, Value, path_key};
use crate::meta::ObjectMeta;
use crate::values::{Port, is_dns_label, is_dns_subdomain};

/// Bounds of lists, as the Gateway API has them: a route costs whoever carries it out no more than they allow.
const RULES: usize = 16;
const MATCHES: usize = 64;
const PARENTS: usize = 32;
const FEW: usize = 16;
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
struct Reader {
    faults: Vec<Fault>,
}

/// A reference, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRef {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawParent {
    group: Option<String>,
    kind: Option<String>,
    namespace: Option<String>,
    name: String,
    section_name: Option<String>,
    port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawValue {
    #[serde(rename = "type", default)]
    type_: Matching,
    name: HeaderName,
    value: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
enum Matching {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPathMatch {
    #[serde(rename = "type", default)]
    type_: PathMatching,
    #[serde(default = "root")]
    value: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
enum PathMatching {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMethod {
    #[serde(rename = "type", default)]
    type_: Matching,
    service: Option<String>,
    method: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawTimeouts {
    request: Option<Millis>,
    backend_request: Option<Millis>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRetry {
    codes: Vec<u16>,
    attempts: Option<u32>,
    backoff: Option<Millis>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawSession {
    #[serde(rename = "type")]
    type_: RawSessionType,
    absolute_timeout: Option<Millis>,
    idle_timeout: Option<Millis>,
    session_name: Option<HeaderName>,
    cookie: Option<RawCookie>,
    header: Option<RawSessionHeader>,
    #[serde(rename = "cookieConfig")]
    cookie_config: Option<RawCookie>,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
enum RawSessionType {
    #[default]
    Cookie,
    Header,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct RawCookie {
    lifetime_type: RawLifetime,
    name: Option<HeaderName>,
    path: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSessionHeader {
    name: HeaderName,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
enum RawLifetime {
    Permanent,
    #[default]
    Session,
}

fn root() -> String {
    "/".to_owned()
}

impl RawRef {
    /// `kind` if none is written.
    pub fn object(self, kind: &str) -> ObjectRef {
        ObjectRef {
            group: self.group.unwrap_or_default(),
            kind: self.kind.unwrap_or_else(|| kind.to_owned()),
            namespace: self.namespace,
            name: self.name,
            port: self.port,
        }
    }
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

    /// Part by part: what cannot be read is left out, so that the match is wider.
    fn http_match(&mut self, path: &str, node: &Node) -> HttpMatch {
        self.known(path, node, &["path", "method", "headers", "queryParams"]);
        HttpMatch {
            path: node.get("path").and_then(|node| self.path_match(&format!("{path}.path"), node)),
            method: node.get("method").and_then(|node| self.method(&format!("{path}.method"), node)),
            headers: self.values(path, "headers", node),
            query_params: self.values(path, "queryParams", node),
        }
    }

    fn grpc_match(&mut self, path: &str, node: &Node) -> HttpMatch {
        self.known(path, node, &["method", "headers"]);
        let at = format!("{path}.method");
        let method = node.get("method").and_then(|node| self.grpc_method(&at, node));
        HttpMatch { path: method, headers: self.values(path, "headers", node), ..HttpMatch::default() }
    }

    fn grpc_method(&mut self, path: &str, node: &Node) -> Option<PathMatch> {
        let raw = self.take::<RawMethod>(path, node)?;
        let regex = matches!(raw.type_, Matching::RegularExpression);
        // A name of protobuf's, with its package: `/` would reach into the other part.
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.');
        let given = [("service", &raw.service), ("method", &raw.method)];
        for (field, value) in given {
            let Some(value) = value else { continue };
            if value.is_empty() || value.len() > 1024 || !regex && !plain(value) {
                let expected = "at most 1024 letters, digits, _ and .";
                self.wrong(node, &format!("{path}.{field}"), value, "invalid value", expected);
                return None;
            }
        }
        if raw.service.is_none() && raw.method.is_none() {
            self.wrong(node, path, "", "has neither service nor method", "at least one");
            return None;
        }
        Some(PathMatch::Grpc { service: raw.service, method: raw.method, regex })
    }

    fn path_match(&mut self, path: &str, node: &Node) -> Option<PathMatch> {
        let raw = self.take::<RawPathMatch>(path, node)?;
        let regex = matches!(raw.type_, PathMatching::RegularExpression);
        let good = if regex { !raw.value.is_empty() && raw.value.len() <= 1024 } else { is_path(&raw.value) };
        if !good {
            let expected = if regex {
                "a regular expression of at most 1024 characters"
            } else {
                "a path that begins with /, without // and parts of dots"
            };
            self.wrong(node, &format!("{path}.value"), &raw.value, "invalid value", expected);
            return None;
        }
        Some(match raw.type_ {
            PathMatching::Exact => PathMatch::Exact(raw.value),
            PathMatching::PathPrefix => PathMatch::Prefix(raw.value),
            PathMatching::RegularExpression => PathMatch::Regex(Pattern(raw.value)),
        })
    }

    fn method(&mut self, path: &str, node: &Node) -> Option<String> {
        const METHODS: [&str; 9] =
            ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];
        let method = self.take::<String>(path, node)?;
        if METHODS.contains(&method.as_str()) {
            return Some(method);
        }
        self.wrong(node, path, &method, "unknown value", &format!("one of {}", METHODS.join(", ")));
        None
    }

    fn values(&mut self, path: &str, field: &str, node: &Node) -> Vec<ValueMatch> {
        let list = self.list(&format!("{path}.{field}"), node.get(field), FEW);
        let mut all: Vec<ValueMatch> = Vec::new();
        for (path, node) in list {
            let Some(raw) = self.take::<RawValue>(&path, node) else { continue };
            let header = field == "headers";
            // Of several with one name the first counts: that is what the Gateway API says.
            let same =
                |name: &str| if header { name.eq_ignore_ascii_case(&raw.name.0) } else { name == raw.name.0 };
            if all.iter().any(|it| same(&it.name)) {
                continue;
            }
            let (regex, text) = (matches!(raw.type_, Matching::RegularExpression), raw.value);
            let good =
                if header && !regex { is_value(&text) } else { !text.is_empty() && text.len() <= 4096 };
            if good {
                let value = if regex { TextMatch::Regex(Pattern(text)) } else { TextMatch::Exact(text) };
                all.push(ValueMatch { name: raw.name.0, value });
            } else {
                let expected = "1 to 4096 printable characters, no blank at either end";
                self.wrong(node, &format!("{path}.value"), &text, "invalid value", expected);
            }
        }
        all
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

    fn retry(&mut self, path: &str, node: &Node) -> Option<Retry> {
        let raw = self.take::<RawRetry>(path, node)?;
        if let Some(bad) = raw.codes.iter().find(|code| !(400..600).contains(*code)) {
            self.wrong(node, &format!("{path}.codes"), &bad.to_string(), "invalid value", "400 to 599");
        }
        if raw.codes.len() > 200 {
            self.wrong(node, &format!("{path}.codes"), "", "has more than 200", "");
        }
        // More than that is no retry but a load of its own.
        if let Some(bad) = raw.attempts.filter(|attempts| *attempts > 100) {
            self.wrong(node, &format!("{path}.attempts"), &bad.to_string(), "invalid value", "at most 100");
        }
        Some(Retry { codes: raw.codes, attempts: raw.attempts, backoff: raw.backoff })
    }

    fn session(&mut self, path: &str, node: &Node) -> Option<SessionPersistence> {
        let raw = self.take::<RawSession>(path, node)?;
        let header = raw.type_ == RawSessionType::Header;
        let cookie = raw.cookie.or(raw.cookie_config).unwrap_or_default();
        if cookie.path.as_deref().is_some_and(|it| it != "/") {
            let reason = "is not carried out: the cookie is for every path";
            self.wrong(
                node,
                &format!("{path}.cookie.path"),
                cookie.path.as_deref().unwrap_or_default(),
                reason,
                "/",
            );
        }
        let permanent = cookie.lifetime_type == RawLifetime::Permanent;
        if permanent && raw.absolute_timeout.is_none() {
            let field = format!("{path}.absoluteTimeout");
            self.wrong(node, &field, "", "is required with a permanent cookie", "a time");
        }
        let name = if header { raw.header.map(|it| it.name) } else { cookie.name };
        let name = name.or(raw.session_name).map(|it| it.0);
        if header && name.is_none() {
            self.wrong(node, &format!("{path}.header"), "", "is required with type Header", "a name");
        }
        Some(SessionPersistence {
            by: if header { SessionBy::Header } else { SessionBy::Cookie },
            name: name.unwrap_or_default(),
            absolute_timeout: raw.absolute_timeout,
            idle_timeout: raw.idle_timeout,
            permanent,
        })
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

    fn take<T: DeserializeOwned>(&mut self, path: &str, node: &Node) -> Option<T> {
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

    fn known(&mut self, path: &str, node: &Node, known: &[&str]) {
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
    fn list<'n>(&mut self, path: &str, node: Option<&'n Node>, most: usize) -> Vec<(String, &'n Node)> {
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

    fn wrong(&mut self, node: &Node, field: &str, value: &str, reason: &str, expected: &str) {
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
