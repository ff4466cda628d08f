//! A server that stops and starts, and a client program, on an in-memory transport.
#![allow(clippy::unwrap_used, reason = "only test functions are exempt by themselves")]

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use culvert_proto::discovery::Node;
use culvert_runtime::backoff::Bounds;
use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::tasks::{Tasks, Waited};
use culvert_xds::client::{
    AdsClient, ClientConfig, ClientObserver, Connect, Disconnect, Event, Responder, bearer_token_file,
};
use culvert_xds::gate::{Gate, Verdict};
use culvert_xds::node_with_generations;
use culvert_xds::resources::{Resource, ResourceMap, ResourceSet};
use culvert_xds::server::{Authenticator, DeltaServer, Limits, Peer, ServerObserver};
use culvert_xds::state::{Delivery, Rejection, Subscription};
use culvert_xds::stream::StreamLimits;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tempfile::NamedTempFile;
use tokio::io::DuplexStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, Endpoint, Server};

pub const A: &str = "type.test/a";
pub const B: &str = "type.test/b";
/// Longer than anything takes; reached only when a test fails.
pub const LONG: Duration = Duration::from_secs(20);

pub type View = watch::Receiver<Arc<ResourceSet>>;
pub type Contents = BTreeMap<String, String>;

/// The bearer token is the node's name.
pub struct TokenIsNode;

impl Authenticator for TokenIsNode {
    fn authenticate(&self, metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status> {
        let header = metadata.get("authorization").and_then(|value| value.to_str().ok());
        let name = header
            .and_then(|header| header.strip_prefix("Bearer "))
            .ok_or_else(|| Status::unauthenticated("no token"))?;
        match node {
            Some(node) if node.id != name => Err(Status::permission_denied("another node's token")),
            _ => Ok(Peer { name: name.to_owned() }),
        }
    }
}

#[derive(Clone, Default)]
pub struct Counts {
    pub resources: Arc<AtomicUsize>,
    pub pushes: Arc<AtomicUsize>,
    pub disconnects: Arc<AtomicUsize>,
    pub bytes: Arc<AtomicUsize>,
}

impl ServerObserver for Counts {
    fn pushed(&self, _type_url: &str, resources: usize, _bytes: usize) {
        self.resources.fetch_add(resources, Ordering::SeqCst);
        self.pushes.fetch_add(1, Ordering::SeqCst);
    }
}

impl ClientObserver for Counts {
    fn message(&self, _type_url: &str, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    fn disconnected(&self, _reason: &Disconnect) {
        self.disconnects.fetch_add(1, Ordering::SeqCst);
    }
}

/// A server that can be stopped and started again; connections reach the one that runs.
pub struct Host {
    pub sets: watch::Sender<Arc<ResourceSet>>,
    pub limits: Limits,
    pub counts: Counts,
    pub listener: Arc<Slot>,
    running: Option<Running>,
}

pub struct Running {
    server: DeltaServer<View>,
    tasks: Tasks,
    drain: DrainTrigger,
}

/// Where the connector finds the server that runs now.
pub type Slot = Mutex<Option<mpsc::Sender<Result<DuplexStream, std::io::Error>>>>;

pub fn set(generation: u64, a: &[(&str, &str)], b: &[(&str, &str)]) -> Arc<ResourceSet> {
    let map = |pairs: &[(&str, &str)]| {
        let resource = |(name, text): &(&str, &str)| {
            (Arc::<str>::from(*name), Resource::hashed(text.as_bytes().to_vec()))
        };
        Arc::new(pairs.iter().map(resource).collect::<ResourceMap>())
    };
    Arc::new(ResourceSet { generation, types: [(A.to_owned(), map(a)), (B.to_owned(), map(b))].into() })
}

impl Host {
    pub fn new(first: Arc<ResourceSet>) -> Self {
        let stream = StreamLimits { max_names: 10, push_bytes: 1_000 };
        let limits = Limits { stream, max_streams: 2, ..Limits::default() };
        let (sets, counts, listener) = (watch::Sender::new(first), Counts::default(), Arc::default());
        let mut host = Self { sets, limits, counts, listener, running: None };
        host.start();
        host
    }

    pub fn start(&mut self) {
        let tasks = Tasks::new("server");
        let (trigger, watcher) = drain::channel();
        let server = DeltaServer::new(
            self.sets.subscribe(),
            TokenIsNode,
            self.counts.clone(),
            self.limits,
            tasks.clone(),
            watcher.clone(),
        );
        let (incoming, connections) = mpsc::channel(4);
        let service = server.service();
        tasks.spawn("serve", async move {
            let stopped = async move {
                let _ = watcher.started().await;
            };
            Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopped)
                .await
                .unwrap();
        });
        *self.listener.lock() = Some(incoming);
        self.running = Some(Running { server, tasks, drain: trigger });
    }

    pub async fn stop(&mut self) {
        *self.listener.lock() = None;
        let Running { server, tasks, drain } = self.running.take().unwrap();
        drain.start();
        drop(server);
        tasks.close();
        assert_eq!(tasks.wait(LONG).await, Waited::Finished);
        assert_eq!(tasks.panics(), 0);
    }

    pub fn connect(&self) -> Connect {
        let listener = self.listener.clone();
        Arc::new(move || {
            let listener = listener.clone();
            Box::pin(async move { channel(listener).await.map_err(Into::into) })
        })
    }

    pub fn server(&self) -> &DeltaServer<View> {
        &self.running.as_ref().unwrap().server
    }
}

pub async fn channel(listener: Arc<Slot>) -> Result<Channel, tonic::transport::Error> {
    let connector = tower::service_fn(move |_| {
        let listener = listener.clone();
        async move {
            let refused = || std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            let (ours, theirs) = tokio::io::duplex(64 * 1024);
            let sender = listener.lock().clone().ok_or_else(refused)?;
            sender.send(Ok(theirs)).await.map_err(|_| refused())?;
            Ok::<_, std::io::Error>(TokioIo::new(ours))
        }
    });
    Endpoint::from_static("http://memory").connect_with_connector(connector).await
}

/// A client program: stages, commits by generation, and refuses bodies that start with "bad".
pub struct Program {
    pub events: mpsc::Receiver<Event>,
    tasks: Tasks,
    drain: DrainTrigger,
    pub counts: Counts,
    gate: Gate,
    held: Vec<(Responder, Vec<Rejection>)>,
    staged: BTreeMap<String, Contents>,
    pub committed: BTreeMap<String, Contents>,
    pub commits: usize,
    pub received: usize,
    _token: NamedTempFile,
}

impl Program {
    pub fn start(host: &Host, token: &str) -> Self {
        let mut file = NamedTempFile::new().unwrap();
        writeln!(file, "{token}").unwrap();
        let counts = Counts::default();
        let wanted = [A, B].map(|type_url| Subscription { type_url: type_url.to_owned(), names: Vec::new() });
        let config = ClientConfig {
            connect: host.connect(),
            credentials: bearer_token_file(file.path().to_owned()),
            node: node_with_generations("node-1"),
            subscriptions: wanted.to_vec(),
            backoff: Bounds::doubling(Duration::from_millis(1), Duration::from_millis(5)),
            random: fastrand::Rng::with_seed(1),
            max_message_bytes: 1 << 20,
            observer: Arc::new(counts.clone()),
        };
        let (sink, events) = mpsc::channel(4);
        let (drain, watcher) = drain::channel();
        let tasks = Tasks::new("client");
        tasks.spawn("ads", AdsClient::new(config).run(sink, watcher));
        let empty: BTreeMap<_, _> = [A, B].map(|type_url| (type_url.to_owned(), Contents::new())).into();
        Self {
            events,
            tasks,
            drain,
            counts,
            gate: Gate::new([A, B]),
            held: Vec::new(),
            staged: empty.clone(),
            committed: empty,
            commits: 0,
            received: 0,
            _token: file,
        }
    }

    pub async fn event(&mut self) -> Event {
        tokio::time::timeout(LONG, self.events.recv())
            .await
            .expect("an event comes")
            .expect("the client runs")
    }

    /// Handles one event; the reason if it was a disconnection.
    pub async fn step(&mut self) -> Option<Disconnect> {
        match self.event().await {
            Event::Connected => {
                self.gate.connected();
                self.held.clear();
                None
            }
            Event::Disconnected { reason } => Some(reason),
            Event::Delivery(delivery, responder) => {
                self.deliver(delivery, responder);
                None
            }
        }
    }

    pub fn deliver(&mut self, delivery: Delivery, responder: Responder) {
        let stage = self.staged.get_mut(&delivery.type_url).unwrap();
        let mut rejected = Vec::new();
        self.received += delivery.added.len();
        for resource in &delivery.added {
            let body = String::from_utf8(resource.body.to_vec()).unwrap();
            if body.starts_with("bad") {
                rejected.push(Rejection {
                    name: resource.name.to_string(),
                    reason: "does not decode".to_owned(),
                });
            } else {
                stage.insert(resource.name.to_string(), body);
            }
        }
        for name in &delivery.removed {
            stage.remove(name);
        }
        match self.gate.delivered(&delivery) {
            Verdict::Acknowledge => responder.accept_except(rejected),
            Verdict::Hold => self.held.push((responder, rejected)),
            Verdict::Commit => {
                self.committed = self.staged.clone();
                self.commits += 1;
                self.held.push((responder, rejected));
                for (responder, rejected) in self.held.drain(..) {
                    responder.accept_except(rejected);
                }
            }
        }
    }

    pub async fn until_committed(&mut self, type_url: &str, expected: &[(&str, &str)]) {
        let expected: Contents = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        while self.committed[type_url] != expected {
            self.step().await;
        }
    }

    pub async fn until_disconnected(&mut self) -> Disconnect {
        loop {
            if let Some(reason) = self.step().await {
                return reason;
            }
        }
    }

    pub async fn stop(self) {
        self.drain.start();
        self.tasks.close();
        assert_eq!(self.tasks.wait(LONG).await, Waited::Finished);
        assert_eq!(self.tasks.panics(), 0);
    }
}

/// Waits for a condition on the server's side, which follows the client's answer by a moment.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}
