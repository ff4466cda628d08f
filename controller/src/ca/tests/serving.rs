use std::collections::HashSet;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use culvert_identity::ca_client::{CLUSTER_ID_HEADER, CaClient, CaError, GrpcCaClient, impersonating};
use culvert_identity::control::{ControlEndpoint, control_channel_with};
use culvert_identity::csr::CertificateRequest;
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::stub::istio_certificate_service_server::IstioCertificateService;
use culvert_identity::token::TokenFile;
use culvert_model::identity::Identity;
use culvert_proto::ca::IstioCertificateRequest;
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use tokio::io::DuplexStream;
use tokio_rustls::TlsAcceptor;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Code, Request, Status};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{HOUR, NAME, authority, clock, workload};
use crate::auth::{Caller, Grant, NodeName};
use crate::ca::request::MAX_REQUEST;
use crate::ca::service::CaService;
use crate::ca::{
    Authority, CaConfig, CaMetrics, NodeAuthenticator, NodeIdentities, Serving, server_config, service,
};

/// Tokens are `token-<node>` of a node's proxy, `pod-<account>` of a pod on node n1; who runs where is a list.
#[derive(Default)]
struct Cluster {
    pods: Mutex<HashSet<(NodeName, Identity)>>,
}

impl Cluster {
    fn run(&self, node: &str, identity: Identity) {
        self.pods.lock().insert((NodeName::from(node), identity));
    }
}

#[tonic::async_trait]
impl NodeAuthenticator for Cluster {
    async fn authenticate(&self, metadata: &MetadataMap) -> Result<Caller, Status> {
        let token = metadata.get("authorization").and_then(|value| value.to_str().ok());
        if let Some(account) = token.and_then(|token| token.strip_prefix("Bearer pod-")) {
            let (namespace, account) = (workload(account).namespace().to_string(), account.to_owned());
            let grant = Grant::Own { namespace, account, pod: "w-0".to_owned() };
            return Ok(Caller { node: NodeName::from("n1"), grant });
        }
        let node = token.and_then(|token| token.strip_prefix("Bearer token-"));
        node.map(|node| Caller::node(NodeName::from(node)))
            .ok_or_else(|| Status::unauthenticated("secret detail of the authenticator"))
    }
}

impl NodeIdentities for Cluster {
    fn runs_on(&self, node: &NodeName, identity: &Identity) -> bool {
        self.pods.lock().contains(&(node.clone(), identity.clone()))
    }
}

struct World {
    dir: tempfile::TempDir,
    authority: Arc<Authority>,
    cluster: Arc<Cluster>,
    metrics: CaMetrics,
    config: CaConfig,
    tasks: Tasks,
}

impl Drop for World {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

impl World {
    fn new() -> Self {
        let (dir, authority) = authority();
        fs::write(dir.path().join("root.pem"), authority.root_pem()).unwrap();
        let (cluster, metrics) = (Arc::default(), CaMetrics::default());
        Self { dir, authority, cluster, metrics, config: CaConfig::default(), tasks: Tasks::new("test") }
    }

    fn service(&self) -> CaService {
        let (authority, metrics) = (self.authority.clone(), self.metrics.clone());
        CaService::new(authority, self.cluster.clone(), self.cluster.clone(), self.config.clone(), metrics)
    }

    /// A client on a node, over TLS over memory.
    fn client(&self, token: &str) -> GrpcCaClient {
        let path = self.dir.path().join(format!("token of {token}"));
        fs::write(&path, token).unwrap();
        let serving = Serving::new(self.authority.clone(), vec![NAME.into()]).unwrap();
        let acceptor = TlsAcceptor::from(server_config(Arc::new(serving)));
        let (authority, metrics) = (self.authority.clone(), self.metrics.clone());
        let config = self.config.clone();
        let service = service(authority, self.cluster.clone(), self.cluster.clone(), config, metrics);
        let tasks = self.tasks.clone();
        let endpoint =
            ControlEndpoint::new("https://127.0.0.1:15012", NAME, self.dir.path().join("root.pem"));
        let channel = control_channel_with(endpoint, move |_, _| {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let (acceptor, service, copies) = (acceptor.clone(), service.clone(), tasks.clone());
            tasks.spawn("server", async move {
                let Ok(mut stream) = acceptor.accept(far).await else { return };
                let (mut inner, outer) = tokio::io::duplex(64 * 1024);
                copies.spawn("copy", async move {
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut inner).await;
                });
                let incoming = tokio_stream::iter([Ok::<DuplexStream, std::io::Error>(outer)]);
                let _ = Server::builder().add_service(service).serve_with_incoming(incoming).await;
            });
            async move { Ok(near) }
        });
        GrpcCaClient::new(channel.unwrap(), TokenFile::new(path), "Kubernetes")
    }

    /// Asks without a channel; any message and headers may be made up.
    async fn ask(&self, token: &str, message: IstioCertificateRequest) -> Result<Vec<String>, Status> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        request.metadata_mut().insert(CLUSTER_ID_HEADER, "Kubernetes".parse().unwrap());
        let answer = self.service().create_certificate(request).await?;
        Ok(answer.into_inner().cert_chain)
    }
}

fn message(identity: &Identity) -> IstioCertificateRequest {
    let csr = CertificateRequest::new(identity).unwrap().pem().to_owned();
    IstioCertificateRequest { csr, validity_duration: 3600, metadata: Some(impersonating(identity)) }
}

#[tokio::test]
async fn a_node_gets_certificates_of_its_pods_end_to_end() {
    let world = World::new();
    world.cluster.run("n1", workload("b"));
    let config = ManagerConfig { lifetime: Duration::from_secs(20), ..ManagerConfig::default() };
    let manager = CertificateManager::new(Arc::new(world.client("token-n1")), config, clock());
    let certificate = manager.get(&workload("b")).await.unwrap();
    assert_eq!(certificate.identity(), &workload("b"));
    let left = certificate.not_after().duration_since(SystemTime::now()).unwrap();
    assert!(left <= Duration::from_secs(20) && left > Duration::from_secs(15), "{left:?}");
    assert_eq!(world.metrics.issued(), 1);
}

/// D50, D51, TRAP15.
#[tokio::test]
async fn a_node_gets_no_certificate_of_anothers_pod() {
    let world = World::new();
    world.cluster.run("n2", workload("b"));
    world.cluster.run("n1", workload("c"));
    let client = world.client("token-n1");
    let csr = CertificateRequest::new(&workload("b")).unwrap();
    let error = client.sign(csr.pem(), &workload("b"), HOUR).await.unwrap_err();
    assert_eq!(error, CaError::Unauthenticated("request impersonation authentication failure".into()));
    assert_eq!((world.metrics.issued(), world.metrics.refused("not_on_node")), (0, 1));
    // As soon as a pod with it runs there, and no longer than that.
    world.cluster.run("n1", workload("b"));
    client.sign(csr.pem(), &workload("b"), HOUR).await.unwrap();
    world.cluster.pods.lock().clear();
    client.sign(csr.pem(), &workload("b"), HOUR).await.unwrap_err();
}

/// D49: a waypoint is such a pod.
#[tokio::test]
async fn a_pod_gets_its_own_certificate_and_no_other() {
    let world = World::new();
    for account in ["w", "b"] {
        world.cluster.run("n1", workload(account));
    }
    let client = world.client("pod-w");
    let config = ManagerConfig { lifetime: Duration::from_secs(20), ..ManagerConfig::default() };
    let manager = CertificateManager::new(Arc::new(client), config, clock());
    assert_eq!(manager.get(&workload("w")).await.unwrap().identity(), &workload("w"));
    // One that names nobody is meant as itself.
    let mut unnamed = message(&workload("w"));
    unnamed.metadata = None;
    world.ask("pod-w", unnamed).await.unwrap();
    let status = world.ask("pod-w", message(&workload("b"))).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!((world.metrics.issued(), world.metrics.refused("not_trusted")), (2, 1));
    // Not even its own once it is gone.
    world.cluster.pods.lock().clear();
    world.ask("pod-w", message(&workload("w"))).await.unwrap_err();
    assert_eq!(world.metrics.refused("not_on_node"), 1);
}

#[tokio::test]
async fn a_forged_token_gets_nothing() {
    let world = World::new();
    world.cluster.run("n1", workload("b"));
    let client = world.client("forged");
    let csr = CertificateRequest::new(&workload("b")).unwrap();
    let error = client.sign(csr.pem(), &workload("b"), HOUR).await.unwrap_err();
    assert_eq!(error, CaError::Unauthenticated("request authenticate failure".into()));
    assert_eq!((world.metrics.issued(), world.metrics.refused("caller")), (0, 1));
}

/// D51.
#[tokio::test]
async fn what_a_caller_sees_does_not_tell_why() {
    let world = World::new();
    world.cluster.run("n1", workload("b"));
    let foreign = Identity::new("other.domain", "a", "b").unwrap();
    world.cluster.run("n1", foreign.clone());
    let mut nobody = message(&workload("b"));
    nobody.metadata = None;
    let mut malformed = message(&workload("b"));
    malformed.metadata.as_mut().unwrap().fields.values_mut().for_each(|value| {
        value.kind = Some(prost_types::value::Kind::StringValue("spiffe://cluster.local/ns/a".into()));
    });
    let mut answers = HashSet::new();
    for (message, reason) in [
        (nobody, "no_identity"),
        (malformed, "malformed_identity"),
        (message(&foreign), "trust_domain"),
        (message(&workload("elsewhere")), "not_on_node"),
    ] {
        let status = world.ask("token-n1", message).await.unwrap_err();
        assert_eq!(world.metrics.refused(reason), 1, "{reason}");
        answers.insert((status.code() as i32, status.message().to_owned()));
    }
    assert_eq!(answers.len(), 1, "{answers:?}");
    let status = world.ask("no token", message(&workload("b"))).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "request authenticate failure"));
}

#[tokio::test]
async fn a_bad_request_is_refused_without_a_lesson() {
    let world = World::new();
    world.cluster.run("n1", workload("b"));
    for csr in [String::new(), "junk".into(), "x".repeat(MAX_REQUEST + 1)] {
        let status = world
            .ask("token-n1", IstioCertificateRequest { csr, ..message(&workload("b")) })
            .await
            .unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "certificate request refused"));
    }
    assert_eq!(world.metrics.refused("request"), 3);
}

/// D53.
#[tokio::test]
async fn lifetimes_are_cut_and_defaulted() {
    let mut world = World::new();
    world.config.max_lifetime = 2 * HOUR;
    world.config.default_lifetime = HOUR;
    world.cluster.run("n1", workload("b"));
    for (asked, given) in [(-5, 3600), (0, 3600), (20, 20), (7200, 7200), (7201, 7200), (i64::MAX, 7200)] {
        let request = IstioCertificateRequest { validity_duration: asked, ..message(&workload("b")) };
        let chain = world.ask("token-n1", request).await.unwrap();
        let der = pem::parse(&chain[0]).unwrap().into_contents();
        let end = X509Certificate::from_der(&der).unwrap().1.validity().not_after.timestamp();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() as i64;
        assert!((given - 2..=given).contains(&(end - now)), "{asked}: {}", end - now);
    }
}

#[tokio::test]
async fn one_node_cannot_use_up_what_is_for_all() {
    let mut world = World::new();
    (world.config.node_rate, world.config.node_burst) = (0.001, 3.0);
    for node in ["n1", "n2"] {
        world.cluster.run(node, workload("b"));
    }
    let service = world.service();
    let ask = async |node: &str| {
        let mut request = Request::new(message(&workload("b")));
        request.metadata_mut().insert("authorization", format!("Bearer token-{node}").parse().unwrap());
        service.create_certificate(request).await.map(drop)
    };
    for _ in 0..3 {
        ask("n1").await.unwrap();
    }
    assert_eq!(ask("n1").await.unwrap_err().code(), Code::ResourceExhausted);
    ask("n2").await.unwrap();
    assert_eq!(world.metrics.refused("rate"), 1);
}

/// D78.
#[test]
fn the_counters_have_names() {
    let metrics = CaMetrics::default();
    let mut registry = prometheus_client::registry::Registry::default();
    metrics.register(&mut registry);
    assert_eq!(metrics.refused("rate"), 0);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    for name in [
        "culvert_ca_certificates_issued_total 0",
        "culvert_ca_requests_refused_total{reason=\"rate\"} 0",
        "citadel_server_csr_count_total 0",
        "citadel_server_success_cert_issuance_count_total 0",
        "citadel_server_authentication_failure_count_total 0",
        "citadel_server_csr_parsing_err_count_total 0",
    ] {
        assert!(text.contains(name), "{text}");
    }
}
