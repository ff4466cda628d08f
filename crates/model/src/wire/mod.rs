//! Messages of the wire to the model and back: the only place that knows both.
//!
//! A resource that does not decode is an error, and the control plane hears it (NACK). A policy never is: what cannot be
//! read of it becomes a policy that denies its scope, beside the error.

use std::net::IpAddr;

use culvert_proto::workload as proto;
use prost::Message;

pub mod policy;
pub mod request;
pub mod route;
pub mod service;
pub mod unknown;
pub mod workload;

use crate::Str;
use crate::address::{GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress};
use crate::service::Service;
use crate::workload::{AppProtocol, Port, Workload};

pub use policy::{PolicyError, PolicyResource};
pub use request::{RequestPolicyError, RequestPolicyResource};
pub use route::{RouteError, RouteResource};
pub use service::ServiceError;
pub use workload::WorkloadError;

/// The port of HBONE where a message says 0.
pub const HBONE_PORT: u16 = 15008;

/// What a resource of type `istio.workload.Address` holds (D01).
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "short-lived, and the large one is the usual one")]
pub enum AddressResource {
    /// A running instance.
    Workload(Workload),
    /// A name for several.
    Service(Service),
}

/// Why a resource of type `istio.workload.Address` was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are no such message.
    #[error("address {resource:?} is not decodable: {reason}")]
    Decode {
        /// The resource's name.
        resource: String,
        /// What the decoder says.
        reason: String,
    },
    /// Neither a workload nor a service, or something newer.
    #[error("address {resource:?} holds neither a workload nor a service")]
    Empty {
        /// The resource's name.
        resource: String,
    },
    /// The body names another resource: a removal by name would never find it.
    #[error("address {resource:?} holds {found:?}")]
    Name {
        /// The resource's name.
        resource: String,
        /// What the body calls itself.
        found: String,
    },
    /// A field of the workload.
    #[error("workload {resource:?}: {error}")]
    Workload {
        /// The resource's name.
        resource: String,
        /// What is wrong.
        error: WorkloadError,
    },
    /// A field of the service.
    #[error("service {resource:?}: {error}")]
    Service {
        /// The resource's name.
        resource: String,
        /// What is wrong.
        error: ServiceError,
    },
}

/// A value that no field of its kind may hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// Addresses are 4 or 16 bytes.
    #[error("{field} has {length} bytes; an address has 4 or 16")]
    Address {
        /// The field.
        field: &'static str,
        /// How many bytes it has.
        length: usize,
    },
    /// Ports end at 65535.
    #[error("{field} is {value}; the highest port is 65535")]
    Port {
        /// The field.
        field: &'static str,
        /// What it says.
        value: u32,
    },
    /// Prefixes are no longer than their address.
    #[error("{field} is {length} bits long; {address} has fewer")]
    Prefix {
        /// The field.
        field: &'static str,
        /// The address.
        address: IpAddr,
        /// The length asked for.
        length: u32,
    },
    /// A value that this proxy does not know.
    #[error("{field} has the unknown value {value}")]
    Enum {
        /// The field.
        field: &'static str,
        /// Its number.
        value: i32,
    },
    /// A name in another form than `namespace/hostname`.
    #[error("{field} {value:?} is not namespace/hostname")]
    Name {
        /// The field.
        field: &'static str,
        /// What it says.
        value: String,
    },
    /// A field that must not be empty.
    #[error("{field} is missing")]
    Missing {
        /// The field.
        field: &'static str,
    },
}

/// Decodes one resource of type `istio.workload.Address` named `name`.
///
/// # Errors
/// [`WireError`] names the resource, the field and its value. The resource must not be applied then, and what was known
/// under this name stays.
pub fn address(name: &str, body: &[u8]) -> Result<AddressResource, WireError> {
    let resource = || name.to_owned();
    let message = proto::Address::decode(body)
        .map_err(|error| WireError::Decode { resource: resource(), reason: error.to_string() })?;
    let (decoded, own_name) = match message.r#type.ok_or_else(|| WireError::Empty { resource: resource() })? {
        proto::address::Type::Workload(message) => {
            let workload = workload::decode(message)
                .map_err(|error| WireError::Workload { resource: resource(), error })?;
            let uid = workload.uid.to_string();
            (AddressResource::Workload(workload), uid)
        }
        proto::address::Type::Service(message) => {
            let service = service::decode(message)
                .map_err(|error| WireError::Service { resource: resource(), error })?;
            let key = service.key.to_string();
            (AddressResource::Service(service), key)
        }
    };
    if own_name.trim_end_matches('.').eq_ignore_ascii_case(name.trim_end_matches('.')) {
        Ok(decoded)
    } else {
        Err(WireError::Name { resource: resource(), found: own_name })
    }
}

/// Decodes one resource of type `istio.security.Authorization`; see [`policy::decode`].
pub fn policy(name: &str, body: &[u8]) -> PolicyResource {
    policy::decode(name, body)
}

/// Decodes one resource of type `culvert.waypoint.v1.Route`; see [`route::decode`].
pub fn route(name: &str, body: &[u8]) -> RouteResource {
    route::decode(name, body)
}

/// The resource's name and body as a control plane sends them.
pub fn encode_address(resource: &AddressResource) -> (String, Vec<u8>) {
    let (name, message) = match resource {
        AddressResource::Workload(w) => {
            (w.uid.to_string(), proto::address::Type::Workload(workload::encode(w)))
        }
        AddressResource::Service(s) => (s.key.to_string(), proto::address::Type::Service(service::encode(s))),
    };
    (name, proto::Address { r#type: Some(message) }.encode_to_vec())
}

pub(crate) fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ValueError> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        Ok(IpAddr::from(four))
    } else if let Ok(sixteen) = <[u8; 16]>::try_from(bytes) {
        // A mapped IPv4 address is looked up as the IPv4 address that it is.
        Ok(IpAddr::from(sixteen).to_canonical())
    } else {
        Err(ValueError::Address { field, length: bytes.len() })
    }
}

pub(crate) fn ip_bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(crate) fn port_number(field: &'static str, value: u32) -> Result<u16, ValueError> {
    u16::try_from(value).map_err(|_| ValueError::Port { field, value })
}

/// Host names compare without case and without the root's dot (RFC 1034 section 3.1).
pub(crate) fn hostname(text: &str) -> Str {
    let text = text.strip_suffix('.').unwrap_or(text);
    if text.bytes().any(|b| b.is_ascii_uppercase()) { text.to_ascii_lowercase().into() } else { text.into() }
}

pub(crate) fn namespaced(field: &'static str, text: &str) -> Result<NamespacedHostname, ValueError> {
    match text.split_once('/') {
        Some((namespace, host)) if !host.is_empty() && !host.contains('/') => {
            Ok(NamespacedHostname { namespace: namespace.into(), hostname: hostname(host) })
        }
        _ => Err(ValueError::Name { field, value: text.chars().take(128).collect() }),
    }
}

pub(crate) fn port(message: proto::Port) -> Result<Port, ValueError> {
    Ok(Port {
        service_port: port_number("service_port", message.service_port)?,
        target_port: port_number("target_port", message.target_port)?,
        app_protocol: app_protocol(message.app_protocol),
    })
}

pub(crate) fn encode_port(port: &Port) -> proto::Port {
    let app_protocol = match port.app_protocol {
        AppProtocol::Unknown => proto::AppProtocol::Unknown,
        AppProtocol::Http11 => proto::AppProtocol::Http11,
        AppProtocol::Http2 => proto::AppProtocol::Http2,
        AppProtocol::Grpc => proto::AppProtocol::Grpc,
        AppProtocol::Tcp => proto::AppProtocol::Tcp,
        AppProtocol::Tls => proto::AppProtocol::Tls,
    };
    proto::Port {
        service_port: port.service_port.into(),
        target_port: port.target_port.into(),
        app_protocol: app_protocol.into(),
    }
}

/// A newer protocol's name changes nothing that a node tunnel does, so it is no reason to lose the endpoint.
fn app_protocol(value: i32) -> AppProtocol {
    match proto::AppProtocol::try_from(value) {
        Ok(proto::AppProtocol::Http11) => AppProtocol::Http11,
        Ok(proto::AppProtocol::Http2) => AppProtocol::Http2,
        Ok(proto::AppProtocol::Grpc) => AppProtocol::Grpc,
        Ok(proto::AppProtocol::Tcp) => AppProtocol::Tcp,
        Ok(proto::AppProtocol::Tls) => AppProtocol::Tls,
        Ok(proto::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
    }
}

pub(crate) fn gateway(
    field: &'static str,
    message: proto::GatewayAddress,
) -> Result<GatewayAddress, ValueError> {
    use proto::gateway_address::Destination;
    let destination = match message.destination.ok_or(ValueError::Missing { field })? {
        Destination::Hostname(name) => {
            if name.hostname.is_empty() {
                return Err(ValueError::Missing { field });
            }
            GatewayDestination::Hostname(NamespacedHostname {
                namespace: name.namespace.into(),
                hostname: hostname(&name.hostname),
            })
        }
        Destination::Address(found) => GatewayDestination::Address(NetworkAddress {
            network: found.network.into(),
            address: ip(field, &found.address)?,
        }),
    };
    let port = port_number("hbone_mtls_port", message.hbone_mtls_port)?;
    Ok(GatewayAddress { destination, hbone_port: if port == 0 { HBONE_PORT } else { port } })
}

pub(crate) fn encode_gateway(gateway: &GatewayAddress) -> proto::GatewayAddress {
    use proto::gateway_address::Destination;
    let destination = match &gateway.destination {
        GatewayDestination::Hostname(name) => Destination::Hostname(proto::NamespacedHostname {
            namespace: name.namespace.to_string(),
            hostname: name.hostname.to_string(),
        }),
        GatewayDestination::Address(found) => Destination::Address(proto::NetworkAddress {
            network: found.network.to_string(),
            address: ip_bytes(found.address),
            length: None,
        }),
    };
    proto::GatewayAddress { hbone_mtls_port: gateway.hbone_port.into(), destination: Some(destination) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespaced_name_has_both_parts_and_no_third() {
        let good = namespaced("hostname", "shop/Cart.shop.svc.").unwrap();
        assert_eq!((&*good.namespace, &*good.hostname), ("shop", "cart.shop.svc"));
        for bad in ["cart", "shop/", "shop/a/b", ""] {
            let error = namespaced("hostname", bad).unwrap_err();
            assert_eq!(error, ValueError::Name { field: "hostname", value: bad.into() });
        }
    }
}
