//! Certificates for tests, good ones and every kind of bad one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_model::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SubjectPublicKeyInfo,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

use crate::bundle::TrustBundle;
use crate::certificate::WorkloadCertificate;
use crate::tls;

pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// A root that signs anything.
pub(crate) struct TestCa {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

pub(crate) fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

/// A workload of `cluster.local`.
pub(crate) fn workload(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

/// What a good leaf looks like.
pub(crate) fn leaf_params(identity: &str) -> CertificateParams {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri(identity)];
    params.not_before = (now - Duration::from_secs(60)).into();
    params.not_after = (now + HOUR).into();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params
}

pub(crate) fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

pub(crate) fn dns(text: &str) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

impl TestCa {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        Self { issuer: CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    pub(crate) fn root_pem(&self) -> String {
        self.issuer.pem()
    }

    pub(crate) fn root_der(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub(crate) fn bundle(&self) -> Arc<TrustBundle> {
        Arc::new(TrustBundle::from_der(vec![self.root_der()]).unwrap())
    }

    pub(crate) fn sign(&self, params: &CertificateParams, key: &impl PublicKeyData) -> rcgen::Certificate {
        params.signed_by(key, &self.issuer).unwrap()
    }

    /// Signs what a request asks for, whoever asks.
    pub(crate) fn answer(&self, csr: &str, params: &CertificateParams) -> Vec<String> {
        let (_, pem) = x509_parser::pem::parse_x509_pem(csr.as_bytes()).unwrap();
        let (_, csr) = X509CertificationRequest::from_der(&pem.contents).unwrap();
        let spki = SubjectPublicKeyInfo::from_der(csr.certification_request_info.subject_pki.raw).unwrap();
        vec![self.sign(params, &spki).pem(), self.root_pem()]
    }

    pub(crate) fn leaf(&self, params: &CertificateParams) -> Leaf {
        let key = KeyPair::generate().unwrap();
        Leaf { der: self.sign(params, &key).der().clone(), key }
    }

    /// A certificate of the given holder, valid for an hour.
    pub(crate) fn issue(&self, identity: &str) -> WorkloadCertificate {
        let leaf = self.leaf(&leaf_params(identity));
        let key = leaf.signing_key();
        WorkloadCertificate::assemble(&id(identity), key, vec![leaf.der], self.bundle(), 1, SystemTime::now())
            .unwrap()
    }
}

pub(crate) struct Leaf {
    pub(crate) der: CertificateDer<'static>,
    pub(crate) key: KeyPair,
}

impl Leaf {
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.serialize_der()))
    }

    pub(crate) fn signing_key(&self) -> Arc<dyn rustls::sign::SigningKey> {
        tls::provider().key_provider.load_private_key(self.private_key()).unwrap()
    }
}
