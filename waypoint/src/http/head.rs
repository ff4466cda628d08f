//! A request's head, made unambiguous: what policies judge, what routes match and what the application is sent is all this.

use culvert_model::request::{Authority, Normalised, normalise};
use http::header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, HeaderName, Method, StatusCode, Version};

/// The header in which a waypoint tells the next hop who the first client is: accepted from nobody here.
pub const CLIENT_IDENTITY: HeaderName = HeaderName::from_static("x-culvert-client-identity");
/// What Envoy calls it (W21): applications that believe it must not be told by the client.
const XFCC: HeaderName = HeaderName::from_static("x-forwarded-client-cert");
/// Headers for one hop only (RFC 9110 section 7.6.1), besides those that `Connection` names.
const HOP_BY_HOP: [HeaderName; 7] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("http2-settings"),
];
/// No `Connection` header takes these away: others read the message by them.
const NOT_HOP_BY_HOP: [HeaderName; 2] = [HOST, CONTENT_LENGTH];

/// A request's head.
#[derive(Clone, Debug)]
pub struct Head {
    /// The method.
    pub method: Method,
    /// `Host` or `:authority`; empty where HTTP/1.0 did not say.
    pub authority: String,
    /// The same, read.
    pub named: Option<Authority>,
    /// The one path that policies, routes and the application see.
    pub normal: Normalised<'static>,
    /// Its path; filters may change it.
    pub path: String,
    /// What follows the `?`.
    pub query: Option<String>,
    /// Headers without `Host` and without those for one hop.
    pub headers: HeaderMap,
    /// What the client speaks.
    pub version: Version,
    /// gRPC, by its type.
    pub grpc: bool,
    /// The protocol that the client wants to change to.
    pub upgrade: Option<HeaderValue>,
}

/// Why a head cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub struct BadHead {
    /// What to answer.
    pub status: StatusCode,
    /// For people.
    pub detail: String,
}

impl Head {
    /// Reads it.
    ///
    /// # Errors
    /// It can be read in more than one way, or asks for what is not done here.
    pub fn read(parts: Parts) -> Result<Self, BadHead> {
        let bad = |error: &dyn std::fmt::Display| BadHead {
            status: StatusCode::BAD_REQUEST,
            detail: error.to_string(),
        };
        let Parts { method, uri, version, mut headers, .. } = parts;
        if method == Method::CONNECT {
            let detail = "CONNECT inside a tunnel".to_owned();
            return Err(BadHead { status: StatusCode::METHOD_NOT_ALLOWED, detail });
        }
        check_framing(&headers, version)?;
        let authority = authority(uri.authority().map(http::uri::Authority::as_str), &headers, version)?;
        headers.remove(HOST);
        let upgrade = upgrade(&headers, version);
        let trailers = wants_trailers(&headers);
        strip_hop_by_hop(&mut headers)?;
        // Policies and routes may ask for it; what is sent on is written from `upgrade`.
        if let Some(protocol) = &upgrade {
            headers.insert(UPGRADE, protocol.clone());
        }
        if trailers {
            headers.insert(TE, HeaderValue::from_static("trailers"));
        }
        // Answered here: the body is asked for as soon as somebody reads it.
        headers.remove(EXPECT);
        headers.remove(CLIENT_IDENTITY);
        headers.remove(XFCC);
        let named = match authority.as_str() {
            "" => None,
            text => Some(Authority::parse(text).map_err(|error| bad(&error))?),
        };
        let target = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        // `http://web?q` has a query and no path.
        let target = if target.starts_with('?') { format!("/{target}") } else { target.to_owned() };
        let normal = normalise(&target).map_err(|error| bad(&error))?.into_owned();
        Ok(Self {
            grpc: super::respond::is_grpc(&headers),
            query: normal.query().map(str::to_owned),
            path: normal.path().to_owned(),
            normal,
            named,
            method,
            authority,
            headers,
            version,
            upgrade,
        })
    }

    /// The path and the query.
    pub fn path_and_query(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        }
    }
}

/// The library has refused what RFC 9112 section 6 calls malformed; this is what it lets pass.
fn check_framing(headers: &HeaderMap, version: Version) -> Result<(), BadHead> {
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let Some(coding) = codings.next() else { return Ok(()) };
    if version >= Version::HTTP_2 {
        let detail = "transfer-encoding in HTTP/2".to_owned();
        return Err(BadHead { status: StatusCode::BAD_REQUEST, detail });
    }
    if codings.next().is_some() || !coding.as_bytes().eq_ignore_ascii_case(b"chunked") {
        let detail = "a transfer coding other than chunked".to_owned();
        return Err(BadHead { status: StatusCode::NOT_IMPLEMENTED, detail });
    }
    Ok(())
}

/// One `Host`, or the authority of the request's target, which must not contradict each other.
fn authority(target: Option<&str>, headers: &HeaderMap, version: Version) -> Result<String, BadHead> {
    let bad = |detail: String| Err(BadHead { status: StatusCode::BAD_REQUEST, detail });
    let mut hosts = headers.get_all(HOST).iter();
    let (host, second) = (hosts.next(), hosts.next());
    if second.is_some() {
        return bad("more than one Host".to_owned());
    }
    let host = match host.map(HeaderValue::to_str) {
        Some(Err(_)) => return bad("a Host that is no text".to_owned()),
        Some(Ok(host)) => Some(host),
        None => None,
    };
    match (target, host) {
        (Some(target), Some(host)) if !target.eq_ignore_ascii_case(host) => {
            bad(format!("Host {host:?} beside a request for {target:?}"))
        }
        (Some(found), _) | (None, Some(found)) => Ok(found.to_owned()),
        (None, None) if version == Version::HTTP_10 => Ok(String::new()),
        (None, None) => bad("no Host".to_owned()),
    }
}

/// The protocol that an HTTP/1.1 client wants to change to. HTTP/2 is not among them: who wants it says so at once.
fn upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let wanted = headers.get(UPGRADE).filter(|_| version == Version::HTTP_11)?;
    let asked = options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"));
    let http2 = wanted
        .as_bytes()
        .split(|byte| *byte == b',')
        .any(|one| one.trim_ascii().eq_ignore_ascii_case(b"h2c"));
    (asked && !http2).then(|| wanted.clone())
}

fn options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim).filter(|option| !option.is_empty())
}

fn wants_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|value| value.trim().eq_ignore_ascii_case("trailers"))
}

fn strip_hop_by_hop(headers: &mut HeaderMap) -> Result<(), BadHead> {
    let named: Vec<HeaderName> =
        options(headers).filter_map(|option| HeaderName::from_bytes(option.as_bytes()).ok()).collect();
    if let Some(name) = named.iter().find(|name| NOT_HOP_BY_HOP.contains(name)) {
        let detail = format!("Connection names {name}, which is not for one hop");
        return Err(BadHead { status: StatusCode::BAD_REQUEST, detail });
    }
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    Ok(())
}

/// Takes from a response what was for one hop.
pub fn strip_response(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = options(headers)
        .filter_map(|option| HeaderName::from_bytes(option.as_bytes()).ok())
        .filter(|name| !NOT_HOP_BY_HOP.contains(name))
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn read(version: Version, target: &str, headers: &[(&str, &str)]) -> Result<Head, BadHead> {
        let mut request = Request::builder().version(version).uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        Head::read(request.body(()).unwrap().into_parts().0)
    }

    /// W21, W22.
    #[test]
    fn what_is_for_one_hop_goes() {
        let head = read(
            Version::HTTP_11,
            "/a?b",
            &[
                ("host", "web"),
                ("connection", "keep-alive, X-Secret"),
                ("x-secret", "1"),
                ("te", "trailers, deflate"),
                ("x-kept", "1"),
                ("x-forwarded-for", "10.0.0.1"),
                ("x-forwarded-client-cert", "By=me"),
                ("x-culvert-client-identity", "spiffe://me"),
            ],
        )
        .unwrap();
        let mut names: Vec<_> = head.headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["te", "x-forwarded-for", "x-kept"]);
        assert_eq!(head.headers[TE], "trailers");
        assert_eq!((head.authority.as_str(), head.path_and_query().as_str()), ("web", "/a?b"));
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        let host = ("host", "web");
        let v11 = Version::HTTP_11;
        for (version, target, headers, status) in [
            (v11, "/", &[][..], 400),
            (v11, "/", &[host, ("host", "other")], 400),
            (v11, "http://other/", &[host], 400),
            (v11, "/", &[host, ("transfer-encoding", "gzip, chunked")], 501),
            (v11, "/", &[host, ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], 501),
            (v11, "/", &[host, ("connection", "content-length")], 400),
            (v11, "/", &[host, ("connection", "host")], 400),
            (Version::HTTP_2, "http://web/", &[("transfer-encoding", "chunked")], 400),
        ] {
            let bad = read(version, target, headers).unwrap_err();
            assert_eq!(bad.status.as_u16(), status, "{target} {headers:?}: {}", bad.detail);
        }
        assert!(read(Version::HTTP_10, "/", &[]).is_ok());
        assert!(read(v11, "http://WEB/", &[host]).is_ok());
    }

    #[test]
    fn an_upgrade_is_asked_for_twice() {
        let host = ("host", "web");
        let asked = |headers: &[(&str, &str)]| read(Version::HTTP_11, "/", headers).unwrap().upgrade;
        assert!(asked(&[host, ("upgrade", "websocket"), ("connection", "Upgrade")]).is_some());
        assert!(asked(&[host, ("upgrade", "websocket")]).is_none());
        assert!(asked(&[host, ("upgrade", "websocket, H2C"), ("connection", "upgrade")]).is_none());
        let head = |headers: &[(&str, &str)]| read(Version::HTTP_11, "/", headers).unwrap().headers;
        assert_eq!(head(&[host, ("upgrade", "websocket"), ("connection", "Upgrade")])[UPGRADE], "websocket");
        assert!(head(&[host, ("upgrade", "websocket")]).is_empty());
        assert!(asked(&[host, ("upgrade", "h2c"), ("connection", "upgrade, http2-settings")]).is_none());
    }
}
