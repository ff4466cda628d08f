//! A tunnel inside a tunnel, to a service on another network (Z26, Z40).
//!
//! The outer tunnel ends at that network's gateway, which chooses an endpoint without seeing a byte of the application; it is
//! pooled like any other. The inner one ends at the endpoint, is made for one connection, and never shared: each may end
//! somewhere else.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_hbone::client::{Client, TunnelRequest};
use culvert_hbone::config::ClientConfig;
use culvert_hbone::io::TunnelIo;
use culvert_hbone::pool::{ConnectionFacts, Spawner};
use culvert_hbone::stream::TunnelStream;
use culvert_identity::tls::{peer_facts, unnamed};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::connect::{HopError, TunnelKey, TunnelPool, tls_failure};
use crate::config::HANDSHAKE_TIMEOUT;
use crate::io::TLS_WRITE_BUFFER;
use crate::observe::flow::Failure;
use crate::observe::limits::Limit;

/// Settings of an inner connection: it carries one stream.
fn config() -> ClientConfig {
    ClientConfig { max_streams: 1, ..ClientConfig::default() }
}

/// What is asked of whom.
pub struct Request {
    /// Of the gateway.
    pub outer: TunnelRequest,
    /// Of the endpoint.
    pub inner: TunnelRequest,
    /// With this the endpoint proves to be one of those that the service names.
    pub inner_tls: Arc<rustls::ClientConfig>,
}

/// Opens a stream to the gateway, and through it one to an endpoint; returns who that proved to be.
///
/// # Errors
/// Why not. What failed behind the gateway is not tried elsewhere: the gateway balances, and another one would choose from
/// the same endpoints.
pub async fn open<IO, D, F>(
    pool: &TunnelPool,
    key: &TunnelKey,
    dial: &D,
    request: Request,
    spawn: &Spawner,
) -> Result<(TunnelStream, Identity), HopError>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    D: Fn() -> F,
    F: Future<Output = Result<(IO, ConnectionFacts), Failure>>,
{
    let Request { outer, inner, inner_tls } = request;
    let opened = pool.open(key, dial, outer).await.map_err(|error| HopError::tunnel(error, key.peer))?;
    through(TunnelIo::new(opened.stream), inner_tls, inner, key.peer, spawn).await.map_err(HopError::last)
}

/// The inner tunnel, over the outer one's bytes.
async fn through(
    io: TunnelIo,
    tls: Arc<rustls::ClientConfig>,
    request: TunnelRequest,
    gateway: SocketAddr,
    spawn: &Spawner,
) -> Result<(TunnelStream, Identity), Failure> {
    let behind = format!("{} behind {gateway}", request.authority);
    let mut tls = timeout(HANDSHAKE_TIMEOUT, TlsConnector::from(tls).connect(unnamed(), io))
        .await
        .map_err(|_| {
            Failure::new(Reason::TlsHandshake, format!("no TLS handshake with {behind} in 10 s"))
                .beyond(Limit::HandshakeTime)
        })?
        .map_err(|error| tls_failure(&error, &behind))?;
    let (_, connection) = tls.get_mut();
    connection.set_buffer_limit(Some(TLS_WRITE_BUFFER));
    let peer = peer_facts(connection)
        .map_err(|e| Failure::new(Reason::PeerIdentity, format!("certificate of {behind}: {e}")))?;
    let (handle, driver) = Client::handshake(tls, &config())
        .await
        .map_err(|e| Failure::new(Reason::Http2Handshake, format!("HTTP/2 with {behind}: {e}")))?;
    // It ends with the stream: the handle is dropped here, so nothing else holds the connection.
    spawn(Box::pin(async move {
        let _ = driver.await;
    }));
    let (stream, _) = handle.connect(request).await.map_err(|e| HopError::connect(&e, &behind).failure)?;
    Ok((stream, peer.identity))
}

#[cfg(test)]
#[path = "gateway_tests.rs"]
mod tests;
