//! The client on a real connection: connects, subscribes, hands deliveries over, sends the answers, and starts again when the
//! connection ends (Z98). What the program holds meanwhile stays in force.
//!
//! ```text
//! Connecting --channel--> Streaming --stream ends--> Waiting --backoff--> Connecting
//!      \___________________ fails __________________/
//! ```
//! A drain ends it from any of these.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use culvert_runtime::backoff::{Backoff, Bounds};
use culvert_runtime::drain::DrainWatcher;
use prost::Message;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{Ascii, MetadataMap, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use crate::service::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use crate::state::{Delivery, DeltaClient, MAX_OUTSTANDING, ProtocolError, Rejection, Subscription};

/// Delays between connection attempts (Z98).
pub const BACKOFF: Bounds = Bounds::doubling(Duration::from_millis(10), Duration::from_secs(15));

/// The longest response taken (Z98): 200 MB, a full push of about a million resources in one message.
pub const MAX_MESSAGE_BYTES: usize = 200 << 20;

/// How long making a channel may take, TLS included.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a request may wait for the transport to take it.
const SEND_TIMEOUT: Duration = Duration::from_secs(15);

/// A connection that held for this long starts the backoff over.
const HELD: Duration = Duration::from_secs(10);

/// Whatever a caller's closure failed with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Makes a channel to a server, once for each connection. The caller composes TLS into it, and HTTP/2 keepalive, which is what
/// notices a server that went silent.
pub type Connect =
    Arc<dyn Fn() -> Pin<Box<dyn Future<Output = Result<Channel, BoxError>> + Send>> + Send + Sync>;

/// Makes the metadata of a connection's one call, read anew for each connection, so that a rotated token is used.
pub type Credentials = Arc<dyn Fn() -> Result<MetadataMap, BoxError> + Send + Sync>;

/// Everything an [`AdsClient`] needs.
#[derive(Clone)]
pub struct ClientConfig {
    /// Makes the channel.
    pub connect: Connect,
    /// Makes the call's metadata; [`no_credentials`] or [`bearer_token_file`] in the usual cases.
    pub credentials: Credentials,
    /// Who this is; see [`crate::node_with_generations`].
    pub node: Node,
    /// What to subscribe to.
    pub subscriptions: Vec<Subscription>,
    /// Delays between attempts, usually [`BACKOFF`].
    pub backoff: Bounds,
    /// Seed of the delays' jitter.
    pub random: fastrand::Rng,
    /// The longest response taken, usually [`MAX_MESSAGE_BYTES`].
    pub max_message_bytes: usize,
    /// Told of what passes.
    pub observer: Arc<dyn ClientObserver>,
}

/// Counts what passes (Z102). Calls are brief and must not block.
pub trait ClientObserver: Send + Sync {
    /// A response came, of so many encoded bytes.
    fn message(&self, _type_url: &str, _bytes: usize) {}

    /// A connection ended, or could not be made.
    fn disconnected(&self, _reason: &Disconnect) {}
}

/// Counts nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl ClientObserver for Unobserved {}

/// What the client tells the program, in order.
#[derive(Debug)]
pub enum Event {
    /// A connection stands and the subscriptions are sent.
    Connected,
    /// Resources came. Answer through the responder.
    Delivery(Delivery, Responder),
    /// The connection ended or could not be made; what was delivered stays valid. Responders of that connection answer
    /// nobody any more.
    Disconnected {
        /// Why.
        reason: Disconnect,
    },
}

/// Why there is no connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Disconnect {
    /// No channel could be made.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// The credentials could not be read.
    #[error("cannot read the credentials: {0}")]
    Credentials(String),
    /// The server, or the transport, ended the stream with an error.
    #[error("the stream failed: {code}: {message}")]
    Stream {
        /// gRPC's code.
        code: tonic::Code,
        /// What it said.
        message: String,
    },
    /// The server ended the stream regularly, as when its age is limited.
    #[error("the server ended the stream")]
    Complete,
    /// The server broke the protocol.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The transport took no request for too long.
    #[error("the server takes no requests")]
    Stalled,
}

/// Answers one delivery; dropping it without an answer refuses the delivery, so that a bug shows instead of stalling the stream.
#[derive(Debug)]
pub struct Responder {
    answers: mpsc::Sender<Answer>,
    key: Option<(String, String)>,
}

/// The client; runs until its drain.
pub struct AdsClient {
    config: ClientConfig,
    state: DeltaClient,
    backoff: Backoff,
}

#[derive(Debug)]
struct Answer {
    type_url: String,
    nonce: String,
    verdict: Verdict,
}

#[derive(Debug)]
enum Verdict {
    Accepted(Vec<Rejection>),
    Refused(String),
}

/// Why a connection's loop ended.
enum Ended {
    Disconnected(Disconnect),
    /// Draining, or nobody listens to events any more.
    Stop,
}

impl Disconnect {
    /// The reason as a metric label (Z102), in the words that dashboards know.
    #[must_use]
    pub fn label(&self) -> &'static str {
        match self {
            Self::Connect(_) | Self::Credentials(_) => "ConnectionError",
            Self::Stream { .. } | Self::Protocol(_) | Self::Stalled => "Error",
            Self::Complete => "Complete",
        }
    }
}

impl From<Status> for Disconnect {
    fn from(status: Status) -> Self {
        Self::Stream { code: status.code(), message: status.message().to_owned() }
    }
}

impl Responder {
    /// Everything delivered was accepted.
    pub fn ack(self) {
        self.accept_except(Vec::new());
    }

    /// Everything delivered was accepted, except these, which one NACK lists (Z97).
    pub fn accept_except(mut self, rejected: Vec<Rejection>) {
        self.send(Verdict::Accepted(rejected));
    }

    /// Nothing delivered was accepted.
    pub fn nack(mut self, message: impl Into<String>) {
        self.send(Verdict::Refused(message.into()));
    }

    fn send(&mut self, verdict: Verdict) {
        let Some((type_url, nonce)) = self.key.take() else { return };
        // There is a place for each delivery of the connection; it fails only when the connection is gone.
        let _ = self.answers.try_send(Answer { type_url, nonce, verdict });
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.send(Verdict::Refused("the client dropped it".to_owned()));
    }
}

impl AdsClient {
    /// A client that knows nothing yet.
    #[must_use]
    pub fn new(config: ClientConfig) -> Self {
        let state = DeltaClient::new(config.node.clone(), config.subscriptions.clone());
        let backoff = Backoff::new(config.backoff, config.random.clone());
        Self { config, state, backoff }
    }

    /// Connects and keeps connected until the drain starts or nobody receives events. Events wait while the receiver is full,
    /// and then the server waits: choose its capacity for a delivery of each type.
    pub async fn run(mut self, sink: mpsc::Sender<Event>, drain: DrainWatcher) {
        loop {
            let begun = Instant::now();
            let ended = tokio::select! {
                _ = drain.started() => return,
                () = sink.closed() => return,
                ended = self.connection(&sink) => ended,
            };
            let Ended::Disconnected(reason) = ended else { return };
            tracing::info!(%reason, "no connection to the control plane");
            // What servers say to a message above their limit: grpc-go the first, tonic the second.
            if let Disconnect::Stream { code: Code::ResourceExhausted | Code::OutOfRange, .. } = &reason {
                self.state.too_long();
            }
            self.config.observer.disconnected(&reason);
            if begun.elapsed() >= HELD {
                self.backoff.reset();
            }
            let delay = self.backoff.next_delay();
            let tell_and_wait = async {
                let told = sink.send(Event::Disconnected { reason }).await;
                tokio::time::sleep(delay).await;
                told
            };
            tokio::select! {
                _ = drain.started() => return,
                told = tell_and_wait => if told.is_err() { return },
            }
        }
    }

    /// One connection, from connecting to its end.
    async fn connection(&mut self, sink: &mpsc::Sender<Event>) -> Ended {
        match self.open(sink).await {
            Ok(mut connection) => match connection.serve().await {
                Ok(ended) => ended,
                Err(reason) => Ended::Disconnected(reason),
            },
            Err(reason) => Ended::Disconnected(reason),
        }
    }

    async fn open<'a>(&'a mut self, sink: &'a mpsc::Sender<Event>) -> Result<Connection<'a>, Disconnect> {
        let channel = tokio::time::timeout(CONNECT_TIMEOUT, (self.config.connect)())
            .await
            .map_err(|_| Disconnect::Connect(format!("not within {CONNECT_TIMEOUT:?}")))?
            .map_err(|error| Disconnect::Connect(chain(&*error)))?;
        let credentials =
            (self.config.credentials)().map_err(|error| Disconnect::Credentials(chain(&*error)))?;
        let types = self.state.types().count();
        // A first request of each type, and an answer to each delivery that waits for one.
        let capacity = types * (MAX_OUTSTANDING + 1) + 1;
        let (requests, body) = mpsc::channel(capacity);
        let (answers, answered) = mpsc::channel(capacity);
        for request in self.state.connected() {
            requests.try_send(request).map_err(|_| Disconnect::Stalled)?;
        }
        let mut request = Request::new(ReceiverStream::new(body));
        *request.metadata_mut() = credentials;
        let mut client = AggregatedDiscoveryServiceClient::new(channel)
            .max_decoding_message_size(self.config.max_message_bytes);
        // No timeout: a server may send its first header with its first response, and that may be far away when this client
        // is up to date. A dead server is noticed by the channel's keepalive.
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok(Connection {
            state: &mut self.state,
            observer: &*self.config.observer,
            sink,
            requests,
            responses,
            answers,
            answered,
        })
    }
}

struct Connection<'a> {
    state: &'a mut DeltaClient,
    observer: &'a dyn ClientObserver,
    sink: &'a mpsc::Sender<Event>,
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    /// Cloned into each responder.
    answers: mpsc::Sender<Answer>,
    answered: mpsc::Receiver<Answer>,
}

impl Connection<'_> {
    /// Moves responses to the sink and answers to the server. While an event waits for the sink no response is read, but
    /// answers are sent all the same: the program may be waiting for their effect.
    async fn serve(&mut self) -> Result<Ended, Disconnect> {
        let mut waiting = Some(Event::Connected);
        loop {
            let has_event = waiting.is_some();
            tokio::select! {
                place = self.sink.reserve(), if has_event => {
                    let Ok(place) = place else { return Ok(Ended::Stop) };
                    if let Some(event) = waiting.take() {
                        place.send(event);
                    }
                }
                response = self.responses.message(), if !has_event => {
                    let response = response?.ok_or(Disconnect::Complete)?;
                    waiting = Some(self.received(response)?);
                }
                answer = self.answered.recv() => {
                    // Never none: `answers` is held here.
                    if let Some(answer) = answer {
                        self.answer(answer).await?;
                    }
                }
            }
        }
    }

    fn received(&mut self, response: DeltaDiscoveryResponse) -> Result<Event, Disconnect> {
        self.observer.message(&response.type_url, response.encoded_len());
        let delivery = self.state.received(response)?;
        let key = Some((delivery.type_url.clone(), delivery.nonce.clone()));
        Ok(Event::Delivery(delivery, Responder { answers: self.answers.clone(), key }))
    }

    async fn answer(&mut self, answer: Answer) -> Result<(), Disconnect> {
        let Answer { type_url, nonce, verdict } = answer;
        let request = match verdict {
            Verdict::Accepted(rejected) => self.state.answer(&type_url, &nonce, &rejected)?,
            Verdict::Refused(message) => self.state.nacked(&type_url, &nonce, &message)?,
        };
        match tokio::time::timeout(SEND_TIMEOUT, self.requests.send(request)).await {
            Ok(Ok(())) => Ok(()),
            // The transport dropped the request stream; the response stream says why.
            Ok(Err(_)) => match self.responses.message().await {
                Err(status) => Err(status.into()),
                Ok(_) => Err(Disconnect::Complete),
            },
            Err(_) => Err(Disconnect::Stalled),
        }
    }
}

/// No metadata.
#[must_use]
pub fn no_credentials() -> Credentials {
    Arc::new(|| Ok(MetadataMap::new()))
}

/// `authorization: Bearer TOKEN`, the token read from a file (of at most 64 KiB) for each connection.
#[must_use]
pub fn bearer_token_file(path: PathBuf) -> Credentials {
    Arc::new(move || {
        let mut token = String::new();
        std::io::Read::read_to_string(
            &mut std::io::Read::take(std::fs::File::open(&path)?, 64 << 10),
            &mut token,
        )?;
        let mut value: MetadataValue<Ascii> = format!("Bearer {}", token.trim()).parse()?;
        value.set_sensitive(true);
        let mut metadata = MetadataMap::new();
        metadata.insert("authorization", value);
        Ok(metadata)
    })
}

/// An error with its causes: a transport error alone says only that there was one.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
