//! Reviews over HTTPS on loopback, as an API server sends them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::serve::{MAX_BODY_BYTES, MAX_FROM_ONE};
use super::{Heard, start};
use crate::ca::{Authority, Serving};

const NAME: &str = "culvert-controller.culvert-system.svc";
const SOON: Duration = Duration::from_secs(10);

struct Webhook {
    address: SocketAddr,
    authority: Arc<Authority>,
    heard: Heard,
    metrics: Metrics,
    tasks: Tasks,
    drain: DrainTrigger,
    _dir: tempfile::TempDir,
}

impl Drop for Webhook {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

impl Webhook {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Arc::new(Authority::open(&dir.path().join("ca"), Arc::new(SystemClock)).unwrap());
        let serving = Arc::new(Serving::new(authority.clone(), vec![NAME.to_owned()]).unwrap());
        let (metrics, tasks) = (Metrics::for_process("controller", "0"), Tasks::new("test"));
        let (trigger, drain) = drain::channel();
        let heard = Heard::default();
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let address = start(any, serving, heard.clone(), &metrics, &tasks, drain).await.unwrap();
        Self { address, authority, heard, metrics, tasks, drain: trigger, _dir: dir }
    }

    async fn connect(&self) -> TlsStream<TcpStream> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(self.authority.root_pem().as_bytes()) {
            roots.add(certificate.unwrap()).unwrap();
        }
        let config = ClientConfig::builder_with_provider(culvert_identity::tls::provider().clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(self.address).await.unwrap();
        let name = ServerName::try_from(NAME).unwrap();
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
    }

    async fn send(&self, method: Method, path: &str, body: impl Into<Bytes>) -> (StatusCode, Bytes) {
        let (mut sender, connection) = http1::handshake(TokioIo::new(self.connect().await)).await.unwrap();
        self.tasks.spawn("client", async move { drop(connection.await) });
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", NAME)
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .unwrap();
        let response = timeout(SOON, sender.send_request(request)).await.expect("an answer").unwrap();
        (response.status(), response.into_body().collect().await.unwrap().to_bytes())
    }

    /// The response to a review.
    async fn review(&self, request: Value) -> Value {
        let review =
            json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request });
        let (status, body) = self.send(Method::POST, "/validate?timeout=5s", review.to_string()).await;
        assert_eq!(status, StatusCode::OK, "{body:?}");
        let mut answer: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(
            (&answer["apiVersion"], &answer["kind"]),
            (&json!("admission.k8s.io/v1"), &json!("AdmissionReview"))
        );
        let response = answer["response"].take();
        assert_eq!(response["uid"], request["uid"]);
        response
    }
}

fn request(operation: &str, kind: &str, object: Value, old: Value) -> Value {
    let group = match kind {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => "security.istio.io",
        _ => "networking.istio.io",
    };
    json!({
        "uid": "0c9a8d74-9cb7-44dd-b98e-09fd62def2f4",
        "kind": { "group": group, "version": "v1", "kind": kind },
        "resource": { "group": group, "version": "v1", "resource": "x" },
        "name": "it", "namespace": "shop", "operation": operation,
        "userInfo": { "username": "somebody" },
        "object": object, "oldObject": old, "dryRun": false,
    })
}

fn object(kind: &str, spec: Value) -> Value {
    let group = match kind {
        "AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication" => "security.istio.io",
        _ => "networking.istio.io",
    };
    json!({
        "apiVersion": format!("{group}/v1"), "kind": kind, "spec": spec,
        "metadata": { "name": "it", "namespace": "shop", "uid": "u", "creationTimestamp": null,
            "managedFields": [{ "manager": "kubectl", "operation": "Update" }] },
    })
}

fn created(kind: &str, spec: Value) -> Value {
    request("CREATE", kind, object(kind, spec), Value::Null)
}

/// D66, D67: good objects of every kind are let in, and bad ones refused with field, value and what would be right.
#[tokio::test]
async fn every_kind_is_judged_by_the_loader_that_will_read_it() {
    let webhook = Webhook::start().await;
    let principal = json!([{ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }] }]);
    let good = [
        ("AuthorizationPolicy", json!({ "action": "ALLOW", "rules": principal })),
        ("PeerAuthentication", json!({ "mtls": { "mode": "STRICT" } })),
        (
            "ServiceEntry",
            json!({ "hosts": ["api.example.com"], "ports": [{ "number": 443, "name": "tls", "protocol": "TLS" }], "resolution": "DNS" }),
        ),
        ("WorkloadEntry", json!({ "address": "192.0.2.7", "labels": { "app": "db" } })),
    ];
    for (kind, spec) in good {
        let response = webhook.review(created(kind, spec)).await;
        assert_eq!(
            (&response["allowed"], &response["warnings"]),
            (&json!(true), &Value::Null),
            "{kind}: {response}"
        );
    }
    let port = json!({ "rules": [{ "when": [{ "key": "destination.port", "values": ["http"] }] }] });
    let bad = [
        (
            "AuthorizationPolicy",
            port,
            ["spec.rules[0].when[0].values[0]", "\"http\"", "a port from 1 to 65535"],
        ),
        ("AuthorizationPolicy", json!({ "rule": [] }), ["spec.rule", "unknown field", "rules"]),
        (
            "PeerAuthentication",
            json!({ "mtls": { "mode": "SOMETIMES" } }),
            ["spec.mtls.mode", "SOMETIMES", "STRICT"],
        ),
        ("ServiceEntry", json!({ "hosts": ["a b"] }), ["spec.hosts[0]", "\"a b\"", "a DNS name"]),
        (
            "WorkloadEntry",
            json!({ "address": "/run/x.sock" }),
            ["spec.address", "/run/x.sock", "an IP address or a DNS name"],
        ),
        (
            "RequestAuthentication",
            json!({ "jwtRules": [{ "issuer": "i", "jwksUri": "ftp://x" }] }),
            ["spec.jwtRules[0].jwksUri", "ftp://x", "a URL with http or https"],
        ),
        (
            "DestinationRule",
            json!({ "host": "cart", "trafficPolicy": { "outlier": {} } }),
            ["spec.trafficPolicy.outlier", "unknown field", "outlierDetection"],
        ),
        ("VirtualService", json!({}), ["kind", "VirtualService", "expected"]),
    ];
    for (kind, spec, words) in bad {
        let response = webhook.review(created(kind, spec)).await;
        let message = response["status"]["message"].as_str().unwrap_or_default();
        assert_eq!(
            (&response["allowed"], &response["status"]["code"]),
            (&json!(false), &json!(422)),
            "{kind}"
        );
        assert!(words.iter().all(|word| message.contains(word)), "{kind}: {message}");
    }
    let metrics = webhook.metrics.encode();
    for count in ["verdict=\"good\"} 4", "verdict=\"refused\"} 8"] {
        assert!(
            metrics.contains(&format!("culvert_controller_admission_reviews_total{{{count}")),
            "{metrics}"
        );
    }
}

/// D45, D66: what is stored and does less than it may seem to is said at once.
#[tokio::test]
async fn what_is_not_enforced_as_written_is_a_warning() {
    let webhook = Webhook::start().await;
    let paths = json!({ "rules": [{ "to": [{ "operation": { "paths": ["/admin"] } }] }] });
    let target = json!({ "targetRefs": [{ "kind": "Service", "name": "cart" }], "rules": [{}] });
    let warned = [
        ("AuthorizationPolicy", paths, "HTTP fields cannot be judged here"),
        ("AuthorizationPolicy", json!({ "action": "AUDIT", "rules": [{}] }), "cannot enforce AUDIT"),
        (
            "ServiceEntry",
            json!({ "hosts": ["a.example"], "exportTo": ["."] }),
            "spec.exportTo is not honoured",
        ),
        (
            "RequestAuthentication",
            json!({ "jwtRules": [{ "issuer": "i" }] }),
            "only a waypoint would act on it",
        ),
        (
            "DestinationRule",
            json!({ "host": "cart", "trafficPolicy": { "loadBalancer": { "simple": "RANDOM" } } }),
            "only a waypoint would act on it",
        ),
    ];
    // What is for a waypoint is not judged by what a node tunnel can do.
    let response = webhook.review(created("AuthorizationPolicy", target)).await;
    assert!(response["allowed"] == true && response["warnings"].is_null(), "{response}");
    for (kind, spec, words) in warned {
        let response = webhook.review(created(kind, spec)).await;
        assert_eq!(response["allowed"], true, "{kind}: {response}");
        assert!(response["warnings"][0].as_str().is_some_and(|it| it.contains(words)), "{kind}: {response}");
    }
}

/// D66: an object that was stored before it would have been refused can still be labelled, let go and deleted.
#[tokio::test]
async fn an_unchanged_bad_object_is_not_in_the_way() {
    let webhook = Webhook::start().await;
    let bad = object("AuthorizationPolicy", json!({ "unknown": true }));
    let mut labelled = bad.clone();
    labelled["metadata"]["labels"] = json!({ "team": "shop" });
    labelled["metadata"]["finalizers"] = json!([]);
    let kind = "AuthorizationPolicy";
    let allowed =
        [request("UPDATE", kind, labelled, bad.clone()), request("DELETE", kind, Value::Null, bad.clone())];
    for asked in allowed {
        assert_eq!(webhook.review(asked.clone()).await["allowed"], true, "{asked}");
    }
    let mut status = request("UPDATE", kind, object(kind, json!({ "unknown": 1 })), bad.clone());
    status["subResource"] = "status".into();
    assert_eq!(webhook.review(status).await["allowed"], true);
    let mut going = object(kind, json!({ "unknown": 1 }));
    going["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z".into();
    assert_eq!(webhook.review(request("UPDATE", kind, going, bad.clone())).await["allowed"], true);
    let other = object(kind, json!({ "unknown": 2 }));
    assert_eq!(
        webhook.review(request("UPDATE", kind, other, bad)).await["allowed"],
        false,
        "a change is judged"
    );
    let mut generated = object(kind, json!({}));
    generated["metadata"]["name"] = Value::Null;
    generated["metadata"]["generateName"] = "only-".into();
    assert_eq!(webhook.review(request("CREATE", kind, generated, Value::Null)).await["allowed"], true);
}

/// D66: demanded only once it is known to be reachable.
#[tokio::test]
async fn it_was_heard_once_a_review_was_answered() {
    let webhook = Webhook::start().await;
    let heard = webhook.heard.watch();
    assert_eq!(webhook.send(Method::GET, "/validate", "").await.0, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(webhook.send(Method::POST, "/", "{}").await.0, StatusCode::NOT_FOUND);
    assert!(!*heard.borrow(), "that was no API server");
    webhook.review(created("PeerAuthentication", json!({}))).await;
    assert!(*heard.borrow());
}

#[tokio::test]
async fn what_is_no_review_is_refused_by_http() {
    let webhook = Webhook::start().await;
    let v1beta1 = json!({ "apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview" }).to_string();
    let nothing = json!({ "apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview" }).to_string();
    let deep = "[".repeat(200_000);
    for body in ["", "{}", "null", &v1beta1, &nothing, &deep] {
        let (status, text) = webhook.send(Method::POST, "/validate", body.to_owned()).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{text:?}");
    }
    let (status, text) = webhook.send(Method::POST, "/validate", vec![b' '; MAX_BODY_BYTES + 1]).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{text:?}");
}

#[tokio::test]
async fn connections_of_one_address_and_their_time_are_bounded() {
    let webhook = Webhook::start().await;
    let mut open = Vec::new();
    for _ in 0..MAX_FROM_ONE {
        open.push(webhook.connect().await);
    }
    let mut more = TcpStream::connect(webhook.address).await.unwrap();
    let ended = timeout(SOON, more.read(&mut [0; 1])).await.expect("it is closed at once");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    // One that begins a request and stalls ends by itself, and makes room.
    let mut stalled = open.pop().unwrap();
    stalled.write_all(b"POST /validate HTTP/1.1\r\n").await.unwrap();
    let ended = timeout(SOON, stalled.read_to_end(&mut Vec::new())).await.expect("it ends in time");
    drop((ended, stalled));
    let response = webhook.review(created("PeerAuthentication", json!({}))).await;
    assert_eq!(response["allowed"], true);
}

#[tokio::test]
async fn it_ends_with_the_drain() {
    let webhook = Webhook::start().await;
    let mut open = webhook.connect().await;
    webhook.drain.start();
    let ended = timeout(SOON, open.read(&mut [0; 1])).await.expect("an idle connection ends");
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    let gone = timeout(SOON, async {
        while TcpStream::connect(webhook.address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    });
    gone.await.expect("the port is closed");
}
