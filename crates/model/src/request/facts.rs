//! What is known of a request, or of a connection that carries none.

use std::net::{IpAddr, SocketAddr};

use super::{Authority, Claims, Normalised};
use crate::identity::Identity;

/// What is known. What is not known is never taken for what a policy would like to see: see each field.
#[derive(Clone, Copy)]
pub struct RequestFacts<'a> {
    /// Who the first client proved to be. `None`: nobody vouches for it, so no value about an identity holds, and every
    /// `not` does, as on a node tunnel (D39).
    pub identity: Option<&'a Identity>,
    /// The first client's own address (`ipBlocks`, `source.ip`). `None`: not known, any rule about it is uncertain.
    pub source: Option<IpAddr>,
    /// The client's address by what trusted proxies say (`remoteIpBlocks`, `remote.ip`); [`Self::source`] where none is
    /// trusted. `None`: not known, any rule about it is uncertain.
    pub remote: Option<IpAddr>,
    /// The service's address and port as the client asked for them (`ports`, `destination.ip`, `destination.port`).
    pub destination: SocketAddr,
    /// The TLS server name the client asked for inside the tunnel.
    pub server_name: Option<&'a str>,
    /// `None` where the connection is not HTTP, or is not read as such: any rule about HTTP is uncertain (W56).
    pub http: Option<HttpFacts<'a>>,
}

/// What is known of an HTTP request.
#[derive(Clone, Copy)]
pub struct HttpFacts<'a> {
    /// The method, as sent.
    pub method: &'a str,
    /// Whom the request is for; `None` where an HTTP/1.0 request does not say.
    pub authority: Option<&'a Authority>,
    /// The path that is also routed by and sent on.
    pub path: &'a Normalised<'a>,
    /// The headers.
    pub headers: &'a dyn Headers,
    /// What a token that was verified claims; `None` without one.
    pub claims: Option<&'a Claims>,
}

/// Looks up headers. A trait, so that no HTTP library is needed here.
pub trait Headers {
    /// Calls `found` with the value of each line of the header `name`, which is in lower case, in order.
    fn each(&self, name: &str, found: &mut dyn FnMut(&[u8]));
}
