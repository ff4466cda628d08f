//! The way to an endpoint: a stream in a tunnel, or a plain connection.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_hbone::client::TunnelRequest;
use culvert_hbone::error::ConnectError;
use culvert_hbone::pool::{ConnectionFacts, OpenError, Pool, PoolConfig};
use culvert_hbone::stream::TunnelStream;
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::{peer_facts, unnamed};
use culvert_identity::verify::refusal;
use culvert_model::outcome::Reason;
use culvert_model::workload::TunnelProtocol;
use culvert_runtime::tasks::Tasks;
use http::HeaderMap;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::config::{CONNECT_TIMEOUT, HANDSHAKE_TIMEOUT};
use crate::endpoint::{Address, Endpoint};
use crate::io::{self, Tuned};
use crate::shared::{Failure, Shared, Worker};
use crate::tls::Expected;

/// HBONE connections of one worker. Each idle one holds about 30 KB: 16,384 hold 500 MB.
const MAX_TUNNELS: usize = 16_384;

/// The HBONE connections of one worker.
pub type TunnelPool = Pool<TunnelKey, Failure>;

/// Streams share a tunnel only if all of this is equal; the waypoint is the same for all.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TunnelKey {
    /// The other proxy.
    pub peer: SocketAddr,
    /// Who it must be.
    pub expected: Expected,
    /// The final destination: bytes for two of them never share a connection's fate.
    pub destination: SocketAddr,
}

/// A way that is open.
#[derive(Debug)]
pub enum Hop {
    /// Inside HBONE.
    Tunnel(TunnelStream),
    /// Plain TCP.
    Plain(TcpStream),
}

/// An empty pool.
pub fn tunnel_pool(runtime: Handle, tasks: Tasks, idle: Duration) -> TunnelPool {
    let spawn = Arc::new(move |driver| {
        tasks.spawn_on(&runtime, "tunnel", driver);
    });
    let config = PoolConfig { idle_timeout: idle, max_connections: MAX_TUNNELS, ..PoolConfig::default() };
    Pool::new(config, spawn)
}

/// Opens the way to an endpoint. Nothing of the client has been sent when it fails.
///
/// # Errors
/// Why not.
pub async fn open(shared: &Shared, worker: &Worker, endpoint: &Endpoint) -> Result<Hop, Failure> {
    let opened = match endpoint.tunnel() {
        Some((peer, expected)) => tunnel(shared, worker, endpoint, peer, expected).await,
        None if endpoint.workload.tunnel_protocol == TunnelProtocol::None => plain(&endpoint.address).await,
        None => {
            let detail = format!(
                "{} is spoken to in a tunnel, of a kind or to a name that is not known here",
                endpoint.workload.uid
            );
            Err(Failure::new(Reason::Unreachable, detail))
        }
    };
    match &opened {
        Ok(_) => shared.endpoints.succeeded(&endpoint.workload.uid),
        Err(_) => shared.endpoints.failed(&endpoint.workload.uid),
    }
    opened
}

async fn tunnel(
    shared: &Shared,
    worker: &Worker,
    endpoint: &Endpoint,
    peer: SocketAddr,
    expected: Expected,
) -> Result<Hop, Failure> {
    let Address::At(destination) = endpoint.address else {
        return Err(Failure::new(Reason::Internal, "a tunnel leads to an address"));
    };
    let certificate = shared.certificates.get(&shared.identity).await.map_err(|e| {
        Failure::new(Reason::NoCertificate, format!("no certificate for {}: {e}", shared.identity))
    })?;
    let key = TunnelKey { peer, expected, destination };
    let request = TunnelRequest { authority: destination.to_string(), headers: HeaderMap::new() };
    let dial = || dial_tunnel(shared, &key, &certificate);
    let opened = worker.tunnels.open(&key, &dial, request).await.map_err(|error| why(error, peer))?;
    Ok(Hop::Tunnel(opened.stream))
}

async fn dial_tunnel(
    shared: &Shared,
    key: &TunnelKey,
    certificate: &Arc<WorkloadCertificate>,
) -> Result<(TlsStream<Tuned>, ConnectionFacts), Failure> {
    let stream = dial(key.peer).await?;
    let connector = TlsConnector::from(shared.tls.client(certificate, &key.expected));
    let peer = key.peer;
    let mut tls = timeout(HANDSHAKE_TIMEOUT, connector.connect(unnamed(), io::tuned(stream)))
        .await
        .map_err(|_| Failure::new(Reason::TlsHandshake, format!("no TLS handshake with {peer} in 10 s")))?
        .map_err(|e| tls_failure(&e, &peer))?;
    let (_, connection) = tls.get_mut();
    connection.set_buffer_limit(Some(io::TLS_WRITE_BUFFER));
    let facts = peer_facts(connection)
        .map_err(|e| Failure::new(Reason::PeerIdentity, format!("certificate of {peer}: {e}")))?;
    let facts = ConnectionFacts {
        valid_until: Some(certificate.not_after().min(facts.not_after)),
        fingerprint: certificate.generation(),
        remote_addr: Some(peer),
        ..ConnectionFacts::default()
    };
    Ok((tls, facts))
}

/// What a failed handshake means.
pub fn tls_failure(error: &std::io::Error, peer: &dyn std::fmt::Display) -> Failure {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    match inner.and_then(refusal) {
        Some(refused) => {
            Failure::new(Reason::PeerIdentity, format!("{peer} is not who it must be: {refused}"))
        }
        None => Failure::new(Reason::TlsHandshake, format!("TLS with {peer}: {error}")),
    }
}

async fn plain(address: &Address) -> Result<Hop, Failure> {
    let address = match address {
        Address::At(address) => *address,
        Address::Named(name, port) => look_up(name, *port).await?,
    };
    dial(address).await.map(Hop::Plain)
}

/// A name's first address. The system's resolver bounds and spreads its own queries.
async fn look_up(name: &str, port: u16) -> Result<SocketAddr, Failure> {
    let failed = |detail: String| Failure::new(Reason::Unreachable, detail);
    let found = timeout(CONNECT_TIMEOUT, tokio::net::lookup_host((name, port)))
        .await
        .map_err(|_| failed(format!("{name} was not looked up in 10 s")))?
        .map_err(|error| failed(format!("looking {name} up: {error}")))?
        .next();
    found.ok_or_else(|| failed(format!("{name} has no address")))
}

async fn dial(address: SocketAddr) -> Result<TcpStream, Failure> {
    use std::io::ErrorKind as Kind;
    let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let hint = match address.port() {
        crate::config::HBONE_PORT => "; does a NetworkPolicy keep port 15008 closed?",
        _ => "",
    };
    let stream = connected
        .map_err(|_| {
            Failure::new(Reason::ConnectTimeout, format!("no connection to {address} in 10 s{hint}"))
        })?
        .map_err(|error| {
            let reason = match error.kind() {
                Kind::ConnectionRefused | Kind::ConnectionReset => Reason::ConnectionRefused,
                Kind::HostUnreachable | Kind::NetworkUnreachable => Reason::Unreachable,
                Kind::TimedOut => Reason::ConnectTimeout,
                _ => Reason::Internal,
            };
            Failure::new(reason, format!("connecting to {address}: {error}"))
        })?;
    // Fails only on a socket that is dead already, which the next use shows.
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Why the pool gave no stream.
fn why(error: OpenError<Failure>, peer: SocketAddr) -> Failure {
    match error {
        OpenError::Dial(failure) => Failure::clone(&failure),
        OpenError::Handshake(e) => Failure::new(Reason::Http2Handshake, format!("HTTP/2 with {peer}: {e}")),
        OpenError::Connect(ConnectError::Refused { status, .. }) => {
            let (reason, what) = match status.as_u16() {
                401 | 403 => (Reason::AuthorizationPolicy, "its policy refused us"),
                503 => (Reason::ConnectionRefused, "the destination does not accept connections"),
                _ => (Reason::TunnelRefused, "refused the stream"),
            };
            Failure::new(reason, format!("{peer} answered {}: {what}", status.as_u16()))
        }
        OpenError::Connect(e) => Failure::new(Reason::TunnelLost, format!("{peer}: {e}")),
        OpenError::Exhausted(open) => {
            Failure::new(Reason::Overloaded, format!("{open} tunnels are open, which is all there may be"))
        }
        OpenError::Draining => Failure::new(Reason::Draining, "the tunnels are closing"),
    }
}
