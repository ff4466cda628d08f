//! Our messages against the bytes that Istio's own definitions encode to, field by field and in both directions.
#![allow(clippy::unwrap_used, reason = "helpers of tests, outside the functions marked as such")]

mod interop_go;

use std::collections::BTreeSet;
use std::path::PathBuf;

use culvert_proto::{ca, discovery, security, workload};
use prost::Message;
use serde_json::Value;

fn golden(name: &str) -> Vec<u8> {
    let path = interop_go::module().join("golden").join(format!("{name}.bin"));
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn decode<M: Message + Default>(name: &str) -> M {
    M::decode(golden(name).as_slice()).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn reencode<M: Message + Default>(data: &[u8]) -> Vec<u8> {
    M::decode(data).unwrap().encode_to_vec()
}

/// Decodes and encodes again by the full name of the type in the index.
fn reencode_by_name(kind: &str, data: &[u8]) -> Vec<u8> {
    match kind {
        "istio.workload.Address" => reencode::<workload::Address>(data),
        "istio.workload.Workload" => reencode::<workload::Workload>(data),
        "istio.workload.Service" => reencode::<workload::Service>(data),
        "istio.security.Authorization" => reencode::<security::Authorization>(data),
        "istio.v1.auth.IstioCertificateRequest" => reencode::<ca::IstioCertificateRequest>(data),
        "istio.v1.auth.IstioCertificateResponse" => reencode::<ca::IstioCertificateResponse>(data),
        "istio.workload.zds.ZdsHello" => reencode::<workload::zds::ZdsHello>(data),
        "istio.workload.zds.WorkloadRequest" => reencode::<workload::zds::WorkloadRequest>(data),
        "istio.workload.zds.WorkloadResponse" => reencode::<workload::zds::WorkloadResponse>(data),
        "envoy.service.discovery.v3.DeltaDiscoveryRequest" => {
            reencode::<discovery::DeltaDiscoveryRequest>(data)
        }
        "envoy.service.discovery.v3.DeltaDiscoveryResponse" => {
            reencode::<discovery::DeltaDiscoveryResponse>(data)
        }
        other => panic!("the index names {other}, which this test does not know"),
    }
}

#[test]
fn committed_bytes_are_what_the_definitions_encode_to() {
    let directory = interop_go::module().join("golden");
    let events = interop_go::run(&["golden", "--check", "--dir", directory.to_str().unwrap()]);
    assert_eq!(interop_go::of(&events, "golden").len(), 1);
}

/// D02-D07.
#[test]
fn every_message_survives_our_decoder_and_encoder() {
    let index = std::fs::read(interop_go::module().join("golden/index.json")).unwrap();
    let index: Vec<Value> = serde_json::from_slice(&index).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let mut kinds = BTreeSet::new();
    for entry in &index {
        let (name, kind) = (entry["name"].as_str().unwrap(), entry["type"].as_str().unwrap());
        let original = golden(name);
        let ours = reencode_by_name(kind, &original);
        std::fs::write(directory.path().join(format!("{name}.bin")), &ours).unwrap();
        // prost drops what it does not know, so any field that our definitions lack shortens the message. The bytes
        // themselves may differ: the other encoder writes the fields of a oneof last.
        assert_eq!(ours.len(), original.len(), "{name} ({kind})");
        kinds.insert(kind);
    }
    assert_eq!(kinds.len(), 11, "{kinds:?}");
    let events = interop_go::run(&["check-golden", "--candidates", directory.path().to_str().unwrap()]);
    assert_eq!(interop_go::of(&events, "checked")[0]["messages"], index.len());
}

#[test]
fn a_changed_byte_is_noticed_by_the_other_side() {
    let directory = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(interop_go::module().join("golden")).unwrap() {
        let from: PathBuf = file.unwrap().path();
        std::fs::copy(&from, directory.path().join(from.file_name().unwrap())).unwrap();
    }
    let mut add: workload::zds::WorkloadRequest = decode("zds-add");
    let Some(workload::zds::workload_request::Payload::Add(payload)) = &mut add.payload else { panic!() };
    payload.uid.push('x');
    std::fs::write(directory.path().join("zds-add.bin"), add.encode_to_vec()).unwrap();
    let failed =
        interop_go::try_run(None, &["check-golden", "--candidates", directory.path().to_str().unwrap()]);
    assert!(failed.unwrap_err().contains("zds-add"));
}

/// D03, D04, D05.
#[test]
fn workload_fields() {
    let workload::Address { r#type: Some(workload::address::Type::Workload(found)) } =
        decode("address-workload")
    else {
        panic!("not a workload")
    };
    assert_eq!(found.uid, "Kubernetes//Pod/default/server-1");
    assert_eq!((found.name.as_str(), found.namespace.as_str()), ("server-1", "default"));
    assert_eq!(found.addresses[0].as_slice(), [192, 0, 2, 7]);
    assert_eq!(found.addresses[1].len(), 16);
    assert_eq!(found.tunnel_protocol(), workload::TunnelProtocol::Hbone);
    assert_eq!((found.trust_domain.as_str(), found.service_account.as_str()), ("mesh.example", "server"));
    assert_eq!((found.node.as_str(), found.network.as_str()), ("node-1", "net-1"));
    assert_eq!((found.canonical_name.as_str(), found.canonical_revision.as_str()), ("server", "v1"));
    assert_eq!(found.workload_type(), workload::WorkloadType::Job);
    assert_eq!(found.status(), workload::WorkloadStatus::Unhealthy);
    assert_eq!(found.network_mode(), workload::NetworkMode::HostNetwork);
    assert!(found.native_tunnel);
    assert_eq!(found.authorization_policies[0], "default/allow-client");
    assert_eq!(found.capacity, Some(300));
    let ports = &found.services["default/server.default.svc.cluster.local"].ports;
    assert_eq!((ports[0].service_port, ports[0].target_port), (80, 8080));
    let waypoint = found.waypoint.unwrap();
    assert_eq!(waypoint.hbone_mtls_port, 15008);
    let Some(workload::gateway_address::Destination::Hostname(name)) = waypoint.destination else { panic!() };
    assert_eq!(name.hostname, "waypoint.default.svc.cluster.local");
    let zero: workload::Workload = decode("workload-hostname");
    assert_eq!(zero.capacity, Some(0), "present and zero is not absent");
    assert_eq!(decode::<workload::Workload>("workload-minimal").capacity, None);
}

/// D02, D04, D05.
#[test]
fn service_fields() {
    let workload::Address { r#type: Some(workload::address::Type::Service(found)) } =
        decode("address-service")
    else {
        panic!("not a service")
    };
    assert_eq!(found.hostname, "server.default.svc.cluster.local");
    assert_eq!(found.addresses[0].address.as_slice(), [198, 51, 100, 5]);
    assert_eq!(found.addresses[0].length, None);
    assert_eq!(found.addresses[2].length, Some(24));
    assert_eq!(found.ports[3].service_port, 65535);
    assert_eq!(found.ip_families(), workload::IpFamilies::Dual);
    let balancing = found.load_balancing.unwrap();
    assert_eq!(balancing.mode(), workload::load_balancing::Mode::Failover);
    assert_eq!(balancing.health_policy(), workload::load_balancing::HealthPolicy::AllowAll);
    assert_eq!(balancing.routing_preference().next(), Some(workload::load_balancing::Scope::Network));
    assert_eq!(found.subject_alt_names.len(), 2);
    assert!(found.canonical && found.ingress_use_waypoint);
    assert_eq!(found.weighted_waypoints.iter().map(|each| each.weight).collect::<Vec<_>>(), [90, 10]);
    assert_eq!(found.extensions[0].name, "example.com/extension");
}

/// D06.
#[test]
fn authorization_fields() {
    let found: security::Authorization = decode("authorization-full");
    assert_eq!((found.namespace.as_str(), found.name.as_str()), ("default", "allow-client"));
    assert_eq!(found.scope(), security::Scope::WorkloadSelector);
    assert_eq!(found.action(), security::Action::Deny);
    assert_eq!((found.groups.len(), found.groups[1].rules.len()), (2, 0));
    assert_eq!(found.groups[0].rules[1].matches.len(), 2);
    let one = &found.groups[0].rules[0].matches[0];
    assert_eq!(
        (one.destination_ports.as_slice(), one.not_destination_ports.as_slice()),
        ([80, 8080, 65535].as_slice(), [22].as_slice())
    );
    assert_eq!(
        (one.source_ips[0].address.as_slice(), one.source_ips[0].length),
        ([192, 0, 2, 0].as_slice(), 24)
    );
    assert_eq!(one.not_destination_ips[0].length, 128);
    assert_eq!(
        (
            one.service_accounts[0].service_account.as_str(),
            one.not_service_accounts[0].service_account.as_str()
        ),
        ("client", "stranger")
    );
    let kinds: Vec<_> = one.principals.iter().map(|text| text.match_type.clone().unwrap()).collect();
    assert!(
        matches!(&kinds[0], security::string_match::MatchType::Exact(text) if text == "mesh.example/ns/default/sa/client")
    );
    assert!(matches!(&kinds[1], security::string_match::MatchType::Suffix(text) if text == "/sa/client"));
    assert!(matches!(&kinds[2], security::string_match::MatchType::Presence(_)));
    assert!(decode::<security::Authorization>("authorization-global-dry-run").dry_run);
}

/// Z95.
#[test]
fn certificate_and_discovery_fields() {
    let request: ca::IstioCertificateRequest = decode("certificate-request");
    assert_eq!(request.validity_duration, 86400);
    let value = &request.metadata.unwrap().fields["ImpersonatedIdentity"];
    assert_eq!(
        value.kind,
        Some(prost_types::value::Kind::StringValue("spiffe://mesh.example/ns/default/sa/client".into()))
    );
    assert_eq!(decode::<ca::IstioCertificateResponse>("certificate-response").cert_chain.len(), 3);

    let first: discovery::DeltaDiscoveryRequest = decode("delta-request-first");
    assert_eq!(first.type_url, culvert_proto::ADDRESS_TYPE_URL);
    assert_eq!(first.initial_resource_versions["Kubernetes//Pod/default/plain"], "9f1c");
    assert!(first.node.unwrap().id.starts_with("ztunnel~192.0.2.1~"));
    let nack: discovery::DeltaDiscoveryRequest = decode("delta-request-nack");
    assert_eq!(nack.type_url, culvert_proto::AUTHORIZATION_TYPE_URL);
    assert_eq!((nack.response_nonce.as_str(), nack.error_detail.unwrap().code), ("nonce-7", 3));
    let response: discovery::DeltaDiscoveryResponse = decode("delta-response");
    assert_eq!(response.system_version_info, "generation-12");
    assert_eq!(response.removed_resources, ["default/gone.default.svc.cluster.local"]);
    let resource = &response.resources[0];
    assert_eq!((resource.version.as_str(), resource.aliases.len()), ("9f1c", 2));
    let address = workload::Address::decode(resource.resource.as_ref().unwrap().value.as_ref()).unwrap();
    assert!(matches!(address.r#type, Some(workload::address::Type::Workload(_))));
}

/// TRAP6, C61, C62.
#[test]
fn node_agent_fields() {
    use workload::zds::workload_request::Payload;
    assert_eq!(decode::<workload::zds::ZdsHello>("zds-hello").version(), workload::zds::Version::V1);
    let payload = |name| decode::<workload::zds::WorkloadRequest>(name).payload.unwrap();
    let uid = "5f1d6c1e-0000-4000-8000-000000000001";
    let Payload::Add(add) = payload("zds-add") else { panic!() };
    let info = add.workload_info.unwrap();
    assert_eq!((add.uid.as_str(), info.service_account.as_str()), (uid, "server"));
    assert!(matches!(payload("zds-keep"), Payload::Keep(keep) if keep.uid == uid));
    assert!(matches!(payload("zds-del"), Payload::Del(del) if del.uid == uid));
    assert!(matches!(payload("zds-snapshot"), Payload::SnapshotSent(_)));
    let response: workload::zds::WorkloadResponse = decode("zds-ack-error");
    let Some(workload::zds::workload_response::Payload::Ack(ack)) = response.payload else { panic!() };
    assert_eq!(ack.error, "cannot bind 15008");
}
