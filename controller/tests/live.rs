//! The whole controller over real files and sockets: a change on disk reaches a connected proxy.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; the lint's own exception stops at #[test] functions"
)]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use culvert_controller::app::App;
use culvert_controller::args::Args;
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use culvert_proto::security::Authorization;
use culvert_proto::workload::{Address, TunnelProtocol, address};
use culvert_proto::{
    ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL, GATEWAY_METADATA, POLICY_TYPE_URL, ROUTE_TYPE_URL, waypoint,
};
use culvert_xds::service::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use prost::Message;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};

/// Nothing here takes longer.
const PATIENCE: Duration = Duration::from_secs(10);

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {nodeName: node-a, containers: [{name: c}]}\n";

struct World {
    dir: tempfile::TempDir,
}

struct Proxy {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl World {
    fn new() -> Self {
        let world = Self { dir: tempfile::tempdir().unwrap() };
        for dir in ["manifests", "status/pods", "status/services"] {
            fs::create_dir_all(world.at(dir)).unwrap();
        }
        let hash = |token: &str| -> String {
            Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
        };
        let tokens = format!(r#"{{"node-a":"{}","node-b":"{}"}}"#, hash("token-a"), hash("token-b"));
        world.write("node-tokens.json", &tokens);
        world.write("manifests/pod.yaml", POD);
        world
    }

    fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// As the writers of status files do it.
    fn write(&self, name: &str, text: &str) {
        let path = self.at(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let beside = path.with_extension("tmp");
        fs::write(&beside, text).unwrap();
        fs::rename(&beside, &path).unwrap();
    }

    fn policy(&self, port: &str) {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec:\n  action: DENY\n  rules:\n  - to: [{{operation: {{ports: [\"{port}\"]}}}}]\n"
        );
        self.write("manifests/policy.yaml", &text);
    }

    fn runs(&self, uid: &str, ready: bool) {
        let text = format!(
            r#"{{"uid":"{uid}","namespace":"shop","name":"web","nodeName":"node-a","podIPs":["100.64.1.2"],"phase":"Running","ready":{ready}}}"#
        );
        self.write("status/pods/shop.web.json", &text);
    }

    fn args(&self) -> Args {
        let at = |name: &str| self.at(name).to_str().unwrap().to_owned();
        let flags = [
            ("--manifests", at("manifests")),
            ("--status", at("status")),
            ("--redirection", at("nodes")),
            ("--node-tokens", at("node-tokens.json")),
            ("--ca-dir", at("ca")),
            ("--root-cert-out", at("root-cert.pem")),
            ("--listen", "127.0.0.1:0".to_owned()),
            ("--metrics-listen", "127.0.0.1:0".to_owned()),
        ];
        let flags = flags.into_iter().flat_map(|(name, value)| [name.to_owned(), value]);
        Args::parse_from(std::iter::once("controller".to_owned()).chain(flags))
    }

    async fn start(&self) -> App {
        App::start(&self.args(), None).await.unwrap()
    }

    async fn connect(&self, app: &App, token: &str, says: &str, types: &[&str]) -> Result<Proxy, Status> {
        self.connect_as(None, app, token, says, types).await
    }

    /// As the waypoint of a Gateway, if one is given.
    async fn connect_as(
        &self,
        gateway: Option<&str>,
        app: &App,
        token: &str,
        says: &str,
        types: &[&str],
    ) -> Result<Proxy, Status> {
        let address = format!("https://{}", app.address);
        let endpoint =
            ControlEndpoint::new(&address, "culvert-controller.culvert-system.svc", self.at("root-cert.pem"));
        let channel = control_channel(endpoint).unwrap();
        let (requests, sent) = mpsc::channel(16);
        for type_url in types {
            requests.send(subscribe(type_url, says, gateway)).await.unwrap();
        }
        let mut request = Request::new(ReceiverStream::new(sent));
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses =
            timeout(PATIENCE, client.delta_aggregated_resources(request)).await.unwrap()?.into_inner();
        Ok(Proxy { requests, responses })
    }
}

impl Proxy {
    /// The next response, acknowledged.
    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response = timeout(PATIENCE, self.responses.message()).await.expect("a response in time")?;
        let response = response.expect("the stream goes on");
        let ack = DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        };
        self.requests.send(ack).await.unwrap();
        Ok(response)
    }

    /// The next workload.
    async fn workload(&mut self) -> culvert_proto::workload::Workload {
        loop {
            let response = self.next().await.unwrap();
            for resource in response.resources {
                let address = Address::decode(&*resource.resource.unwrap().value).unwrap();
                if let Some(address::Type::Workload(workload)) = address.r#type {
                    return workload;
                }
            }
        }
    }

    /// The port that policy `shop/p` denies, from the next response that has it; 0 if it is removed.
    async fn denied_port(&mut self) -> u32 {
        loop {
            let response = self.next().await.unwrap();
            if response.removed_resources.iter().any(|name| name == "shop/p") {
                return 0;
            }
            if let Some(resource) = response.resources.into_iter().find(|it| it.name == "shop/p") {
                let policy = Authorization::decode(&*resource.resource.unwrap().value).unwrap();
                return policy.groups[0].rules[0].matches[0].destination_ports[0];
            }
        }
    }
}

fn subscribe(type_url: &str, node: &str, gateway: Option<&str>) -> DeltaDiscoveryRequest {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let said = [("NODE_NAME", Some(node)), (GATEWAY_METADATA, gateway)];
    let fields = said.into_iter().filter_map(|(key, value)| Some((key.to_owned(), text(value?)))).collect();
    DeltaDiscoveryRequest {
        node: Some(Node {
            id: format!("ztunnel~{node}"),
            metadata: Some(Struct { fields }),
            ..Node::default()
        }),
        type_url: type_url.to_owned(),
        ..DeltaDiscoveryRequest::default()
    }
}

async fn page(app: &App, path: &str) -> serde_json::Value {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(app.admin_address).await.unwrap();
    stream
        .write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes())
        .await
        .unwrap();
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text)).await.unwrap().unwrap();
    serde_json::from_str(text.split_once("\r\n\r\n").unwrap().1).unwrap()
}

/// Waits until a snapshot is as wanted.
async fn until(app: &App, wanted: impl Fn(&culvert_controller::index::Snapshot) -> bool) {
    let mut snapshots = app.snapshots.clone();
    timeout(PATIENCE, snapshots.wait_for(|snapshot| wanted(snapshot))).await.expect("in time").unwrap();
}

/// D77.
#[tokio::test(flavor = "multi_thread")]
async fn an_edit_reaches_a_connected_proxy_within_a_second() {
    let world = World::new();
    world.policy("80");
    let app = world.start().await;
    let mut proxy = world.connect(&app, "token-a", "node-a", &[AUTHORIZATION_TYPE_URL]).await.unwrap();
    assert_eq!(proxy.denied_port().await, 80);
    for port in ["81", "82"] {
        let started = Instant::now();
        world.policy(port);
        assert_eq!(proxy.denied_port().await.to_string(), port);
        let took = started.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    // A bad edit is reported and changes nothing; mended, it takes effect.
    world.policy("0");
    until(&app, |snapshot| !snapshot.world.errors.is_empty()).await;
    let errors = page(&app, "/debug/errors").await;
    assert_eq!(
        errors["errors"][0]["text"],
        "policy.yaml:7: spec.rules[0].to[0].operation.ports[0]: invalid value (got \"0\", expected a port from 1 to 65535)"
    );
    assert!(app.snapshots.borrow().policies.contains_key("shop/p"));
    world.policy("83");
    assert_eq!(proxy.denied_port().await, 83);
    fs::remove_file(world.at("manifests/policy.yaml")).unwrap();
    assert_eq!(proxy.denied_port().await, 0);
    let clients = page(&app, "/debug/clients").await;
    assert_eq!(clients["clients"][0]["peer"]["name"], "node-a");
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn statuses_of_directories_that_come_later_are_seen() {
    let world = World::new();
    let app = world.start().await;
    let mut proxy = world.connect(&app, "token-a", "node-a", &[ADDRESS_TYPE_URL]).await.unwrap();
    world.runs("one", false);
    let workload = proxy.workload().await;
    assert_eq!(
        (workload.uid.as_str(), workload.status().as_str_name()),
        ("Kubernetes//Pod/shop/web", "UNHEALTHY")
    );
    world.runs("one", true);
    assert_eq!(proxy.workload().await.status().as_str_name(), "HEALTHY");
    let started = Instant::now();
    world.write("nodes/node-a/redirection/one.json", r#"{"redirection":"enabled"}"#);
    assert_eq!(proxy.workload().await.tunnel_protocol(), TunnelProtocol::Hbone);
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    fs::remove_file(world.at("nodes/node-a/redirection/one.json")).unwrap();
    assert_eq!(proxy.workload().await.tunnel_protocol(), TunnelProtocol::None);
    // What lies beside is nobody's business.
    let generation = app.snapshots.borrow().generation;
    world.write("nodes/node-a/token", "x");
    world.write("manifests/new/deep/other.yaml", &POD.replace("name: web", "name: other"));
    until(&app, |snapshot| snapshot.world.objects.values().any(|it| it.file.ends_with("other.yaml"))).await;
    assert_eq!(app.snapshots.borrow().generation, generation, "a pod without a status is nothing to send");
    app.stop().await;
}

/// D15.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_proves_its_node() {
    let world = World::new();
    let app = world.start().await;
    let refused =
        |result: Result<DeltaDiscoveryResponse, Status>| result.map(|_| ()).map_err(|status| status.code());
    let types = [ADDRESS_TYPE_URL];
    let wrong = world.connect(&app, "token-x", "node-a", &types).await;
    assert_eq!(wrong.err().map(|status| status.code()), Some(Code::Unauthenticated));
    let mut other = world.connect(&app, "token-b", "node-a", &types).await.unwrap();
    assert_eq!(refused(other.next().await), Err(Code::PermissionDenied));
    let mut right = world.connect(&app, "token-b", "node-b", &types).await.unwrap();
    world.runs("one", true);
    assert_eq!(right.workload().await.name, "web");
    app.stop().await;
}

const SHOP: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Pod
metadata: {name: w-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: w}}
spec: {nodeName: node-a, containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop, labels: {istio.io/use-waypoint: w}}
spec: {clusterIP: 198.18.128.1, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: l7, namespace: shop}
spec: {targetRefs: [{kind: Service, group: "", name: echo}], rules: [{to: [{operation: {methods: [GET]}}]}]}
"#;

/// D14, D15. A waypoint has its own routes and policies, and nobody else does: neither a node's proxy, nor one that says it is that waypoint.
#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_gets_what_it_carries_out() {
    let world = World::new();
    world.write("manifests/shop.yaml", SHOP);
    let status = r#"{"uid":"w","namespace":"shop","name":"w-0","nodeName":"node-a","podIPs":["100.64.1.9"],"phase":"Running","ready":true}"#;
    world.write("status/pods/shop.w-0.json", status);
    let route = |method: &str| {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: shop}}\nspec: {{parentRefs: [{{group: \"\", kind: Service, name: echo}}], rules: [{{matches: [{{method: {method}}}]}}]}}\n"
        );
        world.write("manifests/route.yaml", &text);
    };
    route("GET");
    let app = world.start().await;
    let types = [ROUTE_TYPE_URL, POLICY_TYPE_URL, ADDRESS_TYPE_URL];
    let mut proxy = world.connect(&app, "token-a", "node-a", &types[..2]).await.unwrap();
    for _ in 0..2 {
        assert_eq!(proxy.next().await.unwrap().resources.len(), 0);
    }
    for (token, node, gateway) in
        [("token-b", "node-b", "shop/w"), ("token-a", "node-a", "shop/v"), ("token-a", "node-a", "")]
    {
        let mut other = world.connect_as(Some(gateway), &app, token, node, &types).await.unwrap();
        assert_eq!(other.next().await.unwrap_err().code(), Code::PermissionDenied, "{node} {gateway}");
    }
    let mut own = world.connect_as(Some("shop/w"), &app, "token-a", "node-a", &types).await.unwrap();
    let mut names = Vec::new();
    for _ in 0..3 {
        let response = own.next().await.unwrap();
        names.extend(response.resources.into_iter().map(|it| format!("{} {}", it.name, response.type_url)));
    }
    for expected in [
        format!("HTTPRoute/shop/r/shop/echo.shop.svc.cluster.local/0 {ROUTE_TYPE_URL}"),
        format!("shop/l7 {POLICY_TYPE_URL}"),
        format!("shop/echo.shop.svc.cluster.local {ADDRESS_TYPE_URL}"),
    ] {
        assert!(names.contains(&expected), "{names:#?}");
    }
    route("PUT");
    let changed = own.next().await.unwrap();
    let [resource] = changed.resources.as_slice() else { panic!("{changed:?}") };
    let told = waypoint::Route::decode(&*resource.resource.clone().unwrap().value).unwrap();
    assert_eq!(told.http_rules[0].matches[0].method, "PUT");
    let index = page(&app, "/debug/index").await;
    assert_eq!(index["waypoints"]["shop/w"]["policies"][0], "shop/l7");
    app.stop().await;
}

/// D13.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_the_root_and_resends_nothing() {
    let world = World::new();
    world.policy("80");
    world.runs("one", true);
    let app = world.start().await;
    let root = fs::read(world.at("root-cert.pem")).unwrap();
    let first = app.snapshots.borrow().clone();
    let mut proxy = world.connect(&app, "token-a", "node-a", &[AUTHORIZATION_TYPE_URL]).await.unwrap();
    assert_eq!(proxy.denied_port().await, 80);
    let stopped = Instant::now();
    app.stop().await;
    assert!(stopped.elapsed() < Duration::from_secs(3), "{:?}", stopped.elapsed());
    assert!(
        timeout(PATIENCE, proxy.responses.message()).await.unwrap().is_err(),
        "the stream is ended, not left"
    );

    // It turns bad while nobody looks: what it said is still in force.
    world.policy("0");
    let app = world.start().await;
    assert_eq!(fs::read(world.at("root-cert.pem")).unwrap(), root);
    assert_eq!(app.snapshots.borrow().world.errors.len(), 1);
    let again = app.snapshots.borrow().clone();
    assert_eq!(again.set.types, first.set.types);
    assert!(again.generation > first.generation);
    app.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_it_starts_with_and_what_not() {
    let world = World::new();
    world.policy("0");
    world.runs("one", true);
    let app = world.start().await;
    let snapshot = app.snapshots.borrow().clone();
    assert_eq!(snapshot.world.errors.len(), 1);
    assert!(snapshot.addresses.contains_key("Kubernetes//Pod/shop/web"), "the rest is served");
    let index = page(&app, "/debug/index").await;
    assert_eq!(
        index["addresses"]["Kubernetes//Pod/shop/web"]["resource"]["workload"]["addresses"][0],
        "100.64.1.2"
    );
    app.stop().await;

    let mut args = world.args();
    args.manifests = Some(world.at("nothing"));
    let error = App::start(&args, None).await.err().expect("no directory, no start");
    assert!(format!("{error:#}").contains("cannot read directory"), "{error:#}");
    let mut args = world.args();
    args.node_tokens = Some(world.at("nothing"));
    assert!(App::start(&args, None).await.is_err());
}

/// D10: the types are those of node tunnels; whoever asks for others is told that there are none, and not left waiting.
#[tokio::test(flavor = "multi_thread")]
async fn types_that_are_not_served_are_answered_empty() {
    const CLUSTERS: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    let world = World::new();
    world.policy("80");
    world.runs("one", true);
    let app = world.start().await;
    let mut proxy = world.connect(&app, "token-a", "node-a", &[CLUSTERS, ADDRESS_TYPE_URL]).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let response = proxy.next().await.unwrap();
        seen.push((response.type_url, response.resources.len()));
    }
    seen.sort();
    assert_eq!(seen, [(CLUSTERS.to_owned(), 0), (ADDRESS_TYPE_URL.to_owned(), 1)]);
    app.stop().await;
}

/// D77.
#[tokio::test(flavor = "multi_thread")]
async fn pages_show_what_is_sent_and_to_whom() {
    let world = World::new();
    world.policy("80");
    world.runs("one", true);
    let app = world.start().await;
    let mut proxy = world.connect(&app, "token-a", "node-a", &[ADDRESS_TYPE_URL]).await.unwrap();
    proxy.workload().await;
    let index = page(&app, "/debug/index").await;
    assert_eq!(index["policies"]["shop/p"]["resource"]["action"], "DENY");
    assert_eq!(index["policyStatus"][0]["reason"], "Accepted");
    let generation = index["generation"].as_u64().unwrap();
    let began = Instant::now();
    loop {
        let clients = page(&app, "/debug/clients").await;
        let acked = clients["clients"][0]["types"][ADDRESS_TYPE_URL]["acked_generation"].as_u64();
        if acked == Some(generation) {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{clients}");
        tokio::task::yield_now().await;
    }
    app.stop().await;
}
