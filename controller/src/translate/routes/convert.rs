//! One route at one of its parents, to its message.

use culvert_k8s_api::routes::{
    Fault, Filter, HeaderChange, HttpMatch, HttpRule, Millis, PathChange, PathMatch, Redirect, Retry,
    RouteType, SessionBy, SessionPersistence, TextMatch, ValueMatch,
};
use culvert_proto::waypoint as proto;
use culvert_proto::waypoint::filter::Kind as FilterKind;
use prost::Message;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::backends::{From, Unresolved};
use super::patterns;

/// How often a request is tried again if a route asks for that and does not say how often.
const ATTEMPTS: u32 = 2;
/// How long to wait before that, if it does not say.
const BACKOFF_MS: u64 = 25;
/// What is wrong with a rule is said up to here.
const MAX_SAID: usize = 3;
/// `Access-Control-Max-Age` for who says nothing.
const MAX_AGE: u32 = 5;
const MILLION: u64 = 1_000_000;

/// A message but for its port, and what its references are worth.
pub(super) struct Converted {
    pub message: proto::Route,
    pub unresolved: Vec<Unresolved>,
    /// The rules that cannot be carried out, by index, and why.
    pub broken: Vec<(usize, String)>,
    /// Of all its rules.
    pub rules: usize,
}

/// Converts. `service` is the parent in the words of the workload API: namespace and host name.
pub(super) fn route(from: &From<'_, '_>, service: (&str, &str)) -> Converted {
    let (meta, spec, of) = (&from.route.metadata, &from.route.spec, from.route.of);
    let consumer = if meta.namespace == service.0 { String::new() } else { meta.namespace.clone() };
    let mut unresolved = Vec::new();
    let mut broken = Vec::new();
    let mut judge = |index: usize, faults: &[Fault]| {
        // What is wrong outside of the rules may have been about any of them.
        let why = said(spec.faults.iter().chain(faults));
        broken.extend(why.clone().map(|why| (index, why)));
        why
    };
    let http_rules: Vec<proto::HttpRule> = spec
        .http
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let faults =
                [rule.faults.clone(), patterns::faults(&format!("spec.rules[{index}]"), rule)].concat();
            match judge(index, &faults) {
                Some(why) => broken_rule(rule, why),
                None => http_rule(from, of, rule, &mut unresolved),
            }
        })
        .collect();
    let stream_rules: Vec<proto::StreamRule> = spec
        .streams
        .iter()
        .enumerate()
        .map(|(index, rule)| {
            let backends = match judge(index, &rule.faults) {
                Some(broken) => vec![proto::Backend { weight: 1, broken, ..proto::Backend::default() }],
                None => rule.backends.iter().map(|it| from.backend(it, &mut unresolved)).collect(),
            };
            proto::StreamRule { backends }
        })
        .collect();
    let message = proto::Route {
        kind: of.kind().to_owned(),
        namespace: meta.namespace.clone(),
        name: meta.name.clone(),
        created: meta.creation_timestamp.as_deref().and_then(seconds).unwrap_or(i64::MAX),
        service_namespace: service.0.to_owned(),
        service_hostname: service.1.to_owned(),
        port: 0,
        consumer_namespace: consumer,
        http_rules,
        stream_rules,
        hostnames: if of == RouteType::Tls { spec.hostnames.clone() } else { Vec::new() },
    };
    let rules = spec.http.len() + spec.streams.len();
    let mut converted = Converted { message, unresolved, broken, rules };
    converted.as_read(from);
    converted
}

impl Converted {
    /// What a waypoint would not carry out is broken here already, so that the status says what the waypoint does: the code that reads
    /// the message there judges it here.
    fn as_read(&mut self, from: &From<'_, '_>) {
        let message = &self.message;
        let read = culvert_model::wire::route(&super::parents::resource(message), &message.encode_to_vec());
        let Some(route) = read.route.filter(|_| read.error.is_some()) else { return };
        for (index, rule) in route.http.iter().enumerate() {
            if let (Some(why), Some(written)) = (&rule.broken, from.route.spec.http.get(index)) {
                self.broken.push((index, why.to_string()));
                self.message.http_rules[index] = broken_rule(written, why.to_string());
            }
        }
        for (index, rule) in route.streams.iter().enumerate() {
            if let (Some(why), Some(made)) = (&rule.broken, self.message.stream_rules.get_mut(index)) {
                self.broken.push((index, why.to_string()));
                made.backends =
                    vec![proto::Backend { weight: 1, broken: why.to_string(), ..proto::Backend::default() }];
            }
        }
        self.broken.sort();
    }
}

fn seconds(text: &str) -> Option<i64> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(OffsetDateTime::unix_timestamp)
}

fn said<'f>(faults: impl Iterator<Item = &'f Fault>) -> Option<String> {
    let all: Vec<String> = faults.map(ToString::to_string).collect();
    let more = all.len().saturating_sub(MAX_SAID);
    let mut text = all.iter().take(MAX_SAID).cloned().collect::<Vec<_>>().join("; ");
    if more > 0 {
        text += &format!("; and {more} more");
    }
    (!all.is_empty()).then_some(text)
}

/// It matches what it matches, as far as that can be read, and answers with an error.
fn broken_rule(rule: &HttpRule, why: String) -> proto::HttpRule {
    proto::HttpRule {
        name: rule.name.clone().unwrap_or_default(),
        matches: rule.matches.iter().map(|it| one_match(&patterns::without(it))).collect(),
        filters: vec![filter(FilterKind::Broken(why))],
        ..proto::HttpRule::default()
    }
}

fn http_rule(
    from: &From<'_, '_>,
    of: RouteType,
    rule: &HttpRule,
    unresolved: &mut Vec<Unresolved>,
) -> proto::HttpRule {
    let backends = rule.backends.iter().map(|backend| {
        let mut made = from.backend(backend, unresolved);
        made.filters = filters(from, &backend.filters, unresolved);
        made
    });
    let backends = backends.collect();
    let timeouts =
        (rule.request_timeout.is_some() || rule.backend_timeout.is_some()).then(|| proto::Timeouts {
            request_ms: rule.request_timeout.map_or(0, |it| it.0),
            backend_ms: rule.backend_timeout.map_or(0, |it| it.0),
        });
    debug_assert!(matches!(of, RouteType::Http | RouteType::Grpc), "the others have rules for streams");
    proto::HttpRule {
        name: rule.name.clone().unwrap_or_default(),
        matches: rule.matches.iter().map(one_match).collect(),
        filters: filters(from, &rule.filters, unresolved),
        backends,
        timeouts,
        retry: rule.retry.as_ref().map(retry),
        session_persistence: rule.session.as_ref().map(session),
    }
}

fn one_match(it: &HttpMatch) -> proto::HttpMatch {
    proto::HttpMatch {
        path: it.path.as_ref().map(path),
        method: it.method.clone().unwrap_or_default(),
        headers: it.headers.iter().map(|it| value(it, it.name.to_ascii_lowercase())).collect(),
        query_params: it.query_params.iter().map(|it| value(it, it.name.clone())).collect(),
    }
}

fn path(it: &PathMatch) -> proto::PathMatch {
    use proto::path_match::Kind;
    let kind = match it {
        PathMatch::Exact(path) => Kind::Exact(path.clone()),
        PathMatch::Prefix(path) => Kind::Prefix(path.clone()),
        PathMatch::Regex(pattern) => Kind::Regex(pattern.0.clone()),
        PathMatch::Grpc { service, method, regex } => Kind::Grpc(proto::GrpcMethod {
            service: service.clone().unwrap_or_default(),
            method: method.clone().unwrap_or_default(),
            regex: *regex,
        }),
    };
    proto::PathMatch { kind: Some(kind) }
}

fn value(it: &ValueMatch, name: String) -> proto::ValueMatch {
    use proto::value_match::Kind;
    let kind = match &it.value {
        TextMatch::Exact(text) => Kind::Exact(text.clone()),
        TextMatch::Regex(pattern) => Kind::Regex(pattern.0.clone()),
    };
    proto::ValueMatch { name, kind: Some(kind) }
}

fn filter(kind: FilterKind) -> proto::Filter {
    proto::Filter { kind: Some(kind) }
}

fn filters(from: &From<'_, '_>, all: &[Filter], unresolved: &mut Vec<Unresolved>) -> Vec<proto::Filter> {
    let one = |it: &Filter| {
        Some(filter(match it {
            Filter::RequestHeaders(it) => FilterKind::RequestHeaders(headers(it)),
            Filter::ResponseHeaders(it) => FilterKind::ResponseHeaders(headers(it)),
            Filter::Redirect(it) => FilterKind::Redirect(redirect(it)),
            Filter::Rewrite(it) => FilterKind::Rewrite(proto::Rewrite {
                hostname: it.hostname.clone().unwrap_or_default(),
                path: it.path.as_ref().map(path_change),
            }),
            Filter::Mirror(it) => match from.resolve(&it.target) {
                Ok((service_namespace, service_hostname, port)) => {
                    let (numerator, denominator) =
                        (u64::from(it.share.numerator), u64::from(it.share.denominator));
                    let share = numerator * MILLION / denominator.max(1);
                    let backend = proto::Backend {
                        service_namespace,
                        service_hostname,
                        port,
                        weight: 1,
                        ..proto::Backend::default()
                    };
                    let share = u32::try_from(share).unwrap_or(u32::MAX);
                    FilterKind::Mirror(proto::Mirror { backend: Some(backend), share })
                }
                // A copy that goes nowhere is no reason to refuse the request: the Gateway API has it dropped, and said.
                Err(why) => {
                    unresolved.push(why);
                    return None;
                }
            },
            Filter::Cors(it) => FilterKind::Cors(proto::Cors {
                allow_origins: it.allow_origins.clone(),
                allow_credentials: it.allow_credentials,
                allow_methods: it.allow_methods.clone(),
                allow_headers: it.allow_headers.iter().map(|it| it.0.clone()).collect(),
                expose_headers: it.expose_headers.iter().map(|it| it.0.clone()).collect(),
                max_age_seconds: it.max_age.unwrap_or(MAX_AGE),
            }),
            Filter::Extension(it) => {
                let message =
                    format!("{} {:?} of {:?} is no kind of filter that is known", it.kind, it.name, it.group);
                unresolved.push(Unresolved { reason: "InvalidKind", message: message.clone() });
                FilterKind::Broken(message)
            }
        }))
    };
    all.iter().filter_map(one).collect()
}

fn headers(it: &HeaderChange) -> proto::HeaderChange {
    let list = |entries: &[culvert_k8s_api::routes::HeaderEntry]| {
        let one = |it: &culvert_k8s_api::routes::HeaderEntry| proto::Header {
            name: it.name.0.to_ascii_lowercase(),
            value: it.value.0.clone(),
        };
        entries.iter().map(one).collect()
    };
    proto::HeaderChange {
        set: list(&it.set),
        add: list(&it.add),
        remove: it.remove.iter().map(|it| it.0.to_ascii_lowercase()).collect(),
    }
}

fn redirect(it: &Redirect) -> proto::Redirect {
    proto::Redirect {
        scheme: it.scheme.clone().unwrap_or_default(),
        hostname: it.hostname.clone().unwrap_or_default(),
        port: it.port.map_or(0, |port| port.get().into()),
        path: it.path.as_ref().map(path_change),
        status: it.status.into(),
    }
}

fn path_change(it: &PathChange) -> proto::PathChange {
    use proto::path_change::Kind;
    let kind = match it {
        PathChange::Full(path) => Kind::Full(path.clone()),
        PathChange::Prefix(path) => Kind::Prefix(path.clone()),
    };
    proto::PathChange { kind: Some(kind) }
}

fn retry(it: &Retry) -> proto::Retry {
    proto::Retry {
        attempts: it.attempts.unwrap_or(ATTEMPTS),
        codes: it.codes.iter().map(|code| u32::from(*code)).collect(),
        backoff_ms: it.backoff.map_or(BACKOFF_MS, |it| it.0),
    }
}

fn session(it: &SessionPersistence) -> proto::SessionPersistence {
    use proto::session_persistence::Kind;
    let kind = match it.by {
        SessionBy::Cookie => Kind::Cookie,
        SessionBy::Header => Kind::Header,
    };
    let time = |it: Option<Millis>| it.map_or(0, |it| it.0);
    proto::SessionPersistence {
        kind: kind.into(),
        name: it.name.clone(),
        absolute_timeout_ms: time(it.absolute_timeout),
        idle_timeout_ms: time(it.idle_timeout),
        permanent: it.permanent,
    }
}
