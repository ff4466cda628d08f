//! The client's half of the delta protocol, without IO.
//!
//! Per type, a name is in one of these conditions:
//! ```text
//!            answered: accepted                    answered: accepted, or removed
//! (absent) ---------------------> known(version) ---------------------------------> known / absent
//!     \                                |
//!      \ rejected, or connection lost  | rejected, or connection lost before the answer
//!       +-----------> doubtful <-------+
//! ```
//! A doubtful name is one of which neither side knows for sure what the client holds. At the next connection it is named with
//! the empty version, which no resource has: the server then sends it again if it exists and removes it if it does not.
//! So a version is remembered only once its resource was accepted, and yet nothing that a client may hold can be forgotten.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};

use crate::{Generation, RawResource};

/// The versions in a first request to a server that is not known to take more: below the 4 MiB that gRPC servers accept by
/// default (R01). Names that do not fit are left out: the server sends them again, and those it does not send are taken as
/// removed. 3 MiB is some 30,000 resources.
pub const MAX_VERSIONS_BYTES: usize = 3 << 20;

/// The same to a server that marked its last response as ours, which takes 16 MiB: some 150,000 resources, so that after a
/// reconnect a mesh of 100,000 is not sent again (R02, U35).
pub const MAX_VERSIONS_BYTES_OURS: usize = 15 << 20;

/// Responses of one type that may wait for their answers. Our server sends one at a time.
pub const MAX_OUTSTANDING: usize = 64;

/// Longer explanations in a NACK are cut here, to fit where servers log them.
pub const MAX_NACK_BYTES: usize = 8 << 10;

/// gRPC's INVALID_ARGUMENT, the code of a NACK.
const INVALID_ARGUMENT: i32 = 3;

/// The client's state over all its connections.
#[derive(Debug, Clone)]
pub struct DeltaClient {
    node: Node,
    types: BTreeMap<String, TypeState>,
    max_versions: usize,
}

/// One type to subscribe to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The type, such as [`culvert_proto::ADDRESS_TYPE_URL`].
    pub type_url: String,
    /// The resources wanted; empty means all of them.
    pub names: Vec<String>,
}

/// What a response brought, to be answered exactly once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The type of everything in it.
    pub type_url: String,
    /// What the server says it leads to.
    pub generation: Generation,
    /// New or changed resources; each name at most once.
    pub added: Vec<RawResource>,
    /// Names that are gone; none of them is also in `added`.
    pub removed: Vec<String>,
    /// Names the response in an answer.
    pub nonce: String,
}

/// A resource that the client will not use, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The resource's name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The server or the caller broke the protocol. The connection is of no use after one from [`DeltaClient::received`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A response of a type that was not subscribed to.
    #[error("the server sent type {0:?}, which was not asked for")]
    UnknownType(String),
    /// A response without a nonce cannot be answered.
    #[error("the server sent a response of type {0:?} without a nonce")]
    NoNonce(String),
    /// A nonce that is waiting for its answer, or was answered last.
    #[error("the server used nonce {0:?} twice")]
    DuplicateNonce(String),
    /// The server does not wait for answers.
    #[error("more than {MAX_OUTSTANDING} responses of type {0:?} wait for an answer")]
    TooManyOutstanding(String),
    /// An answer to a response that is not waiting for one, such as one of an earlier connection.
    #[error("no response with nonce {0:?} waits for an answer")]
    UnknownNonce(String),
    /// An answer to a later response of the type while an earlier one waits.
    #[error("nonce {0:?} was answered before the responses that came before it")]
    OutOfOrder(String),
}

#[derive(Debug, Clone, Default)]
struct TypeState {
    names: Vec<String>,
    /// What was accepted: name to version. The name is the one that was delivered, and stays it when the version changes.
    known: BTreeMap<Arc<str>, Box<str>>,
    doubtful: BTreeSet<Arc<str>>,
    /// Names left out of the first request, until the initial push is complete: those not pushed by then are gone.
    unconfirmed: Option<BTreeSet<Arc<str>>>,
    /// In order of arrival.
    outstanding: VecDeque<Outstanding>,
    last_answered: Option<String>,
}

#[derive(Debug, Clone)]
struct Outstanding {
    nonce: String,
    /// Name and version.
    added: Vec<(Arc<str>, Box<str>)>,
    removed: Vec<String>,
    /// Resources that were not even delivered.
    malformed: Vec<Rejection>,
}

impl DeltaClient {
    /// A client that knows nothing yet.
    #[must_use]
    pub fn new(node: Node, subscriptions: impl IntoIterator<Item = Subscription>) -> Self {
        let state = |names| TypeState { names, ..TypeState::default() };
        let types = subscriptions.into_iter().map(|wanted| (wanted.type_url, state(wanted.names))).collect();
        Self { node, types, max_versions: MAX_VERSIONS_BYTES }
    }

    /// The types subscribed to.
    pub fn types(&self) -> impl Iterator<Item = &str> {
        self.types.keys().map(String::as_str)
    }

    /// What was accepted of a type: name to version.
    #[must_use]
    pub fn known(&self, type_url: &str) -> Option<impl Iterator<Item = (&str, &str)>> {
        Some(self.types.get(type_url)?.known.iter().map(|(name, version)| (&**name, &**version)))
    }

    /// A new connection: forgets what the last one left open and returns the first request of each type, the node in the first
    /// of them only.
    pub fn connected(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut node = Some(self.node.clone());
        let max_versions = self.max_versions;
        let first = |(type_url, state): (&String, &mut TypeState)| DeltaDiscoveryRequest {
            node: node.take(),
            type_url: type_url.clone(),
            resource_names_subscribe: state.names.clone(),
            initial_resource_versions: state.reconnect(max_versions),
            ..DeltaDiscoveryRequest::default()
        };
        self.types.iter_mut().map(first).collect()
    }

    /// The server refused the first requests for their length: those of the next connection bring no more versions than any
    /// server takes, until ours is heard again.
    pub fn too_long(&mut self) {
        self.max_versions = MAX_VERSIONS_BYTES;
    }

    /// Takes a response. Resources that are not well-formed are left out of the delivery and rejected with its answer.
    ///
    /// # Errors
    /// If the server broke the protocol; nothing is changed then.
    pub fn received(&mut self, response: DeltaDiscoveryResponse) -> Result<Delivery, ProtocolError> {
        let type_url = response.type_url;
        let Some(state) = self.types.get_mut(&type_url) else {
            return Err(ProtocolError::UnknownType(type_url));
        };
        if response.nonce.is_empty() {
            return Err(ProtocolError::NoNonce(type_url));
        }
        let used = |known: &str| known == response.nonce;
        if state.outstanding.iter().any(|waiting| used(&waiting.nonce))
            || state.last_answered.as_deref().is_some_and(used)
        {
            return Err(ProtocolError::DuplicateNonce(response.nonce));
        }
        if state.outstanding.len() >= MAX_OUTSTANDING {
            return Err(ProtocolError::TooManyOutstanding(type_url));
        }
        let generation = Generation::parse(&response.system_version_info);
        self.max_versions = match generation {
            Generation::Ours { .. } => MAX_VERSIONS_BYTES_OURS,
            Generation::Foreign(_) => MAX_VERSIONS_BYTES,
        };
        let (added, malformed) = well_formed(&type_url, response.resources);
        let mut removed: BTreeSet<_> = response.removed_resources.into_iter().collect();
        if let Some(unconfirmed) = &mut state.unconfirmed {
            for name in names(&added, &malformed) {
                unconfirmed.remove(name);
            }
            if generation.is_last() {
                let silent = state.unconfirmed.take().unwrap_or_default();
                removed.extend(silent.iter().map(ToString::to_string));
            }
        }
        for name in names(&added, &malformed) {
            removed.remove(name);
        }
        let removed: Vec<_> = removed.into_iter().collect();
        state.outstanding.push_back(Outstanding {
            nonce: response.nonce.clone(),
            added: added.iter().map(|it| (it.name.clone(), it.version.as_str().into())).collect(),
            removed: removed.clone(),
            malformed,
        });
        Ok(Delivery { type_url, generation, added, removed, nonce: response.nonce })
    }

    /// Answers a delivery: everything in it was accepted, except what is listed (Z97). Without a rejection the request is an
    /// ACK, else one NACK that lists all of them.
    ///
    /// # Errors
    /// If that delivery does not wait for an answer, or is not the first of its type that does.
    pub fn answer(
        &mut self,
        type_url: &str,
        nonce: &str,
        rejected: &[Rejection],
    ) -> Result<DeltaDiscoveryRequest, ProtocolError> {
        let (state, delivery) = self.take(type_url, nonce)?;
        let bad: BTreeSet<&str> = rejected.iter().map(|rejection| rejection.name.as_str()).collect();
        for (name, version) in delivery.added {
            if bad.contains(&*name) {
                state.doubtful.insert(name);
            } else {
                state.doubtful.remove(&name);
                state.known.insert(name, version);
            }
        }
        for name in delivery.removed {
            state.doubtful.remove(&*name);
            state.known.remove(&*name);
        }
        let malformed = delivery.malformed.iter().map(|bad| bad.name.as_str());
        state.doubtful.extend(malformed.filter(|name| !name.is_empty()).map(Arc::from));
        let problems: Vec<_> = delivery.malformed.iter().chain(rejected).collect();
        let error = (!problems.is_empty()).then(|| explain(&problems));
        Ok(answer_request(type_url, nonce, error))
    }

    /// Answers a delivery of which nothing was accepted, not even the removals.
    ///
    /// # Errors
    /// As [`DeltaClient::answer`].
    pub fn nacked(
        &mut self,
        type_url: &str,
        nonce: &str,
        message: &str,
    ) -> Result<DeltaDiscoveryRequest, ProtocolError> {
        let (state, delivery) = self.take(type_url, nonce)?;
        state.doubt(delivery);
        Ok(answer_request(type_url, nonce, Some(cut(message.to_owned()))))
    }

    fn take(&mut self, type_url: &str, nonce: &str) -> Result<(&mut TypeState, Outstanding), ProtocolError> {
        let unknown = || ProtocolError::UnknownNonce(nonce.to_owned());
        let state = self.types.get_mut(type_url).ok_or_else(unknown)?;
        let place =
            state.outstanding.iter().position(|waiting| waiting.nonce == nonce).ok_or_else(unknown)?;
        if place > 0 {
            return Err(ProtocolError::OutOfOrder(nonce.to_owned()));
        }
        let delivery = state.outstanding.pop_front().ok_or_else(unknown)?;
        state.last_answered = Some(delivery.nonce.clone());
        Ok((state, delivery))
    }
}

impl TypeState {
    /// Nobody knows whether the client applied this.
    fn doubt(&mut self, delivery: Outstanding) {
        let added = delivery.added.into_iter().map(|(name, _)| name);
        let malformed = delivery.malformed.into_iter().map(|bad| bad.name).filter(|name| !name.is_empty());
        self.doubtful.extend(added.chain(delivery.removed.into_iter().chain(malformed).map(Arc::from)));
    }

    /// Starts a connection; returns as many versions as fit.
    fn reconnect(&mut self, max_bytes: usize) -> std::collections::HashMap<String, String> {
        for delivery in std::mem::take(&mut self.outstanding) {
            self.doubt(delivery);
        }
        self.last_answered = None;
        let mut left = max_bytes;
        let mut versions = std::collections::HashMap::new();
        let mut unconfirmed = BTreeSet::new();
        let doubtful = self.doubtful.iter().map(|name| (name, ""));
        let sure = self.known.iter().filter(|(name, _)| !self.doubtful.contains(*name));
        for (name, version) in doubtful.chain(sure.map(|(name, version)| (name, &**version))) {
            // A map entry is two strings with a tag and at most four bytes of length each, and the same again around them.
            let bytes = name.len() + version.len() + 15;
            match left.checked_sub(bytes) {
                Some(rest) => {
                    left = rest;
                    versions.insert(name.to_string(), version.to_owned());
                }
                None => drop(unconfirmed.insert(name.clone())),
            }
        }
        // By name, the server answers each name asked for, so nothing needs to be concluded from silence.
        self.unconfirmed = (self.names.is_empty() && !unconfirmed.is_empty()).then_some(unconfirmed);
        versions
    }
}

fn names<'a>(added: &'a [RawResource], malformed: &'a [Rejection]) -> impl Iterator<Item = &'a str> {
    added.iter().map(|resource| &*resource.name).chain(malformed.iter().map(|bad| bad.name.as_str()))
}

fn well_formed(type_url: &str, resources: Vec<Resource>) -> (Vec<RawResource>, Vec<Rejection>) {
    let mut names = BTreeSet::new();
    let mut malformed = Vec::new();
    let mut added = Vec::with_capacity(resources.len());
    for resource in resources {
        let name = Arc::<str>::from(resource.name);
        let fault = match &resource.resource {
            _ if name.is_empty() => Some("has no name".to_owned()),
            None => Some("has no body".to_owned()),
            Some(body) if body.type_url != type_url => Some(format!("is a {:?}", body.type_url)),
            Some(_) if !names.insert(name.clone()) => Some("occurs twice in one response".to_owned()),
            Some(_) => None,
        };
        match (fault, resource.resource) {
            (None, Some(body)) => {
                added.push(RawResource { name, version: resource.version, body: body.value })
            }
            (fault, _) => {
                malformed.push(Rejection { name: name.to_string(), reason: fault.unwrap_or_default() })
            }
        }
    }
    // Of a name that occurs twice neither is taken: which one is meant is anybody's guess.
    let twice: BTreeSet<&str> = malformed.iter().map(|bad| bad.name.as_str()).collect();
    added.retain(|resource| !twice.contains(&*resource.name));
    (added, malformed)
}

fn explain(problems: &[&Rejection]) -> String {
    let mut text = String::new();
    for problem in problems {
        if !text.is_empty() {
            text.push_str("; ");
        }
        text.push_str(&problem.name);
        text.push_str(": ");
        text.push_str(&problem.reason);
        if text.len() > MAX_NACK_BYTES {
            break;
        }
    }
    cut(text)
}

fn cut(mut text: String) -> String {
    if text.len() > MAX_NACK_BYTES {
        text.truncate(text.floor_char_boundary(MAX_NACK_BYTES - 3));
        text.push_str("...");
    }
    text
}

fn answer_request(type_url: &str, nonce: &str, error: Option<String>) -> DeltaDiscoveryRequest {
    let status = |message| Status { code: INVALID_ARGUMENT, message, details: Vec::new() };
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce.to_owned(),
        error_detail: error.map(status),
        ..DeltaDiscoveryRequest::default()
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
