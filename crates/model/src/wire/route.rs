//! `culvert.waypoint.v1.Route` and [`Route`].
//!
//! What cannot be understood makes its rule, or the whole route, answer 500 to what it might have been for. It is never left
//! out: a request would silently go where another rule says.

use std::sync::Arc;
use std::time::Duration;

use culvert_proto::waypoint as proto;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use prost::Message;

use super::{hostname, unknown};
use crate::Str;
use crate::address::NamespacedHostname;
use crate::request::canonical;
use crate::route::matching::{GrpcMatch, HttpMatch, PathMatch, ValueMatch, whole};
use crate::route::{
    Backend, Cors, Filter, HeaderChange, HttpRule, Mirror, PathChange, Redirect, Retry, Rewrite, Route,
    RouteKind, Str2, StreamRule, WHOLE,
};

/// What a resource became.
#[derive(Clone, Debug)]
pub struct RouteResource {
    /// To be put in force also where there is an error. `None` where not even its name says what it is about.
    pub route: Option<Route>,
    /// What the control plane is told.
    pub error: Option<RouteError>,
}

/// What of a route cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("route {resource:?}: {reason}")]
pub struct RouteError {
    /// The resource's name.
    pub resource: String,
    /// What is wrong.
    pub reason: String,
}

/// Headers that say how a message is framed or where it goes: a filter that changed them could make two parties read one message
/// differently.
const FRAMING: [HeaderName; 9] = [
    http::header::CONNECTION,
    http::header::CONTENT_LENGTH,
    http::header::HOST,
    http::header::TE,
    http::header::TRAILER,
    http::header::TRANSFER_ENCODING,
    http::header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// Decodes one resource of type `culvert.waypoint.v1.Route`.
#[must_use]
pub fn decode(name: &str, body: &[u8]) -> RouteResource {
    let failed = |reason: String| Some(RouteError { resource: name.to_owned(), reason });
    let Some(named) = Named::parse(name) else {
        let reason = "its name is not Kind/namespace/name/parent-namespace/parent-hostname/port".to_owned();
        return RouteResource { route: None, error: failed(reason) };
    };
    let message = unknown::check(body, &unknown::ROUTE)
        .map_err(|error| error.to_string())
        .and_then(|()| proto::Route::decode(body).map_err(|error| error.to_string()))
        .and_then(|message| match Named::of(&message) == Some(named.clone()) {
            true => Ok(message),
            false => Err("its name and its content are of different routes".to_owned()),
        });
    match message {
        Err(reason) => RouteResource { route: Some(named.broken(name, &reason)), error: failed(reason) },
        Ok(message) => {
            let (route, error) = named.route(name, message);
            RouteResource { route: Some(route), error: error.and_then(failed) }
        }
    }
}

/// What a resource's name says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    kind: RouteKind,
    namespace: String,
    name: String,
    parent: NamespacedHostname,
    port: Option<u16>,
}

impl Named {
    fn parse(name: &str) -> Option<Self> {
        let parts: Vec<&str> = name.split('/').collect();
        let [kind, namespace, name, parent_namespace, parent_hostname, port] = parts[..] else { return None };
        Self::new(kind, namespace, name, (parent_namespace, parent_hostname), port.parse().ok()?)
    }

    fn of(message: &proto::Route) -> Option<Self> {
        let parent = (message.service_namespace.as_str(), message.service_hostname.as_str());
        Self::new(&message.kind, &message.namespace, &message.name, parent, message.port)
    }

    fn new(kind: &str, namespace: &str, name: &str, parent: (&str, &str), port: u32) -> Option<Self> {
        let kinds = [RouteKind::Http, RouteKind::Grpc, RouteKind::Tcp, RouteKind::Tls];
        if namespace.is_empty() || name.is_empty() || parent.1.is_empty() {
            return None;
        }
        Some(Self {
            kind: kinds.into_iter().find(|known| known.as_str() == kind)?,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            parent: NamespacedHostname { namespace: parent.0.into(), hostname: hostname(parent.1) },
            port: Some(u16::try_from(port).ok()?).filter(|port| *port != 0),
        })
    }

    /// A route without rules.
    fn empty(&self, resource: &str) -> Route {
        Route {
            resource: resource.into(),
            kind: self.kind,
            namespace: self.namespace.as_str().into(),
            name: self.name.as_str().into(),
            created: 0,
            parent: self.parent.clone(),
            port: self.port,
            consumer: None,
            http: Vec::new(),
            streams: Vec::new(),
            hostnames: Vec::new(),
        }
    }

    /// One of which nothing but the name is understood: it is for everything that it might have been for.
    fn broken(&self, resource: &str, reason: &str) -> Route {
        let (mut route, broken) = (self.empty(resource), Some(Str::from(reason)));
        if route.is_http() {
            let matches = vec![HttpMatch { unknown: true, ..HttpMatch::default() }];
            route.http = vec![Arc::new(HttpRule { matches, broken, ..HttpRule::default() })];
        } else {
            route.streams = vec![StreamRule { backends: Vec::new(), broken }];
        }
        route
    }

    fn route(&self, resource: &str, message: proto::Route) -> (Route, Option<String>) {
        let mut route = self.empty(resource);
        let mut error = None;
        route.created = message.created;
        route.consumer = Some(message.consumer_namespace).filter(|it| !it.is_empty()).map(Str::from);
        route.hostnames = message.hostnames.iter().map(|name| hostname(name)).collect();
        for (index, rule) in message.http_rules.into_iter().enumerate() {
            let rule = http_rule(rule);
            let told = || rule.broken.as_ref().map(|reason| format!("http_rules[{index}]: {reason}"));
            error = error.or_else(told);
            route.http.push(Arc::new(rule));
        }
        for rule in message.stream_rules {
            let backends: Result<_, String> = rule.backends.into_iter().map(backend).collect();
            let (backends, broken) = split(backends);
            error = error.or_else(|| broken.as_ref().map(ToString::to_string));
            route.streams.push(StreamRule { backends, broken });
        }
        (route, error)
    }
}

/// What there is, or why there is none.
fn split<T: Default>(result: Result<T, String>) -> (T, Option<Str>) {
    match result {
        Ok(value) => (value, None),
        Err(reason) => (T::default(), Some(reason.into())),
    }
}

fn http_rule(message: proto::HttpRule) -> HttpRule {
    let mut broken: Option<Str> = None;
    let mut matches: Vec<HttpMatch> = message
        .matches
        .into_iter()
        .map(|one| {
            let (matched, reason) = http_match(one);
            broken = broken.take().or(reason);
            matched
        })
        .collect();
    if matches.is_empty() {
        matches.push(HttpMatch::default());
    }
    let (filters, reason) = split(message.filters.into_iter().map(filter).collect());
    broken = broken.or(reason);
    let (backends, reason) = split(message.backends.into_iter().map(backend).collect());
    broken = broken.or(reason);
    let (retry, reason) = split(message.retry.map(retry).transpose());
    broken = broken.or(reason);
    if message.session_persistence.is_some() {
        broken = broken.or(Some("session persistence is not supported yet".into()));
    }
    let timeouts = message.timeouts.unwrap_or_default();
    let time = |milliseconds: u64| (milliseconds > 0).then(|| Duration::from_millis(milliseconds));
    HttpRule {
        name: Str2(message.name.into()),
        matches,
        filters,
        backends,
        request_timeout: time(timeouts.request_ms),
        backend_timeout: time(timeouts.backend_ms),
        retry,
        broken,
    }
}

/// A part that is not understood is left out, and the match then says so.
fn http_match(message: proto::HttpMatch) -> (HttpMatch, Option<Str>) {
    let mut matched = HttpMatch::default();
    let mut reason: Option<Str> = None;
    let mut wrong = |error: String| reason = reason.take().or(Some(error.into()));
    match path_match(message.path) {
        Ok(path) => matched.path = path,
        Err(error) => wrong(error),
    }
    if !message.method.is_empty() {
        match Method::from_bytes(message.method.as_bytes()) {
            Ok(method) => matched.method = Some(method),
            Err(_) => wrong(format!("{:?} is not a method", message.method)),
        }
    }
    for one in message.headers {
        match (header_name(&one.name), value_match(one.kind, &one.name)) {
            // Of several for one header only the first counts (Gateway API, HTTPHeaderMatch).
            (Ok(name), Ok(_)) if matched.headers.iter().any(|(known, _)| *known == name) => {}
            (Ok(name), Ok(value)) => matched.headers.push((name, value)),
            (Err(error), _) | (_, Err(error)) => wrong(error),
        }
    }
    for one in message.query_params {
        match value_match(one.kind, &one.name) {
            Ok(_) if matched.query.iter().any(|(known, _)| **known == one.name) => {}
            Ok(value) => matched.query.push((one.name.into(), value)),
            Err(error) => wrong(error),
        }
    }
    matched.unknown = reason.is_some();
    (matched, reason)
}

fn path_match(message: Option<proto::PathMatch>) -> Result<PathMatch, String> {
    use proto::path_match::Kind;
    let Some(message) = message else { return Ok(PathMatch::Any) };
    // Written as the paths of requests are, or it would never match one.
    let absolute = |path: String| match path.starts_with('/') {
        true => canonical(&path).map_err(|error| error.to_string()),
        false => Err(format!("path {path:?} does not begin with a slash")),
    };
    Ok(match message.kind.ok_or("path: neither exact, prefix, regex nor grpc is set")? {
        Kind::Exact(path) => PathMatch::Exact(absolute(path)?.into()),
        Kind::Prefix(path) => PathMatch::prefix(&absolute(path)?),
        Kind::Regex(pattern) => PathMatch::Regex(whole(&pattern).map_err(|error| error.to_string())?),
        Kind::Grpc(grpc) => {
            let part = |text: String| -> Result<Option<ValueMatch>, String> {
                match (text.is_empty(), grpc.regex) {
                    (true, _) => Ok(None),
                    (false, false) => Ok(Some(ValueMatch::Exact(text.into()))),
                    (false, true) => {
                        whole(&text).map(|it| Some(ValueMatch::Regex(it))).map_err(|e| e.to_string())
                    }
                }
            };
            PathMatch::Grpc(GrpcMatch { service: part(grpc.service)?, method: part(grpc.method)? })
        }
    })
}

fn value_match(kind: Option<proto::value_match::Kind>, name: &str) -> Result<ValueMatch, String> {
    match kind {
        Some(proto::value_match::Kind::Exact(text)) => Ok(ValueMatch::Exact(text.into())),
        Some(proto::value_match::Kind::Regex(pattern)) => {
            whole(&pattern).map(ValueMatch::Regex).map_err(|error| format!("{name}: {error}"))
        }
        None => Err(format!("{name}: neither exact nor regex is set")),
    }
}

fn header_name(text: &str) -> Result<HeaderName, String> {
    HeaderName::from_bytes(text.as_bytes()).map_err(|_| format!("{text:?} is not the name of a header"))
}

fn filter(message: proto::Filter) -> Result<Filter, String> {
    use proto::filter::Kind;
    Ok(match message.kind.ok_or("a filter without a kind")? {
        Kind::RequestHeaders(change) => Filter::RequestHeaders(header_change(change)?),
        Kind::ResponseHeaders(change) => Filter::ResponseHeaders(header_change(change)?),
        Kind::Redirect(message) => Filter::Redirect(redirect(message)?),
        Kind::Rewrite(message) => Filter::Rewrite(Rewrite {
            hostname: host(message.hostname)?,
            path: message.path.map(path_change).transpose()?,
        }),
        Kind::Mirror(message) => {
            let to = message.backend.ok_or("mirror.backend is missing")?;
            Filter::Mirror(Mirror { backend: Box::new(backend(to)?), share: message.share.min(WHOLE) })
        }
        Kind::Cors(message) => Filter::Cors(Cors {
            allow_origins: texts(message.allow_origins),
            allow_credentials: message.allow_credentials,
            allow_methods: texts(message.allow_methods),
            allow_headers: texts(message.allow_headers),
            expose_headers: texts(message.expose_headers),
            max_age_seconds: message.max_age_seconds,
        }),
        Kind::Broken(reason) => Filter::Broken(reason.into()),
    })
}

fn texts(all: Vec<String>) -> Vec<Str> {
    all.into_iter().map(Str::from).collect()
}

fn header_change(message: proto::HeaderChange) -> Result<HeaderChange, String> {
    let name = |text: &str| {
        let name = header_name(text)?;
        match FRAMING.contains(&name) {
            true => {
                Err(format!("{name} says how a message is framed or where it goes; no filter may change it"))
            }
            false => Ok(name),
        }
    };
    let pair = |header: proto::Header| {
        let value = HeaderValue::from_str(&header.value).map_err(|_| {
            format!("the value {:?} of {} holds what no header may", header.value, header.name)
        })?;
        Ok::<_, String>((name(&header.name)?, value))
    };
    Ok(HeaderChange {
        set: message.set.into_iter().map(pair).collect::<Result<_, _>>()?,
        add: message.add.into_iter().map(pair).collect::<Result<_, _>>()?,
        remove: message.remove.iter().map(|text| name(text)).collect::<Result<_, _>>()?,
    })
}

fn redirect(message: proto::Redirect) -> Result<Redirect, String> {
    if !["", "http", "https"].contains(&message.scheme.as_str()) {
        return Err(format!("redirect.scheme is {:?}; it may be http or https", message.scheme));
    }
    let port = u16::try_from(message.port)
        .map_err(|_| format!("redirect.port is {}; the highest port is 65535", message.port))?;
    if ![301, 302, 303, 307, 308].contains(&message.status) {
        return Err(format!("redirect.status is {}; it may be 301, 302, 303, 307 or 308", message.status));
    }
    Ok(Redirect {
        scheme: Some(message.scheme).filter(|it| !it.is_empty()).map(Str::from),
        hostname: host(message.hostname)?,
        port: (port != 0).then_some(port),
        path: message.path.map(path_change).transpose()?,
        status: status(message.status)?,
    })
}

fn host(text: String) -> Result<Option<Str>, String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b':' | b'[' | b']');
    match (text.is_empty(), text.bytes().all(allowed)) {
        (true, _) => Ok(None),
        (false, true) => Ok(Some(text.into())),
        (false, false) => Err(format!("{text:?} is not the name of a host")),
    }
}

fn path_change(message: proto::PathChange) -> Result<PathChange, String> {
    let plain = |text: String| match text.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'#')) {
        true => Ok(Str::from(text)),
        false => Err(format!("{text:?} is not a path")),
    };
    Ok(match message.kind.ok_or("path: neither full nor prefix is set")? {
        proto::path_change::Kind::Full(text) => PathChange::Full(plain(text)?),
        proto::path_change::Kind::Prefix(text) => PathChange::Prefix(plain(text)?),
    })
}

fn backend(message: proto::Backend) -> Result<Backend, String> {
    let mut broken = Some(message.broken).filter(|it| !it.is_empty()).map(Str::from);
    let port = u16::try_from(message.port).unwrap_or(0);
    if broken.is_none() && (port == 0 || message.service_hostname.is_empty()) {
        return Err(format!(
            "backend {:?} port {} is no port of a service",
            message.service_hostname, message.port
        ));
    }
    let (filters, reason) = split(message.filters.into_iter().map(filter).collect());
    broken = broken.or(reason);
    Ok(Backend {
        service: NamespacedHostname {
            namespace: message.service_namespace.into(),
            hostname: hostname(&message.service_hostname),
        },
        port,
        weight: message.weight,
        filters,
        broken,
    })
}

fn retry(message: proto::Retry) -> Result<Retry, String> {
    Ok(Retry {
        attempts: message.attempts,
        codes: message.codes.into_iter().map(status).collect::<Result<_, _>>()?,
        backoff: Duration::from_millis(message.backoff_ms),
    })
}

fn status(code: u32) -> Result<StatusCode, String> {
    u16::try_from(code)
        .ok()
        .and_then(|code| StatusCode::from_u16(code).ok())
        .ok_or_else(|| format!("{code} is not a status"))
}
