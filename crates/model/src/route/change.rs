//! What filters make of a request: another path, a `Location`, other headers.

use http::HeaderMap;

use super::{HeaderChange, PathChange, Redirect};

/// Where a request was sent, as the client wrote it.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    /// `http` or `https`, by what the client speaks.
    pub scheme: &'a str,
    /// `Host` or `:authority`; its port may be missing.
    pub authority: &'a str,
    /// The port that the client connected to.
    pub port: u16,
    /// The path, without the query.
    pub path: &'a str,
    /// What follows the `?`.
    pub query: Option<&'a str>,
}

/// The path after a change. `matched` is the prefix that the rule matched by, without a slash at its end; where a rule matched by
/// something else than a prefix, a change of the prefix changes nothing (the Gateway API does not allow such a rule).
#[must_use]
pub fn path(change: &PathChange, matched: Option<&str>, path: &str) -> String {
    match (change, matched) {
        (PathChange::Full(full), _) => with_slash(full),
        (PathChange::Prefix(_), None) => path.to_owned(),
        (PathChange::Prefix(prefix), Some(matched)) => {
            // What is left begins with a slash or is empty, so exactly one slash joins the two.
            let left = path.strip_prefix(matched).unwrap_or(path);
            with_slash(&format!("{}{left}", prefix.trim_end_matches('/')))
        }
    }
}

fn with_slash(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// The `Location` of a redirect.
///
/// The Gateway API's rules for the port: the one that the redirect names; else, with a scheme, that scheme's; else the one that the
/// client connected to, which in a mesh is the service's. A port that goes without saying is left out.
#[must_use]
pub fn location(redirect: &Redirect, matched: Option<&str>, asked: &Asked<'_>) -> String {
    let scheme = redirect.scheme.as_deref().unwrap_or(asked.scheme);
    let known = |scheme: &str| match scheme {
        "http" => Some(80),
        "https" => Some(443),
        _ => None,
    };
    let port = match (redirect.port, &redirect.scheme) {
        (Some(port), _) => port,
        (None, Some(scheme)) => known(scheme).unwrap_or(asked.port),
        (None, None) => asked.port,
    };
    let host = redirect.hostname.as_deref().unwrap_or_else(|| host(asked.authority));
    let path = match &redirect.path {
        Some(change) => self::path(change, matched, asked.path),
        None => asked.path.to_owned(),
    };
    let port = if known(scheme) == Some(port) { String::new() } else { format!(":{port}") };
    let query = asked.query.map(|query| format!("?{query}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{path}{query}")
}

/// An authority without its port; an IPv6 address keeps its brackets.
#[must_use]
pub fn host(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => {
            // `[::1` is what is left of an address without a port.
            if host.starts_with('[') && !host.ends_with(']') { authority } else { host }
        }
        _ => authority,
    }
}

/// Carries out a change of headers.
pub fn headers(change: &HeaderChange, headers: &mut HeaderMap) {
    for (name, value) in &change.set {
        headers.insert(name, value.clone());
    }
    for (name, value) in &change.add {
        headers.append(name, value.clone());
    }
    for name in &change.remove {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, StatusCode};

    use super::*;

    /// The table of `HTTPPathModifier.replacePrefixMatch` in the Gateway API: request path, prefix matched, replacement, result.
    #[test]
    fn a_prefix_is_replaced() {
        for (asked, matched, replacement, expected) in [
            ("/foo/bar", "/foo", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo", "/xyz/", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz", "/xyz/bar"),
            ("/foo/bar", "/foo/", "/xyz/", "/xyz/bar"),
            ("/foo", "/foo", "/xyz", "/xyz"),
            ("/foo/", "/foo", "/xyz", "/xyz/"),
            ("/foo/bar", "/foo", "", "/bar"),
            ("/foo/", "/foo", "", "/"),
            ("/foo", "/foo", "", "/"),
            ("/foo/", "/foo", "/", "/"),
            ("/foo", "/foo", "/", "/"),
            ("/any/thing", "/", "/xyz", "/xyz/any/thing"),
            ("/", "/", "/xyz", "/xyz/"),
        ] {
            let matched = matched.trim_end_matches('/');
            let change = PathChange::Prefix(replacement.into());
            assert_eq!(path(&change, Some(matched), asked), expected, "{asked} {matched} {replacement:?}");
        }
        assert_eq!(path(&PathChange::Full("/one".into()), Some("/a"), "/a/b"), "/one");
        assert_eq!(path(&PathChange::Full("one".into()), None, "/a/b"), "/one");
        assert_eq!(path(&PathChange::Prefix("/x".into()), None, "/a/b"), "/a/b");
    }

    fn redirect() -> Redirect {
        Redirect { scheme: None, hostname: None, port: None, path: None, status: StatusCode::FOUND }
    }

    #[test]
    fn locations() {
        let asked =
            Asked { scheme: "http", authority: "echo:8080", port: 8080, path: "/a/b", query: Some("q=1") };
        let plain = Asked { authority: "echo", port: 80, query: None, ..asked };
        let https = Redirect { scheme: Some("https".into()), ..redirect() };
        let host = Redirect { hostname: Some("example.org".into()), ..redirect() };
        let port = |port| Redirect { port: Some(port), ..redirect() };
        let prefix = Redirect { path: Some(PathChange::Prefix("/x".into())), ..redirect() };
        for (redirect, asked, expected) in [
            (redirect(), asked, "http://echo:8080/a/b?q=1"),
            (redirect(), plain, "http://echo/a/b"),
            (https.clone(), plain, "https://echo/a/b"),
            (https.clone(), asked, "https://echo/a/b?q=1"),
            (Redirect { port: Some(443), ..https.clone() }, plain, "https://echo/a/b"),
            (Redirect { port: Some(8443), ..https }, plain, "https://echo:8443/a/b"),
            (host.clone(), plain, "http://example.org/a/b"),
            (host, asked, "http://example.org:8080/a/b?q=1"),
            (port(80), asked, "http://echo/a/b?q=1"),
            (port(8081), plain, "http://echo:8081/a/b"),
            (port(443), plain, "http://echo:443/a/b"),
            (prefix, asked, "http://echo:8080/x/b?q=1"),
        ] {
            assert_eq!(location(&redirect, Some("/a"), &asked), expected);
        }
    }

    #[test]
    fn hosts() {
        for (authority, expected) in
            [("a", "a"), ("a:80", "a"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]"), ("a:", "a")]
        {
            assert_eq!(host(authority), expected);
        }
    }

    #[test]
    fn headers_are_set_added_and_removed() {
        let value = HeaderValue::from_static;
        let mut all = HeaderMap::new();
        for (name, text) in [("a", "1"), ("a", "2"), ("b", "1"), ("c", "1")] {
            all.append(name, value(text));
        }
        let named = |name: &'static str, text| (http::HeaderName::from_static(name), value(text));
        let change = HeaderChange {
            set: vec![named("a", "new"), named("d", "new")],
            add: vec![named("b", "2")],
            remove: vec![http::HeaderName::from_static("c")],
        };
        headers(&change, &mut all);
        let of = |name: &str| all.get_all(name).iter().map(|v| v.to_str().unwrap()).collect::<Vec<_>>();
        assert_eq!((of("a"), of("b"), of("c"), of("d")), (vec!["new"], vec!["1", "2"], vec![], vec!["new"]));
    }
}
