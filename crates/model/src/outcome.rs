//! Why a connection ended as it did: one vocabulary for access logs, metrics and responses.

use serde::Serialize;

/// Who has to act for it to go better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Blame {
    /// The client, or its configuration.
    Client,
    /// The destination, or the way to it.
    Upstream,
    /// A policy that says no: working as configured.
    Policy,
    /// The mesh itself.
    Us,
}

/// Why a connection was refused or cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The source pod is not known (yet) to the proxy (Z30).
    UnknownSource,
    /// The destination is the proxy's own port (Z29, Z49).
    SelfCall,
    /// A known service without a usable endpoint (Z35).
    NoHealthyUpstream,
    /// The service does not offer the port asked for (Z71).
    UnknownPort,
    /// A waypoint is named but cannot be found (Z44).
    UnknownWaypoint,
    /// The destination's network has no gateway that we know.
    UnknownNetworkGateway,
    /// The destination speaks a protocol that a node tunnel does not.
    UnsupportedProtocol,
    /// The address asked for inside the tunnel is not the pod's (Z47).
    WrongDestination,
    /// The CONNECT request is malformed.
    BadRequest,
    /// An AuthorizationPolicy refused it.
    AuthorizationPolicy,
    /// An AuthorizationPolicy that changed refused it while it was open (Z67).
    AuthorizationPolicyLate,
    /// A policy that applies is missing or could not be understood: refused rather than skipped.
    PolicyUnavailable,
    /// The peer must come through the destination's waypoint.
    WaypointRequired,
    /// A NetworkPolicy may restrict a connection that was handed over on its node: the next one crosses the network.
    NetworkPolicy,
    /// No certificate could be had for our side.
    NoCertificate,
    /// The TLS handshake failed.
    TlsHandshake,
    /// The peer's certificate names another identity than expected, or none that the mesh accepts.
    PeerIdentity,
    /// The HTTP/2 handshake failed.
    Http2Handshake,
    /// The peer's tunnel refused the stream.
    TunnelRefused,
    /// The destination refused the TCP connection.
    ConnectionRefused,
    /// No way to the destination.
    Unreachable,
    /// Connecting took too long.
    ConnectTimeout,
    /// The tunnel's connection was lost.
    TunnelLost,
    /// The client reset.
    ClientReset,
    /// The destination reset.
    UpstreamReset,
    /// Too many connections, streams or descriptors.
    Overloaded,
    /// The pod or the proxy is going away.
    Draining,
    /// Idle for too long.
    IdleTimeout,
    /// Something failed inside the proxy.
    Internal,
}

impl Reason {
    /// Who has to act.
    pub fn blame(self) -> Blame {
        use Reason as R;
        match self {
            R::SelfCall | R::WrongDestination | R::BadRequest | R::ClientReset | R::UnsupportedProtocol => {
                Blame::Client
            }
            R::AuthorizationPolicy
            | R::AuthorizationPolicyLate
            | R::PolicyUnavailable
            | R::WaypointRequired
            | R::NetworkPolicy => Blame::Policy,
            R::NoHealthyUpstream
            | R::UnknownPort
            | R::UnknownWaypoint
            | R::UnknownNetworkGateway
            | R::TlsHandshake
            | R::PeerIdentity
            | R::Http2Handshake
            | R::TunnelRefused
            | R::ConnectionRefused
            | R::Unreachable
            | R::ConnectTimeout
            | R::TunnelLost
            | R::UpstreamReset
            | R::IdleTimeout => Blame::Upstream,
            R::UnknownSource | R::NoCertificate | R::Overloaded | R::Draining | R::Internal => Blame::Us,
        }
    }

    /// Its name in logs and metrics, `snake_case`.
    pub fn as_str(self) -> &'static str {
        use Reason as R;
        match self {
            R::UnknownSource => "unknown_source",
            R::SelfCall => "self_call",
            R::NoHealthyUpstream => "no_healthy_upstream",
            R::UnknownPort => "unknown_port",
            R::UnknownWaypoint => "unknown_waypoint",
            R::UnknownNetworkGateway => "unknown_network_gateway",
            R::UnsupportedProtocol => "unsupported_protocol",
            R::WrongDestination => "wrong_destination",
            R::BadRequest => "bad_request",
            R::AuthorizationPolicy => "authorization_policy",
            R::AuthorizationPolicyLate => "authorization_policy_late",
            R::PolicyUnavailable => "policy_unavailable",
            R::WaypointRequired => "waypoint_required",
            R::NetworkPolicy => "network_policy",
            R::NoCertificate => "no_certificate",
            R::TlsHandshake => "tls_handshake",
            R::PeerIdentity => "peer_identity",
            R::Http2Handshake => "http2_handshake",
            R::TunnelRefused => "tunnel_refused",
            R::ConnectionRefused => "connection_refused",
            R::Unreachable => "unreachable",
            R::ConnectTimeout => "connect_timeout",
            R::TunnelLost => "tunnel_lost",
            R::ClientReset => "client_reset",
            R::UpstreamReset => "upstream_reset",
            R::Overloaded => "overloaded",
            R::Draining => "draining",
            R::IdleTimeout => "idle_timeout",
            R::Internal => "internal",
        }
    }

    /// Istio's `response_flags` label for it, so that existing dashboards work (Z106).
    pub fn response_flag(self) -> &'static str {
        use Reason as R;
        match self {
            R::AuthorizationPolicy
            | R::AuthorizationPolicyLate
            | R::PolicyUnavailable
            | R::WaypointRequired => "DENY",
            R::TlsHandshake | R::PeerIdentity => "TLS_FAILURE",
            R::Http2Handshake => "H2_HANDSHAKE_FAILURE",
            R::NoCertificate => "IDENTITY_ERROR",
            R::ConnectTimeout | R::NetworkPolicy => "NETWORK_POLICY",
            _ => "CONNECT",
        }
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
