//! Kinds whose status is written.

use super::StatusKind;

const fn kind(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    versions: &'static [&'static str],
) -> StatusKind {
    StatusKind { group, kind, plural, versions }
}

const SECURITY: &str = "security.istio.io";
const NETWORKING: &str = "networking.istio.io";
const GATEWAYS: &str = "gateway.networking.k8s.io";
const OF_NETWORKING: &[&str] = &["v1", "v1beta1", "v1alpha3"];

/// Of `security.istio.io`.
pub const AUTHORIZATION_POLICY: StatusKind =
    kind(SECURITY, "AuthorizationPolicy", "authorizationpolicies", &["v1", "v1beta1"]);
/// Of `security.istio.io`.
pub const PEER_AUTHENTICATION: StatusKind =
    kind(SECURITY, "PeerAuthentication", "peerauthentications", &["v1", "v1beta1"]);
/// Of `security.istio.io`.
pub const REQUEST_AUTHENTICATION: StatusKind =
    kind(SECURITY, "RequestAuthentication", "requestauthentications", &["v1", "v1beta1"]);
/// Of `networking.istio.io`.
pub const SERVICE_ENTRY: StatusKind = kind(NETWORKING, "ServiceEntry", "serviceentries", OF_NETWORKING);
/// Of `networking.istio.io`.
pub const WORKLOAD_ENTRY: StatusKind = kind(NETWORKING, "WorkloadEntry", "workloadentries", OF_NETWORKING);
/// Of `networking.istio.io`.
pub const DESTINATION_RULE: StatusKind =
    kind(NETWORKING, "DestinationRule", "destinationrules", OF_NETWORKING);
/// Of the core.
pub const SERVICE: StatusKind = kind("", "Service", "services", &["v1"]);
/// Of the Gateway API; without a namespace.
pub const GATEWAY_CLASS: StatusKind = kind(GATEWAYS, "GatewayClass", "gatewayclasses", &["v1", "v1beta1"]);
/// Of the Gateway API.
pub const GATEWAY: StatusKind = kind(GATEWAYS, "Gateway", "gateways", &["v1", "v1beta1"]);
/// Of the Gateway API.
pub const HTTP_ROUTE: StatusKind = kind(GATEWAYS, "HTTPRoute", "httproutes", &["v1", "v1beta1"]);
/// Of the Gateway API.
pub const GRPC_ROUTE: StatusKind = kind(GATEWAYS, "GRPCRoute", "grpcroutes", &["v1", "v1alpha2"]);
/// Of the Gateway API.
pub const TCP_ROUTE: StatusKind = kind(GATEWAYS, "TCPRoute", "tcproutes", &["v1", "v1alpha2"]);
/// Of the Gateway API.
pub const TLS_ROUTE: StatusKind = kind(GATEWAYS, "TLSRoute", "tlsroutes", &["v1", "v1alpha3", "v1alpha2"]);
