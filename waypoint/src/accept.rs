//! HBONE connections, and the CONNECT requests on them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_hbone::config::ServerConfig;
use culvert_hbone::server::{Incoming, Server, ServerConnection};
use culvert_identity::tls::{PeerFacts, peer_facts};
use culvert_model::outcome::Reason;
use culvert_runtime::drain::Mode;
use futures_util::FutureExt;
use http::{HeaderMap, StatusCode};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::HANDSHAKE_TIMEOUT;
use crate::connect::tls_failure;
use crate::io::{self, Tuned};
use crate::shared::{Failure, Shared, Worker};
use crate::target::{self, Target};
use crate::{detect, observe};

/// Pause after a failed accept (descriptors ran out), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A client is sent away so long before its certificate ends, or an eighth of what is left of it before if that is less: time to
/// come back with the next one.
const FAREWELL: Duration = Duration::from_secs(30);

/// Who is at the other end. What all streams of a connection share.
#[derive(Debug)]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Our side of the connection.
    pub local: SocketAddr,
    /// What its certificate says.
    pub facts: PeerFacts,
}

/// One tunnel that was asked for and that is served here.
#[derive(Clone, Debug)]
pub struct Asked {
    /// By whom.
    pub peer: Arc<Peer>,
    /// For what.
    pub target: Target,
    /// At which address: that asked for, or for a name that of the service.
    pub destination: SocketAddr,
}

/// Accepts until the drain starts.
pub async fn listen(shared: Arc<Shared>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(shared.config.max_connections));
    loop {
        let accept = async {
            // A place is taken before the accept, so the rest waits in the kernel's listen queue.
            let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
            listener.accept().await.and_then(|(stream, from)| Ok((stream.into_std()?, from, place)))
        };
        let accepted = tokio::select! {
            _ = shared.drain.started() => return,
            accepted = accept => accepted,
        };
        match accepted {
            Ok((stream, from, place)) => {
                let worker = shared.next_worker();
                let served = serve(shared.clone(), worker.clone(), stream, from);
                worker.spawn("hbone connection", served.map(move |()| drop(place)));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting an HBONE connection");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

type Connection = ServerConnection<TlsStream<Tuned>>;

/// Serves one HBONE connection.
async fn serve(shared: Arc<Shared>, worker: Arc<Worker>, stream: std::net::TcpStream, from: SocketAddr) {
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(handshake(&shared, stream, from)).await {
        Ok((connection, peer)) => streams(&shared, &worker, connection, Arc::new(peer)).await,
        Err(failure) => observe::refused(&shared.metrics, from, None, "", &failure),
    }
}

async fn handshake(
    shared: &Shared,
    stream: TcpStream,
    from: SocketAddr,
) -> Result<(Connection, Peer), Failure> {
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().map_err(|e| Failure::new(Reason::ClientReset, e.to_string()))?;
    let certificate = shared.certificates.get(&shared.identity).await.map_err(|e| {
        Failure::new(Reason::NoCertificate, format!("no certificate for {}: {e}", shared.identity))
    })?;
    let end = Instant::now() + HANDSHAKE_TIMEOUT;
    let late = |reason| Failure::new(reason, "no TLS and HTTP/2 handshake in 10 s");
    let acceptor = TlsAcceptor::from(shared.tls.server(&certificate));
    let mut tls = timeout_at(end, acceptor.accept(io::tuned(stream)))
        .await
        .map_err(|_| late(Reason::TlsHandshake))?
        .map_err(|e| tls_failure(&e, &from))?;
    let (_, connection) = tls.get_mut();
    connection.set_buffer_limit(Some(io::TLS_WRITE_BUFFER));
    let facts = peer_facts(connection)
        .map_err(|e| Failure::new(Reason::PeerIdentity, format!("the client's certificate: {e}")))?;
    let connection = timeout_at(end, Server::handshake(tls, &ServerConfig::default()))
        .await
        .map_err(|_| late(Reason::Http2Handshake))?
        .map_err(|e| Failure::new(Reason::Http2Handshake, e.to_string()))?;
    let canonical = culvert_net::socket::canonical;
    Ok((connection, Peer { address: canonical(from), local: canonical(local), facts }))
}

/// Accepts streams until the connection ends. A drain, or the coming end of the client's certificate, says goodbye (GOAWAY) and
/// lets open streams finish.
async fn streams(shared: &Arc<Shared>, worker: &Arc<Worker>, mut connection: Connection, peer: Arc<Peer>) {
    let drain = shared.drain.clone();
    let (mut draining, mut left) = (false, false);
    let mut farewell = std::pin::pin!(sleep(until_farewell(peer.facts.not_after, SystemTime::now())));
    loop {
        let incoming = tokio::select! {
            incoming = connection.accept() => incoming,
            mode = drain.started(), if !draining => {
                draining = true;
                match mode {
                    Mode::Graceful => connection.graceful_shutdown(),
                    Mode::Immediate => return,
                }
                continue;
            }
            () = drain.forced() => return,
            () = &mut farewell, if !left => {
                left = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        match incoming {
            Some(Ok(incoming)) => {
                let Ok(place) = shared.tunnels.clone().try_acquire_owned() else {
                    // As a destination that refuses: the client's proxy may try another waypoint.
                    let _ = incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
                    shared.metrics.refused(Reason::Overloaded);
                    continue;
                };
                let served = stream(shared.clone(), worker.clone(), peer.clone(), incoming);
                worker.spawn("stream", served.map(move |()| drop(place)));
            }
            Some(Err(cause)) => {
                tracing::debug!(peer = %peer.address, %cause, "an HBONE connection was lost");
                return;
            }
            None => return,
        }
    }
}

/// Serves one CONNECT request.
async fn stream(shared: Arc<Shared>, worker: Arc<Worker>, peer: Arc<Peer>, incoming: Incoming) {
    // Held until it is over: a drain waits for what was accepted.
    let _watcher = shared.drain.clone();
    let authority = incoming.authority.clone();
    match asked(&shared, &peer, &incoming) {
        Ok(asked) => detect::serve(shared, worker, asked, incoming).await,
        Err((status, failure)) => {
            let _ = incoming.refuse(status, HeaderMap::new());
            let who = Some(&peer.facts.identity);
            observe::refused(&shared.metrics, peer.address, who, &authority, &failure);
        }
    }
}

/// What is asked for, or what to answer instead (Z20).
fn asked(shared: &Shared, peer: &Arc<Peer>, incoming: &Incoming) -> Result<Asked, (StatusCode, Failure)> {
    let (host, port) = incoming
        .validate_connect()
        .map_err(|e| (StatusCode::BAD_REQUEST, Failure::new(Reason::BadRequest, e.to_string())))?;
    if peer.facts.not_after <= SystemTime::now() {
        let failure =
            Failure::new(Reason::PeerIdentity, "the client's certificate has expired since its handshake");
        return Err((StatusCode::UNAUTHORIZED, failure));
    }
    let world = shared.state.load();
    let namespace = peer.facts.identity.namespace();
    let target = target::find(shared, &world.snapshot, (host, port), namespace)
        .map_err(|failure| (StatusCode::BAD_REQUEST, failure))?;
    let by_name = || target.service().and_then(|service| Some(service.addresses.first()?.prefix.addr()));
    let address = host.parse().ok().or_else(by_name).unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let destination = SocketAddr::new(address, port);
    Ok(Asked { peer: peer.clone(), target, destination })
}

/// How long a client whose certificate ends then may open streams.
fn until_farewell(not_after: SystemTime, now: SystemTime) -> Duration {
    let left = not_after.duration_since(now).unwrap_or_default();
    left - FAREWELL.min(left / 8)
}
