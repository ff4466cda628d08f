use super::*;
use crate::fixture::{HOUR, TestCa, dns, id, leaf_params, uri, workload};
use proptest::prelude::*;
use rcgen::{IsCa, KeyUsagePurpose, SanType};

const A: &str = "spiffe://cluster.local/ns/a/sa/b";

fn answer(edit: impl FnOnce(&mut Vec<String>)) -> Result<WorkloadCertificate, ChainError> {
    let (ca, request) = (TestCa::new("root"), CertificateRequest::new(&id(A)).unwrap());
    let mut elements = ca.answer(request.pem(), &leaf_params(A));
    edit(&mut elements);
    WorkloadCertificate::from_answer(&id(A), &request, &elements, 7, SystemTime::now())
}

#[test]
fn a_good_answer_becomes_a_certificate() {
    let certificate = answer(|_| {}).unwrap();
    assert_eq!(certificate.identity(), &id(A));
    assert_eq!((certificate.chain().len(), certificate.roots().roots().len()), (1, 1));
    assert_eq!(certificate.generation(), 7);
    let (now, end) = (SystemTime::now(), certificate.not_after());
    assert!(certificate.not_before() < now && end > now + HOUR - Duration::from_secs(10));
    assert!(!certificate.expired(end - Duration::from_nanos(1)) && certificate.expired(end));
    assert!(certificate.serial().len() >= 16 && certificate.serial().bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(peer_identity(certificate.leaf()), Ok(id(A)));
}

/// Z91.
#[test]
fn the_last_element_may_hold_several_roots() {
    let other = TestCa::new("other").root_pem();
    let certificate = answer(|elements| elements[1].push_str(&other)).unwrap();
    assert_eq!((certificate.chain().len(), certificate.roots().roots().len()), (1, 2));
}

#[test]
fn an_answer_that_is_not_what_was_asked_for_is_refused() {
    let (ca, request) = (TestCa::new("root"), CertificateRequest::new(&id(A)).unwrap());
    let now = SystemTime::now();
    let judge = |elements: &[String], at| {
        WorkloadCertificate::from_answer(&id(A), &request, elements, 1, at).unwrap_err()
    };

    let somebody = ca.answer(request.pem(), &leaf_params("spiffe://cluster.local/ns/a/sa/c"));
    assert!(matches!(judge(&somebody, now), ChainError::Identity { .. }));
    let other_key = ca.answer(CertificateRequest::new(&id(A)).unwrap().pem(), &leaf_params(A));
    assert_eq!(judge(&other_key, now), ChainError::Key);
    let good = ca.answer(request.pem(), &leaf_params(A));
    assert_eq!(judge(&good, now + 2 * HOUR), ChainError::Expired);
    assert!(matches!(judge(&good, now - HOUR), ChainError::NotYetValid(_)));
    let foreign = [good[0].clone(), TestCa::new("other").root_pem()];
    assert!(matches!(judge(&foreign, now), ChainError::Unrooted(_)));
    let mut two = leaf_params(A);
    two.subject_alt_names.push(dns("a.example"));
    let two = ca.answer(request.pem(), &two);
    assert_eq!(judge(&two, now), ChainError::Leaf(PeerError::ManyNames(2)));
}

#[test]
fn an_answer_of_the_wrong_shape_or_size_is_refused() {
    assert_eq!(answer(Vec::clear).unwrap_err(), ChainError::Short(0));
    assert_eq!(answer(|e| e.truncate(1)).unwrap_err(), ChainError::Short(1));
    assert_eq!(answer(|e| e[0].clear()).unwrap_err(), ChainError::Length(0));
    assert!(matches!(answer(|e| e[0].truncate(100)).unwrap_err(), ChainError::Pem(_)));
    assert_eq!(answer(|e| e[1].clear()).unwrap_err(), ChainError::Roots(BundleError::Empty));
    let many = answer(|e| e[0] = e[0].repeat(MAX_INTERMEDIATES + 2)).unwrap_err();
    assert_eq!(many, ChainError::Length(MAX_INTERMEDIATES + 2));
    assert!(matches!(answer(|e| e[0] = " ".repeat(MAX_CHAIN)).unwrap_err(), ChainError::TooLarge(_)));
}

#[test]
fn exactly_one_uri_is_a_peers_identity() {
    let ca = TestCa::new("root");
    let judge = |names: Vec<SanType>| {
        let mut params = leaf_params(A);
        params.subject_alt_names = names;
        peer_identity(&ca.leaf(&params).der)
    };
    assert_eq!(judge(vec![uri(A)]), Ok(workload("a", "b")));
    assert_eq!(judge(vec![]), Err(PeerError::NoName));
    assert_eq!(judge(vec![uri(A), uri(A)]), Err(PeerError::ManyNames(2)));
    assert_eq!(judge(vec![uri(A), dns("a.example")]), Err(PeerError::ManyNames(2)));
    assert!(matches!(judge(vec![dns("a.example")]), Err(PeerError::NotUri(_))));
    assert!(matches!(judge(vec![SanType::IpAddress([10, 0, 0, 1].into())]), Err(PeerError::NotUri(_))));
    assert!(matches!(judge(vec![uri("https://a.example/ns/a/sa/b")]), Err(PeerError::NotIdentity(_))));
    assert!(matches!(judge(vec![uri("spiffe://cluster.local/other")]), Err(PeerError::NotIdentity(_))));
}

#[test]
fn a_key_that_signs_certificates_is_no_workloads() {
    let ca = TestCa::new("root");
    for usages in [
        vec![KeyUsagePurpose::KeyEncipherment],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyCertSign],
        vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::CrlSign],
    ] {
        let mut params = leaf_params(A);
        params.key_usages = usages;
        params.is_ca = IsCa::ExplicitNoCa;
        assert_eq!(peer_identity(&ca.leaf(&params).der), Err(PeerError::KeyUsage(Box::new(id(A)))));
    }
    let mut params = leaf_params(A);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    assert_eq!(peer_identity(&ca.leaf(&params).der), Ok(id(A)));
}

#[test]
fn bytes_after_a_certificate_and_too_many_bytes_are_refused() {
    let der = TestCa::new("root").leaf(&leaf_params(A)).der;
    let longer = CertificateDer::from([&der[..], &[0]].concat());
    assert!(matches!(peer_identity(&longer), Err(PeerError::Malformed(_))));
    let large = CertificateDer::from(vec![0x30; MAX_CERTIFICATE + 1]);
    assert_eq!(peer_identity(&large), Err(PeerError::TooLarge(MAX_CERTIFICATE + 1)));
}

/// Z85.
#[test]
fn nothing_shows_the_key() {
    let text = format!("{:?}", answer(|_| {}).unwrap());
    assert!(text.contains(A) && !text.to_lowercase().contains("key"), "{text}");
}

proptest! {
    #[test]
    fn any_bytes_are_safe(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
        let _ = peer_identity(&CertificateDer::from(bytes));
    }

    /// Random bytes seldom get past the outer header: damage to a real certificate reaches the rest of the parser.
    #[test]
    fn a_damaged_certificate_is_safe(places in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        static REAL: std::sync::LazyLock<Vec<u8>> =
            std::sync::LazyLock::new(|| TestCa::new("root").leaf(&leaf_params(A)).der.to_vec());
        let mut bytes = REAL.clone();
        for (place, value) in places {
            let place = place.index(bytes.len());
            bytes[place] = value;
        }
        let _ = peer_identity(&CertificateDer::from(bytes));
    }
}
