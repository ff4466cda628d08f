//! A certificate authority for this crate's tests.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_identity::bundle::TrustBundle;
use culvert_identity::ca_client::{CaClient, CaError, Signing};
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::provider;
use culvert_model::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DistinguishedName,
    DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

/// It signs for anybody.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// A new root.
    pub fn new() -> Arc<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "test");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Arc::new(Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() })
    }

    /// A certificate, and a key that nobody else has.
    pub fn certificate(&self, identity: &Identity) -> Arc<WorkloadCertificate> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        let roots = TrustBundle::from_der(vec![self.issuer.der().clone()]).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = provider().key_provider.load_private_key(key).unwrap();
        let now = SystemTime::now();
        let certificate = WorkloadCertificate::assemble(identity, key, vec![leaf], Arc::new(roots), 1, now);
        Arc::new(certificate.unwrap())
    }
}

impl CaClient for Authority {
    fn sign<'a>(&'a self, csr: &'a str, _identity: &'a Identity, _lifetime: Duration) -> Signing<'a> {
        Box::pin(async move {
            let failed = |e: rcgen::Error| CaError::Unreachable(e.to_string());
            let mut request = CertificateSigningRequestParams::from_pem(csr).map_err(failed)?;
            request.params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
            let leaf = request.signed_by(&self.issuer).map_err(failed)?;
            Ok(vec![leaf.pem(), self.issuer.pem()])
        })
    }
}
