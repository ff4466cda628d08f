//! `sessionAffinity: ClientIP`: a client's connections go to one endpoint while that is there.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use culvert_model::balance::Unobserved;
use culvert_model::service::{Affinity, LoadBalancing, LoadBalancingMode, Scope};
use culvert_model::workload::{Health, Workload};

use crate::balance::{Seen, choose, dice, placed};

const CLIENTS: u32 = 2000;

fn keeping() -> LoadBalancing {
    LoadBalancing { affinity: Affinity::ClientAddress, ..LoadBalancing::default() }
}

fn client(number: u32) -> Workload {
    at(Ipv4Addr::from(0x6440_0000 + number).into())
}

fn at(address: IpAddr) -> Workload {
    Workload { addresses: [address].into_iter().collect(), ..(*placed("client", "r1", "", 1)).clone() }
}

fn endpoints(count: u32) -> Vec<Arc<Workload>> {
    (0..count).map(|i| placed(&format!("web-{i}"), "r1", "", 1)).collect()
}

fn of(all: &[Arc<Workload>], rule: &LoadBalancing, client: &Workload, seed: u64) -> String {
    choose(all, rule, client, &Unobserved, &mut dice(seed)).unwrap().workload.name.to_string()
}

/// Every proxy says the same: neither chance nor load nor the order of endpoints matters, only the address.
#[test]
fn one_client_one_endpoint() {
    let all = endpoints(7);
    let reversed: Vec<_> = all.iter().rev().cloned().collect();
    let loaded = Seen { load: [("web-3".to_owned(), 100)].into(), ..Seen::default() };
    for number in 0..100 {
        let client = client(number);
        let kept = of(&all, &keeping(), &client, 1);
        assert_eq!(of(&all, &keeping(), &client, 2), kept);
        assert_eq!(of(&reversed, &keeping(), &client, 3), kept);
        let busy = choose(&all, &keeping(), &client, &loaded, &mut dice(4)).unwrap();
        assert_eq!(*busy.workload.name, *kept);
        let IpAddr::V4(v4) = client.addresses[0] else { panic!() };
        assert_eq!(of(&all, &keeping(), &at(v4.to_ipv6_mapped().into()), 5), kept);
    }
}

/// What goes moves its own clients only; what comes takes its share, and no other client moves.
#[test]
fn only_the_clients_of_what_changed_move() {
    let all = endpoints(8);
    let before: Vec<String> = (0..CLIENTS).map(|n| of(&all, &keeping(), &client(n), 1)).collect();
    let mut counts = std::collections::BTreeMap::<&str, u32>::new();
    for name in &before {
        *counts.entry(name).or_default() += 1;
    }
    // 250 each, give or take six standard deviations.
    assert!(counts.len() == 8 && counts.values().all(|n| (160..340).contains(n)), "{counts:?}");

    let fewer: Vec<_> = all.iter().filter(|w| &*w.name != "web-3").cloned().collect();
    let mut unready = all.clone();
    unready[3] = Arc::new(Workload { health: Health::Unhealthy, ..(*all[3]).clone() });
    let more: Vec<_> = all.iter().cloned().chain([placed("web-8", "r1", "", 1)]).collect();
    let mut came = 0;
    for (number, before) in (0..CLIENTS).zip(&before) {
        let client = client(number);
        let without = of(&fewer, &keeping(), &client, 1);
        assert_eq!(without == *before, before != "web-3");
        assert_eq!(of(&unready, &keeping(), &client, 1), without);
        let with = of(&more, &keeping(), &client, 1);
        assert!(with == *before || with == "web-8");
        came += u32::from(with == "web-8");
    }
    assert!((130..315).contains(&came), "{came} clients of {CLIENTS} went to the ninth");
}

/// Z68: clients are shared by capacity, and capacity 0 has none.
#[test]
fn by_capacity() {
    let all = [placed("one", "", "", 1), placed("three", "", "", 3), placed("none", "", "", 0)];
    let threes = (0..CLIENTS).filter(|n| of(&all, &keeping(), &client(*n), 1) == "three").count();
    assert!((1380..1620).contains(&threes), "{threes} of {CLIENTS}, expected 1500");
}

/// Z69: among the best-placed; and while its endpoint is cooling a client is with the next, the others where they were.
#[test]
fn within_the_best_group() {
    let mut all = endpoints(4);
    all.extend((4..8).map(|i| placed(&format!("web-{i}"), "r2", "", 1)));
    let rule = LoadBalancing {
        mode: LoadBalancingMode::Failover,
        scopes: [Scope::Region].into_iter().collect(),
        ..keeping()
    };
    let cooling = Seen { cooling: ["web-1".to_owned()].into(), ..Seen::default() };
    for number in 0..200 {
        let client = client(number);
        let kept = of(&all, &rule, &client, 1);
        assert_eq!(kept, of(&all[..4], &keeping(), &client, 1));
        let now = choose(&all, &rule, &client, &cooling, &mut dice(1)).unwrap().workload.name.to_string();
        assert_eq!(now == kept, kept != "web-1", "{kept} {now}");
        assert!(*now < *"web-4");
    }
}
