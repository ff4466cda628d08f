//! Small worlds: a waypoint, what it knows, and clients with identities.

use std::net::SocketAddr;
use std::sync::Arc;

use clap::Parser;
use culvert_hbone::client::{Client, ClientHandle, TunnelRequest};
use culvert_hbone::config::ClientConfig;
use culvert_hbone::error::ConnectError;
use culvert_hbone::io::TunnelIo;
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::tls::{client_config, unnamed};
use culvert_model::address::{GatewayAddress, GatewayDestination, NamespacedHostname, NetworkPrefix};
use culvert_model::identity::Identity;
use culvert_model::service::{IpFamilies, LoadBalancing, Service};
use culvert_model::snapshot::{SnapshotWriter, Update};
use culvert_model::wire::{self, AddressResource};
use culvert_model::workload::{
    AppProtocol, Health, Locality, NetworkMode, Port, Ports, TunnelProtocol, Workload, WorkloadType,
};
use culvert_proto::waypoint as proto;
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use prometheus_client::registry::Registry;
use prost::Message;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio_rustls::TlsConnector;

use super::authority::Authority;
use super::soon;
use crate::accept;
use crate::config::ProxyConfig;
use crate::observe::Metrics;
use crate::shared::Shared;
use crate::state::World as Known;

/// The service of the tests, `shop/web.shop.svc.cluster.local`, and its address.
pub const WEB: &str = "shop/web.shop.svc.cluster.local";
pub const VIP: &str = "198.18.0.1";

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    proxy: ProxyConfig,
}

/// A waypoint of `shop/front` that runs.
pub struct World {
    pub authority: Arc<Authority>,
    pub shared: Arc<Shared>,
    pub registry: Registry,
    pub address: SocketAddr,
    pub tasks: Tasks,
    pub drain: DrainTrigger,
}

pub fn identity(namespace: &str, account: &str) -> Identity {
    Identity::new("cluster.local", namespace, account).unwrap()
}

pub fn key(name: &str) -> NamespacedHostname {
    let (namespace, hostname) = name.split_once('/').unwrap();
    NamespacedHostname { namespace: namespace.into(), hostname: hostname.into() }
}

/// A loopback address that no other process of these tests uses: HBONE has one port only.
pub fn own_address(number: u8) -> String {
    let [.., high, low] = std::process::id().to_be_bytes();
    format!("127.{}.{low}.{number}", 100 + high % 100)
}

/// A service with one port, bound to the waypoint.
pub fn service(name: &str, address: &str, port: u16, app_protocol: AppProtocol) -> Service {
    let prefix =
        NetworkPrefix { network: "".into(), prefix: address.parse::<std::net::IpAddr>().unwrap().into() };
    let waypoint = GatewayAddress {
        destination: GatewayDestination::Hostname(key("shop/front.shop.svc.cluster.local")),
        hbone_port: 15008,
    };
    Service {
        key: key(name),
        name: name.split(['/', '.']).nth(1).unwrap().into(),
        addresses: [prefix].into_iter().collect(),
        ports: [Port { service_port: port, target_port: port, app_protocol }].into_iter().collect(),
        subject_alt_names: Default::default(),
        waypoint: Some(Box::new(waypoint)),
        weighted_waypoints: Vec::new(),
        load_balancing: LoadBalancing::default(),
        ip_families: IpFamilies::Automatic,
        canonical: false,
        ingress_use_waypoint: false,
        namespace_only: false,
    }
}

/// The service of the tests.
pub fn web(app_protocol: AppProtocol) -> Service {
    service(WEB, VIP, 80, app_protocol)
}

/// A pod that answers for port 80 of these services at `address`, without HBONE.
pub fn pod(name: &str, address: SocketAddr, services: &[&str]) -> Workload {
    let port = Port { service_port: 80, target_port: address.port(), app_protocol: AppProtocol::Unknown };
    Workload {
        uid: format!("Kubernetes//Pod/shop/{name}").into(),
        name: name.into(),
        namespace: "shop".into(),
        addresses: [address.ip()].into_iter().collect(),
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::None,
        identity: identity("shop", name),
        waypoint: None,
        network_gateway: None,
        node: "node".into(),
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        workload_type: WorkloadType::Pod,
        workload_name: name.into(),
        native_tunnel: false,
        application_tunnel: None,
        services: services.iter().map(|it| (key(it), Ports([port].into_iter().collect()))).collect(),
        authorization_policies: Default::default(),
        health: Health::Healthy,
        cluster_id: "Kubernetes".into(),
        locality: Locality::default(),
        network_mode: NetworkMode::Standard,
        capacity: 1,
        pod: None,
    }
}

/// A route of [`WEB`].
pub fn route(rules: Vec<proto::HttpRule>) -> proto::Route {
    let parent = key(WEB);
    proto::Route {
        kind: "HTTPRoute".into(),
        namespace: "shop".into(),
        name: "route".into(),
        service_namespace: parent.namespace.to_string(),
        service_hostname: parent.hostname.to_string(),
        http_rules: rules,
        ..Default::default()
    }
}

/// A rule for a prefix, to these services' port 80 with these weights.
pub fn rule(prefix: &str, backends: &[(&str, u32)]) -> proto::HttpRule {
    let kind = Some(proto::path_match::Kind::Prefix(prefix.into()));
    let path = Some(proto::PathMatch { kind });
    proto::HttpRule {
        matches: vec![proto::HttpMatch { path, ..Default::default() }],
        backends: backends.iter().map(|(name, weight)| backend(name, *weight)).collect(),
        ..Default::default()
    }
}

pub fn backend(name: &str, weight: u32) -> proto::Backend {
    let service = key(name);
    proto::Backend {
        service_namespace: service.namespace.to_string(),
        service_hostname: service.hostname.to_string(),
        port: 80,
        weight,
        ..Default::default()
    }
}

impl World {
    /// A waypoint that knows these.
    pub async fn new(services: Vec<Service>, workloads: Vec<Workload>, routes: Vec<proto::Route>) -> Self {
        let world = Self::with(&[]).await;
        world.know(services, workloads, routes);
        world
    }

    /// A waypoint with more settings.
    pub async fn with(settings: &[&str]) -> Self {
        let own = [
            "waypoint",
            "--pod-namespace=shop",
            "--service-account=front",
            "--gateway=front",
            "--xds-address=-",
            "--instance-ip=127.0.0.254",
        ];
        let config = Settings::parse_from(own.iter().chain(settings));
        let (authority, mut registry) = (Authority::new(), Registry::default());
        let (drain, watcher) = drain::channel();
        let certificates =
            CertificateManager::new(authority.clone(), ManagerConfig::default(), Arc::new(SystemClock));
        let told = (Metrics::new(&mut registry), Readiness::new(), watcher);
        let me = config.proxy.identity().unwrap();
        let shared = Shared::new(config.proxy, me, Arc::new(certificates), told, [Handle::current()]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let tasks = Tasks::new("test");
        tasks.spawn("hbone", accept::listen(shared.clone(), listener));
        Self { authority, shared, registry, address, tasks, drain }
    }

    /// It knows these now, and nothing else.
    pub fn know(&self, services: Vec<Service>, workloads: Vec<Workload>, routes: Vec<proto::Route>) {
        let services = services.into_iter().map(AddressResource::Service);
        let addresses = services.chain(workloads.into_iter().map(AddressResource::Workload)).collect();
        let snapshot = SnapshotWriter::new().apply(Update { addresses, ..Update::default() }).snapshot;
        let routes = routes.iter().map(|message| {
            let proto::Route { kind, namespace, name, service_namespace, service_hostname, port, .. } =
                message;
            let resource = format!("{kind}/{namespace}/{name}/{service_namespace}/{service_hostname}/{port}");
            wire::route(&resource, &message.encode_to_vec()).route.unwrap()
        });
        let routes = culvert_model::route::Routes::default().with(&[], routes.collect());
        self.shared.state.commit(Arc::new(Known { snapshot, routes, ..Known::default() }));
    }

    /// These policies are in force now, beside what else it knows.
    pub fn enforce(&self, policies: &[proto::Policy]) {
        let decoded = policies.iter().map(|message| {
            let name = format!("{}/{}", message.namespace, message.name);
            let decoded = wire::request::decode(&name, &message.encode_to_vec());
            (name.into(), decoded.policy)
        });
        let policies = Arc::new(crate::state::Policies::default().with(&[], decoded.collect()));
        let world = (*self.shared.state.load_full()).clone();
        self.shared.state.commit(Arc::new(Known { policies, ..world }));
    }

    /// An HBONE connection of this client.
    pub async fn connect(&self, client: &Identity) -> ClientHandle {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let tls = client_config(&self.authority.certificate(client), &[identity("shop", "front")]);
        let tls = TlsConnector::from(tls).connect(unnamed(), stream).await.unwrap();
        let (handle, driver) = Client::handshake(tls, &ClientConfig::default()).await.unwrap();
        self.tasks.spawn("client", async move {
            let _ = driver.await;
        });
        handle
    }

    /// A tunnel of `shop/client` to the service of the tests.
    pub async fn tunnel(&self) -> TunnelIo {
        self.tunnel_to(&identity("shop", "client"), &format!("{VIP}:80")).await.unwrap()
    }

    /// A tunnel of this client.
    pub async fn tunnel_to(&self, client: &Identity, authority: &str) -> Result<TunnelIo, ConnectError> {
        let handle = soon(self.connect(client)).await;
        let request = TunnelRequest { authority: authority.to_owned(), ..TunnelRequest::default() };
        soon(handle.connect(request)).await.map(|(stream, _)| TunnelIo::new(stream))
    }

    /// All metrics.
    pub fn metrics(&self) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text
    }
}
