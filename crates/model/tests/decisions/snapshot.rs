//! Finding things, whatever came before (D21, Z74, Z75, Z101, R29, traps 16 and 17).

use std::collections::BTreeMap;
use std::net::IpAddr;

use culvert_model::Str;
use culvert_model::address::NetworkAddress;
use culvert_model::policy::{Action, Policy, PolicyScope};
use culvert_model::service::Service;
use culvert_model::snapshot::{Applicable, Change, Destination, Snapshot, SnapshotWriter, Update};
use culvert_model::wire::AddressResource;
use culvert_model::workload::{Health, NetworkMode, Workload};
use proptest::prelude::*;

use crate::world::{World, address, key, policy, policy_key, prefix, serve, service, workload};

fn put(workload: Workload) -> Update {
    Update { addresses: vec![AddressResource::Workload(workload)], ..Update::default() }
}

fn remove(name: &str) -> Update {
    Update { removed_addresses: vec![name.into()], ..Update::default() }
}

fn at(snapshot: &Snapshot, text: &str) -> Option<String> {
    snapshot.workload_by_address(&address(text)).map(|w| w.name.to_string())
}

/// U15: an address passes from one pod to the next, whichever event comes first.
#[test]
fn an_address_is_given_to_another_pod() {
    let (old, new) = (workload("a", "old", &["10.0.0.1"]), workload("a", "new", &["10.0.0.1"]));
    let mut writer = SnapshotWriter::new();
    writer.apply(put(old.clone()));
    writer.apply(put(new.clone()));
    assert_eq!(at(writer.snapshot(), "10.0.0.1").unwrap(), "new");
    let ending = Workload { health: Health::Unhealthy, ..old.clone() };
    writer.apply(put(ending));
    assert_eq!(at(writer.snapshot(), "10.0.0.1").unwrap(), "new", "news of the old pod is no new claim");
    writer.apply(remove(&old.uid));
    assert_eq!(at(writer.snapshot(), "10.0.0.1").unwrap(), "new");

    let mut writer = SnapshotWriter::new();
    writer.apply(put(old.clone()));
    writer.apply(remove(&old.uid));
    assert_eq!(at(writer.snapshot(), "10.0.0.1"), None);
    writer.apply(put(new.clone()));
    assert_eq!(at(writer.snapshot(), "10.0.0.1").unwrap(), "new");

    let mut writer = SnapshotWriter::new();
    let ending = Workload { health: Health::Unhealthy, ..old };
    for order in [[&new, &ending], [&ending, &new]] {
        let addresses = order.into_iter().cloned().map(AddressResource::Workload).collect();
        let snapshot = writer.apply(Update { addresses, ..Update::default() }).snapshot;
        assert_eq!(at(&snapshot, "10.0.0.1").unwrap(), "new", "of one update the healthy one has it");
        writer = SnapshotWriter::new();
    }
}

/// What the whole holds can be walked, as the dump of the admin page does, and says which generation it is.
#[test]
fn everything_can_be_listed() {
    let mut writer = SnapshotWriter::new();
    let update = Update {
        addresses: vec![
            AddressResource::Workload(workload("a", "one", &[])),
            AddressResource::Workload(workload("a", "two", &[])),
            AddressResource::Service(service("a/s.a.svc.cluster.local", &[])),
        ],
        policies: vec![policy("a/p", PolicyScope::Namespace, Action::Deny, Vec::new())],
        generation: 7,
        ..Update::default()
    };
    let snapshot = writer.apply(update).snapshot;
    let mut names: Vec<_> = snapshot.workloads().map(|it| it.name.to_string()).collect();
    names.sort();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(snapshot.services().map(|it| it.name.to_string()).collect::<Vec<_>>(), ["s"]);
    assert_eq!(snapshot.policies().map(|it| it.key.to_string()).collect::<Vec<_>>(), ["a/p"]);
    assert_eq!((snapshot.sizes(), snapshot.generation()), ((2, 1, 1), 7));
}

/// A pod that changes its address is no longer found at the old one.
#[test]
fn a_pod_moves() {
    let mut writer = SnapshotWriter::new();
    writer.apply(put(workload("a", "w", &["10.0.0.1", "fd00::1"])));
    writer.apply(put(workload("a", "w", &["10.0.0.2", "fd00::1"])));
    let snapshot = writer.snapshot();
    assert_eq!(at(snapshot, "10.0.0.1"), None);
    assert_eq!(at(snapshot, "10.0.0.2").unwrap(), "w");
    assert_eq!(at(snapshot, "fd00::1").unwrap(), "w");
}

/// D21, trap 16: a host-network pod has its node's address and is not found by it, but is an endpoint.
#[test]
fn host_network_is_not_found_by_address() {
    let host = Workload {
        network_mode: NetworkMode::HostNetwork,
        ..serve(workload("a", "host", &["198.18.0.10"]), "a/s.a.svc.cluster.local", &[(80, 80)])
    };
    let uid = host.uid.clone();
    let snapshot = World::new().workload(host).snapshot();
    assert_eq!(at(&snapshot, "198.18.0.10"), None);
    assert!(snapshot.workload_by_uid(&uid).is_some());
    assert_eq!(snapshot.endpoints(&key("a/s.a.svc.cluster.local")).count(), 1);
}

/// Z101, trap 17: an endpoint may come before its service, and outlives it.
#[test]
fn endpoint_before_service() {
    let name = "a/s.a.svc.cluster.local";
    let mut writer = SnapshotWriter::new();
    writer.apply(put(serve(workload("a", "w", &["10.0.0.1"]), name, &[(80, 8080)])));
    let added = writer.apply(Update {
        addresses: vec![AddressResource::Service(service(name, &["10.96.0.1"]))],
        ..Update::default()
    });
    assert_eq!(added.changed.services, [(key(name), Change::Added)]);
    assert_eq!(writer.snapshot().endpoints(&key(name)).count(), 1);
    let removed = writer.apply(remove(name));
    assert_eq!(removed.changed.services, [(key(name), Change::Removed)]);
    assert!(writer.snapshot().service_by_key(&key(name)).is_none());
    assert!(writer.snapshot().service_by_address(&address("10.96.0.1"), "a").is_none());
    assert_eq!(writer.snapshot().endpoints(&key(name)).count(), 1);
}

/// Z74: the client's namespace, then the canonical one, then the first. Z75: what is hidden does not count.
#[test]
fn ranking_and_visibility() {
    let named = |ns: &str| service(&format!("{ns}/x.example.com"), &["10.96.0.1"]);
    let canonical = Service { canonical: true, ..named("c") };
    let hidden = Service { namespace_only: true, ..named("a") };
    let found = |snapshot: &Snapshot, from: &str| {
        let by_name =
            snapshot.service_by_hostname("x.example.com", from).map(|s| s.key.namespace.to_string());
        let by_address =
            snapshot.service_by_address(&address("10.96.0.1"), from).map(|s| s.key.namespace.to_string());
        assert_eq!(by_name, by_address);
        by_name
    };
    let world = || World::new().service(named("b")).service(hidden.clone());
    let snapshot = world().service(canonical).snapshot();
    assert_eq!(found(&snapshot, "a").unwrap(), "a");
    assert_eq!(found(&snapshot, "b").unwrap(), "b");
    assert_eq!(found(&snapshot, "z").unwrap(), "c");
    let snapshot = world().service(named("d")).snapshot();
    assert_eq!(found(&snapshot, "z").unwrap(), "b");
    let snapshot = World::new().service(hidden.clone()).snapshot();
    assert_eq!(found(&snapshot, "a").unwrap(), "a");
    assert_eq!(found(&snapshot, "z"), None);
}

/// R29, Z74: the longest block that holds a visible service; a pod inside a block stays a pod.
#[test]
fn blocks() {
    let hidden = Service { namespace_only: true, ..service("h/hidden.example.com", &["10.1.2.0/24"]) };
    let snapshot = World::new()
        .service(service("a/wide.example.com", &["10.0.0.0/8", "fd00::/16"]))
        .service(service("a/narrow.example.com", &["10.1.0.0/16"]))
        .service(hidden)
        .service(service("a/one.example.com", &["10.1.2.3"]))
        .workload(workload("a", "pod", &["10.1.9.9"]))
        .snapshot();
    for (ip, from, name) in [
        ("10.1.2.3", "a", Some("one")),
        ("10.1.2.4", "a", Some("narrow")),
        ("10.1.2.4", "h", Some("hidden")),
        ("10.2.0.1", "a", Some("wide")),
        ("fd00::1", "a", Some("wide")),
        ("fd01::1", "a", None),
        ("11.0.0.1", "a", None),
    ] {
        let found = snapshot.service_by_address(&address(ip), from);
        assert_eq!(found.map(|s| s.key.hostname.split('.').next().unwrap()), name, "{ip}");
    }
    let elsewhere = NetworkAddress { network: "other".into(), ..address("10.1.2.3") };
    assert!(snapshot.service_by_address(&elsewhere, "a").is_none());
    assert!(matches!(snapshot.destination(&address("10.1.9.9"), "a"), Destination::Workload(_)));
    assert!(matches!(snapshot.destination(&address("10.1.9.8"), "a"), Destination::Service(_)));
    assert!(matches!(snapshot.destination(&address("11.0.0.1"), "a"), Destination::Unknown));
}

/// Z64: global, then the namespace's, then those it names, with the ones that are missing.
#[test]
fn policies_of_a_workload() {
    let mut writer = SnapshotWriter::new();
    let update = |policies| Update { policies, ..Update::default() };
    let of = |name, scope| policy(name, scope, Action::Allow, vec![]);
    writer.apply(update(vec![
        of("root/g", PolicyScope::Global),
        of("a/n", PolicyScope::Namespace),
        of("b/n", PolicyScope::Namespace),
        of("a/named", PolicyScope::WorkloadSelector),
        of("a/other", PolicyScope::WorkloadSelector),
    ]));
    let mut server = workload("a", "w", &[]);
    server.authorization_policies = ["a/named", "a/missing"].iter().map(|n| Str::from(*n)).collect();
    let names = |snapshot: &Snapshot| -> Vec<String> {
        let name = |a: Applicable<'_>| match a {
            Applicable::Policy(policy) => policy.key.to_string(),
            Applicable::Missing(name) => format!("!{name}"),
        };
        snapshot.policies_for(&server).map(name).collect()
    };
    assert_eq!(names(writer.snapshot()), ["root/g", "a/n", "a/named", "!a/missing"]);
    // A policy that changes its scope leaves the old one.
    writer
        .apply(update(vec![of("root/g", PolicyScope::Namespace), of("a/n", PolicyScope::WorkloadSelector)]));
    assert_eq!(names(writer.snapshot()), ["a/named", "!a/missing"]);
    let removed = writer.apply(Update { removed_policies: vec!["a/named".into()], ..Update::default() });
    assert_eq!(removed.changed.policies, [(policy_key("a/named"), Change::Removed)]);
    assert_eq!(names(writer.snapshot()), ["!a/named", "!a/missing"]);
}

/// What is sent again as it was is no change; an old snapshot never changes.
#[test]
fn changes() {
    let mut writer = SnapshotWriter::new();
    let one = workload("a", "w", &["10.0.0.1"]);
    let uid = one.uid.clone();
    let first = writer.apply(Update { generation: 1, ..put(one.clone()) });
    assert_eq!(first.changed.workloads, [(uid.clone(), Change::Added)]);
    assert!(writer.apply(Update { generation: 2, ..put(one.clone()) }).changed.is_empty());
    let updated = writer.apply(put(Workload { health: Health::Unhealthy, ..one }));
    assert_eq!(updated.changed.workloads, [(uid.clone(), Change::Updated)]);
    assert!(writer.apply(remove("unknown")).changed.is_empty());
    assert_eq!(writer.apply(remove(&uid)).changed.workloads, [(uid, Change::Removed)]);
    assert_eq!((first.snapshot.generation(), at(&first.snapshot, "10.0.0.1").unwrap().as_str()), (1, "w"));
    assert_eq!(writer.snapshot().sizes(), (0, 0, 0));
}

#[derive(Clone, Debug)]
enum Op {
    Workload(Box<Workload>),
    Service(Box<Service>),
    Policy(Policy),
    RemoveWorkload(String),
    RemoveService(String),
    RemovePolicy(String),
}

const IPS: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd00::2"];
const BLOCKS: [&str; 6] = ["10.0.0.1", "10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "fd00::/64", "fd00::2"];
const SERVICES: [&str; 4] = ["a/s.com", "b/s.com", "a/t.com", "b/t.com"];
const NAMES: [&str; 4] = ["a/p", "a/q", "b/p", "b/q"];

fn some_of(all: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(all, 0..=all.len().min(3))
}

fn op() -> impl Strategy<Value = Op> {
    let pod = (
        prop::sample::select(&["x", "y", "z"][..]),
        some_of(&IPS),
        some_of(&SERVICES),
        prop::bool::weighted(0.2),
        prop::bool::ANY,
    );
    let pod = pod.prop_map(|(name, ips, services, host, healthy)| {
        let mut w = services.iter().fold(workload("a", name, &ips), |w, s| serve(w, s, &[(80, 80)]));
        w.network_mode = if host { NetworkMode::HostNetwork } else { NetworkMode::Standard };
        w.health = if healthy { Health::Healthy } else { Health::Unhealthy };
        Op::Workload(Box::new(w))
    });
    let svc = (prop::sample::select(&SERVICES[..]), some_of(&BLOCKS), prop::bool::ANY, prop::bool::ANY);
    let svc = svc.prop_map(|(name, blocks, canonical, namespace_only)| {
        Op::Service(Box::new(Service { canonical, namespace_only, ..service(name, &blocks) }))
    });
    let scopes = &[PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector][..];
    let pol = (prop::sample::select(&NAMES[..]), prop::sample::select(scopes));
    prop_oneof![
        4 => pod,
        3 => svc,
        2 => pol.prop_map(|(name, scope)| Op::Policy(policy(name, scope, Action::Deny, vec![]))),
        2 => "[xyz]".prop_map(|n| Op::RemoveWorkload(format!("Kubernetes//Pod/a/{n}"))),
        1 => prop::sample::select(&SERVICES[..]).prop_map(|n| Op::RemoveService(n.into())),
        1 => prop::sample::select(&NAMES[..]).prop_map(|n| Op::RemovePolicy(n.into())),
    ]
}

/// What there is in the end, found by looking at everything. Beside each workload's address: when it first had it without
/// giving it up since, for that decides who of two has it.
#[derive(Default)]
struct Naive {
    clock: usize,
    workloads: BTreeMap<String, Workload>,
    since: BTreeMap<(String, IpAddr), usize>,
    services: BTreeMap<String, Service>,
    policies: BTreeMap<String, Policy>,
}

impl Naive {
    fn apply(&mut self, op: &Op) {
        self.clock += 1;
        match op {
            Op::Workload(w) => {
                let has = |ip: &IpAddr| w.network_mode == NetworkMode::Standard && w.addresses.contains(ip);
                self.since.retain(|(uid, ip), _| **uid != *w.uid || has(ip));
                for ip in w.addresses.iter().filter(|ip| has(ip)) {
                    self.since.entry((w.uid.to_string(), *ip)).or_insert(self.clock);
                }
                self.workloads.insert(w.uid.to_string(), (**w).clone());
            }
            Op::RemoveWorkload(uid) => {
                self.since.retain(|(of, _), _| of != uid);
                self.workloads.remove(uid);
            }
            Op::Service(s) => drop(self.services.insert(s.key.to_string(), (**s).clone())),
            Op::RemoveService(name) => drop(self.services.remove(name)),
            Op::Policy(p) => drop(self.policies.insert(p.key.to_string(), p.clone())),
            Op::RemovePolicy(name) => drop(self.policies.remove(name)),
        }
    }

    fn at(&self, ip: &str) -> Option<&Workload> {
        let ip: IpAddr = ip.parse().unwrap();
        let claims = self.since.iter().filter(|((_, of), _)| *of == ip);
        let ((uid, _), _) = claims.max_by_key(|(_, since)| **since)?;
        self.workloads.get(uid)
    }

    fn service(&self, from: &str, fits: impl Fn(&Service) -> Option<u8>) -> Option<&Service> {
        let visible = self.services.values().filter(|s| !s.namespace_only || &*s.key.namespace == from);
        let ranked = visible.filter_map(|s| {
            let class = if &*s.key.namespace == from { 0 } else { 2 - u8::from(s.canonical) };
            Some(((255 - fits(s)?, class, s.key.clone()), s))
        });
        ranked.min_by_key(|(rank, _)| rank.clone()).map(|(_, s)| s)
    }
}

fn update_of(ops: &[Op]) -> Update {
    let mut update = Update::default();
    for op in ops {
        match op.clone() {
            Op::Workload(w) => update.addresses.push(AddressResource::Workload(*w)),
            Op::Service(s) => update.addresses.push(AddressResource::Service(*s)),
            Op::Policy(p) => update.policies.push(p),
            Op::RemoveWorkload(n) | Op::RemoveService(n) => update.removed_addresses.push(n.into()),
            Op::RemovePolicy(n) => update.removed_policies.push(n.into()),
        }
    }
    update
}

fn assert_same(snapshot: &Snapshot, naive: &Naive) {
    assert_eq!(snapshot.sizes(), (naive.workloads.len(), naive.services.len(), naive.policies.len()));
    for name in ["x", "y", "z"] {
        let uid = format!("Kubernetes//Pod/a/{name}");
        assert_eq!(snapshot.workload_by_uid(&uid).map(|w| &**w), naive.workloads.get(&uid));
    }
    for ip in IPS {
        assert_eq!(snapshot.workload_by_address(&address(ip)).map(|w| &**w), naive.at(ip), "{ip}");
        for from in ["a", "b", "c"] {
            let asked: IpAddr = ip.parse().unwrap();
            let fits = |s: &Service| {
                let around = s.addresses.iter().filter(|p| p.prefix.contains(&asked));
                around.map(|p| p.prefix.prefix_len()).max()
            };
            let found = snapshot.service_by_address(&address(ip), from).map(|s| &**s);
            assert_eq!(found, naive.service(from, fits), "{ip} from {from}");
        }
    }
    for name in SERVICES {
        let endpoints: Vec<_> = snapshot.endpoints(&key(name)).map(|w| (**w).clone()).collect();
        let expected = naive.workloads.values().filter(|w| w.services.contains_key(&key(name)));
        assert_eq!(endpoints, expected.cloned().collect::<Vec<_>>());
        assert_eq!(snapshot.service_by_key(&key(name)).map(|s| &**s), naive.services.get(name));
        for from in ["a", "b", "c"] {
            let host = &name[2..];
            let found = snapshot.service_by_hostname(host, from).map(|s| &**s);
            assert_eq!(found, naive.service(from, |s| (&*s.key.hostname == host).then_some(0)));
        }
    }
    let mut subject = workload("a", "subject", &[]);
    subject.authorization_policies.push("b/q".into());
    let applicable = snapshot.policies_for(&subject).map(|a| match a {
        Applicable::Policy(p) => p.key.to_string(),
        Applicable::Missing(name) => format!("!{name}"),
    });
    let mut applicable: Vec<_> = applicable.collect();
    applicable.sort();
    applicable.dedup();
    let applies = |p: &&Policy| {
        p.scope == PolicyScope::Global
            || p.scope == PolicyScope::Namespace && &*p.key.namespace == "a"
            || p.key.to_string() == "b/q"
    };
    let mut expected: Vec<_> = naive.policies.values().filter(applies).map(|p| p.key.to_string()).collect();
    if !naive.policies.contains_key("b/q") {
        expected.push("!b/q".into());
    }
    expected.sort();
    assert_eq!(applicable, expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Any sequence of updates gives the lookups of a naive model that holds only what there is in the end.
    #[test]
    fn any_history_gives_the_same_lookups(ops in prop::collection::vec(op(), 0..40)) {
        let mut writer = SnapshotWriter::new();
        let mut naive = Naive::default();
        for op in &ops {
            let before = writer.snapshot().clone();
            let applied = writer.apply(update_of(std::slice::from_ref(op)));
            prop_assert_eq!(applied.changed.is_empty(), same_resource(&before, &applied.snapshot, op));
            naive.apply(op);
        }
        assert_same(writer.snapshot(), &naive);
    }
}

fn same_resource(before: &Snapshot, after: &Snapshot, op: &Op) -> bool {
    match op {
        Op::Workload(w) => before.workload_by_uid(&w.uid) == after.workload_by_uid(&w.uid),
        Op::RemoveWorkload(uid) => before.workload_by_uid(uid) == after.workload_by_uid(uid),
        Op::Service(s) => before.service_by_key(&s.key) == after.service_by_key(&s.key),
        Op::RemoveService(n) => before.service_by_key(&key(n)) == after.service_by_key(&key(n)),
        Op::Policy(p) => before.policy(&p.key) == after.policy(&p.key),
        Op::RemovePolicy(n) => before.policy(&policy_key(n)) == after.policy(&policy_key(n)),
    }
}

/// A block written with host bits is stored without; the wire does so, and lookups rely on it.
#[test]
fn blocks_are_stored_truncated() {
    assert_eq!(prefix("10.0.0.0/8").prefix.trunc(), prefix("10.0.0.0/8").prefix);
}
