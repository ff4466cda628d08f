//! HTTPS for the API server.
//!
//! Bounds: [`MAX_CONNECTIONS`] connections (more wait in the listen queue), [`MAX_FROM_ONE`] of them from one address,
//! [`HANDSHAKE`] for TLS, [`MAX_HEAD_BYTES`] of request head, [`MAX_BODY_BYTES`] of body, [`MAX_STREAMS`] requests of a connection at
//! once, [`PATIENCE`] for a request in all, and [`MAX_AGE`] for a connection. Whoever reaches the port may ask; that it takes its
//! turn for each address keeps a pod from standing in the API server's way.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use culvert_identity::tls;
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::tasks::Tasks;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use kube::core::DynamicObject;
use kube::core::admission::AdmissionReview;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::judge::{self, Verdict};
use super::{Answered, Counters, Heard};
use crate::ca::{Serving, server_config};

/// Connections at once: an API server holds one or two, and there are a few of them.
const MAX_CONNECTIONS: usize = 128;
/// Those of one address.
pub(super) const MAX_FROM_ONE: usize = 8;
/// Bodies that are read or judged at once: 96 MB. As many are judged at once as there are threads, which are two; an object takes
/// about five times the bytes that it came as.
const MAX_READING: usize = 32;
/// Those of one address.
const MAX_READING_FROM_ONE: usize = 16;
const MAX_STREAMS: u32 = 16;
const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Twice the largest object that an API server stores (1.5 MB): a review holds the old one and the new one.
pub(super) const MAX_BODY_BYTES: usize = 3 * 1024 * 1024;
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Less than the webhook's `timeoutSeconds`.
const PATIENCE: Duration = Duration::from_secs(4);
/// Then the API server connects again, perhaps to another replica.
const MAX_AGE: Duration = Duration::from_secs(600);
/// After a failure to accept, such as no more file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// Streams of HTTP/2 are tasks with the same owner.
#[derive(Clone)]
struct Streams(Tasks);

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        self.0.spawn("admission stream", stream);
    }
}

/// What answers.
#[derive(Clone)]
pub(super) struct Server {
    pub heard: Heard,
    pub counters: Counters,
}

struct Shared {
    server: Server,
    reading: Semaphore,
    peers: Mutex<HashMap<IpAddr, Weak<Peer>>>,
    tasks: Tasks,
}

/// One for each address; a connection holds it.
struct Peer {
    reading: Semaphore,
}

impl Server {
    /// Serves until `drain` starts; connections that are open then answer what was asked and end.
    pub async fn run(self, port: TcpListener, serving: Arc<Serving>, tasks: Tasks, drain: DrainWatcher) {
        let mut config = (*server_config(serving)).clone();
        config.alpn_protocols = vec![tls::ALPN_H2.to_vec(), b"http/1.1".to_vec()];
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let peers = Mutex::default();
        let reading = Semaphore::new(MAX_READING);
        let shared = Arc::new(Shared { server: self, reading, peers, tasks: tasks.clone() });
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let next = async {
                let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
                port.accept().await.map(|(stream, peer)| (stream, peer, place))
            };
            let accepted = tokio::select! {
                _ = drain.started() => return,
                accepted = next => accepted,
            };
            match accepted {
                Ok((stream, peer, place)) => {
                    let Some(of) = shared.peer(peer.ip()) else {
                        tracing::debug!(%peer, "too many connections of the webhook from one address");
                        continue;
                    };
                    let (acceptor, shared, drain) = (acceptor.clone(), shared.clone(), drain.clone());
                    tasks.spawn("admission connection", async move {
                        connection(stream, peer, of, &acceptor, shared, drain).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the webhook's port cannot accept");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    of: Arc<Peer>,
    acceptor: &TlsAcceptor,
    shared: Arc<Shared>,
    drain: DrainWatcher,
) {
    let stream = match timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%peer, %error, "TLS handshake of the webhook failed"),
        Err(_) => return tracing::debug!(%peer, "TLS handshake of the webhook took too long"),
    };
    let mut builder = auto::Builder::new(Streams(shared.tasks.clone()));
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_buf_size(MAX_HEAD_BYTES)
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD_BYTES as u32)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    let service = service_fn(move |request| {
        let (shared, of) = (shared.clone(), Arc::downgrade(&of));
        async move { Ok::<_, Infallible>(shared.answer(request, &of).await) }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = async {
        tokio::select! {
            result = connection.as_mut() => return result,
            _ = drain.started() => connection.as_mut().graceful_shutdown(),
            () = sleep(MAX_AGE) => connection.as_mut().graceful_shutdown(),
        }
        connection.as_mut().await
    };
    match timeout(MAX_AGE + PATIENCE, ended).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%peer, %error, "a connection of the webhook failed"),
        Err(_) => tracing::debug!(%peer, "a connection of the webhook is too old"),
    }
}

impl Shared {
    /// `None` if the address has as many connections as it may.
    fn peer(&self, address: IpAddr) -> Option<Arc<Peer>> {
        let mut peers = self.peers.lock();
        peers.retain(|_, peer| peer.strong_count() > 0);
        let known = peers.get(&address).and_then(Weak::upgrade);
        let peer = known.unwrap_or_else(|| Arc::new(Peer { reading: Semaphore::new(MAX_READING_FROM_ONE) }));
        peers.insert(address, Arc::downgrade(&peer));
        (Arc::strong_count(&peer) <= MAX_FROM_ONE).then_some(peer)
    }

    async fn answer(&self, request: Request<Incoming>, of: &Weak<Peer>) -> Response<Full<Bytes>> {
        if request.uri().path() != "/validate" {
            return text(StatusCode::NOT_FOUND, "only /validate is here\n");
        }
        if request.method() != Method::POST {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only POST\n");
        }
        match timeout(PATIENCE, self.review(request, of)).await {
            Ok(response) => response,
            Err(_) => text(StatusCode::REQUEST_TIMEOUT, "the review came too slowly\n"),
        }
    }

    async fn review(&self, request: Request<Incoming>, of: &Weak<Peer>) -> Response<Full<Bytes>> {
        let Some(of) = of.upgrade() else {
            return text(StatusCode::SERVICE_UNAVAILABLE, "the connection ends\n");
        };
        let _turns = (of.reading.acquire().await, self.reading.acquire().await);
        let body = match Limited::new(request.into_body(), MAX_BODY_BYTES).collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) if error.is::<LengthLimitError>() => {
                let message = format!("a review is at most {MAX_BODY_BYTES} bytes\n");
                return text(StatusCode::PAYLOAD_TOO_LARGE, message);
            }
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        };
        let review: AdmissionReview<DynamicObject> = match serde_json::from_slice(&body) {
            Ok(review) => review,
            Err(error) => return text(StatusCode::BAD_REQUEST, format!("no AdmissionReview: {error}\n")),
        };
        let version = review.types.api_version.clone();
        if version != "admission.k8s.io/v1" {
            let message = format!("no AdmissionReview of admission.k8s.io/v1, but of {version:?}\n");
            return text(StatusCode::BAD_REQUEST, message);
        }
        let Some((answer, verdict)) = judge::answer(review) else {
            return text(StatusCode::BAD_REQUEST, "the AdmissionReview asks nothing\n");
        };
        let verdict = match verdict {
            Verdict::Passed => "passed",
            Verdict::Good => "good",
            Verdict::Warned => "warned",
            Verdict::Refused => "refused",
        };
        self.server.counters.0.get_or_create(&Answered { verdict }).inc();
        self.server.heard.note();
        match serde_json::to_vec(&answer) {
            Ok(body) => respond(StatusCode::OK, "application/json", body),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", body)
}

fn respond(status: StatusCode, of: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(of));
    response
}
