//! The server's half of the delta protocol for one stream, without IO.
//!
//! The stream aims at one [`ResourceSet`] at a time, its target. Each type is driven to the target by responses of which one
//! is in flight, and once every type is there and answered, the newest set becomes the target; those published meanwhile
//! are skipped. What was sent counts as held whether it was acknowledged or refused, so a refused version is not sent again
//! until it changes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use culvert_proto::Any;
use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as WireResource};
use imbl::ordmap::DiffItem;
use tokio::time::Instant;

use crate::Generation;
use crate::resources::{Resource, ResourceMap, ResourceSet};

/// Types on one stream; the mesh has fewer than ten.
pub const MAX_TYPES: usize = 16;

/// Bounds of one stream's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamLimits {
    /// Names subscribed to, for each type. 10,000 names of 60 bytes are 1 MB with their versions.
    pub max_names: usize,
    /// Resources and names in one response, in bytes; a single larger resource goes alone. Below the 4 MiB that gRPC clients
    /// accept by default.
    pub push_bytes: usize,
}

/// The client asked for more than it may have. The stream ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// More types than exist.
    #[error("more than {MAX_TYPES} types on one stream")]
    TooManyTypes,
    /// More names than allowed.
    #[error("more than {0} names subscribed to")]
    TooManyNames(usize),
    /// A request that names no type.
    #[error("a request without a type URL")]
    NoType,
}

/// What a request answered, if it was an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The response in flight was accepted.
    Acked,
    /// It was refused, wholly or in part.
    Nacked {
        /// The client's explanation.
        message: String,
    },
}

/// What a stream has come to for one type.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct TypeStatus {
    /// The generation that the client has answered completely, or that changed nothing for it.
    pub acked_generation: Option<u64>,
    /// Responses sent.
    pub sent: u64,
    /// Responses refused.
    pub nacked: u64,
    /// The latest refusal.
    pub last_nack: Option<String>,
}

/// The state of one stream.
#[derive(Debug)]
pub struct StreamState {
    limits: StreamLimits,
    wants_generations: bool,
    target: Arc<ResourceSet>,
    types: BTreeMap<String, TypeState>,
    last_nonce: u64,
}

#[derive(Debug)]
struct TypeState {
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    /// Names asked for since the last plan: answered even if they do not exist.
    asked: BTreeSet<Arc<str>>,
    held: Held,
    /// To be compared with the target when the queue is empty.
    stale: bool,
    /// A response is due even if it is empty.
    must_answer: bool,
    queue: VecDeque<Part>,
    in_flight: Option<InFlight>,
    status: TypeStatus,
}

/// What the client holds, as far as this server told it or it told this server.
#[derive(Debug)]
enum Held {
    Versions(BTreeMap<Arc<str>, Arc<str>>),
    Snapshot(Arc<ResourceMap>),
}

#[derive(Debug, Default)]
struct Part {
    resources: Vec<(Arc<str>, Resource)>,
    removed: Vec<Arc<str>>,
    bytes: usize,
    generation: u64,
    last: bool,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    since: Instant,
    /// Set if this response completes a generation.
    completes: Option<u64>,
}

impl StreamState {
    /// A stream without subscriptions. `latest` is its first target.
    #[must_use]
    pub fn new(limits: StreamLimits, wants_generations: bool, latest: Arc<ResourceSet>) -> Self {
        Self { limits, wants_generations, target: latest, types: BTreeMap::new(), last_nonce: 0 }
    }

    /// Takes a request: a subscription, a change of one, an answer, or several of them at once. Answers with a nonce that is
    /// not in flight are stale and ignored.
    ///
    /// # Errors
    /// If a bound is exceeded.
    pub fn received(&mut self, request: DeltaDiscoveryRequest) -> Result<Option<Answer>, Violation> {
        if request.type_url.is_empty() {
            return Err(Violation::NoType);
        }
        let limits = self.limits;
        if let Some(state) = self.types.get_mut(&request.type_url) {
            let answer = state.answered(&request);
            state.resubscribe(
                request.resource_names_subscribe,
                request.resource_names_unsubscribe,
                limits,
            )?;
            return Ok(answer);
        }
        if self.types.len() >= MAX_TYPES {
            return Err(Violation::TooManyTypes);
        }
        let mut state = TypeState::new(request.initial_resource_versions);
        state.wildcard = request.resource_names_subscribe.is_empty();
        state.resubscribe(request.resource_names_subscribe, request.resource_names_unsubscribe, limits)?;
        self.types.insert(request.type_url, state);
        Ok(None)
    }

    /// The next response to send, if any may be sent now. Call it until there is none, after each request and each change of
    /// `latest`.
    pub fn next(&mut self, latest: &Arc<ResourceSet>, now: Instant) -> Option<DeltaDiscoveryResponse> {
        if !Arc::ptr_eq(&self.target, latest) && self.types.values().all(TypeState::is_idle) {
            self.target = latest.clone();
            self.types.values_mut().for_each(|state| state.stale = true);
        }
        for (type_url, state) in &mut self.types {
            if state.in_flight.is_some() {
                continue;
            }
            if state.stale && state.queue.is_empty() {
                state.plan(type_url, &self.target, self.limits.push_bytes, self.wants_generations);
            }
            let Some(part) = state.queue.pop_front() else { continue };
            self.last_nonce += 1;
            let nonce = self.last_nonce.to_string();
            let completes = part.last.then_some(part.generation);
            state.in_flight = Some(InFlight { nonce: nonce.clone(), since: now, completes });
            state.status.sent += 1;
            return Some(part.encode(type_url, nonce));
        }
        None
    }

    /// The generation that the client has completely, if nothing of it is on the way or to be sent.
    #[must_use]
    pub fn converged(&self) -> Option<u64> {
        let idle = !self.types.is_empty() && self.types.values().all(TypeState::is_idle);
        idle.then_some(self.target.generation)
    }

    /// When the response that has waited longest for its answer was sent.
    #[must_use]
    pub fn waiting_since(&self) -> Option<Instant> {
        self.types.values().filter_map(|state| state.in_flight.as_ref()).map(|flight| flight.since).min()
    }

    /// What each type has come to.
    #[must_use]
    pub fn status(&self) -> BTreeMap<String, TypeStatus> {
        self.types.iter().map(|(type_url, state)| (type_url.clone(), state.status.clone())).collect()
    }
}

impl TypeState {
    fn new(initial: impl IntoIterator<Item = (String, String)>) -> Self {
        let initial: BTreeMap<Arc<str>, Arc<str>> =
            initial.into_iter().map(|(name, version)| (name.into(), version.into())).collect();
        Self {
            wildcard: false,
            names: BTreeSet::new(),
            asked: BTreeSet::new(),
            // A client waits for a first response to know that it has everything, also where it lacks nothing: so does a
            // client of Istio's control plane, which answers each first subscription.
            must_answer: true,
            held: Held::Versions(initial),
            stale: true,
            queue: VecDeque::new(),
            in_flight: None,
            status: TypeStatus::default(),
        }
    }

    fn is_idle(&self) -> bool {
        self.in_flight.is_none() && self.queue.is_empty() && !self.stale
    }

    fn answered(&mut self, request: &DeltaDiscoveryRequest) -> Option<Answer> {
        let flight = self.in_flight.take_if(|flight| flight.nonce == request.response_nonce)?;
        if flight.completes.is_some() {
            self.status.acked_generation = flight.completes;
        }
        let Some(error) = &request.error_detail else { return Some(Answer::Acked) };
        self.status.nacked += 1;
        self.status.last_nack = Some(error.message.clone());
        Some(Answer::Nacked { message: error.message.clone() })
    }

    fn resubscribe(
        &mut self,
        subscribe: Vec<String>,
        unsubscribe: Vec<String>,
        limits: StreamLimits,
    ) -> Result<(), Violation> {
        for name in subscribe {
            if name == "*" {
                self.wildcard = true;
            } else {
                let name: Arc<str> = name.into();
                self.asked.insert(name.clone());
                self.names.insert(name);
            }
            self.stale = true;
        }
        for name in unsubscribe {
            if name == "*" {
                self.wildcard = false;
                self.stale = true;
            }
            self.names.remove(name.as_str());
            self.asked.remove(name.as_str());
        }
        if self.names.len() > limits.max_names {
            Err(Violation::TooManyNames(limits.max_names))
        } else {
            Ok(())
        }
    }

    /// Queues what brings the client from what it holds to the target.
    fn plan(&mut self, type_url: &str, target: &ResourceSet, push_bytes: usize, wants_generations: bool) {
        self.stale = false;
        let wanted = target.of_type(type_url);
        let asked = std::mem::take(&mut self.asked);
        let mut parts = Parts::new(target.generation, push_bytes, type_url.len());
        let unchanged = asked.is_empty() && self.wildcard && self.held.is(&wanted);
        if !unchanged {
            self.compare(&wanted, asked, &mut parts);
        }
        self.held = if self.wildcard { Held::Snapshot(wanted) } else { Held::of(&self.names, &wanted) };
        let generation = Some(target.generation);
        let untold = wants_generations && self.status.acked_generation != generation;
        if parts.is_empty() && !self.must_answer && !untold {
            self.status.acked_generation = generation;
            return;
        }
        self.must_answer = false;
        self.queue = parts.finish();
    }

    fn compare(&self, wanted: &ResourceMap, asked: BTreeSet<Arc<str>>, parts: &mut Parts) {
        if let (true, Held::Snapshot(held)) = (self.wildcard && asked.is_empty(), &self.held) {
            return differences(held, wanted, parts);
        }
        for (name, resource) in wanted.iter().filter(|(name, _)| self.wildcard || self.names.contains(*name))
        {
            // The empty version stands for a resource that the client is not sure of.
            let same =
                self.held.version(name).is_some_and(|held| !held.is_empty() && *held == resource.version);
            if !same || asked.contains(name) {
                parts.add(name, resource);
            }
        }
        let mut gone: BTreeSet<Arc<str>> =
            asked.into_iter().filter(|name| !wanted.contains_key(name)).collect();
        self.held.for_each_name(|name| {
            let subscribed = self.wildcard || self.names.contains(name);
            if subscribed && !wanted.contains_key(name) {
                gone.insert(name.clone());
            }
        });
        gone.into_iter().for_each(|name| parts.remove(name));
    }
}

/// From one generation to another of a client that has all of the first, skipping what they share.
fn differences(held: &ResourceMap, wanted: &ResourceMap, parts: &mut Parts) {
    let mut gone = Vec::new();
    for difference in held.diff(wanted) {
        match difference {
            DiffItem::Add(name, resource) => parts.add(name, resource),
            DiffItem::Update { old, new } => {
                if old.1.version != new.1.version {
                    parts.add(new.0, new.1);
                }
            }
            DiffItem::Remove(name, _) => gone.push(name.clone()),
        }
    }
    gone.into_iter().for_each(|name| parts.remove(name));
}

impl Held {
    fn of(names: &BTreeSet<Arc<str>>, wanted: &ResourceMap) -> Self {
        let version = |name: &Arc<str>| Some((name.clone(), wanted.get(name)?.version.clone()));
        Self::Versions(names.iter().filter_map(version).collect())
    }

    fn is(&self, wanted: &Arc<ResourceMap>) -> bool {
        matches!(self, Self::Snapshot(map) if Arc::ptr_eq(map, wanted))
    }

    fn version(&self, name: &str) -> Option<&Arc<str>> {
        match self {
            Self::Versions(versions) => versions.get(name),
            Self::Snapshot(map) => map.get(name).map(|resource| &resource.version),
        }
    }

    fn for_each_name(&self, mut visit: impl FnMut(&Arc<str>)) {
        match self {
            Self::Versions(versions) => versions.keys().for_each(&mut visit),
            Self::Snapshot(map) => map.keys().for_each(&mut visit),
        }
    }
}

/// Fills parts up to the byte bound.
struct Parts {
    parts: VecDeque<Part>,
    current: Part,
    push_bytes: usize,
    type_bytes: usize,
}

impl Parts {
    fn new(generation: u64, push_bytes: usize, type_bytes: usize) -> Self {
        let current = Part { generation, ..Part::default() };
        Self { parts: VecDeque::new(), current, push_bytes, type_bytes }
    }

    fn add(&mut self, name: &Arc<str>, resource: &Resource) {
        // Five fields with a tag and at most five bytes of length each.
        self.room(name.len() + resource.version.len() + resource.body.len() + self.type_bytes + 30);
        self.current.resources.push((name.clone(), resource.clone()));
    }

    fn remove(&mut self, name: Arc<str>) {
        self.room(name.len() + 6);
        self.current.removed.push(name);
    }

    fn room(&mut self, bytes: usize) {
        if self.current.bytes + bytes > self.push_bytes && !self.current.is_empty() {
            let next = Part { generation: self.current.generation, ..Part::default() };
            self.parts.push_back(std::mem::replace(&mut self.current, next));
        }
        self.current.bytes += bytes;
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.current.is_empty()
    }

    fn finish(mut self) -> VecDeque<Part> {
        self.current.last = true;
        self.parts.push_back(self.current);
        self.parts
    }
}

impl Part {
    fn is_empty(&self) -> bool {
        self.resources.is_empty() && self.removed.is_empty()
    }

    fn encode(self, type_url: &str, nonce: String) -> DeltaDiscoveryResponse {
        let resource = |(name, resource): (Arc<str>, Resource)| WireResource {
            name: name.as_ref().to_owned(),
            version: resource.version.as_ref().to_owned(),
            // Shared with every other stream until it is written to this one's transport.
            resource: Some(Any { type_url: type_url.to_owned(), value: resource.body }),
            ..WireResource::default()
        };
        DeltaDiscoveryResponse {
            system_version_info: Generation::Ours { number: self.generation, last: self.last }.to_string(),
            resources: self.resources.into_iter().map(resource).collect(),
            type_url: type_url.to_owned(),
            nonce,
            removed_resources: self.removed.iter().map(ToString::to_string).collect(),
        }
    }
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
