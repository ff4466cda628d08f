//! The controller's own TLS certificate, signed by its own authority and renewed as handshakes come.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use culvert_identity::tls;
use parking_lot::Mutex;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::ServerConfig;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::authority::{Authority, IssueError};

/// Lifetime of a serving certificate. The key never leaves the process, so a day costs nothing.
const LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A certificate for the controller's DNS names that is replaced when half of its life is over, or the authority's key is. It needs no task: the
/// handshake that finds it old renews it, at the price of one signature.
pub struct Serving {
    authority: Arc<Authority>,
    names: Vec<String>,
    current: ArcSwap<Current>,
    renewing: Mutex<()>,
}

struct Current {
    key: Arc<CertifiedKey>,
    renew_at: SystemTime,
    /// Of the authority, when it was made.
    generation: u64,
}

impl Serving {
    /// Makes the first certificate for these DNS names.
    ///
    /// # Errors
    /// [`IssueError::Name`] for what is no DNS name; the others are the authority's.
    pub fn new(authority: Arc<Authority>, names: Vec<String>) -> Result<Self, IssueError> {
        let current = ArcSwap::from_pointee(make(&authority, &names)?);
        Ok(Self { authority, names, current, renewing: Mutex::new(()) })
    }

    /// The certificate and key to use now.
    pub fn current(&self) -> Arc<CertifiedKey> {
        let now = self.authority.clock().now();
        let current = self.current.load();
        let old = current.renew_at <= now || current.generation != *self.authority.generation().borrow();
        if old && let Some(_renewing) = self.renewing.try_lock() {
            match make(&self.authority, &self.names) {
                Ok(fresh) => self.current.store(Arc::new(fresh)),
                // Half of its life is left; the next handshake tries again.
                Err(error) => tracing::warn!(%error, "cannot renew the controller's own certificate"),
            }
        }
        self.current.load().key.clone()
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("names", &self.names).finish_non_exhaustive()
    }
}

/// TLS for the controller's port: 1.3 only, ALPN `h2`, no client certificates (clients show a token), no resumption.
#[must_use]
pub fn server_config(serving: Arc<Serving>) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(tls::provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_no_client_auth()
        .with_cert_resolver(serving);
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

fn make(authority: &Authority, names: &[String]) -> Result<Current, IssueError> {
    let crypto = |error: &dyn fmt::Display| IssueError::Crypto(error.to_string());
    let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|error| crypto(&error))?;
    let generation = *authority.generation().borrow();
    let issued = authority.issue_server(&pair, names, LIFETIME)?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
    let key = tls::provider().key_provider.load_private_key(der).map_err(|error| crypto(&error))?;
    let now = authority.clock().now();
    let life = issued.not_after.duration_since(now).unwrap_or_default();
    let between = &issued.chain[1..issued.chain.len().saturating_sub(1).max(1)];
    let between = between
        .iter()
        .map(|pem| CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| crypto(&error)))
        .collect::<Result<Vec<_>, _>>()?;
    let chain = std::iter::once(issued.leaf).chain(between).collect();
    Ok(Current { key: Arc::new(CertifiedKey::new(chain, key)), renew_at: now + life / 2, generation })
}
