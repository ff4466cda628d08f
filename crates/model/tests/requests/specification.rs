//! The specification of AuthorizationPolicies, written down once more: from the meaning of each field as a person writes it,
//! simply and slowly, and without a line of the engine's.

use std::collections::BTreeSet;
use std::net::IpAddr;

use culvert_proto::waypoint as proto;
use proto::policy::Action;
use serde_json::Value;

use crate::generate::{PATH_PATTERNS, PATHS};
use crate::world::{Http, Request, service};

/// What comes of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: Verdict,
    pub audit: BTreeSet<String>,
    /// `WOULD NAME`.
    pub dry_run: BTreeSet<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// By a policy that is not understood.
    Broken,
    Ask(BTreeSet<String>),
    DeniedBy(String),
    NoneAllows,
    AllowedBy(String),
    NoAllow,
}

/// `sure`: only what holds however the request is read counts, as for ALLOW; else whatever may hold.
#[derive(Clone, Copy)]
struct Reader<'a> {
    request: &'a Request,
    sure: bool,
}

pub fn outcome(policies: &[proto::Policy], request: &Request) -> Outcome {
    let ours = service();
    let is_ours =
        |t: &proto::Target| t.service_namespace == *ours.namespace && t.service_hostname == *ours.hostname;
    let applies = |p: &&proto::Policy| p.targets.is_empty() || p.targets.iter().any(is_ours);
    let policies: Vec<&proto::Policy> = policies.iter().filter(applies).collect();
    let mut out = Outcome { verdict: Verdict::Broken, audit: BTreeSet::new(), dry_run: BTreeSet::new() };
    if policies.iter().any(|p| is_broken(p)) {
        return out;
    }
    let of = |action: Action, dry_run: bool| {
        policies.iter().copied().filter(move |p| p.action() == action && p.dry_run == dry_run)
    };
    let matches = |p: &proto::Policy| {
        let reader = Reader { request, sure: p.action() == Action::Allow };
        p.rules.iter().any(|rule| reader.rule(&p.namespace, rule))
    };
    let asked: BTreeSet<String> =
        of(Action::Custom, false).filter(|p| matches(p)).map(|p| p.provider.clone()).collect();
    if !asked.is_empty() {
        out.verdict = Verdict::Ask(asked);
        return out;
    }
    out.audit = of(Action::Audit, false).filter(|p| matches(p)).map(|p| p.name.clone()).collect();
    for (action, would) in [(Action::Deny, "deny"), (Action::Audit, "audit"), (Action::Custom, "ask")] {
        out.dry_run.extend(of(action, true).filter(|p| matches(p)).map(|p| format!("{would} {}", p.name)));
    }
    if let Some(denying) = of(Action::Deny, false).find(|p| matches(p)) {
        out.verdict = Verdict::DeniedBy(denying.name.clone());
        return out;
    }
    let trial: Vec<String> =
        of(Action::Allow, true).filter(|p| matches(p)).map(|p| format!("allow {}", p.name)).collect();
    out.verdict = match of(Action::Allow, false).find(|p| matches(p)) {
        Some(allowing) => Verdict::AllowedBy(allowing.name.clone()),
        None if of(Action::Allow, false).next().is_some() => Verdict::NoneAllows,
        None => {
            if let (true, Some(first)) = (trial.is_empty(), of(Action::Allow, true).next()) {
                out.dry_run.insert(format!("deny {}", first.name));
            }
            Verdict::NoAllow
        }
    };
    out.dry_run.extend(trial);
    out
}

/// What the generator makes wrong.
fn is_broken(policy: &proto::Policy) -> bool {
    policy.rules.iter().any(|rule| {
        rule.from.iter().any(|source| *source == proto::Source::default())
            || rule.when.iter().any(|condition| condition.key.starts_with("experimental."))
    })
}

/// `*`, `x*`, `*x`, or the whole.
fn like(pattern: &str, text: &str) -> bool {
    match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
        (Some(end), _) => text.ends_with(end),
        (None, Some(start)) => text.starts_with(start),
        (None, None) => text == pattern,
    }
}

impl Reader<'_> {
    fn rule(self, own: &str, rule: &proto::PolicyRule) -> bool {
        (rule.from.is_empty() || rule.from.iter().any(|source| self.source(own, source)))
            && (rule.to.is_empty() || rule.to.iter().any(|operation| self.operation(operation)))
            && rule.when.iter().all(|condition| self.condition(own, condition))
    }

    /// Two lists about one thing: one of the wanted values if there are any, and none of the others. `any` says whether any
    /// of the values is the request's, surely or perhaps.
    fn lists<T>(self, wanted: &[T], others: &[T], any: impl Fn(&[T], bool) -> bool) -> bool {
        (wanted.is_empty() || any(wanted, self.sure)) && (others.is_empty() || !any(others, !self.sure))
    }

    fn source(self, own: &str, s: &proto::Source) -> bool {
        let r = self.request;
        self.lists(&s.principals, &s.not_principals, |v, _| self.principal(v))
            && self.lists(&s.request_principals, &s.not_request_principals, |v, sure| self.token(v, sure))
            && self.lists(&s.namespaces, &s.not_namespaces, |v, _| self.namespace(v))
            && self.lists(&s.service_accounts, &s.not_service_accounts, |v, _| self.account(own, v))
            && self.lists(&s.ip_blocks, &s.not_ip_blocks, |v, sure| address(v, r.source, sure))
            && self.lists(&s.remote_ip_blocks, &s.not_remote_ip_blocks, |v, sure| address(v, r.remote, sure))
    }

    fn operation(self, o: &proto::Operation) -> bool {
        let port = u32::from(self.request.destination.port());
        self.lists(&o.hosts, &o.not_hosts, |v, sure| self.host(v, sure))
            && self.lists(&o.ports, &o.not_ports, |v, _| v.contains(&port))
            && self.lists(&o.methods, &o.not_methods, |v, sure| self.method(v, sure))
            && self.lists(&o.paths, &o.not_paths, |v, sure| self.path(v, sure))
    }

    fn condition(self, own: &str, c: &proto::Condition) -> bool {
        let r = self.request;
        self.lists(&c.values, &c.not_values, |v, sure| match c.key.as_str() {
            "source.ip" => address(v, r.source, sure),
            "remote.ip" => address(v, r.remote, sure),
            "destination.ip" => address(v, Some(r.destination.ip()), sure),
            "destination.port" => v.contains(&r.destination.port().to_string()),
            "source.namespace" => self.namespace(v),
            "source.serviceAccount" => self.account(own, v),
            "source.trustDomain" => {
                r.identity.as_ref().is_some_and(|i| v.iter().any(|p| like(p, i.trust_domain())))
            }
            "source.principal" => self.principal(v),
            "request.auth.principal" => self.token(v, sure),
            "request.auth.audiences" => self.claim("/aud", v, sure),
            "request.auth.presenter" => self.claim("/azp", v, sure),
            "request.auth.claims[groups]" => self.claim("/groups", v, sure),
            "request.auth.claims[realm][roles]" => self.claim("/realm/roles", v, sure),
            "request.auth.claims[realm]" => self.claim("/realm", v, sure),
            // A stream without a known name may have any, and surely has none.
            "connection.sni" => match r.server_name.as_ref().filter(|name| !name.is_empty()) {
                None => r.http.is_none() && !sure,
                Some(name) => v.iter().any(|pattern| like(&pattern.to_lowercase(), &name.to_lowercase())),
            },
            "request.headers[X-A]" => self.header("x-a", v, sure),
            "request.headers[x-b]" => self.header("x-b", v, sure),
            "request.headers[Cookie]" => self.header("cookie", v, sure),
            "request.headers[host]" => self.host(v, sure),
            "request.headers[:method]" => self.method(v, sure),
            other => panic!("the generator made the key {other}"),
        })
    }

    /// What is not HTTP may be whatever one fears, and is surely nothing.
    fn http(self, sure: bool, test: impl FnOnce(&Http) -> bool) -> bool {
        self.request.http.as_ref().map_or(!sure, test)
    }

    fn principal(self, values: &[String]) -> bool {
        let Some(identity) = &self.request.identity else { return false };
        let principal = identity.to_string().replace("spiffe://", "");
        values.iter().any(|pattern| like(&pattern.replace("spiffe://", ""), &principal))
    }

    fn namespace(self, values: &[String]) -> bool {
        let Some(identity) = &self.request.identity else { return false };
        let namespace = &**identity.namespace();
        // The only pattern with a star inside that the generator makes.
        let inside = |text: &str| text.len() > 1 && text.starts_with('a') && text.ends_with('b');
        values.iter().any(|p| if p == "a*b" { inside(namespace) } else { like(p, namespace) })
    }

    fn account(self, own: &str, values: &[String]) -> bool {
        let Some(identity) = &self.request.identity else { return false };
        let full =
            |value: &String| if value.contains('/') { value.clone() } else { format!("{own}/{value}") };
        let account = format!("{}/{}", identity.namespace(), identity.service_account());
        values.iter().any(|value| full(value) == account)
    }

    fn method(self, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| values.iter().any(|pattern| like(pattern, &http.method)))
    }

    /// Surely, as it was sent; perhaps, also without its port and last dot.
    fn host(self, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| {
            let Some(sent) = http.authority.as_ref().map(|authority| authority.as_str()) else {
                return false;
            };
            let bare = sent.split(':').next().unwrap().trim_end_matches('.');
            let any = |host: &str| values.iter().any(|pattern| like(&pattern.to_lowercase(), host));
            any(sent) || (!sure && any(bare))
        })
    }

    fn path(self, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| {
            let path = PATHS.iter().find(|(_, path)| *path == http.path.path()).unwrap().1;
            values.iter().any(|written| {
                let meant = PATH_PATTERNS.iter().find(|(pattern, _)| pattern == written).unwrap().1;
                if meant.contains('{') { template(meant, path) } else { like(meant, path) }
            })
        })
    }

    fn header(self, name: &str, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| {
            let named = http.headers.0.iter().filter(|(found, _)| found == name);
            let lines: Vec<&str> = named.map(|(_, value)| value.as_str()).collect();
            if lines.is_empty() {
                return false;
            }
            let joined = |separator: &str| lines.join(separator);
            let mut readings: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
            match (name, lines.len()) {
                ("cookie", _) => readings = vec![joined("; ")],
                (_, 1) => {}
                _ => readings.extend([joined(","), joined(", ")]),
            }
            let any = |reading: &String| values.iter().any(|pattern| like(pattern, reading));
            if sure { readings.iter().all(any) } else { readings.iter().any(any) }
        })
    }

    fn claim(self, pointer: &str, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| {
            let Some(claim) = http.claims.as_ref().and_then(|claims| claims.pointer(pointer)) else {
                return false;
            };
            let items = claim.as_array().cloned().unwrap_or_else(|| vec![claim.clone()]);
            let texts = items.iter().filter_map(|item| match item {
                Value::String(text) => Some(text.clone()),
                Value::Number(_) | Value::Bool(_) => Some(item.to_string()),
                Value::Null | Value::Array(_) | Value::Object(_) => None,
            });
            texts.filter(|text| !text.is_empty()).any(|text| values.iter().any(|p| like(p, &text)))
        })
    }

    /// `issuer/subject`. A subject with a slash is surely only what no other issuer could be taken for.
    fn token(self, values: &[String], sure: bool) -> bool {
        self.http(sure, |http| {
            let text = |name: &str| http.claims.as_ref()?.get(name)?.as_str().filter(|text| !text.is_empty());
            let (Some(issuer), Some(subject)) = (text("iss"), text("sub")) else { return false };
            values.iter().any(|pattern| {
                let plausible = like(pattern, &format!("{issuer}/{subject}"));
                let no_other = match (pattern.strip_prefix('*'), pattern.strip_suffix('*')) {
                    (Some(end), _) => !end.contains('/'),
                    (None, Some(start)) => {
                        start.len() <= issuer.len() || start.rsplit_once('/').unwrap().0 == issuer
                    }
                    (None, None) => false,
                };
                plausible && (!sure || !subject.contains('/') || no_other)
            })
        })
    }
}

fn template(pattern: &str, path: &str) -> bool {
    if let Some(rest) = pattern.strip_prefix("{**}") {
        return (0..=path.len()).any(|cut| template(rest, &path[cut..]));
    }
    if let Some(rest) = pattern.strip_prefix("{*}") {
        return (1..=path.len()).any(|cut| !path[..cut].contains('/') && template(rest, &path[cut..]));
    }
    match (pattern.chars().next(), path.chars().next()) {
        (None, None) => true,
        (Some(wanted), Some(found)) => wanted == found && template(&pattern[1..], &path[1..]),
        _ => false,
    }
}

/// Bit by bit. An IPv4 address in an IPv6 one is the IPv4 address.
fn address(blocks: &[String], address: Option<IpAddr>, sure: bool) -> bool {
    let bits = |address: IpAddr| -> String {
        match address.to_canonical() {
            IpAddr::V4(four) => format!("4{:032b}", u32::from(four)),
            IpAddr::V6(six) => format!("6{:0128b}", u128::from(six)),
        }
    };
    let Some(address) = address.map(bits) else { return !sure };
    blocks.iter().any(|block| {
        let (first, length) = match block.split_once('/') {
            Some((first, length)) => (first, length.parse::<usize>().unwrap()),
            None => (block.as_str(), 128),
        };
        let written: IpAddr = first.parse().unwrap();
        let network = bits(written);
        let mapped = if written.is_ipv6() && network.starts_with('4') { 96 } else { 0 };
        let length = (length - mapped + 1).min(network.len());
        address.starts_with(&network[..length])
    })
}
