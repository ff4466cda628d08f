//! What an origin may do (the Fetch standard, "CORS protocol").

use http::header::{
    ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
    ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, VARY,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};

use crate::Str;

/// What browsers are told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cors {
    /// `*`, an origin, or one with `*.` before its host.
    pub allow_origins: Vec<Str>,
    /// Cookies and the like too.
    pub allow_credentials: bool,
    /// Methods; `*` is any.
    pub allow_methods: Vec<Str>,
    /// Headers of requests; `*` is any.
    pub allow_headers: Vec<Str>,
    /// Headers of responses that scripts may read; `*` is any.
    pub expose_headers: Vec<Str>,
    /// How long the answer to a preflight is good for; 0 is not said.
    pub max_age_seconds: u32,
}

impl Cors {
    /// Whether this is a preflight: then it is answered here, with [`Cors::preflight`].
    #[must_use]
    pub fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
        *method == Method::OPTIONS
            && headers.contains_key(ORIGIN)
            && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
    }

    /// The headers of the answer to a preflight. An origin that may do nothing gets none, which is how it is told.
    #[must_use]
    pub fn preflight(&self, asked: &HeaderMap) -> HeaderMap {
        let mut answer = HeaderMap::new();
        if !self.allow(asked, &mut answer) {
            return answer;
        }
        let echo = |list: &[Str], name: HeaderName| match list.iter().any(|it| &**it == "*") {
            // With credentials `*` is no wildcard to browsers, so they are told what they asked for.
            true if self.allow_credentials => asked.get(name).cloned(),
            true => Some(HeaderValue::from_static("*")),
            false => joined(list),
        };
        let methods = echo(&self.allow_methods, ACCESS_CONTROL_REQUEST_METHOD);
        let headers = echo(&self.allow_headers, ACCESS_CONTROL_REQUEST_HEADERS);
        put(&mut answer, ACCESS_CONTROL_ALLOW_METHODS, methods);
        put(&mut answer, ACCESS_CONTROL_ALLOW_HEADERS, headers);
        if self.max_age_seconds > 0 {
            answer.insert(ACCESS_CONTROL_MAX_AGE, self.max_age_seconds.into());
        }
        answer
    }

    /// Adds to a response what its origin is to be told. What the application said itself is replaced: two answers would be none.
    pub fn respond(&self, asked: &HeaderMap, response: &mut HeaderMap) {
        if !asked.contains_key(ORIGIN) {
            return;
        }
        for name in
            [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS]
        {
            response.remove(name);
        }
        if self.allow(asked, response) {
            put(response, ACCESS_CONTROL_EXPOSE_HEADERS, joined(&self.expose_headers));
        }
    }

    /// Says whether the origin is allowed, and to it that it is.
    fn allow(&self, asked: &HeaderMap, answer: &mut HeaderMap) -> bool {
        let Some(origin) = asked.get(ORIGIN) else { return false };
        let any = self.allow_origins.iter().any(|it| &**it == "*");
        let allowed =
            any || origin.to_str().is_ok_and(|origin| self.allow_origins.iter().any(|it| fits(it, origin)));
        if !allowed {
            return false;
        }
        if any && !self.allow_credentials {
            answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        } else {
            answer.insert(ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
            answer.append(VARY, HeaderValue::from_static("Origin"));
        }
        if self.allow_credentials {
            answer.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
        }
        true
    }
}

/// Whether an origin is this one, or below it: `https://*.example.org`. Origins compare without case.
fn fits(allowed: &str, origin: &str) -> bool {
    let (allowed, origin) = (allowed.to_ascii_lowercase(), origin.to_ascii_lowercase());
    match allowed.split_once("*.") {
        Some((scheme, parent)) => origin
            .strip_prefix(scheme)
            .and_then(|rest| rest.strip_suffix(parent))
            .is_some_and(|left| left.len() > 1 && left.ends_with('.') && !left.contains(['/', ':', '@'])),
        None => allowed == origin,
    }
}

fn joined(list: &[Str]) -> Option<HeaderValue> {
    if list.is_empty() {
        return None;
    }
    HeaderValue::from_str(&list.iter().map(|it| &**it).collect::<Vec<_>>().join(", ")).ok()
}

fn put(headers: &mut HeaderMap, name: HeaderName, value: Option<HeaderValue>) {
    if let Some(value) = value {
        headers.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(origin: &'static str) -> HeaderMap {
        [
            (ORIGIN, origin),
            (ACCESS_CONTROL_REQUEST_METHOD, "PUT"),
            (ACCESS_CONTROL_REQUEST_HEADERS, "x-a, x-b"),
        ]
        .into_iter()
        .map(|(name, value)| (name, HeaderValue::from_static(value)))
        .collect()
    }

    fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
        headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    #[test]
    fn origins() {
        for (allowed, origin, expected) in [
            ("https://a.org", "https://a.org", true),
            ("https://a.org", "https://A.org", true),
            ("https://a.org", "http://a.org", false),
            ("https://a.org", "https://a.org:8443", false),
            ("https://*.a.org", "https://b.a.org", true),
            ("https://*.a.org", "https://c.b.a.org", true),
            ("https://*.a.org", "https://a.org", false),
            ("https://*.a.org", "https://.a.org", false),
            ("https://*.a.org", "https://evil/b.a.org", false),
            ("https://*.a.org", "https://ba.org", false),
        ] {
            assert_eq!(fits(allowed, origin), expected, "{allowed} {origin}");
        }
    }

    #[test]
    fn a_preflight_of_an_allowed_origin() {
        let cors = Cors {
            allow_origins: vec!["https://a.org".into()],
            allow_methods: vec!["GET".into(), "PUT".into()],
            allow_headers: vec!["*".into()],
            max_age_seconds: 5,
            ..Cors::default()
        };
        let answer = cors.preflight(&asked("https://a.org"));
        assert_eq!(text(&answer, &ACCESS_CONTROL_ALLOW_ORIGIN), "https://a.org");
        assert_eq!(text(&answer, &ACCESS_CONTROL_ALLOW_METHODS), "GET, PUT");
        assert_eq!(text(&answer, &ACCESS_CONTROL_ALLOW_HEADERS), "*");
        assert_eq!(text(&answer, &ACCESS_CONTROL_MAX_AGE), "5");
        assert_eq!(text(&answer, &ACCESS_CONTROL_ALLOW_CREDENTIALS), "");
        let with = Cors { allow_credentials: true, ..cors.clone() }.preflight(&asked("https://a.org"));
        assert_eq!(text(&with, &ACCESS_CONTROL_ALLOW_HEADERS), "x-a, x-b", "`*` would be taken literally");
        assert!(cors.preflight(&asked("https://b.org")).is_empty());
    }

    #[test]
    fn a_response_says_one_thing() {
        let cors = Cors { allow_origins: vec!["*".into()], ..Cors::default() };
        let mut response = HeaderMap::new();
        response.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("https://other.org"));
        cors.respond(&asked("https://a.org"), &mut response);
        assert_eq!(text(&response, &ACCESS_CONTROL_ALLOW_ORIGIN), "*");
        let strict = Cors { allow_origins: vec!["https://b.org".into()], ..Cors::default() };
        strict.respond(&asked("https://a.org"), &mut response);
        assert_eq!(text(&response, &ACCESS_CONTROL_ALLOW_ORIGIN), "");
    }
}
