//! HTTP connections to endpoints, kept for the next request: of HTTP/1 each serves one request at a time, of HTTP/2 many.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use culvert_hbone::io::TunnelIo;
use culvert_model::Str;
use culvert_model::outcome::Reason;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout};

use super::Spawner;
use super::body::Body;
use crate::config::HANDSHAKE_TIMEOUT;
use crate::connect::{self, Hop};
use crate::endpoint::{Address, Endpoint};
use crate::shared::{Failure, Shared, Worker};
use crate::tls::Expected;

/// Idle connections that are kept for one endpoint by one worker: what 64 clients at once leave behind.
const MAX_IDLE: usize = 64;
/// Requests on one HTTP/2 connection at once, as in a tunnel. With more, another connection is made.
const MAX_STREAMS: usize = 100;
/// Longest head of a response.
const MAX_HEAD: usize = 64 << 10;

/// Connections of one worker, by endpoint.
pub struct ClientPool {
    idle: Duration,
    table: Mutex<HashMap<Key, Slot>>,
}

/// Requests share a connection only if all of this is equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Key {
    uid: Str,
    address: Address,
    /// How it is reached and who must be there: a connection made otherwise is another's, also when it is given back late.
    tunnel: Option<(SocketAddr, Expected)>,
    http2: bool,
}

#[derive(Default)]
struct Slot {
    http1: Vec<(http1::SendRequest<Body>, Instant)>,
    http2: Vec<Shared2>,
    /// One connection is made at a time: those who wait for it share it, or that it failed and when.
    dialling: Arc<tokio::sync::Mutex<Option<(Instant, Failure)>>>,
}

#[derive(Clone)]
struct Shared2 {
    sender: http2::SendRequest<Body>,
    streams: Arc<AtomicUsize>,
    used: Arc<Mutex<Instant>>,
}

/// A place on a connection, for one request.
pub struct Lease {
    key: Key,
    kind: Kind,
    /// It served another request before.
    pub reused: bool,
}

enum Kind {
    Http1(http1::SendRequest<Body>),
    Http2(Shared2, Counted),
}

/// A stream that counts until dropped.
struct Counted(Arc<AtomicUsize>);

/// Gives an HTTP/1 connection back once its response has been read.
pub struct GiveBack {
    inner: Option<(Key, http1::SendRequest<Body>)>,
    _counted: Option<Counted>,
}

/// A request that got no response.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub error: hyper::Error,
    /// The request, if certainly nothing of it was sent.
    pub unsent: Option<Request<Body>>,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl ClientPool {
    /// Empty. Unused connections are closed after `idle`.
    pub fn new(idle: Duration) -> Self {
        Self { idle, table: Mutex::default() }
    }

    /// Connections to these addresses serve no new requests.
    pub fn evict(&self, stale: &HashSet<IpAddr>) {
        self.table.lock().retain(|key, _| match &key.address {
            Address::At(address) => !stale.contains(&address.ip()),
            Address::Named(..) => true,
        });
    }

    /// Closes what was not used for too long.
    pub fn sweep(&self) {
        let now = Instant::now();
        let fresh = |since: Instant| now.duration_since(since) < self.idle;
        self.table.lock().retain(|_, slot| {
            slot.http1.retain(|(sender, since)| !sender.is_closed() && fresh(*since));
            slot.http2.retain(|it| {
                !it.sender.is_closed() && (it.streams.load(Ordering::Relaxed) > 0 || fresh(*it.used.lock()))
            });
            // A slot that somebody dials for is theirs.
            !slot.http1.is_empty() || !slot.http2.is_empty() || Arc::strong_count(&slot.dialling) > 1
        });
    }

    /// How long a connection may be unused.
    pub fn idle(&self) -> Duration {
        self.idle
    }

    fn idle_one(&self, key: &Key) -> Option<Lease> {
        let mut table = self.table.lock();
        let slot = table.get_mut(key)?;
        if key.http2 {
            slot.http2.retain(|it| !it.sender.is_closed());
            let found =
                slot.http2.iter().find(|it| it.streams.load(Ordering::Relaxed) < MAX_STREAMS)?.clone();
            return Some(Lease::http2(key.clone(), found, true));
        }
        // The one used last: the others may become old. One that is not ready has not been told yet that it is.
        slot.http1.retain(|(sender, _)| !sender.is_closed());
        let at = slot.http1.iter().rposition(|(sender, _)| sender.is_ready())?;
        let (sender, _) = slot.http1.remove(at);
        Some(Lease { key: key.clone(), kind: Kind::Http1(sender), reused: true })
    }

    fn put(&self, key: Key, sender: http1::SendRequest<Body>) {
        let mut table = self.table.lock();
        let slot = table.entry(key).or_default();
        if slot.http1.len() >= MAX_IDLE {
            slot.http1.remove(0);
        }
        slot.http1.push((sender, Instant::now()));
    }

    fn put2(&self, key: Key, shared: Shared2) {
        self.table.lock().entry(key).or_default().http2.push(shared);
    }
}

/// A place on a connection to an endpoint: one that stands, or a new one. `fresh`: only a new one will do.
///
/// # Errors
/// None could be made; nothing was sent.
pub async fn lease(
    shared: &Shared,
    worker: &Worker,
    endpoint: &Endpoint,
    http2: bool,
    fresh: bool,
) -> Result<Lease, Failure> {
    let pool = &worker.clients;
    let (uid, address) = (endpoint.workload.uid.clone(), endpoint.address.clone());
    let key = Key { uid, address, tunnel: endpoint.tunnel(), http2 };
    if !fresh && let Some(lease) = pool.idle_one(&key) {
        return Ok(lease);
    }
    if !http2 {
        let io = open(shared, worker, endpoint).await?;
        return Ok(Lease { kind: Kind::Http1(handshake1(worker, io).await?), key, reused: false });
    }
    let dialling = pool.table.lock().entry(key.clone()).or_default().dialling.clone();
    let queued = Instant::now();
    let mut last = dialling.lock().await;
    if !fresh && let Some(lease) = pool.idle_one(&key) {
        return Ok(lease);
    }
    if let Some((_, failure)) = last.as_ref().filter(|(at, _)| *at > queued) {
        return Err(failure.clone());
    }
    let made = async { handshake2(worker, open(shared, worker, endpoint).await?).await }.await;
    *last = made.as_ref().err().map(|failure| (Instant::now(), failure.clone()));
    let made = made?;
    pool.put2(key.clone(), made.clone());
    Ok(Lease::http2(key, made, false))
}

async fn open(shared: &Shared, worker: &Worker, endpoint: &Endpoint) -> Result<Box<dyn Io>, Failure> {
    Ok(match connect::open(shared, worker, endpoint).await? {
        Hop::Tunnel(stream) => Box::new(TunnelIo::new(stream)),
        Hop::Plain(stream) => Box::new(stream),
    })
}

async fn handshake1(worker: &Worker, io: Box<dyn Io>) -> Result<http1::SendRequest<Body>, Failure> {
    let made = http1::Builder::new().max_buf_size(MAX_HEAD).handshake(TokioIo::new(io));
    let (sender, connection) = made.await.map_err(|error| failed(&error))?;
    worker.spawn("http/1 client", async move {
        let _ = connection.with_upgrades().await;
    });
    Ok(sender)
}

async fn handshake2(worker: &Worker, io: Box<dyn Io>) -> Result<Shared2, Failure> {
    let mut builder = http2::Builder::new(Spawner(worker.tasks.clone()));
    builder
        .timer(TokioTimer::new())
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(4 << 20)
        .max_header_list_size(64 << 10)
        .max_send_buf_size(64 << 10)
        .keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(20));
    let (sender, connection) = timeout(HANDSHAKE_TIMEOUT, builder.handshake(TokioIo::new(io)))
        .await
        .map_err(|_| {
            Failure::new(Reason::Http2Handshake, "no HTTP/2 handshake with the application in 10 s")
        })?
        .map_err(|error| failed(&error))?;
    worker.spawn("http/2 client", async move {
        let _ = connection.await;
    });
    Ok(Shared2 { sender, streams: Arc::default(), used: Arc::new(Mutex::new(Instant::now())) })
}

fn failed(error: &hyper::Error) -> Failure {
    Failure::new(
        Reason::UpstreamReset,
        format!("the application's side did not take the connection: {error}"),
    )
}

impl Lease {
    fn http2(key: Key, shared: Shared2, reused: bool) -> Self {
        shared.streams.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(shared.streams.clone());
        Self { key, kind: Kind::Http2(shared, counted), reused }
    }

    /// Whether it is HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.key.http2
    }

    /// Sends a request; returns its response, and what is to be held until that has been read.
    ///
    /// # Errors
    /// There is no response.
    pub async fn send(self, request: Request<Body>) -> Result<(Response<Incoming>, GiveBack), Unanswered> {
        let unanswered = |mut error: hyper::client::conn::TrySendError<Request<Body>>| Unanswered {
            unsent: error.take_message(),
            error: error.into_error(),
        };
        match self.kind {
            Kind::Http1(mut sender) => {
                let response = sender.try_send_request(request).await.map_err(unanswered)?;
                Ok((response, GiveBack { inner: Some((self.key, sender)), _counted: None }))
            }
            Kind::Http2(shared, counted) => {
                *shared.used.lock() = Instant::now();
                let mut sender = shared.sender.clone();
                let response = sender.try_send_request(request).await.map_err(unanswered)?;
                Ok((response, GiveBack { inner: None, _counted: Some(counted) }))
            }
        }
    }
}

impl GiveBack {
    /// The response has been read whole: the connection may serve another request.
    pub fn give_back(mut self, worker: &Arc<Worker>) {
        let Some((key, mut sender)) = self.inner.take() else { return };
        if sender.is_ready() {
            return worker.clients.put(key, sender);
        }
        let pool = worker.clients.clone();
        worker.spawn("give back", async move {
            if sender.ready().await.is_ok() {
                pool.put(key, sender);
            }
        });
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
