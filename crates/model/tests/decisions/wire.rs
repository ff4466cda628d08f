//! The wire, both ways (D01-D06), and what is refused of it.

use culvert_model::address::{
    GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress, NetworkPrefix,
};
use culvert_model::identity::Identity;
use culvert_model::policy::{Action, PolicyScope};
use culvert_model::service::{Affinity, IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service};
use culvert_model::wire::unknown::UnknownError;
use culvert_model::wire::{self, AddressResource, PolicyError, ValueError, WireError, WorkloadError};
use culvert_model::workload::*;
use culvert_proto::{Any, POD_EXTENSION, POD_TYPE_URL, culvert, security, workload as proto};
use proptest::prelude::*;
use prost::Message;

use crate::authorize::any_policy;
use crate::world::{policy, service, workload};

fn str(pattern: &'static str) -> impl Strategy<Value = culvert_model::Str> {
    pattern.prop_map(|s: String| s.as_str().into())
}

fn any_ip() -> impl Strategy<Value = std::net::IpAddr> {
    prop_oneof![
        any::<[u8; 4]>().prop_map(Into::into),
        any::<[u8; 16]>().prop_map(|b| std::net::IpAddr::from(b).to_canonical())
    ]
}

fn any_key() -> impl Strategy<Value = NamespacedHostname> {
    (str("[a-z]{1,5}"), str("[a-z]{1,5}\\.[a-z]{1,5}"))
        .prop_map(|(namespace, hostname)| NamespacedHostname { namespace, hostname })
}

fn any_gateway() -> impl Strategy<Value = GatewayAddress> {
    let destination = prop_oneof![
        any_key().prop_map(GatewayDestination::Hostname),
        (str("[a-z]{0,3}"), any_ip())
            .prop_map(|(network, address)| GatewayDestination::Address(NetworkAddress { network, address })),
    ];
    (destination, 1_u16..).prop_map(|(destination, hbone_port)| GatewayAddress { destination, hbone_port })
}

fn any_port() -> impl Strategy<Value = Port> {
    use AppProtocol::{Grpc, Http2, Http11, Tcp, Tls, Unknown};
    let protocol = prop::sample::select(&[Unknown, Http11, Http2, Grpc, Tcp, Tls][..]);
    (any::<u16>(), any::<u16>(), protocol).prop_map(|(service_port, target_port, app_protocol)| Port {
        service_port,
        target_port,
        app_protocol,
    })
}

fn any_identity() -> impl Strategy<Value = Identity> {
    ("[a-z.]{1,9}", "[a-z]{1,9}", "[a-z]{1,9}").prop_map(|(t, n, s)| Identity::new(t, n, s).unwrap())
}

fn any_workload() -> impl Strategy<Value = Workload> {
    use {NetworkMode as N, TunnelProtocol as T, WorkloadType as W};
    let texts = prop::collection::vec(str("[a-zA-Z0-9 ]{0,6}"), 10);
    let enums = (
        prop::sample::select(&[T::None, T::Hbone, T::LegacyIstioMtls][..]),
        prop::sample::select(&[W::Deployment, W::CronJob, W::Pod, W::Job][..]),
        prop::sample::select(&[Health::Healthy, Health::Unhealthy][..]),
        prop::sample::select(&[N::Standard, N::HostNetwork][..]),
    );
    let boxed = || prop::option::of(any_gateway().prop_map(Box::new));
    let gateways = (boxed(), boxed());
    let tunnel = prop::option::of((any::<bool>(), any::<u16>()))
        .prop_map(|t| t.map(|(proxy_protocol, port)| ApplicationTunnel { proxy_protocol, port }));
    let services = prop::collection::btree_map(any_key(), prop::collection::vec(any_port(), 0..3), 0..3);
    let rest = (
        any_identity(),
        any::<u32>(),
        any::<bool>(),
        tunnel,
        prop::collection::vec(str("[a-z]/[a-z]"), 0..3),
        prop::option::of(any_pod_facts()),
    );
    (texts, prop::collection::hash_set(any_ip(), 0..3), enums, gateways, services, rest).prop_map(
        |(
            t,
            addresses,
            enums,
            gateways,
            services,
            (identity, capacity, native_tunnel, application_tunnel, policies, pod),
        )| Workload {
            uid: format!("c//Pod/n/{}", t[0]).into(),
            name: t[1].clone(),
            namespace: identity.namespace().clone(),
            addresses: addresses.into_iter().collect(),
            hostname: t[2].to_lowercase().into(),
            network: t[3].clone(),
            tunnel_protocol: enums.0,
            identity,
            waypoint: gateways.0,
            network_gateway: gateways.1,
            node: t[4].clone(),
            canonical_name: t[5].clone(),
            canonical_revision: t[6].clone(),
            workload_type: enums.1,
            workload_name: t[7].clone(),
            native_tunnel,
            application_tunnel,
            services: services.into_iter().map(|(k, p)| (k, Ports(p.into_iter().collect()))).collect(),
            authorization_policies: policies.into_iter().collect(),
            health: enums.2,
            cluster_id: t[8].clone(),
            locality: Locality { region: Str2(t[9].clone()), ..Locality::default() },
            network_mode: enums.3,
            capacity,
            pod: pod.map(Box::new),
        },
    )
}

fn any_pod_facts() -> impl Strategy<Value = PodFacts> {
    use NetworkPolicies as N;
    let policies = prop::sample::select(&[N::Unknown, N::None, N::Selected][..]);
    (str("[a-z]{1,6}"), policies).prop_map(|(uid, network_policies)| PodFacts { uid, network_policies })
}

fn any_service() -> impl Strategy<Value = Service> {
    use LoadBalancingMode as M;
    let prefix = (str("[a-z]{0,3}"), any_ip(), any::<u8>()).prop_map(|(network, address, bits)| {
        let bits = bits % if address.is_ipv4() { 33 } else { 129 };
        NetworkPrefix { network, prefix: ipnet::IpNet::new(address, bits).unwrap().trunc() }
    });
    let scopes =
        &[Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network][..];
    let balancing = (
        prop::sample::select(&[M::Any, M::Strict, M::Failover, M::Passthrough][..]),
        prop::collection::vec(prop::sample::select(scopes), 0..4),
        any::<bool>(),
        prop::sample::select(&[Affinity::None, Affinity::ClientAddress][..]),
    );
    let families = &[IpFamilies::Automatic, IpFamilies::V4, IpFamilies::V6, IpFamilies::Dual][..];
    let lists = (
        prop::collection::vec(prefix, 0..3),
        prop::collection::vec(any_port(), 0..3),
        prop::collection::vec(any_identity(), 0..3),
        prop::collection::vec((any_gateway(), any::<u32>()), 0..3),
    );
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (
        any_key(),
        lists,
        prop::option::of(any_gateway().prop_map(Box::new)),
        balancing,
        prop::sample::select(families),
        flags,
    )
        .prop_map(
            |(key, lists, waypoint, (mode, scopes, allow_unhealthy, affinity), ip_families, flags)| Service {
                name: key.hostname.clone(),
                key,
                addresses: lists.0.into_iter().collect(),
                ports: lists.1.into_iter().collect(),
                subject_alt_names: lists.2.into_iter().collect(),
                waypoint,
                weighted_waypoints: lists.3,
                load_balancing: LoadBalancing {
                    mode,
                    scopes: scopes.into_iter().collect(),
                    allow_unhealthy,
                    affinity,
                },
                ip_families,
                canonical: flags.0,
                ingress_use_waypoint: flags.1,
                namespace_only: flags.2,
            },
        )
}

proptest! {
    /// D03.
    #[test]
    fn workloads_round_trip(workload in any_workload()) {
        let resource = AddressResource::Workload(workload);
        let (name, body) = wire::encode_address(&resource);
        prop_assert_eq!(wire::address(&name, &body).unwrap(), resource);
    }

    #[test]
    fn services_round_trip(service in any_service()) {
        let resource = AddressResource::Service(service);
        let (name, body) = wire::encode_address(&resource);
        prop_assert_eq!(wire::address(&name, &body).unwrap(), resource);
    }

    /// What was understood is sent as it was; what was not is sent as a policy that denies all of the same scope.
    #[test]
    fn policies_round_trip(policy in any_policy()) {
        let body = wire::policy::encode(&policy).encode_to_vec();
        let decoded = wire::policy(&policy.key.to_string(), &body);
        prop_assert_eq!(decoded.error, None);
        if policy.undecodable.is_none() {
            prop_assert_eq!(decoded.policy, policy);
        } else {
            prop_assert_eq!((decoded.policy.action, decoded.policy.scope), (Action::Deny, policy.scope));
        }
    }

    /// No bytes make either decoder panic, and a policy is always denied or understood.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = wire::address("a/b", &bytes);
        let decoded = wire::policy("a/b", &bytes);
        prop_assert_eq!(decoded.policy.undecodable.is_some(), decoded.error.is_some());
    }

    /// Any one damaged byte of a policy leaves something that is understood whole or denies.
    #[test]
    fn a_damaged_byte(policy in any_policy(), at: prop::sample::Index, byte: u8) {
        let mut body = wire::policy::encode(&policy).encode_to_vec();
        let at = at.index(body.len());
        body[at] = byte;
        let decoded = wire::policy(&policy.key.to_string(), &body);
        prop_assert_eq!(decoded.policy.key, policy.key);
        prop_assert_eq!(decoded.policy.undecodable.is_some(), decoded.error.is_some());
        // What is understood is whole: sent again, it says the same.
        if decoded.error.is_none() {
            let again = security::Authorization::decode(&*body).unwrap();
            prop_assert_eq!(again.encoded_len() <= body.len(), true);
        }
    }
}

fn workload_message() -> proto::Workload {
    wire::workload::encode(&workload("a", "w", &["10.0.0.1"]))
}

fn refused_workload(change: impl FnOnce(&mut proto::Workload)) -> WorkloadError {
    let mut message = workload_message();
    change(&mut message);
    let name = message.uid.clone();
    let body = proto::Address { r#type: Some(proto::address::Type::Workload(message)) }.encode_to_vec();
    match wire::address(&name, &body) {
        Err(WireError::Workload { error, .. }) => error,
        other => panic!("{other:?}"),
    }
}

/// Values out of bounds are refused by name; nothing is cut to fit.
#[test]
fn bounds_of_workloads() {
    let value = WorkloadError::Value;
    assert_eq!(
        refused_workload(|w| w.addresses.push(vec![1, 2, 3])),
        value(ValueError::Address { field: "addresses", length: 3 })
    );
    assert_eq!(
        refused_workload(|w| w.tunnel_protocol = 9),
        value(ValueError::Enum { field: "tunnel_protocol", value: 9 })
    );
    assert_eq!(refused_workload(|w| w.status = 9), value(ValueError::Enum { field: "status", value: 9 }));
    assert_eq!(
        refused_workload(|w| w.network_mode = -1),
        value(ValueError::Enum { field: "network_mode", value: -1 })
    );
    let port = proto::Port { service_port: 65536, ..Default::default() };
    assert_eq!(
        refused_workload(|w| drop(w.services.insert("a/b".into(), proto::PortList { ports: vec![port] }))),
        value(ValueError::Port { field: "service_port", value: 65536 })
    );
    assert_eq!(
        refused_workload(|w| drop(w.services.insert("nope".into(), Default::default()))),
        value(ValueError::Name { field: "services", value: "nope".into() })
    );
    assert_eq!(
        refused_workload(|w| w.waypoint = Some(Default::default())),
        value(ValueError::Missing { field: "waypoint" })
    );
    assert!(matches!(refused_workload(|w| w.namespace = "A/B".into()), WorkloadError::Identity(_)));
}

/// What control planes leave out: the default trust domain, account, capacity and HBONE port.
#[test]
fn defaults_of_workloads() {
    let mut message = workload_message();
    message.trust_domain.clear();
    message.service_account.clear();
    message.workload_type = 77;
    let decoded = wire::workload::decode(message).unwrap();
    assert_eq!(decoded.identity.to_string(), "spiffe://cluster.local/ns/a/sa/default");
    assert_eq!((decoded.capacity, decoded.workload_type), (1, WorkloadType::Pod));
    let mut message = workload_message();
    message.waypoint = Some(proto::GatewayAddress {
        hbone_mtls_port: 0,
        destination: Some(proto::gateway_address::Destination::Hostname(proto::NamespacedHostname {
            namespace: "a".into(),
            hostname: "WP.example.com.".into(),
        })),
    });
    let waypoint = wire::workload::decode(message).unwrap().waypoint.unwrap();
    assert_eq!((waypoint, 15008), (crate::world::by_name("a/wp.example.com"), wire::HBONE_PORT));
}

/// What our control plane says of a pod is believed only if it can be read whole and stands alone; all else is nothing known,
/// and never a reason to lose the workload.
#[test]
fn facts_of_pods() {
    let extended = |uid: &str, number: i32| {
        let value = culvert::Pod { uid: uid.into(), network_policies: number }.encode_to_vec();
        let config = Some(Any { type_url: POD_TYPE_URL.into(), value: value.into() });
        proto::Extension { name: POD_EXTENSION.into(), config }
    };
    let decoded = |extensions: Vec<proto::Extension>| {
        let workload = wire::workload::decode(proto::Workload { extensions, ..workload_message() }).unwrap();
        (workload.pod.as_ref().map(|pod| pod.uid.to_string()), workload.network_policies())
    };
    let nothing = (None, NetworkPolicies::Unknown);
    let foreign = proto::Extension { name: "example.com/other".into(), ..extended("u", 1) };
    for (number, policies) in [
        (0, NetworkPolicies::Unknown),
        (1, NetworkPolicies::None),
        (2, NetworkPolicies::Selected),
        (3, NetworkPolicies::Unknown),
    ] {
        assert_eq!(decoded(vec![foreign.clone(), extended("u", number)]), (Some("u".into()), policies));
    }
    let other_type = |of: &mut Any| of.type_url = "type.googleapis.com/other".into();
    let garbage = |of: &mut Any| of.value = vec![0xff].into();
    let broken = |change: fn(&mut Any)| {
        let mut extension = extended("u", 1);
        change(extension.config.as_mut().unwrap());
        extension
    };
    for extensions in [
        vec![],
        vec![foreign],
        vec![extended("", 1)],
        vec![extended("u", 1), extended("u", 2)],
        vec![proto::Extension { config: None, ..extended("u", 1) }],
        vec![broken(other_type)],
        vec![broken(garbage)],
    ] {
        assert_eq!(decoded(extensions), nothing);
    }
}

/// Prefix lengths are those of their family, and a removal by name has to find what came under that name.
#[test]
fn bounds_of_services_and_names() {
    let with = |address: Vec<u8>, length| {
        let mut message = wire::service::encode(&service("a/s.example.com", &[]));
        message.addresses = vec![proto::NetworkAddress { network: String::new(), address, length }];
        wire::service::decode(message).map(|s| s.addresses[0].prefix.to_string())
    };
    assert_eq!(with(vec![10, 1, 2, 3], None).unwrap(), "10.1.2.3/32");
    assert_eq!(with(vec![10, 1, 2, 3], Some(8)).unwrap(), "10.0.0.0/8");
    assert!(with(vec![10, 1, 2, 3], Some(33)).is_err());
    assert!(with(vec![0; 16], Some(129)).is_err());
    assert_eq!(
        with(vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 1, 2, 3], Some(104)).unwrap(),
        "10.0.0.0/8"
    );
    assert!(with(vec![0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 1, 2, 3], Some(8)).is_err());

    let (_, body) = wire::encode_address(&AddressResource::Service(service("a/s.example.com", &[])));
    assert!(wire::address("a/S.example.com.", &body).is_ok());
    assert!(matches!(wire::address("b/s.example.com", &body), Err(WireError::Name { .. })));
    assert!(matches!(wire::address("x", &[]), Err(WireError::Empty { .. })));
    assert!(matches!(wire::address("x", &[0xff]), Err(WireError::Decode { .. })));
}

/// One field of a message, as bytes.
fn field(tag: u8, body: &[u8]) -> Vec<u8> {
    assert!(tag < 16 && body.len() < 128);
    [&[tag << 3 | 2, body.len() as u8], body].concat()
}

fn denied(body: &[u8]) -> (PolicyScope, PolicyError) {
    let resource = wire::policy("a/p", body);
    let error = resource.error.expect("not understood");
    assert_eq!(resource.policy.undecodable.as_deref(), Some(&*error.to_string()));
    assert_eq!((resource.policy.key.to_string().as_str(), resource.policy.action), ("a/p", Action::Deny));
    (resource.policy.scope, error)
}

/// Z65, Z66. design.md: unknown fields and values of a policy, at any depth, deny its scope and say why.
#[test]
fn unknown_parts_of_policies() {
    let base = wire::policy::encode(&policy("a/p", PolicyScope::WorkloadSelector, Action::Allow, vec![]))
        .encode_to_vec();
    let with = |more: Vec<u8>| [base.clone(), more].concat();
    let in_match = |body: &[u8]| with(field(5, &field(1, &field(2, body))));
    let unknown = |message, tag| PolicyError::Unknown(UnknownError::Field { message, tag });
    for (body, expected) in [
        (with(field(9, b"x")), unknown("Authorization", 9)),
        (with(vec![9 << 3, 1]), unknown("Authorization", 9)),
        (with(field(5, &field(7, b""))), unknown("Group", 7)),
        (with(field(5, &field(1, &field(1, b"")))), unknown("Rules", 1)),
        (in_match(&field(14, b"")), unknown("Match", 14)),
        (in_match(&field(3, &field(5, b""))), unknown("StringMatch", 5)),
        (in_match(&field(3, &field(4, &field(1, b"")))), unknown("Empty", 1)),
        (in_match(&field(5, &field(3, b""))), unknown("Address", 3)),
        (in_match(&field(11, &field(3, b""))), unknown("ServiceAccountMatch", 3)),
        (
            in_match(&field(13, b"")),
            PolicyError::Unknown(UnknownError::Extension { message: "Match", field: "extensions" }),
        ),
        (
            with(field(7, b"")),
            PolicyError::Unknown(UnknownError::Extension { message: "Authorization", field: "extensions" }),
        ),
        (
            with(vec![4 << 3, 2]),
            PolicyError::Unknown(UnknownError::Value { message: "Authorization", field: "action", value: 2 }),
        ),
        (in_match(&field(3, b"")), PolicyError::EmptyMatch { field: "principals" }),
        (
            in_match(&field(5, &field(1, &[1, 2, 3]))),
            ValueError::Address { field: "source_ips", length: 3 }.into(),
        ),
        (
            in_match(&[9 << 3, 0x80, 0x80, 0x04]),
            ValueError::Port { field: "destination_ports", value: 65536 }.into(),
        ),
    ] {
        let (scope, error) = denied(&body);
        assert_eq!((scope, error), (PolicyScope::WorkloadSelector, expected));
    }
    let long = in_match(&field(5, &[&field(1, &[10, 0, 0, 0])[..], &[2 << 3, 33]].concat()));
    assert!(matches!(denied(&long).1, PolicyError::Value(ValueError::Prefix { length: 33, .. })));
}

/// Where the scope cannot be read, or is one that is not known, any workload could be meant.
#[test]
fn the_scope_of_what_is_not_understood() {
    let scope = |value: u8| vec![3 << 3, value];
    let unknown = field(9, b"");
    for (body, expected) in [
        (unknown.clone(), PolicyScope::Global),
        ([scope(1), unknown.clone()].concat(), PolicyScope::Namespace),
        ([unknown.clone(), scope(2)].concat(), PolicyScope::WorkloadSelector),
        ([scope(1), scope(2), unknown.clone()].concat(), PolicyScope::WorkloadSelector),
        ([scope(3)].concat(), PolicyScope::Global),
        ([scope(1), vec![0xff]].concat(), PolicyScope::Global),
        (vec![0x80; 11], PolicyScope::Global),
    ] {
        assert_eq!(denied(&body).0, expected, "{body:?}");
    }
    let understood =
        wire::policy::encode(&policy("b/p", PolicyScope::Namespace, Action::Deny, vec![])).encode_to_vec();
    assert!(matches!(denied(&understood), (PolicyScope::Namespace, PolicyError::Name { .. })));
    let nameless = wire::policy("nonsense", &understood);
    assert_eq!(nameless.policy.scope, PolicyScope::Global);
    assert!(matches!(nameless.error, Some(PolicyError::ResourceName(_))));
}

/// A number that the decoder would cut down to a known value is not that value.
#[test]
fn wide_enum_values() {
    let wide = [3 << 3, 0x81, 0x80, 0x80, 0x80, 0x10];
    assert!(matches!(
        denied(&wide).1,
        PolicyError::Unknown(UnknownError::Value { value: 0x1_0000_0001, .. })
    ));
}
