//! Services: names and virtual addresses that stand for a set of endpoints.

use serde::Serialize;
use smallvec::SmallVec;

use crate::Str;
use crate::address::{GatewayAddress, NamespacedHostname, NetworkPrefix};
use crate::identity::Identity;
use crate::workload::Port;

/// A name that stands for endpoints (D02).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Service {
    /// `namespace/hostname`: the resource's name on the wire.
    pub key: NamespacedHostname,
    /// The Kubernetes name.
    pub name: Str,
    /// Its virtual addresses; none for a headless service.
    pub addresses: SmallVec<[NetworkPrefix; 2]>,
    /// Its ports.
    pub ports: SmallVec<[Port; 2]>,
    /// Identities accepted besides the endpoints' own.
    pub subject_alt_names: SmallVec<[Identity; 1]>,
    /// The waypoint for traffic addressed to the service.
    pub waypoint: Option<Box<GatewayAddress>>,
    /// Several waypoints with weights (canary), chosen for each connection (Z32).
    pub weighted_waypoints: Vec<(GatewayAddress, u32)>,
    /// How endpoints are chosen.
    pub load_balancing: LoadBalancing,
    /// Which address families its endpoints are used on.
    pub ip_families: IpFamilies,
    /// The owner of the host name when several services claim it (D26).
    pub canonical: bool,
    /// Gateways send to the waypoint too (W07).
    pub ingress_use_waypoint: bool,
    /// Hidden from other namespaces (Z75).
    pub namespace_only: bool,
}

/// How endpoints are chosen (Z69, Z70).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LoadBalancing {
    /// The rule.
    pub mode: LoadBalancingMode,
    /// What `Strict` and `Failover` compare, most important first.
    pub scopes: SmallVec<[Scope; 3]>,
    /// Endpoints that are not ready count too (publishNotReadyAddresses).
    pub allow_unhealthy: bool,
    /// Whether a client stays with its endpoint.
    pub affinity: Affinity,
}

/// Whether a client stays with its endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum Affinity {
    /// Each connection by itself.
    #[default]
    None,
    /// Connections from one address go to one endpoint while that is there (`sessionAffinity: ClientIP`).
    ClientAddress,
}

/// The rule by which endpoints are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum LoadBalancingMode {
    /// Any endpoint.
    #[default]
    Any,
    /// Only endpoints that match every scope.
    Strict,
    /// Those that match the most leading scopes.
    Failover,
    /// The original destination, untouched (Z36).
    Passthrough,
}

/// A scope of locality.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// Address families a service answers on (Z72).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize)]
pub enum IpFamilies {
    /// Whatever its endpoints have.
    #[default]
    Automatic,
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}
