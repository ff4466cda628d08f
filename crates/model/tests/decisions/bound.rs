//! A bound workload accepts only its waypoints (design.md; Z52 differs).

use culvert_model::address::GatewayAddress;
use culvert_model::authorize::{ConnectionFacts, Step, authorize, explain};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::policy::{Action, Match, PolicyScope};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::{Health, Workload};
use proptest::prelude::*;

use crate::world::{World, by_address, by_name, policy, serve, service, workload};

const WAYPOINT: &str = "shop/waypoint.shop.svc.cluster.local";

fn account(name: &str) -> Identity {
    Identity::new("cluster.local", "shop", name).unwrap()
}

/// The account of the waypoint's two pods.
fn waypoint_pod(number: u8, health: Health) -> Workload {
    let name = format!("waypoint-{number}");
    let pod = workload("shop", &name, &[&format!("100.64.1.{}", 50 + number)]);
    let pod = Workload { identity: account("waypoint"), health, ..pod };
    serve(pod, WAYPOINT, &[(15008, 15008)])
}

fn bound_to(waypoint: Option<Box<GatewayAddress>>) -> Workload {
    Workload { waypoint, ..workload("shop", "cart", &["100.64.1.9"]) }
}

fn world() -> World {
    World::new()
        .service(service(WAYPOINT, &["198.18.128.50"]))
        .workload(waypoint_pod(1, Health::Healthy))
        .workload(waypoint_pod(2, Health::Unhealthy))
        .workload(workload("shop", "client", &["100.64.1.2"]))
}

fn verdict(snapshot: &Snapshot, to: &Workload, identity: Option<&Identity>) -> Result<(), Reason> {
    let facts = ConnectionFacts {
        identity,
        source: "100.64.1.51:40000".parse().unwrap(),
        destination: "100.64.1.9:8080".parse().unwrap(),
    };
    let verdict = authorize(snapshot, to, &facts);
    let explained = explain(snapshot, to, &facts);
    assert_eq!(verdict, explained.verdict);
    let said = explained.steps.iter().any(|step| matches!(step, Step::PastWaypoint { .. }));
    let reason = verdict.map(drop).map_err(|denial| denial.reason);
    assert_eq!(said, reason == Err(Reason::WaypointRequired));
    reason
}

/// Z57.
/// Z52 differs: by service name, by the service's address or by a pod's own address, only the waypoint's accounts come in,
/// and plaintext never does, whatever address it comes from.
#[test]
fn only_the_waypoint_reaches_a_bound_workload() {
    let snapshot = world().snapshot();
    for waypoint in [by_name(WAYPOINT), by_address("198.18.128.50"), by_address("100.64.1.51")] {
        let cart = bound_to(Some(waypoint.clone()));
        assert_eq!(verdict(&snapshot, &cart, Some(&account("waypoint"))), Ok(()), "{waypoint:?}");
        for stranger in [None, Some(account("client")), Some(account("cart"))] {
            let refused = verdict(&snapshot, &cart, stranger.as_ref());
            assert_eq!(refused, Err(Reason::WaypointRequired), "{waypoint:?} {stranger:?}");
        }
    }
    assert_eq!(verdict(&snapshot, &bound_to(None), None), Ok(()), "one that is not bound is open");
}

/// Z44: fail closed where the waypoint is not known, and where it has no pods.
#[test]
fn a_waypoint_that_is_missing_lets_nobody_in() {
    let empty = World::new().service(service(WAYPOINT, &["198.18.128.50"])).snapshot();
    for snapshot in [World::new().snapshot(), empty] {
        for waypoint in [by_name(WAYPOINT), by_address("198.18.128.50")] {
            let cart = bound_to(Some(waypoint));
            let refused = verdict(&snapshot, &cart, Some(&account("waypoint")));
            assert_eq!(refused, Err(Reason::WaypointRequired));
        }
    }
}

/// A pod whose account is the waypoint's in another trust domain or namespace is somebody else.
#[test]
fn a_namesake_is_not_the_waypoint() {
    let snapshot = world().snapshot();
    let cart = bound_to(Some(by_name(WAYPOINT)));
    for (domain, namespace) in [("other.mesh", "shop"), ("cluster.local", "bank")] {
        let namesake = Identity::new(domain, namespace, "waypoint").unwrap();
        assert_eq!(verdict(&snapshot, &cart, Some(&namesake)), Err(Reason::WaypointRequired));
    }
}

/// Z39: a binding that covers the waypoint's own pods does not shut it off from its clients.
#[test]
fn a_waypoint_is_not_bound_to_itself() {
    let snapshot = world().snapshot();
    let own = Workload { waypoint: Some(by_name(WAYPOINT)), ..waypoint_pod(1, Health::Healthy) };
    assert_eq!(verdict(&snapshot, &own, Some(&account("client"))), Ok(()));
}

/// Having come the right way is not being allowed: policy still decides about the waypoint.
#[test]
fn policy_judges_the_waypoint_too() {
    let deny = policy(
        "shop/no",
        PolicyScope::Namespace,
        Action::Deny,
        vec![vec![vec![Match {
            namespaces: vec![culvert_model::policy::StringMatch::Exact("shop".into())],
            ..Match::default()
        }]]],
    );
    let snapshot = world().policy(deny).snapshot();
    let cart = bound_to(Some(by_name(WAYPOINT)));
    let refused = verdict(&snapshot, &cart, Some(&account("waypoint")));
    assert_eq!(refused, Err(Reason::AuthorizationPolicy));
}

proptest! {
    /// Against the rule as it is said: bound implies that some instance of the waypoint has the peer's identity.
    #[test]
    fn the_rule(
        pods in prop::collection::vec((0..4_u8, any::<bool>()), 0..6),
        peer in prop::option::of(0..4_u8),
        bound in any::<bool>(),
    ) {
        let identity = |n: u8| account(&format!("account-{n}"));
        let mut world = World::new().service(service(WAYPOINT, &["198.18.128.50"]));
        for (index, (number, serves)) in pods.iter().enumerate() {
            let pod = workload("shop", &format!("pod-{index}"), &[&format!("100.64.3.{index}")]);
            let pod = Workload { identity: identity(*number), ..pod };
            world = world.workload(if *serves { serve(pod, WAYPOINT, &[(15008, 15008)]) } else { pod });
        }
        let cart = bound_to(bound.then(|| by_name(WAYPOINT)));
        let peer = peer.map(identity);
        let expected = !bound || pods.iter().any(|(n, serves)| *serves && Some(identity(*n)) == peer);
        prop_assert_eq!(verdict(&world.snapshot(), &cart, peer.as_ref()).is_ok(), expected);
    }
}
