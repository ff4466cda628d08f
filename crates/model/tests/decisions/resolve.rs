//! Z29-Z42, Z44, Z71-Z73, Z101, traps 11 and 12: each row one case.

use culvert_model::balance::{Place, Unobserved};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{
    InnerRoute, NeedsDns, OutboundFacts, Refusal, Resolved, TunnelKind, TunnelRoute, resolve,
};
use culvert_model::service::{IpFamilies, LoadBalancingMode, Service};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::{Health, NetworkMode, TunnelProtocol, Workload};
use culvert_model::{Str, wire};
use proptest::prelude::*;

use crate::balance::dice;
use crate::world::{World, by_address, by_name, serve, service, workload};

const SVC: &str = "app/web.app.svc.cluster.local";
const WAYPOINT: &str = "app/waypoint.app.svc.cluster.local";
const OWN_PORTS: [u16; 4] = [15001, 15006, 15008, 15053];

fn client() -> Workload {
    workload("shop", "client", &["100.64.1.1", "fd00:64:1::1"])
}

fn go_as(source: &Workload, world: World, destination: &str, exclude: &[Str]) -> Result<Resolved, Refusal> {
    decide(&world.snapshot(), source, destination, exclude, 1)
}

fn go(world: World, destination: &str) -> Result<Resolved, Refusal> {
    go_as(&client(), world, destination, &[])
}

fn decide(
    snapshot: &Snapshot,
    source: &Workload,
    to: &str,
    exclude: &[Str],
    seed: u64,
) -> Result<Resolved, Refusal> {
    let facts = OutboundFacts {
        source,
        client: source.addresses[0],
        original_destination: to.parse().unwrap(),
        exclude,
        place: &Place::of(source),
        own_ports: &OWN_PORTS,
    };
    resolve(snapshot, &facts, &Unobserved, &mut dice(seed))
}

fn tunnel(result: Result<Resolved, Refusal>) -> TunnelRoute {
    match result {
        Ok(Resolved::Tunnel(route)) => route,
        other => panic!("{other:?}"),
    }
}

fn refused(result: Result<Resolved, Refusal>) -> Reason {
    result.unwrap_err().reason
}

fn id(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

fn web() -> Service {
    service(SVC, &["10.96.0.1", "fd00:96::1"])
}

fn pod(name: &str, addresses: &[&str]) -> Workload {
    serve(workload("app", name, addresses), SVC, &[(80, 8080)])
}

fn waypoint(name: &str, ip: &str) -> Workload {
    serve(workload("app", name, &[ip]), WAYPOINT, &[(15008, 15008)])
}

fn waypoint_service() -> Service {
    let ports = [crate::world::port((15008, 15008))].into_iter().collect();
    Service { ports, ..service(WAYPOINT, &["10.96.0.50"]) }
}

/// Z29: the proxy's own port on the pod itself is a loop; on another host it is somebody's port.
#[test]
fn z29_self_call() {
    for own in
        ["127.0.0.1:15001", "[::1]:15008", "0.0.0.0:15053", "100.64.1.1:15006", "[::ffff:127.0.0.1]:15001"]
    {
        assert_eq!(refused(go(World::new(), own)), Reason::SelfCall, "{own}");
    }
    for other in ["127.0.0.1:8080", "100.64.1.2:15001"] {
        assert!(matches!(go(World::new(), other), Ok(Resolved::Passthrough { .. })), "{other}");
    }
}

/// Z34, Z41: a service without waypoint is balanced here, and the port becomes the workload's.
#[test]
fn z34_service_to_endpoint() {
    let route = tunnel(go(World::new().service(web()).workload(pod("w", &["100.64.2.1"])), "10.96.0.1:80"));
    assert_eq!(route.peer, "100.64.2.1:15008".parse().unwrap());
    assert_eq!(route.authority, "100.64.2.1:8080");
    assert_eq!(route.target, "100.64.2.1:8080".parse().unwrap());
    assert_eq!(route.kind, TunnelKind::Direct);
    assert_eq!(route.expected[..], [id("app", "w")]);
    assert_eq!(route.service.unwrap().key.to_string(), SVC);
}

/// Trap 14: at the tunnel's end only the endpoint itself is accepted, and who the service names.
#[test]
fn expected_identities() {
    let named = Service { subject_alt_names: [id("ext", "partner")].into_iter().collect(), ..web() };
    let world = || World::new().service(named.clone()).workload(pod("w", &["100.64.2.1"]));
    assert_eq!(tunnel(go(world(), "10.96.0.1:80")).expected[..], [id("app", "w"), id("ext", "partner")]);
    assert_eq!(tunnel(go(world(), "100.64.2.1:8080")).expected[..], [id("app", "w")]);
}

/// Z41: an endpoint outside the mesh gets plain TCP; a sidecar's protocol is refused rather than replaced.
#[test]
fn z41_protocols() {
    let speaking = |protocol| Workload { tunnel_protocol: protocol, ..pod("w", &["100.64.2.1"]) };
    for to in ["10.96.0.1:80", "100.64.2.1:8080"] {
        let world = |protocol| World::new().service(web()).workload(speaking(protocol));
        match go(world(TunnelProtocol::None), to) {
            Ok(Resolved::Plain { destination, workload, .. }) => {
                assert_eq!(destination, "100.64.2.1:8080".parse().unwrap());
                assert_eq!(&*workload.name, "w");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(refused(go(world(TunnelProtocol::LegacyIstioMtls), to)), Reason::UnsupportedProtocol);
    }
}

/// Z35, trap 12: a known address without a usable endpoint is refused, an unknown one passes (Z37).
#[test]
fn z35_no_endpoint_is_not_unknown() {
    let unhealthy = Workload { health: Health::Unhealthy, ..pod("w", &["100.64.2.1"]) };
    let nowhere = pod("w", &[]);
    let other_family = Service { ip_families: IpFamilies::V6, ..web() };
    for (world, reason) in [
        (World::new().service(web()), Reason::NoHealthyUpstream),
        (World::new().service(web()).workload(unhealthy), Reason::NoHealthyUpstream),
        (World::new().service(web()).workload(nowhere), Reason::NoHealthyUpstream),
        (World::new().service(other_family).workload(pod("w", &["100.64.2.1"])), Reason::NoHealthyUpstream),
    ] {
        assert_eq!(refused(go(world, "10.96.0.1:80")), reason);
    }
    let passed = Resolved::Passthrough { destination: "192.0.2.1:443".parse().unwrap() };
    assert_eq!(go(World::new().service(web()), "192.0.2.1:443"), Ok(passed.clone()));
    assert_eq!(go(World::new().service(web()), "[::ffff:192.0.2.1]:443"), Ok(passed));
}

/// Z71: an endpoint without the port is skipped, and a port that nobody has is named as such.
#[test]
fn z71_ports() {
    let other = serve(workload("app", "other", &["100.64.2.2"]), SVC, &[(81, 8081)]);
    let unmapped = serve(workload("app", "unmapped", &["100.64.2.3"]), SVC, &[(80, 0)]);
    let world = || World::new().service(web()).workload(other.clone()).workload(unmapped.clone());
    assert_eq!(
        tunnel(go(world().workload(pod("w", &["100.64.2.1"])), "10.96.0.1:80")).authority,
        "100.64.2.1:8080"
    );
    assert_eq!(refused(go(world(), "10.96.0.1:80")), Reason::NoHealthyUpstream);
    assert_eq!(refused(go(world(), "10.96.0.1:82")), Reason::UnknownPort);
}

/// Where Z45 gives up: an endpoint that failed is left out, until none is left.
#[test]
fn z45_another_endpoint() {
    let (a, b) = (pod("a", &["100.64.2.1"]), pod("b", &["100.64.2.2"]));
    let world = || World::new().service(web()).workload(a.clone()).workload(b.clone());
    for seed in 0..20 {
        let route = tunnel(decide(
            &world().snapshot(),
            &client(),
            "10.96.0.1:80",
            std::slice::from_ref(&a.uid),
            seed,
        ));
        assert_eq!(&*route.workload.name, "b");
    }
    let both = [a.uid.clone(), b.uid.clone()];
    assert_eq!(refused(go_as(&client(), world(), "10.96.0.1:80", &both)), Reason::NoHealthyUpstream);
    assert_eq!(refused(go_as(&client(), world(), "100.64.2.1:80", &both)), Reason::NoHealthyUpstream);
}

/// Z72: the address asked for, then the service's families, then the family asked for, then any.
#[test]
fn z72_address_choice() {
    let dual = || pod("w", &["100.64.2.1", "fd00:64:2::1"]);
    for (families, endpoint, to, peer) in [
        (IpFamilies::Automatic, dual(), "10.96.0.1:80", "100.64.2.1:15008"),
        (IpFamilies::Automatic, dual(), "[fd00:96::1]:80", "[fd00:64:2::1]:15008"),
        (IpFamilies::V6, dual(), "10.96.0.1:80", "[fd00:64:2::1]:15008"),
        (IpFamilies::V4, dual(), "[fd00:96::1]:80", "100.64.2.1:15008"),
        (IpFamilies::Dual, dual(), "[fd00:96::1]:80", "[fd00:64:2::1]:15008"),
        (IpFamilies::Automatic, pod("w", &["100.64.2.1"]), "[fd00:96::1]:80", "100.64.2.1:15008"),
        (IpFamilies::Automatic, dual(), "[fd00:64:2::1]:80", "[fd00:64:2::1]:15008"),
        (IpFamilies::V4, dual(), "[fd00:64:2::1]:80", "[fd00:64:2::1]:15008"),
    ] {
        let world = World::new().service(Service { ip_families: families, ..web() }).workload(endpoint);
        assert_eq!(tunnel(go(world, to)).peer, peer.parse().unwrap(), "{families:?} {to}");
    }
    // An address that is a service's and its endpoint's is the endpoint's.
    let both = Service { addresses: service(SVC, &["100.64.2.9"]).addresses, ..web() };
    let world = World::new().service(both).workload(pod("w", &["100.64.2.1", "100.64.2.9"]));
    assert_eq!(tunnel(go(world, "100.64.2.9:80")).peer, "100.64.2.9:15008".parse().unwrap());
}

/// Z36: a service that asks for the original destination gets it, unless a workload that we know is there.
#[test]
fn z36_passthrough_service() {
    let mut open = service("ext/any.example.com", &["203.0.113.0/24", "203.0.113.7"]);
    open.load_balancing.mode = LoadBalancingMode::Passthrough;
    let guarded = Workload { waypoint: Some(by_name(WAYPOINT)), ..workload("app", "w", &["203.0.113.7"]) };
    let world = || World::new().service(open.clone()).workload(guarded.clone());
    let destination = "203.0.113.9:443".parse().unwrap();
    assert_eq!(go(world(), "203.0.113.9:443"), Ok(Resolved::Passthrough { destination }));
    assert_eq!(tunnel(go(world(), "203.0.113.7:443")).kind, TunnelKind::Direct);
}

/// A block around a pod's address does not take it out of the mesh.
#[test]
fn a_block_does_not_hide_a_pod() {
    let mut open = service("ext/any.example.com", &["100.64.0.0/10"]);
    open.load_balancing.mode = LoadBalancingMode::Passthrough;
    let world = World::new().service(open).workload(pod("w", &["100.64.2.1"]));
    assert_eq!(tunnel(go(world, "100.64.2.1:9000")).authority, "100.64.2.1:9000");
}

/// D21, Z37: a host-network pod's address is its node's, and nobody's here.
#[test]
fn host_network_passes_through() {
    let host = Workload { network_mode: NetworkMode::HostNetwork, ..workload("app", "w", &["198.18.0.10"]) };
    assert!(matches!(go(World::new().workload(host), "198.18.0.10:22"), Ok(Resolved::Passthrough { .. })));
}

/// Z16. Z31, Z33: a service's waypoint gets the address as asked for, and one of its own instances is chosen.
#[test]
fn z31_service_waypoint() {
    let bound = Service { waypoint: Some(by_name(WAYPOINT)), ..web() };
    let world = || {
        World::new().service(bound.clone()).service(waypoint_service()).workload(pod("w", &["100.64.2.1"]))
    };
    let route = tunnel(go(world().workload(waypoint("wp", "100.64.3.1")), "10.96.0.1:80"));
    assert_eq!(route.peer, "100.64.3.1:15008".parse().unwrap());
    assert_eq!(route.authority, "10.96.0.1:80");
    assert_eq!(route.target, "10.96.0.1:80".parse().unwrap());
    assert_eq!(route.kind, TunnelKind::ServiceWaypoint);
    assert_eq!(route.expected[..], [id("app", "wp")]);
    // Whatever the port: the waypoint knows.
    assert_eq!(
        tunnel(go(world().workload(waypoint("wp", "100.64.3.1")), "10.96.0.1:99")).authority,
        "10.96.0.1:99"
    );
    // Z33: by address too, of the service or of an instance.
    for address in ["10.96.0.50", "100.64.3.1"] {
        let bound = Service { waypoint: Some(by_address(address)), ..web() };
        let world =
            World::new().service(bound).service(waypoint_service()).workload(waypoint("wp", "100.64.3.1"));
        assert_eq!(tunnel(go(world, "10.96.0.1:80")).peer, "100.64.3.1:15008".parse().unwrap());
    }
    let v6 = tunnel(go(world().workload(waypoint("wp", "100.64.3.1")), "[fd00:96::1]:80"));
    assert_eq!(v6.authority, "[fd00:96::1]:80");
}

/// Z44: a waypoint that is named and cannot be found or is not ready refuses; nothing goes round it.
#[test]
fn z44_missing_waypoint() {
    let bound = |gateway| Service { waypoint: Some(gateway), ..web() };
    let world = |gateway| World::new().service(bound(gateway)).workload(pod("w", &["100.64.2.1"]));
    assert_eq!(refused(go(world(by_name(WAYPOINT)), "10.96.0.1:80")), Reason::UnknownWaypoint);
    assert_eq!(refused(go(world(by_address("10.96.0.50")), "10.96.0.1:80")), Reason::UnknownWaypoint);
    let unready = Workload { health: Health::Unhealthy, ..waypoint("wp", "100.64.3.1") };
    for instance in [None, Some(unready)] {
        let world = world(by_name(WAYPOINT)).service(waypoint_service());
        let world = instance.into_iter().fold(world, World::workload);
        assert_eq!(refused(go(world, "10.96.0.1:80")), Reason::NoHealthyUpstream);
    }
    let ready = waypoint("wp", "100.64.3.1");
    let failed = [ready.uid.clone()];
    let world = world(by_name(WAYPOINT)).service(waypoint_service()).workload(ready);
    assert_eq!(refused(go_as(&client(), world, "10.96.0.1:80", &failed)), Reason::NoHealthyUpstream);
}

/// Z32: several waypoints share connections by weight; weight 0 gets none, and all 0 is no way round.
#[test]
fn z32_weighted_waypoints() {
    let second = "app/canary.app.svc.cluster.local";
    let bound = |a, b| Service {
        waypoint: Some(by_name(WAYPOINT)),
        weighted_waypoints: vec![(*by_name(WAYPOINT), a), (*by_name(second), b)],
        ..web()
    };
    let world = |a, b| {
        let canary = serve(workload("app", "canary", &["100.64.3.2"]), second, &[(15008, 15008)]);
        World::new()
            .service(bound(a, b))
            .service(waypoint_service())
            .service(service(second, &[]))
            .workload(waypoint("wp", "100.64.3.1"))
            .workload(canary)
            .workload(pod("w", &["100.64.2.1"]))
            .snapshot()
    };
    let canaries = |snapshot: &Snapshot| {
        let route = |seed: u64| tunnel(decide(snapshot, &client(), "10.96.0.1:80", &[], seed * 7919));
        (0..1000_usize).filter(|seed| &*route(*seed as u64).workload.name == "canary").count()
    };
    let some = canaries(&world(90, 10));
    assert!((50..160).contains(&some), "{some} of 1000, expected 100");
    assert_eq!(canaries(&world(1, 0)), 0);
    assert_eq!(refused(decide(&world(0, 0), &client(), "10.96.0.1:80", &[], 1)), Reason::UnknownWaypoint);
}

/// Z38, trap 11: a workload's own waypoint is for its own address only.
#[test]
fn z38_workload_waypoint() {
    let bound = Workload { waypoint: Some(by_name(WAYPOINT)), ..pod("w", &["100.64.2.1"]) };
    let world = || {
        World::new()
            .service(web())
            .service(waypoint_service())
            .workload(bound.clone())
            .workload(waypoint("wp", "100.64.3.1"))
    };
    let route = tunnel(go(world(), "100.64.2.1:8080"));
    assert_eq!((route.kind, route.authority.as_str()), (TunnelKind::WorkloadWaypoint, "100.64.2.1:8080"));
    assert_eq!(route.peer, "100.64.3.1:15008".parse().unwrap());
    assert_eq!(tunnel(go(world(), "10.96.0.1:80")).kind, TunnelKind::Direct);
    let bound_service = Service { waypoint: Some(by_name(WAYPOINT)), ..web() };
    let free =
        World::new().service(bound_service).service(waypoint_service()).workload(pod("w", &["100.64.2.1"]));
    assert_eq!(
        tunnel(go(free, "100.64.2.1:8080")).kind,
        TunnelKind::Direct,
        "the service's waypoint is not the workload's"
    );
}

/// Z39: what a waypoint itself sends goes straight on.
#[test]
fn z39_the_waypoint_itself() {
    let bound = Workload { waypoint: Some(by_name(WAYPOINT)), ..pod("w", &["100.64.2.1"]) };
    for gateway in [by_name(WAYPOINT), by_address("100.64.3.1")] {
        let bound_service = Service { waypoint: Some(gateway.clone()), ..web() };
        let bound = Workload { waypoint: Some(gateway), ..bound.clone() };
        let source = waypoint("wp", "100.64.3.1");
        let world = || {
            World::new()
                .service(bound_service.clone())
                .service(waypoint_service())
                .workload(bound.clone())
                .workload(source.clone())
        };
        assert_eq!(tunnel(go_as(&source, world(), "10.96.0.1:80", &[])).kind, TunnelKind::Direct);
        assert_eq!(tunnel(go_as(&source, world(), "100.64.2.1:8080", &[])).kind, TunnelKind::Direct);
        let impostor = Workload { identity: source.identity.clone(), ..client() };
        assert_eq!(tunnel(go_as(&impostor, world(), "10.96.0.1:80", &[])).kind, TunnelKind::ServiceWaypoint);
    }
}

/// Z40, Z73, Z26: an endpoint on another network is reached through its gateway, in a tunnel inside the tunnel.
#[test]
fn z40_other_network() {
    let gateway = Workload { network: "east".into(), ..workload("istio-system", "gateway", &["192.0.2.10"]) };
    let mut at_gateway = by_address("192.0.2.10");
    if let culvert_model::address::GatewayDestination::Address(address) = &mut at_gateway.destination {
        address.network = "east".into();
    }
    let remote = |gateway| Workload { network: "east".into(), network_gateway: gateway, ..pod("w", &[]) };
    let named = Service { subject_alt_names: [id("app", "w")].into_iter().collect(), ..web() };
    let world = World::new()
        .service(named.clone())
        .workload(remote(Some(at_gateway.clone())))
        .workload(gateway.clone());
    let route = tunnel(go(world, "10.96.0.1:80"));
    assert_eq!(route.peer, "192.0.2.10:15008".parse().unwrap());
    assert_eq!(route.expected[..], [id("istio-system", "gateway")]);
    let authority = "web.app.svc.cluster.local:80".to_owned();
    assert_eq!(route.authority, authority);
    assert_eq!(
        route.kind,
        TunnelKind::Gateway(InnerRoute { authority, expected: [id("app", "w")].into_iter().collect() })
    );

    let no_gateway = World::new().service(named.clone()).workload(remote(None));
    assert_eq!(refused(go(no_gateway, "10.96.0.1:80")), Reason::UnknownNetworkGateway);
    let unknown_gateway = World::new().service(named).workload(remote(Some(at_gateway.clone())));
    assert_eq!(refused(go(unknown_gateway, "10.96.0.1:80")), Reason::UnknownNetworkGateway);
    let nameless = World::new().service(web()).workload(remote(Some(at_gateway))).workload(gateway);
    assert_eq!(refused(go(nameless, "10.96.0.1:80")), Reason::UnsupportedProtocol);
}

/// The same address on another network is another host.
#[test]
fn networks_are_apart() {
    let east = Workload { network: "east".into(), ..workload("app", "w", &["100.64.2.1"]) };
    assert!(matches!(
        go(World::new().workload(east.clone()), "100.64.2.1:80"),
        Ok(Resolved::Passthrough { .. })
    ));
    let neighbour = Workload { network: "east".into(), ..client() };
    assert_eq!(
        tunnel(go_as(&neighbour, World::new().workload(east), "100.64.2.1:80", &[])).kind,
        TunnelKind::Direct
    );
}

/// Z42: an endpoint with a name only is looked up by whoever can, and then is like any other.
#[test]
fn z42_needs_dns() {
    let named =
        |protocol| Workload { hostname: "db.example.com".into(), tunnel_protocol: protocol, ..pod("w", &[]) };
    for protocol in [TunnelProtocol::None, TunnelProtocol::Hbone] {
        let Ok(Resolved::NeedsDns(needs)) =
            go(World::new().service(web()).workload(named(protocol)), "10.96.0.1:80")
        else {
            panic!("needs a look-up");
        };
        assert_eq!((&*needs.hostname, needs.port), ("db.example.com", 8080));
        match (protocol, needs.with_address("192.0.2.5".parse().unwrap())) {
            (TunnelProtocol::None, Resolved::Plain { destination, .. }) => {
                assert_eq!(destination, "192.0.2.5:8080".parse().unwrap());
            }
            (_, Resolved::Tunnel(route)) => {
                assert_eq!(
                    (route.peer.port(), route.authority.as_str()),
                    (wire::HBONE_PORT, "192.0.2.5:8080")
                );
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Z75: a service hidden from the client's namespace is no service to it.
#[test]
fn z75_hidden() {
    let hidden = Service { namespace_only: true, ..web() };
    let world = || World::new().service(hidden.clone()).workload(pod("w", &["100.64.2.1"]));
    assert!(matches!(go(world(), "10.96.0.1:80"), Ok(Resolved::Passthrough { .. })));
    let neighbour = workload("app", "client", &["100.64.1.2"]);
    assert_eq!(tunnel(go_as(&neighbour, world(), "10.96.0.1:80", &[])).kind, TunnelKind::Direct);
}

proptest! {
    /// Whatever the world: a service's address is never passed through, a tunnel always expects someone, what failed is not
    /// chosen again, and a bound service is reached through its waypoint or not at all.
    #[test]
    fn never_round_the_mesh(
        pods in prop::collection::vec((prop::bool::ANY, 0_u8..3, prop::bool::ANY, prop::bool::ANY), 0..5),
        bound in prop::option::of(prop::bool::ANY),
        port in prop_oneof![Just(80_u16), Just(81)],
        seed: u64,
    ) {
        let mut world = World::new();
        let gateway = bound.map(|_| by_name(WAYPOINT));
        world = world.service(Service { waypoint: gateway, ..web() });
        if bound == Some(true) {
            world = world.service(waypoint_service()).workload(waypoint("wp", "100.64.3.1"));
        }
        let mut exclude: Vec<Str> = Vec::new();
        for (i, (healthy, protocol, addressed, failed)) in pods.into_iter().enumerate() {
            let ip = format!("100.64.2.{i}");
            let addresses = [&*ip];
            let mut w = pod(&format!("w{i}"), if addressed { &addresses } else { &[] });
            w.health = if healthy { Health::Healthy } else { Health::Unhealthy };
            w.tunnel_protocol =
                [TunnelProtocol::None, TunnelProtocol::Hbone, TunnelProtocol::LegacyIstioMtls][usize::from(protocol)];
            if failed {
                exclude.push(w.uid.clone());
            }
            world = world.workload(w);
        }
        match decide(&world.snapshot(), &client(), &format!("10.96.0.1:{port}"), &exclude, seed) {
            Err(refusal) => prop_assert!(!refusal.detail.is_empty()),
            Ok(Resolved::Tunnel(route)) => {
                prop_assert!(!route.expected.is_empty() && !exclude.contains(&route.workload.uid));
                prop_assert_eq!(route.kind == TunnelKind::ServiceWaypoint, bound.is_some());
            }
            Ok(Resolved::Plain { workload, .. }) => {
                prop_assert!(bound.is_none() && workload.tunnel_protocol == TunnelProtocol::None);
                prop_assert!(!exclude.contains(&workload.uid) && workload.health == Health::Healthy);
            }
            Ok(other) => prop_assert!(false, "{other:?}"),
        }
    }
}

/// Z45, Z34: what may be tried again elsewhere is what was chosen among several, named by the port that was connected to; the
/// workload is known of every way but the one that passes through.
#[test]
fn what_was_chosen() {
    let world = || World::new().service(web()).workload(pod("w", &["100.64.2.1"]));
    let chosen = |way: &Resolved| way.chosen().map(|(workload, port)| (workload.name.to_string(), port));
    let known = |way: &Resolved| way.workload().map(|workload| workload.name.to_string());
    let w = || String::from("w");

    let balanced = tunnel(go(world(), "10.96.0.1:80"));
    let asked_for = go(world(), "100.64.2.1:8080").unwrap();
    let waypoint = |kind| Resolved::Tunnel(TunnelRoute { kind, service: None, ..balanced.clone() });
    let inner = InnerRoute { authority: "web:80".to_owned(), expected: balanced.expected.clone() };
    let needed = |service| {
        let workload = balanced.workload.clone();
        Resolved::NeedsDns(NeedsDns { hostname: Str::from("db.example.com"), port: 5432, workload, service })
    };
    let plain = |service| {
        let (destination, workload) = (balanced.target, balanced.workload.clone());
        Resolved::Plain { destination, workload, service }
    };
    let service = balanced.service.clone();
    for (way, expected) in [
        (Resolved::Tunnel(balanced.clone()), Some((w(), 8080))),
        (asked_for, None),
        (waypoint(TunnelKind::ServiceWaypoint), Some((w(), 15008))),
        (waypoint(TunnelKind::WorkloadWaypoint), Some((w(), 15008))),
        (waypoint(TunnelKind::Gateway(inner)), Some((w(), 15008))),
        (needed(service.clone()), Some((w(), 5432))),
        (needed(None), None),
        (plain(service), Some((w(), 8080))),
        (plain(None), None),
    ] {
        assert_eq!(chosen(&way), expected, "{way:?}");
        assert_eq!(known(&way), Some(w()), "{way:?}");
    }
    let passed = go(world(), "192.0.2.1:443").unwrap();
    assert_eq!((chosen(&passed), known(&passed)), (None, None));
}
