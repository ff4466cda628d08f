//! `istio.workload.Workload` (D03) and [`Workload`].

use culvert_proto::workload as proto;
use culvert_proto::{Any, POD_EXTENSION, POD_TYPE_URL, culvert};
use prost::Message;

use super::{
    ValueError, encode_gateway, encode_port, gateway, hostname, ip, ip_bytes, namespaced, port, port_number,
};
use crate::Str;
use crate::identity::{Identity, ParseIdentityError};
use crate::workload::{
    ApplicationTunnel, Health, Locality, NetworkMode, NetworkPolicies, PodFacts, Ports, Str2, TunnelProtocol,
    Workload, WorkloadType,
};

/// The trust domain of a workload that names none; control planes leave out their default.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// The service account of a workload that names none, as Kubernetes has it.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// Why a workload was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorkloadError {
    /// A field's value.
    #[error(transparent)]
    Value(#[from] ValueError),
    /// Trust domain, namespace and service account make no identity.
    #[error(transparent)]
    Identity(#[from] ParseIdentityError),
}

/// The workload that a message describes.
///
/// # Errors
/// The first field whose value is out of bounds, or an enum value that decides how bytes travel and is not known.
/// Extensions and fields that are not known are ignored: a newer control plane may say more than matters here. So is our
/// own extension if it cannot be read: then nothing is known, and what needs to know does not happen.
pub fn decode(message: proto::Workload) -> Result<Workload, WorkloadError> {
    if message.uid.is_empty() {
        return Err(ValueError::Missing { field: "uid" }.into());
    }
    let namespace = Str::from(message.namespace);
    let identity = Identity::new(
        or(message.trust_domain, DEFAULT_TRUST_DOMAIN),
        namespace.clone(),
        or(message.service_account, DEFAULT_SERVICE_ACCOUNT),
    )?;
    let mut addresses = smallvec::SmallVec::new();
    for bytes in &message.addresses {
        let address = ip("addresses", bytes)?;
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let services = message.services.into_iter().map(|(name, ports)| {
        let ports = ports.ports.into_iter().map(port).collect::<Result<_, _>>()?;
        Ok::<_, ValueError>((namespaced("services", &name)?, Ports(ports)))
    });
    let services = services.collect::<Result<_, _>>()?;
    let locality = message.locality.unwrap_or_default();
    Ok(Workload {
        uid: message.uid.into(),
        name: message.name.into(),
        namespace,
        addresses,
        hostname: hostname(&message.hostname),
        network: message.network.into(),
        tunnel_protocol: tunnel_protocol(message.tunnel_protocol)?,
        identity,
        waypoint: message.waypoint.map(|w| gateway("waypoint", w).map(Box::new)).transpose()?,
        network_gateway: message
            .network_gateway
            .map(|g| gateway("network_gateway", g).map(Box::new))
            .transpose()?,
        node: message.node.into(),
        canonical_name: message.canonical_name.into(),
        canonical_revision: message.canonical_revision.into(),
        workload_type: workload_type(message.workload_type),
        workload_name: message.workload_name.into(),
        native_tunnel: message.native_tunnel,
        application_tunnel: message.application_tunnel.map(application_tunnel).transpose()?,
        services,
        authorization_policies: message.authorization_policies.into_iter().map(Str::from).collect(),
        health: health(message.status)?,
        cluster_id: message.cluster_id.into(),
        locality: Locality {
            region: Str2(locality.region.into()),
            zone: Str2(locality.zone.into()),
            subzone: Str2(locality.subzone.into()),
        },
        network_mode: network_mode(message.network_mode)?,
        capacity: message.capacity.unwrap_or(1),
        pod: pod_facts(&message.extensions),
    })
}

/// The message that describes a workload.
pub fn encode(workload: &Workload) -> proto::Workload {
    let services = workload.services.iter().map(|(key, ports)| {
        (key.to_string(), proto::PortList { ports: ports.0.iter().map(encode_port).collect() })
    });
    let locality = &workload.locality;
    proto::Workload {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        addresses: workload.addresses.iter().copied().map(ip_bytes).collect(),
        hostname: workload.hostname.to_string(),
        network: workload.network.to_string(),
        tunnel_protocol: encode_tunnel_protocol(workload.tunnel_protocol).into(),
        trust_domain: workload.identity.trust_domain().to_string(),
        service_account: workload.identity.service_account().to_string(),
        waypoint: workload.waypoint.as_deref().map(encode_gateway),
        network_gateway: workload.network_gateway.as_deref().map(encode_gateway),
        node: workload.node.to_string(),
        canonical_name: workload.canonical_name.to_string(),
        canonical_revision: workload.canonical_revision.to_string(),
        workload_type: encode_workload_type(workload.workload_type).into(),
        workload_name: workload.workload_name.to_string(),
        native_tunnel: workload.native_tunnel,
        application_tunnel: workload.application_tunnel.map(encode_application_tunnel),
        services: services.collect(),
        authorization_policies: workload.authorization_policies.iter().map(ToString::to_string).collect(),
        status: match workload.health {
            Health::Healthy => proto::WorkloadStatus::Healthy,
            Health::Unhealthy => proto::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: workload.cluster_id.to_string(),
        locality: (*locality != Locality::default()).then(|| proto::Locality {
            region: locality.region.0.to_string(),
            zone: locality.zone.0.to_string(),
            subzone: locality.subzone.0.to_string(),
        }),
        network_mode: match workload.network_mode {
            NetworkMode::Standard => proto::NetworkMode::Standard,
            NetworkMode::HostNetwork => proto::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: workload.pod.iter().map(|pod| encode_pod_facts(pod)).collect(),
        capacity: (workload.capacity != 1).then_some(workload.capacity),
    }
}

/// Only one that stands alone is believed: of two, either may be the one that restricts.
fn pod_facts(extensions: &[proto::Extension]) -> Option<Box<PodFacts>> {
    let mut ours = extensions.iter().filter(|it| it.name == POD_EXTENSION);
    let (only, None) = (ours.next()?, ours.next()) else { return None };
    let config = only.config.as_ref().filter(|config| config.type_url == POD_TYPE_URL)?;
    let message = culvert::Pod::decode(&*config.value).ok()?;
    let network_policies = match culvert::pod::NetworkPolicies::try_from(message.network_policies) {
        Ok(culvert::pod::NetworkPolicies::None) => NetworkPolicies::None,
        Ok(culvert::pod::NetworkPolicies::Selected) => NetworkPolicies::Selected,
        Ok(culvert::pod::NetworkPolicies::Unknown) | Err(_) => NetworkPolicies::Unknown,
    };
    (!message.uid.is_empty()).then(|| Box::new(PodFacts { uid: message.uid.into(), network_policies }))
}

fn encode_pod_facts(pod: &PodFacts) -> proto::Extension {
    let network_policies = match pod.network_policies {
        NetworkPolicies::Unknown => culvert::pod::NetworkPolicies::Unknown,
        NetworkPolicies::None => culvert::pod::NetworkPolicies::None,
        NetworkPolicies::Selected => culvert::pod::NetworkPolicies::Selected,
    };
    let message = culvert::Pod { uid: pod.uid.to_string(), network_policies: network_policies.into() };
    let config = Any { type_url: POD_TYPE_URL.to_owned(), value: message.encode_to_vec().into() };
    proto::Extension { name: POD_EXTENSION.to_owned(), config: Some(config) }
}

fn or(text: String, default: &str) -> Str {
    if text.is_empty() { default.into() } else { text.into() }
}

fn tunnel_protocol(value: i32) -> Result<TunnelProtocol, ValueError> {
    match proto::TunnelProtocol::try_from(value) {
        Ok(proto::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(proto::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(proto::TunnelProtocol::LegacyIstioMtls) => Ok(TunnelProtocol::LegacyIstioMtls),
        Err(_) => Err(ValueError::Enum { field: "tunnel_protocol", value }),
    }
}

fn encode_tunnel_protocol(protocol: TunnelProtocol) -> proto::TunnelProtocol {
    match protocol {
        TunnelProtocol::None => proto::TunnelProtocol::None,
        TunnelProtocol::Hbone => proto::TunnelProtocol::Hbone,
        TunnelProtocol::LegacyIstioMtls => proto::TunnelProtocol::LegacyIstioMtls,
    }
}

/// For telemetry only: a newer kind is shown as a pod rather than lost.
fn workload_type(value: i32) -> WorkloadType {
    match proto::WorkloadType::try_from(value) {
        Ok(proto::WorkloadType::Deployment) => WorkloadType::Deployment,
        Ok(proto::WorkloadType::Cronjob) => WorkloadType::CronJob,
        Ok(proto::WorkloadType::Job) => WorkloadType::Job,
        Ok(proto::WorkloadType::Pod) | Err(_) => WorkloadType::Pod,
    }
}

fn encode_workload_type(kind: WorkloadType) -> proto::WorkloadType {
    match kind {
        WorkloadType::Deployment => proto::WorkloadType::Deployment,
        WorkloadType::CronJob => proto::WorkloadType::Cronjob,
        WorkloadType::Pod => proto::WorkloadType::Pod,
        WorkloadType::Job => proto::WorkloadType::Job,
    }
}

fn health(value: i32) -> Result<Health, ValueError> {
    match proto::WorkloadStatus::try_from(value) {
        Ok(proto::WorkloadStatus::Healthy) => Ok(Health::Healthy),
        Ok(proto::WorkloadStatus::Unhealthy) => Ok(Health::Unhealthy),
        Err(_) => Err(ValueError::Enum { field: "status", value }),
    }
}

fn network_mode(value: i32) -> Result<NetworkMode, ValueError> {
    match proto::NetworkMode::try_from(value) {
        Ok(proto::NetworkMode::Standard) => Ok(NetworkMode::Standard),
        Ok(proto::NetworkMode::HostNetwork) => Ok(NetworkMode::HostNetwork),
        Err(_) => Err(ValueError::Enum { field: "network_mode", value }),
    }
}

fn application_tunnel(message: proto::ApplicationTunnel) -> Result<ApplicationTunnel, ValueError> {
    use proto::application_tunnel::Protocol;
    let value = message.protocol;
    let protocol = Protocol::try_from(value)
        .map_err(|_| ValueError::Enum { field: "application_tunnel.protocol", value })?;
    Ok(ApplicationTunnel {
        proxy_protocol: protocol == Protocol::Proxy,
        port: port_number("application_tunnel.port", message.port)?,
    })
}

fn encode_application_tunnel(tunnel: ApplicationTunnel) -> proto::ApplicationTunnel {
    use proto::application_tunnel::Protocol;
    let protocol = if tunnel.proxy_protocol { Protocol::Proxy } else { Protocol::None };
    proto::ApplicationTunnel { protocol: protocol.into(), port: tunnel.port.into() }
}
