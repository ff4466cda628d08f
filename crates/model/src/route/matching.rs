//! One match of one rule, precompiled, and how it ranks among others.

use std::borrow::Cow;
use std::cmp::Ordering;

use http::{HeaderMap, HeaderName, Method};
use regex::Regex;

use crate::Str;

/// What is known of a request.
#[derive(Clone, Copy, Debug)]
pub struct RequestFacts<'a> {
    /// The method.
    pub method: &'a Method,
    /// The normalised path, without the query.
    pub path: &'a str,
    /// What follows the `?`.
    pub query: Option<&'a str>,
    /// The headers.
    pub headers: &'a HeaderMap,
}

/// One match: all of it has to hold.
#[derive(Clone, Debug, Default)]
pub struct HttpMatch {
    /// What the path has to be.
    pub path: PathMatch,
    /// What the method has to be; `None` is any.
    pub method: Option<Method>,
    /// Headers that have to be there.
    pub headers: Vec<(HeaderName, ValueMatch)>,
    /// Query parameters that have to be there.
    pub query: Vec<(Str, ValueMatch)>,
    /// A part of it was not understood: it goes before all others, since nobody can say how it would rank, and its other parts
    /// alone have to hold.
    pub unknown: bool,
}

/// What a path has to be.
#[derive(Clone, Debug, Default)]
pub enum PathMatch {
    /// Anything: the same as the prefix `/`.
    #[default]
    Any,
    /// This.
    Exact(Str),
    /// By whole segments; without a slash at its end, so that the root is the empty text.
    Prefix(Str),
    /// The whole path is of this form.
    Regex(Regex),
    /// `/service/method`.
    Grpc(GrpcMatch),
}

/// What a gRPC method has to be; `None` is any.
#[derive(Clone, Debug, Default)]
pub struct GrpcMatch {
    /// The service with its package.
    pub service: Option<ValueMatch>,
    /// The method.
    pub method: Option<ValueMatch>,
}

/// What a text has to be.
#[derive(Clone, Debug)]
pub enum ValueMatch {
    /// This.
    Exact(Str),
    /// The whole of it is of this form.
    Regex(Regex),
}

/// How a match ranks: the greater goes first. Equal ranks are told apart by their routes.
///
/// The Gateway API has an exact path before the longest prefix, then a method, then the number of headers, then that of query
/// parameters; and for gRPC the characters of the service, then of the method, then the number of headers. Its open point is where
/// regular expressions of paths go: here they go after exact paths and before all prefixes, the longer pattern first, because
/// beside a prefix `/` they would otherwise never be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    unknown: bool,
    class: u8,
    length: usize,
    second_length: usize,
    method: bool,
    headers: usize,
    query: usize,
}

/// Longest program that one regular expression may become, bytes: some thousands of instructions. Time is linear in the text.
const REGEX_BYTES: usize = 256 << 10;

/// Why a text is no regular expression.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pattern:?} is not a regular expression that can be used: {reason}")]
pub struct BadRegex {
    pattern: String,
    reason: String,
}

/// A regular expression that matches whole texts.
///
/// # Errors
/// It is none, or is larger than it may be.
pub fn whole(pattern: &str) -> Result<Regex, BadRegex> {
    let build = |text: &str| {
        regex::RegexBuilder::new(text).size_limit(REGEX_BYTES).dfa_size_limit(REGEX_BYTES).build()
    };
    // By itself first: what is wrong must not become right by what is put around it.
    build(pattern)
        .and_then(|_| build(&format!("^(?:{pattern})$")))
        .map_err(|error| BadRegex { pattern: pattern.chars().take(128).collect(), reason: error.to_string() })
}

impl HttpMatch {
    /// Whether a request is of this kind.
    #[must_use]
    pub fn matches(&self, request: &RequestFacts<'_>) -> bool {
        self.path.matches(request.path) && self.rest_matches(request)
    }

    /// The same, for a path that is known to match.
    pub(super) fn rest_matches(&self, request: &RequestFacts<'_>) -> bool {
        self.method.as_ref().is_none_or(|method| method == request.method)
            && self.headers.iter().all(|(name, value)| {
                combined(request.headers, name).is_some_and(|found| value.matches(&found))
            })
            && self.query.iter().all(|(name, value)| {
                parameter(request.query, name).is_some_and(|found| value.matches(&found))
            })
    }

    /// How it ranks among others.
    #[must_use]
    pub fn rank(&self) -> Rank {
        let (class, length, second_length) = match &self.path {
            PathMatch::Any => (0, 0, 0),
            PathMatch::Prefix(prefix) => (0, prefix.chars().count(), 0),
            PathMatch::Regex(pattern) => (1, pattern.as_str().len(), 0),
            PathMatch::Exact(path) => (2, path.chars().count(), 0),
            PathMatch::Grpc(grpc) => grpc.rank(),
        };
        Rank {
            unknown: self.unknown,
            class,
            length,
            second_length,
            method: self.method.is_some(),
            headers: self.headers.len(),
            query: self.query.len(),
        }
    }

    /// The prefix of a path that it matched, where that is what it matches by: what a rewrite of the prefix replaces.
    #[must_use]
    pub fn prefix(&self) -> Option<&str> {
        match &self.path {
            PathMatch::Prefix(prefix) => Some(prefix),
            PathMatch::Any => Some(""),
            PathMatch::Exact(_) | PathMatch::Regex(_) | PathMatch::Grpc(_) => None,
        }
    }
}

impl PathMatch {
    /// A prefix, with or without a slash at its end.
    #[must_use]
    pub fn prefix(text: &str) -> Self {
        Self::Prefix(text.trim_end_matches('/').into())
    }

    /// Whether a path is one of these.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => path == &**exact,
            Self::Prefix(prefix) => {
                path.strip_prefix(&**prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Regex(pattern) => pattern.is_match(path),
            Self::Grpc(grpc) => grpc.matches(path),
        }
    }
}

impl GrpcMatch {
    fn matches(&self, path: &str) -> bool {
        let Some((service, method)) = path.strip_prefix('/').and_then(|rest| rest.split_once('/')) else {
            return self.service.is_none() && self.method.is_none();
        };
        self.service.as_ref().is_none_or(|want| want.matches(service))
            && self.method.as_ref().is_none_or(|want| want.matches(method))
    }

    /// Both exact is an exact path; everything else ranks as a prefix would, by its characters.
    fn rank(&self) -> (u8, usize, usize) {
        let characters = |of: &Option<ValueMatch>| of.as_ref().map_or(0, |it| it.text().chars().count());
        let exact = |of: &Option<ValueMatch>| matches!(of, Some(ValueMatch::Exact(_)));
        let class = if exact(&self.service) && exact(&self.method) { 2 } else { 0 };
        (class, characters(&self.service), characters(&self.method))
    }
}

impl ValueMatch {
    /// Whether a text is one of these.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Regex(pattern) => pattern.is_match(text),
        }
    }

    /// The text, or the pattern.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Self::Exact(exact) => exact,
            // Without `^(?:` and `)$`, which are ours.
            Self::Regex(pattern) => &pattern.as_str()[4..pattern.as_str().len() - 2],
        }
    }
}

/// All values of a header as one, as RFC 9110 section 5.3 joins them; `None` where it is missing or is no text.
fn combined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?.to_str().ok()?;
    let Some(second) = values.next() else { return Some(Cow::Borrowed(first)) };
    let mut all = first.to_owned();
    for value in std::iter::once(second).chain(values) {
        all.push(',');
        all.push_str(value.to_str().ok()?);
    }
    Some(Cow::Owned(all))
}

/// The first parameter of this name, decoded. The Gateway API leaves open which of several counts.
fn parameter<'a>(query: Option<&'a str>, name: &str) -> Option<Cow<'a, str>> {
    query?.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key) == name).then(|| decoded(value))
    })
}

/// Percent signs and `+` decoded; what does not decode stays as it is.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains(['%', '+']) {
        return Cow::Borrowed(text);
    }
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|b| char::from(*b).to_digit(16));
        match (bytes[at], digit(1), digit(2)) {
            (b'%', Some(high), Some(low)) => {
                out.push(u8::try_from(high * 16 + low).unwrap_or(b'%'));
                at += 3;
                continue;
            }
            (b'+', ..) => out.push(b' '),
            (byte, ..) => out.push(byte),
        }
        at += 1;
    }
    match String::from_utf8(out) {
        Ok(text) => Cow::Owned(text),
        Err(_) => Cow::Borrowed(text),
    }
}

/// The order of precedence, the first to be used first: rank, then the older route, then its name, then the order in the object.
pub(super) fn precedence(
    a: (&Rank, &super::Route, (usize, usize)),
    b: (&Rank, &super::Route, (usize, usize)),
) -> Ordering {
    b.0.cmp(a.0)
        .then_with(|| a.1.created.cmp(&b.1.created))
        .then_with(|| (&a.1.namespace, &a.1.name).cmp(&(&b.1.namespace, &b.1.name)))
        .then_with(|| a.2.cmp(&b.2))
        // Two parents of one object cannot be told apart by it.
        .then_with(|| a.1.resource.cmp(&b.1.resource))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_match_whole_segments() {
        let matches = |prefix: &str, path: &str| PathMatch::prefix(prefix).matches(path);
        for (prefix, path, expected) in [
            ("/", "/", true),
            ("/", "/any/thing", true),
            ("/v2", "/v2", true),
            ("/v2", "/v2/", true),
            ("/v2", "/v2/a", true),
            ("/v2", "/v2example", false),
            ("/v2/", "/v2", true),
            ("/v2/", "/v2/a", true),
            ("/a/b", "/a", false),
        ] {
            assert_eq!(matches(prefix, path), expected, "{prefix} {path}");
        }
    }

    #[test]
    fn a_regular_expression_is_about_the_whole_text() {
        let pattern = whole("a|ab").unwrap();
        assert!(pattern.is_match("ab") && pattern.is_match("a") && !pattern.is_match("abc"));
        assert!(whole("a)|(b").is_err(), "it is not closed by what is put around it");
        assert!(whole(&format!("(a{{{0}}}){{{0}}}", 1000)).is_err(), "too large");
        assert_eq!(ValueMatch::Regex(whole("a+").unwrap()).text(), "a+");
    }

    #[test]
    fn parameters_are_decoded() {
        let found = |query, name| parameter(Some(query), name).map(Cow::into_owned);
        assert_eq!(found("a=1&b=2&a=3", "a"), Some("1".to_owned()));
        assert_eq!(found("a%20b=c+d%zz", "a b"), Some("c d%zz".to_owned()));
        assert_eq!(found("a", "a"), Some(String::new()));
        assert_eq!(found("", "a"), None);
        assert_eq!(parameter(None, "a"), None);
    }

    #[test]
    fn grpc_methods() {
        let exact = |text: &str| Some(ValueMatch::Exact(text.into()));
        let regex = |text: &str| Some(ValueMatch::Regex(whole(text).unwrap()));
        let matches = |service, method, path| GrpcMatch { service, method }.matches(path);
        assert!(matches(exact("a.B"), exact("Get"), "/a.B/Get"));
        assert!(!matches(exact("a.B"), exact("Get"), "/a.B/Put"));
        assert!(matches(exact("a.B"), None, "/a.B/Put"));
        assert!(matches(None, regex("G.*"), "/any/Get"));
        assert!(!matches(None, regex("G.*"), "/any/Put"));
        assert!(matches(None, None, "/"));
    }
}
