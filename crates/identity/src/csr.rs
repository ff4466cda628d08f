//! A fresh key and the request to have it certified.

use std::fmt;
use std::sync::Arc;

use culvert_model::identity::Identity;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::sign::SigningKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::tls;

/// A new P-256 key and a PKCS#10 request for one identity (Z86). The private key never leaves this process's memory.
pub struct CertificateRequest {
    pem: String,
    key: Arc<dyn SigningKey>,
}

/// Why no request could be made. None of these depends on a peer.
#[derive(Debug, thiserror::Error)]
pub enum CsrError {
    /// The identity cannot be written as an IA5 string, or the library refused to make or sign the request.
    #[error("cannot make a certificate request for {identity}: {source}")]
    Request {
        /// For whom.
        identity: Box<Identity>,
        /// What the library said.
        source: rcgen::Error,
    },
    /// The TLS library refused the key that was just made.
    #[error("cannot load a new private key: {0}")]
    Key(rustls::Error),
}

impl CertificateRequest {
    /// Makes a key and a request whose subject is empty and whose only name is the identity's URI. RFC 5280 section
    /// 4.2.1.6 makes that extension critical, since the subject is empty.
    ///
    /// # Errors
    /// [`CsrError`] if the system gives no randomness or a library refuses.
    pub fn new(identity: &Identity) -> Result<Self, CsrError> {
        let failed = |source| CsrError::Request { identity: Box::new(identity.clone()), source };
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let uri = identity.to_string().try_into().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri)];
        let pem = params.serialize_request(&pair).and_then(|request| request.pem()).map_err(failed)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pair.serialize_der()));
        let key = tls::provider().key_provider.load_private_key(der).map_err(CsrError::Key)?;
        Ok(Self { pem, key })
    }

    /// The request as PEM, ready for `IstioCertificateRequest.csr`.
    #[must_use]
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The private key.
    #[must_use]
    pub fn key(&self) -> &Arc<dyn SigningKey> {
        &self.key
    }
}

impl fmt::Debug for CertificateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateRequest").field("key", &"elided").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x509_parser::certification_request::X509CertificationRequest;
    use x509_parser::extensions::{GeneralName, ParsedExtension};
    use x509_parser::prelude::FromDer;

    /// Z86.
    #[test]
    fn the_request_has_no_subject_and_one_critical_uri() {
        let identity: Identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let request = CertificateRequest::new(&identity).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(request.pem().as_bytes()).unwrap();
        let (rest, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        assert!(rest.is_empty());
        csr.verify_signature().unwrap();
        let info = &csr.certification_request_info;
        assert_eq!(info.subject.iter().count(), 0);
        let spki = request.key().public_key().unwrap();
        assert_eq!(info.subject_pki.raw, spki.as_ref());
        let extensions: Vec<_> = csr.requested_extensions().unwrap().collect();
        let [ParsedExtension::SubjectAlternativeName(names)] = extensions[..] else {
            panic!("{extensions:?}");
        };
        assert_eq!(names.general_names, [GeneralName::URI("spiffe://cluster.local/ns/a/sa/b")]);
        // critical: the OID of subjectAltName (2.5.29.17) is followed by BOOLEAN TRUE.
        assert!(pem.contents.windows(8).any(|w| w == [0x06, 0x03, 0x55, 0x1d, 0x11, 0x01, 0x01, 0xff]));
    }

    #[test]
    fn every_request_has_a_key_of_its_own_and_keeps_it_to_itself() {
        let identity: Identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let [a, b] = [(); 2].map(|()| CertificateRequest::new(&identity).unwrap());
        assert_ne!(a.key().public_key().unwrap().as_ref(), b.key().public_key().unwrap().as_ref());
        assert!(!format!("{a:?}").contains("BEGIN"));
    }
}
