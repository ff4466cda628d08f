//! Who gets a certificate under a real Kubernetes API server, and that the controller's log says why others get none.
//!
//! Needs what `api_server` needs: `make api-server`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use culvert_e2e::apiserver::{AUDIENCE, CONTROLLER_NAME, Cluster, Controller, SYSTEM};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::{PATIENCE, wait_for};
use culvert_identity::ca_client::IMPERSONATED_IDENTITY;
use culvert_identity::certificate::peer_identity;
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_identity::stub::istio_certificate_service_client::IstioCertificateServiceClient;
use culvert_proto::ca::IstioCertificateRequest;
use prost_types::value::Kind;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType, SigningKey};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde_json::{Value, json};
use tonic::{Code, Request, Status};

/// Identities: of a pod on node-a, of one on node-b, of a service account that no pod has, of a pod that failed.
const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const IDLE: &str = "spiffe://cluster.local/ns/shop/sa/idle";
const JOB: &str = "spiffe://cluster.local/ns/shop/sa/job";
/// All that a caller learns whose token is no good, and one that asks for what it may not have (D51).
const WHO: &str = "request authenticate failure";
const WHOM: &str = "request impersonation authentication failure";

struct World {
    cluster: Cluster,
    controller: Controller,
    runtime: tokio::runtime::Runtime,
    roots: PathBuf,
}

/// What the caller and the log must say.
struct Refused<'a> {
    token: &'a Path,
    asks: &'a str,
    learns: &'static str,
    because: &'static str,
}

impl World {
    fn start() -> Result<Self> {
        let mut cluster = Cluster::start()?;
        for namespace in [SYSTEM, "shop"] {
            cluster.must_make("/api/v1/namespaces", &json!({ "metadata": { "name": namespace } }))?;
        }
        for node in ["node-a", "node-b"] {
            cluster.must_make("/api/v1/nodes", &json!({ "metadata": { "name": node } }))?;
        }
        let accounts =
            [(SYSTEM, "ztunnel"), ("shop", "cart"), ("shop", "web"), ("shop", "idle"), ("shop", "job")];
        for (namespace, account) in accounts {
            let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
            cluster.must_make(&path, &json!({ "metadata": { "name": account } }))?;
        }
        let pods = [
            (SYSTEM, "ztunnel-a", "node-a", "ztunnel", "100.64.0.1"),
            (SYSTEM, "ztunnel-b", "node-b", "ztunnel", "100.64.1.1"),
            ("shop", "cart", "node-a", "cart", "100.64.0.2"),
            ("shop", "web", "node-b", "web", "100.64.1.2"),
            ("shop", "job", "node-a", "job", "100.64.0.3"),
        ];
        for (namespace, name, node, account, address) in pods {
            cluster.pod(namespace, name, node, account, &json!({}))?;
            cluster.runs(namespace, name, address)?;
        }
        cluster.must_patch(
            "/api/v1/namespaces/shop/pods/job/status",
            &json!({ "status": { "phase": "Failed" } }),
        )?;
        let controller = Controller::start(&mut cluster)?;
        let roots = cluster.root_certificate(SYSTEM)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { cluster, controller, runtime, roots })
    }

    fn ask(&self, token: &Path, asks: Option<&str>, csr: &str) -> Result<Result<Vec<String>, Status>> {
        self.ask_of(&self.controller, token, asks, csr)
    }

    fn ask_of(
        &self,
        controller: &Controller,
        token: &Path,
        asks: Option<&str>,
        csr: &str,
    ) -> Result<Result<Vec<String>, Status>> {
        let token = fs::read_to_string(token)?;
        let metadata = asks.map(|identity| {
            let value = prost_types::Value { kind: Some(Kind::StringValue(identity.to_owned())) };
            prost_types::Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() }
        });
        let mut request =
            Request::new(IstioCertificateRequest { csr: csr.to_owned(), validity_duration: 600, metadata });
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse()?);
        let address = format!("https://127.0.0.1:{}", controller.xds);
        self.runtime.block_on(async {
            let channel = control_channel(ControlEndpoint::new(address, CONTROLLER_NAME, &self.roots))?;
            let answer = IstioCertificateServiceClient::new(channel).create_certificate(request).await;
            Ok(answer.map(|answer| answer.into_inner().cert_chain))
        })
    }

    /// Whom the certificate is of that comes; it must have exactly one name.
    fn gets(&self, token: &Path, asks: Option<&str>, csr: &str) -> Result<String> {
        given_to(self.ask(token, asks, csr)?)
    }

    fn refuses(&self, refused: &Refused<'_>) -> Result<()> {
        let before = self.cluster.log("controller")?.len();
        match self.ask(refused.token, Some(refused.asks), &csr(&[refused.asks])?)? {
            Ok(chain) => bail!("{} certificates came", chain.len()),
            Err(status) => {
                ensure!(
                    status.code() == Code::Unauthenticated && status.message() == refused.learns,
                    "{status}"
                );
            }
        }
        let line = wait_for("a line in the log", PATIENCE, || {
            let log = self.cluster.log("controller")?.split_off(before);
            Ok(log.lines().find(|line| line.contains("refused a certificate")).map(str::to_owned))
        })?;
        let asked = line.contains(refused.asks);
        ensure!(asked && line.contains(refused.because), "not {:?}: {line}", refused.because);
        println!("          {line}");
        Ok(())
    }

    fn token(&self, file: &str, namespace: &str, account: &str, pod: &str) -> Result<PathBuf> {
        self.cluster.token(file, namespace, account, pod, AUDIENCE)
    }
}

/// Whom the certificate is of that came; it must have exactly one name.
fn given_to(answer: Result<Vec<String>, Status>) -> Result<String> {
    match answer {
        Ok(chain) => {
            let leaf = CertificateDer::from_pem_slice(chain.first().context("empty")?.as_bytes())?;
            Ok(peer_identity(&leaf)?.to_string())
        }
        Err(status) => bail!("refused: {status}"),
    }
}

/// A request of a fresh key that names these.
fn csr(uris: &[&str]) -> Result<String> {
    let mut params = CertificateParams::default();
    for uri in uris {
        params.subject_alt_names.push(SanType::URI((*uri).try_into()?));
    }
    Ok(params.serialize_request(&KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?)?.pem()?)
}

/// A token like another, its claims edited, signed with a key.
fn forged(like: &Path, key: &KeyPair, edit: impl FnOnce(&mut Value)) -> Result<String> {
    let token = fs::read_to_string(like)?;
    let mut parts = token.split('.');
    let (head, claims) = (parts.next().context("no head")?, parts.next().context("no claims")?);
    let mut claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims)?)?;
    edit(&mut claims);
    let signed = format!("{head}.{}", URL_SAFE_NO_PAD.encode(claims.to_string()));
    let signature = fixed(&key.sign(signed.as_bytes())?)?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

/// Both numbers of an ECDSA signature over P-256 at fixed length (RFC 7518, section 3.4), from ASN.1.
fn fixed(asn1: &[u8]) -> Result<Vec<u8>> {
    let mut rest = asn1.get(2..).context("no sequence")?;
    let mut out = Vec::new();
    for _ in 0..2 {
        let length = usize::from(*rest.get(1).context("no integer")?);
        let number = rest.get(2..2 + length).context("a short integer")?;
        let digits = &number[number.iter().take_while(|&&byte| byte == 0).count()..];
        out.resize(out.len() + 32 - digits.len(), 0);
        out.extend_from_slice(digits);
        rest = &rest[2 + length..];
    }
    Ok(out)
}

/// D49, D50: what the tokens of a proxy and of a plain pod are good for.
fn given(world: &World, checks: &mut Checks, proxy: &Path, cart: &Path) {
    checks.check("a proxy gets the identity of a pod on its node", || {
        let got = world.gets(proxy, Some(CART), &csr(&[CART])?)?;
        ensure!(got == CART, "{got}");
        Ok(())
    });
    checks.check("a plain pod gets its own identity, whether it names it or not", || {
        for asks in [Some(CART), None] {
            let got = world.gets(cart, asks, &csr(&[CART])?)?;
            ensure!(got == CART, "{got}");
        }
        Ok(())
    });
    checks.check(
        "a request's own names count for nothing: two of them, or another's, and one comes back",
        || {
            for names in [&[CART, WEB][..], &[WEB], &[]] {
                let got = world.gets(proxy, Some(CART), &csr(names)?)?;
                ensure!(got == CART, "{names:?}: {got}");
            }
            Ok(())
        },
    );
}

/// D50: tokens that prove nothing.
fn tokens(world: &World, checks: &mut Checks, proxy: &Path) -> Result<()> {
    let (cluster, path) = (&world.cluster, |name: &str| world.cluster.path(name));
    cluster.write("stranger", &forged(proxy, &KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?, |_| {})?)?;
    let real = KeyPair::from_pem(&fs::read_to_string(path("accounts.key"))?)?;
    cluster.write("edited", &forged(proxy, &real, |_| {})?)?;
    // The key is the right one, or the next check would say nothing about time.
    let got = world.gets(&path("edited"), Some(CART), &csr(&[CART])?)?;
    ensure!(got == CART, "{got}");
    let expired = |claims: &mut Value| {
        for claim in ["exp", "iat", "nbf"] {
            claims[claim] = json!(claims[claim].as_i64().unwrap_or_default() - 7_200);
        }
    };
    cluster.write("expired", &forged(proxy, &real, expired)?)?;
    cluster.token("audience", SYSTEM, "ztunnel", "ztunnel-a", "somebody-else")?;
    let unbound = json!({ "spec": { "audiences": [AUDIENCE], "expirationSeconds": 600 } });
    let answer =
        cluster.make(&format!("/api/v1/namespaces/{SYSTEM}/serviceaccounts/ztunnel/token"), &unbound)?;
    cluster.write("unbound", answer["status"]["token"].as_str().context("no token")?)?;
    cluster.write("words", "not-a-token")?;
    world.token("gone", SYSTEM, "ztunnel", "ztunnel-b")?;
    cluster.must_delete(&format!("/api/v1/namespaces/{SYSTEM}/pods/ztunnel-b"))?;
    for (name, file, because) in [
        ("a token that is signed with another key", "stranger", "error in cryptographic primitive"),
        ("a token that has expired", "expired", "expired"),
        ("a token for another audience", "audience", "is invalid for the target audiences"),
        ("a token that is bound to no pod", "unbound", "is bound to no pod"),
        ("a token of a pod that was deleted", "gone", "has been invalidated"),
        ("what is no token", "words", "not one of Kubernetes"),
    ] {
        checks.check(&format!("no certificate for {name}"), || {
            world.refuses(&Refused { token: &path(file), asks: CART, learns: WHO, because })
        });
    }
    Ok(())
}

/// D49, D50: identities that are not the caller's to have.
fn identities(world: &World, checks: &mut Checks, proxy: &Path, cart: &Path) {
    const NOT_HERE: &str = "no pod with that service account runs on the node";
    for (name, token, asks, because) in [
        ("another node's pod", proxy, WEB, NOT_HERE),
        ("a service account that no pod has", proxy, IDLE, NOT_HERE),
        ("a pod that has failed", proxy, JOB, NOT_HERE),
        (
            "a foreign trust domain",
            proxy,
            "spiffe://elsewhere.example/ns/shop/sa/cart",
            "not of trust domain",
        ),
        ("what names no service account", proxy, "spiffe://cluster.local/cart", "cannot be read"),
        (
            "another pod of the node, asked for by a plain pod",
            cart,
            "spiffe://cluster.local/ns/culvert-system/sa/ztunnel",
            "no trusted proxy",
        ),
        ("a pod elsewhere, asked for by a plain pod", cart, WEB, "no trusted proxy"),
    ] {
        checks.check(&format!("no certificate of {name}"), || {
            world.refuses(&Refused { token, asks, learns: WHOM, because })
        });
    }
    checks.check("no certificate of a pod that was deleted", || {
        world.cluster.must_delete("/api/v1/namespaces/shop/pods/cart")?;
        wait_for("the end of the pod", PATIENCE, || {
            Ok(world.controller.workload("Kubernetes//Pod/shop/cart")?.is_none().then_some(()))
        })?;
        world.refuses(&Refused { token: proxy, asks: CART, learns: WHOM, because: NOT_HERE })
    });
}

/// The replica that writes.
fn leader(cluster: &Cluster) -> Result<String> {
    let lease =
        cluster.get(&format!("/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/culvert-leader"))?;
    Ok(lease["spec"]["holderIdentity"].as_str().context("nobody leads")?.to_owned())
}

/// D69: a second replica gives certificates and configuration as the first does, and only one of them writes; when that one is
/// gone the other writes, and what it signs is trusted as before.
fn replicas(world: &mut World, checks: &mut Checks, proxy: &Path) {
    let second = Controller::start_as(&mut world.cluster, "second", &["--pod-name", "second"])
        .expect("a second replica");
    checks.check("each of two replicas gives certificates and configuration, and one of them writes", || {
        let leader = leader(&world.cluster)?;
        for controller in [&world.controller, &second] {
            let got = given_to(world.ask_of(controller, proxy, Some(CART), &csr(&[CART])?)?)?;
            ensure!(got == CART, "{got}");
            ensure!(controller.workload("Kubernetes//Pod/shop/cart")?.is_some(), "the pod is not served");
            controller.proxy_says(&mut world.cluster, "node-a", proxy, "committed")?;
        }
        ensure!(self::leader(&world.cluster)? == leader, "another replica leads");
        Ok(())
    });
    checks.check("without the first the second writes, and gives certificates on", || {
        let before = leader(&world.cluster)?;
        world.cluster.stop("controller")?;
        wait_for("another leader", PATIENCE * 2, || Ok((leader(&world.cluster)? != before).then_some(())))?;
        let got = given_to(world.ask_of(&second, proxy, Some(CART), &csr(&[CART])?)?)?;
        ensure!(got == CART, "{got}");
        Ok(())
    });
    world.cluster.stop("second").expect("it runs");
    world.controller = Controller::start(&mut world.cluster).expect("the controller");
}

/// D49, D50, D51, D69.
#[test]
fn a_certificate_is_given_to_who_may_have_it_and_the_log_says_why_not_to_others() {
    let mut world = World::start().expect("a control plane");
    let proxy = world.token("proxy", SYSTEM, "ztunnel", "ztunnel-a").expect("a proxy's token");
    let cart = world.token("cart", "shop", "cart", "cart").expect("a pod's token");
    let mut checks = Checks::default();
    given(&world, &mut checks, &proxy, &cart);
    replicas(&mut world, &mut checks, &proxy);
    tokens(&world, &mut checks, &proxy).expect("tokens");
    identities(&world, &mut checks, &proxy, &cart);
    checks.finish();
}
