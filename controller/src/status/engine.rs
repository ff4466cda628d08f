//! What is to be written next, and when: a state machine without a clock and without a client.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::backoff::{Backoff, Bounds};
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::settle::{Body, Context, There, gist, settle};
use super::{Contribution, Desired, StatusKind, Target};

/// After a write that failed, and after each that follows.
const FAILED: Bounds = Bounds::doubling(Duration::from_secs(1), Duration::from_secs(300));
/// Between what was put back once and the next time; doubled each time.
pub(super) const PUT_BACK: Duration = Duration::from_secs(60);
/// The longest of these, and how long it must be quiet until all is forgotten.
const CALM: Duration = Duration::from_secs(3_600);
/// The object is another than the one that was looked at: what it is now comes by the watch.
const STALE: Duration = Duration::from_secs(1);

/// An object, as far as its status is concerned.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Object {
    pub uid: String,
    pub generation: Option<i64>,
    pub version: String,
    /// Null if there is none.
    pub status: Value,
    /// By field manager of one of the contributors: what of the status is its.
    pub owned: BTreeMap<&'static str, Value>,
    /// Its conditions are one value to the API server, as in kinds whose definition does not say by what they are told apart.
    pub whole: bool,
}

/// `(namespace, name)`.
pub(super) type Name = (String, String);

/// What is known of a kind.
#[derive(Clone, Debug)]
pub(super) enum Said {
    /// It is served in this version; a list follows.
    Served(&'static str),
    /// It is not, or not any more.
    Gone,
    /// A list begins.
    Init,
    /// One of the list.
    Listed(Name, Box<Object>),
    /// The list is whole: what it did not have is gone.
    Done,
    /// An object is there, or is another.
    Applied(Name, Box<Object>),
    /// An object is gone.
    Deleted(Name),
}

/// A write.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Write {
    pub target: Target,
    /// Index of the contributor.
    pub by: usize,
    pub manager: &'static str,
    /// Version of the API.
    pub version: &'static str,
    pub uid: String,
    /// Only if the object is still at this version.
    pub at: Option<String>,
    /// Even if the fields are another's.
    pub force: bool,
    /// What stood there was written before and changed by somebody.
    pub puts_back: bool,
    pub body: Body,
}

/// What became of a write.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// It is there, and the object is this now.
    Written(Box<Object>),
    /// The fields are somebody else's, in words.
    Taken(String),
    /// The object is another, or at another version, than was looked at.
    Stale,
    /// It was refused, or there was no answer, in words.
    Failed(String),
}

/// The state.
pub(super) struct Engine {
    contributors: Vec<Contributor>,
    kinds: BTreeMap<StatusKind, Kind>,
    tries: BTreeMap<(Target, usize), Tries>,
    /// To be looked at now.
    ready: BTreeSet<(Target, usize)>,
    /// To be looked at later; the same is in `tries`.
    later: BTreeSet<(Instant, Target, usize)>,
    random: fastrand::Rng,
}

struct Contributor {
    manager: &'static str,
    controller: Option<&'static str>,
    kinds: &'static [StatusKind],
    every: BTreeMap<StatusKind, Map<String, Value>>,
    desired: Option<Arc<Desired>>,
}

#[derive(Default)]
struct Kind {
    version: Option<&'static str>,
    listed: bool,
    staged: Option<BTreeMap<Name, Object>>,
    objects: BTreeMap<Name, Object>,
}

#[derive(Default)]
struct Tries {
    later: Option<Instant>,
    failed: Option<Backoff>,
    /// What was written last, without its times.
    written: Option<u64>,
    force: bool,
    /// How often it was put back, the last time when.
    put_back: u32,
    last: Option<Instant>,
}

impl Engine {
    /// A state that knows nothing yet, for these contributors; a [`Write::by`] counts them.
    pub fn new(contributions: &[Contribution], random: fastrand::Rng) -> Self {
        let contributor = |it: &Contribution| Contributor {
            manager: it.manager,
            controller: it.controller,
            kinds: it.kinds,
            every: it.every.clone(),
            desired: None,
        };
        Self {
            contributors: contributions.iter().map(contributor).collect(),
            kinds: BTreeMap::new(),
            tries: BTreeMap::new(),
            ready: BTreeSet::new(),
            later: BTreeSet::new(),
            random,
        }
    }

    /// Every kind that some contributor writes to.
    pub fn kinds(&self) -> BTreeSet<StatusKind> {
        self.contributors.iter().flat_map(|it| it.kinds).copied().collect()
    }

    /// A contributor wants this now.
    pub fn wants(&mut self, by: usize, desired: Arc<Desired>) {
        let before = self.contributors[by].desired.replace(Arc::clone(&desired));
        match before {
            None => {
                for kind in self.contributors[by].kinds {
                    self.look_at_all(*kind);
                }
            }
            Some(before) => {
                let gone = before.keys().filter(|target| !desired.contains_key(*target));
                let other = desired.iter().filter(|(target, wanted)| before.get(*target) != Some(wanted));
                let differ: Vec<Target> = gone.chain(other.map(|(target, _)| target)).cloned().collect();
                for target in differ {
                    // Something else is wanted: what failed before says nothing of it.
                    let which = (target, by);
                    self.unwait(&which);
                    if let Some(tries) = self.tries.get_mut(&which) {
                        tries.failed = None;
                    }
                    self.ready.insert(which);
                }
            }
        }
    }

    /// A watch says this of a kind.
    pub fn seen(&mut self, of: StatusKind, said: Said) {
        let kind = self.kinds.entry(of).or_default();
        match said {
            Said::Served(version) => kind.version = Some(version),
            Said::Gone => *kind = Kind::default(),
            Said::Init => kind.staged = Some(BTreeMap::new()),
            Said::Listed(name, object) => {
                kind.staged.get_or_insert_default().insert(name, *object);
            }
            Said::Done => {
                let before = std::mem::replace(&mut kind.objects, kind.staged.take().unwrap_or_default());
                for (name, known) in before {
                    // A list may be of a cache that has not seen our own writes yet.
                    if let Some(object) = kind.objects.get_mut(&name).filter(|it| older(it, &known)) {
                        *object = known;
                    }
                }
                kind.listed = true;
                self.look_at_all(of);
            }
            Said::Applied((namespace, name), object) => self.put(Target::new(of, namespace, name), *object),
            Said::Deleted(name) => {
                kind.objects.remove(&name);
                for by in 0..self.contributors.len() {
                    self.forget(&(Target::new(of, name.0.clone(), name.1.clone()), by));
                }
            }
        }
    }

    /// What is to be written now, if anything is. It may be asked again only after [`Engine::done`].
    pub fn next(&mut self, now: Instant, wall: &str) -> Option<Write> {
        while let Some((at, ..)) = self.later.first()
            && *at <= now
            && let Some((_, target, by)) = self.later.pop_first()
        {
            self.ready.insert((target, by));
        }
        while let Some(which) = self.ready.pop_first() {
            if let Some(write) = self.look_at(which, now, wall) {
                return Some(write);
            }
        }
        None
    }

    /// Whether there is something to look at now.
    pub fn ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// When there may be more to write; `None` if only news can bring that.
    pub fn next_at(&self) -> Option<Instant> {
        self.later.first().map(|(at, ..)| *at)
    }

    /// How many objects wait to be looked at or tried again.
    pub fn waiting(&self) -> usize {
        self.ready.len() + self.later.len()
    }

    /// A write has come to an end.
    pub fn done(&mut self, write: &Write, outcome: Outcome, now: Instant) {
        let which = (write.target.clone(), write.by);
        let tries = self.tries.entry(which.clone()).or_default();
        let delay = match outcome {
            Outcome::Written(object) => {
                tries.failed = None;
                tries.force = false;
                tries.written = Some(hash(&write.body));
                self.put(write.target.clone(), *object);
                return;
            }
            Outcome::Taken(_) => {
                tries.force = true;
                tries.put_back(now)
            }
            Outcome::Stale => STALE,
            Outcome::Failed(_) => {
                let random = &mut self.random;
                tries.failed.get_or_insert_with(|| Backoff::new(FAILED, random.fork())).next_delay()
            }
        };
        self.wait(which, now + delay);
    }

    fn look_at(&mut self, which: (Target, usize), now: Instant, wall: &str) -> Option<Write> {
        let (target, by) = &which;
        let contributor = &self.contributors[*by];
        let desired = contributor.desired.as_ref()?;
        let kind = self.kinds.get(&target.kind)?;
        let (true, Some(version)) = (kind.listed, kind.version) else { return None };
        let name = (target.namespace.clone(), target.name.clone());
        let Some(object) = kind.objects.get(&name) else {
            self.forget(&which);
            return None;
        };
        let wanted = desired.get(target);
        let status = wanted.map(|it| &it.status).or_else(|| contributor.every.get(&target.kind));
        // Of another object of that name, or of what it was before: the contributor, or our watch, is behind.
        if let Some(wanted) = wanted
            && (!(wanted.uid.is_empty() || wanted.uid == object.uid)
                || wanted.generation.is_some() && wanted.generation != object.generation)
        {
            return None;
        }
        let context =
            Context { controller: contributor.controller, generation: object.generation, now: wall };
        let owned = object.owned.get(contributor.manager).unwrap_or(&Value::Null);
        let there = There { status: &object.status, owned, whole: object.whole };
        let Some(body) = settle(status, there, context) else {
            self.rest(&which);
            return None;
        };
        let mut write = Write {
            target: target.clone(),
            by: *by,
            manager: contributor.manager,
            version,
            uid: object.uid.clone(),
            at: body.shares.then(|| object.version.clone()),
            force: body.shares,
            puts_back: false,
            body,
        };
        let tries = self.tries.entry(which.clone()).or_default();
        if let Some(later) = tries.later.filter(|later| *later > now) {
            // News came while it waits: it goes on waiting.
            self.later.insert((later, which.0, which.1));
            return None;
        }
        tries.later = None;
        if tries.written.take_if(|written| *written == hash(&write.body)).is_some() {
            tries.force = true;
            let delay = tries.put_back(now);
            if !delay.is_zero() {
                self.wait(which, now + delay);
                return None;
            }
        }
        write.force |= tries.force;
        write.puts_back = tries.force;
        Some(write)
    }

    fn put(&mut self, target: Target, object: Object) {
        let kind = self.kinds.entry(target.kind).or_default();
        let name = (target.namespace.clone(), target.name.clone());
        // The answer to a write is newer than what the watch says of what was before.
        if kind.objects.get(&name).is_some_and(|known| older(&object, known)) {
            return;
        }
        kind.objects.insert(name, object);
        for by in 0..self.contributors.len() {
            if self.contributors[by].kinds.contains(&target.kind) {
                self.ready.insert((target.clone(), by));
            }
        }
    }

    fn look_at_all(&mut self, kind: StatusKind) {
        let Some(state) = self.kinds.get(&kind) else { return };
        for (by, contributor) in self.contributors.iter().enumerate() {
            if contributor.kinds.contains(&kind) {
                let all = state.objects.keys();
                self.ready.extend(
                    all.map(|(namespace, name)| (Target::new(kind, namespace.as_str(), name.as_str()), by)),
                );
            }
        }
    }

    fn wait(&mut self, which: (Target, usize), at: Instant) {
        self.unwait(&which);
        self.tries.entry(which.clone()).or_default().later = Some(at);
        self.later.insert((at, which.0, which.1));
    }

    fn unwait(&mut self, which: &(Target, usize)) {
        if let Some(at) = self.tries.get_mut(which).and_then(|tries| tries.later.take()) {
            self.later.remove(&(at, which.0.clone(), which.1));
        }
    }

    /// It is as it should be. That it was put back before is remembered.
    fn rest(&mut self, which: &(Target, usize)) {
        self.unwait(which);
        let Some(tries) = self.tries.get_mut(which) else { return };
        tries.failed = None;
        tries.force = false;
    }

    fn forget(&mut self, which: &(Target, usize)) {
        self.unwait(which);
        self.tries.remove(which);
        self.ready.remove(which);
    }
}

impl Tries {
    /// Somebody else wants it another way. How long to leave it to them before it is put back.
    fn put_back(&mut self, now: Instant) -> Duration {
        if self.last.is_some_and(|last| now.duration_since(last) > CALM) {
            self.put_back = 0;
        }
        let delay = match self.put_back {
            0 => Duration::ZERO,
            times => PUT_BACK.saturating_mul(1 << (times - 1).min(6)).min(CALM),
        };
        self.put_back = self.put_back.saturating_add(1);
        self.last = Some(now + delay);
        delay
    }
}

/// The API server's versions are numbers that rise (KEP-5504); of what is none nothing is known.
fn older(one: &Object, other: &Object) -> bool {
    let number = |object: &Object| object.version.parse::<u64>().ok();
    one.uid == other.uid && matches!((number(one), number(other)), (Some(one), Some(other)) if one < other)
}

fn hash(body: &Body) -> u64 {
    let mut hasher = DefaultHasher::new();
    gist(&body.status).to_string().hash(&mut hasher);
    hasher.finish()
}
