//! The waypoint's TLS configurations, made once for each generation of its certificate.

use std::collections::HashMap;
use std::sync::Arc;

use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::{client_config, server_config};
use culvert_identity::verify::TrustDomains;
use culvert_model::Str;
use culvert_model::identity::Identity;
use parking_lot::Mutex;
use rustls::{ClientConfig, ServerConfig};
use smallvec::SmallVec;

use crate::config::ProxyConfig;

/// Distinct sets of expected identities kept: a set and its verifier take about 1 KB. Beyond, the table starts over.
const MAX_CLIENTS: usize = 1024;

/// Identities that a peer may have.
pub type Expected = SmallVec<[Identity; 1]>;

/// Configurations of the current certificate; those of an older one are dropped as soon as a newer is used.
#[derive(Debug)]
pub struct TlsConfigs {
    trust: Arc<TrustDomains>,
    cached: Mutex<Cached>,
}

#[derive(Debug, Default)]
struct Cached {
    generation: u64,
    server: Option<Arc<ServerConfig>>,
    clients: HashMap<Expected, Arc<ClientConfig>>,
}

impl TlsConfigs {
    /// Empty; peers must be of the configured trust domains.
    pub fn new(config: &ProxyConfig) -> Self {
        let aliases =
            config.trust_domain_aliases.iter().filter(|a| !a.is_empty()).map(|a| Str::from(a.as_str()));
        Self {
            trust: Arc::new(TrustDomains::new(config.trust_domain.as_str(), aliases)),
            cached: Mutex::default(),
        }
    }

    /// For accepting HBONE.
    pub fn server(&self, certificate: &WorkloadCertificate) -> Arc<ServerConfig> {
        let mut cached = self.at(certificate);
        cached.server.get_or_insert_with(|| server_config(certificate, &self.trust)).clone()
    }

    /// For dialling a peer that must be one of `expected`.
    pub fn client(&self, certificate: &WorkloadCertificate, expected: &Expected) -> Arc<ClientConfig> {
        let mut cached = self.at(certificate);
        if cached.clients.len() >= MAX_CLIENTS && !cached.clients.contains_key(expected) {
            cached.clients.clear();
        }
        cached.clients.entry(expected.clone()).or_insert_with(|| client_config(certificate, expected)).clone()
    }

    fn at(&self, certificate: &WorkloadCertificate) -> parking_lot::MutexGuard<'_, Cached> {
        let mut cached = self.cached.lock();
        let empty = cached.server.is_none() && cached.clients.is_empty();
        if cached.generation != certificate.generation() || empty {
            *cached = Cached { generation: certificate.generation(), ..Cached::default() };
        }
        cached
    }
}
