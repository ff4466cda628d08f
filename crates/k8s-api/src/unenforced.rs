//! Kinds that only a waypoint acts on: known, so that a mistake in one is found when it is written, and enforced by nothing yet.
//! A directory of manifests refuses them, since there is no other way there to say that they do nothing.

use serde::Deserialize;

use crate::meta::StringMap;
use crate::object::Checks;
use crate::security::{Selector, TargetRef};
use crate::values::{Port, is_service_host};

/// `spec` of a RequestAuthentication.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct RequestAuthenticationSpec {
    selector: Option<Selector>,
    target_ref: Option<TargetRef>,
    target_refs: Vec<TargetRef>,
    jwt_rules: Vec<JwtRule>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct JwtRule {
    issuer: String,
    audiences: Vec<String>,
    jwks_uri: String,
    jwks: String,
    from_headers: Vec<JwtHeader>,
    from_params: Vec<String>,
    from_cookies: Vec<String>,
    output_payload_to_header: String,
    forward_original_token: bool,
    output_claim_to_headers: Vec<ClaimToHeader>,
    timeout: String,
    space_delimited_claims: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct JwtHeader {
    name: String,
    #[serde(default)]
    prefix: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ClaimToHeader {
    header: String,
    claim: String,
}

/// `spec` of a DestinationRule. What is below a traffic policy is the waypoint's to judge; which parts there are is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(crate) struct DestinationRuleSpec {
    host: String,
    traffic_policy: Option<TrafficPolicy>,
    subsets: Vec<Subset>,
    export_to: Vec<String>,
    workload_selector: Option<Selector>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Subset {
    name: String,
    labels: StringMap,
    traffic_policy: Option<TrafficPolicy>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct TrafficPolicy {
    load_balancer: Option<Part>,
    connection_pool: Option<Part>,
    outlier_detection: Option<Part>,
    tls: Option<Part>,
    port_level_settings: Vec<PortPolicy>,
    tunnel: Option<Part>,
    proxy_protocol: Option<Part>,
    retry_budget: Option<Part>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct PortPolicy {
    port: Option<PortSelector>,
    load_balancer: Option<Part>,
    connection_pool: Option<Part>,
    outlier_detection: Option<Part>,
    tls: Option<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct PortSelector {
    #[allow(dead_code, reason = "its type is the check")]
    number: Port,
}

/// A map, whatever is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Part {}

impl RequestAuthenticationSpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let targeted = self.target_ref.is_some() || !self.target_refs.is_empty();
        if targeted && self.selector.is_some() {
            checks.fail("spec.selector", "", "cannot stand beside targetRefs", "one of them");
        }
        for (index, rule) in self.jwt_rules.iter().enumerate() {
            let at = |field: &str| format!("spec.jwtRules[{index}].{field}");
            if rule.issuer.is_empty() {
                checks.fail(at("issuer"), "", "is required", "the iss claim of the tokens");
            }
            if !rule.jwks.is_empty() && !rule.jwks_uri.is_empty() {
                checks.fail(at("jwksUri"), &rule.jwks_uri, "cannot stand beside jwks", "one of them");
            }
            let uri = rule.jwks_uri.as_str();
            if !uri.is_empty() && !["http://", "https://"].iter().any(|scheme| uri.starts_with(scheme)) {
                checks.fail(at("jwksUri"), uri, "invalid value", "a URL with http or https");
            }
        }
    }
}

impl DestinationRuleSpec {
    pub(crate) fn check(&self, checks: &mut Checks) {
        let short = !self.host.is_empty() && !self.host.contains('.');
        if !short && self.host != "*" && !is_service_host(&self.host) {
            let expected = "the name of a service: short, or a DNS name, or *. and a DNS name";
            checks.fail("spec.host", &self.host, "invalid value", expected);
        }
        for (index, subset) in self.subsets.iter().enumerate() {
            let at = format!("spec.subsets[{index}].name");
            if subset.name.is_empty() {
                checks.fail(at, "", "is required", "a name");
            } else if self.subsets[..index].iter().any(|other| other.name == subset.name) {
                checks.fail(at, &subset.name, "is there twice", "");
            }
        }
    }
}
