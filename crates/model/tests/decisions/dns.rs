//! Z75, Z78-Z83, trap 13.

use culvert_model::dns::{DnsDecision, QueryFamily, lookup};
use culvert_model::service::{IpFamilies, Service};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::{Health, Workload};
use proptest::prelude::*;

use crate::balance::dice;
use crate::world::{World, prefix, serve, service, workload};
use QueryFamily::{V4, V6};

fn world() -> Snapshot {
    let headless = "shop/web.shop.svc.cluster.local";
    let other_network =
        culvert_model::address::NetworkPrefix { network: "other".into(), ..prefix("10.96.0.9") };
    let unready = Workload { health: Health::Unhealthy, ..workload("shop", "web-1", &["100.64.1.2"]) };
    let remote = Workload { network: "other".into(), ..workload("shop", "web-2", &["100.64.1.3"]) };
    World::new()
        .service(service("shop/cart.shop.svc.cluster.local", &["10.96.0.1", "fd00::1"]))
        .service(service("bank/vault.bank.svc.cluster.local", &["10.96.0.2"]))
        .service(Service {
            addresses: [prefix("10.96.0.3"), other_network].into_iter().collect(),
            ..service("shop/two.shop.svc.cluster.local", &[])
        })
        .service(service(headless, &[]))
        .workload(serve(workload("shop", "web-0", &["100.64.1.1", "fd00:64::1"]), headless, &[(80, 80)]))
        .workload(serve(unready, headless, &[(80, 80)]))
        .workload(serve(remote, headless, &[(80, 80)]))
        .service(service("shop/empty.shop.svc.cluster.local", &[]))
        .service(service("ext/api.example.com", &["240.0.0.1"]))
        .service(service("ext/*.example.com", &["240.0.0.2"]))
        .service(service("ext/*.wild.example.com", &["240.0.0.3"]))
        .service(service("ext/noaddress.example.org", &[]))
        .service(service("ext/block.example.org", &["10.200.0.0/16"]))
        .service(Service { namespace_only: true, ..service("bank/secret.example.org", &["240.0.0.4"]) })
        .snapshot()
}

fn ask(snapshot: &Snapshot, namespace: &str, name: &str, family: QueryFamily) -> DnsDecision {
    let client = workload(namespace, "client", &["100.64.9.9"]);
    lookup(snapshot, &client, "cluster.local", name, family, &mut dice(7))
}

fn answer(addresses: &[&str], canonical: Option<&str>) -> DnsDecision {
    DnsDecision::Answer {
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        canonical: canonical.map(str::to_owned),
    }
}

/// Each row one case.
#[test]
fn rows() {
    let snapshot = world();
    for (row, name, family, expected) in [
        ("Z80: a VIP", "cart.shop.svc.cluster.local", V4, answer(&["10.96.0.1"], None)),
        ("Z80: of the family asked for", "cart.shop.svc.cluster.local", V6, answer(&["fd00::1"], None)),
        ("any case, root's dot", "Cart.Shop.svc.Cluster.local.", V4, answer(&["10.96.0.1"], None)),
        ("Z82: NODATA", "vault.bank.svc.cluster.local", V6, DnsDecision::NoData),
        ("Z82: unknown", "nothing.shop.svc.cluster.local", V4, DnsDecision::Forward),
        ("Z82: unknown", "www.rust-lang.org", V4, DnsDecision::Forward),
        ("Z80: of the client's network", "two.shop.svc.cluster.local", V4, answer(&["10.96.0.3"], None)),
        ("Z80: headless, ready and near", "web.shop.svc.cluster.local", V4, answer(&["100.64.1.1"], None)),
        ("Z80: headless", "web.shop.svc.cluster.local", V6, answer(&["fd00:64::1"], None)),
        ("trap 13: headless without endpoints", "empty.shop.svc.cluster.local", V4, DnsDecision::NoData),
        ("Z80: one pod of a StatefulSet", "web-0.web.shop.svc.cluster.local", V4, DnsDecision::Forward),
        ("external with VIP", "api.example.com", V4, answer(&["240.0.0.1"], None)),
        (
            "Z78: search domain cut",
            "api.example.com.shop.svc.cluster.local",
            V4,
            answer(&["240.0.0.1"], Some("api.example.com")),
        ),
        (
            "Z78: search domain cut",
            "api.example.com.svc.cluster.local",
            V4,
            answer(&["240.0.0.1"], Some("api.example.com")),
        ),
        (
            "Z78: search domain cut",
            "api.example.com.cluster.local",
            V4,
            answer(&["240.0.0.1"], Some("api.example.com")),
        ),
        ("Z78: only the client's own", "api.example.com.bank.svc.cluster.local", V4, DnsDecision::Forward),
        ("Z79: exact before wildcard", "api.example.com", V4, answer(&["240.0.0.1"], None)),
        ("Z79: wildcard", "www.example.com", V4, answer(&["240.0.0.2"], None)),
        ("Z79: wildcard, several labels", "a.b.example.com", V4, answer(&["240.0.0.2"], None)),
        ("Z79: the closest wildcard", "a.wild.example.com", V4, answer(&["240.0.0.3"], None)),
        ("Z79: not the parent itself", "example.com", V4, DnsDecision::Forward),
        (
            "Z78, Z79",
            "www.example.com.shop.svc.cluster.local",
            V4,
            answer(&["240.0.0.2"], Some("www.example.com")),
        ),
        ("Z83: external without VIP", "noaddress.example.org", V4, DnsDecision::Forward),
        ("a block is no address", "block.example.org", V4, DnsDecision::Forward),
        ("Z75: hidden", "secret.example.org", V4, DnsDecision::Forward),
        ("nothing", "", V4, DnsDecision::Forward),
        ("nothing", ".", V4, DnsDecision::Forward),
        ("nothing", "cluster.local", V4, DnsDecision::Forward),
    ] {
        assert_eq!(ask(&snapshot, "shop", name, family), expected, "{row}: {name}");
    }
    assert_eq!(ask(&snapshot, "bank", "secret.example.org", V4), answer(&["240.0.0.4"], None), "Z75");
}

/// Z80: an endpoint that is not ready counts where the service says so; Z72: and a family it does not use is no answer.
#[test]
fn headless_options() {
    let name = "shop/web.shop.svc.cluster.local";
    let unready = Workload { health: Health::Unhealthy, ..workload("shop", "w", &["100.64.1.1", "fd00::1"]) };
    let mut all = Service { ip_families: IpFamilies::V6, ..service(name, &[]) };
    all.load_balancing.allow_unhealthy = true;
    let snapshot = World::new().service(all).workload(serve(unready, name, &[(80, 80)])).snapshot();
    assert_eq!(ask(&snapshot, "shop", &name[5..], V6), answer(&["fd00::1"], None));
    assert_eq!(ask(&snapshot, "shop", &name[5..], V4), DnsDecision::NoData);

    let ready = workload("shop", "w", &["100.64.1.1", "fd00::1"]);
    let v4 = Service { ip_families: IpFamilies::V4, ..service(name, &[]) };
    let snapshot = World::new().service(v4).workload(serve(ready, name, &[(80, 80)])).snapshot();
    assert_eq!(ask(&snapshot, "shop", &name[5..], V4), answer(&["100.64.1.1"], None));
    assert_eq!(ask(&snapshot, "shop", &name[5..], V6), DnsDecision::NoData);
}

/// Z81: of two addresses either may come first, each about as often.
#[test]
fn two_endpoints_take_turns() {
    let name = "shop/web.shop.svc.cluster.local";
    let two = ["100.64.0.1", "100.64.0.2"].map(|ip| serve(workload("shop", ip, &[ip]), name, &[(80, 80)]));
    let snapshot = two.into_iter().fold(World::new().service(service(name, &[])), World::workload).snapshot();
    let client = workload("shop", "client", &[]);
    let mut random = dice(5);
    let mut first = 0;
    for _ in 0..200 {
        let found = lookup(&snapshot, &client, "cluster.local", &name[5..], V4, &mut random);
        first += usize::from(found == answer(&["100.64.0.1", "100.64.0.2"], None));
    }
    assert!((60..140).contains(&first), "{first} of 200");
}

/// Z81: shuffled; and never more than a message can hold.
#[test]
fn many_endpoints() {
    let name = "shop/web.shop.svc.cluster.local";
    let mut world = World::new().service(service(name, &[]));
    for i in 0..1000 {
        let ip = format!("100.64.{}.{}", i / 250, i % 250);
        world = world.workload(serve(workload("shop", &format!("w{i}"), &[&ip]), name, &[(80, 80)]));
    }
    let snapshot = world.snapshot();
    let client = workload("shop", "client", &[]);
    let mut random = dice(3);
    let mut firsts = std::collections::HashSet::new();
    for _ in 0..20 {
        match lookup(&snapshot, &client, "cluster.local", &name[5..], V4, &mut random) {
            DnsDecision::Answer { addresses, .. } => {
                assert_eq!(addresses.len(), 256);
                firsts.insert(addresses[0]);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(firsts.len() > 10);
}

/// A service that cannot be answered does not hide one that can.
#[test]
fn the_answerable_one_is_taken() {
    let snapshot = World::new()
        .service(service("shop/x.example.com", &[]))
        .service(service("zoo/x.example.com", &["240.0.0.9"]))
        .snapshot();
    assert_eq!(ask(&snapshot, "shop", "x.example.com", V4), answer(&["240.0.0.9"], None));
}

proptest! {
    /// Any name of any bytes is decided, and what is answered is of the family asked for.
    #[test]
    fn any_name(name in ".{0,80}", labels in prop::collection::vec("\\*|[a-c]|svc|cluster|local|shop|web|example|com", 0..8), v6: bool) {
        let snapshot = world();
        let family = if v6 { V6 } else { V4 };
        for name in [name, labels.join(".")] {
            if let DnsDecision::Answer { addresses, canonical } = ask(&snapshot, "shop", &name, family) {
                prop_assert!(!addresses.is_empty() && addresses.iter().all(|a| a.is_ipv6() == v6));
                prop_assert!(canonical.is_none_or(|c| name.to_ascii_lowercase().starts_with(&c)));
            }
        }
    }
}
