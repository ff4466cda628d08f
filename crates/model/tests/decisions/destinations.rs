//! Every kind of destination, with and without waypoint, against the rows written out once more over plain lists:
//! Z29, Z31, Z33-Z42, Z44, Z68-Z73, Z75, TRAP11, TRAP12, TRAP16.

use std::net::SocketAddr;

use culvert_model::Str;
use culvert_model::address::{GatewayAddress, GatewayDestination};
use culvert_model::balance::{Place, Unobserved};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{OutboundFacts, Resolved, TunnelKind, resolve};
use culvert_model::service::{IpFamilies, LoadBalancing, LoadBalancingMode, Scope, Service};
use culvert_model::workload::{Health, NetworkMode, TunnelProtocol, Workload};
use proptest::prelude::*;

use crate::balance::dice;
use crate::world::{World, by_address, by_name, port, serve, service, workload};

const WEB: &str = "app/web.app.svc.cluster.local";
const WAYPOINT: &str = "app/waypoint.app.svc.cluster.local";
const OWN_PORTS: [u16; 4] = [15001, 15006, 15008, 15053];

mod reference;

/// A world as two lists, and one connection in it.
#[derive(Clone, Debug)]
struct Case {
    services: Vec<Service>,
    workloads: Vec<Workload>,
    source: Workload,
    to: SocketAddr,
    failed: Vec<Str>,
}

/// What a connection becomes, as far as it matters.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Way {
    Passthrough(SocketAddr),
    Plain(SocketAddr, Str),
    Tunnel { kind: &'static str, peer: SocketAddr, authority: String, expected: Vec<Identity>, to: Str },
    LookUp(Str, u16),
    Refused(Reason),
}

impl Way {
    fn of(result: Result<Resolved, culvert_model::resolve::Refusal>) -> Self {
        match result {
            Err(refusal) => Self::Refused(refusal.reason),
            Ok(Resolved::Passthrough { destination }) => Self::Passthrough(destination),
            Ok(Resolved::Plain { destination, workload, .. }) => {
                Self::Plain(destination, workload.uid.clone())
            }
            Ok(Resolved::NeedsDns(needed)) => Self::LookUp(needed.workload.uid.clone(), needed.port),
            Ok(Resolved::Tunnel(route)) => Self::Tunnel {
                kind: match &route.kind {
                    TunnelKind::Direct => "direct",
                    TunnelKind::ServiceWaypoint => "service waypoint",
                    TunnelKind::WorkloadWaypoint => "workload waypoint",
                    TunnelKind::Gateway(inner) => {
                        assert_eq!(inner.authority, route.authority);
                        "gateway"
                    }
                },
                peer: route.peer,
                authority: route.authority,
                expected: route.expected.to_vec(),
                to: route.workload.uid.clone(),
            },
        }
    }
}

fn east() -> Box<GatewayAddress> {
    let mut gateway = by_address("192.0.2.10");
    if let GatewayDestination::Address(address) = &mut gateway.destination {
        address.network = "east".into();
    }
    gateway
}

fn any_waypoint() -> impl Strategy<Value = Option<Box<GatewayAddress>>> {
    prop_oneof![
        4 => Just(None),
        2 => Just(Some(by_name(WAYPOINT))),
        1 => Just(Some(by_address("10.96.0.50"))),
        1 => Just(Some(by_name("app/missing.app.svc.cluster.local"))),
    ]
}

fn any_web() -> impl Strategy<Value = Service> {
    use LoadBalancingMode::{Any, Failover, Passthrough, Strict};
    let mode = prop_oneof![4 => Just(Any), 1 => Just(Strict), 2 => Just(Failover), 1 => Just(Passthrough)];
    let families =
        prop::sample::select(&[IpFamilies::Automatic, IpFamilies::V4, IpFamilies::V6, IpFamilies::Dual][..]);
    let flags = (any::<bool>(), prop::bool::weighted(0.2), any::<bool>(), any::<bool>());
    (mode, any_waypoint(), families, flags).prop_map(
        |(mode, waypoint, ip_families, (unready, hidden, named, headless))| {
            let addresses: &[&str] = if headless { &[] } else { &["10.96.0.1", "fd00:96::1"] };
            let names = named.then(|| Identity::new("cluster.local", "app", "web").unwrap());
            let scopes = [Scope::Node].into_iter().collect();
            Service {
                waypoint,
                ip_families,
                namespace_only: hidden,
                subject_alt_names: names.into_iter().collect(),
                load_balancing: LoadBalancing {
                    mode,
                    scopes,
                    allow_unhealthy: unready,
                    ..LoadBalancing::default()
                },
                ..service(WEB, addresses)
            }
        },
    )
}

/// The endpoint `number` of the service, in any shape that an endpoint can have.
fn any_endpoint(number: usize) -> impl Strategy<Value = (Workload, bool)> {
    let addresses = 0_u8..4;
    let protocol = prop_oneof![
        4 => Just(TunnelProtocol::Hbone),
        2 => Just(TunnelProtocol::None),
        1 => Just(TunnelProtocol::LegacyIstioMtls),
    ];
    let network = prop_oneof![4 => Just((false, false)), 1 => Just((true, true)), 1 => Just((true, false))];
    let rare = || prop::bool::weighted(0.2);
    (addresses, protocol, network, any_waypoint(), (rare(), rare(), rare(), any::<bool>(), rare(), rare()))
        .prop_map(move |(addresses, protocol, (far, gateway), waypoint, flags)| {
            let (unready, weightless, portless, elsewhere, host, failed) = flags;
            let (v4, v6) = (format!("100.64.2.{number}"), format!("fd00:64:2::{number}"));
            let addresses: &[&str] = match addresses {
                0 => &[],
                1 => &[&v4],
                2 => &[&v6],
                _ => &[&v4, &v6],
            };
            let mut one = workload("app", &format!("web-{number}"), addresses);
            one.tunnel_protocol = protocol;
            one.hostname = if addresses.is_empty() && elsewhere { "db.example".into() } else { "".into() };
            one.network = if far { "east".into() } else { "".into() };
            one.network_gateway = (far && gateway).then(east);
            one.waypoint = waypoint;
            one.health = if unready { Health::Unhealthy } else { Health::Healthy };
            one.capacity = u32::from(!weightless);
            one.node = if elsewhere { "node-2".into() } else { "node-1".into() };
            one.network_mode = if host { NetworkMode::HostNetwork } else { NetworkMode::Standard };
            (serve(one, WEB, if portless { &[(81, 8081)] } else { &[(80, 8080)] }), failed)
        })
}

fn any_case() -> impl Strategy<Value = Case> {
    let to = prop::sample::select(
        &[
            "10.96.0.1:80",     // a service
            "10.96.0.1:81",     // at another port
            "10.96.0.1:82",     // at none of its ports
            "[fd00:96::1]:80",  // its other address
            "10.96.0.50:15008", // the waypoint's own service
            "100.64.2.0:8080",  // a pod, a host-network pod, a pod behind a gateway, or nobody
            "[fd00:64:2::1]:8080",
            "100.64.2.1:15008", // another pod's HBONE port
            "100.64.2.200:443", // an address of a block only
            "100.64.1.1:8080",  // the source itself
            "100.64.1.1:15001", // the proxy's port on it
            "127.0.0.1:15008",
            "192.0.2.99:443", // nobody
        ][..],
    );
    let waypoint = prop::collection::vec((prop::bool::weighted(0.8), prop::bool::weighted(0.1)), 0..3);
    let endpoints = prop_oneof![Just(0), Just(1), Just(2), Just(3)]
        .prop_flat_map(|count| (0..count).map(any_endpoint).collect::<Vec<_>>());
    let source = prop_oneof![3 => Just("client"), 1 => Just("endpoint"), 1 => Just("waypoint"), 1 => Just("neighbour")];
    (any_web(), endpoints, waypoint, source, any::<bool>(), to).prop_map(
        |(web, endpoints, instances, source, block, to)| {
            let mut services = vec![web];
            if !instances.is_empty() {
                let ports = [port((15008, 15008))].into_iter().collect();
                services.push(Service { ports, ..service(WAYPOINT, &["10.96.0.50"]) });
            }
            if block {
                let mut block = service("ext/block.example", &["100.64.2.0/24"]);
                block.load_balancing.mode = LoadBalancingMode::Passthrough;
                services.push(block);
            }
            let mut failed = Vec::new();
            let mut workloads = vec![Workload {
                network: "east".into(),
                ..workload("istio-system", "gateway", &["192.0.2.10"])
            }];
            for (endpoint, has_failed) in endpoints {
                failed.extend(has_failed.then(|| endpoint.uid.clone()));
                workloads.push(endpoint);
            }
            for (number, (ready, has_failed)) in instances.into_iter().enumerate() {
                let address = format!("100.64.3.{number}");
                let mut one = serve(
                    workload("app", &format!("waypoint-{number}"), &[&address]),
                    WAYPOINT,
                    &[(15008, 15008)],
                );
                one.health = if ready { Health::Healthy } else { Health::Unhealthy };
                failed.extend(has_failed.then(|| one.uid.clone()));
                workloads.push(one);
            }
            let of = |namespace| workload(namespace, source, &["100.64.1.1", "fd00:64:1::1"]);
            let source = match source {
                "endpoint" => serve(of("app"), WEB, &[(80, 8080)]),
                "waypoint" => serve(of("app"), WAYPOINT, &[(15008, 15008)]),
                "neighbour" => of("app"),
                _ => of("shop"),
            };
            Case { services, workloads, source, to: to.parse().unwrap(), failed }
        },
    )
}

fn decide(case: &Case, seed: u64) -> Way {
    let world = case.services.iter().cloned().fold(World::new(), World::service);
    let world = case.workloads.iter().cloned().fold(world, World::workload);
    let facts = OutboundFacts {
        source: &case.source,
        client: case.source.addresses[0],
        original_destination: case.to,
        exclude: &case.failed,
        place: &Place::of(&case.source),
        own_ports: &OWN_PORTS,
    };
    Way::of(resolve(&world.workload(case.source.clone()).snapshot(), &facts, &Unobserved, &mut dice(seed)))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// TRAP16. Z29, Z31, Z33-Z42, Z44, Z68-Z73, Z75, traps 11 and 12: whatever exists and whatever is asked for, what is decided
    /// is one of the ways that the rows allow.
    #[test]
    fn decided_as_the_rows_say(case in any_case(), seed: u64) {
        let ways = case.ways();
        let decided = decide(&case, seed);
        prop_assert!(ways.contains(&decided), "{decided:?} is none of {ways:?}");
    }
}

/// Each kind of destination once, by name, so that none is missing from what chance makes.
#[test]
fn every_kind() {
    let web = || service(WEB, &["10.96.0.1"]);
    let pod = || serve(workload("app", "web-0", &["100.64.2.0"]), WEB, &[(80, 8080)]);
    let source = workload("shop", "client", &["100.64.1.1"]);
    let waypoint = || serve(workload("app", "waypoint-0", &["100.64.3.0"]), WAYPOINT, &[(15008, 15008)]);
    let outside = Workload { tunnel_protocol: TunnelProtocol::None, ..workload("ext", "db", &["192.0.2.7"]) };
    let external = || service("ext/db.example", &["240.240.0.1"]);
    let host = Workload { network_mode: NetworkMode::HostNetwork, ..pod() };
    let far = Workload { network: "east".into(), network_gateway: Some(east()), ..pod() };
    let gateway = Workload { network: "east".into(), ..workload("istio-system", "gateway", &["192.0.2.10"]) };
    let known = [Identity::new("cluster.local", "app", "web").unwrap()].into_iter().collect();
    let own = serve(source.clone(), WEB, &[(80, 8080)]);
    let bound = |gateway| Some(by_name(gateway));
    let world = |services: &[Service], workloads: &[Workload]| (services.to_vec(), workloads.to_vec());
    let table = [
        ("unknown address", world(&[web()], &[]), "192.0.2.1:443", "Passthrough"),
        ("workload", world(&[web()], &[pod()]), "100.64.2.0:8080", "kind: \"direct\""),
        (
            "workload with waypoint",
            world(&[service(WAYPOINT, &[])], &[Workload { waypoint: bound(WAYPOINT), ..pod() }, waypoint()]),
            "100.64.2.0:8080",
            "kind: \"workload waypoint\"",
        ),
        ("service", world(&[web()], &[pod()]), "10.96.0.1:80", "kind: \"direct\""),
        (
            "service with waypoint",
            world(
                &[Service { waypoint: bound(WAYPOINT), ..web() }, service(WAYPOINT, &[])],
                &[pod(), waypoint()],
            ),
            "10.96.0.1:80",
            "kind: \"service waypoint\"",
        ),
        ("headless", world(&[service(WEB, &[])], &[pod()]), "100.64.2.0:8080", "kind: \"direct\""),
        ("host network", world(&[web()], std::slice::from_ref(&host)), "100.64.2.0:22", "Passthrough"),
        ("host network by service", world(&[web()], &[host]), "10.96.0.1:80", "kind: \"direct\""),
        (
            "other network",
            world(&[Service { subject_alt_names: known, ..web() }], &[far.clone(), gateway]),
            "10.96.0.1:80",
            "kind: \"gateway\"",
        ),
        ("other network by address", world(&[web()], &[far]), "100.64.2.0:8080", "Passthrough"),
        (
            "external",
            world(&[external()], &[serve(outside, "ext/db.example", &[(80, 5432)])]),
            "240.240.0.1:80",
            "Plain(192.0.2.7:5432",
        ),
        ("no endpoints", world(&[web()], &[]), "10.96.0.1:80", "Refused(NoHealthyUpstream)"),
        ("own address", world(&[], &[]), "100.64.1.1:8080", "kind: \"direct\", peer: 100.64.1.1:15008"),
        ("own address, own port", world(&[], &[]), "100.64.1.1:15006", "Refused(SelfCall)"),
    ];
    for (kind, (services, workloads), to, expected) in table {
        let to = to.parse().unwrap();
        let case = Case { services, workloads, source: source.clone(), to, failed: vec![] };
        let decided = decide(&case, 1);
        assert!(format!("{decided:?}").contains(expected), "{kind}: {decided:?}");
        assert!(case.ways().contains(&decided), "{kind}: {:?}", case.ways());
    }
    let to = "10.96.0.1:80".parse().unwrap();
    let case = Case { services: vec![web()], workloads: vec![], source: own, to, failed: vec![] };
    assert!(format!("{:?}", decide(&case, 1)).contains("peer: 100.64.1.1:15008"), "own service address");
}

/// R26: an entry of a network that nobody knows a gateway of is refused by name, and passed over where there is another.
#[test]
fn a_foreign_network_without_gateway() {
    let source = workload("shop", "client", &["100.64.1.1"]);
    let foreign = Workload {
        network: "moon".into(),
        ..serve(workload("app", "vm", &["192.0.2.7"]), WEB, &[(80, 8080)])
    };
    let near = serve(workload("app", "web-0", &["100.64.2.0"]), WEB, &[(80, 8080)]);
    let mut case = Case {
        services: vec![service(WEB, &["10.96.0.1"])],
        workloads: vec![foreign],
        source,
        to: "10.96.0.1:80".parse().unwrap(),
        failed: vec![],
    };
    assert_eq!(decide(&case, 1), Way::Refused(Reason::UnknownNetworkGateway));
    case.workloads.push(near);
    for seed in 0..20 {
        let Way::Tunnel { to, .. } = decide(&case, seed) else { panic!() };
        assert!(to.ends_with("web-0"));
    }
}

/// R27: with a trust domain of one's own, both tunnels to another network expect identities of that trust domain.
#[test]
fn another_trust_domain_on_another_network() {
    let id = |namespace: &str, account: &str| Identity::new("corp.example", namespace, account).unwrap();
    let endpoint = serve(workload("app", "web-0", &[]), WEB, &[(80, 8080)]);
    let far = Workload {
        network: "east".into(),
        network_gateway: Some(east()),
        identity: id("app", "web"),
        ..endpoint
    };
    let gateway = Workload {
        network: "east".into(),
        identity: id("istio-system", "gateway"),
        ..workload("istio-system", "gateway", &["192.0.2.10"])
    };
    let named = [id("app", "web")].into_iter().collect();
    let world = World::new()
        .service(Service { subject_alt_names: named, ..service(WEB, &["10.96.0.1"]) })
        .workload(far)
        .workload(gateway);
    let source = workload("shop", "client", &["100.64.1.1"]);
    let facts = OutboundFacts {
        source: &source,
        client: source.addresses[0],
        original_destination: "10.96.0.1:80".parse().unwrap(),
        exclude: &[],
        place: &Place::of(&source),
        own_ports: &OWN_PORTS,
    };
    let Ok(Resolved::Tunnel(route)) = resolve(&world.snapshot(), &facts, &Unobserved, &mut dice(1)) else {
        panic!()
    };
    assert_eq!(route.expected[..], [id("istio-system", "gateway")]);
    let TunnelKind::Gateway(inner) = route.kind else { panic!() };
    assert_eq!(inner.expected[..], [id("app", "web")]);
}
