//! From a pod outside of the mesh straight to a pod's port 15008, with certificates that must not open it; and with a good
//! one, to know that nothing else was in the way.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, World};
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::issue::{Credentials, Leaf, forged_authority, real_authority, unknown_authority};
use crate::{ATTACKER, CLIENT, SERVERS};

const HBONE: u16 = 15008;
/// Whom the attacker would like to be.
const VICTIM: &str = "spiffe://cluster.local/ns/mesh/sa/client";
/// Longest wait for any answer.
const PATIENCE: Duration = Duration::from_secs(15);
/// Lifetime of a certificate that shall end while its connection is open: time enough for a handshake on a busy machine.
const SHORT: Duration = Duration::from_secs(4);

/// What came of an attempt.
#[derive(Debug)]
enum Outcome {
    /// The tunnel answered.
    Answered(StatusCode),
    /// It never got that far.
    Broken(String),
}

/// One attempt; its own end tells it from others in the log.
struct Attempt {
    outcome: Outcome,
    from: SocketAddr,
}

pub fn run(world: &World, checks: &mut Checks) {
    checks.check("a good certificate opens the tunnel (or the rest says nothing)", || {
        let attempt = attempt(world, Some(Leaf::of(&[VICTIM]).signed(&real_authority(world)?, &[])?))?;
        ensure!(matches!(attempt.outcome, Outcome::Answered(StatusCode::OK)), "{:?}", attempt.outcome);
        let line = world.wait_for_access("node-b", |l| l["src.addr"] == attempt.from.to_string())?;
        ensure!(line["src.identity"] == VICTIM, "{line}");
        Ok(())
    });
    // asserts Z46
    for (name, reason, word, credentials) in bad_certificates(world).expect("certificates can be made") {
        checks.check(&format!("refused: {name}"), || {
            let attempt = attempt(world, credentials)?;
            refused(world, &attempt, reason, word)
        });
    }
    checks.check("refused: plain HTTP", || plain_http(world));
    // asserts Z47, Z49
    checks.check("refused: another pod's address, and the proxy's own ports", || wrong_targets(world));
    checks.check("refused: a new stream after the certificate has expired", || expires(world));
}

/// What it is, the reason and a word of the particulars that the log must have, and what the client shows.
type Case = (&'static str, &'static str, &'static str, Option<Credentials>);

fn bad_certificates(world: &World) -> Result<Vec<Case>> {
    let (real, forged, unknown) = (real_authority(world)?, forged_authority(world)?, unknown_authority()?);
    let now = SystemTime::now();
    let minutes = |n: u64| Duration::from_secs(60 * n);
    let good = Leaf::of(&[VICTIM]);
    let expired = Leaf { from: now - minutes(10), until: now - minutes(1), ..Leaf::of(&[VICTIM]) };
    let future = Leaf { from: now + minutes(5), until: now + minutes(10), ..Leaf::of(&[VICTIM]) };
    let two = Leaf::of(&[VICTIM, "spiffe://cluster.local/ns/mesh/sa/server"]);
    let foreign = Leaf::of(&["spiffe://elsewhere.example/ns/mesh/sa/client"]);
    let named = Leaf { names: &["client.mesh.svc.cluster.local"], ..Leaf::of(&[]) };
    let odd = Leaf::of(&["spiffe://cluster.local/client"]);
    let (stolen, key) = good.signed_with_key(&real, &[])?;
    let by_leaf = good.signed(&good.usurper(key)?, &stolen.chain)?;
    let by_unknown = good.signed(&unknown, &[unknown.der().clone()])?;
    let (tls, who) = ("tls_handshake", "peer_identity");
    Ok(vec![
        ("a certificate with a forged signature", tls, "BadSignature", Some(good.signed(&forged, &[])?)),
        ("an unknown authority's, which it sends along", tls, "UnknownIssuer", Some(by_unknown)),
        ("a certificate signed with a workload's key", tls, "EndEntityUsedAsCa", Some(by_leaf)),
        ("an expired certificate", tls, "expired", Some(expired.signed(&real, &[])?)),
        ("a certificate that is not valid yet", tls, "not valid yet", Some(future.signed(&real, &[])?)),
        ("two URI names", who, "2 subject alternative names", Some(two.signed(&real, &[])?)),
        ("a foreign trust domain", who, "trust domain", Some(foreign.signed(&real, &[])?)),
        ("a DNS name and no URI", who, "exactly one URI", Some(named.signed(&real, &[])?)),
        ("a URI that names no service account", who, "service account", Some(odd.signed(&real, &[])?)),
        ("a TLS client without a certificate", tls, "no certificates", None),
    ])
}

/// Nothing came through, and the log says why.
fn refused(world: &World, attempt: &Attempt, reason: &str, word: &str) -> Result<()> {
    let Outcome::Broken(seen) = &attempt.outcome else {
        bail!("it was answered: {:?}", attempt.outcome);
    };
    let line = world.wait_for_access("node-b", |line| line["src.addr"] == attempt.from.to_string())?;
    ensure!(line["reason"] == reason, "the client saw {seen:?}, the log says {line}");
    ensure!(line["error"].as_str().is_some_and(|text| text.contains(word)), "not {word:?}: {line}");
    println!("          {}", line["error"]);
    Ok(())
}

fn attempt(world: &World, credentials: Option<Credentials>) -> Result<Attempt> {
    let (server, stream) = dial(world)?;
    let from = stream.local_addr()?;
    let target = SocketAddr::new(server, COMMAND_PORT);
    let outcome = block_on(async {
        match handshake(stream, credentials).await {
            Ok(mut tunnel) => match connect(&mut tunnel, target).await {
                Ok((status, _)) => Outcome::Answered(status),
                Err(error) => Outcome::Broken(format!("{error:#}")),
            },
            Err(error) => Outcome::Broken(format!("{error:#}")),
        }
    })?;
    Ok(Attempt { outcome, from })
}

fn plain_http(world: &World) -> Result<()> {
    let (server, stream) = dial(world)?;
    let from = stream.local_addr()?;
    let request =
        format!("CONNECT {server}:{COMMAND_PORT} HTTP/1.1\r\nhost: {server}:{COMMAND_PORT}\r\n\r\n");
    let answer = block_on(async {
        let mut stream = tokio::net::TcpStream::from_std(stream)?;
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        Ok::<_, std::io::Error>(answer)
    })??;
    ensure!(!answer.starts_with(b"HTTP"), "it was answered: {}", String::from_utf8_lossy(&answer));
    refused(
        world,
        &Attempt { outcome: Outcome::Broken("an end".to_owned()), from },
        "tls_handshake",
        "corrupt message",
    )
}

fn wrong_targets(world: &World) -> Result<()> {
    let credentials = Leaf::of(&[VICTIM]).signed(&real_authority(world)?, &[])?;
    let (server, stream) = dial(world)?;
    let other = world.address(SERVERS[1], Family::V4)?;
    let client = world.address(CLIENT, Family::V4)?;
    let targets = [
        SocketAddr::new(other, COMMAND_PORT),
        SocketAddr::new(client, COMMAND_PORT),
        SocketAddr::new([127, 0, 0, 1].into(), 15000),
        SocketAddr::new(server, 15001),
        SocketAddr::new(server, 15006),
        SocketAddr::new(server, 15008),
    ];
    block_on(async {
        let mut tunnel = handshake(stream, Some(credentials)).await?;
        for target in targets {
            let (status, _) = connect(&mut tunnel, target).await?;
            ensure!(status == StatusCode::BAD_REQUEST, "{target} was answered {status}");
        }
        Ok(())
    })?
}

/// A connection outlives its certificate: what is open goes on, and the client is sent away (GOAWAY) before the end, so that
/// what is new cannot begin.
fn expires(world: &World) -> Result<()> {
    let until = SystemTime::now() + SHORT;
    let leaf = Leaf { until, ..Leaf::of(&[VICTIM]) };
    let credentials = leaf.signed(&real_authority(world)?, &[])?;
    let (server, stream) = dial(world)?;
    let target = SocketAddr::new(server, COMMAND_PORT);
    block_on(async {
        let mut tunnel = handshake(stream, Some(credentials)).await?;
        let (status, open) = connect(&mut tunnel, target).await?;
        ensure!(status == StatusCode::OK, "while it is valid: {status}");
        let (mut send, mut receive) = open.context("no stream")?;
        send.send_data(Bytes::from_static(b"echo -\n12345678"), false)?;
        ensure!(next(&mut receive).await? == "12345678", "no echo");

        while let Ok(left) = until.duration_since(SystemTime::now()) {
            tokio::time::sleep(left).await;
        }
        let Err(refusal) = connect(&mut tunnel, target).await else { bail!("a stream began after the end") };
        let goaway = refusal.downcast_ref::<h2::Error>();
        let sent_away = goaway.is_some_and(|e| e.is_go_away() && e.reason() == Some(h2::Reason::NO_ERROR));
        ensure!(sent_away, "after its end: {refusal:#}");
        send.send_data(Bytes::from_static(b"abcdefgh"), true)?;
        ensure!(next(&mut receive).await? == "abcdefgh", "the open stream was cut");
        Ok(())
    })?
}

/// From the attacker's pod to the server's port 15008.
fn dial(world: &World) -> Result<(IpAddr, TcpStream)> {
    let server = world.address(SERVERS[0], Family::V4)?;
    let to = SocketAddr::new(server, HBONE);
    let stream = world.pod_netns(ATTACKER)?.run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
    stream.set_nonblocking(true)?;
    Ok((server, stream))
}

/// TLS and HTTP/2. In TLS 1.3 the client is done before the server has looked at its certificate, so a refusal may come
/// only with the first request.
async fn handshake(stream: TcpStream, credentials: Option<Credentials>) -> Result<SendRequest<Bytes>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anybody));
    let mut config = match credentials {
        Some(Credentials { chain, key }) => config.with_client_auth_cert(chain, key)?,
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    let stream = tokio::net::TcpStream::from_std(stream)?;
    let name = ServerName::IpAddress(Ipv4Addr::LOCALHOST.into());
    let tls = TlsConnector::from(Arc::new(config)).connect(name, stream).await.context("TLS")?;
    let (requests, connection) = h2::client::handshake(tls).await.context("HTTP/2")?;
    tokio::task::spawn_local(async move { drop(connection.await) });
    Ok(requests)
}

type Open = (h2::SendStream<Bytes>, h2::RecvStream);

async fn connect(tunnel: &mut SendRequest<Bytes>, to: SocketAddr) -> Result<(StatusCode, Option<Open>)> {
    let request = Request::builder().method(Method::CONNECT).uri(to.to_string()).body(())?;
    let mut ready = tunnel.clone().ready().await.context("before the request")?;
    let (answer, send) = ready.send_request(request, false)?;
    let answer = answer.await.context("instead of an answer")?;
    let status = answer.status();
    Ok((status, (status == StatusCode::OK).then(|| (send, answer.into_body()))))
}

async fn next(receive: &mut h2::RecvStream) -> Result<String> {
    let bytes = receive.data().await.context("the stream ended")??;
    receive.flow_control().release_capacity(bytes.len())?;
    Ok(String::from_utf8(bytes.to_vec())?)
}

/// Runs it on a runtime of its own, with a limit.
fn block_on<T>(task: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    let limited = async { tokio::time::timeout(PATIENCE, task).await };
    local.block_on(&runtime, limited).context("no answer in time")
}

/// The attacker does not care whom it speaks to.
#[derive(Debug)]
struct Anybody;

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
