//! The server's state machine by itself, and against the client's: whatever happens between them, they converge.

use super::*;
use crate::gate::{Gate, Verdict};
use crate::state::{Delivery, DeltaClient, Rejection, Subscription};
use proptest::prelude::*;

const A: &str = "type.test/a";
const B: &str = "type.test/b";
const LIMITS: StreamLimits = StreamLimits { max_names: 3, push_bytes: 200 };

fn set(generation: u64, a: &[(&str, &str)], b: &[(&str, &str)]) -> Arc<ResourceSet> {
    let map = |pairs: &[(&str, &str)]| {
        let resource = |(name, version): &(&str, &str)| {
            (Arc::<str>::from(*name), Resource::new(*version, version.as_bytes().to_vec()))
        };
        Arc::new(pairs.iter().map(resource).collect::<ResourceMap>())
    };
    Arc::new(ResourceSet { generation, types: [(A.to_owned(), map(a)), (B.to_owned(), map(b))].into() })
}

fn subscribe(type_url: &str, names: &[&str], versions: &[(&str, &str)]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        resource_names_subscribe: names.iter().map(ToString::to_string).collect(),
        initial_resource_versions: versions.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

fn ack(response: &DeltaDiscoveryResponse) -> DeltaDiscoveryRequest {
    let (type_url, response_nonce) = (response.type_url.clone(), response.nonce.clone());
    DeltaDiscoveryRequest { type_url, response_nonce, ..DeltaDiscoveryRequest::default() }
}

/// Generation, names with versions, removed names.
fn brief(response: &DeltaDiscoveryResponse) -> (String, Vec<String>, Vec<String>) {
    let added = response.resources.iter().map(|resource| format!("{}={}", resource.name, resource.version));
    (response.system_version_info.clone(), added.collect(), response.removed_resources.clone())
}

fn expect(response: Option<&DeltaDiscoveryResponse>, generation: &str, added: &[&str], removed: &[&str]) {
    let text = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(response.map(brief), Some((generation.to_owned(), text(added), text(removed))));
}

/// D13.
#[test]
fn sends_only_what_the_client_lacks() {
    let latest = set(4, &[("new", "1"), ("same", "1"), ("changed", "2"), ("unsure", "1")], &[]);
    let mut stream = StreamState::new(LIMITS, false, latest.clone());
    let versions = [("same", "1"), ("changed", "1"), ("gone", "1"), ("unsure", "")];
    stream.received(subscribe(A, &[], &versions)).unwrap();
    let response = stream.next(&latest, Instant::now());
    expect(response.as_ref(), "culvert/4", &["changed=2", "new=1", "unsure=1"], &["gone"]);
    assert_eq!(stream.next(&latest, Instant::now()), None);
}

/// As Istio's control plane does it: clients wait for a first response to know that they have everything.
#[test]
fn a_first_subscription_is_answered_even_if_nothing_is_lacking() {
    let latest = set(4, &[("x", "1")], &[]);
    let mut plain = StreamState::new(LIMITS, false, latest.clone());
    plain.received(subscribe(A, &[], &[("x", "1")])).unwrap();
    let first = plain.next(&latest, Instant::now());
    expect(first.as_ref(), "culvert/4", &[], &[]);
    plain.received(ack(&first.unwrap())).unwrap();
    assert_eq!(plain.status()[A].acked_generation, Some(4));
    // From then on what changes nothing for it is not told.
    let latest = set(5, &[("x", "1")], &[]);
    assert_eq!(plain.next(&latest, Instant::now()), None);
    assert_eq!(plain.status()[A].acked_generation, Some(5));

    plain.received(subscribe(B, &[], &[])).unwrap();
    let empty = plain.next(&latest, Instant::now());
    expect(empty.as_ref(), "culvert/5", &[], &[]);

    let mut asking = StreamState::new(LIMITS, true, latest.clone());
    asking.received(subscribe(A, &[], &[("x", "1")])).unwrap();
    expect(asking.next(&latest, Instant::now()).as_ref(), "culvert/5", &[], &[]);
}

/// D12.
#[test]
fn updates_during_flight_are_merged_and_types_move_together() {
    let first = set(1, &[("x", "1")], &[("p", "1")]);
    let mut stream = StreamState::new(LIMITS, true, first.clone());
    let now = Instant::now();
    stream.received(subscribe(A, &[], &[])).unwrap();
    stream.received(subscribe(B, &[], &[])).unwrap();
    let a = stream.next(&first, now).unwrap();
    let b = stream.next(&first, now).unwrap();
    expect(Some(&a), "culvert/1", &["x=1"], &[]);
    expect(Some(&b), "culvert/1", &["p=1"], &[]);

    let third = set(3, &[("y", "1")], &[("p", "1")]);
    assert_eq!(stream.next(&third, now), None);
    assert_eq!(stream.received(ack(&a)), Ok(Some(Answer::Acked)));
    assert_eq!(stream.next(&third, now), None, "the other type is not there yet");
    assert_eq!(stream.waiting_since(), Some(now));
    stream.received(ack(&b)).unwrap();
    expect(stream.next(&third, now).as_ref(), "culvert/3", &["y=1"], &["x"]);
    expect(stream.next(&third, now).as_ref(), "culvert/3", &[], &[]);
}

#[test]
fn a_refused_version_is_not_sent_again() {
    let first = set(1, &[("x", "1")], &[]);
    let mut stream = StreamState::new(LIMITS, false, first.clone());
    stream.received(subscribe(A, &[], &[])).unwrap();
    let response = stream.next(&first, Instant::now()).unwrap();
    let error = culvert_proto::discovery::Status { message: "no".to_owned(), ..Default::default() };
    let nack = DeltaDiscoveryRequest { error_detail: Some(error), ..ack(&response) };
    assert_eq!(stream.received(nack.clone()), Ok(Some(Answer::Nacked { message: "no".to_owned() })));
    assert_eq!(stream.received(nack), Ok(None), "the same answer again is stale");
    assert_eq!(stream.next(&first, Instant::now()), None);
    let second = set(2, &[("x", "1"), ("y", "1")], &[]);
    expect(stream.next(&second, Instant::now()).as_ref(), "culvert/2", &["y=1"], &[]);
    assert_eq!((stream.status()[A].nacked, stream.status()[A].last_nack.as_deref()), (1, Some("no")));
}

#[test]
fn large_pushes_are_split_and_marked() {
    let names: Vec<_> = (0..9).map(|index| format!("resource-{index}")).collect();
    let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), "1")).collect();
    let long = "x".repeat(500);
    let latest = set(5, &[&pairs[..], &[("z", long.as_str())]].concat(), &[]);
    let mut stream = StreamState::new(LIMITS, false, latest.clone());
    stream.received(subscribe(A, &[], &[("old", "1")])).unwrap();
    let mut seen = Vec::new();
    while let Some(response) = stream.next(&latest, Instant::now()) {
        assert!(
            response.resources.len() == 1 || prost::Message::encoded_len(&response) <= LIMITS.push_bytes + 60
        );
        assert_eq!(stream.next(&latest, Instant::now()), None, "one at a time");
        stream.received(ack(&response)).unwrap();
        seen.push(response);
    }
    assert!(seen.len() > 3);
    assert_eq!(seen.iter().map(|response| response.resources.len()).sum::<usize>(), 10);
    let (last, others) = seen.split_last().unwrap();
    assert!(others.iter().all(|response| response.system_version_info == "culvert/5+"));
    assert_eq!(
        (last.system_version_info.as_str(), &last.removed_resources[..]),
        ("culvert/5", &["old".to_owned()][..])
    );
    assert_eq!(stream.status()[A].acked_generation, Some(5));
}

/// D11.
#[test]
fn names_can_be_subscribed_one_by_one() {
    let first = set(1, &[("x", "1"), ("y", "1")], &[]);
    let mut stream = StreamState::new(LIMITS, false, first.clone());
    stream.received(subscribe(A, &["x", "none"], &[])).unwrap();
    let response = stream.next(&first, Instant::now()).unwrap();
    expect(Some(&response), "culvert/1", &["x=1"], &["none"]);
    stream
        .received(DeltaDiscoveryRequest { resource_names_subscribe: vec!["y".to_owned()], ..ack(&response) })
        .unwrap();
    let response = stream.next(&first, Instant::now()).unwrap();
    expect(Some(&response), "culvert/1", &["y=1"], &[]);
    stream
        .received(DeltaDiscoveryRequest {
            resource_names_unsubscribe: vec!["x".to_owned()],
            ..ack(&response)
        })
        .unwrap();
    let second = set(2, &[("none", "1"), ("x", "2"), ("other", "1")], &[]);
    expect(stream.next(&second, Instant::now()).as_ref(), "culvert/2", &["none=1"], &["y"]);
}

#[test]
fn bounds_end_the_stream() {
    let latest = set(1, &[], &[]);
    let mut stream = StreamState::new(LIMITS, false, latest.clone());
    assert_eq!(stream.received(DeltaDiscoveryRequest::default()), Err(Violation::NoType));
    assert_eq!(stream.received(subscribe(A, &["1", "2", "3", "4"], &[])), Err(Violation::TooManyNames(3)));
    for index in 0..MAX_TYPES {
        stream.received(subscribe(&format!("t{index}"), &[], &[])).unwrap();
    }
    assert_eq!(stream.received(subscribe("more", &[], &[])), Err(Violation::TooManyTypes));
}

fn borrow(pairs: &[(String, String)]) -> Vec<(&str, &str)> {
    pairs.iter().map(|(name, version)| (name.as_str(), version.as_str())).collect()
}

type Contents = BTreeMap<String, String>;

#[derive(Debug, Clone)]
enum Step {
    /// Publish: for each type, name to version; every version above 6 is refused by the client.
    Publish(BTreeMap<u8, u8>, BTreeMap<u8, u8>),
    /// Let one message of the server through.
    Serve,
    /// Let the client answer what it has, oldest first.
    Answer,
    Reconnect,
    /// The server starts again, with the same contents and generations from 1.
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let contents = || prop::collection::btree_map(0u8..8, 0u8..9, 0..8);
    let step = prop_oneof![
        3 => (contents(), contents()).prop_map(|(a, b)| Step::Publish(a, b)),
        6 => Just(Step::Serve),
        6 => Just(Step::Answer),
        1 => Just(Step::Reconnect),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 0..80)
}

/// Both ends, and a client program that stages and commits by generation.
struct World {
    latest: Arc<ResourceSet>,
    server: StreamState,
    client: DeltaClient,
    gate: Gate,
    now: Instant,
    inbox: VecDeque<Delivery>,
    held: Vec<(Delivery, Vec<Rejection>)>,
    staged: BTreeMap<String, Contents>,
    committed: BTreeMap<String, Contents>,
}

impl World {
    fn new() -> Self {
        let wanted = [A, B].map(|type_url| Subscription { type_url: type_url.to_owned(), names: Vec::new() });
        let latest = set(1, &[], &[]);
        let empty: BTreeMap<_, _> = [A, B].map(|type_url| (type_url.to_owned(), Contents::new())).into();
        let mut world = Self {
            server: StreamState::new(LIMITS, true, latest.clone()),
            latest,
            client: DeltaClient::new(crate::node_with_generations("n"), wanted),
            gate: Gate::new([A, B]),
            now: Instant::now(),
            inbox: VecDeque::new(),
            held: Vec::new(),
            staged: empty.clone(),
            committed: empty,
        };
        world.connect();
        world
    }

    fn connect(&mut self) {
        self.server = StreamState::new(LIMITS, true, self.latest.clone());
        self.gate.connected();
        self.inbox.clear();
        self.held.clear();
        for request in self.client.connected() {
            self.server.received(request).unwrap();
        }
    }

    fn publish(&mut self, a: &BTreeMap<u8, u8>, b: &BTreeMap<u8, u8>) {
        let text = |map: &BTreeMap<u8, u8>| -> Vec<(String, String)> {
            map.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect()
        };
        let (a, b) = (text(a), text(b));
        self.latest = set(self.latest.generation + 1, &borrow(&a), &borrow(&b));
    }

    fn serve(&mut self) -> bool {
        let Some(response) = self.server.next(&self.latest, self.now) else { return false };
        let delivery = self.client.received(response).unwrap();
        self.inbox.push_back(delivery);
        true
    }

    fn answer(&mut self) -> bool {
        let Some(delivery) = self.inbox.pop_front() else { return false };
        let stage = self.staged.get_mut(&delivery.type_url).unwrap();
        let mut rejected = Vec::new();
        for resource in &delivery.added {
            if resource.version.parse::<u8>().unwrap() > 6 {
                rejected.push(Rejection { name: resource.name.to_string(), reason: "too high".to_owned() });
            } else {
                stage.insert(resource.name.to_string(), resource.version.clone());
            }
        }
        for name in &delivery.removed {
            stage.remove(name);
        }
        let verdict = self.gate.delivered(&delivery);
        let part = (delivery, rejected);
        match verdict {
            Verdict::Acknowledge => self.send_answer(part),
            Verdict::Hold => self.held.push(part),
            Verdict::Commit => {
                self.committed = self.staged.clone();
                for held in std::mem::take(&mut self.held).into_iter().chain([part]) {
                    self.send_answer(held);
                }
            }
        }
        true
    }

    fn send_answer(&mut self, (delivery, rejected): (Delivery, Vec<Rejection>)) {
        let request = self.client.answer(&delivery.type_url, &delivery.nonce, &rejected).unwrap();
        self.server.received(request).unwrap();
    }

    /// What the client should have for a type: the published resources, except those it refuses, of which it may have kept
    /// an older version.
    fn check(&self, type_url: &str) -> Result<(), TestCaseError> {
        let published = &self.latest.types[type_url];
        let has = &self.committed[type_url];
        for (name, resource) in published.iter() {
            if resource.version.parse::<u8>().unwrap() <= 6 {
                prop_assert_eq!(
                    has.get(&**name).map(String::as_str),
                    Some(&*resource.version),
                    "{} {}",
                    type_url,
                    name
                );
            }
        }
        prop_assert!(
            has.keys().all(|name| published.contains_key(name.as_str())),
            "{:?} over {:?}",
            has,
            published
        );
        // Of a name whose present version is refused, the client may have taken or dropped an older one in a delivery whose
        // answer was lost: then it is not known, but doubtful.
        let refused = |name: &str| published.get(name).is_some_and(|resource| *resource.version > *"6");
        let known = self.client.known(type_url).unwrap();
        let mut known: BTreeMap<_, _> =
            known.map(|(name, version)| (name.to_owned(), version.to_owned())).collect();
        let mut has = has.clone();
        known.retain(|name, _| !refused(name));
        has.retain(|name, _| !refused(name));
        prop_assert_eq!(known, has);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn client_and_server_converge(steps in steps()) {
        let mut world = World::new();
        for step in steps {
            match step {
                Step::Publish(a, b) => world.publish(&a, &b),
                Step::Serve => drop(world.serve()),
                Step::Answer => drop(world.answer()),
                Step::Reconnect => world.connect(),
                Step::Restart => {
                    world.latest = Arc::new(ResourceSet { generation: 1, types: world.latest.types.clone() });
                    world.connect();
                }
            }
        }
        let mut rounds = 0;
        while world.serve() || world.answer() {
            rounds += 1;
            prop_assert!(rounds < 500, "no end of messages");
        }
        prop_assert!(world.held.is_empty(), "nothing waits for a commit");
        world.check(A)?;
        world.check(B)?;
        for status in world.server.status().values() {
            prop_assert_eq!(status.acked_generation, Some(world.latest.generation));
        }
        // Once everything is there, a new connection transfers nothing but what was refused.
        world.connect();
        while let Some(response) = world.server.next(&world.latest, world.now) {
            prop_assert!(response.removed_resources.is_empty());
            for resource in &response.resources {
                prop_assert!(resource.version.parse::<u8>().unwrap() > 6, "{:?}", resource);
            }
            let delivery = world.client.received(response).unwrap();
            let answer = world.client.answer(&delivery.type_url, &delivery.nonce, &[]).unwrap();
            world.server.received(answer).unwrap();
        }
    }
}
