//! `gateway.networking.k8s.io`: HTTPRoute, GRPCRoute, TCPRoute, TLSRoute and ReferenceGrant, as the Gateway API v1.6 has them.
//!
//! A route is read rule by rule. What cannot be read, or is not known, breaks the rule that it stands in and nothing else: it is among
//! the rule's [`faults`](HttpRule::faults), and what is left of its matches says which requests get an error in its place. A match
//! of which a part is left out matches more, never less.

use serde::Serialize;

use crate::meta::ObjectMeta;
use crate::values::Port;

mod again;
mod filters;
mod grant;
mod matches;
mod raw;
mod read;
#[cfg(test)]
mod tests;
mod values;

pub use filters::{Cors, Filter, Fraction, HeaderChange, HeaderEntry, Mirror, PathChange, Redirect, Rewrite};
pub use grant::{GrantFrom, GrantTo, ReferenceGrant, ReferenceGrantSpec};
pub(crate) use read::read;
pub use values::{HeaderName, HeaderValue, HostName, Millis, Pattern, ReplacementPath};

/// The API group of these kinds.
pub const GROUP: &str = "gateway.networking.k8s.io";

/// The kinds of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[allow(missing_docs, reason = "each is its kind")]
pub enum RouteType {
    Http,
    Grpc,
    Tcp,
    Tls,
}

/// A route of any kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Route {
    /// Which kind.
    #[serde(rename = "type")]
    pub of: RouteType,
    /// Name, namespace, age.
    pub metadata: ObjectMeta,
    /// What it says.
    pub spec: RouteSpec,
}

/// `spec` of a route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RouteSpec {
    /// What it is attached to.
    pub parents: Vec<ParentRef>,
    /// Hosts; without a meaning where the parent is a service, but for TLS.
    pub hostnames: Vec<String>,
    /// Of HTTPRoute and GRPCRoute.
    pub http: Vec<HttpRule>,
    /// Of TCPRoute and TLSRoute.
    pub streams: Vec<StreamRule>,
    /// What is wrong outside of its rules: it breaks them all.
    pub faults: Vec<Fault>,
}

/// What a route is attached to.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct ParentRef {
    /// API group, empty for the core.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// The route's own if absent.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Name of a listener of a Gateway, or of a port of a Service.
    pub section_name: Option<String>,
    /// A port of it; every port if absent.
    pub port: Option<Port>,
}

/// One rule of an HTTPRoute or GRPCRoute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HttpRule {
    /// Unique in the route.
    pub name: Option<String>,
    /// Any one suffices; none matches everything.
    pub matches: Vec<HttpMatch>,
    /// In their order.
    pub filters: Vec<Filter>,
    /// Where requests go.
    pub backends: Vec<BackendRef>,
    /// Of a whole request.
    pub request_timeout: Option<Millis>,
    /// Of one attempt.
    pub backend_timeout: Option<Millis>,
    /// When to try again.
    pub retry: Option<Retry>,
    /// Whether requests of one session go to one endpoint.
    pub session: Option<SessionPersistence>,
    /// What is wrong with it. If anything is, requests that it matches get an error.
    pub faults: Vec<Fault>,
}

/// One rule of a TCPRoute or TLSRoute.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StreamRule {
    /// Unique in the route.
    pub name: Option<String>,
    /// Where connections go.
    pub backends: Vec<BackendRef>,
    /// What is wrong with it. If anything is, connections are refused.
    pub faults: Vec<Fault>,
}

/// All that is there has to match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HttpMatch {
    /// The path; any if absent.
    pub path: Option<PathMatch>,
    /// The method; any if absent.
    pub method: Option<String>,
    /// Headers.
    pub headers: Vec<ValueMatch>,
    /// Parameters of the query.
    pub query_params: Vec<ValueMatch>,
}

/// What a path must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum PathMatch {
    /// This.
    Exact(String),
    /// This, by whole segments.
    Prefix(String),
    /// This expression, all of it.
    Regex(Pattern),
    /// `/service/method`.
    Grpc {
        /// Any if absent.
        service: Option<String>,
        /// Any if absent.
        method: Option<String>,
        /// Both are expressions.
        regex: bool,
    },
}

/// What a header or a parameter must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ValueMatch {
    /// Its name, as written.
    pub name: String,
    /// What its value must be.
    pub value: TextMatch,
}

/// What a text must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum TextMatch {
    /// This.
    Exact(String),
    /// This expression, all of it.
    Regex(Pattern),
}

/// Where requests or connections go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BackendRef {
    /// What it is.
    pub target: ObjectRef,
    /// Its share is this, of the sum of all.
    pub weight: u32,
    /// Only for what goes there.
    pub filters: Vec<Filter>,
}

/// An object with a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct ObjectRef {
    /// API group, empty for the core.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// The route's own if absent.
    pub namespace: Option<String>,
    /// Name.
    pub name: String,
    /// Its port; a Service needs one.
    pub port: Option<Port>,
}

/// When to try again.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Retry {
    /// On these answers.
    pub codes: Vec<u16>,
    /// How often, after the first attempt.
    pub attempts: Option<u32>,
    /// How long to wait at least.
    pub backoff: Option<Millis>,
}

/// Requests of one session go to one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SessionPersistence {
    /// By what a session is known.
    pub by: SessionBy,
    /// Its name; empty is left to the waypoint.
    pub name: String,
    /// The longest life of a session.
    pub absolute_timeout: Option<Millis>,
    /// How long a session lives without a request.
    pub idle_timeout: Option<Millis>,
    /// The client keeps the cookie over restarts.
    pub permanent: bool,
}

/// By what a session is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum SessionBy {
    Cookie,
    Header,
}

/// Something that cannot be carried out, and where it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Fault {
    /// From 1; 0 where there are no lines.
    pub line: u32,
    /// Such as `spec.rules[0].filters[1].type`.
    pub field: String,
    /// What was there, if a scalar was.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
    /// What would be right; may be empty.
    pub expected: String,
}

impl RouteType {
    /// Its kind, as manifests have it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Http => "HTTPRoute",
            Self::Grpc => "GRPCRoute",
            Self::Tcp => "TCPRoute",
            Self::Tls => "TLSRoute",
        }
    }

    /// Of a kind of manifests.
    pub fn of_kind(kind: &str) -> Option<Self> {
        [Self::Http, Self::Grpc, Self::Tcp, Self::Tls].into_iter().find(|it| it.kind() == kind)
    }
}

impl Route {
    /// Everything that is wrong with it, in the order in which it is written.
    pub fn faults(&self) -> impl Iterator<Item = &Fault> {
        let http = self.spec.http.iter().flat_map(|rule| &rule.faults);
        let streams = self.spec.streams.iter().flat_map(|rule| &rule.faults);
        self.spec.faults.iter().chain(http).chain(streams)
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)?;
        match (self.value.is_empty(), self.expected.is_empty()) {
            (true, true) => Ok(()),
            (false, true) => write!(f, " (got {:?})", self.value),
            (true, false) => write!(f, " (expected {})", self.expected),
            (false, false) => write!(f, " (got {:?}, expected {})", self.value, self.expected),
        }
    }
}
