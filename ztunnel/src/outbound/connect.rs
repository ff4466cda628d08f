//! The next hop: a stream in a tunnel, or a plain connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use culvert_hbone::client::TunnelRequest;
use culvert_hbone::error::{ConnectError, HandshakeError};
use culvert_hbone::pool::{ConnectionFacts, OpenError, Pool, PoolConfig, Spawner};
use culvert_hbone::stream::TunnelStream;
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::{peer_facts, unnamed};
use culvert_identity::verify::refusal;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{Resolved, TunnelKind, TunnelRoute};
use culvert_net::socket::{DialError, connect};
use culvert_runtime::tasks::Tasks;
use http::StatusCode;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::gateway;
use super::handover::{self, Handover};
use crate::config::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT};
use crate::headers;
use crate::observe::flow::{Failure, Security};
use crate::observe::limits::Limit;
use crate::observe::{Flow, Phase};
use crate::pods::Pod;
use crate::tls::Expected;

/// Connections of one pool. Each idle one holds about 30 KB: 16,384 hold 500 MB.
pub const MAX_TUNNELS: usize = 16_384;

/// A pod's tunnels on one worker.
pub type TunnelPool = Pool<TunnelKey, Failure>;

/// Streams share a tunnel only if all of this is equal; the source pod and its identity are the pool's own (Z21).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The other proxy.
    pub peer: SocketAddr,
    /// Who it must be.
    pub expected: Expected,
    /// The final destination: bytes for two of them never share a connection's fate.
    pub destination: SocketAddr,
}

/// The way onwards.
#[derive(Debug)]
pub enum Hop {
    /// Inside HBONE.
    Tunnel(TunnelStream),
    /// Plain TCP.
    Plain(TcpStream),
    /// To another pod of this node, in this process.
    Handover(Box<Handover>),
}

/// Why a hop could not be opened.
#[derive(Debug)]
pub struct HopError {
    /// The reason, for the log.
    pub failure: Failure,
    /// Nothing was sent, and another endpoint of the service might answer.
    pub another_may_do: bool,
}

/// The tunnels of one pod on one worker.
pub fn pool(runtime: Handle, tasks: Tasks, idle: Duration) -> TunnelPool {
    Pool::new(
        PoolConfig { idle_timeout: idle, max_connections: MAX_TUNNELS, ..PoolConfig::default() },
        spawner(runtime, tasks, "tunnel"),
    )
}

/// Runs connections on a worker, as tasks of the pod.
fn spawner(runtime: Handle, tasks: Tasks, name: &'static str) -> Spawner {
    Arc::new(move |driver| {
        tasks.spawn_on(&runtime, name, driver);
    })
}

/// Opens the hop that was decided on.
pub async fn open(
    pod: &Arc<Pod>,
    worker: usize,
    resolved: &Resolved,
    flow: &mut Flow,
) -> Result<Hop, HopError> {
    match resolved {
        Resolved::Passthrough { destination } | Resolved::Plain { destination, .. } => {
            plain(pod, *destination, flow).await
        }
        Resolved::Tunnel(route) => tunnel(pod, worker, route, flow).await,
        // What is decided has an address by now: `accept` looked it up.
        Resolved::NeedsDns(needed) => Err(HopError::last(Failure::new(
            Reason::Internal,
            format!("{} was not looked up", needed.hostname),
        ))),
    }
}

async fn plain(pod: &Pod, destination: SocketAddr, flow: &mut Flow) -> Result<Hop, HopError> {
    let stream = dial(pod, destination).await.map_err(|e| HopError::dial(&e, destination))?;
    flow.mark(Phase::Connect);
    Ok(Hop::Plain(stream))
}

async fn tunnel(
    pod: &Arc<Pod>,
    worker: usize,
    route: &TunnelRoute,
    flow: &mut Flow,
) -> Result<Hop, HopError> {
    let certificate = pod.shared.certificates.get(&pod.identity).await.map_err(|e| {
        HopError::last(Failure::new(
            Reason::NoCertificate,
            format!("no certificate for {}: {e}", pod.identity),
        ))
    })?;
    flow.mark(Phase::Certificate);
    match handover::destination(pod, route, flow) {
        Ok(there) => {
            let handed = handover::open(pod, there, route, &certificate, flow).await?;
            return Ok(Hop::Handover(Box::new(handed)));
        }
        Err(why) => tracing::debug!(pod = %pod.workload_uid, %why, "through a tunnel"),
    }
    flow.security = Security::MutualTls;
    flow.destination.identity = route.expected.first().cloned();
    let key = TunnelKey {
        peer: route.peer,
        expected: route.expected.iter().cloned().collect(),
        destination: route.target,
    };
    let request = TunnelRequest { authority: route.authority.clone(), headers: headers::request(flow) };
    let times = DialTimes::new(flow);
    let dialler = || dial_tunnel(pod, &key, &certificate, &times);
    if let TunnelKind::Gateway(inner) = &route.kind {
        let network = flow.source.workload.as_ref().map_or("", |source| &*source.network);
        let headers = headers::inner(&request.headers, network);
        let request = gateway::Request {
            inner: TunnelRequest { authority: inner.authority.clone(), headers },
            outer: request,
            inner_tls: pod.tls.client(&certificate, &inner.expected.iter().cloned().collect()),
        };
        let spawn = spawner(pod.shared.workers[worker].clone(), pod.tasks.clone(), "inner tunnel");
        let opened = gateway::open(&pod.pools[worker], &key, &dialler, request, &spawn).await;
        times.write(flow);
        let (stream, peer) = opened?;
        flow.destination.identity = Some(peer);
        flow.mark(Phase::Handshake);
        return Ok(Hop::Tunnel(stream));
    }
    let opened = pod.pools[worker].open(&key, &dialler, request).await;
    // Also when it failed: where the time went is what is asked then.
    times.write(flow);
    let opened = opened.map_err(|error| HopError::tunnel(error, route.peer))?;
    Ok(Hop::Tunnel(opened.stream))
}

/// When the phases of a dial ended, noted from inside the pool, which knows nothing of flows. Nothing is noted where the tunnel stood
/// before, or another connection dialled it.
#[derive(Debug)]
struct DialTimes {
    /// How old the flow was at `begun`.
    flow: Duration,
    begun: Instant,
    /// Microseconds since `begun`; 0 is never.
    connect: AtomicU32,
    handshake: AtomicU32,
}

impl DialTimes {
    fn new(flow: &Flow) -> Self {
        let never = || AtomicU32::new(0);
        Self { flow: flow.elapsed(), begun: Instant::now(), connect: never(), handshake: never() }
    }

    fn note(&self, phase: &AtomicU32) {
        let micros = u32::try_from(self.begun.elapsed().as_micros()).unwrap_or(u32::MAX);
        phase.store(micros.max(1), Ordering::Relaxed);
    }

    fn write(&self, flow: &mut Flow) {
        for (phase, noted) in [(Phase::Connect, &self.connect), (Phase::Handshake, &self.handshake)] {
            let micros = noted.load(Ordering::Relaxed);
            if micros > 0 {
                flow.mark_at(phase, self.flow + Duration::from_micros(micros.into()));
            }
        }
    }
}

async fn dial_tunnel(
    pod: &Pod,
    key: &TunnelKey,
    certificate: &Arc<WorkloadCertificate>,
    times: &DialTimes,
) -> Result<(TlsStream<crate::io::ReadAhead>, ConnectionFacts), Failure> {
    let stream = dial(pod, key.peer).await.map_err(|e| HopError::dial(&e, key.peer).failure)?;
    times.note(&times.connect);
    let connector = TlsConnector::from(pod.tls.client(certificate, &key.expected));
    let handshake = connector.connect(unnamed(), crate::io::ReadAhead::new(stream));
    let mut tls = timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| {
            Failure::new(Reason::TlsHandshake, format!("no TLS handshake with {} in 10 s", key.peer))
                .beyond(Limit::HandshakeTime)
        })?
        .map_err(|e| tls_failure(&e, &key.peer))?;
    times.note(&times.handshake);
    let (_, connection) = tls.get_mut();
    connection.set_buffer_limit(Some(crate::io::TLS_WRITE_BUFFER));
    let peer = peer_facts(connection)
        .map_err(|e| Failure::new(Reason::PeerIdentity, format!("certificate of {}: {e}", key.peer)))?;
    let facts = ConnectionFacts {
        valid_until: Some(certificate.not_after().min(peer.not_after)),
        fingerprint: certificate.generation(),
        remote_addr: Some(key.peer),
        ..ConnectionFacts::default()
    };
    Ok((tls, facts))
}

async fn dial(pod: &Pod, destination: SocketAddr) -> Result<TcpStream, DialError> {
    connect(&pod.netns, destination, &pod.dial_options(), CONNECT_TIMEOUT).await
}

pub(super) fn tls_failure(error: &std::io::Error, peer: &dyn std::fmt::Display) -> Failure {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner.and_then(refusal) {
        Some(refused) => {
            Failure::new(Reason::PeerIdentity, format!("{peer} is not who it must be: {refused}"))
        }
        None => Failure::new(Reason::TlsHandshake, format!("TLS with {peer}: {error}")),
    }
}

impl HopError {
    /// Trying another endpoint would not help, or might do something twice.
    pub(super) fn last(failure: Failure) -> Self {
        Self { failure, another_may_do: false }
    }

    /// Nobody has been sent anything.
    pub(super) fn before_sending(failure: Failure) -> Self {
        Self { failure, another_may_do: true }
    }

    fn dial(error: &DialError, to: SocketAddr) -> Self {
        let (reason, hint) = match error {
            DialError::Refused(..) => (Reason::ConnectionRefused, ""),
            DialError::Unreachable(..) => (Reason::Unreachable, ""),
            // Z25: the usual cause, said where it is met.
            DialError::TimedOut(..) if to.port() == crate::config::HBONE_PORT => {
                (Reason::ConnectTimeout, "; does a NetworkPolicy keep port 15008 closed?")
            }
            DialError::TimedOut(..) => (Reason::ConnectTimeout, ""),
            DialError::Exhausted(..) => {
                let failure = Failure::new(Reason::Overloaded, error.to_string());
                return Self::last(failure.beyond(Limit::Descriptors));
            }
            DialError::Other(..) => (Reason::Internal, ""),
        };
        Self { failure: Failure::new(reason, format!("{error}{hint}")), another_may_do: true }
    }

    /// Why a peer gave no stream (Z20).
    pub(super) fn connect(error: &ConnectError, peer: &dyn std::fmt::Display) -> Self {
        let ConnectError::Refused { status, .. } = error else {
            let failure = Failure::new(Reason::TunnelLost, format!("{peer}: {error}"));
            return Self { failure, another_may_do: error.is_unprocessed() };
        };
        Self::answered(*status, peer)
    }

    /// What the destination's side said instead of 200 (Z20).
    pub(super) fn answered(status: StatusCode, peer: &dyn std::fmt::Display) -> Self {
        let (reason, what) = match status.as_u16() {
            400 => (Reason::TunnelRefused, "does not serve this destination"),
            401 | 403 => (Reason::AuthorizationPolicy, "its policy refused us"),
            431 => (Reason::TunnelRefused, "our headers are too large for it"),
            503 => (Reason::ConnectionRefused, "the destination does not accept connections"),
            _ => (Reason::TunnelRefused, "refused the stream"),
        };
        let failure = Failure::new(reason, format!("{peer} answered {}: {what}", status.as_u16()));
        Self {
            failure: if status.as_u16() == 431 { failure.beyond(Limit::Headers) } else { failure },
            another_may_do: status.as_u16() == 503,
        }
    }

    pub(super) fn tunnel(error: OpenError<Failure>, peer: SocketAddr) -> Self {
        match error {
            OpenError::Dial(failure) => Self { failure: Failure::clone(&failure), another_may_do: true },
            OpenError::Handshake(e) => {
                let failure = Failure::new(Reason::Http2Handshake, format!("HTTP/2 with {peer}: {e}"));
                Self::before_sending(match e {
                    HandshakeError::Timeout(_) => failure.beyond(Limit::HandshakeTime),
                    HandshakeError::Lost(_) => failure,
                })
            }
            OpenError::Connect(e) => Self::connect(&e, &peer),
            OpenError::Exhausted(open) => {
                let detail = format!("{open} tunnels of this pod are open, which is all there may be");
                Self::last(Failure::new(Reason::Overloaded, detail).beyond(Limit::Tunnels))
            }
            OpenError::Draining => {
                Self::last(Failure::new(Reason::Draining, "the pod's tunnels are closing"))
            }
        }
    }
}

#[cfg(test)]
#[path = "connect_tests.rs"]
mod tests;
