use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::csr::CertificateRequest;
use culvert_runtime::clock::{Clock, ManualClock, SharedClock};
use rcgen::{
    CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, RsaKeySize, SanType,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{HOUR, NAME, authority, clock, workload};
use crate::ca::request::{MAX_REQUEST, SubjectKey, SubjectKeyError};
use crate::ca::{Authority, AuthorityError, IssueError, Serving};

/// A request that asks for more than it may have.
fn greedy_request(key: &KeyPair) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "root of all");
    params.subject_alt_names = vec![
        SanType::URI("spiffe://cluster.local/ns/kube-system/sa/admin".try_into().unwrap()),
        SanType::DnsName("controller.example".try_into().unwrap()),
    ];
    params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    params.serialize_request(key).unwrap().pem().unwrap()
}

#[test]
fn of_a_request_only_the_key_counts() {
    let (_dir, authority) = authority();
    let key = KeyPair::generate().unwrap();
    let begun = SystemTime::now();
    let issued = authority.issue(&greedy_request(&key), &workload("b"), HOUR).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.leaf).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical);
    assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local/ns/a/sa/b")]);
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth && !extended.code_signing && !extended.any);
    assert_eq!(leaf.public_key().subject_public_key.data.as_ref(), key.public_key_raw());
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    let (start, end) = (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
    assert!((seconds(begun) - 61..=seconds(begun) - 59).contains(&start));
    assert!((seconds(begun) + 3599..=seconds(begun) + 3601).contains(&end));
}

#[test]
fn serials_are_long_positive_and_never_repeat() {
    let (_dir, authority) = authority();
    let request = CertificateRequest::new(&workload("b")).unwrap();
    let serials: HashSet<_> =
        (0..200).map(|_| authority.issue(request.pem(), &workload("b"), HOUR).unwrap().serial).collect();
    assert_eq!(serials.len(), 200);
    assert!(serials.iter().all(|serial| serial.len() == 32 && serial.as_bytes()[0] < b'8'));
}

#[test]
fn a_workload_accepts_what_was_issued() {
    let (_dir, authority) = authority();
    let request = CertificateRequest::new(&workload("b")).unwrap();
    for lifetime in [20, 3600, 24 * 3600] {
        let lifetime = Duration::from_secs(lifetime);
        let chain = authority.issue(request.pem(), &workload("b"), lifetime).unwrap().chain;
        let now = SystemTime::now();
        let certificate = WorkloadCertificate::from_answer(&workload("b"), &request, &chain, 1, now).unwrap();
        let left = certificate.not_after().duration_since(now).unwrap();
        assert!(left <= lifetime && left >= lifetime - Duration::from_secs(2), "{left:?}");
    }
}

#[test]
fn keys_that_workloads_may_use() {
    let (_dir, authority) = authority();
    let mut keys: Vec<KeyPair> =
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519]
            .into_iter()
            .map(|kind| KeyPair::generate_for(kind).unwrap())
            .collect();
    keys.push(KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, RsaKeySize::_2048).unwrap());
    for key in keys {
        let issued = authority.issue(&greedy_request(&key), &workload("b"), HOUR);
        issued.unwrap_or_else(|error| panic!("{:?}: {error}", key.algorithm()));
    }
    let other = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap();
    assert_eq!(SubjectKey::from_request(&greedy_request(&other)).unwrap_err(), SubjectKeyError::Kind);
}

#[test]
fn requests_that_are_no_good() {
    let refused = |pem: &str| SubjectKey::from_request(pem).unwrap_err();
    let good = greedy_request(&KeyPair::generate().unwrap());
    assert!(matches!(refused(""), SubjectKeyError::Malformed(_)));
    assert!(matches!(refused(&good[..good.len() / 2]), SubjectKeyError::Malformed(_)));
    assert!(matches!(refused(&" ".repeat(MAX_REQUEST + 1)), SubjectKeyError::TooLarge(_)));
    // A change anywhere in what is signed, such as in the key, is noticed.
    let mut der = pem::parse(&good).unwrap().into_contents();
    let key_at = der.windows(3).position(|w| w == [0x03, 0x42, 0x00]).unwrap() + 20;
    der[key_at] ^= 1;
    let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der.clone()));
    assert!(matches!(refused(&forged), SubjectKeyError::Signature(_)));
    der.push(0);
    let longer = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
    assert!(matches!(refused(&longer), SubjectKeyError::Malformed(_)));
}

proptest::proptest! {
    #[test]
    fn any_request_is_safe(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..1024), text in ".{0,200}") {
        let _ = SubjectKey::from_request(&text);
        let _ = SubjectKey::from_request(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", bytes)));
    }
}

/// D52.
#[test]
fn the_root_outlives_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state/ca");
    let first = Authority::open(&path, clock()).unwrap();
    let request = CertificateRequest::new(&workload("b")).unwrap();
    let before = first.issue(request.pem(), &workload("b"), HOUR).unwrap();
    let key = path.join("root/key.pem");
    assert_eq!(fs::metadata(&key).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_to_string(path.join("root/cert.pem")).unwrap(), first.root_pem());
    let second = Authority::open(&path, clock()).unwrap();
    assert_eq!(first.root_pem(), second.root_pem());
    // What each signed is good under the other's root.
    let after = second.issue(request.pem(), &workload("b"), HOUR).unwrap();
    for chain in [[&before.chain[0], &after.chain[1]], [&after.chain[0], &before.chain[1]]] {
        let chain = chain.map(String::clone);
        WorkloadCertificate::from_answer(&workload("b"), &request, &chain, 1, SystemTime::now()).unwrap();
    }
    assert_eq!(fs::read_dir(&path).unwrap().count(), 1, "nothing is left beside the pair");
}

#[test]
fn a_pair_that_is_no_good_is_refused_and_left_alone() {
    let (dir, _) = authority();
    let (other, _) = authority();
    let root = dir.path().join("ca/root");
    let (key, certificate) = (root.join("key.pem"), root.join("cert.pem"));
    let good = [&key, &certificate].map(|path| fs::read(path).unwrap());
    let open = || Authority::open(&dir.path().join("ca"), clock());
    open().unwrap();

    fs::copy(other.path().join("ca").join("root").join("cert.pem"), &certificate).unwrap();
    let error = open().unwrap_err();
    assert!(error.to_string().contains("does not belong to the key"), "{error}");
    assert_eq!(fs::read(&key).unwrap(), good[0], "the key is as it was");

    fs::write(&certificate, "junk").unwrap();
    assert!(matches!(open(), Err(AuthorityError::Pair { .. })));
    fs::remove_file(&certificate).unwrap();
    assert!(matches!(open(), Err(AuthorityError::File { .. })));
    fs::write(&certificate, &good[1]).unwrap();
    fs::write(&key, "junk").unwrap();
    assert!(matches!(open(), Err(AuthorityError::Pair { .. })));
    fs::remove_file(&key).unwrap();
    assert!(matches!(open(), Err(AuthorityError::File { .. })));
    assert!(!key.exists(), "no new key takes the place of a lost one");
    fs::write(&key, &good[0]).unwrap();
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(open(), Err(AuthorityError::KeyMode { mode: 0o644, .. })));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
    open().unwrap();
}

#[test]
fn an_expired_root_signs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let manual = ManualClock::new(SystemTime::now());
    let clock: SharedClock = Arc::new(manual.clone());
    let authority = Authority::open(dir.path(), clock.clone()).unwrap();
    let request = CertificateRequest::new(&workload("b")).unwrap();
    let decade = Duration::from_secs(10 * 365 * 24 * 3600);
    manual.advance(decade - HOUR);
    let issued = authority.issue(request.pem(), &workload("b"), 24 * HOUR).unwrap();
    assert!(issued.not_after <= manual.now() + HOUR, "no leaf outlives its root");
    manual.advance(HOUR);
    assert_eq!(authority.issue(request.pem(), &workload("b"), HOUR), Err(IssueError::RootExpired));
    assert!(matches!(Authority::open(dir.path(), clock), Err(AuthorityError::Pair { .. })));
}

#[test]
fn the_serving_certificate_is_renewed_at_half_its_life() {
    let dir = tempfile::tempdir().unwrap();
    let manual = ManualClock::new(SystemTime::now());
    let authority = Arc::new(Authority::open(dir.path(), Arc::new(manual.clone())).unwrap());
    let serving = Serving::new(authority.clone(), vec![NAME.into(), "localhost".into()]).unwrap();
    let first = serving.current();
    let (_, leaf) = X509Certificate::from_der(&first.cert[0]).unwrap();
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::DNSName(NAME), GeneralName::DNSName("localhost")]);
    assert!(!leaf.extended_key_usage().unwrap().unwrap().value.client_auth);
    manual.advance(11 * HOUR);
    assert_eq!(serving.current().cert, first.cert);
    manual.advance(2 * HOUR);
    let second = serving.current();
    assert_ne!(second.cert, first.cert);
    second.keys_match().unwrap();
    for bad in ["a b", "", "spiffe://a/ns/b/sa/c"] {
        assert!(
            matches!(Serving::new(authority.clone(), vec![bad.into()]), Err(IssueError::Name(_))),
            "{bad:?}"
        );
    }
}

/// Whoever renews at the middle of the whole validity does so after a third of what was asked for, not at once and for ever.
#[test]
fn the_middle_of_a_short_validity_lies_ahead() {
    let (_dir, authority) = authority();
    let key = KeyPair::generate().unwrap();
    let begun = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
    let issued = authority.issue(&greedy_request(&key), &workload("b"), Duration::from_secs(12)).unwrap();
    let (_, leaf) = X509Certificate::from_der(&issued.leaf).unwrap();
    let (start, end) = (leaf.validity().not_before.timestamp(), leaf.validity().not_after.timestamp());
    assert!((start + end) / 2 >= begun + 3, "from {} to {}", start - begun, end - begun);
    assert!(start < begun, "a clock that is a little behind must accept it");
}
