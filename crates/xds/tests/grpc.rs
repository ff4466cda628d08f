//! Client and server together over gRPC on an in-memory transport.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use culvert_proto::discovery::{DeltaDiscoveryRequest, Node};
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
use culvert_xds::service::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
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

const A: &str = "type.test/a";
const B: &str = "type.test/b";
/// Longer than anything takes; reached only when a test fails.
const LONG: Duration = Duration::from_secs(20);

type View = watch::Receiver<Arc<ResourceSet>>;
type Contents = BTreeMap<String, String>;

/// The bearer token is the node's name.
struct TokenIsNode;

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
struct Counts {
    resources: Arc<AtomicUsize>,
    pushes: Arc<AtomicUsize>,
    disconnects: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
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
struct Host {
    sets: watch::Sender<Arc<ResourceSet>>,
    limits: Limits,
    counts: Counts,
    listener: Arc<Slot>,
    running: Option<Running>,
}

struct Running {
    server: DeltaServer<View>,
    tasks: Tasks,
    drain: DrainTrigger,
}

/// Where the connector finds the server that runs now.
type Slot = Mutex<Option<mpsc::Sender<Result<DuplexStream, std::io::Error>>>>;

fn set(generation: u64, a: &[(&str, &str)], b: &[(&str, &str)]) -> Arc<ResourceSet> {
    let map = |pairs: &[(&str, &str)]| {
        let resource =
            |(name, text): &(&str, &str)| ((*name).into(), Resource::hashed(text.as_bytes().to_vec()));
        Arc::new(pairs.iter().map(resource).collect::<ResourceMap>())
    };
    Arc::new(ResourceSet { generation, types: [(A.to_owned(), map(a)), (B.to_owned(), map(b))].into() })
}

impl Host {
    fn new(first: Arc<ResourceSet>) -> Self {
        let stream = StreamLimits { max_names: 10, push_bytes: 1_000 };
        let limits = Limits { stream, max_streams: 2, ..Limits::default() };
        let (sets, counts, listener) = (watch::Sender::new(first), Counts::default(), Arc::default());
        let mut host = Self { sets, limits, counts, listener, running: None };
        host.start();
        host
    }

    fn start(&mut self) {
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
            let stopped = async move { drop(watcher.started().await) };
            Server::builder()
                .add_service(service)
                .serve_with_incoming_shutdown(ReceiverStream::new(connections), stopped)
                .await
                .unwrap();
        });
        *self.listener.lock() = Some(incoming);
        self.running = Some(Running { server, tasks, drain: trigger });
    }

    async fn stop(&mut self) {
        *self.listener.lock() = None;
        let Running { server, tasks, drain } = self.running.take().unwrap();
        drain.start();
        drop(server);
        tasks.close();
        assert_eq!(tasks.wait(LONG).await, Waited::Finished);
        assert_eq!(tasks.panics(), 0);
    }

    fn connect(&self) -> Connect {
        let listener = self.listener.clone();
        Arc::new(move || {
            let listener = listener.clone();
            Box::pin(async move { channel(listener).await.map_err(Into::into) })
        })
    }

    fn server(&self) -> &DeltaServer<View> {
        &self.running.as_ref().unwrap().server
    }
}

async fn channel(listener: Arc<Slot>) -> Result<Channel, tonic::transport::Error> {
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
struct Program {
    events: mpsc::Receiver<Event>,
    tasks: Tasks,
    drain: DrainTrigger,
    counts: Counts,
    gate: Gate,
    held: Vec<(Responder, Vec<Rejection>)>,
    staged: BTreeMap<String, Contents>,
    committed: BTreeMap<String, Contents>,
    commits: usize,
    received: usize,
    _token: NamedTempFile,
}

impl Program {
    fn start(host: &Host, token: &str) -> Self {
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

    async fn event(&mut self) -> Event {
        tokio::time::timeout(LONG, self.events.recv())
            .await
            .expect("an event comes")
            .expect("the client runs")
    }

    /// Handles one event; the reason if it was a disconnection.
    async fn step(&mut self) -> Option<Disconnect> {
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

    fn deliver(&mut self, delivery: Delivery, responder: Responder) {
        let stage = self.staged.get_mut(&delivery.type_url).unwrap();
        let mut rejected = Vec::new();
        self.received += delivery.added.len();
        for resource in &delivery.added {
            let body = String::from_utf8(resource.body.to_vec()).unwrap();
            if body.starts_with("bad") {
                rejected
                    .push(Rejection { name: resource.name.clone(), reason: "does not decode".to_owned() });
            } else {
                stage.insert(resource.name.clone(), body);
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

    async fn until_committed(&mut self, type_url: &str, expected: &[(&str, &str)]) {
        let expected: Contents = expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
        while self.committed[type_url] != expected {
            self.step().await;
        }
    }

    async fn until_disconnected(&mut self) -> Disconnect {
        loop {
            if let Some(reason) = self.step().await {
                return reason;
            }
        }
    }

    async fn stop(self) {
        self.drain.start();
        self.tasks.close();
        assert_eq!(self.tasks.wait(LONG).await, Waited::Finished);
        assert_eq!(self.tasks.panics(), 0);
    }
}

/// Waits for a condition on the server's side, which follows the client's answer by a moment.
async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn full_sync_delta_and_status() {
    let mut host = Host::new(set(1, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("x", "1"), ("y", "1")]).await;
    assert_eq!((program.commits, program.received), (1, 3), "both types in one commit");
    assert_eq!(program.committed[B].len(), 1);
    assert!(program.counts.bytes.load(Ordering::SeqCst) > 0);

    host.sets.send_replace(set(2, &[("x", "2")], &[("p", "1")]));
    program.until_committed(A, &[("x", "2")]).await;
    assert_eq!((program.commits, program.received), (2, 4));

    let server = host.server().clone();
    eventually("both types acknowledged", || {
        server.clients().iter().any(|client| {
            client.types.len() == 2 && client.types.values().all(|status| status.acked_generation == Some(2))
        })
    })
    .await;
    let clients = server.clients();
    assert_eq!(
        (clients[0].node_id.as_str(), clients[0].peer.name.as_str(), clients[0].generations),
        ("node-1", "node-1", true)
    );
    let json = serde_json::to_value(&clients).unwrap();
    assert_eq!(json[0]["types"][A]["acked_generation"], 2);
    program.stop().await;
    eventually("the stream is gone", || server.clients().is_empty()).await;
    drop(server);
    host.stop().await;
}

#[tokio::test]
async fn a_restarted_server_with_the_same_content_sends_no_resources() {
    let mut host = Host::new(set(9, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(B, &[("p", "1")]).await;
    let server = host.server().clone();
    eventually("acknowledged", || {
        server.clients()[0].types.values().all(|status| status.acked_generation == Some(9))
    })
    .await;
    drop(server);
    let before = host.counts.resources.load(Ordering::SeqCst);

    host.stop().await;
    program.until_disconnected().await;
    assert_eq!(program.committed[A].len(), 2, "what is known stays in force");
    host.sets.send_replace(set(1, &[("x", "1"), ("y", "1")], &[("p", "1")]));
    host.start();
    let commits = program.commits;
    while program.commits == commits {
        program.step().await;
    }
    assert_eq!(host.counts.resources.load(Ordering::SeqCst), before, "nothing was sent again");
    assert_eq!(program.received, 3);

    // What changed while nobody was connected comes as a delta, deletions included.
    host.stop().await;
    program.until_disconnected().await;
    host.sets.send_replace(set(2, &[("x", "2")], &[("p", "1")]));
    host.start();
    program.until_committed(A, &[("x", "2")]).await;
    assert_eq!(program.received, 4);
    assert!(program.counts.disconnects.load(Ordering::SeqCst) >= 2);
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_nack_names_the_bad_one_and_is_not_a_loop() {
    let mut host = Host::new(set(1, &[("good", "1"), ("wrong", "bad")], &[]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &[("good", "1")]).await;
    let server = host.server().clone();
    eventually("the refusal is on record", || {
        server.clients()[0].types.get(A).and_then(|status| status.last_nack.as_deref())
            == Some("wrong: does not decode")
    })
    .await;
    // Mended, it is sent; the good one is not sent again, nor was the bad one.
    host.sets.send_replace(set(2, &[("good", "1"), ("wrong", "right")], &[]));
    program.until_committed(A, &[("good", "1"), ("wrong", "right")]).await;
    assert_eq!(host.counts.resources.load(Ordering::SeqCst), 3);
    assert_eq!(server.clients()[0].types[A].nacked, 1);
    drop(server);
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_large_push_comes_in_parts_and_is_committed_once() {
    let names: Vec<_> = (0..200).map(|index| format!("resource-{index:03}")).collect();
    let pairs: Vec<_> = names.iter().map(|name| (name.as_str(), "some content")).collect();
    let mut host = Host::new(set(1, &pairs, &[("p", "1")]));
    let mut program = Program::start(&host, "node-1");
    program.until_committed(A, &pairs).await;
    assert_eq!(program.commits, 1);
    assert!(host.counts.pushes.load(Ordering::SeqCst) > 10, "1,000 bytes a part");
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn strangers_and_too_many_are_refused() {
    let mut host = Host::new(set(1, &[], &[]));
    let mut stranger = Program::start(&host, "node-2");
    let reason = stranger.until_disconnected().await;
    assert!(matches!(&reason, Disconnect::Stream { code: tonic::Code::PermissionDenied, .. }), "{reason}");
    stranger.stop().await;

    let mut streams = Vec::new();
    let mut codes = Vec::new();
    for _ in 0..3 {
        let mut client = AggregatedDiscoveryServiceClient::new(channel(host.listener.clone()).await.unwrap());
        let (requests, body) = mpsc::channel::<DeltaDiscoveryRequest>(1);
        let mut request = tonic::Request::new(ReceiverStream::new(body));
        request.metadata_mut().insert("authorization", "Bearer node-1".parse().unwrap());
        match client.delta_aggregated_resources(request).await {
            Ok(stream) => streams.push((requests, stream)),
            Err(status) => codes.push(status.code()),
        }
    }
    assert_eq!((streams.len(), codes), (2, vec![tonic::Code::ResourceExhausted]));

    let mut client = AggregatedDiscoveryServiceClient::new(channel(host.listener.clone()).await.unwrap());
    let none = tokio_stream::empty::<DeltaDiscoveryRequest>();
    assert_eq!(
        client.delta_aggregated_resources(none).await.unwrap_err().code(),
        tonic::Code::Unauthenticated
    );
    drop((streams, client));
    host.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_answers_loses_its_stream() {
    let mut host = Host::new(set(1, &[("x", "1")], &[]));
    let mut program = Program::start(&host, "node-1");
    let mut unanswered = Vec::new();
    let reason = loop {
        match tokio::time::timeout(2 * host.limits.answer, program.events.recv()).await.unwrap().unwrap() {
            Event::Delivery(_, responder) => unanswered.push(responder),
            Event::Disconnected { reason } => break reason,
            Event::Connected => {}
        }
    };
    assert!(matches!(&reason, Disconnect::Stream { code: tonic::Code::DeadlineExceeded, .. }), "{reason}");
    drop(unanswered);
    program.stop().await;
    host.stop().await;
}

#[tokio::test]
async fn a_dropped_responder_refuses() {
    let mut host = Host::new(set(1, &[("x", "1")], &[]));
    let mut program = Program::start(&host, "node-1");
    loop {
        match program.event().await {
            Event::Delivery(delivery, responder) if delivery.type_url == A => break drop(responder),
            _ => {}
        }
    }
    let server = host.server().clone();
    eventually("the refusal arrived", || {
        server.clients()[0].types.get(A).is_some_and(|status| status.nacked == 1)
    })
    .await;
    drop(server);
    program.stop().await;
    host.stop().await;
}

/// Random changes and restarts, with the client at work all the time: in the end it has what is published.
#[tokio::test]
async fn churn_converges() {
    let names: Vec<_> = (0..30).map(|index| format!("name-{index}")).collect();
    for seed in 0..10 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut host = Host::new(set(1, &[], &[]));
        let mut program = Program::start(&host, "node-1");
        let mut last = (Vec::new(), Vec::new());
        for generation in 2..40 {
            let mut contents = || -> Vec<(&str, &str)> {
                let mut pair = |name| random.bool().then(|| (name, ["1", "2", "3"][random.usize(0..3)]));
                names.iter().filter_map(|name| pair(name.as_str())).collect()
            };
            last = (contents(), contents());
            host.sets.send_replace(set(generation, &last.0, &last.1));
            if random.u8(0..8) == 0 {
                host.stop().await;
                host.start();
            }
            for _ in 0..random.usize(0..4) {
                let _ = tokio::time::timeout(Duration::from_millis(1), program.step()).await;
            }
        }
        program.until_committed(A, &last.0).await;
        program.until_committed(B, &last.1).await;
        program.stop().await;
        host.stop().await;
    }
}

#[tokio::test]
async fn credentials_that_cannot_be_read_are_a_reason() {
    let called = Arc::new(AtomicBool::new(false));
    let seen = called.clone();
    let config = ClientConfig {
        connect: {
            let host = Host::new(set(1, &[], &[]));
            host.connect()
        },
        credentials: Arc::new(move || {
            seen.store(true, Ordering::SeqCst);
            Err("no such token".into())
        }),
        node: Node::default(),
        subscriptions: Vec::new(),
        backoff: Bounds::doubling(Duration::from_millis(1), Duration::from_millis(5)),
        random: fastrand::Rng::with_seed(1),
        max_message_bytes: 1 << 20,
        observer: Arc::new(Counts::default()),
    };
    let (sink, mut events) = mpsc::channel(1);
    let (_drain, watcher) = drain::channel();
    let tasks = Tasks::new("client");
    tasks.spawn("ads", AdsClient::new(config).run(sink, watcher));
    let Some(Event::Disconnected { reason }) = events.recv().await else { panic!("an event") };
    assert!(matches!(reason, Disconnect::Credentials(_) | Disconnect::Connect(_)), "{reason}");
    drop(events);
    tasks.close();
    assert_eq!(tasks.wait(LONG).await, Waited::Finished, "without a listener it ends");
}
