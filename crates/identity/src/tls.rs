//! rustls configurations between workloads: TLS 1.3 only, both ends certified, ALPN `h2`, no server name, no resumption
//! (Z15).
//!
//! Resumption is off because a resumed session would skip the certificate check and so outlive the certificate.

use std::net::Ipv4Addr;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use culvert_model::identity::Identity;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::NoServerSessionStorage;
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, CommonState, NamedGroup, ServerConfig};
use rustls_pki_types::ServerName;

use crate::certificate::{PeerError, WorkloadCertificate, leaf_facts};
use crate::verify::{ClientVerifier, ServerVerifier, TrustDomains};

/// The only protocol spoken inside a tunnel's TLS.
pub const ALPN_H2: &[u8] = b"h2";

/// What a finished handshake says about the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    /// Who it is.
    pub identity: Identity,
    /// When its certificate ends, wall time: no new stream should be opened to it afterwards.
    pub not_after: SystemTime,
    /// The cipher suite; absent only while the handshake is not over.
    pub cipher: Option<CipherSuite>,
    /// The key exchange group; absent only while the handshake is not over.
    pub kx_group: Option<NamedGroup>,
}

/// The cryptography of the whole mesh: aws-lc, AES-GCM, X25519MLKEM768 before X25519 before P-256. X25519MLKEM768 first
/// keeps what is recorded today safe from a quantum computer later.
pub fn provider() -> &'static Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    })
}

/// For accepting tunnels as the holder of `certificate`, from workloads of the given trust domains.
#[must_use]
pub fn server_config(certificate: &WorkloadCertificate, trust: &Arc<TrustDomains>) -> Arc<ServerConfig> {
    let verifier = ClientVerifier::new(certificate.roots().clone(), trust.clone());
    let mut config = ServerConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(certificate.resolver().clone());
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Arc::new(config)
}

/// For dialling as the holder of `certificate` somebody who must be one of `expected`. Cheap: key and roots are shared
/// with every other configuration of this certificate. Dial with [`unnamed`].
#[must_use]
pub fn client_config(certificate: &WorkloadCertificate, expected: &[Identity]) -> Arc<ClientConfig> {
    let verifier = ServerVerifier::new(certificate.roots().clone(), expected);
    let mut config = ClientConfig::builder_with_provider(provider().clone())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider has suites and groups of TLS 1.3")
        .dangerous() // rustls' word for any verifier but its own
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(certificate.resolver().clone());
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Arc::new(config)
}

/// What to pass to rustls as the server's name: it insists on one, our verifier ignores it and it is not sent.
#[must_use]
pub fn unnamed() -> ServerName<'static> {
    ServerName::IpAddress(Ipv4Addr::UNSPECIFIED.into())
}

/// Who the other end of a finished handshake is.
///
/// # Errors
/// [`PeerError::Missing`] if the handshake is not over; the others cannot happen on connections made with the
/// configurations of this module, which refuse such peers.
pub fn peer_facts(connection: &CommonState) -> Result<PeerFacts, PeerError> {
    let leaf = connection.peer_certificates().and_then(<[_]>::first).ok_or(PeerError::Missing)?;
    let leaf = leaf_facts(leaf)?;
    Ok(PeerFacts {
        identity: leaf.identity,
        not_after: leaf.not_after,
        cipher: connection.negotiated_cipher_suite().map(|suite| suite.suite()),
        kx_group: connection.negotiated_key_exchange_group().map(|group| group.name()),
    })
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
