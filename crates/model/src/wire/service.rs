//! `istio.workload.Service` (D02) and [`Service`].

use culvert_proto::culvert::SessionAffinity;
use culvert_proto::culvert::session_affinity::Kind;
use culvert_proto::workload as proto;
use culvert_proto::{Any, SESSION_AFFINITY_EXTENSION, SESSION_AFFINITY_TYPE_URL};
use ipnet::IpNet;
use prost::Message;

use super::{ValueError, encode_gateway, encode_port, gateway, hostname, ip, ip_bytes, port};
use crate::address::{NamespacedHostname, NetworkPrefix};
use crate::identity::Identity;
use crate::service::{Affinity, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service};

/// Why a service was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ServiceError {
    /// A field's value.
    #[error(transparent)]
    Value(#[from] ValueError),
}

/// The service that a message describes.
///
/// # Errors
/// The first field whose value is out of bounds, or an enum value that is not known: each of them decides where bytes go.
pub fn decode(message: proto::Service) -> Result<Service, ServiceError> {
    if message.hostname.is_empty() {
        return Err(ValueError::Missing { field: "hostname" }.into());
    }
    let weighted_waypoints = message.weighted_waypoints.into_iter().map(|weighted| {
        let field = "weighted_waypoints";
        let destination = weighted.destination.ok_or(ValueError::Missing { field })?;
        Ok::<_, ValueError>((gateway(field, destination)?, weighted.weight))
    });
    // A name that is no identity of the mesh (a DNS name, for one) can never be shown by a peer, so leaving it out
    // only narrows what is accepted.
    let subject_alt_names = message.subject_alt_names.iter().filter_map(|name| name.parse::<Identity>().ok());
    Ok(Service {
        key: NamespacedHostname {
            namespace: message.namespace.into(),
            hostname: hostname(&message.hostname),
        },
        name: message.name.into(),
        addresses: message.addresses.into_iter().map(prefix).collect::<Result<_, _>>()?,
        ports: message.ports.into_iter().map(port).collect::<Result<_, _>>()?,
        subject_alt_names: subject_alt_names.collect(),
        waypoint: message.waypoint.map(|w| gateway("waypoint", w).map(Box::new)).transpose()?,
        weighted_waypoints: weighted_waypoints.collect::<Result<_, _>>()?,
        load_balancing: LoadBalancing {
            affinity: affinity(&message.extensions)?,
            ..message.load_balancing.map(load_balancing).transpose()?.unwrap_or_default()
        },
        ip_families: ip_families(message.ip_families)?,
        canonical: message.canonical,
        ingress_use_waypoint: message.ingress_use_waypoint,
        namespace_only: namespace_only(message.visibility)?,
    })
}

/// The message that describes a service.
pub fn encode(service: &Service) -> proto::Service {
    let weighted = |(destination, weight): &(_, u32)| proto::WeightedWaypoint {
        destination: Some(encode_gateway(destination)),
        weight: *weight,
    };
    proto::Service {
        name: service.name.to_string(),
        namespace: service.key.namespace.to_string(),
        hostname: service.key.hostname.to_string(),
        addresses: service.addresses.iter().map(encode_prefix).collect(),
        ports: service.ports.iter().map(encode_port).collect(),
        subject_alt_names: service.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: service.waypoint.as_deref().map(encode_gateway),
        load_balancing: encode_load_balancing(&service.load_balancing),
        ip_families: match service.ip_families {
            IpFamilies::Automatic => proto::IpFamilies::Automatic,
            IpFamilies::V4 => proto::IpFamilies::Ipv4Only,
            IpFamilies::V6 => proto::IpFamilies::Ipv6Only,
            IpFamilies::Dual => proto::IpFamilies::Dual,
        }
        .into(),
        extensions: encode_affinity(service.load_balancing.affinity).into_iter().collect(),
        canonical: service.canonical,
        ingress_use_waypoint: service.ingress_use_waypoint,
        weighted_waypoints: service.weighted_waypoints.iter().map(weighted).collect(),
        visibility: if service.namespace_only {
            proto::service::Visibility::Namespace
        } else {
            proto::service::Visibility::Public
        }
        .into(),
    }
}

fn prefix(message: proto::NetworkAddress) -> Result<NetworkPrefix, ValueError> {
    let field = "addresses";
    let address = ip(field, &message.address)?;
    let full = if address.is_ipv4() { 32 } else { 128 };
    // The length of a mapped IPv4 address counts the 96 bits that were cut off with the mapping.
    let mapped = if address.is_ipv4() && message.address.len() == 16 { 96 } else { 0 };
    let length = match message.length {
        None => full,
        Some(length) => length.checked_sub(mapped).ok_or(ValueError::Prefix { field, address, length })?,
    };
    let prefix = u8::try_from(length)
        .ok()
        .and_then(|bits| IpNet::new(address, bits).ok())
        .ok_or(ValueError::Prefix { field, address, length })?;
    Ok(NetworkPrefix { network: message.network.into(), prefix: prefix.trunc() })
}

fn encode_prefix(prefix: &NetworkPrefix) -> proto::NetworkAddress {
    let whole = prefix.prefix.prefix_len() == prefix.prefix.max_prefix_len();
    proto::NetworkAddress {
        network: prefix.network.to_string(),
        address: ip_bytes(prefix.prefix.addr()),
        length: (!whole).then(|| prefix.prefix.prefix_len().into()),
    }
}

fn load_balancing(message: proto::LoadBalancing) -> Result<LoadBalancing, ValueError> {
    use proto::load_balancing::{HealthPolicy, Mode};
    let mode = match Mode::try_from(message.mode) {
        Ok(Mode::UnspecifiedMode) => LoadBalancingMode::Any,
        Ok(Mode::Strict) => LoadBalancingMode::Strict,
        Ok(Mode::Failover) => LoadBalancingMode::Failover,
        Ok(Mode::Passthrough) => LoadBalancingMode::Passthrough,
        Err(_) => return Err(ValueError::Enum { field: "load_balancing.mode", value: message.mode }),
    };
    let allow_unhealthy = match HealthPolicy::try_from(message.health_policy) {
        Ok(HealthPolicy::OnlyHealthy) => false,
        Ok(HealthPolicy::AllowAll) => true,
        Err(_) => {
            return Err(ValueError::Enum {
                field: "load_balancing.health_policy",
                value: message.health_policy,
            });
        }
    };
    let scopes = message.routing_preference.into_iter().map(scope).collect::<Result<_, _>>()?;
    Ok(LoadBalancing { mode, scopes, allow_unhealthy, affinity: Affinity::None })
}

/// The extension that says whether clients are kept; other extensions of a service are for others.
fn affinity(extensions: &[proto::Extension]) -> Result<Affinity, ValueError> {
    let field = "extensions.session_affinity";
    let ours = extensions.iter().filter_map(|extension| extension.config.as_ref());
    let Some(config) = ours.into_iter().find(|config| config.type_url == SESSION_AFFINITY_TYPE_URL) else {
        return Ok(Affinity::None);
    };
    let message = SessionAffinity::decode(&*config.value).map_err(|_| ValueError::Missing { field })?;
    match Kind::try_from(message.kind) {
        Ok(Kind::None) => Ok(Affinity::None),
        Ok(Kind::ClientAddress) => Ok(Affinity::ClientAddress),
        Err(_) => Err(ValueError::Enum { field, value: message.kind }),
    }
}

/// The extension that says so; none where clients are not kept.
pub fn encode_affinity(affinity: Affinity) -> Option<proto::Extension> {
    let kind = match affinity {
        Affinity::None => return None,
        Affinity::ClientAddress => Kind::ClientAddress,
    };
    let value = SessionAffinity { kind: kind.into() }.encode_to_vec();
    Some(proto::Extension {
        name: SESSION_AFFINITY_EXTENSION.to_owned(),
        config: Some(Any { type_url: SESSION_AFFINITY_TYPE_URL.to_owned(), value: value.into() }),
    })
}

fn scope(value: i32) -> Result<Scope, ValueError> {
    use proto::load_balancing::Scope as Wire;
    match Wire::try_from(value) {
        Ok(Wire::Region) => Ok(Scope::Region),
        Ok(Wire::Zone) => Ok(Scope::Zone),
        Ok(Wire::Subzone) => Ok(Scope::Subzone),
        Ok(Wire::Node) => Ok(Scope::Node),
        Ok(Wire::Cluster) => Ok(Scope::Cluster),
        Ok(Wire::Network) => Ok(Scope::Network),
        Ok(Wire::UnspecifiedScope) | Err(_) => {
            Err(ValueError::Enum { field: "load_balancing.routing_preference", value })
        }
    }
}

fn encode_load_balancing(balancing: &LoadBalancing) -> Option<proto::LoadBalancing> {
    use proto::load_balancing::{HealthPolicy, Mode, Scope as Wire};
    // Affinity is an extension of the service.
    if (LoadBalancing { affinity: Affinity::None, ..balancing.clone() }) == LoadBalancing::default() {
        return None;
    }
    let mode = match balancing.mode {
        LoadBalancingMode::Any => Mode::UnspecifiedMode,
        LoadBalancingMode::Strict => Mode::Strict,
        LoadBalancingMode::Failover => Mode::Failover,
        LoadBalancingMode::Passthrough => Mode::Passthrough,
    };
    let scope = |scope: &Scope| match scope {
        Scope::Region => Wire::Region,
        Scope::Zone => Wire::Zone,
        Scope::Subzone => Wire::Subzone,
        Scope::Node => Wire::Node,
        Scope::Cluster => Wire::Cluster,
        Scope::Network => Wire::Network,
    };
    let health = if balancing.allow_unhealthy { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy };
    Some(proto::LoadBalancing {
        routing_preference: balancing.scopes.iter().map(|s| scope(s).into()).collect(),
        mode: mode.into(),
        health_policy: health.into(),
    })
}

fn ip_families(value: i32) -> Result<IpFamilies, ValueError> {
    match proto::IpFamilies::try_from(value) {
        Ok(proto::IpFamilies::Automatic) => Ok(IpFamilies::Automatic),
        Ok(proto::IpFamilies::Ipv4Only) => Ok(IpFamilies::V4),
        Ok(proto::IpFamilies::Ipv6Only) => Ok(IpFamilies::V6),
        Ok(proto::IpFamilies::Dual) => Ok(IpFamilies::Dual),
        Err(_) => Err(ValueError::Enum { field: "ip_families", value }),
    }
}

fn namespace_only(value: i32) -> Result<bool, ValueError> {
    match proto::service::Visibility::try_from(value) {
        Ok(proto::service::Visibility::Public) => Ok(false),
        Ok(proto::service::Visibility::Namespace) => Ok(true),
        Err(_) => Err(ValueError::Enum { field: "visibility", value }),
    }
}
