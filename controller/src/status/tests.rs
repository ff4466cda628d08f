//! The writer against an API server in memory that knows whose each field is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::engine::{Engine, Object, Outcome, PUT_BACK, Said, Write};
use super::settle::{Context, There, settle};
use super::{Condition, Desired, StatusKind, Target, Wanted, contribution, kinds};

const MANAGER: &str = "culvert-test";
const CONTROLLER: &str = "culvert.dev/mesh";
const KINDS: &[StatusKind] = &[kinds::AUTHORIZATION_POLICY, kinds::HTTP_ROUTE];

fn accepted(is: bool, message: &str) -> Condition {
    Condition::new("Accepted", is, if is { "Accepted" } else { "Invalid" }, message)
}

fn wanted(condition: Condition) -> Wanted {
    Wanted::of("u", Some(1)).condition(condition)
}

/// An object of an API server: server-side apply with conditions and listeners as maps, everything else as one value.
#[derive(Clone, Debug, Default)]
struct Stored {
    generation: i64,
    version: u64,
    status: Map<String, Value>,
    /// By manager, in the form of managed fields.
    owners: BTreeMap<&'static str, Value>,
}

impl Stored {
    fn object(&self) -> Object {
        let owned = self.owners.iter().filter(|(manager, _)| **manager == MANAGER);
        Object {
            uid: "u".to_owned(),
            generation: Some(self.generation),
            version: self.version.to_string(),
            status: if self.status.is_empty() { Value::Null } else { self.status.clone().into() },
            owned: owned.map(|(manager, fields)| (*manager, fields.clone())).collect(),
            whole: false,
        }
    }

    /// What `manager` says from now on; false if some of it is another's and says otherwise.
    fn apply(&mut self, manager: &'static str, body: &Map<String, Value>, force: bool) -> bool {
        let mut after = self.clone();
        let fields = owned_by(body);
        for (path, value) in leaves(body) {
            let held = after.owners.iter_mut().filter(|(who, _)| **who != manager);
            let others: Vec<_> = held.filter(|(_, theirs)| has(theirs, &path)).collect();
            if !others.is_empty() && leaf(&after.status, &path) != Some(&value) {
                if !force {
                    return false;
                }
                others.into_iter().for_each(|(_, theirs)| disown(theirs, &path));
            }
            put(&mut after.status, &path, value);
        }
        let before = after.owners.insert(manager, fields.clone()).unwrap_or_default();
        for path in paths(&before) {
            let others = after.owners.values().any(|theirs| has(theirs, &path));
            if !others {
                remove(&mut after.status, &path);
            }
        }
        if body.is_empty() {
            after.owners.remove(manager);
        }
        if after.status != self.status || after.owners != self.owners {
            after.version += 1;
        }
        *self = after;
        true
    }
}

/// `(field, type of a condition)`: as deep as this model's ownership goes.
type Path = (String, Option<String>);

fn leaves(body: &Map<String, Value>) -> Vec<(Path, Value)> {
    let of = |(name, value): (&String, &Value)| match value.as_array() {
        Some(items) if name == "conditions" => {
            let item =
                |item: &Value| ((name.clone(), item["type"].as_str().map(str::to_owned)), item.clone());
            items.iter().map(item).collect()
        }
        _ => vec![((name.clone(), None), value.clone())],
    };
    body.iter().flat_map(of).collect()
}

fn owned_by(body: &Map<String, Value>) -> Value {
    let mut fields = json!({});
    for ((name, of), _) in leaves(body) {
        let field = format!("f:{name}");
        match of {
            None => fields[field] = json!({}),
            Some(of) => fields[field][format!("k:{{\"type\":\"{of}\"}}")] = json!({ ".": {}, "f:type": {} }),
        }
    }
    fields
}

fn paths(fields: &Value) -> Vec<Path> {
    let mut paths = Vec::new();
    for (field, below) in fields.as_object().into_iter().flatten() {
        let name = field.trim_start_matches("f:").to_owned();
        let types = below.as_object().into_iter().flatten().filter_map(|(key, _)| key.strip_prefix("k:"));
        let types: Vec<Path> = types
            .filter_map(|key| serde_json::from_str::<Value>(key).ok()?["type"].as_str().map(str::to_owned))
            .map(|of| (name.clone(), Some(of)))
            .collect();
        if name == "conditions" { paths.extend(types) } else { paths.push((name, None)) }
    }
    paths
}

fn has(fields: &Value, path: &Path) -> bool {
    paths(fields).contains(path)
}

fn disown(fields: &mut Value, path: &Path) {
    let left: Map<String, Value> = Map::new();
    let mut kept = Value::Object(left);
    for (name, of) in paths(fields).into_iter().filter(|it| it != path) {
        match of {
            None => kept[format!("f:{name}")] = json!({}),
            Some(of) => kept[format!("f:{name}")][format!("k:{{\"type\":\"{of}\"}}")] = json!({ ".": {} }),
        }
    }
    *fields = kept;
}

fn leaf<'a>(status: &'a Map<String, Value>, (name, of): &Path) -> Option<&'a Value> {
    let value = status.get(name)?;
    match of {
        None => Some(value),
        Some(of) => value.as_array()?.iter().find(|item| item["type"] == **of),
    }
}

fn put(status: &mut Map<String, Value>, (name, of): &Path, value: Value) {
    match of {
        None => drop(status.insert(name.clone(), value)),
        Some(of) => {
            let list = status.entry(name.clone()).or_insert_with(|| json!([])).as_array_mut().unwrap();
            match list.iter_mut().find(|item| item["type"] == **of) {
                Some(item) => *item = value,
                None => list.push(value),
            }
        }
    }
}

fn remove(status: &mut Map<String, Value>, path: &Path) {
    let (name, of) = path;
    match (of, status.get_mut(name)) {
        (Some(of), Some(Value::Array(list))) => {
            list.retain(|item| item["type"] != **of);
            if list.is_empty() {
                status.remove(name);
            }
        }
        _ => drop(status.remove(name)),
    }
}

fn engine(seed: u64) -> Engine {
    let (_, contribution) = contribution(MANAGER, Some(CONTROLLER), KINDS);
    Engine::new(&[contribution], fastrand::Rng::with_seed(seed))
}

/// Engine, API server and a clock.
struct Rig {
    engine: Engine,
    stored: BTreeMap<Target, Stored>,
    now: Instant,
    second: u32,
    writes: Vec<Write>,
}

impl Rig {
    fn new() -> Self {
        let mut rig = Self {
            engine: engine(7),
            stored: BTreeMap::new(),
            now: Instant::now(),
            second: 0,
            writes: Vec::new(),
        };
        rig.list();
        rig
    }

    /// A watch begins, and lists what is.
    fn list(&mut self) {
        for kind in KINDS {
            self.engine.seen(*kind, Said::Served("v1"));
            self.engine.seen(*kind, Said::Init);
            for (target, stored) in self.stored.iter().filter(|(target, _)| target.kind == *kind) {
                let name = (target.namespace.clone(), target.name.clone());
                self.engine.seen(*kind, Said::Listed(name, Box::new(stored.object())));
            }
            self.engine.seen(*kind, Said::Done);
        }
    }

    /// Another leader, who knows nothing yet.
    fn restart(&mut self, desired: Option<&Desired>) {
        self.engine = engine(8);
        if let Some(desired) = desired {
            self.engine.wants(0, Arc::new(desired.clone()));
        }
        self.list();
    }

    fn store(&mut self, target: &Target, change: impl FnOnce(&mut Stored)) {
        let stored = self.stored.entry(target.clone()).or_default();
        change(stored);
        stored.version += 1;
        let name = (target.namespace.clone(), target.name.clone());
        self.engine.seen(target.kind, Said::Applied(name, Box::new(stored.object())));
    }

    fn delete(&mut self, target: &Target) {
        self.stored.remove(target);
        self.engine.seen(target.kind, Said::Deleted((target.namespace.clone(), target.name.clone())));
    }

    fn wants(&mut self, desired: &Desired) {
        self.engine.wants(0, Arc::new(desired.clone()));
    }

    /// Writes all that is to be written now. How many that was.
    fn settle(&mut self) -> usize {
        let before = self.writes.len();
        self.second += 1;
        let wall = format!("2026-01-01T00:00:{:02}Z", self.second % 60);
        while let Some(write) = self.engine.next(self.now, &wall) {
            assert!(self.writes.len() - before < 1_000, "it writes for ever: {write:?}");
            let outcome = match self.stored.get_mut(&write.target) {
                None => Outcome::Failed("not found".to_owned()),
                Some(stored) if write.at.as_ref().is_some_and(|at| *at != stored.version.to_string()) => {
                    Outcome::Stale
                }
                Some(stored) => {
                    if stored.apply(write.manager, &write.body.status, write.force) {
                        Outcome::Written(Box::new(stored.object()))
                    } else {
                        Outcome::Taken("another".to_owned())
                    }
                }
            };
            self.engine.done(&write, outcome, self.now);
            self.writes.push(write);
        }
        self.writes.len() - before
    }

    fn condition(&self, target: &Target, of: &str) -> Value {
        let path = ("conditions".to_owned(), Some(of.to_owned()));
        leaf(&self.stored[target].status, &path).cloned().unwrap_or_default()
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
    }
}

fn policy() -> Target {
    Target::new(kinds::AUTHORIZATION_POLICY, "shop", "only-web")
}

fn with(target: &Target, generation: i64) -> Rig {
    let mut rig = Rig::new();
    rig.store(target, |it| it.generation = generation);
    rig
}

/// D47: written once, with time and generation, and not again.
#[test]
fn what_is_there_already_is_not_written() {
    let target = policy();
    let mut rig = with(&target, 1);
    assert_eq!(rig.settle(), 0, "nothing is wanted yet");
    let desired = Desired::from([(target.clone(), wanted(accepted(true, "in force")))]);
    rig.wants(&desired);
    assert_eq!(rig.settle(), 1);
    let condition = rig.condition(&target, "Accepted");
    assert_eq!((&condition["status"], &condition["observedGeneration"]), (&json!("True"), &json!(1)));
    rig.wants(&desired);
    rig.list();
    assert_eq!(rig.settle(), 0, "the same again, and a list after a gap in the watch");
    rig.restart(Some(&desired));
    assert_eq!(rig.settle(), 0, "another leader");
    assert_eq!(rig.condition(&target, "Accepted"), condition);
}

/// D47.
#[test]
fn a_conditions_time_is_that_of_its_last_change() {
    let target = policy();
    let mut rig = with(&target, 1);
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "one pod")))]));
    rig.settle();
    let first = rig.condition(&target, "Accepted")["lastTransitionTime"].clone();
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "two pods")))]));
    assert_eq!(rig.settle(), 1);
    let second = rig.condition(&target, "Accepted");
    assert_eq!((&second["lastTransitionTime"], &second["message"]), (&first, &json!("two pods")));
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(false, "broken")))]));
    assert_eq!(rig.settle(), 1);
    assert_ne!(rig.condition(&target, "Accepted")["lastTransitionTime"], first);
}

#[test]
fn what_was_found_out_of_another_generation_or_object_waits() {
    let target = policy();
    let mut rig = with(&target, 2);
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "of generation 1")))]));
    assert_eq!(rig.settle(), 0, "the object is newer");
    let newer = Wanted { generation: Some(3), ..wanted(accepted(true, "of generation 3")) };
    rig.wants(&Desired::from([(target.clone(), newer)]));
    assert_eq!(rig.settle(), 0, "the watch is behind");
    rig.store(&target, |it| it.generation = 3);
    assert_eq!(rig.settle(), 1);
    assert_eq!(rig.condition(&target, "Accepted")["observedGeneration"], 3);
    let other = Wanted { uid: "v".to_owned(), ..wanted(accepted(false, "another object")) };
    rig.wants(&Desired::from([(target, other)]));
    assert_eq!(rig.settle(), 0);
}

#[test]
fn what_is_not_wanted_any_more_goes_also_after_a_restart_and_others_conditions_stay() {
    let target = policy();
    let mut rig = with(&target, 1);
    let other = json!([{ "type": "Other", "status": "True", "lastTransitionTime": "x" }]);
    rig.store(&target, |it| {
        it.apply("another", json!({ "conditions": other }).as_object().unwrap(), false);
    });
    let both = wanted(accepted(true, "")).condition(Condition::new("Enforced", true, "Enforced", ""));
    rig.wants(&Desired::from([(target.clone(), both)]));
    assert_eq!(rig.settle(), 1);
    rig.restart(Some(&Desired::from([(target.clone(), wanted(accepted(true, "")))])));
    assert_eq!(rig.settle(), 1);
    assert!(rig.condition(&target, "Enforced").is_null() && rig.condition(&target, "Accepted").is_object());
    rig.restart(None);
    assert_eq!(rig.settle(), 0, "a contributor that has not said anything yet takes nothing away");
    rig.wants(&Desired::new());
    assert_eq!(rig.settle(), 1);
    assert_eq!(Value::from(rig.stored[&target].status.clone()), json!({ "conditions": other }));
    assert_eq!(rig.settle(), 0);
}

/// D47: no two controllers write in turns.
#[test]
fn what_another_changes_is_put_back_once_and_then_ever_more_seldom() {
    let target = policy();
    let mut rig = with(&target, 1);
    let theirs = json!({ "conditions": [{ "type": "Accepted", "status": "False", "reason": "Theirs" }] });
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "ours")))]));
    rig.settle();
    let begun = rig.now;
    let mut put_back = Vec::new();
    while rig.now < begun + Duration::from_secs(2 * 3_600) {
        if rig.condition(&target, "Accepted")["status"] == "True" {
            rig.store(&target, |it| assert!(it.apply("another", theirs.as_object().unwrap(), true)));
        }
        if rig.settle() > 0 && rig.condition(&target, "Accepted")["status"] == "True" {
            put_back.push((rig.now - begun).as_secs() / 60);
        }
        rig.pass(Duration::from_secs(10));
    }
    assert_eq!(put_back[0], 0, "once at once: {put_back:?}");
    assert!(put_back.len() <= 9, "then ever more seldom: {put_back:?}");
    rig.pass(3 * Duration::from_secs(3_600));
    rig.settle();
    assert_eq!(rig.condition(&target, "Accepted")["status"], "True", "in the end it is as it should be");
    assert!(PUT_BACK >= Duration::from_secs(60));
}

#[test]
fn a_write_that_failed_is_tried_again_ever_later_and_something_else_at_once() {
    let target = policy();
    let mut rig = with(&target, 1);
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "")))]));
    let mut last = Duration::ZERO;
    for _ in 0..12 {
        let write = rig.engine.next(rig.now, "t").expect("a write");
        rig.engine.done(&write, Outcome::Failed("refused".to_owned()), rig.now);
        assert!(rig.engine.next(rig.now, "t").is_none(), "not at once");
        let at = rig.engine.next_at().unwrap();
        last = at - rig.now;
        rig.now = at;
    }
    assert!(last >= Duration::from_secs(150) && last <= Duration::from_secs(300), "{last:?}");
    let write = rig.engine.next(rig.now, "t").expect("a write");
    rig.engine.done(&write, Outcome::Failed("refused".to_owned()), rig.now);
    rig.wants(&Desired::from([(target, wanted(accepted(false, "")))]));
    assert_eq!(rig.settle(), 1);
}

#[test]
fn an_object_that_goes_is_forgotten() {
    let target = policy();
    let mut rig = with(&target, 1);
    rig.wants(&Desired::from([(target.clone(), wanted(accepted(true, "")))]));
    let write = rig.engine.next(rig.now, "t").expect("a write");
    rig.engine.done(&write, Outcome::Failed("no answer".to_owned()), rig.now);
    rig.delete(&target);
    assert_eq!((rig.engine.waiting(), rig.engine.next_at()), (0, None));
    rig.store(&target, |it| it.generation = 1);
    assert_eq!(rig.settle(), 1, "there is one again");
}

fn entry(controller: &str, name: &str, status: &str) -> Value {
    json!({
        "parentRef": { "name": name }, "controllerName": controller,
        "conditions": [{ "type": "Accepted", "status": status, "reason": "R", "message": "" }],
    })
}

/// Parents are one value to the API server, shared by controllers.
#[test]
fn entries_of_other_controllers_stay_as_they_are() {
    let target = Target::new(kinds::HTTP_ROUTE, "shop", "cart");
    let mut rig = with(&target, 1);
    let theirs = entry("example.com/other", "edge", "True");
    rig.store(&target, |it| drop(it.status.insert("parents".to_owned(), json!([theirs]))));
    let parents = |entries: &[Value]| Wanted::of("u", Some(1)).field("parents", json!(entries));
    let ours = entry(CONTROLLER, "cart", "True");
    rig.wants(&Desired::from([(target.clone(), parents(&[ours.clone(), entry(CONTROLLER, "b", "True")]))]));
    assert_eq!(rig.settle(), 1);
    let list = rig.stored[&target].status["parents"].as_array().unwrap().clone();
    assert_eq!((list.len(), &list[0]), (3, &theirs));
    assert_eq!(list[1]["conditions"][0]["observedGeneration"], 1);

    rig.wants(&Desired::from([(target.clone(), parents(&[entry(CONTROLLER, "cart", "False")]))]));
    assert_eq!(rig.settle(), 1);
    let list = rig.stored[&target].status["parents"].as_array().unwrap().clone();
    assert_eq!((list.len(), &list[0], &list[1]["conditions"][0]["status"]), (2, &theirs, &json!("False")));
    assert!(rig.writes.last().unwrap().at.is_some(), "only if nobody wrote meanwhile");

    rig.wants(&Desired::new());
    assert_eq!(rig.settle(), 1);
    assert_eq!(rig.stored[&target].status["parents"], json!([theirs]));
    assert_eq!(rig.settle(), 0);
    rig.restart(Some(&Desired::new()));
    assert_eq!(rig.settle(), 0);
}

#[test]
fn conditions_at_any_depth_get_time_and_generation() {
    let listener =
        json!({ "name": "mesh", "attachedRoutes": 0, "conditions": [accepted(true, "").to_json()] });
    let wanted = Wanted::of("u", Some(4)).field("listeners", json!([listener]));
    let there = json!({ "listeners": [
        { "name": "other", "conditions": [] },
        { "name": "mesh", "conditions": [{ "type": "Accepted", "status": "True", "lastTransitionTime": "then" }] },
    ] });
    let context = Context { controller: None, generation: Some(4), now: "now" };
    let body =
        settle(Some(&wanted.status), There { status: &there, owned: &Value::Null, whole: false }, context)
            .expect("a write");
    let condition = &body.status["listeners"][0]["conditions"][0];
    assert_eq!(
        (&condition["lastTransitionTime"], &condition["observedGeneration"]),
        (&json!("then"), &json!(4))
    );
    let there = json!(body.status);
    let owned = json!({ "f:listeners": { "k:{\"name\":\"mesh\"}": { ".": {}, "f:name": {}, "f:conditions": {
        "k:{\"type\":\"Accepted\"}": { ".": {}, "f:status": {} } } } } });
    assert_eq!(
        settle(Some(&wanted.status), There { status: &there, owned: &owned, whole: false }, context),
        None
    );
    let more = json!({ "f:listeners": { "k:{\"name\":\"gone\"}": {} } });
    assert!(
        settle(Some(&wanted.status), There { status: &there, owned: &more, whole: false }, context).is_some()
    );
}

/// Where the definition of a kind says nothing of keys, as Istio's own do, the list of conditions has one owner.
#[test]
fn conditions_of_others_stay_also_where_the_list_is_one_value() {
    let other = json!({ "type": "Other", "status": "True" });
    let there = json!({ "conditions": [other] });
    let context = Context { controller: None, generation: None, now: "now" };
    let wanted = wanted(accepted(true, "")).status;
    let there = There { status: &there, owned: &Value::Null, whole: true };
    let body = settle(Some(&wanted), there, context).expect("a write");
    assert!(body.shares, "refused if somebody writes in between");
    assert_eq!(body.status["conditions"][0], other);
    assert_eq!(body.status["conditions"][1]["type"], "Accepted");
    let after = json!(body.status);
    let owned = json!({ "f:conditions": {} });
    assert_eq!(settle(Some(&wanted), There { status: &after, owned: &owned, whole: true }, context), None);
}

#[test]
fn what_is_true_of_every_object_of_a_kind_is_written_to_each() {
    let (_, contribution) = contribution(MANAGER, None, KINDS);
    let contribution = contribution.every(kinds::AUTHORIZATION_POLICY, &accepted(false, "of every"));
    let mut rig = Rig::new();
    rig.engine = Engine::new(&[contribution], fastrand::Rng::with_seed(7));
    rig.list();
    let one = Target::new(kinds::AUTHORIZATION_POLICY, "shop", "other");
    rig.store(&one, |it| it.generation = 2);
    rig.store(&policy(), |it| it.generation = 1);
    rig.store(&Target::new(kinds::HTTP_ROUTE, "shop", "cart"), |it| it.generation = 1);
    rig.wants(&Desired::from([(policy(), wanted(accepted(true, "of this")))]));
    assert_eq!(rig.settle(), 2);
    assert_eq!(rig.condition(&one, "Accepted")["message"], "of every");
    assert_eq!(rig.condition(&policy(), "Accepted")["message"], "of this");
}

#[derive(Clone, Debug)]
enum Step {
    Want(usize, u8),
    Unwant(usize),
    Spec(usize),
    Delete(usize),
    Other(usize, bool),
    Restart,
    Relist,
    Settle,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (0..4_usize, 0..8_u8).prop_map(|(at, what)| Step::Want(at, what)),
        1 => (0..4_usize).prop_map(Step::Unwant),
        1 => (0..4_usize).prop_map(Step::Spec),
        1 => (0..4_usize).prop_map(Step::Delete),
        1 => (0..4_usize, any::<bool>()).prop_map(|(at, ours)| Step::Other(at, ours)),
        1 => Just(Step::Restart),
        1 => Just(Step::Relist),
        2 => Just(Step::Settle),
    ];
    proptest::collection::vec(step, 1..40)
}

/// Some of: two conditions, a scalar, an entry of a shared list.
fn some_of(what: u8, generation: i64) -> Wanted {
    let mut wanted = Wanted::of("u", Some(generation)).condition(accepted(what & 1 == 1, "m"));
    if what & 2 == 2 {
        wanted = wanted.condition(Condition::new("Enforced", true, "Enforced", "m"));
    }
    if what & 4 == 4 {
        wanted = wanted.field("parents", json!([entry(CONTROLLER, "cart", "True")]));
    }
    wanted
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// D47: whatever happens, in the end each object says what is wanted and nothing more of ours, others' entries are there, and
    /// going over all of it again writes nothing.
    #[test]
    fn it_settles_and_then_writes_nothing(steps in steps()) {
        let targets: Vec<Target> = (0..4)
            .map(|at| Target::new(KINDS[at % 2], "shop", format!("n{at}")))
            .collect();
        let theirs = entry("example.com/other", "edge", "True");
        let mut rig = Rig::new();
        let mut desired = Desired::new();
        for target in &targets {
            rig.store(target, |it| it.generation = 1);
        }
        for step in steps {
            match step {
                Step::Want(at, what) => {
                    let generation = rig.stored.get(&targets[at]).map_or(1, |it| it.generation);
                    desired.insert(targets[at].clone(), some_of(what, generation));
                    rig.wants(&desired);
                }
                Step::Unwant(at) => {
                    desired.remove(&targets[at]);
                    rig.wants(&desired);
                }
                Step::Spec(at) => {
                    rig.store(&targets[at], |it| it.generation += 1);
                    let generation = rig.stored[&targets[at]].generation;
                    if let Some(wanted) = desired.get_mut(&targets[at]) {
                        wanted.generation = Some(generation);
                    }
                    rig.wants(&desired);
                }
                Step::Delete(at) => rig.delete(&targets[at]),
                Step::Other(at, ours) => rig.store(&targets[at], |it| {
                    it.generation = it.generation.max(1);
                    let condition = if ours { "Accepted" } else { "Other" };
                    let body = json!({ "conditions": [{ "type": condition, "status": "Unknown" }] });
                    it.apply("another", body.as_object().unwrap(), true);
                    it.status.insert("parents".to_owned(), json!([theirs]));
                }),
                Step::Restart => rig.restart(Some(&desired)),
                Step::Relist => rig.list(),
                Step::Settle => drop(rig.settle()),
            }
        }
        for (target, stored) in &rig.stored {
            if let Some(wanted) = desired.get_mut(target) {
                wanted.generation = Some(stored.generation);
            }
        }
        rig.wants(&desired);
        for _ in 0..12 {
            rig.pass(Duration::from_secs(3_600));
            rig.settle();
        }
        rig.list();
        prop_assert_eq!(rig.settle(), 0);
        rig.restart(Some(&desired));
        prop_assert_eq!(rig.settle(), 0, "the next leader finds nothing to do");
        for (target, stored) in &rig.stored {
            let conditions = stored.status.get("conditions").and_then(Value::as_array).cloned().unwrap_or_default();
            let foreign = stored.owners.get("another").map(paths).unwrap_or_default();
            let wanted = desired.get(target);
            let types = |list: &Value| -> Vec<(String, String)> {
                let one = |it: &Value| (it["type"].to_string(), it["status"].to_string());
                list.as_array().into_iter().flatten().map(one).collect()
            };
            let mut ours = wanted.and_then(|it| it.status.get("conditions")).map(types).unwrap_or_default();
            let mut there = types(&json!(conditions));
            there.retain(|(of, _)| {
                ours.iter().any(|(other, _)| other == of)
                    || !foreign.iter().any(|(_, other)| other.as_ref().is_some_and(|it| format!("\"{it}\"") == *of))
            });
            ours.sort();
            there.sort();
            prop_assert_eq!(there, ours, "{:?}", target);
            let parents = stored.status.get("parents").and_then(Value::as_array).cloned().unwrap_or_default();
            let mine = parents.iter().filter(|it| it["controllerName"] == CONTROLLER).count();
            prop_assert_eq!(mine, usize::from(wanted.is_some_and(|it| it.status.contains_key("parents"))));
        }
    }
}
