//! The channel to the controller, used by the certificate client and by the xDS client.
//!
//! The server is authenticated by TLS and a DNS name under the roots in a file; this end by the token in each call. tonic's
//! own TLS stays off so that there is one TLS library configuration in the program: ours.

use std::error::Error;
use std::future::Future;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::version::TLS13;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::bundle::{BundleError, TrustBundle};
use crate::tls;

/// Port of the controller when an address names none.
pub const CONTROL_PORT: u16 = 15012;
/// Largest file of roots, bytes: as many roots as a bundle may hold, at the largest size each.
const MAX_ROOT_FILE: u64 = 2 * (crate::bundle::MAX_ROOTS * crate::certificate::MAX_CERTIFICATE) as u64;

/// Where the controller is and how it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlEndpoint {
    /// `https://host[:port]`; the host may be an address.
    pub address: String,
    /// The DNS name its certificate must have, whatever the host above is.
    pub server_name: String,
    /// PEM roots. Read at each connection, so a replaced file counts from the next one on.
    pub root_cert_file: PathBuf,
    /// Longest wait for TCP and TLS together. Default 5 s.
    pub connect_timeout: Duration,
    /// HTTP/2 pings are this far apart, also when nothing is asked. Default 10 s.
    pub keepalive_interval: Duration,
    /// An unanswered ping ends the connection after this long. Default 20 s: a dead controller is noticed within 30 s.
    pub keepalive_timeout: Duration,
}

/// Why an endpoint cannot even be tried.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address is not `https://host[:port]`.
    #[error("the controller's address {0:?} is not https://host[:port]")]
    Address(String),
    /// The server name is no DNS name.
    #[error("the controller's server name {0:?} is no DNS name")]
    ServerName(String),
}

/// Why there is no connection to the controller.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// TCP failed.
    #[error("controller {address} is unreachable: {source}")]
    Unreachable {
        /// Whom we called.
        address: String,
        /// What the system said.
        source: io::Error,
    },
    /// TCP or TLS took too long.
    #[error("controller {address} gave no {phase} connection within {after:?}")]
    TimedOut {
        /// Whom we called.
        address: String,
        /// `TCP` or `TLS`.
        phase: &'static str,
        /// How long we waited.
        after: Duration,
    },
    /// TLS failed: most often a certificate that our roots do not vouch for.
    #[error("TLS with controller {address} as {server_name} failed: {source}")]
    Tls {
        /// Whom we called.
        address: String,
        /// The name its certificate should have had.
        server_name: String,
        /// What rustls said, inside an IO error.
        source: io::Error,
    },
    /// The file of roots cannot be read.
    #[error("cannot read the controller's root certificates {file}: {source}")]
    ReadRoots {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file of roots holds no usable roots.
    #[error("the controller's root certificates {file}: {source}")]
    Roots {
        /// Which file.
        file: PathBuf,
        /// Why.
        source: BundleError,
    },
}

/// Parts of an endpoint after parsing, shared by all its connections.
#[derive(Debug)]
struct Target {
    endpoint: ControlEndpoint,
    host: String,
    port: u16,
    server_name: ServerName<'static>,
}

impl ControlEndpoint {
    /// An endpoint with the default times.
    pub fn new(
        address: impl Into<String>,
        server_name: impl Into<String>,
        root_cert_file: impl Into<PathBuf>,
    ) -> Self {
        Self {
            address: address.into(),
            server_name: server_name.into(),
            root_cert_file: root_cert_file.into(),
            connect_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(10),
            keepalive_timeout: Duration::from_secs(20),
        }
    }
}

/// A channel that connects when the first call is made, and again at the first call after it broke; calls in between fail
/// with a status whose cause [`connect_error`] finds. Clones share the connection. It must be made inside a tokio runtime.
///
/// # Errors
/// [`EndpointError`] for an address or a name that can never work.
pub fn control_channel(endpoint: ControlEndpoint) -> Result<Channel, EndpointError> {
    control_channel_with(endpoint, |host, port| async move {
        let stream = TcpStream::connect((host.as_str(), port)).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    })
}

/// [`control_channel`] over connections that `dial` makes of a host and a port: other sockets, or none at all in tests.
///
/// # Errors
/// See [`control_channel`].
pub fn control_channel_with<D, F, S>(endpoint: ControlEndpoint, dial: D) -> Result<Channel, EndpointError>
where
    D: Fn(String, u16) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = io::Result<S>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let malformed = || EndpointError::Address(endpoint.address.clone());
    let uri: Uri = endpoint.address.parse().map_err(|_| malformed())?;
    let host = uri.host().filter(|host| !host.is_empty()).ok_or_else(malformed)?;
    if uri.scheme_str() != Some("https") || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(malformed());
    }
    let server_name = ServerName::try_from(endpoint.server_name.clone())
        .ok()
        .filter(|name| matches!(name, ServerName::DnsName(_)))
        .ok_or_else(|| EndpointError::ServerName(endpoint.server_name.clone()))?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = uri.port_u16().unwrap_or(CONTROL_PORT);
    let channel = Endpoint::from(uri)
        .http2_keep_alive_interval(endpoint.keepalive_interval)
        .keep_alive_timeout(endpoint.keepalive_timeout)
        .keep_alive_while_idle(true);
    let target = Arc::new(Target { endpoint, host, port, server_name });
    let connector = tower::service_fn(move |_: Uri| {
        let (target, dial) = (target.clone(), dial.clone());
        async move { target.connect(dial).await.map(TokioIo::new) }
    });
    Ok(channel.connect_with_connector_lazy(connector))
}

/// The reason why there was no connection, if that is why a call failed.
#[must_use]
pub fn connect_error(status: &Status) -> Option<&ConnectError> {
    let mut cause = status.source();
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

impl Target {
    async fn connect<D, F, S>(&self, dial: D) -> Result<TlsStream<S>, ConnectError>
    where
        D: Fn(String, u16) -> F,
        F: Future<Output = io::Result<S>>,
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let ControlEndpoint { address, server_name, connect_timeout: after, .. } = &self.endpoint;
        let config = client_config(&self.endpoint.root_cert_file)?;
        let deadline = tokio::time::Instant::now() + *after;
        let late = |phase| ConnectError::TimedOut { address: address.clone(), phase, after: *after };
        let stream = tokio::time::timeout_at(deadline, dial(self.host.clone(), self.port))
            .await
            .map_err(|_| late("TCP"))?
            .map_err(|source| ConnectError::Unreachable { address: address.clone(), source })?;
        let handshake = TlsConnector::from(config).connect(self.server_name.clone(), stream);
        tokio::time::timeout_at(deadline, handshake).await.map_err(|_| late("TLS"))?.map_err(|source| {
            ConnectError::Tls { address: address.clone(), server_name: server_name.clone(), source }
        })
    }
}

/// Made anew for each connection: a few tens of microseconds, and a file that was replaced is never missed.
fn client_config(file: &Path) -> Result<Arc<ClientConfig>, ConnectError> {
    let mut pem = Vec::new();
    std::fs::File::open(file)
        .and_then(|opened| opened.take(MAX_ROOT_FILE).read_to_end(&mut pem))
        .map_err(|source| ConnectError::ReadRoots { file: file.to_owned(), source })?;
    let bundle = TrustBundle::from_pem(&pem)
        .map_err(|source| ConnectError::Roots { file: file.to_owned(), source })?;
    let mut config = ClientConfig::builder_with_provider(tls::provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_root_certificates(bundle.store().clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}
