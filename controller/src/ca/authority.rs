//! The root key and what is signed with it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

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

/// The mesh's root of trust. One a mesh; it signs leaves directly.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    root_pem: String,
    not_after: SystemTime,
    clock: SharedClock,
}

/// A certificate that was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// PEM texts as the certificate API wants them: the leaf, then the root (D07).
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
        let key = KeyPair::from_pem(&pair.key)
            .map_err(|error| format!("the key beside it cannot be read: {error}"))?;
        let der =
            CertificateDer::from_pem_slice(pair.certificate.as_bytes()).map_err(|error| error.to_string())?;
        let (_, root) = X509Certificate::from_der(&der).map_err(|error| error.to_string())?;
        if root.public_key().raw != key.subject_public_key_info() {
            return Err("it does not belong to the key beside it".into());
        }
        let signs = root.key_usage().ok().flatten().is_none_or(|usage| usage.value.key_cert_sign());
        if !root.is_ca() || !signs {
            return Err("it is not the certificate of an authority".into());
        }
        let seconds = u64::try_from(root.validity().not_after.timestamp()).unwrap_or(0);
        let not_after = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        match not_after.duration_since(clock.now()) {
            Ok(left) if left < ROOT_WARNING => tracing::warn!(?left, "the root certificate expires soon"),
            Ok(_) => {}
            Err(_) => return Err("it has expired".into()),
        }
        let issuer = Issuer::from_ca_cert_der(&der, key).map_err(|error| error.to_string())?;
        let root_pem = to_pem(&der);
        Ok(Self { issuer, root_pem, not_after, clock })
    }

    /// The root, PEM: what every client of the controller and every workload trusts.
    #[must_use]
    pub fn root_pem(&self) -> &str {
        &self.root_pem
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
        let now = self.clock.now();
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
            chain: vec![to_pem(signed.der()), self.root_pem.clone()],
            leaf: signed.der().clone(),
            serial: hex(&serial),
            not_after,
        })
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
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

fn to_pem(der: &CertificateDer<'_>) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE", der.as_ref()), config)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn crypto(error: rcgen::Error) -> IssueError {
    IssueError::Crypto(error.to_string())
}
