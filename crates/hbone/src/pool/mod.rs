//! Connections shared by key.
//!
//! The key says what may share a connection: the same source pod, source identity, expected destination identities and
//! destination (Z21, trap 18). Dials are single-flight for each key, a full connection is followed by another (Z22), and a
//! stream is never put on a connection that is draining, expired or evicted.

mod drive;
mod table;

use std::fmt;
use std::future::Future;
use std::hash::Hash;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;

use crate::client::{Client, TunnelRequest};
use crate::config::ClientConfig;
use crate::error::{ConnectError, HandshakeError};
use crate::link::StreamGuard;
use crate::stream::TunnelStream;
use table::{Connection, DialTicket, Step, Table};

/// Runs a connection's driver; give it the `spawn` of a task set that is drained after the pool.
pub type Spawner = Arc<dyn Fn(Pin<Box<dyn Future<Output = ()> + Send>>) + Send + Sync>;

/// Connections by key. Cheap to clone; `E` is the error of the caller's dial.
pub struct Pool<K, E> {
    inner: Arc<Inner<K, E>>,
}

/// What is known of a connection when it is made; kept for the flow record and for [`Pool::evict`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConnectionFacts {
    /// No new stream after this time: the earlier expiry of the two certificates. `None` for no limit.
    pub valid_until: Option<SystemTime>,
    /// The caller's mark of what the connection was made with: certificate, trust bundle, policy generation.
    pub fingerprint: u64,
    /// The peer's proven identity.
    pub peer: Option<Arc<str>>,
    /// The connection's addresses.
    pub local_addr: Option<SocketAddr>,
    /// The peer's address.
    pub remote_addr: Option<SocketAddr>,
}

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Settings of each connection.
    pub client: ClientConfig,
    /// How long a connection without streams is kept (Z22: 5 min).
    pub idle_timeout: Duration,
    /// A connection takes no new stream this long before `valid_until`: a CONNECT's way to the peer.
    pub expiry_margin: Duration,
    /// Connections of one key. 256 x 100 streams is about one source pod's range of ephemeral ports to one destination.
    pub max_connections_per_key: usize,
    /// Connections of the pool, those still ending included. Each idle one holds about 30 KB: 16,384 hold 500 MB.
    pub max_connections: usize,
    /// A connection on which streams wait for window and none got any for this long gets no new streams (trap 19).
    pub stall_grace: Duration,
    /// Stalled connections of one key that are passed over; with more, they are used like any other, so that slow readers
    /// cannot multiply connections without end.
    pub max_stalled: usize,
    /// Connections of one key that carry bulk and are passed over, so that a small stream does not wait behind it; with more,
    /// the one with the fewest streams is used. With 4, four bulk streams and a small one have a connection each.
    pub max_bulk: usize,
    /// The wall clock.
    pub now: fn() -> SystemTime,
}

/// A tunnel from the pool.
#[derive(Debug)]
pub struct Opened {
    /// The tunnel.
    pub stream: TunnelStream,
    /// Headers of the peer's 200 (Z18).
    pub headers: HeaderMap,
    /// The connection's facts.
    pub facts: Arc<ConnectionFacts>,
    /// Number of the connection within the pool, for logs.
    pub connection: u64,
    /// False if this call dialled the connection.
    pub reused: bool,
}

/// Why no tunnel was opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError<E> {
    /// The dial failed: this caller's, or the one it waited for.
    #[error("dial failed: {0}")]
    Dial(Arc<E>),
    /// The dialled connection did not speak HTTP/2.
    #[error(transparent)]
    Handshake(HandshakeError),
    /// The peer did not open the tunnel.
    #[error(transparent)]
    Connect(ConnectError),
    /// All connections that may exist do, and are full.
    #[error("no connection left: {0} open")]
    Exhausted(usize),
    /// The pool is draining.
    #[error("the pool is draining")]
    Draining,
}

/// Counters of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Connections open now, those still ending included.
    pub connections: usize,
    /// Streams open or being opened now.
    pub streams: usize,
    /// Dials begun.
    pub dials: u64,
    /// Dials that failed, handshakes included.
    pub dial_failures: u64,
    /// Requests sent again on another connection.
    pub retries: u64,
}

/// How a dial ended, for those who waited for it.
enum DialFailure<E> {
    Dial(Arc<E>),
    Handshake(HandshakeError),
}

struct Inner<K, E> {
    config: PoolConfig,
    spawn: Spawner,
    table: Mutex<Table<K, E>>,
    counters: Counters,
    /// Told when a connection has ended.
    closed: Notify,
}

#[derive(Default)]
struct Counters {
    connections: AtomicUsize,
    streams: Arc<AtomicUsize>,
    dials: AtomicU64,
    dial_failures: AtomicU64,
    retries: AtomicU64,
}

/// A place on a connection.
struct Lease {
    connection: Arc<Connection>,
    guard: StreamGuard,
    reused: bool,
}

impl<K, E> Pool<K, E>
where
    K: Hash + Eq + Clone + Send + Sync + 'static,
    E: Send + Sync + 'static,
{
    /// An empty pool.
    #[must_use]
    pub fn new(config: PoolConfig, spawn: Spawner) -> Self {
        let table = Mutex::new(Table::default());
        let inner = Inner { config, spawn, table, counters: Counters::default(), closed: Notify::new() };
        Self { inner: Arc::new(inner) }
    }

    /// Opens a tunnel on a connection for `key`, dialling if there is none with room. Only one dial for a key runs at a time
    /// and all who need it wait for it; if it fails, it fails for all of them.
    ///
    /// A request that got no answer because its connection went away is sent once more on a younger connection: always if the
    /// peer certainly did not process it, and else only if the connection was reused. Nothing of the application is sent
    /// before the peer's answer, so the worst that the second case can do is a connection to the destination that closes
    /// without a byte.
    ///
    /// # Errors
    /// See [`OpenError`]. A refusal by the peer is not retried.
    pub async fn open<IO, D, F>(
        &self,
        key: &K,
        dial: &D,
        request: TunnelRequest,
    ) -> Result<Opened, OpenError<E>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<(IO, ConnectionFacts), E>>,
    {
        let first = self.lease(key, dial, 0).await?;
        let (id, reused) = (first.connection.id, first.reused);
        let error = match first.connect(request.clone()).await {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        let lost = matches!(error, ConnectError::ConnectionLost { .. });
        if !(error.is_unprocessed() || lost && reused) || matches!(error, ConnectError::BadAuthority(_)) {
            return Err(OpenError::Connect(error));
        }
        tracing::debug!(connection = id, %error, "tunnel request is sent again on a younger connection");
        self.inner.counters.retries.fetch_add(1, Ordering::Relaxed);
        let second = self.lease(key, dial, id + 1).await?;
        second.connect(request).await.map_err(OpenError::Connect)
    }

    /// Takes every connection that `stale` names out of use: its streams run on, and it closes after the last. A dial in
    /// progress serves its own caller only. Returns how many there were.
    pub fn evict(&self, mut stale: impl FnMut(&K, &ConnectionFacts) -> bool) -> usize {
        self.inner.table.lock().evict(|key, connection| stale(key, &connection.facts)).len()
    }

    /// Opens nothing more, and waits until every connection has ended with its last stream. Bound it with a deadline.
    pub async fn drain(&self) {
        // Dropped outside the lock: the handles' drops wake their drivers.
        let handles = self.inner.table.lock().drain();
        drop(handles);
        loop {
            let closed = self.inner.closed.notified();
            tokio::pin!(closed);
            closed.as_mut().enable();
            if self.inner.counters.connections.load(Ordering::Acquire) == 0 {
                return;
            }
            closed.await;
        }
    }

    /// Counters, for metrics.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        let counters = &self.inner.counters;
        PoolStats {
            connections: counters.connections.load(Ordering::Acquire),
            streams: counters.streams.load(Ordering::Acquire),
            dials: counters.dials.load(Ordering::Relaxed),
            dial_failures: counters.dial_failures.load(Ordering::Relaxed),
            retries: counters.retries.load(Ordering::Relaxed),
        }
    }

    /// A place on a connection numbered `from` or later.
    async fn lease<IO, D, F>(&self, key: &K, dial: &D, from: u64) -> Result<Lease, OpenError<E>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<(IO, ConnectionFacts), E>>,
    {
        loop {
            let step = {
                let open = self.inner.counters.connections.load(Ordering::Acquire);
                self.inner.table.lock().step(key, from, open, &self.inner.config)
            };
            match step {
                Step::Use(connection, guard) => return Ok(Lease { connection, guard, reused: true }),
                Step::Full(open) => return Err(OpenError::Exhausted(open)),
                Step::Draining => return Err(OpenError::Draining),
                Step::Wait(mut outcome) => {
                    // An error here is a dialler that was cancelled: look again, and dial in its place.
                    if let Ok(done) = outcome.wait_for(Option::is_some).await
                        && let Some(Some(failure)) = done.as_ref()
                    {
                        return Err(failure.clone().into());
                    }
                }
                Step::Dial(ticket) => {
                    let ticket = DialGuard { inner: &self.inner, key, ticket: Some(ticket) };
                    return self.dial(ticket, dial).await;
                }
            }
        }
    }

    async fn dial<IO, D, F>(&self, mut guard: DialGuard<'_, K, E>, dial: &D) -> Result<Lease, OpenError<E>>
    where
        IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        D: Fn() -> F,
        F: Future<Output = Result<(IO, ConnectionFacts), E>>,
    {
        let counters = &self.inner.counters;
        counters.dials.fetch_add(1, Ordering::Relaxed);
        let made = async {
            let (io, facts) = dial().await.map_err(|error| DialFailure::Dial(Arc::new(error)))?;
            let made =
                Client::handshake_counted(io, &self.inner.config.client, Some(counters.streams.clone()));
            let (handle, driver) = made.await.map_err(DialFailure::Handshake)?;
            Ok((handle, driver, facts))
        };
        let (handle, driver, facts) = match made.await {
            Ok(made) => made,
            Err(failure) => {
                let failure: DialFailure<E> = failure;
                counters.dial_failures.fetch_add(1, Ordering::Relaxed);
                guard.fail(failure.clone());
                return Err(failure.into());
            }
        };
        // The dialler's own place first: those who waited take the rest.
        let place = handle.reserve().ok_or(OpenError::Connect(ConnectError::Busy(0)))?;
        let link = handle.link().clone();
        let connection = guard.succeed(handle, facts);
        counters.connections.fetch_add(1, Ordering::AcqRel);
        let leave =
            drive::Leave { inner: Arc::downgrade(&self.inner), key: guard.key.clone(), id: connection.id };
        (self.inner.spawn)(Box::pin(drive::drive(driver, link, leave)));
        Ok(Lease { connection, guard: place, reused: false })
    }
}

impl Lease {
    async fn connect(self, request: TunnelRequest) -> Result<Opened, ConnectError> {
        let Self { connection, guard, reused } = self;
        let (stream, headers) = connection.handle.connect_in(guard, request).await?;
        Ok(Opened { stream, headers, facts: connection.facts.clone(), connection: connection.id, reused })
    }
}

/// Ends a dial's turn in the table, also when the dialler is cancelled.
struct DialGuard<'a, K: Hash + Eq, E> {
    inner: &'a Inner<K, E>,
    key: &'a K,
    ticket: Option<DialTicket<E>>,
}

impl<K: Hash + Eq + Clone, E> DialGuard<'_, K, E> {
    fn fail(&mut self, failure: DialFailure<E>) {
        if let Some(ticket) = self.ticket.take() {
            self.inner.table.lock().dial_ended(self.key);
            ticket.outcome.send_replace(Some(Some(failure)));
        }
    }

    fn succeed(&mut self, handle: crate::client::ClientHandle, facts: ConnectionFacts) -> Arc<Connection> {
        let ticket = self.ticket.take().expect("a dial ends once");
        let connection = Arc::new(Connection { id: ticket.id, handle, facts: Arc::new(facts) });
        self.inner.table.lock().dialled(self.key, ticket.epoch, connection.clone());
        ticket.outcome.send_replace(Some(None));
        connection
    }
}

impl<K: Hash + Eq, E> Drop for DialGuard<'_, K, E> {
    fn drop(&mut self) {
        if self.ticket.take().is_some() {
            self.inner.table.lock().dial_ended(self.key);
        }
    }
}

impl<E> Clone for DialFailure<E> {
    fn clone(&self) -> Self {
        match self {
            Self::Dial(error) => Self::Dial(error.clone()),
            Self::Handshake(error) => Self::Handshake(*error),
        }
    }
}

impl<E> From<DialFailure<E>> for OpenError<E> {
    fn from(failure: DialFailure<E>) -> Self {
        match failure {
            DialFailure::Dial(error) => Self::Dial(error),
            DialFailure::Handshake(error) => Self::Handshake(error),
        }
    }
}

impl<K, E> Clone for Pool<K, E> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<K, E> fmt::Debug for Pool<K, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            client: ClientConfig::default(),
            idle_timeout: Duration::from_secs(300),
            expiry_margin: Duration::from_secs(1),
            max_connections_per_key: 256,
            max_connections: 16_384,
            stall_grace: Duration::from_millis(250),
            max_stalled: 4,
            max_bulk: 4,
            now: SystemTime::now,
        }
    }
}
