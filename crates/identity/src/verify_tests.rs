use super::*;
use crate::fixture::{HOUR, TestCa, dns, id, leaf_params, uri, workload};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose};
use std::time::{Duration, SystemTime};

const A: &str = "spiffe://cluster.local/ns/a/sa/b";

/// Both verifiers' verdicts on one leaf: as a server that should be A, and as a client.
fn verdicts(ca: &TestCa, leaf: &CertificateDer<'_>) -> [Result<(), Error>; 2] {
    let server = ServerVerifier::new(ca.bundle(), &[workload("other", "one"), id(A)]);
    let trust = TrustDomains::new("cluster.local", [Str::from("old.domain")]);
    let client = ClientVerifier::new(ca.bundle(), Arc::new(trust));
    let now = UnixTime::now();
    [
        server.verify_server_cert(leaf, &[], &tls::unnamed(), &[], now).map(drop),
        client.verify_client_cert(leaf, &[], now).map(drop),
    ]
}

fn judge(edit: impl FnOnce(&mut CertificateParams)) -> [Result<(), Error>; 2] {
    let ca = TestCa::new("root");
    let mut params = leaf_params(A);
    edit(&mut params);
    verdicts(&ca, &ca.leaf(&params).der)
}

/// Both refuse, each with a text that says this.
#[track_caller]
fn both_say(verdicts: [Result<(), Error>; 2], what: &str) {
    for verdict in verdicts {
        let text = verdict.expect_err(what).to_string();
        assert!(text.contains(what), "{text:?} should say {what:?}");
    }
}

#[test]
fn the_right_peer_is_accepted() {
    assert_eq!(judge(|_| {}), [Ok(()), Ok(())]);
}

#[test]
fn names_other_than_one_uri_are_refused() {
    both_say(
        judge(|p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/a/sa/c"))),
        "2 subject alternative names",
    );
    both_say(judge(|p| p.subject_alt_names.push(dns("a.example"))), "2 subject alternative names");
    both_say(judge(|p| p.subject_alt_names.clear()), "no subject alternative name");
    both_say(judge(|p| p.subject_alt_names = vec![dns("a.example")]), "a.example");
    both_say(
        judge(|p| p.subject_alt_names = vec![uri("spiffe://cluster.local/x")]),
        "spiffe://cluster.local/x",
    );
}

#[test]
fn dates_are_checked() {
    let now = SystemTime::now();
    both_say(judge(|p| p.not_after = (now - Duration::from_secs(5)).into()), "expired");
    both_say(judge(|p| p.not_before = (now + HOUR / 2).into()), "not valid yet");
}

#[test]
fn a_foreign_root_is_refused() {
    let (ca, foreign) = (TestCa::new("root"), TestCa::new("root"));
    both_say(verdicts(&ca, &foreign.leaf(&leaf_params(A)).der), "BadSignature");
    let foreign = TestCa::new("foreign");
    both_say(verdicts(&ca, &foreign.leaf(&leaf_params(A)).der), "UnknownIssuer");
}

#[test]
fn an_authority_is_no_workload() {
    let authority = |p: &mut CertificateParams| {
        p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        p.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
    };
    both_say(judge(authority), "CaUsedAsEndEntity");
    let ca = TestCa::new("root");
    for verdict in verdicts(&ca, &ca.root_der()) {
        verdict.expect_err("the root itself is no peer");
    }
}

#[test]
fn a_workloads_certificate_signs_no_other() {
    let ca = TestCa::new("root");
    let mut mallory = leaf_params("spiffe://cluster.local/ns/m/sa/m");
    mallory.distinguished_name.push(rcgen::DnType::OrganizationName, "mallory");
    let own = ca.leaf(&mallory);
    let issuer = rcgen::Issuer::new(mallory, own.key);
    let forged = leaf_params(A).signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap();
    let server = ServerVerifier::new(ca.bundle(), &[id(A)]);
    let client = ClientVerifier::new(ca.bundle(), Arc::new(TrustDomains::new("cluster.local", [])));
    let now = UnixTime::now();
    let chain = [own.der];
    both_say(
        [
            server.verify_server_cert(forged.der(), &chain, &tls::unnamed(), &[], now).map(drop),
            client.verify_client_cert(forged.der(), &chain, now).map(drop),
        ],
        "EndEntityUsedAsCa",
    );
}

#[test]
fn key_usage_is_checked() {
    let only = |usage| move |p: &mut CertificateParams| p.extended_key_usages = vec![usage];
    let [server, client] = judge(only(ExtendedKeyUsagePurpose::ServerAuth));
    assert_eq!(server, Ok(()));
    client.expect_err("a certificate for servers is no client's");
    let [server, client] = judge(only(ExtendedKeyUsagePurpose::ClientAuth));
    server.expect_err("a certificate for clients is no server's");
    assert_eq!(client, Ok(()));
    both_say(judge(|p| p.key_usages = vec![KeyUsagePurpose::KeyEncipherment]), "key usage");
}

/// Z92.
#[test]
fn a_server_must_be_exactly_whom_we_dialled() {
    for other in
        ["spiffe://cluster.local/ns/a/sa/bb", "spiffe://cluster.local/ns/aa/sa/b", "spiffe://other/ns/a/sa/b"]
    {
        let [server, _] = judge(|p| p.subject_alt_names = vec![uri(other)]);
        let error = server.unwrap_err();
        let expected = format!("{}, {A}", workload("other", "one"));
        assert_eq!(refusal(&error), Some(&PeerError::Unexpected { got: Box::new(id(other)), expected }));
    }
    let ca = TestCa::new("root");
    let nobody = ServerVerifier::new(ca.bundle(), &[]);
    let leaf = ca.leaf(&leaf_params(A)).der;
    let error = nobody.verify_server_cert(&leaf, &[], &tls::unnamed(), &[], UnixTime::now()).unwrap_err();
    assert!(error.to_string().contains("expected nobody"), "{error}");
}

/// Z46.
#[test]
fn a_client_must_be_of_our_trust_domain_or_an_alias() {
    let [_, client] = judge(|p| p.subject_alt_names = vec![uri("spiffe://old.domain/ns/a/sa/b")]);
    assert_eq!(client, Ok(()));
    for domain in ["other", "cluster.local.evil", "luster.local", "cluster"] {
        let name = format!("spiffe://{domain}/ns/a/sa/b");
        let [_, client] = judge(|p| p.subject_alt_names = vec![uri(&name)]);
        let error = client.unwrap_err();
        let accepted = "cluster.local, old.domain".to_owned();
        assert_eq!(refusal(&error), Some(&PeerError::TrustDomain { got: Box::new(id(&name)), accepted }));
    }
}

#[test]
fn junk_is_refused() {
    let ca = TestCa::new("root");
    for bytes in [vec![], vec![0x30], vec![0xff; 100]] {
        for verdict in verdicts(&ca, &CertificateDer::from(bytes)) {
            verdict.expect_err("junk is no certificate");
        }
    }
}

#[test]
fn a_long_list_of_expectations_is_cut_in_texts() {
    let expected: Vec<_> = (0..6).map(|n| workload("a", &format!("b{n}"))).collect();
    assert!(spell(&expected).ends_with("b3 and 2 more"), "{}", spell(&expected));
}
