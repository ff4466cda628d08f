//! What a certificate request may say: a public key, and the proof that its sender has the private one.

use rcgen::{
    PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, PKCS_RSA_SHA256, PublicKeyData,
    SubjectPublicKeyInfo,
};
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

/// Largest request, bytes of PEM. One over an RSA-8192 key has about 4 KiB.
pub const MAX_REQUEST: usize = 16 * 1024;
/// Shortest RSA modulus, bits.
const MIN_RSA: usize = 2048;

/// A key that its owner proved to have, of a kind that workloads may use.
#[derive(Debug)]
pub struct SubjectKey(SubjectPublicKeyInfo);

/// Why a request is no good.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubjectKeyError {
    /// Larger than [`MAX_REQUEST`].
    #[error("the certificate request has {0} bytes; {MAX_REQUEST} are allowed")]
    TooLarge(usize),
    /// Not the PEM of a PKCS#10 request.
    #[error("the certificate request cannot be read: {0}")]
    Malformed(String),
    /// Its signature does not verify under its own key.
    #[error("the certificate request is not signed by its own key: {0}")]
    Signature(String),
    /// Its key is of a kind that is not accepted.
    #[error(
        "the key of the certificate request must be P-256, P-384, Ed25519, or RSA of at least {MIN_RSA} bits"
    )]
    Kind,
}

impl SubjectKey {
    /// Reads a request (PEM), verifies its signature and takes its key; everything else in it is ignored.
    ///
    /// # Errors
    /// [`SubjectKeyError`]. Any text is safe to pass.
    pub fn from_request(pem: &str) -> Result<Self, SubjectKeyError> {
        if pem.len() > MAX_REQUEST {
            return Err(SubjectKeyError::TooLarge(pem.len()));
        }
        let malformed = |error: &dyn std::fmt::Display| SubjectKeyError::Malformed(error.to_string());
        let der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes())
            .map_err(|error| malformed(&error))?;
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"bytes follow it"));
        }
        let info = &request.certification_request_info.subject_pki;
        // The kind before the signature: an attacker's choice of key decides what verifying costs.
        let key = SubjectPublicKeyInfo::from_der(info.raw).map_err(|_| SubjectKeyError::Kind)?;
        let kinds = [&PKCS_ECDSA_P256_SHA256, &PKCS_ECDSA_P384_SHA384, &PKCS_ED25519];
        let rsa = key.algorithm() == &PKCS_RSA_SHA256
            && info.parsed().is_ok_and(|key| (MIN_RSA..=4 * MIN_RSA).contains(&key.key_size()));
        if !rsa && !kinds.contains(&key.algorithm()) {
            return Err(SubjectKeyError::Kind);
        }
        request.verify_signature().map_err(|error| SubjectKeyError::Signature(error.to_string()))?;
        Ok(Self(key))
    }

    /// The key.
    #[must_use]
    pub fn public_key(&self) -> &SubjectPublicKeyInfo {
        &self.0
    }
}
