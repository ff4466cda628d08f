//! Which rule of which route a request is for, and what the rule wants done with it. All of it is data and pure functions:
//! nothing is sent here.
//!
//! | module | what |
//! |---|---|
//! | [`matching`] | one match of one rule, precompiled, and how it ranks among others |
//! | [`table`] | all routes by service, port and client, and the search among them |
//! | [`change`] | what filters make of a request: another path, a `Location`, other headers |
//! | [`cors`] | what an origin may do |
//!
//! The rules are those of the Gateway API: `HTTPRoute` and `GRPCRoute` (precedence included), and for streams `TLSRoute` and
//! `TCPRoute`. Where that leaves a choice to the implementation, the place says what was chosen.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};

pub mod change;
pub mod cors;
pub mod matching;
pub mod table;

use crate::Str;
use crate::address::NamespacedHostname;

pub use crate::workload::Str2;
pub use cors::Cors;
pub use matching::{HttpMatch, RequestFacts};
pub use table::{Found, Routes};

/// What one route object says about one of its parents.
#[derive(Clone, Debug)]
pub struct Route {
    /// The resource's name on the wire.
    pub resource: Str,
    /// Which kind of object it is.
    pub kind: RouteKind,
    /// Namespace of the object.
    pub namespace: Str,
    /// Name of the object.
    pub name: Str,
    /// When it was made, seconds since 1970: of two that match equally well the older is used.
    pub created: i64,
    /// The parent.
    pub parent: NamespacedHostname,
    /// The parent's port; `None` is every port of it that no route names.
    pub port: Option<u16>,
    /// Only for clients of this namespace, and for them instead of the others.
    pub consumer: Option<Str>,
    /// Rules for requests, in the order of the object.
    pub http: Vec<Arc<HttpRule>>,
    /// Rules for streams; the first is used.
    pub streams: Vec<StreamRule>,
    /// Server names of a `TLSRoute`, lower case; `*.` for one or more labels before. Empty: any.
    pub hostnames: Vec<Str>,
}

/// The kinds of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RouteKind {
    /// `HTTPRoute`.
    Http,
    /// `GRPCRoute`.
    Grpc,
    /// `TCPRoute`.
    Tcp,
    /// `TLSRoute`.
    Tls,
}

/// One rule for requests.
#[derive(Clone, Debug, Default)]
pub struct HttpRule {
    /// Its own name; empty if it has none.
    pub name: Str2,
    /// Any one suffices; never empty.
    pub matches: Vec<HttpMatch>,
    /// What is done with the request and its response, in this order.
    pub filters: Vec<Filter>,
    /// Where it may go.
    pub backends: Vec<Backend>,
    /// From the request's first byte to the response's last.
    pub request_timeout: Option<Duration>,
    /// Of each attempt.
    pub backend_timeout: Option<Duration>,
    /// Whether a failed attempt is repeated.
    pub retry: Option<Retry>,
    /// The rule cannot be carried out, for this reason: its requests are answered by a 500.
    pub broken: Option<Str>,
}

/// One rule for streams.
#[derive(Clone, Debug, Default)]
pub struct StreamRule {
    /// Where they may go.
    pub backends: Vec<Backend>,
    /// It cannot be carried out, for this reason.
    pub broken: Option<Str>,
}

/// Somewhere to go.
#[derive(Clone, Debug)]
pub struct Backend {
    /// A service.
    pub service: NamespacedHostname,
    /// Its port.
    pub port: u16,
    /// Its share of the requests, among all weights.
    pub weight: u32,
    /// What is done with the requests that go there, after the rule's own filters.
    pub filters: Vec<Filter>,
    /// It cannot be used, for this reason: its share of the requests is answered by a 500.
    pub broken: Option<Str>,
}

/// What is done with a request or its response.
#[derive(Clone, Debug)]
pub enum Filter {
    /// The request's headers change.
    RequestHeaders(HeaderChange),
    /// The response's headers change.
    ResponseHeaders(HeaderChange),
    /// The client is sent elsewhere.
    Redirect(Redirect),
    /// The request's host or path changes.
    Rewrite(Rewrite),
    /// A copy goes elsewhere, too.
    Mirror(Mirror),
    /// Browsers are told what other origins may do.
    Cors(Cors),
    /// It cannot be done, for this reason: a 500.
    Broken(Str),
}

/// Headers to change, in the order `set`, `add`, `remove`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChange {
    /// Instead of what is there.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// After what is there.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// No longer there.
    pub remove: Vec<HeaderName>,
}

/// Where a client is sent. What is `None` is as the request has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// `http` or `https`.
    pub scheme: Option<Str>,
    /// The host.
    pub hostname: Option<Str>,
    /// The port.
    pub port: Option<u16>,
    /// The path.
    pub path: Option<PathChange>,
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
}

/// What the backend is asked instead. What is `None` is as the request has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// The `Host`.
    pub hostname: Option<Str>,
    /// The path.
    pub path: Option<PathChange>,
}

/// Another path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathChange {
    /// This one.
    Full(Str),
    /// This instead of the prefix that matched.
    Prefix(Str),
}

/// Where a copy goes.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// There.
    pub backend: Box<Backend>,
    /// Of a million requests, so many.
    pub share: u32,
}

/// When a failed attempt is repeated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retry {
    /// So often, after the first.
    pub attempts: u32,
    /// Responses that count as failed.
    pub codes: Vec<StatusCode>,
    /// How long to wait before.
    pub backoff: Duration,
}

/// A million: the whole of a [`Mirror::share`].
pub const WHOLE: u32 = 1_000_000;

impl Route {
    /// `namespace/name` of the object, for logs.
    #[must_use]
    pub fn object(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Whether it is for requests; otherwise it is for streams.
    #[must_use]
    pub fn is_http(&self) -> bool {
        matches!(self.kind, RouteKind::Http | RouteKind::Grpc)
    }

    /// Whether a client that asks for this server name means it (`TLSRoute`).
    #[must_use]
    pub fn serves_name(&self, name: Option<&str>) -> bool {
        if self.hostnames.is_empty() {
            return true;
        }
        let Some(name) = name else { return false };
        let name = name.trim_end_matches('.').to_ascii_lowercase();
        self.hostnames.iter().any(|host| match host.strip_prefix("*.") {
            Some(parent) => {
                name.strip_suffix(parent).is_some_and(|left| left.len() > 1 && left.ends_with('.'))
            }
            None => name == **host,
        })
    }
}

impl RouteKind {
    /// As the object's `kind`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
            Self::Tcp => "TCPRoute",
            Self::Tls => "TLSRoute",
        }
    }
}

/// Draws one by weight; `None` if there is none, or if all weights are 0. `random` gives a number below its argument.
pub fn draw<'a>(backends: &'a [Backend], random: &mut dyn FnMut(u64) -> u64) -> Option<&'a Backend> {
    let total: u64 = backends.iter().map(|backend| u64::from(backend.weight)).sum();
    if total == 0 {
        return None;
    }
    let mut point = random(total);
    backends.iter().find(|backend| {
        let weight = u64::from(backend.weight);
        if point < weight {
            return true;
        }
        point -= weight;
        false
    })
}
