//! Z68-Z71: which of several endpoints.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use culvert_model::balance::{Candidate, Client, Observed, Place, Unobserved, pick};
use culvert_model::service::{LoadBalancing, LoadBalancingMode, Scope};
use culvert_model::snapshot::Endpoints;
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

/// What a proxy has seen, by workload name.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub load: HashMap<String, u32>,
    pub cooling: HashSet<String>,
}

impl Observed for Seen {
    fn load(&self, workload: &Workload) -> u32 {
        self.load.get(&*workload.name).copied().unwrap_or_default()
    }

    fn cooling(&self, workload: &Workload, _port: u16) -> bool {
        self.cooling.contains(&*workload.name)
    }
}

pub fn placed(name: &str, region: &str, zone: &str, capacity: u32) -> Arc<Workload> {
    let locality = Locality { region: Str2(region.into()), zone: Str2(zone.into()), ..Locality::default() };
    Arc::new(Workload { locality, capacity, ..workload("app", name, &["10.0.0.1"]) })
}

fn rule(mode: LoadBalancingMode, scopes: &[Scope]) -> LoadBalancing {
    LoadBalancing { mode, scopes: scopes.iter().copied().collect(), ..LoadBalancing::default() }
}

pub fn choose<'a>(
    all: &'a [Arc<Workload>],
    rule: &LoadBalancing,
    client: &Workload,
    seen: &dyn Observed,
    random: &mut dyn FnMut(u64) -> u64,
) -> Option<Candidate<'a>> {
    let client = Client { place: &Place::of(client), address: client.addresses[0] };
    pick(&Endpoints::from(all), &|_| Some(80), rule, &client, seen, random)
}

fn chosen(all: &[Arc<Workload>], rule: &LoadBalancing, client: &Workload, seen: &Seen) -> Vec<String> {
    let mut names: Vec<_> = (0..200)
        .filter_map(|seed| choose(all, rule, client, seen, &mut dice(seed * 7919)))
        .map(|found| found.workload.name.to_string())
        .collect();
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
        assert_eq!(chosen(&all, &rule(mode, scopes), client, &Seen::default()), names, "{mode:?} {scopes:?}");
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
            let rule = rule(LoadBalancingMode::Strict, &[tried]);
            let found = chosen(std::slice::from_ref(&other), &rule, &client, &Seen::default());
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
    let seen = Seen::default();
    assert_eq!(chosen(&all, &rule, &client, &seen), ["far"]);
    rule.allow_unhealthy = true;
    assert_eq!(chosen(&all, &rule, &client, &seen), ["near"]);
    assert!(chosen(&all[..1], &LoadBalancing::default(), &client, &seen).is_empty());
}

/// Z68: by capacity, and capacity 0 gets nothing.
#[test]
fn capacity() {
    let all = [placed("one", "", "", 1), placed("three", "", "", 3), placed("none", "", "", 0)];
    let client = placed("client", "", "", 1);
    let mut random = dice(1);
    let mut threes = 0;
    for _ in 0..4000 {
        let picked = choose(&all, &LoadBalancing::default(), &client, &Unobserved, &mut random).unwrap();
        assert_ne!(&*picked.workload.name, "none");
        threes += i32::from(&*picked.workload.name == "three");
    }
    assert!((2850..3150).contains(&threes), "{threes} of 4000, expected 3000");
    assert!(chosen(&all[2..], &LoadBalancing::default(), &client, &Seen::default()).is_empty());
}

/// Of two choices the less loaded for its capacity, where the two are never one and the same.
#[test]
fn load() {
    let client = placed("client", "", "", 1);
    let seen = |busy, idle| Seen {
        load: [("busy".to_owned(), busy), ("idle".to_owned(), idle)].into(),
        ..Seen::default()
    };
    let of = |capacity| [placed("busy", "", "", capacity), placed("idle", "", "", 1)];
    let rule = LoadBalancing::default();
    assert_eq!(chosen(&of(1), &rule, &client, &seen(1, 0)), ["idle"]);
    assert_eq!(chosen(&of(10), &rule, &client, &seen(11, 1)), ["idle"], "11 of 10 is more than 1 of 1");
    assert_eq!(chosen(&of(10), &rule, &client, &seen(9, 1)), ["busy"], "9 of 10 is less than 1 of 1");
    assert_eq!(chosen(&of(1), &rule, &client, &seen(5, 5)), ["busy", "idle"]);
}

/// Connections to one endpoint take twenty times as long: it gets a small part of its share, and the others the rest.
#[test]
fn load_moves_away_from_a_slow_endpoint() {
    let all: Vec<_> = (0..8).map(|i| placed(&i.to_string(), "", "", 1)).collect();
    let client = placed("client", "", "", 1);
    let share = |least_loaded: bool| {
        let mut random = dice(7);
        let mut seen = Seen::default();
        let mut ends: BTreeMap<u32, Vec<String>> = BTreeMap::new();
        let (mut slow, mut total) = (0_u32, 0_u32);
        for now in 0..2000 {
            for name in ends.remove(&now).unwrap_or_default() {
                *seen.load.get_mut(&name).unwrap() -= 1;
            }
            for _ in 0..4 {
                let observed: &dyn Observed = if least_loaded { &seen } else { &Unobserved };
                let picked = choose(&all, &LoadBalancing::default(), &client, observed, &mut random).unwrap();
                let name = picked.workload.name.to_string();
                slow += u32::from(name == "0");
                total += 1;
                *seen.load.entry(name.clone()).or_default() += 1;
                ends.entry(now + if name == "0" { 20 } else { 1 }).or_default().push(name);
            }
        }
        (slow * 1000 / total, seen.load["0"])
    };
    let (blind, _) = share(false);
    let (seeing, open) = share(true);
    assert!((100..150).contains(&blind), "{blind} per mille, expected 125");
    assert!(seeing < 40, "{seeing} per mille of the connections went to the slow endpoint");
    assert!(open <= 4, "{open} connections wait at the slow endpoint");
}

/// Z45 differs: what failed a moment ago is avoided, even for one that is placed worse, but never for nothing at all.
#[test]
fn cooling() {
    use LoadBalancingMode::{Any, Failover, Strict};
    let all = [placed("near", "r1", "", 1), placed("near2", "r1", "", 1), placed("far", "r2", "", 1)];
    let client = placed("client", "r1", "", 1);
    let seen = |names: &[&str]| Seen {
        cooling: names.iter().map(|name| (*name).to_owned()).collect(),
        ..Seen::default()
    };
    for (mode, cooling, expected) in [
        (Any, &["near"][..], &["far", "near2"][..]),
        (Any, &["near", "near2", "far"], &["far", "near", "near2"]),
        (Failover, &["near"], &["near2"]),
        (Failover, &["near", "near2"], &["far"]),
        (Failover, &["near", "near2", "far"], &["near", "near2"]),
        (Strict, &["near"], &["near2"]),
        (Strict, &["near", "near2"], &["near", "near2"]),
    ] {
        let found = chosen(&all, &rule(mode, &[Scope::Region]), &client, &seen(cooling));
        assert_eq!(found, expected, "{mode:?} {cooling:?}");
    }
}

/// A decision among 10,000 endpoints looks at no more of them than one among 100 (in a service without locality or affinity),
/// also where half of them are of no use.
#[test]
fn the_cost_of_a_choice_does_not_grow() {
    let client = placed("client", "", "", 1);
    let place = Place::of(&client);
    let client = Client { place: &place, address: client.addresses[0] };
    let looked_at = |total: usize, unhealthy: bool| {
        let all: Vec<_> = (0..total)
            .map(|i| {
                let mut one = (*placed(&format!("{i:05}"), "", "", 1)).clone();
                one.health = if unhealthy && i % 2 == 0 { Health::Unhealthy } else { Health::Healthy };
                Arc::new(one)
            })
            .collect();
        let looks = Cell::new(0_usize);
        let fit = |_: &Arc<Workload>| {
            looks.set(looks.get() + 1);
            Some(80)
        };
        let mut random = dice(3);
        let endpoints = Endpoints::from(&all[..]);
        for _ in 0..1000 {
            pick(&endpoints, &fit, &LoadBalancing::default(), &client, &Unobserved, &mut random).unwrap();
        }
        looks.get()
    };
    for unhealthy in [false, true] {
        let (few, many) = (looked_at(100, unhealthy), looked_at(10_000, unhealthy));
        assert!(few < 3000 && many < 3000, "{few} and {many} looks for 1000 choices");
    }
}

/// The rows as they are written: everyone's exact chance.
fn chances(
    all: &[Arc<Workload>],
    rule: &LoadBalancing,
    client: &Workload,
    seen: &Seen,
) -> BTreeMap<String, f64> {
    let able = |w: &&Arc<Workload>| w.capacity > 0 && (rule.allow_unhealthy || w.health == Health::Healthy);
    let cool = |w: &&Arc<Workload>| !seen.cooling.contains(&*w.name);
    let score = |w: &Arc<Workload>| match (
        w.locality.region == client.locality.region,
        w.locality.zone == client.locality.zone,
    ) {
        (true, true) => 2,
        (true, false) => 1,
        (false, _) => 0,
    };
    let best = |usable: Vec<Arc<Workload>>| -> Vec<Arc<Workload>> {
        let top = usable.iter().map(score).max().unwrap_or_default();
        let placed = |w: &Arc<Workload>| match rule.mode {
            LoadBalancingMode::Strict => score(w) == 2,
            LoadBalancingMode::Failover => score(w) == top,
            LoadBalancingMode::Any | LoadBalancingMode::Passthrough => true,
        };
        usable.into_iter().filter(placed).collect()
    };
    let mut group = best(all.iter().filter(able).filter(cool).cloned().collect());
    if group.is_empty() {
        group = best(all.iter().filter(able).cloned().collect());
    }
    let weight = |w: &Arc<Workload>| f64::from(w.capacity);
    let total: f64 = group.iter().map(weight).sum();
    let load = |w: &Arc<Workload>| f64::from(seen.load(w)) / weight(w);
    let mut chances = BTreeMap::new();
    for (i, first) in group.iter().enumerate() {
        let chance = weight(first) / total;
        if group.len() == 1 {
            chances.insert(first.name.to_string(), chance);
        }
        for (j, second) in group.iter().enumerate().filter(|(j, _)| *j != i) {
            let both = chance * weight(second) / (total - weight(first));
            // In whole numbers, lest rounding decide a tie.
            let lighter = u64::from(seen.load(second)) * u64::from(first.capacity)
                < u64::from(seen.load(first)) * u64::from(second.capacity);
            debug_assert!(!lighter || load(second) < load(first) + 1e-9);
            *chances.entry(group[if lighter { j } else { i }].name.to_string()).or_default() += both;
        }
    }
    chances
}

fn any_world(endpoints: std::ops::Range<usize>) -> impl Strategy<Value = (Vec<Arc<Workload>>, Seen)> {
    let one = (0_u8..2, 0_u8..2, prop::bool::weighted(0.8), 0_u32..4, 0_u32..4, prop::bool::weighted(0.2));
    prop::collection::vec(one, endpoints).prop_map(|all| {
        let mut seen = Seen::default();
        let mut workloads = Vec::new();
        for (i, (region, zone, healthy, capacity, load, cooling)) in all.into_iter().enumerate() {
            let name = format!("{i:03}");
            let mut one = (*placed(&name, &region.to_string(), &zone.to_string(), capacity)).clone();
            one.health = if healthy { Health::Healthy } else { Health::Unhealthy };
            workloads.push(Arc::new(one));
            seen.load.insert(name.clone(), load);
            if cooling {
                seen.cooling.insert(name);
            }
        }
        (workloads, seen)
    })
}

/// Draws many times, and compares how often each endpoint was chosen with its chance: no further than six standard deviations.
fn compare(
    (all, seen): &(Vec<Arc<Workload>>, Seen),
    rule: &LoadBalancing,
    seed: u64,
) -> Result<(), TestCaseError> {
    const DRAWS: u32 = 3000;
    let client = placed("client", "0", "0", 1);
    let expected = chances(all, rule, &client, seen);
    let mut random = dice(seed);
    let mut counted: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..DRAWS {
        match choose(all, rule, &client, seen, &mut random) {
            Some(found) => *counted.entry(found.workload.name.to_string()).or_default() += 1,
            None => {
                prop_assert!(expected.is_empty());
                return Ok(());
            }
        }
    }
    for name in counted.keys() {
        prop_assert!(expected.contains_key(name), "{name} may not be chosen");
    }
    for (name, chance) in expected {
        let mean = chance * f64::from(DRAWS);
        let spread = 6.0 * (mean * (1.0 - chance)).sqrt() + 1.0;
        let count = f64::from(counted.get(&name).copied().unwrap_or_default());
        prop_assert!((count - mean).abs() <= spread, "{name}: {count}, expected {mean:.1}");
    }
    Ok(())
}

fn any_rule() -> impl Strategy<Value = LoadBalancing> {
    use LoadBalancingMode::{Any, Failover, Strict};
    (prop::sample::select(&[Any, Strict, Failover][..]), any::<bool>()).prop_map(|(mode, allow_unhealthy)| {
        LoadBalancing { allow_unhealthy, ..rule(mode, &[Scope::Region, Scope::Zone]) }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Z68, Z69, Z70: whatever the endpoints, their loads and the service's rule, each is chosen as often as the rows say.
    #[test]
    fn chosen_as_often_as_specified(world in any_world(0..7), rule in any_rule(), seed: u64) {
        compare(&world, &rule, seed)?;
    }

    /// The same where endpoints are drawn and not walked.
    #[test]
    fn drawn_as_often_as_walked(world in any_world(17..50), seed: u64, allow_unhealthy: bool) {
        let rule = LoadBalancing { allow_unhealthy, ..LoadBalancing::default() };
        compare(&world, &rule, seed)?;
    }
}
