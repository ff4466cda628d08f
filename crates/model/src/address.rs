//! Names and places by which things are found.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;

use crate::Str;

/// An address on one network; the empty network is the default one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct NetworkAddress {
    /// The network's name.
    pub network: Str,
    /// The address.
    pub address: IpAddr,
}

/// An address block on one network (a ServiceEntry may own a CIDR, Z74).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct NetworkPrefix {
    /// The network's name.
    pub network: Str,
    /// The block; a single address is a block of full length.
    pub prefix: IpNet,
}

/// A service's name: its namespace and its full host name. Written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    /// The namespace that owns the service.
    pub namespace: Str,
    /// The host name, lower case, without a trailing dot.
    pub hostname: Str,
}

/// Where a waypoint or a network's gateway is (D04).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct GatewayAddress {
    /// A service to look up, or an address.
    pub destination: GatewayDestination,
    /// Its HBONE port, 15008 if the wire says 0.
    pub hbone_port: u16,
}

/// The two ways of naming a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum GatewayDestination {
    /// By the name of its service.
    Hostname(NamespacedHostname),
    /// By address.
    Address(NetworkAddress),
}

impl std::fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl Serialize for NamespacedHostname {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
