//! Messages as JSON that a person reads: addresses as text, enumerations by name, nothing that is empty.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use culvert_proto::security::string_match::MatchType;
use culvert_proto::security::{self, Authorization};
use culvert_proto::workload::{self, Address, address, gateway_address};
use culvert_proto::{POD_EXTENSION, culvert};
use prost::Message;
use serde_json::{Map, Value, json};

/// A workload or a service.
pub fn address(message: &Address) -> Value {
    match &message.r#type {
        Some(address::Type::Workload(it)) => json!({ "workload": workload(it) }),
        Some(address::Type::Service(it)) => json!({ "service": service(it) }),
        None => Value::Null,
    }
}

/// A policy.
pub fn policy(message: &Authorization) -> Value {
    let groups = message.groups.iter().map(|group| {
        let rules =
            group.rules.iter().map(|rules| Value::Array(rules.matches.iter().map(one_match).collect()));
        Value::Array(rules.collect())
    });
    filled(json!({
        "name": message.name,
        "namespace": message.namespace,
        "scope": message.scope().as_str_name(),
        "action": message.action().as_str_name(),
        "groups": Value::Array(groups.collect()),
        "dryRun": message.dry_run,
    }))
}

fn workload(it: &workload::Workload) -> Value {
    let services: Map<String, Value> = {
        let mut sorted: Vec<_> = it.services.iter().collect();
        sorted.sort_by_key(|(key, _)| key.as_str());
        sorted.into_iter().map(|(key, list)| (key.clone(), ports(&list.ports))).collect()
    };
    let locality = it.locality.as_ref().map(|at| format!("{}/{}/{}", at.region, at.zone, at.subzone));
    filled(json!({
        "uid": it.uid,
        "name": it.name,
        "namespace": it.namespace,
        "addresses": it.addresses.iter().map(|bytes| ip(bytes)).collect::<Vec<_>>(),
        "hostname": it.hostname,
        "network": it.network,
        "tunnel": it.tunnel_protocol().as_str_name(),
        "trustDomain": it.trust_domain,
        "serviceAccount": it.service_account,
        "waypoint": it.waypoint.as_ref().map(gateway),
        "node": it.node,
        "canonicalName": it.canonical_name,
        "canonicalRevision": it.canonical_revision,
        "workloadName": it.workload_name,
        "nativeTunnel": it.native_tunnel,
        "services": services,
        "policies": it.authorization_policies,
        "status": it.status().as_str_name(),
        "clusterId": it.cluster_id,
        "locality": locality,
        "hostNetwork": it.network_mode() == workload::NetworkMode::HostNetwork,
        "capacity": it.capacity,
        "extensions": it.extensions.iter().map(extension).collect::<Vec<_>>(),
    }))
}

fn extension(it: &workload::Extension) -> String {
    let config = it.config.as_ref().filter(|_| it.name == POD_EXTENSION);
    match config.and_then(|config| culvert::Pod::decode(&*config.value).ok()) {
        Some(pod) => {
            let policies = pod.network_policies().as_str_name();
            format!("{}: uid {}, network policies {policies}", it.name, pod.uid)
        }
        None => it.name.clone(),
    }
}

fn service(it: &workload::Service) -> Value {
    let addresses = it.addresses.iter().map(|address| {
        let network =
            if address.network.is_empty() { String::new() } else { format!("{}/", address.network) };
        let length = address.length.map_or_else(String::new, |length| format!("/{length}"));
        format!("{network}{}{length}", ip(&address.address))
    });
    let weighted = it
        .weighted_waypoints
        .iter()
        .map(|it| format!("{} {}", it.destination.as_ref().map(gateway).unwrap_or_default(), it.weight));
    let balancing = it.load_balancing.as_ref().map(|it| {
        filled(json!({
            "mode": it.mode().as_str_name(),
            "scopes": it.routing_preference().map(|scope| scope.as_str_name()).collect::<Vec<_>>(),
            "health": it.health_policy().as_str_name(),
        }))
    });
    filled(json!({
        "name": it.name,
        "namespace": it.namespace,
        "hostname": it.hostname,
        "addresses": addresses.collect::<Vec<_>>(),
        "ports": ports(&it.ports),
        "subjectAltNames": it.subject_alt_names,
        "waypoint": it.waypoint.as_ref().map(gateway),
        "weightedWaypoints": weighted.collect::<Vec<_>>(),
        "loadBalancing": balancing,
        "extensions": it.extensions.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(),
        "ipFamilies": it.ip_families().as_str_name(),
        "canonical": it.canonical,
    }))
}

fn ports(list: &[workload::Port]) -> Value {
    let one = |port: &workload::Port| {
        let protocol = match port.app_protocol() {
            workload::AppProtocol::Unknown => String::new(),
            known => format!(" {}", known.as_str_name()),
        };
        Value::String(format!("{}->{}{protocol}", port.service_port, port.target_port))
    };
    Value::Array(list.iter().map(one).collect())
}

fn gateway(it: &workload::GatewayAddress) -> String {
    let at = match &it.destination {
        Some(gateway_address::Destination::Hostname(name)) => format!("{}/{}", name.namespace, name.hostname),
        Some(gateway_address::Destination::Address(address)) => ip(&address.address),
        None => String::new(),
    };
    format!("{at}:{}", it.hbone_mtls_port)
}

fn one_match(it: &security::Match) -> Value {
    let texts = |list: &[security::StringMatch]| -> Vec<String> {
        list.iter()
            .map(|one| match &one.match_type {
                Some(MatchType::Exact(text)) => text.clone(),
                Some(MatchType::Prefix(text)) => format!("{text}*"),
                Some(MatchType::Suffix(text)) => format!("*{text}"),
                Some(MatchType::Presence(())) => "*".to_owned(),
                None => String::new(),
            })
            .collect()
    };
    let blocks = |list: &[security::Address]| -> Vec<String> {
        list.iter().map(|one| format!("{}/{}", ip(&one.address), one.length)).collect()
    };
    let accounts = |list: &[security::ServiceAccountMatch]| -> Vec<String> {
        list.iter().map(|one| format!("{}/{}", one.namespace, one.service_account)).collect()
    };
    filled(json!({
        "namespaces": texts(&it.namespaces),
        "notNamespaces": texts(&it.not_namespaces),
        "principals": texts(&it.principals),
        "notPrincipals": texts(&it.not_principals),
        "sourceIps": blocks(&it.source_ips),
        "notSourceIps": blocks(&it.not_source_ips),
        "destinationIps": blocks(&it.destination_ips),
        "notDestinationIps": blocks(&it.not_destination_ips),
        "destinationPorts": it.destination_ports,
        "notDestinationPorts": it.not_destination_ports,
        "serviceAccounts": accounts(&it.service_accounts),
        "notServiceAccounts": accounts(&it.not_service_accounts),
    }))
}

fn ip(bytes: &[u8]) -> String {
    let parsed = match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(|octets| IpAddr::V4(Ipv4Addr::from(octets))),
        16 => <[u8; 16]>::try_from(bytes).ok().map(|octets| IpAddr::V6(Ipv6Addr::from(octets))),
        _ => None,
    };
    parsed.map_or_else(|| format!("{bytes:02x?}"), |ip| ip.to_string())
}

/// Leaves out what says nothing.
fn filled(value: Value) -> Value {
    let Value::Object(map) = value else { return value };
    let says = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
        _ => true,
    };
    Value::Object(map.into_iter().filter(|(_, value)| says(value)).collect())
}
