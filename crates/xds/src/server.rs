//! The server: a tonic service that brings every client to the newest [`ResourceSet`] of its view.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use prost::Message;
use prost_types::value::Kind;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use crate::resources::ResourceSet;
use crate::service::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use crate::stream::{Answer, MAX_TYPES, StreamLimits, StreamState, TypeStatus};

/// Characters of a client's version that are kept.
const MAX_VERSION: usize = 64;

/// Decides who may have a stream, without asking anyone.
pub trait Authenticator: Send + Sync + 'static {
    /// Called twice for each stream: when it opens, with no node, to turn strangers away before anything is read; and with
    /// the node that the first request names, which must agree with the credentials. The second answer is the peer.
    ///
    /// # Errors
    /// The status that ends the stream, such as `Status::unauthenticated`.
    #[allow(clippy::result_large_err, reason = "tonic's own error type, on a cold path")]
    fn authenticate(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status>;
}

/// Decides who may have a stream, and may have to ask somebody for it.
#[tonic::async_trait]
pub trait Admission: Send + Sync + 'static {
    /// See [`Authenticator::authenticate`]. It has to end by itself: nothing else bounds its time.
    ///
    /// # Errors
    /// The status that ends the stream, such as `Status::unauthenticated`.
    async fn admit(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status>;
}

#[tonic::async_trait]
impl<A: Authenticator> Admission for A {
    async fn admit(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status> {
        self.authenticate(metadata, node)
    }
}

/// Who a stream was given to.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Peer {
    /// What the authenticator calls it, such as a node's name.
    pub name: String,
}

/// Chooses what a peer may see.
pub trait View: Send + Sync + 'static {
    /// The sets this peer is to have, now and later. When its sender is dropped the stream ends.
    fn resources(&self, peer: &Peer, node: &Node) -> watch::Receiver<Arc<ResourceSet>>;
}

/// Everybody sees the same.
impl View for watch::Receiver<Arc<ResourceSet>> {
    fn resources(&self, _peer: &Peer, _node: &Node) -> watch::Receiver<Arc<ResourceSet>> {
        self.clone()
    }
}

/// Counts what passes. Calls are brief and must not block.
pub trait ServerObserver: Send + Sync + 'static {
    /// A stream was accepted (`true`) or ended (`false`).
    fn stream(&self, _opened: bool) {}

    /// A response was sent, with so many resources and removals, of so many encoded bytes.
    fn pushed(&self, _type_url: &str, _resources: usize, _bytes: usize) {}

    /// A response was answered.
    fn answered(&self, _type_url: &str, _answer: &Answer) {}

    /// A client has all of a generation, or refused what it has not. `before` is the last that it had, `None` of a new stream.
    fn converged(&self, _before: Option<u64>, _generation: u64) {}
}

/// Counts nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl ServerObserver for Unobserved {}

/// Bounds of a server. Its memory for state is at most `max_streams` times 1 MB by name, far less by wildcard, plus what is
/// in flight: `max_streams * types * push_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Streams at once; more are refused. One a node.
    pub max_streams: usize,
    /// Bounds of one stream's state.
    pub stream: StreamLimits,
    /// The longest request. A client's versions are what makes it long (R01).
    pub max_request_bytes: usize,
    /// From the opening of a stream to its first request.
    pub first_request: Duration,
    /// From a response to its answer; ours answer within 5 s. A client that is slower loses its stream.
    pub answer: Duration,
    /// Streams are ended at about this age, a tenth more or less so that they do not all come back at once: clients spread over the
    /// servers that way, and present fresh credentials (D16).
    pub max_age: Duration,
}

impl Limits {
    /// The age of the youngest stream that is ended for its age. A connection has to be told of its end by then: over one that is
    /// not, the next stream comes to the same server.
    #[must_use]
    pub fn youngest(&self) -> Duration {
        self.max_age.mul_f64(0.9)
    }

    /// The age at which a stream is ended, for a number between 0 and 1.
    fn age(&self, share: f64) -> Duration {
        self.max_age.mul_f64(0.2f64.mul_add(share, 0.9))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_streams: 5_000,
            stream: StreamLimits { max_names: 10_000, push_bytes: 3 << 20 },
            max_request_bytes: 16 << 20,
            first_request: Duration::from_secs(10),
            answer: Duration::from_secs(60),
            max_age: Duration::from_secs(30 * 60),
        }
    }
}

/// A connected client, for `culvert status`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ClientStatus {
    /// What it calls itself.
    pub node_id: String,
    /// What the authenticator calls it.
    pub peer: Peer,
    /// The version it says it is, `ISTIO_VERSION` of its metadata; empty if it does not say.
    pub version: String,
    /// Whether it asked for generations.
    pub generations: bool,
    /// Since when.
    pub connected: SystemTime,
    /// By type URL.
    pub types: BTreeMap<String, TypeStatus>,
}

/// The server; clones share their clients.
pub struct DeltaServer<V> {
    shared: Arc<Shared<V>>,
}

struct Shared<V> {
    view: V,
    admission: Box<dyn Admission>,
    observer: Box<dyn ServerObserver>,
    limits: Limits,
    tasks: Tasks,
    drain: DrainWatcher,
    places: Arc<Semaphore>,
    clients: Mutex<Clients>,
}

#[derive(Default)]
struct Clients {
    next_id: u64,
    by_id: BTreeMap<u64, ClientStatus>,
}

impl<V: View> DeltaServer<V> {
    /// A server whose streams run in `tasks` and end when `drain` starts.
    pub fn new(
        view: V,
        admission: impl Admission,
        observer: impl ServerObserver,
        limits: Limits,
        tasks: Tasks,
        drain: DrainWatcher,
    ) -> Self {
        let shared = Shared {
            view,
            admission: Box::new(admission),
            observer: Box::new(observer),
            limits,
            tasks,
            drain,
            places: Arc::new(Semaphore::new(limits.max_streams)),
            clients: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// The service to add to a tonic server.
    #[must_use]
    pub fn service(&self) -> AggregatedDiscoveryServiceServer<Self> {
        AggregatedDiscoveryServiceServer::new(self.clone())
            .max_decoding_message_size(self.shared.limits.max_request_bytes)
    }

    /// The clients connected now, longest first.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientStatus> {
        self.shared.clients.lock().by_id.values().cloned().collect()
    }
}

impl<V> Clone for DeltaServer<V> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

#[tonic::async_trait]
impl<V: View> AggregatedDiscoveryService for DeltaServer<V> {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        if self.shared.drain.is_draining() {
            return Err(Status::unavailable("shutting down"));
        }
        self.shared.admission.admit(request.metadata(), None).await?;
        let place = self.shared.places.clone().try_acquire_owned();
        let place = place.map_err(|_| Status::resource_exhausted("too many streams"))?;
        let (metadata, _, inbound) = request.into_parts();
        // One response of each type is in flight at most, and then the status that ends the stream.
        let (outbound, responses) = mpsc::channel(MAX_TYPES + 1);
        let shared = self.shared.clone();
        self.shared.tasks.spawn("xds stream", async move {
            let stream = Stream { shared, inbound, outbound };
            stream.run(&metadata).await;
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

struct Stream<V> {
    shared: Arc<Shared<V>>,
    inbound: Streaming<DeltaDiscoveryRequest>,
    outbound: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

/// What a client calls its version, cut to what fits a table: it is shown, and nothing depends on it.
fn said_version(node: &Node) -> String {
    let said = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("ISTIO_VERSION"));
    match said.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(version)) => version.chars().take(MAX_VERSION).collect(),
        _ => String::new(),
    }
}

/// Keeps a client in the list while it is connected.
struct Listed<V> {
    shared: Arc<Shared<V>>,
    id: u64,
}

impl<V: View> Stream<V> {
    async fn run(mut self, metadata: &MetadataMap) {
        let drain = self.shared.drain.clone();
        let max_age = self.shared.limits.age(fastrand::f64());
        let outcome = tokio::select! {
            _ = drain.started() => Err(Status::unavailable("shutting down")),
            outcome = timeout(max_age, self.serve(metadata)) => outcome.unwrap_or(Ok(())),
        };
        // Ok ends the stream regularly: too old, or the client closed its side.
        if let Err(status) = outcome {
            tracing::debug!(%status, "xds stream refused");
            // There is a place for it; fails only if the client is gone.
            let _ = self.outbound.try_send(Err(status));
        }
    }

    async fn serve(&mut self, metadata: &MetadataMap) -> Result<(), Status> {
        let limits = self.shared.limits;
        let first = timeout(limits.first_request, self.inbound.message())
            .await
            .map_err(|_| Status::deadline_exceeded("no request came"))??;
        let Some(first) = first else { return Ok(()) };
        let node = first.node.clone().unwrap_or_default();
        let peer = self.shared.admission.admit(metadata, Some(&node)).await?;
        let mut sets = self.shared.view.resources(&peer, &node);
        let generations = crate::wants_generations(&node);
        let version = said_version(&node);
        let listed = Listed::new(&self.shared, node.id, version, peer, generations);
        let mut latest = sets.borrow_and_update().clone();
        let mut state = StreamState::new(limits.stream, generations, latest.clone());
        self.received(&mut state, first)?;
        let mut converged = None;
        loop {
            while let Some(response) = state.next(&latest, Instant::now()) {
                self.send(response)?;
            }
            listed.update(&state);
            if let Some(generation) = state.converged().filter(|it| converged != Some(*it)) {
                self.shared.observer.converged(converged, generation);
                converged = Some(generation);
            }
            let answer_due = state.waiting_since().map(|since| since + limits.answer);
            let overdue = async {
                match answer_due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                request = self.inbound.message() => match request? {
                    Some(request) => self.received(&mut state, request)?,
                    None => return Ok(()),
                },
                changed = sets.changed() => {
                    changed.map_err(|_| Status::unavailable("nothing to serve any more"))?;
                    latest = sets.borrow_and_update().clone();
                }
                () = overdue => return Err(Status::deadline_exceeded("a response was not answered")),
            }
        }
    }

    #[allow(clippy::result_large_err, reason = "tonic's own error type, on a cold path")]
    fn received(&self, state: &mut StreamState, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        let type_url = request.type_url.clone();
        let answer =
            state.received(request).map_err(|violation| Status::invalid_argument(violation.to_string()))?;
        if let Some(answer) = answer {
            if let Answer::Nacked { message } = &answer {
                tracing::warn!(type_url, message, "a client refused resources");
            }
            self.shared.observer.answered(&type_url, &answer);
        }
        Ok(())
    }

    #[allow(clippy::result_large_err, reason = "tonic's own error type, on a cold path")]
    fn send(&self, response: DeltaDiscoveryResponse) -> Result<(), Status> {
        let items = response.resources.len() + response.removed_resources.len();
        self.shared.observer.pushed(&response.type_url, items, response.encoded_len());
        // One place a type, of which at most one response is in flight: full means that answers came to responses that
        // the transport has not taken yet.
        self.outbound.try_send(Ok(response)).map_err(|_| Status::aborted("the client is gone"))
    }
}

impl<V> Listed<V> {
    fn new(shared: &Arc<Shared<V>>, node_id: String, version: String, peer: Peer, generations: bool) -> Self {
        shared.observer.stream(true);
        let connected = SystemTime::now();
        let status = ClientStatus { node_id, peer, version, generations, connected, types: BTreeMap::new() };
        let mut clients = shared.clients.lock();
        let id = clients.next_id;
        clients.next_id += 1;
        clients.by_id.insert(id, status);
        Self { shared: shared.clone(), id }
    }

    fn update(&self, state: &StreamState) {
        if let Some(status) = self.shared.clients.lock().by_id.get_mut(&self.id) {
            status.types = state.status();
        }
    }
}

impl<V> Drop for Listed<V> {
    fn drop(&mut self) {
        self.shared.clients.lock().by_id.remove(&self.id);
        self.shared.observer.stream(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D16.
    #[test]
    fn streams_end_at_about_half_an_hour_and_none_before_its_connection_is_told_to() {
        let limits = Limits::default();
        let ages: Vec<Duration> = [0.0, 0.5, 1.0].into_iter().map(|share| limits.age(share)).collect();
        let minutes = |minutes: u64| Duration::from_secs(minutes * 60);
        let close = |one: Duration, other: Duration| one.abs_diff(other) < Duration::from_millis(1);
        assert!(
            close(ages[0], minutes(27)) && close(ages[1], minutes(30)) && close(ages[2], minutes(33)),
            "{ages:?}"
        );
        assert!(limits.youngest() <= ages[0]);
    }
}
