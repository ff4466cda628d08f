use std::net::SocketAddr;
use std::sync::Arc;

use culvert_proto::ca::IstioCertificateResponse;
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use rustls::ServerConfig;
use rustls::version::TLS13;
use tokio::io::DuplexStream;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tonic::Response;
use tonic::transport::Server;

use super::*;
use crate::control::{ControlEndpoint, EndpointError, control_channel};
use crate::fixture::{Leaf, TestCa, dns, leaf_params, workload};
use crate::stub::istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer};
use crate::tls;

/// Keeps what was asked and answers with what was put in.
#[derive(Clone, Default)]
struct Recorder {
    seen: Arc<Mutex<Vec<(tonic::metadata::MetadataMap, IstioCertificateRequest)>>>,
    refuse_with: Arc<Mutex<Option<Code>>>,
    /// Bytes added to the chain.
    more: Arc<Mutex<usize>>,
}

#[tonic::async_trait]
impl IstioCertificateService for Recorder {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        self.seen.lock().push((metadata, message));
        match *self.refuse_with.lock() {
            Some(code) => Err(Status::new(code, "no")),
            None => {
                let root = format!("root{}", "x".repeat(*self.more.lock()));
                Ok(Response::new(IstioCertificateResponse { cert_chain: vec!["leaf".into(), root] }))
            }
        }
    }
}

struct World {
    ca: TestCa,
    recorder: Recorder,
    address: SocketAddr,
    dir: tempfile::TempDir,
    tasks: Tasks,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

fn serving(leaf: &Leaf) -> Arc<ServerConfig> {
    let mut config = ServerConfig::builder_with_provider(tls::provider().clone())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der.clone()], leaf.private_key())
        .unwrap();
    config.alpn_protocols = vec![tls::ALPN_H2.to_vec()];
    Arc::new(config)
}

impl World {
    /// An authority on loopback behind TLS as `controller.example`.
    async fn new() -> Self {
        let ca = TestCa::new("root");
        let mut params = leaf_params("spiffe://x/ns/a/sa/b");
        params.subject_alt_names = vec![dns("controller.example")];
        let acceptor = TlsAcceptor::from(serving(&ca.leaf(&params)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let recorder = Recorder::default();
        let (streams, incoming) = tokio::sync::mpsc::channel::<std::io::Result<DuplexStream>>(8);
        let tasks = Tasks::new("test");
        let copies = tasks.clone();
        tasks.spawn("accept", async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let (mut near, far) = tokio::io::duplex(64 * 1024);
                copies.spawn("copy", async move {
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut near).await;
                });
                let _ = streams.send(Ok(far)).await;
            }
        });
        let incoming = tokio_stream::wrappers::ReceiverStream::new(incoming);
        let service = IstioCertificateServiceServer::new(recorder.clone());
        tasks.spawn("serve", async move {
            Server::builder().add_service(service).serve_with_incoming(incoming).await.unwrap();
        });
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("root.pem"), ca.root_pem()).unwrap();
        std::fs::write(dir.path().join("token"), "secret-1\n").unwrap();
        Self { ca, recorder, address, dir, tasks }
    }

    fn endpoint(&self) -> ControlEndpoint {
        let address = format!("https://{}", self.address);
        ControlEndpoint::new(address, "controller.example", self.dir.path().join("root.pem"))
    }

    fn client(&self, endpoint: ControlEndpoint) -> GrpcCaClient {
        let token = TokenFile::new(self.dir.path().join("token"));
        GrpcCaClient::new(control_channel(endpoint).unwrap(), token, "Kubernetes")
    }
}

async fn ask(client: &GrpcCaClient) -> Result<SignedChain, CaError> {
    client.sign("CSR", &workload("a", "b"), Duration::from_secs(20)).await
}

/// Z87.
#[tokio::test]
async fn a_request_says_who_asks_for_whom() {
    let world = World::new().await;
    let client = world.client(world.endpoint());
    assert_eq!(ask(&client).await.unwrap(), ["leaf", "root"]);
    std::fs::write(world.dir.path().join("token"), "secret-2").unwrap();
    ask(&client).await.unwrap();
    let seen = world.recorder.seen.lock();
    let tokens: Vec<_> = seen.iter().map(|(metadata, _)| metadata.get("authorization").unwrap()).collect();
    assert_eq!(tokens, ["Bearer secret-1", "Bearer secret-2"]);
    let (metadata, message) = &seen[0];
    assert_eq!(metadata.get("clusterid").unwrap(), "Kubernetes");
    assert_eq!((message.csr.as_str(), message.validity_duration), ("CSR", 20));
    assert_eq!(impersonated(message.metadata.as_ref()), Some("spiffe://cluster.local/ns/a/sa/b"));
}

/// Z118: headers of the operator's go with each request, and may stand in for ours.
#[tokio::test]
async fn headers_that_are_set_are_sent() {
    let world = World::new().await;
    let header = |name: &str, value: &str| (name.parse().unwrap(), value.parse().unwrap());
    let client =
        world.client(world.endpoint()).with_headers([header("x-tenant", "blue"), header("clusterid", "c2")]);
    ask(&client).await.unwrap();
    let seen = world.recorder.seen.lock();
    let value = |name: &str| seen[0].0.get(name).unwrap().to_str().unwrap().to_owned();
    assert_eq!(
        (value("x-tenant"), value("clusterid"), value("authorization")),
        ("blue".into(), "c2".into(), "Bearer secret-1".into())
    );
}

/// Z98: an answer longer than a chain may be is not taken into memory.
#[tokio::test]
async fn an_answer_that_is_too_long_is_refused() {
    let world = World::new().await;
    let client = world.client(world.endpoint());
    *world.recorder.more.lock() = MAX_CHAIN - 100;
    ask(&client).await.unwrap();
    *world.recorder.more.lock() = MAX_CHAIN;
    let error = ask(&client).await.unwrap_err();
    assert!(matches!(error, CaError::Status { code: Code::OutOfRange, .. }), "{error:?}");
}

#[tokio::test]
async fn a_refusal_keeps_its_kind() {
    let world = World::new().await;
    let client = world.client(world.endpoint());
    let refuse = async |code| {
        *world.recorder.refuse_with.lock() = Some(code);
        ask(&client).await.unwrap_err()
    };
    assert_eq!(refuse(Code::Unauthenticated).await, CaError::Unauthenticated("no".into()));
    assert_eq!(refuse(Code::PermissionDenied).await, CaError::PermissionDenied("no".into()));
    let other = refuse(Code::ResourceExhausted).await;
    assert_eq!(other, CaError::Status { code: Code::ResourceExhausted, message: "no".into() });
}

/// Z91: the file of roots is read anew: one that no longer vouches for the server ends that, and a right one mends it.
#[tokio::test]
async fn a_server_under_another_name_or_root_is_a_tls_error() {
    let world = World::new().await;
    let mut named = world.endpoint();
    named.server_name = "somebody.example".into();
    let error = ask(&world.client(named)).await.unwrap_err();
    assert!(matches!(&error, CaError::Tls(text) if text.contains("somebody.example")), "{error:?}");

    let file = world.dir.path().join("root.pem");
    let client = world.client(world.endpoint());
    std::fs::write(&file, TestCa::new("root").root_pem()).unwrap();
    let error = ask(&client).await.unwrap_err();
    assert!(matches!(&error, CaError::Tls(text) if text.contains("invalid peer certificate")), "{error:?}");
    std::fs::remove_file(&file).unwrap();
    let error = ask(&client).await.unwrap_err();
    assert!(matches!(&error, CaError::Tls(text) if text.contains("root.pem")), "{error:?}");
    assert!(world.recorder.seen.lock().is_empty());

    // The right root again: the same channel recovers by itself.
    std::fs::write(&file, world.ca.root_pem()).unwrap();
    ask(&client).await.unwrap();
}

#[tokio::test]
async fn nobody_there_is_unreachable() {
    let world = World::new().await;
    let vacant = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut endpoint = world.endpoint();
    endpoint.address = format!("https://{vacant}");
    let error = ask(&world.client(endpoint)).await.unwrap_err();
    assert!(matches!(&error, CaError::Unreachable(text) if text.contains("refused")), "{error:?}");
}

#[tokio::test]
async fn a_silent_server_is_given_up() {
    let world = World::new().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut endpoint = world.endpoint();
    endpoint.address = format!("https://{}", silent.local_addr().unwrap());
    endpoint.connect_timeout = Duration::from_millis(50);
    let error = ask(&world.client(endpoint)).await.unwrap_err();
    assert!(matches!(&error, CaError::Unreachable(text) if text.contains("no TLS connection")), "{error:?}");
}

#[tokio::test]
async fn without_a_token_nobody_is_asked() {
    let world = World::new().await;
    std::fs::remove_file(world.dir.path().join("token")).unwrap();
    let error = ask(&world.client(world.endpoint())).await.unwrap_err();
    assert!(matches!(&error, CaError::Token(text) if text.contains("token")), "{error:?}");
    assert!(world.recorder.seen.lock().is_empty());
}

#[tokio::test]
async fn an_endpoint_that_can_never_work_is_refused_at_once() {
    let make = |address: &str, name: &str| {
        control_channel(ControlEndpoint::new(address, name, "root.pem")).map(drop)
    };
    for address in ["", "http://a:15012", "a:15012", "https://", "https://a/path", "https://a?b"] {
        assert!(matches!(make(address, "a.example"), Err(EndpointError::Address(_))), "{address:?}");
    }
    for name in ["", "10.0.0.1", "a b", "::1"] {
        assert!(matches!(make("https://a:15012", name), Err(EndpointError::ServerName(_))), "{name:?}");
    }
    make("https://[::1]:15012", "a.example").unwrap();
    make("https://a", "a.example").unwrap();
}

#[test]
fn metadata_of_another_kind_names_nobody() {
    assert_eq!(impersonated(None), None);
    let mut metadata = impersonating(&workload("a", "b"));
    assert_eq!(impersonated(Some(&metadata)), Some("spiffe://cluster.local/ns/a/sa/b"));
    metadata.fields.values_mut().for_each(|value| value.kind = Some(Kind::BoolValue(true)));
    assert_eq!(impersonated(Some(&metadata)), None);
}
