//! An HBONE connection: its handshakes, then its streams, until either side is done with it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_hbone::config::ServerConfig;
use culvert_hbone::server::{Incoming, Server, ServerConnection};
use culvert_identity::tls::{PeerFacts, peer_facts};
use culvert_identity::verify::refusal;
use culvert_model::outcome::Reason;
use culvert_net::socket::arm_reset;
use culvert_runtime::drain::Mode;
use futures_util::FutureExt;
use http::{HeaderMap, StatusCode};
use tokio::net::TcpStream;
use tokio::time::{Instant, interval_at, sleep, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::deliver;
use crate::config::HANDSHAKE_TIMEOUT;
use crate::io::{ReadAhead, TLS_WRITE_BUFFER};
use crate::observe::flow::{End, Failure, Security};
use crate::observe::limits::Limit;
use crate::observe::{Direction, Flow, Phase};
use crate::pods::{Pod, adopt};

/// Who is at the other end. What all streams of a connection share.
#[derive(Debug)]
pub struct Peer {
    /// Its address, as the pod sees it.
    pub address: SocketAddr,
    /// Our side of the connection: the pod's address and port 15008.
    pub local: SocketAddr,
    /// What its certificate says.
    pub facts: PeerFacts,
}

/// A client is sent away so long before its certificate ends, or an eighth of what is left of it before if that is less: time to
/// come back with the next one.
const FAREWELL: Duration = Duration::from_secs(30);

/// Serves one HBONE connection.
pub async fn serve(pod: Arc<Pod>, _worker: usize, stream: std::net::TcpStream, from: SocketAddr) {
    let accepted = SystemTime::now();
    let Ok((stream, local)) = adopt(stream) else { return };
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(handshake(&pod, stream, from, local)).await {
        Ok((connection, peer)) => streams(&pod, connection, Arc::new(peer)).await,
        Err(failure) => {
            let mut flow = Flow::new(Direction::Inbound, from, local);
            flow.accepted_at = accepted;
            flow.mark(Phase::Accept);
            pod.shared.observer.begin(flow).finish(End::Failed(failure));
        }
    }
}

type Connection = ServerConnection<TlsStream<ReadAhead>>;

async fn handshake(
    pod: &Pod,
    stream: TcpStream,
    from: SocketAddr,
    local: SocketAddr,
) -> Result<(Connection, Peer), Failure> {
    let certificate = pod.shared.certificates.get(&pod.identity).await.map_err(|e| {
        let _ = arm_reset(&stream);
        Failure::new(Reason::NoCertificate, format!("no certificate for {}: {e}", pod.identity))
    })?;
    let end = Instant::now() + HANDSHAKE_TIMEOUT;
    let late =
        |reason| Failure::new(reason, "no TLS and HTTP/2 handshake in 10 s").beyond(Limit::HandshakeTime);
    let acceptor = TlsAcceptor::from(pod.tls.server(&certificate));
    let mut tls = timeout_at(end, acceptor.accept(ReadAhead::new(stream)))
        .await
        .map_err(|_| late(Reason::TlsHandshake))?
        .map_err(|e| tls_failure(&e))?;
    let (_, connection) = tls.get_mut();
    connection.set_buffer_limit(Some(TLS_WRITE_BUFFER));
    let facts = peer_facts(connection)
        .map_err(|e| Failure::new(Reason::PeerIdentity, format!("the client's certificate: {e}")))?;
    let connection = timeout_at(end, Server::handshake(tls, &ServerConfig::default()))
        .await
        .map_err(|_| late(Reason::Http2Handshake))?
        .map_err(|e| Failure::new(Reason::Http2Handshake, e.to_string()))?;
    Ok((connection, Peer { address: from, local, facts }))
}

/// Accepts streams until the connection ends; a drain, or a long time without a stream, says goodbye (GOAWAY) and lets open
/// streams finish.
///
/// So does the coming end of the client's certificate: some keep a tunnel for as long as it works, and their new streams on this
/// one would all be refused from then on.
async fn streams(pod: &Arc<Pod>, mut connection: Connection, peer: Arc<Peer>) {
    let _counted = pod.shared.observer.metrics.tunnel_accepted();
    let drain = pod.watcher();
    let mut draining = false;
    let mut farewell = std::pin::pin!(sleep(until_farewell(peer.facts.not_after, SystemTime::now())));
    let mut left = false;
    // A peer keeps a tunnel without streams for its own idle time, which is ours if it is our kind: after twice that it has
    // forgotten it.
    let period = (2 * pod.shared.config.pool_idle).max(Duration::from_secs(1));
    let mut look = interval_at(Instant::now() + period, period);
    let mut used = true;
    loop {
        let incoming = tokio::select! {
            incoming = connection.accept() => incoming,
            _ = look.tick(), if !draining => {
                if !used && connection.streams() == 0 {
                    draining = true;
                    pod.shared.observer.metrics.limits.reached(Limit::IdleTime);
                    connection.graceful_shutdown();
                }
                used = connection.streams() > 0;
                continue;
            }
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
                used = true;
                begin(pod, &peer, connection.streams(), incoming);
            }
            Some(Err(cause)) => {
                tracing::debug!(pod = %pod.workload_uid, peer = %peer.address, %cause, "an HBONE connection was lost");
                return;
            }
            None => return,
        }
    }
}

/// Has the stream served, if there is a place for it; it is the `open`th of its connection.
fn begin(pod: &Arc<Pod>, peer: &Arc<Peer>, open: usize, incoming: Incoming) {
    if open >= ServerConfig::default().max_concurrent_streams as usize {
        pod.shared.observer.metrics.limits.reached(Limit::Streams);
    }
    let place = match pod.place() {
        Ok(place) => place,
        Err(failure) => {
            // As a destination that refuses (Z20): the client's proxy tries another endpoint.
            let _ = incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
            let mut flow = Flow::new(Direction::Inbound, peer.address, peer.local);
            flow.source.identity = Some(peer.facts.identity.clone());
            flow.security = Security::MutualTls;
            return pod.refuse(flow, failure);
        }
    };
    let served = deliver::serve(pod.clone(), peer.clone(), incoming);
    pod.tasks.spawn("inbound stream", served.map(move |()| drop(place)));
}

/// How long a client whose certificate ends then may open streams.
fn until_farewell(not_after: SystemTime, now: SystemTime) -> Duration {
    let left = not_after.duration_since(now).unwrap_or_default();
    left - FAREWELL.min(left / 8)
}

fn tls_failure(error: &std::io::Error) -> Failure {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner.and_then(refusal) {
        Some(refused) => Failure::new(Reason::PeerIdentity, format!("the client's certificate: {refused}")),
        None => Failure::new(Reason::TlsHandshake, format!("TLS: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_sent_away_before_its_certificate_ends() {
        let now = SystemTime::now();
        let after = |seconds| until_farewell(now + Duration::from_secs(seconds), now);
        assert_eq!(after(24 * 60 * 60), Duration::from_secs(24 * 60 * 60 - 30));
        assert_eq!(after(80), Duration::from_secs(70));
        assert_eq!(until_farewell(now - Duration::from_secs(1), now), Duration::ZERO);
    }
}
