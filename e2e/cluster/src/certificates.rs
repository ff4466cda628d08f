//! The API server's certificate, its authority, and the key that signs tokens of service accounts.

use std::fs;
use std::net::IpAddr;

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType,
};
use time::{Duration, OffsetDateTime};

use crate::files::Files;

/// Writes `ca.pem`, `apiserver.pem`, `apiserver.key`, `accounts.key` and `accounts.pem`.
pub(crate) fn write(files: &Files, addresses: &[IpAddr]) -> Result<()> {
    let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
    let (from, until) =
        (OffsetDateTime::now_utc() - Duration::HOUR, OffsetDateTime::now_utc() + Duration::days(30));
    let mut authority = CertificateParams::default();
    authority.distinguished_name.push(DnType::CommonName, "test cluster");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (authority.not_before, authority.not_after) = (from, until);
    let authority_key = key()?;
    let root = authority.self_signed(&authority_key)?;
    let issuer = Issuer::from_params(&authority, &authority_key);

    let names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ];
    let mut server = CertificateParams::new(names.map(str::to_owned))?;
    server.subject_alt_names.extend(addresses.iter().map(|address| SanType::IpAddress(*address)));
    server.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    server.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    (server.not_before, server.not_after) = (from, until);
    let server_key = key()?;
    let certificate = server.signed_by(&server_key, &issuer)?;

    let accounts = key()?;
    for (name, text) in [
        ("ca.pem", root.pem()),
        ("apiserver.pem", certificate.pem()),
        ("apiserver.key", server_key.serialize_pem()),
        ("accounts.key", accounts.serialize_pem()),
        ("accounts.pem", accounts.public_key_pem()),
    ] {
        fs::write(files.at(name), text)?;
    }
    Ok(())
}
