//! Filters of rules and backends.

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::ObjectRef;
use super::raw::RawRef;
use super::read::ONE_IN;
use super::values::{HeaderName, HeaderValue, HostName, ReplacementPath};
use crate::values::Port;

/// What is done with a request, or its response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Filter {
    /// `RequestHeaderModifier`.
    RequestHeaders(HeaderChange),
    /// `ResponseHeaderModifier`.
    ResponseHeaders(HeaderChange),
    /// `RequestRedirect`.
    Redirect(Redirect),
    /// `URLRewrite`.
    Rewrite(Rewrite),
    /// `RequestMirror`.
    Mirror(Mirror),
    /// `CORS`.
    Cors(Cors),
    /// `ExtensionRef`: an object that says what is to be done. There is no kind of it that the mesh knows.
    Extension(ObjectRef),
}

/// Headers that are changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HeaderChange {
    /// In place of what is there.
    pub set: Vec<HeaderEntry>,
    /// Beside what is there.
    pub add: Vec<HeaderEntry>,
    /// Taken away.
    pub remove: Vec<HeaderName>,
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeaderEntry {
    /// Its name, as written.
    pub name: HeaderName,
    /// Its value.
    pub value: HeaderValue,
}

/// The client is sent elsewhere.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Redirect {
    /// `http` or `https`; as the request has it if absent, like the rest.
    pub scheme: Option<String>,
    /// The host.
    pub hostname: Option<String>,
    /// The port.
    pub port: Option<Port>,
    /// The path.
    pub path: Option<PathChange>,
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
}

/// What the backend is asked for instead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Rewrite {
    /// The host.
    pub hostname: Option<String>,
    /// The path.
    pub path: Option<PathChange>,
}

/// What becomes of a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum PathChange {
    /// This.
    Full(String),
    /// This instead of the prefix that matched.
    Prefix(String),
}

/// A copy of requests goes there, and what comes back is dropped.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mirror {
    /// Where.
    pub target: ObjectRef,
    /// Of how many requests.
    pub share: Fraction,
}

/// A part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Fraction {
    pub numerator: u32,
    pub denominator: u32,
}

/// What pages of other origins may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cors {
    /// `*`, origins, or origins with `*` in their host.
    pub allow_origins: Vec<String>,
    /// With credentials.
    pub allow_credentials: bool,
    /// Methods, or `*`.
    pub allow_methods: Vec<String>,
    /// Headers of requests, or `*`.
    pub allow_headers: Vec<HeaderName>,
    /// Headers of responses, or `*`.
    pub expose_headers: Vec<HeaderName>,
    /// For how many seconds an answer holds; 5 if absent.
    pub max_age: Option<u32>,
}

/// As it is written. [`Raw::filter`] says what is wrong with it.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Raw {
    #[serde(rename = "type")]
    type_: String,
    request_header_modifier: Option<HeaderChange>,
    response_header_modifier: Option<HeaderChange>,
    request_mirror: Option<RawMirror>,
    request_redirect: Option<RawRedirect>,
    #[serde(rename = "urlRewrite")]
    url_rewrite: Option<RawRewrite>,
    extension_ref: Option<RawRef>,
    cors: Option<Cors>,
    external_auth: Option<IgnoredAny>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawMirror {
    backend_ref: RawRef,
    percent: Option<u32>,
    fraction: Option<RawFraction>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFraction {
    numerator: u32,
    denominator: Option<u32>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRedirect {
    scheme: Option<String>,
    hostname: Option<HostName>,
    port: Option<Port>,
    path: Option<RawPath>,
    status_code: Option<u16>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRewrite {
    hostname: Option<HostName>,
    path: Option<RawPath>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPath {
    #[serde(rename = "type")]
    type_: RawPathType,
    replace_full_path: Option<ReplacementPath>,
    replace_prefix_match: Option<ReplacementPath>,
}

#[derive(Deserialize)]
enum RawPathType {
    ReplaceFullPath,
    ReplacePrefixMatch,
}

/// What is wrong: a field below the filter, its value, why, and what would be right.
type Wrong = (&'static str, String, String, &'static str);

const TYPES: [(&str, &str); 8] = [
    ("RequestHeaderModifier", "requestHeaderModifier"),
    ("ResponseHeaderModifier", "responseHeaderModifier"),
    ("RequestMirror", "requestMirror"),
    ("RequestRedirect", "requestRedirect"),
    ("URLRewrite", "urlRewrite"),
    ("ExtensionRef", "extensionRef"),
    ("CORS", "cors"),
    ("ExternalAuth", "externalAuth"),
];

impl Raw {
    /// The filter, if it is one that the mesh can carry out, at least where its references lead somewhere.
    pub fn filter(self) -> Result<Filter, Wrong> {
        self.one_of()?;
        let filter = match self.type_.as_str() {
            "RequestHeaderModifier" => {
                let change = self.request_header_modifier.map(|it| may_change("requestHeaderModifier", it));
                change.transpose()?.map(Filter::RequestHeaders)
            }
            "ResponseHeaderModifier" => {
                let change = self.response_header_modifier.map(|it| may_change("responseHeaderModifier", it));
                change.transpose()?.map(Filter::ResponseHeaders)
            }
            "RequestMirror" => self.request_mirror.map(RawMirror::mirror).transpose()?.map(Filter::Mirror),
            "RequestRedirect" => {
                self.request_redirect.map(RawRedirect::redirect).transpose()?.map(Filter::Redirect)
            }
            "URLRewrite" => self.url_rewrite.map(RawRewrite::rewrite).transpose()?.map(Filter::Rewrite),
            "ExtensionRef" => self.extension_ref.map(|it| Filter::Extension(it.object(""))),
            "CORS" => {
                if let Some(cors) = &self.cors {
                    check_cors(cors)?;
                }
                self.cors.map(Filter::Cors)
            }
            _ => None,
        };
        let expected = "a filter that the mesh carries out";
        filter.ok_or_else(|| ("type", self.type_, "is not carried out".to_owned(), expected))
    }

    /// Exactly the field that its type names is there.
    fn one_of(&self) -> Result<(), Wrong> {
        let there = [
            self.request_header_modifier.is_some(),
            self.response_header_modifier.is_some(),
            self.request_mirror.is_some(),
            self.request_redirect.is_some(),
            self.url_rewrite.is_some(),
            self.extension_ref.is_some(),
            self.cors.is_some(),
            self.external_auth.is_some(),
        ];
        let Some(at) = TYPES.iter().position(|(type_, _)| *type_ == self.type_) else {
            let expected = "RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS or ExtensionRef";
            return Err(("type", self.type_.clone(), "unknown value".to_owned(), expected));
        };
        if !there[at] {
            return Err((TYPES[at].1, String::new(), format!("is required with type {}", self.type_), ""));
        }
        match (0..TYPES.len()).find(|other| *other != at && there[*other]) {
            Some(other) => {
                Err((TYPES[other].1, String::new(), format!("cannot stand beside type {}", self.type_), ""))
            }
            None => Ok(()),
        }
    }
}

/// Headers that say how a message is framed or where it goes: with another value two parties would read one message differently.
const FRAMING: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn may_change(field: &'static str, change: HeaderChange) -> Result<HeaderChange, Wrong> {
    let named = change.set.iter().chain(&change.add).map(|it| &it.name).chain(&change.remove);
    let mut named = named.map(|it| it.0.as_str());
    match named.find(|name| FRAMING.iter().any(|it| name.eq_ignore_ascii_case(it))) {
        Some(name) => {
            let reason = "says how a message is framed or where it goes, and no filter may change that";
            Err((field, name.to_owned(), reason.to_owned(), "another header"))
        }
        None => Ok(change),
    }
}

impl RawMirror {
    fn mirror(self) -> Result<Mirror, Wrong> {
        let share = match (self.percent, self.fraction) {
            (Some(_), Some(_)) => {
                return Err((
                    "requestMirror.percent",
                    String::new(),
                    "cannot stand beside fraction".to_owned(),
                    "one of them",
                ));
            }
            (Some(percent), None) => Fraction { numerator: percent, denominator: 100 },
            (None, Some(it)) => {
                Fraction { numerator: it.numerator, denominator: it.denominator.unwrap_or(100) }
            }
            (None, None) => Fraction { numerator: 100, denominator: 100 },
        };
        if share.denominator == 0 || share.numerator > share.denominator {
            let value = format!("{}/{}", share.numerator, share.denominator);
            return Err(("requestMirror", value, "is no part of one".to_owned(), "from none to all"));
        }
        Ok(Mirror { target: self.backend_ref.object("Service"), share })
    }
}

impl RawRedirect {
    fn redirect(self) -> Result<Redirect, Wrong> {
        let scheme = self.scheme.as_deref();
        if let Some(other) = scheme.filter(|it| !["http", "https"].contains(it)) {
            return Err((
                "requestRedirect.scheme",
                other.to_owned(),
                "unknown value".to_owned(),
                "http or https",
            ));
        }
        let status = self.status_code.unwrap_or(302);
        if ![301, 302, 303, 307, 308].contains(&status) {
            let expected = "301, 302, 303, 307 or 308";
            return Err((
                "requestRedirect.statusCode",
                status.to_string(),
                "unknown value".to_owned(),
                expected,
            ));
        }
        let path = self.path.map(|it| it.change("requestRedirect.path")).transpose()?;
        Ok(Redirect {
            scheme: self.scheme,
            hostname: self.hostname.map(|it| it.0),
            port: self.port,
            path,
            status,
        })
    }
}

impl RawRewrite {
    fn rewrite(self) -> Result<Rewrite, Wrong> {
        let path = self.path.map(|it| it.change("urlRewrite.path")).transpose()?;
        Ok(Rewrite { hostname: self.hostname.map(|it| it.0), path })
    }
}

impl RawPath {
    fn change(self, at: &'static str) -> Result<PathChange, Wrong> {
        match (self.type_, self.replace_full_path, self.replace_prefix_match) {
            (RawPathType::ReplaceFullPath, Some(path), None) => Ok(PathChange::Full(path.0)),
            (RawPathType::ReplacePrefixMatch, None, Some(path)) => Ok(PathChange::Prefix(path.0)),
            _ => Err((
                at,
                String::new(),
                "has not the one value that its type names".to_owned(),
                "replaceFullPath or replacePrefixMatch",
            )),
        }
    }
}

const METHODS: [&str; 10] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "*"];

fn check_cors(cors: &Cors) -> Result<(), Wrong> {
    if let Some(bad) = cors.allow_methods.iter().find(|it| !METHODS.contains(&it.as_str())) {
        return Err((
            "cors.allowMethods",
            bad.clone(),
            "unknown value".to_owned(),
            "a method in capitals, or *",
        ));
    }
    if let Some(bad) = cors.allow_origins.iter().find(|it| !is_origin(it)) {
        let expected = "*, or http:// or https:// and a host, with *. in front for all below it";
        return Err(("cors.allowOrigins", bad.clone(), "invalid value".to_owned(), expected));
    }
    let all = |list: &mut dyn Iterator<Item = &str>| {
        let list: Vec<&str> = list.collect();
        list.contains(&"*") && list.len() > 1
    };
    let lists: [(&'static str, bool); 3] = [
        ("cors.allowOrigins", all(&mut cors.allow_origins.iter().map(String::as_str))),
        ("cors.allowMethods", all(&mut cors.allow_methods.iter().map(String::as_str))),
        ("cors.allowHeaders", all(&mut cors.allow_headers.iter().map(|it| it.0.as_str()))),
    ];
    if let Some((field, _)) = lists.iter().find(|(_, wrong)| *wrong) {
        return Err((field, "*".to_owned(), "stands beside others".to_owned(), "* alone, or others"));
    }
    let lengths = [cors.allow_origins.len(), cors.allow_headers.len(), cors.expose_headers.len()];
    if lengths.iter().any(|length| *length > ONE_IN) {
        return Err(("cors", String::new(), "has a list of more than 64".to_owned(), ""));
    }
    if cors.max_age == Some(0) {
        return Err(("cors.maxAge", "0".to_owned(), "invalid value".to_owned(), "1 or more"));
    }
    Ok(())
}

fn is_origin(text: &str) -> bool {
    if text == "*" {
        return true;
    }
    let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) else {
        return false;
    };
    let (host, port) = rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)));
    let label = |it: &str| !it.is_empty() && it.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    let host_good = host == "*" || host.strip_prefix("*.").unwrap_or(host).split('.').all(label);
    text.len() <= 253 && host_good && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|it| it != 0))
}
