//! Z68-Z71.

use std::sync::Arc;

use culvert_model::balance::{Candidate, Place, pick};
use culvert_model::service::{LoadBalancing, LoadBalancingMode, Scope};
use culvert_model::workload::{Health, Locality, Str2, Workload};
use proptest::prelude::*;

use crate::world::workload;

/// Numbers that look random and are the same each time.
pub fn dice(mut seed: u64) -> impl FnMut(u64) -> u64 {
    move |bound| {
        assert!(bound > 0);
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % bound
    }
}

fn placed(name: &str, region: &str, zone: &str, capacity: u32) -> Arc<Workload> {
    let locality = Locality { region: Str2(region.into()), zone: Str2(zone.into()), ..Locality::default() };
    Arc::new(Workload { locality, capacity, ..workload("app", name, &["10.0.0.1"]) })
}

fn rule(mode: LoadBalancingMode, scopes: &[Scope]) -> LoadBalancing {
    LoadBalancing { mode, scopes: scopes.iter().copied().collect(), allow_unhealthy: false }
}

fn choose(
    all: &[Arc<Workload>],
    rule: &LoadBalancing,
    client: &Workload,
    load: &dyn Fn(&Workload) -> u32,
    seed: u64,
) -> Option<String> {
    let candidates = all.iter().map(|workload| Candidate { workload, target_port: 80 });
    let picked = pick(candidates, rule, &Place::of(client), load, &mut dice(seed))?;
    Some(picked.workload.name.to_string())
}

fn chosen(all: &[Arc<Workload>], rule: &LoadBalancing, client: &Workload) -> Vec<String> {
    let mut names: Vec<_> =
        (0..200).filter_map(|seed| choose(all, rule, client, &|_| 0, seed * 7919)).collect();
    names.sort();
    names.dedup();
    names
}

/// Z69: every mode, with an endpoint near, one further and one far.
#[test]
fn modes() {
    use LoadBalancingMode::{Any, Failover, Passthrough, Strict};
    let all = [placed("near", "r1", "z1", 1), placed("region", "r1", "z2", 1), placed("far", "r2", "z3", 1)];
    let client = placed("client", "r1", "z1", 1);
    let elsewhere = placed("client", "r9", "z9", 1);
    let scopes = [Scope::Region, Scope::Zone];
    for (mode, scopes, client, names) in [
        (Any, &scopes[..], &client, vec!["far", "near", "region"]),
        (Passthrough, &scopes[..], &client, vec!["far", "near", "region"]),
        (Strict, &scopes[..], &client, vec!["near"]),
        (Strict, &scopes[..1], &client, vec!["near", "region"]),
        (Strict, &scopes[..], &elsewhere, vec![]),
        (Failover, &scopes[..], &client, vec!["near"]),
        (Failover, &scopes[..1], &client, vec!["near", "region"]),
        (Failover, &scopes[..], &elsewhere, vec!["far", "near", "region"]),
        (Strict, &[][..], &client, vec!["far", "near", "region"]),
    ] {
        assert_eq!(chosen(&all, &rule(mode, scopes), client), names, "{mode:?} {scopes:?}");
    }
}

/// Z69: each scope compares what it is named for.
#[test]
fn scopes() {
    let client = placed("client", "r", "z", 1);
    let change = |f: &dyn Fn(&mut Workload)| {
        let mut other = (*client).clone();
        f(&mut other);
        Arc::new(other)
    };
    for (scope, other) in [
        (Scope::Region, change(&|w| w.locality.region = Str2("x".into()))),
        (Scope::Zone, change(&|w| w.locality.zone = Str2("x".into()))),
        (Scope::Subzone, change(&|w| w.locality.subzone = Str2("x".into()))),
        (Scope::Node, change(&|w| w.node = "x".into())),
        (Scope::Cluster, change(&|w| w.cluster_id = "x".into())),
        (Scope::Network, change(&|w| w.network = "x".into())),
    ] {
        for tried in [Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network]
        {
            let found =
                chosen(std::slice::from_ref(&other), &rule(LoadBalancingMode::Strict, &[tried]), &client);
            assert_eq!(found.is_empty(), tried == scope, "{tried:?} against another {scope:?}");
        }
    }
}

/// Z69, Z70: an unhealthy endpoint gets nothing, even where it is the nearest, unless the service says so.
#[test]
fn health() {
    let mut near = (*placed("near", "r1", "z1", 1)).clone();
    near.health = Health::Unhealthy;
    let all = [Arc::new(near), placed("far", "r2", "z2", 1)];
    let client = placed("client", "r1", "z1", 1);
    let mut rule = rule(LoadBalancingMode::Failover, &[Scope::Region]);
    assert_eq!(chosen(&all, &rule, &client), ["far"]);
    rule.allow_unhealthy = true;
    assert_eq!(chosen(&all, &rule, &client), ["near"]);
    assert!(chosen(&all[..1], &LoadBalancing::default(), &client).is_empty());
}

/// Z68: by capacity, and capacity 0 gets nothing.
#[test]
fn capacity() {
    let all = [placed("one", "", "", 1), placed("three", "", "", 3), placed("none", "", "", 0)];
    let client = placed("client", "", "", 1);
    let mut random = dice(1);
    let mut threes = 0;
    for _ in 0..4000 {
        let candidates = all.iter().map(|workload| Candidate { workload, target_port: 80 });
        let picked =
            pick(candidates, &LoadBalancing::default(), &Place::of(&client), &|_| 0, &mut random).unwrap();
        assert_ne!(&*picked.workload.name, "none");
        threes += i32::from(&*picked.workload.name == "three");
    }
    assert!((2850..3150).contains(&threes), "{threes} of 4000, expected 3000");
    assert!(chosen(&all[2..], &LoadBalancing::default(), &client).is_empty());
}

/// Of two choices the less loaded for its capacity: with two endpoints the loaded one is left only when drawn twice.
#[test]
fn load() {
    let all = [placed("busy", "", "", 1), placed("idle", "", "", 1)];
    let client = placed("client", "", "", 1);
    let load = |w: &Workload| if &*w.name == "busy" { 10 } else { 0 };
    let mut random = dice(1);
    let mut busy = 0;
    for _ in 0..4000 {
        let candidates = all.iter().map(|workload| Candidate { workload, target_port: 80 });
        let picked =
            pick(candidates, &LoadBalancing::default(), &Place::of(&client), &load, &mut random).unwrap();
        busy += i32::from(&*picked.workload.name == "busy");
    }
    assert!((850..1150).contains(&busy), "{busy} of 4000, expected 1000");
}

proptest! {
    /// Z69, Z70: what is chosen is of the best-placed usable group, and nothing is chosen only if that is empty.
    #[test]
    fn chosen_is_of_the_best_group(
        places in prop::collection::vec((0_u8..3, 0_u8..3, prop::bool::ANY, 0_u32..3), 0..8),
        here in (0_u8..3, 0_u8..3),
        mode in prop_oneof![Just(LoadBalancingMode::Any), Just(LoadBalancingMode::Strict), Just(LoadBalancingMode::Failover)],
        seed: u64,
    ) {
        let all: Vec<_> = places.iter().enumerate().map(|(i, (r, z, healthy, capacity))| {
            let mut w = (*placed(&i.to_string(), &r.to_string(), &z.to_string(), *capacity)).clone();
            w.health = if *healthy { Health::Healthy } else { Health::Unhealthy };
            Arc::new(w)
        }).collect();
        let client = placed("client", &here.0.to_string(), &here.1.to_string(), 1);
        let score = |i: usize| match (places[i].0 == here.0, places[i].1 == here.1) {
            (true, true) => 2,
            (true, false) => 1,
            (false, _) => 0,
        };
        let usable: Vec<usize> = (0..places.len()).filter(|i| places[*i].2 && places[*i].3 > 0).collect();
        let group: Vec<usize> = match mode {
            LoadBalancingMode::Strict => usable.into_iter().filter(|i| score(*i) == 2).collect(),
            LoadBalancingMode::Failover => {
                let best = usable.iter().map(|i| score(*i)).max();
                usable.into_iter().filter(|i| Some(score(*i)) == best).collect()
            }
            _ => usable,
        };
        match choose(&all, &rule(mode, &[Scope::Region, Scope::Zone]), &client, &|_| 0, seed) {
            None => prop_assert!(group.is_empty()),
            Some(name) => prop_assert!(group.contains(&name.parse().unwrap())),
        }
    }
}
