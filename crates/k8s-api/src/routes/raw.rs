//! Parts of routes as they are written, where that differs from what they mean.

use serde::Deserialize;

use super::ObjectRef;
use super::values::{HeaderName, Millis};
use crate::values::Port;

/// A reference, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRef {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawParent {
    pub group: Option<String>,
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: String,
    pub section_name: Option<String>,
    pub port: Option<Port>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawValue {
    #[serde(rename = "type", default)]
    pub type_: Matching,
    pub name: HeaderName,
    pub value: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
pub(super) enum Matching {
    #[default]
    Exact,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawPathMatch {
    #[serde(rename = "type", default)]
    pub type_: PathMatching,
    #[serde(default = "root")]
    pub value: String,
}

#[derive(Clone, Copy, Default, Deserialize)]
pub(super) enum PathMatching {
    Exact,
    #[default]
    PathPrefix,
    RegularExpression,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawMethod {
    #[serde(rename = "type", default)]
    pub type_: Matching,
    pub service: Option<String>,
    pub method: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawTimeouts {
    pub request: Option<Millis>,
    pub backend_request: Option<Millis>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RawRetry {
    pub codes: Vec<u16>,
    pub attempts: Option<u32>,
    pub backoff: Option<Millis>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawSession {
    #[serde(rename = "type")]
    pub type_: RawSessionType,
    pub absolute_timeout: Option<Millis>,
    pub idle_timeout: Option<Millis>,
    pub session_name: Option<HeaderName>,
    pub cookie: Option<RawCookie>,
    pub header: Option<RawSessionHeader>,
    #[serde(rename = "cookieConfig")]
    pub cookie_config: Option<RawCookie>,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
pub(super) enum RawSessionType {
    #[default]
    Cookie,
    Header,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawCookie {
    pub lifetime_type: RawLifetime,
    pub name: Option<HeaderName>,
    pub path: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSessionHeader {
    pub name: HeaderName,
}

#[derive(Clone, Copy, Default, PartialEq, Deserialize)]
pub(super) enum RawLifetime {
    Permanent,
    #[default]
    Session,
}

fn root() -> String {
    "/".to_owned()
}

impl RawRef {
    /// `kind` if none is written.
    pub fn object(self, kind: &str) -> ObjectRef {
        ObjectRef {
            group: self.group.unwrap_or_default(),
            kind: self.kind.unwrap_or_else(|| kind.to_owned()),
            namespace: self.namespace,
            name: self.name,
            port: self.port,
        }
    }
}
