use super::*;
use crate::fixture::{TestCa, dns, id, leaf_params, uri};
use culvert_model::Str;
use rustls::client::ResolvesClientCert;
use rustls::server::ResolvesServerCert;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConnection, HandshakeKind, ProtocolVersion, ServerConnection};

const CLIENT: &str = "spiffe://cluster.local/ns/a/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/a/sa/server";

/// Moves bytes between two ends in memory until neither has any left.
struct Handshake {
    client: ClientConnection,
    server: ServerConnection,
    /// All that the client sent.
    wire: Vec<u8>,
}

impl Handshake {
    fn new(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Self {
        Self {
            client: ClientConnection::new(client, unnamed()).unwrap(),
            server: ServerConnection::new(server).unwrap(),
            wire: Vec::new(),
        }
    }

    /// The first error and the end that raised it.
    fn run(mut self) -> Result<Self, (&'static str, rustls::Error)> {
        while self.client.wants_write() || self.server.wants_write() {
            let mut bytes = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut bytes).unwrap();
            }
            self.wire.extend_from_slice(&bytes);
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                self.server.read_tls(&mut rest).unwrap();
                self.server.process_new_packets().map_err(|error| ("server", error))?;
            }
            bytes.clear();
            while self.server.wants_write() {
                self.server.write_tls(&mut bytes).unwrap();
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                self.client.process_new_packets().map_err(|error| ("client", error))?;
            }
        }
        assert!(!self.client.is_handshaking() && !self.server.is_handshaking());
        Ok(self)
    }
}

fn trust() -> Arc<TrustDomains> {
    Arc::new(TrustDomains::new("cluster.local", [Str::from("alias.domain")]))
}

fn shake(
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
) -> Result<Handshake, (&'static str, rustls::Error)> {
    Handshake::new(client, server).run()
}

/// A client like ours that shows any certificate.
fn client_showing(ca: &TestCa, params: &rcgen::CertificateParams) -> Arc<ClientConfig> {
    let leaf = ca.leaf(params);
    let key = CertifiedKey::new(vec![leaf.der.clone()], leaf.signing_key());
    let resolver: Arc<dyn ResolvesClientCert> = Arc::new(SingleCertAndKey::from(key));
    let mut config = ClientConfig::clone(&client_config(&ca.issue(CLIENT), &[id(SERVER)]));
    config.client_auth_cert_resolver = resolver;
    Arc::new(config)
}

/// A server like ours that shows any certificate.
fn server_showing(ca: &TestCa, params: &rcgen::CertificateParams) -> Arc<ServerConfig> {
    let leaf = ca.leaf(params);
    let key = CertifiedKey::new(vec![leaf.der.clone()], leaf.signing_key());
    let resolver: Arc<dyn ResolvesServerCert> = Arc::new(SingleCertAndKey::from(key));
    let mut config = ServerConfig::clone(&server_config(&ca.issue(SERVER), &trust()));
    config.cert_resolver = resolver;
    Arc::new(config)
}

/// Z15.
#[test]
fn both_ends_know_each_other_afterwards() {
    let ca = TestCa::new("root");
    let (client, server) = (ca.issue(CLIENT), ca.issue(SERVER));
    let done = shake(client_config(&client, &[id(SERVER)]), server_config(&server, &trust())).unwrap();
    let (seen_by_client, seen_by_server) =
        (peer_facts(&done.client).unwrap(), peer_facts(&done.server).unwrap());
    assert_eq!(seen_by_client.identity, id(SERVER));
    assert_eq!(seen_by_client.not_after, server.not_after());
    assert_eq!(seen_by_server.identity, id(CLIENT));
    assert_eq!(seen_by_server.not_after, client.not_after());
    for facts in [seen_by_client, seen_by_server] {
        assert_eq!(facts.cipher, Some(CipherSuite::TLS13_AES_256_GCM_SHA384));
        assert_eq!(facts.kx_group, Some(NamedGroup::X25519MLKEM768));
    }
    assert_eq!(done.client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!((done.client.alpn_protocol(), done.server.alpn_protocol()), (Some(ALPN_H2), Some(ALPN_H2)));
    assert_eq!(done.server.server_name(), None);
}

/// Z15.
#[test]
fn no_session_is_resumed() {
    let ca = TestCa::new("root");
    let (client, server) =
        (client_config(&ca.issue(CLIENT), &[id(SERVER)]), server_config(&ca.issue(SERVER), &trust()));
    for _ in 0..3 {
        let done = shake(client.clone(), server.clone()).unwrap();
        assert_eq!(done.client.handshake_kind(), Some(HandshakeKind::Full));
        assert_eq!(done.client.tls13_tickets_received(), 0);
    }
}

#[test]
fn an_older_peer_without_the_hybrid_group_is_served() {
    let ca = TestCa::new("root");
    let server = server_config(&ca.issue(SERVER), &trust());
    for (group, name) in [
        (aws_lc_rs::kx_group::X25519, NamedGroup::X25519),
        (aws_lc_rs::kx_group::SECP256R1, NamedGroup::secp256r1),
    ] {
        let provider = CryptoProvider { kx_groups: vec![group], ..CryptoProvider::clone(provider()) };
        let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier::new(ca.bundle(), &[id(SERVER)])))
            .with_client_cert_resolver(ca.issue(CLIENT).resolver().clone());
        client.alpn_protocols = vec![ALPN_H2.to_vec()];
        let done = shake(Arc::new(client), server.clone()).unwrap();
        assert_eq!(peer_facts(&done.server).unwrap().kx_group, Some(name));
    }
}

#[test]
fn a_wrong_server_is_refused_by_the_client() {
    let (ca, foreign) = (TestCa::new("root"), TestCa::new("foreign"));
    let client = client_config(&ca.issue(CLIENT), &[id(SERVER)]);
    let mut two = leaf_params(SERVER);
    two.subject_alt_names.push(uri(CLIENT));
    let mut named = leaf_params(SERVER);
    named.subject_alt_names.push(dns("server.example"));
    let mut old = leaf_params(SERVER);
    old.not_after = (SystemTime::now() - std::time::Duration::from_secs(1)).into();
    for (name, server) in [
        ("two URIs", server_showing(&ca, &two)),
        ("URI and DNS", server_showing(&ca, &named)),
        ("expired", server_showing(&ca, &old)),
        ("somebody else", server_showing(&ca, &leaf_params(CLIENT))),
        ("foreign root", server_showing(&foreign, &leaf_params(SERVER))),
    ] {
        let (end, error) = shake(client.clone(), server).err().expect(name);
        assert_eq!(end, "client", "{name}: {error}");
    }
}

#[test]
fn a_wrong_client_is_refused_by_the_server() {
    let (ca, foreign) = (TestCa::new("root"), TestCa::new("foreign"));
    let server = server_config(&ca.issue(SERVER), &trust());
    let mut two = leaf_params(CLIENT);
    two.subject_alt_names.push(uri(SERVER));
    let mut old = leaf_params(CLIENT);
    old.not_after = (SystemTime::now() - std::time::Duration::from_secs(1)).into();
    for (name, params) in [
        ("two URIs", two),
        ("expired", old),
        ("foreign domain", leaf_params("spiffe://foreign/ns/a/sa/client")),
    ] {
        let (end, error) = shake(client_showing(&ca, &params), server.clone()).err().expect(name);
        assert_eq!(end, "server", "{name}: {error}");
    }
    // A client that trusts us, with a certificate of an authority that we do not trust.
    let leaf = foreign.leaf(&leaf_params(CLIENT));
    let key = CertifiedKey::new(vec![leaf.der.clone()], leaf.signing_key());
    let mut client = ClientConfig::clone(&client_config(&ca.issue(CLIENT), &[id(SERVER)]));
    client.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(key));
    assert_eq!(shake(Arc::new(client), server.clone()).err().expect("foreign root").0, "server");
    // An alias of our trust domain is welcome.
    shake(client_showing(&ca, &leaf_params("spiffe://alias.domain/ns/a/sa/client")), server).unwrap();
}

/// Z46.
#[test]
fn a_client_without_a_certificate_or_without_the_key_is_refused() {
    let ca = TestCa::new("root");
    let server = server_config(&ca.issue(SERVER), &trust());
    let mut bare = ClientConfig::clone(&client_config(&ca.issue(CLIENT), &[id(SERVER)]));
    bare.client_auth_cert_resolver = Arc::new(NoCertificate);
    let (end, error) = shake(Arc::new(bare), server.clone()).err().expect("no certificate");
    assert_eq!((end, error), ("server", rustls::Error::NoCertificatesPresented));
    // Somebody else's certificate, which anyone can copy, under a key of one's own.
    let copied = ca.issue(CLIENT);
    let own_key = ca.leaf(&leaf_params(CLIENT)).signing_key();
    let stolen = CertifiedKey::new(copied.chain().to_vec(), own_key);
    let mut thief = ClientConfig::clone(&client_config(&copied, &[id(SERVER)]));
    thief.client_auth_cert_resolver = Arc::new(SingleCertAndKey::from(stolen));
    assert_eq!(shake(Arc::new(thief), server).err().expect("stolen certificate").0, "server");
}

/// Z15.
#[test]
fn a_client_of_another_protocol_is_refused() {
    let ca = TestCa::new("root");
    let server = server_config(&ca.issue(SERVER), &trust());
    let mut http1 = ClientConfig::clone(&client_config(&ca.issue(CLIENT), &[id(SERVER)]));
    http1.alpn_protocols = vec![b"http/1.1".to_vec()];
    let (end, error) = shake(Arc::new(http1), server).err().expect("another ALPN");
    assert_eq!((end, error), ("server", rustls::Error::NoApplicationProtocol));
}

#[test]
fn no_name_and_no_certificate_travels_in_clear() {
    let ca = TestCa::new("root");
    let done =
        shake(client_config(&ca.issue(CLIENT), &[id(SERVER)]), server_config(&ca.issue(SERVER), &trust()))
            .unwrap();
    for needle in ["spiffe", "cluster.local", "0.0.0.0"] {
        assert!(!done.wire.windows(needle.len()).any(|window| window == needle.as_bytes()), "{needle}");
    }
}

#[test]
fn client_configurations_share_what_is_large() {
    let ca = TestCa::new("root");
    let certificate = ca.issue(CLIENT);
    let before = Arc::strong_count(certificate.roots());
    let configs: Vec<_> = (0..10).map(|_| client_config(&certificate, &[id(SERVER)])).collect();
    assert_eq!(Arc::strong_count(certificate.roots()), before + configs.len());
}

#[test]
fn facts_need_a_finished_handshake() {
    let ca = TestCa::new("root");
    let client = ClientConnection::new(client_config(&ca.issue(CLIENT), &[id(SERVER)]), unnamed()).unwrap();
    assert_eq!(peer_facts(&client), Err(PeerError::Missing));
}

#[derive(Debug)]
struct NoCertificate;

impl ResolvesClientCert for NoCertificate {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}
