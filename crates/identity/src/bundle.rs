//! The roots a peer's certificate must lead to.

use std::fmt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::certificate::MAX_CERTIFICATE;
use crate::tls;

/// Most roots of one bundle: a mesh has one or two, and one more for each federated cluster.
pub const MAX_ROOTS: usize = 64;

/// Parsed once, shared by every TLS configuration and verifier made from it.
pub struct TrustBundle {
    roots: Vec<CertificateDer<'static>>,
    store: Arc<RootCertStore>,
    client_chain: Arc<dyn ClientCertVerifier>,
}

/// Why a list of roots is no trust bundle.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BundleError {
    /// No certificate at all.
    #[error("a trust bundle holds no certificate")]
    Empty,
    /// More than [`MAX_ROOTS`].
    #[error("a trust bundle holds {0} certificates; {MAX_ROOTS} are allowed")]
    TooMany(usize),
    /// One certificate is larger than [`MAX_CERTIFICATE`].
    #[error("root certificate {index} has {size} bytes; {MAX_CERTIFICATE} are allowed")]
    TooLarge {
        /// Its place in the bundle, from 0.
        index: usize,
        /// Bytes.
        size: usize,
    },
    /// The text around a certificate is no PEM.
    #[error("a trust bundle is no PEM: {0}")]
    Pem(String),
    /// One certificate cannot serve as a trust anchor.
    #[error("root certificate {index} cannot be used: {reason}")]
    Root {
        /// Its place in the bundle, from 0.
        index: usize,
        /// What the library said.
        reason: String,
    },
}

impl TrustBundle {
    /// Takes the roots out of PEM text; sections that are no certificates are passed over.
    ///
    /// # Errors
    /// [`BundleError`] names the first root that cannot be used: a bundle is taken whole or not at all.
    pub fn from_pem(pem: &[u8]) -> Result<Self, BundleError> {
        let roots = CertificateDer::pem_slice_iter(pem)
            .take(MAX_ROOTS + 1)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| BundleError::Pem(error.to_string()))?;
        Self::from_der(roots)
    }

    /// Makes a bundle of DER certificates. Repeated ones count once.
    ///
    /// # Errors
    /// See [`TrustBundle::from_pem`].
    pub fn from_der(roots: Vec<CertificateDer<'static>>) -> Result<Self, BundleError> {
        if roots.len() > MAX_ROOTS {
            return Err(BundleError::TooMany(roots.len()));
        }
        let mut store = RootCertStore::empty();
        let mut kept: Vec<CertificateDer<'static>> = Vec::with_capacity(roots.len());
        for (index, root) in roots.into_iter().enumerate() {
            if root.len() > MAX_CERTIFICATE {
                return Err(BundleError::TooLarge { index, size: root.len() });
            }
            if kept.contains(&root) {
                continue;
            }
            store
                .add(root.clone())
                .map_err(|error| BundleError::Root { index, reason: error.to_string() })?;
            kept.push(root);
        }
        if kept.is_empty() {
            return Err(BundleError::Empty);
        }
        let store = Arc::new(store);
        let client_chain =
            WebPkiClientVerifier::builder_with_provider(store.clone(), tls::provider().clone())
                .clear_root_hint_subjects()
                .build()
                .expect("a verifier without revocation lists needs one root, and there is one");
        Ok(Self { roots: kept, store, client_chain })
    }

    /// The roots in DER, in the order they came.
    #[must_use]
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.roots
    }

    /// The roots as rustls wants them.
    #[must_use]
    pub fn store(&self) -> &Arc<RootCertStore> {
        &self.store
    }

    /// The part of client verification that is the same for all: chain, dates, key usage, signatures.
    pub(crate) fn client_chain(&self) -> &Arc<dyn ClientCertVerifier> {
        &self.client_chain
    }
}

impl PartialEq for TrustBundle {
    fn eq(&self, other: &Self) -> bool {
        self.roots == other.roots
    }
}

impl Eq for TrustBundle {}

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TrustBundle").field("roots", &self.roots.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::TestCa;

    #[test]
    fn several_roots_in_one_text_and_repeated_ones() {
        let (a, b) = (TestCa::new("a"), TestCa::new("b"));
        let text = format!("{}{}{}", a.root_pem(), b.root_pem(), a.root_pem());
        let bundle = TrustBundle::from_pem(text.as_bytes()).unwrap();
        assert_eq!(bundle.roots().len(), 2);
        assert_ne!(bundle, TrustBundle::from_pem(a.root_pem().as_bytes()).unwrap());
    }

    #[test]
    fn what_is_no_bundle_is_refused() {
        assert_eq!(TrustBundle::from_pem(b"").unwrap_err(), BundleError::Empty);
        assert_eq!(TrustBundle::from_pem(b"hello").unwrap_err(), BundleError::Empty);
        let junk = vec![CertificateDer::from(vec![1, 2, 3])];
        assert!(matches!(TrustBundle::from_der(junk), Err(BundleError::Root { index: 0, .. })));
        let large = vec![CertificateDer::from(vec![0; MAX_CERTIFICATE + 1])];
        assert!(matches!(TrustBundle::from_der(large), Err(BundleError::TooLarge { index: 0, .. })));
        let many = vec![CertificateDer::from(vec![0]); MAX_ROOTS + 1];
        assert_eq!(TrustBundle::from_der(many).unwrap_err(), BundleError::TooMany(MAX_ROOTS + 1));
    }
}
