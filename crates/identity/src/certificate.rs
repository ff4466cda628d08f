//! A workload's certificate, checked when it came from the authority, and the identity in a peer's.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_model::identity::{Identity, ParseIdentityError};
use rustls::sign::{CertifiedKey, SigningKey, SingleCertAndKey};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

use crate::bundle::{BundleError, TrustBundle};
use crate::csr::CertificateRequest;

/// Largest certificate that is looked at, bytes of DER. One with an RSA-4096 key and a full URI has about 2 KiB.
pub const MAX_CERTIFICATE: usize = 16 * 1024;
/// Most certificates that are sent beside the leaf. rustls and its peers refuse long chains; two are common.
pub const MAX_INTERMEDIATES: usize = 8;
/// Largest answer of a certificate authority: 8 intermediates and 64 roots of about 4 KiB of PEM each fit.
pub const MAX_CHAIN: usize = 512 * 1024;

/// A certificate and its key, with the roots that came with it. Immutable: renewal makes another one.
pub struct WorkloadCertificate {
    identity: Identity,
    certified: Arc<CertifiedKey>,
    resolver: Arc<SingleCertAndKey>,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
    roots: Arc<TrustBundle>,
    generation: u64,
}

/// What a leaf certificate says about its holder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeafFacts {
    /// Its only name.
    pub identity: Identity,
    /// Start of validity.
    pub not_before: SystemTime,
    /// End of validity.
    pub not_after: SystemTime,
    /// Serial number, hex, without separators.
    pub serial: String,
}

/// Why a certificate shows no identity of the mesh, or not the one that is wanted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The peer sent none.
    #[error("the peer sent no certificate")]
    Missing,
    /// Larger than [`MAX_CERTIFICATE`].
    #[error("the peer's certificate has {0} bytes; {MAX_CERTIFICATE} are allowed")]
    TooLarge(usize),
    /// Not a DER certificate.
    #[error("the peer's certificate cannot be read: {0}")]
    Malformed(String),
    /// It has no subject alternative name.
    #[error("the peer's certificate has no subject alternative name; exactly one URI is required")]
    NoName,
    /// It has several.
    #[error("the peer's certificate has {0} subject alternative names; exactly one URI is required")]
    ManyNames(usize),
    /// Its only name is of another kind.
    #[error("the peer's certificate names {0}; exactly one URI is required")]
    NotUri(String),
    /// Its URI is no identity.
    #[error("the peer's certificate: {0}")]
    NotIdentity(#[from] ParseIdentityError),
    /// Its key may not sign a handshake, or may sign certificates (SPIFFE X.509-SVID section 4.3).
    #[error("the peer's certificate for {0} has a key usage that is not a workload's")]
    KeyUsage(Box<Identity>),
    /// It belongs to another mesh.
    #[error("the peer {got} is of a trust domain that is not accepted here ({accepted})")]
    TrustDomain {
        /// The peer.
        got: Box<Identity>,
        /// Ours and its aliases, joined by commas.
        accepted: String,
    },
    /// It is somebody else than was dialled.
    #[error("the peer is {got}, expected {expected}")]
    Unexpected {
        /// The peer.
        got: Box<Identity>,
        /// Who would have been right, joined by commas, shortened.
        expected: String,
    },
}

/// Why what the authority returned is not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// Fewer than two elements: a leaf and a root are the least.
    #[error("the authority returned {0} chain elements; a certificate and a root are the least")]
    Short(usize),
    /// More than [`MAX_CHAIN`] bytes.
    #[error("the authority returned {0} bytes; {MAX_CHAIN} are allowed")]
    TooLarge(usize),
    /// One element is no PEM.
    #[error("the authority returned what is no PEM: {0}")]
    Pem(String),
    /// No leaf, or too many certificates before the root.
    #[error("the authority returned {0} certificates before the root; 1 to {max} are allowed", max = MAX_INTERMEDIATES + 1)]
    Length(usize),
    /// The last element is no bundle.
    #[error("the authority's roots: {0}")]
    Roots(#[from] BundleError),
    /// The leaf shows no identity.
    #[error("the authority returned a certificate that peers would refuse: {0}")]
    Leaf(#[from] PeerError),
    /// It is for somebody else.
    #[error("the authority returned a certificate for {got}, asked for {asked}")]
    Identity {
        /// What came.
        got: Box<Identity>,
        /// What was asked for.
        asked: Box<Identity>,
    },
    /// It is for another key.
    #[error("the authority returned a certificate for another key than the one it was asked to certify")]
    Key,
    /// It is over before it began.
    #[error("the authority returned a certificate that is already expired")]
    Expired,
    /// It is not valid yet: the clock here and the authority's differ by more than the authority allows for.
    #[error("the authority returned a certificate that is valid only in {0:?}: check the clocks")]
    NotYetValid(Duration),
    /// It does not lead to the roots that came with it.
    #[error("the authority returned a certificate that does not lead to its own roots: {0}")]
    Unrooted(String),
}

impl WorkloadCertificate {
    /// Checks what the authority returned for `request` and makes a certificate of it. `elements` are PEM texts, the leaf
    /// first and the roots last (Z91); `now` is the wall clock.
    ///
    /// # Errors
    /// [`ChainError`] names what is wrong: wrong identity or key (Z87), wrong dates, sizes out of bounds, or a chain that its
    /// own roots do not verify.
    pub fn from_answer(
        asked: &Identity,
        request: &CertificateRequest,
        elements: &[String],
        generation: u64,
        now: SystemTime,
    ) -> Result<Self, ChainError> {
        let (chain, roots) = split(elements)?;
        Self::assemble(
            asked,
            request.key().clone(),
            chain,
            Arc::new(TrustBundle::from_pem(roots)?),
            generation,
            now,
        )
    }

    /// Joins parts that are at hand already; every check of [`WorkloadCertificate::from_answer`] applies.
    ///
    /// # Errors
    /// See [`WorkloadCertificate::from_answer`].
    pub fn assemble(
        asked: &Identity,
        key: Arc<dyn SigningKey>,
        chain: Vec<CertificateDer<'static>>,
        roots: Arc<TrustBundle>,
        generation: u64,
        now: SystemTime,
    ) -> Result<Self, ChainError> {
        if !(1..=MAX_INTERMEDIATES + 1).contains(&chain.len()) {
            return Err(ChainError::Length(chain.len()));
        }
        let leaf = leaf_facts(&chain[0])?;
        if leaf.identity != *asked {
            return Err(ChainError::Identity {
                got: Box::new(leaf.identity),
                asked: Box::new(asked.clone()),
            });
        }
        if leaf.not_after <= now {
            return Err(ChainError::Expired);
        }
        if let Ok(early) = leaf.not_before.duration_since(now)
            && !early.is_zero()
        {
            return Err(ChainError::NotYetValid(early));
        }
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        roots
            .client_chain()
            .verify_client_cert(
                &chain[0],
                &chain[1..],
                rustls_pki_types::UnixTime::since_unix_epoch(since_epoch),
            )
            .map_err(|error| ChainError::Unrooted(error.to_string()))?;
        let certified = Arc::new(CertifiedKey::new(chain, key));
        certified.keys_match().map_err(|_| ChainError::Key)?;
        Ok(Self {
            identity: leaf.identity,
            resolver: Arc::new(SingleCertAndKey::from(certified.clone())),
            certified,
            not_before: leaf.not_before,
            not_after: leaf.not_after,
            serial: leaf.serial,
            roots,
            generation,
        })
    }

    /// Whose it is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What is sent to peers, DER: the leaf and its intermediates, without the root.
    #[must_use]
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// The leaf.
    #[must_use]
    pub fn leaf(&self) -> &CertificateDer<'static> {
        &self.certified.cert[0]
    }

    /// Start of validity.
    #[must_use]
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// End of validity.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Serial number, hex.
    #[must_use]
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// The roots that came with it: whom its holder trusts.
    #[must_use]
    pub fn roots(&self) -> &Arc<TrustBundle> {
        &self.roots
    }

    /// Grows with every certificate one manager obtains, whoever it is for; a cache of what was made from a certificate
    /// can use it as its key.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether it is over at `now`. RFC 5280 section 4.1.2.5 still counts `not_after` itself as valid; we do not, as a peer's
    /// clock will be past it when it looks.
    #[must_use]
    pub fn expired(&self, now: SystemTime) -> bool {
        self.not_after <= now
    }

    /// Gives rustls the same certificate for every handshake, as client and as server.
    pub(crate) fn resolver(&self) -> &Arc<SingleCertAndKey> {
        &self.resolver
    }

    /// Gives it its number once it is known to be good.
    pub(crate) fn number(&mut self, generation: u64) {
        self.generation = generation;
    }

    /// Makes equal bundles one, so that a renewal that brought the same roots does not parse and hold them twice.
    pub(crate) fn share_roots(&mut self, known: &Arc<TrustBundle>) {
        if *self.roots == **known {
            self.roots = known.clone();
        }
    }
}

impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity.to_string())
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .field("generation", &self.generation)
            .finish_non_exhaustive()
    }
}

/// The identity in a peer's certificate: it has exactly one subject alternative name, a URI, which is an identity of a
/// mesh. Says nothing about who signed it.
///
/// # Errors
/// [`PeerError`] names what is wrong. Any bytes are safe to pass.
pub fn peer_identity(certificate: &CertificateDer<'_>) -> Result<Identity, PeerError> {
    leaf_facts(certificate).map(|facts| facts.identity)
}

/// What [`peer_identity`] checks, and the rest of what is worth knowing of a leaf.
///
/// # Errors
/// See [`peer_identity`]; also [`PeerError::KeyUsage`].
pub fn leaf_facts(certificate: &CertificateDer<'_>) -> Result<LeafFacts, PeerError> {
    if certificate.len() > MAX_CERTIFICATE {
        return Err(PeerError::TooLarge(certificate.len()));
    }
    let malformed = |error: &dyn fmt::Display| PeerError::Malformed(error.to_string());
    let (rest, parsed) = X509Certificate::from_der(certificate).map_err(|error| malformed(&error))?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed(format!("{} bytes follow it", rest.len())));
    }
    let names = parsed.subject_alternative_name().map_err(|error| malformed(&error))?;
    let names = names.map(|extension| &extension.value.general_names[..]).unwrap_or_default();
    let identity: Identity = match names {
        [] => return Err(PeerError::NoName),
        [GeneralName::URI(uri)] => uri.parse()?,
        [other] => return Err(PeerError::NotUri(clip(&other.to_string()))),
        many => return Err(PeerError::ManyNames(many.len())),
    };
    if let Some(usage) = parsed.key_usage().map_err(|error| malformed(&error))?
        && (!usage.value.digital_signature() || usage.value.key_cert_sign() || usage.value.crl_sign())
    {
        return Err(PeerError::KeyUsage(Box::new(identity)));
    }
    Ok(LeafFacts {
        identity,
        not_before: wall(parsed.validity().not_before),
        not_after: wall(parsed.validity().not_after),
        serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// The served chain and the text of the roots.
fn split(elements: &[String]) -> Result<(Vec<CertificateDer<'static>>, &[u8]), ChainError> {
    let size = elements.iter().map(String::len).sum();
    if size > MAX_CHAIN {
        return Err(ChainError::TooLarge(size));
    }
    let [served @ .., roots] = elements else { return Err(ChainError::Short(0)) };
    if served.is_empty() {
        return Err(ChainError::Short(1));
    }
    let chain = served
        .iter()
        .flat_map(|element| CertificateDer::pem_slice_iter(element.as_bytes()))
        .take(MAX_INTERMEDIATES + 2)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ChainError::Pem(error.to_string()))?;
    Ok((chain, roots.as_bytes()))
}

fn wall(time: ASN1Time) -> SystemTime {
    let seconds = Duration::from_secs(time.timestamp().unsigned_abs());
    let shifted = if time.timestamp() < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    // ASN.1 years end at 9999 and every platform we build for holds those: the fallback only keeps this total.
    shifted.unwrap_or(SystemTime::UNIX_EPOCH)
}

fn clip(text: &str) -> String {
    text.chars().take(128).collect()
}

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod tests;
