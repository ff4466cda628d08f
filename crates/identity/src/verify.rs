//! Judges the other end of a handshake: a chain to our roots, then exactly one identity, then whether it is the right one.

use std::fmt;
use std::sync::Arc;

use culvert_model::Str;
use culvert_model::identity::Identity;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::verify_tls13_signature;
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible,
    SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::bundle::TrustBundle;
use crate::certificate::{PeerError, peer_identity};
use crate::tls;

/// How many identities an error spells out before it counts the rest.
const SPELLED: usize = 4;

/// Whose workloads may connect to ours: our trust domain and its aliases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustDomains {
    own: Str,
    aliases: Vec<Str>,
}

/// Checks a server: the expected identities were decided before dialling (Z92). The host name and the address play no
/// part, since a workload's address proves nothing.
#[derive(Debug)]
pub struct ServerVerifier {
    roots: Arc<TrustBundle>,
    expected: Box<[Identity]>,
}

/// Checks a client: any workload of an accepted trust domain (Z46). What it may do is for authorization to say.
#[derive(Debug)]
pub struct ClientVerifier {
    roots: Arc<TrustBundle>,
    trust: Arc<TrustDomains>,
}

/// rustls shows an error that is not its own by `Debug` alone: this one says the same there as in `Display`, so that every
/// log that shows a failed handshake says what was wrong.
#[derive(thiserror::Error)]
#[error("{0}")]
struct Refusal(PeerError);

impl TrustDomains {
    /// Our own domain and others that mean the same mesh.
    pub fn new(own: impl Into<Str>, aliases: impl IntoIterator<Item = Str>) -> Self {
        Self { own: own.into(), aliases: aliases.into_iter().collect() }
    }

    /// Whether workloads of this domain are accepted. Exact: trust domains are lower case by construction.
    #[must_use]
    pub fn accepts(&self, domain: &str) -> bool {
        *self.own == *domain || self.aliases.iter().any(|alias| **alias == *domain)
    }

    /// Our own domain.
    #[must_use]
    pub fn own(&self) -> &Str {
        &self.own
    }
}

impl fmt::Display for TrustDomains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.own)?;
        self.aliases.iter().try_for_each(|alias| write!(f, ", {alias}"))
    }
}

impl ServerVerifier {
    /// Accepts exactly these identities under these roots; with none listed, nobody.
    #[must_use]
    pub fn new(roots: Arc<TrustBundle>, expected: &[Identity]) -> Self {
        Self { roots, expected: expected.into() }
    }

    fn judge(&self, leaf: &CertificateDer<'_>) -> Result<(), PeerError> {
        let got = peer_identity(leaf)?;
        if self.expected.contains(&got) {
            return Ok(());
        }
        Err(PeerError::Unexpected { got: Box::new(got), expected: spell(&self.expected) })
    }
}

impl ClientVerifier {
    /// Accepts workloads of these domains under these roots.
    #[must_use]
    pub fn new(roots: Arc<TrustBundle>, trust: Arc<TrustDomains>) -> Self {
        Self { roots, trust }
    }

    fn judge(&self, leaf: &CertificateDer<'_>) -> Result<(), PeerError> {
        let got = peer_identity(leaf)?;
        if self.trust.accepts(got.trust_domain()) {
            return Ok(());
        }
        Err(PeerError::TrustDomain { got: Box::new(got), accepted: self.trust.to_string() })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = tls::provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(
            &parsed,
            self.roots.store(),
            intermediates,
            now,
            algorithms,
        )?;
        self.judge(end_entity).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &tls::provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.roots.client_chain().verify_client_cert(end_entity, intermediates, now)?;
        self.judge(end_entity).map_err(refused)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &tls::provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        tls::provider().signature_verification_algorithms.supported_schemes()
    }
}

/// The [`PeerError`] inside a handshake's error, if it was one of ours that ended it.
#[must_use]
pub fn refusal(error: &Error) -> Option<&PeerError> {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) => {
            inner.downcast_ref().map(|Refusal(error)| error)
        }
        _ => None,
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn refused(error: PeerError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(Refusal(error)))))
}

fn spell(expected: &[Identity]) -> String {
    let mut text = expected.iter().take(SPELLED).map(Identity::to_string).collect::<Vec<_>>().join(", ");
    match expected.len() {
        0 => text.push_str("nobody"),
        n if n > SPELLED => text.push_str(&format!(" and {} more", n - SPELLED)),
        _ => {}
    }
    text
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
