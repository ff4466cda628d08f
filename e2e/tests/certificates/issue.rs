//! Certificates as an attacker would like to have them; the worst are signed with the mesh's own key, which root may read.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use culvert_e2e::world::World;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// What a TLS client shows.
#[derive(Debug)]
pub struct Credentials {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

/// What a certificate says.
pub struct Leaf<'a> {
    pub uris: &'a [&'a str],
    pub names: &'a [&'a str],
    pub from: SystemTime,
    pub until: SystemTime,
}

impl<'a> Leaf<'a> {
    /// Valid for five minutes around now.
    pub fn of(uris: &'a [&'a str]) -> Self {
        let now = SystemTime::now();
        let span = Duration::from_secs(300);
        Self { uris, names: &[], from: now - span, until: now + span }
    }

    fn params(&self) -> Result<CertificateParams> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for uri in self.uris {
            params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
        }
        for name in self.names {
            params.subject_alt_names.push(SanType::DnsName((*name).try_into()?));
        }
        params.not_before = self.from.into();
        params.not_after = self.until.into();
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        Ok(params)
    }

    /// Signed by `issuer`, with `above` it in the chain.
    pub fn signed(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        above: &[CertificateDer<'static>],
    ) -> Result<Credentials> {
        let (credentials, _) = self.signed_with_key(issuer, above)?;
        Ok(credentials)
    }

    /// The key as well, to sign with it what it must not sign.
    pub fn signed_with_key(
        &self,
        issuer: &Issuer<'_, KeyPair>,
        above: &[CertificateDer<'static>],
    ) -> Result<(Credentials, KeyPair)> {
        let key = KeyPair::generate()?;
        let certificate = self.params()?.signed_by(&key, issuer)?;
        let mut chain = vec![certificate.der().clone()];
        chain.extend_from_slice(above);
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((Credentials { chain, key: der }, key))
    }

    /// An issuer that nobody made an issuer.
    pub fn usurper(&self, key: KeyPair) -> Result<Issuer<'static, KeyPair>> {
        Ok(Issuer::new(self.params()?, key))
    }
}

/// The mesh's own authority, as its key on disk lets root be it.
pub fn real_authority(world: &World) -> Result<Issuer<'static, KeyPair>> {
    let key = KeyPair::from_pem(&root_file(world, "key.pem")?)?;
    Ok(Issuer::from_ca_cert_pem(&root_file(world, "cert.pem")?, key)?)
}

/// Name and key identifier of the mesh's authority, and another key.
pub fn forged_authority(world: &World) -> Result<Issuer<'static, KeyPair>> {
    Ok(Issuer::from_ca_cert_pem(&root_file(world, "cert.pem")?, KeyPair::generate()?)?)
}

/// An authority in its own right that the mesh does not know.
pub fn unknown_authority() -> Result<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "cluster.local");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn root_file(world: &World, name: &str) -> Result<String> {
    let file = world.state_dir().join("controller/ca/root").join(name);
    fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
}
