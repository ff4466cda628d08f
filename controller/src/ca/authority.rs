//! The root key and what is signed with it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use culvert_identity::bundle::TrustBundle;
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::csr::CertificateRequest;
use culvert_identity::tls;
use culvert_model::identity::Identity;
use culvert_runtime::clock::SharedClock;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use time::OffsetDateTime;
use tokio::sync::watch;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::request::{SubjectKey, SubjectKeyError};
use super::store::{self, Pair};

/// Lifetime of the root (D52): 10 years.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);
/// How far a node's clock may be behind ours without its workloads' peers refusing a fresh certificate.
const SKEW: Duration = Duration::from_secs(60);
/// The log warns at the start when the root has less than this left.
const ROOT_WARNING: Duration = Duration::from_secs(90 * 24 * 60 * 60);
/// Shortest and longest certificate that is signed at all, whatever the caller allows (D53: 90 days).
const MIN_LIFETIME: Duration = Duration::from_secs(1);
const MAX_LIFETIME: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// The mesh's authority. It signs leaves directly, with the root's key or with that of an intermediate that was plugged in.
/// What it signs with can be replaced while it is used.
pub struct Authority {
    keys: ArcSwap<Keys>,
    /// Counts replacements.
    generation: watch::Sender<u64>,
    clock: SharedClock,
}

/// What an authority signs with and what it tells others to trust; PEM texts.
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    /// Signs. Never shown.
    pub key: String,
    /// Over that key: a root, or an intermediate.
    pub certificate: String,
    /// From `certificate` (which may be left out) towards the root; empty if it is one.
    pub intermediates: String,
    /// Every root that workloads trust, the one that signs among them: more than one while a root is replaced.
    pub roots: String,
}

struct Keys {
    material: Material,
    issuer: Issuer<'static, KeyPair>,
    /// Sent after each leaf.
    served: Vec<String>,
    roots_pem: String,
    not_after: SystemTime,
}

/// A certificate that was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// PEM texts as the certificate API wants them: the leaf, its intermediates if there are any, then the roots (D07, Z91).
    pub chain: Vec<String>,
    /// The leaf in DER.
    pub leaf: CertificateDer<'static>,
    /// Serial number, hex.
    pub serial: String,
    /// End of validity.
    pub not_after: SystemTime,
}

/// Why the authority cannot start. Nothing on disk was changed.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A file or directory cannot be used.
    #[error("certificate authority: {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others may read the key.
    #[error("certificate authority: the key {} has mode {mode:o}; it must have 600", path.display())]
    KeyMode {
        /// Which.
        path: PathBuf,
        /// What it has.
        mode: u32,
    },
    /// The pair on disk cannot be used. It is never replaced: that would cut every workload off.
    #[error("certificate authority: {}: {reason}; restore the pair, or remove its directory to start a new mesh", path.display())]
    Pair {
        /// The certificate's file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A new root could not be made.
    #[error("certificate authority: cannot make a root: {0}")]
    Make(#[from] IssueError),
}

/// Why nothing was signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IssueError {
    /// The request is no good.
    #[error(transparent)]
    Request(#[from] SubjectKeyError),
    /// A name cannot stand in a certificate.
    #[error("{0:?} cannot stand in a certificate")]
    Name(String),
    /// The root is over.
    #[error("the root certificate has expired")]
    RootExpired,
    /// The cryptography failed.
    #[error("cannot sign: {0}")]
    Crypto(String),
}

impl Authority {
    /// Opens the authority kept in `dir`, which is made with a new root if it is not there.
    ///
    /// # Errors
    /// [`AuthorityError`] names the file; a pair that is unreadable, expired or does not match is refused, never replaced.
    pub fn open(dir: &Path, clock: SharedClock) -> Result<Self, AuthorityError> {
        let pair = store::load_or_make(dir, || Ok(make_root(clock.now())?))?;
        Self::from_pair(&pair, clock)
            .map_err(|reason| AuthorityError::Pair { path: store::certificate_path(dir), reason })
    }

    fn from_pair(pair: &Pair, clock: SharedClock) -> Result<Self, String> {
        let (key, certificate) = (pair.key.clone(), pair.certificate.clone());
        let roots = certificate.clone();
        Self::new(Material { key, certificate, intermediates: String::new(), roots }, clock)
    }

    /// An authority of this material.
    ///
    /// # Errors
    /// In words, if it cannot sign what a workload that trusts `roots` would accept.
    pub fn new(material: Material, clock: SharedClock) -> Result<Self, String> {
        let keys = ArcSwap::from_pointee(Keys::new(material, &clock)?);
        let authority = Self { keys, generation: watch::Sender::new(0), clock };
        authority.keys.load().try_out(&authority.clock)?;
        Ok(authority)
    }

    /// Signs with something else from now on. False if that is what it does already.
    ///
    /// # Errors
    /// As [`Authority::new`]; then all stays as it was.
    pub fn replace(&self, material: Material) -> Result<bool, String> {
        if self.keys.load().material == material {
            return Ok(false);
        }
        let keys = Keys::new(material, &self.clock)?;
        keys.try_out(&self.clock)?;
        self.keys.store(Arc::new(keys));
        self.generation.send_modify(|generation| *generation += 1);
        Ok(true)
    }

    /// Changes with every replacement.
    pub fn generation(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }

    /// What it signs with.
    pub(crate) fn material(&self) -> Material {
        self.keys.load().material.clone()
    }

    /// The roots, PEM: what every client of the controller and every workload trusts.
    #[must_use]
    pub fn root_pem(&self) -> String {
        self.keys.load().roots_pem.clone()
    }

    /// The clock by which validity is counted.
    pub(super) fn clock(&self) -> &SharedClock {
        &self.clock
    }

    /// Certifies that the key in `csr` (PEM) belongs to `identity`, from a minute ago until `lifetime` from now. Of the request
    /// only the key counts: names, usages and everything else in it are ignored. Whether the caller may have the identity is
    /// for [`mod@super::service`] to decide.
    ///
    /// # Errors
    /// [`IssueError::Request`] for a bad request; the others are ours.
    pub fn issue(&self, csr: &str, identity: &Identity, lifetime: Duration) -> Result<Issued, IssueError> {
        let key = SubjectKey::from_request(csr)?;
        let uri = identity.to_string();
        let name = uri.as_str().try_into().map_err(|_| IssueError::Name(uri.clone()))?;
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(key.public_key(), vec![SanType::URI(name)], usages, lifetime)
    }

    /// Certifies that a key belongs to a server of these DNS names.
    pub(super) fn issue_server(
        &self,
        key: &impl PublicKeyData,
        names: &[String],
        lifetime: Duration,
    ) -> Result<Issued, IssueError> {
        let name = |name: &String| match name.as_str().try_into() {
            Ok(ia5) if rustls_pki_types::DnsName::try_from(name.as_str()).is_ok() => {
                Ok(SanType::DnsName(ia5))
            }
            _ => Err(IssueError::Name(name.clone())),
        };
        let names = names.iter().map(name).collect::<Result<Vec<_>, _>>()?;
        self.sign(key, names, vec![ExtendedKeyUsagePurpose::ServerAuth], lifetime)
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
    ) -> Result<Issued, IssueError> {
        self.keys.load().sign(key, names, usages, lifetime, self.clock.now())
    }
}

impl Keys {
    fn new(material: Material, clock: &SharedClock) -> Result<Self, String> {
        let key = KeyPair::from_pem(&material.key)
            .map_err(|error| format!("the key beside it cannot be read: {error}"))?;
        let der = CertificateDer::from_pem_slice(material.certificate.as_bytes())
            .map_err(|error| error.to_string())?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        if certificate.public_key().raw != key.subject_public_key_info() {
            return Err("it does not belong to the key beside it".into());
        }
        let signs = certificate.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
        if !certificate.is_ca() || !signs {
            return Err("it is not the certificate of an authority".into());
        }
        let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        match not_after.duration_since(clock.now()) {
            Ok(left) if left < ROOT_WARNING => tracing::warn!(?left, "the root certificate expires soon"),
            Ok(_) => {}
            Err(_) => return Err("it has expired".into()),
        }
        let bundle = TrustBundle::from_pem(material.roots.as_bytes()).map_err(|error| error.to_string())?;
        let roots_pem = bundle.roots().iter().map(to_pem).collect();
        let between = CertificateDer::pem_slice_iter(material.intermediates.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| format!("the chain from it to the root is no PEM: {error}"))?;
        let mut served: Vec<CertificateDer<'static>> = Vec::new();
        for next in std::iter::once(der.clone()).chain(between) {
            if !bundle.roots().contains(&next) && !served.contains(&next) {
                served.push(next);
            }
        }
        let served = served.iter().map(to_pem).collect();
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| error.to_string())?;
        Ok(Self { material, issuer, served, roots_pem, not_after })
    }

    /// Signs for nobody, and looks at it as a workload would.
    fn try_out(&self, clock: &SharedClock) -> Result<(), String> {
        let nobody =
            Identity::new("culvert.invalid", "nobody", "nobody").map_err(|error| error.to_string())?;
        let request = CertificateRequest::new(&nobody).map_err(|error| error.to_string())?;
        let key = SubjectKey::from_request(request.pem()).map_err(|error| error.to_string())?;
        let uri = nobody.to_string();
        let name = uri.as_str().try_into().map_err(|_| format!("{uri:?} cannot stand in a certificate"))?;
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = clock.now();
        let issued = self
            .sign(key.public_key(), vec![SanType::URI(name)], usages, Duration::from_secs(60), now)
            .map_err(|error| error.to_string())?;
        WorkloadCertificate::from_answer(&nobody, &request, &issued.chain, 0, now)
            .map(drop)
            .map_err(|error| format!("what it signs is not accepted under its roots: {error}"))
    }

    fn sign(
        &self,
        key: &impl PublicKeyData,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Issued, IssueError> {
        let not_after = (now + lifetime.clamp(MIN_LIFETIME, MAX_LIFETIME)).min(self.not_after);
        if not_after <= now {
            return Err(IssueError::RootExpired);
        }
        let serial = serial()?;
        let mut params = CertificateParams::default();
        // RFC 5280 section 4.1.2.6: without a subject the alternative name is critical, which rcgen sees to.
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        // Some renew at the middle of the whole validity (Z88): it must not lie in the past from the beginning.
        let skew = SKEW.min(not_after.duration_since(now).unwrap_or_default() / 4);
        params.not_before = OffsetDateTime::from(now - skew);
        params.not_after = OffsetDateTime::from(not_after);
        params.serial_number = Some(SerialNumber::from_slice(&serial));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        let signed = params.signed_by(key, &self.issuer).map_err(crypto)?;
        Ok(Issued {
            chain: std::iter::once(to_pem(signed.der()))
                .chain(self.served.iter().cloned())
                .chain([self.roots_pem.clone()])
                .collect(),
            leaf: signed.der().clone(),
            serial: hex(&serial),
            not_after,
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.keys.load().not_after).finish_non_exhaustive()
    }
}

impl fmt::Debug for Material {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Material").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl Material {
    /// A new root of ten years.
    ///
    /// # Errors
    /// If the cryptography fails.
    pub fn make(now: SystemTime) -> Result<Self, IssueError> {
        let Pair { key, certificate } = make_root(now)?;
        Ok(Self { key, roots: certificate.clone(), certificate, intermediates: String::new() })
    }
}

fn make_root(now: SystemTime) -> Result<Pair, IssueError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(crypto)?;
    let serial = serial()?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "culvert");
    // Two roots in one bundle are told apart by their names.
    params.distinguished_name.push(DnType::CommonName, format!("culvert root {}", hex(&serial[..4])));
    params.not_before = OffsetDateTime::from(now - SKEW);
    params.not_after = OffsetDateTime::from(now + ROOT_LIFETIME);
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let root = params.self_signed(&key).map_err(crypto)?;
    Ok(Pair { key: key.serialize_pem(), certificate: to_pem(root.der()) })
}

/// 128 random bits. The first byte is neither 0 nor above 127, so that the number is positive and keeps its length (RFC
/// 5280 section 4.1.2.2).
fn serial() -> Result<[u8; 16], IssueError> {
    let mut serial = [0; 16];
    tls::provider()
        .secure_random
        .fill(&mut serial)
        .map_err(|_| IssueError::Crypto("no randomness".into()))?;
    serial[0] = serial[0] & 0x3f | 0x40;
    Ok(serial)
}

pub(crate) fn to_pem(der: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der.as_ref()), config)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn crypto(error: rcgen::Error) -> IssueError {
    IssueError::Crypto(error.to_string())
}
