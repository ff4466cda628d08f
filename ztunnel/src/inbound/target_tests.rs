use culvert_model::workload::ApplicationTunnel;
use proptest::prelude::*;

use super::*;
use crate::world::{by_address, by_name, serve, service, snapshot, workload};

const CART: &str = "shop/cart.shop.svc.cluster.local";
const WAYPOINT: &str = "shop/waypoint.shop.svc.cluster.local";

fn cart() -> Workload {
    serve(workload("shop", "cart", &["100.64.1.9", "fd00:64:1::9"]), CART, &[(80, 8080), (15008, 15008)])
}

fn waypoint() -> Workload {
    serve(workload("shop", "waypoint", &["100.64.1.50"]), WAYPOINT, &[(15008, 15008)])
}

/// The service `cart` is bound to the waypoint by name; the pod `bound` by address.
fn world() -> Arc<Snapshot> {
    let bound = Workload {
        waypoint: Some(by_address("198.18.128.50")),
        ..workload("shop", "bound", &["100.64.1.10"])
    };
    let bound_service = Service { waypoint: Some(by_name(WAYPOINT)), ..service(CART, &["198.18.128.9"]) };
    let canary = Service {
        weighted_waypoints: vec![(*by_name(WAYPOINT), 1), (*by_name("shop/other.shop.svc.cluster.local"), 9)],
        ..service("shop/canary.shop.svc.cluster.local", &["198.18.128.11"])
    };
    let free = service("shop/free.shop.svc.cluster.local", &["198.18.128.12"]);
    let other = workload("shop", "other", &["100.64.1.11"]);
    let services = [bound_service, canary, free, service(WAYPOINT, &["198.18.128.50"])];
    snapshot([cart(), waypoint(), bound, other], services)
}

fn ask(pod: &Workload, authority: &str) -> Result<SocketAddr, Reason> {
    let asked = target(&world(), pod, pod.addresses[0], authority);
    asked.map(|t| t.address).map_err(|failure| failure.reason)
}

fn at(text: &str) -> Result<SocketAddr, Reason> {
    Ok(text.parse().unwrap())
}

/// Z47: the pod's own addresses of either family, however written, and nobody else's.
#[test]
fn only_the_pods_own_address() {
    assert_eq!(ask(&cart(), "100.64.1.9:8080"), at("100.64.1.9:8080"));
    assert_eq!(ask(&cart(), "[::ffff:100.64.1.9]:8080"), at("100.64.1.9:8080"));
    assert_eq!(ask(&cart(), "[fd00:64:1::9]:8080"), at("[fd00:64:1::9]:8080"));
    for wrong in
        ["100.64.1.10:8080", "127.0.0.1:8080", "198.18.128.9:80", "[::1]:80", "0.0.0.0:80", "8.8.8.8:80"]
    {
        assert_eq!(ask(&cart(), wrong), Err(Reason::WrongDestination), "{wrong}");
    }
    // The address that the kernel accepted on counts even before the control plane has told of it.
    let young = Workload { addresses: Default::default(), ..cart() };
    let found = target(&world(), &young, "100.64.1.77".parse().unwrap(), "100.64.1.77:80").unwrap();
    assert_eq!(found.address, "100.64.1.77:80".parse().unwrap());
}

/// Z48: a service's name stands for the pod, and the service's port for the pod's.
#[test]
fn a_services_name_and_port() {
    assert_eq!(ask(&cart(), "cart.shop.svc.cluster.local:80"), at("100.64.1.9:8080"));
    assert_eq!(ask(&cart(), "Cart.Shop.svc.cluster.local.:80"), at("100.64.1.9:8080"));
    assert_eq!(ask(&cart(), "cart.shop.svc.cluster.local:8080"), Err(Reason::UnknownPort));
    assert_eq!(ask(&cart(), "free.shop.svc.cluster.local:80"), Err(Reason::WrongDestination));
    assert_eq!(ask(&cart(), "nobody.shop.svc.cluster.local:80"), Err(Reason::WrongDestination));
    let found = target(&world(), &cart(), cart().addresses[0], "cart.shop.svc.cluster.local:80").unwrap();
    assert_eq!(&*found.service.unwrap().key.hostname, "cart.shop.svc.cluster.local");
}

/// Z49: the proxy's own ports are nobody's destination, asked for as they are or by a service's mapping.
#[test]
fn none_of_the_proxys_ports() {
    for port in OWN_PORTS {
        assert_eq!(ask(&cart(), &format!("100.64.1.9:{port}")), Err(Reason::SelfCall));
        assert_eq!(ask(&waypoint(), &format!("198.18.128.9:{port}")), Err(Reason::SelfCall));
    }
    assert_eq!(ask(&cart(), "cart.shop.svc.cluster.local:15008"), Err(Reason::SelfCall));
    let tunnel = ApplicationTunnel { proxy_protocol: true, port: 15008 };
    let sandwiched = Workload { application_tunnel: Some(tunnel), ..waypoint() };
    assert_eq!(ask(&sandwiched, "198.18.128.9:80"), Err(Reason::SelfCall));
}

/// Z20: what is no authority at all.
#[test]
fn garbage() {
    for bad in
        ["", ":80", "100.64.1.9", "100.64.1.9:", "100.64.1.9:0", "100.64.1.9:99999", "fd00::1:80", "u@h:80"]
    {
        assert_eq!(ask(&cart(), bad), Err(Reason::BadRequest), "{bad:?}");
    }
}

/// Z47: a waypoint is asked for what names it as its waypoint, by service or pod address, weighted or by name, and for
/// nothing else; the bytes go to the waypoint itself.
#[test]
fn a_waypoint_is_asked_for_what_is_bound_to_it() {
    let waypoint = waypoint();
    assert_eq!(ask(&waypoint, "198.18.128.9:80"), at("100.64.1.50:80"), "the service's address");
    assert_eq!(ask(&waypoint, "198.18.128.11:80"), at("100.64.1.50:80"), "one waypoint of several");
    assert_eq!(ask(&waypoint, "100.64.1.10:8080"), at("100.64.1.50:8080"), "the bound pod's address");
    assert_eq!(ask(&waypoint, "cart.shop.svc.cluster.local:80"), at("100.64.1.50:80"), "the service's name");
    for unbound in ["198.18.128.12:80", "100.64.1.11:80", "100.64.9.9:80", "free.shop.svc.cluster.local:80"] {
        assert_eq!(ask(&waypoint, unbound), Err(Reason::WrongDestination), "{unbound}");
    }
    // Being named like a waypoint is not being one.
    let namesake = workload("shop", "waypoint-2", &["100.64.1.51"]);
    assert_eq!(ask(&namesake, "198.18.128.9:80"), Err(Reason::WrongDestination));
}

/// Z53: a pod that takes PROXY protocol is given everything, at its port, and told what was asked for.
#[test]
fn a_gateway_that_takes_proxy_protocol() {
    let with = |proxy_protocol, port| Workload {
        application_tunnel: Some(ApplicationTunnel { proxy_protocol, port }),
        ..waypoint()
    };
    let ask = |pod: &Workload, authority: &str| target(&world(), pod, pod.addresses[0], authority).unwrap();
    let found = ask(&with(true, 15088), "100.64.9.9:80");
    assert_eq!(found.address, "100.64.1.50:15088".parse().unwrap());
    assert_eq!(found.proxied, Some("100.64.9.9:80".parse().unwrap()));
    let same_port = ask(&with(true, 0), "198.18.128.9:80");
    assert_eq!(same_port.address, "100.64.1.50:80".parse().unwrap());
    assert_eq!(same_port.proxied, Some("198.18.128.9:80".parse().unwrap()));
    let plain = ask(&with(false, 15088), "100.64.9.9:80");
    assert_eq!((plain.address.port(), plain.proxied), (15088, None));
}

proptest! {
    /// Whatever is asked, bytes go to the pod itself, to no port of the proxy, or nowhere.
    #[test]
    fn never_anywhere_else(authority in "(100\\.64\\.1\\.(9|10|50)|198\\.18\\.128\\.[0-9]{1,2}|\\[fd00:64:1::9\\]|[a-z.]{1,12}|cart.shop.svc.cluster.local):[0-9]{1,5}") {
        for pod in [cart(), waypoint()] {
            if let Ok(found) = target(&world(), &pod, pod.addresses[0], &authority) {
                prop_assert!(pod.addresses.contains(&found.address.ip()));
                prop_assert!(!OWN_PORTS.contains(&found.address.port()) && found.address.port() != 0);
            }
        }
    }

    /// Any text is safe.
    #[test]
    fn any_text(authority in ".{0,64}") {
        let _ = target(&world(), &cart(), cart().addresses[0], &authority);
    }
}
