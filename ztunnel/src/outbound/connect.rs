//! The next hop: a stream in a tunnel, or a plain connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_hbone::client::TunnelRequest;
use culvert_hbone::error::ConnectError;
use culvert_hbone::pool::{ConnectionFacts, OpenError, Pool, PoolConfig, Spawner};
use culvert_hbone::stream::TunnelStream;
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::{peer_facts, unnamed};
use culvert_identity::verify::refusal;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{Resolved, TunnelKind, TunnelRoute};
use culvert_net::socket::{DialError, DialOptions, connect};
use culvert_runtime::tasks::Tasks;
use http::StatusCode;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::gateway;
use super::handover::{self, Handover};
use crate::config::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT, PROXY_MARK};
use crate::headers;
use crate::observe::flow::{Failure, Security};
use crate::observe::{Flow, Phase};
use crate::pods::{KEEPALIVE, Pod};
use crate::tls::Expected;

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
    Pool::new(PoolConfig { idle_timeout: idle, ..PoolConfig::default() }, spawner(runtime, tasks, "tunnel"))
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
    let dialler = || dial_tunnel(pod, &key, &certificate);
    if let TunnelKind::Gateway(inner) = &route.kind {
        let network = flow.source.workload.as_ref().map_or("", |source| &*source.network);
        let headers = headers::inner(&request.headers, network);
        let request = gateway::Request {
            inner: TunnelRequest { authority: inner.authority.clone(), headers },
            outer: request,
            inner_tls: pod.tls.client(&certificate, &inner.expected.iter().cloned().collect()),
        };
        let spawn = spawner(pod.shared.workers[worker].clone(), pod.tasks.clone(), "inner tunnel");
        let (stream, peer) = gateway::open(&pod.pools[worker], &key, &dialler, request, &spawn).await?;
        flow.destination.identity = Some(peer);
        flow.mark(Phase::Handshake);
        return Ok(Hop::Tunnel(stream));
    }
    let opened = pod.pools[worker]
        .open(&key, &dialler, request)
        .await
        .map_err(|error| HopError::tunnel(error, route.peer))?;
    flow.mark(Phase::Handshake);
    Ok(Hop::Tunnel(opened.stream))
}

async fn dial_tunnel(
    pod: &Pod,
    key: &TunnelKey,
    certificate: &Arc<WorkloadCertificate>,
) -> Result<(TlsStream<crate::io::ReadAhead>, ConnectionFacts), Failure> {
    let stream = dial(pod, key.peer).await.map_err(|e| HopError::dial(&e, key.peer).failure)?;
    let connector = TlsConnector::from(pod.tls.client(certificate, &key.expected));
    let handshake = connector.connect(unnamed(), crate::io::ReadAhead::new(stream));
    let mut tls = timeout(HANDSHAKE_TIMEOUT, handshake)
        .await
        .map_err(|_| {
            Failure::new(Reason::TlsHandshake, format!("no TLS handshake with {} in 10 s", key.peer))
        })?
        .map_err(|e| tls_failure(&e, &key.peer))?;
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
    let options = DialOptions {
        mark: Some(PROXY_MARK),
        nodelay: true,
        keepalive: Some(KEEPALIVE),
        ..DialOptions::default()
    };
    connect(&pod.netns, destination, &options, CONNECT_TIMEOUT).await
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
            503 => (Reason::ConnectionRefused, "the destination does not accept connections"),
            _ => (Reason::TunnelRefused, "refused the stream"),
        };
        Self {
            failure: Failure::new(reason, format!("{peer} answered {}: {what}", status.as_u16())),
            another_may_do: status.as_u16() == 503,
        }
    }

    pub(super) fn tunnel(error: OpenError<Failure>, peer: SocketAddr) -> Self {
        match error {
            OpenError::Dial(failure) => Self { failure: Failure::clone(&failure), another_may_do: true },
            OpenError::Handshake(e) => Self {
                failure: Failure::new(Reason::Http2Handshake, format!("HTTP/2 with {peer}: {e}")),
                another_may_do: true,
            },
            OpenError::Connect(e) => Self::connect(&e, &peer),
            OpenError::Exhausted(open) => Self::last(Failure::new(
                Reason::Overloaded,
                format!("{open} tunnels of this pod are open, which is all there may be"),
            )),
            OpenError::Draining => {
                Self::last(Failure::new(Reason::Draining, "the pod's tunnels are closing"))
            }
        }
    }
}

#[cfg(test)]
#[path = "connect_tests.rs"]
mod tests;
