//! Z33: a waypoint that is on another network.

use culvert_model::address::GatewayDestination;
use culvert_model::balance::{Place, Unobserved};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{InnerRoute, OutboundFacts, Refusal, Resolved, TunnelKind, resolve};
use culvert_model::service::Service;
use culvert_model::workload::Workload;

use crate::balance::dice;
use crate::world::{World, by_address, by_name, serve, service, workload};

const CART: &str = "shop/cart.shop.svc.cluster.local";
const WAYPOINT: &str = "shop/waypoint.shop.svc.cluster.local";

fn account(namespace: &str, name: &str) -> Identity {
    Identity::new("cluster.local", namespace, name).unwrap()
}

/// The service `cart`, bound; an endpoint of it is on our own network.
fn world(waypoint: Service, instances: impl IntoIterator<Item = Workload>) -> World {
    let cart = Service { waypoint: Some(by_name(WAYPOINT)), ..service(CART, &["10.96.0.1"]) };
    let endpoint = serve(workload("shop", "cart", &["100.64.2.1"]), CART, &[(80, 8080)]);
    let gateway = Workload { network: "east".into(), ..workload("istio-system", "gateway", &["192.0.2.10"]) };
    let world = World::new().service(cart).service(waypoint).workload(endpoint).workload(gateway);
    instances.into_iter().fold(world, World::workload)
}

fn waypoint() -> Service {
    let names = [account("shop", "waypoint")].into_iter().collect();
    Service { subject_alt_names: names, ..service(WAYPOINT, &["10.96.0.50"]) }
}

/// An instance of the waypoint on the network `east`, behind that network's gateway.
fn far() -> Workload {
    let mut gateway = by_address("192.0.2.10");
    if let GatewayDestination::Address(address) = &mut gateway.destination {
        address.network = "east".into();
    }
    let instance = serve(workload("shop", "far", &[]), WAYPOINT, &[(15008, 15008)]);
    Workload { network: "east".into(), network_gateway: Some(gateway), ..instance }
}

fn near() -> Workload {
    serve(workload("shop", "near", &["100.64.2.50"]), WAYPOINT, &[(15008, 15008)])
}

fn go(world: World, to: &str) -> Result<Resolved, Refusal> {
    let source = workload("shop", "client", &["100.64.1.1"]);
    let facts = OutboundFacts {
        source: &source,
        client: source.addresses[0],
        original_destination: to.parse().unwrap(),
        exclude: &[],
        place: &Place::of(&source),
        own_ports: &[15001],
    };
    resolve(&world.snapshot(), &facts, &Unobserved, &mut dice(1))
}

/// Z33, Z26: through the gateway there, asked for the service by name, and only the waypoint may answer; never past it to
/// the endpoint that is near.
#[test]
fn through_the_other_networks_gateway() {
    let Ok(Resolved::Tunnel(route)) = go(world(waypoint(), [far()]), "10.96.0.1:80") else {
        panic!("no tunnel")
    };
    assert_eq!(route.peer, "192.0.2.10:15008".parse().unwrap());
    assert_eq!(route.expected[..], [account("istio-system", "gateway")]);
    let authority = "cart.shop.svc.cluster.local:80".to_owned();
    assert_eq!(route.authority, authority);
    let expected = [account("shop", "waypoint")].into_iter().collect();
    assert_eq!(route.kind, TunnelKind::Gateway(InnerRoute { authority, expected }));
    assert_eq!(route.service.unwrap().key.to_string(), CART);
}

/// One that is near is always taken, ready or not: the far one is for where there is none.
#[test]
fn a_near_waypoint_wins() {
    let Ok(Resolved::Tunnel(route)) = go(world(waypoint(), [far(), near()]), "10.96.0.1:80") else {
        panic!("no tunnel")
    };
    assert_eq!(route.peer, "100.64.2.50:15008".parse().unwrap());
    assert_eq!(route.kind, TunnelKind::ServiceWaypoint);
}

/// Fail closed: a waypoint that cannot be reached, or could not be told from anybody else, is not gone around.
#[test]
fn what_cannot_be_reached_is_refused() {
    let refused = |world| go(world, "10.96.0.1:80").unwrap_err().reason;
    let stranded = Workload { network_gateway: None, ..far() };
    assert_eq!(refused(world(waypoint(), [stranded])), Reason::NoHealthyUpstream);
    let nameless = Service { subject_alt_names: Default::default(), ..waypoint() };
    assert_eq!(refused(world(nameless, [far()])), Reason::UnsupportedProtocol);
    assert_eq!(refused(world(waypoint(), [])), Reason::NoHealthyUpstream);
}
