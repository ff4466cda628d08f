//! Follows the control plane: what it sends is decoded and staged, and put in force as one world once all types show the same
//! generation (design.md, "Generations").

mod local;
mod staging;

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_identity::token::TokenFile;
use culvert_model::address::NetworkAddress;
use culvert_model::balance::Place;
use culvert_model::snapshot::{Change, Changed, Snapshot};
use culvert_model::workload::Workload;
use culvert_proto::discovery::Node;
use culvert_proto::{ADDRESS_TYPE_URL, GATEWAY_METADATA, POLICY_TYPE_URL, ROUTE_TYPE_URL};
use culvert_runtime::readiness;
use culvert_runtime::tasks::Tasks;
use culvert_xds::client::{AdsClient, BACKOFF, ClientConfig, Event, MAX_MESSAGE_BYTES, Responder};
use culvert_xds::state::{Delivery, Subscription};
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;

use crate::config::ProxyConfig;
use crate::observe::Metrics;
use crate::shared::Shared;
use staging::Staging;

pub use local::run as run_local;

/// Events that wait: the client stops reading the stream while the queue is full, so this bounds messages in memory.
const QUEUE: usize = 4;
/// What is subscribed to, and put in force together.
pub const TYPES: [&str; 3] = [ADDRESS_TYPE_URL, ROUTE_TYPE_URL, POLICY_TYPE_URL];

/// Follows the control plane until the process ends; while it is away the last world stays in force.
pub async fn run(shared: Arc<Shared>, channel: Channel) {
    let (sink, mut events) = mpsc::channel(QUEUE);
    let client = AdsClient::new(client_config(&shared.config, channel, shared.metrics.clone()));
    let following = Tasks::new("xds");
    following.spawn("xds client", client.run(sink, shared.drain.clone()));
    let mut follower = Follower::new(shared);
    while let Some(event) = events.recv().await {
        match event {
            Event::Connected => {
                tracing::info!("connected to the control plane");
                follower.staging.connected();
            }
            Event::Delivery(delivery, responder) => follower.delivered(delivery, responder),
            Event::Disconnected { .. } => {}
        }
    }
}

fn client_config(config: &ProxyConfig, channel: Channel, metrics: Arc<Metrics>) -> ClientConfig {
    let token = TokenFile::new(&config.token_file);
    ClientConfig {
        connect: Arc::new(move || {
            let channel = channel.clone();
            Box::pin(async move { Ok(channel) })
        }),
        credentials: Arc::new(move || {
            let mut metadata = MetadataMap::new();
            metadata.insert("authorization", token.authorization()?);
            Ok(metadata)
        }),
        node: node(config),
        subscriptions: TYPES.map(|t| Subscription { type_url: t.to_owned(), names: Vec::new() }).to_vec(),
        backoff: BACKOFF,
        random: fastrand::Rng::new(),
        max_message_bytes: MAX_MESSAGE_BYTES,
        observer: metrics,
    }
}

/// Who asks: as a node tunnel does (Z94), and for which Gateway.
fn node(config: &ProxyConfig) -> Node {
    let ProxyConfig { instance_ip, pod_name, pod_namespace, cluster_domain, .. } = config;
    let id =
        format!("waypoint~{instance_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.{cluster_domain}");
    let mut node = culvert_xds::node_with_generations(id);
    let gateway = format!("{pod_namespace}/{}", config.gateway);
    let fields = [
        ("NODE_NAME", config.node.as_str()),
        ("NAME", pod_name),
        ("NAMESPACE", pod_namespace),
        ("SERVICE_ACCOUNT", &config.service_account),
        ("CLUSTER_ID", &config.cluster_id),
        ("NETWORK", &config.network),
        ("ISTIO_VERSION", env!("CARGO_PKG_VERSION")),
        (GATEWAY_METADATA, &gateway),
    ];
    let metadata = node.metadata.get_or_insert_default();
    for (key, value) in fields {
        let kind = Some(prost_types::value::Kind::StringValue(value.to_owned()));
        metadata.fields.insert(key.to_owned(), prost_types::Value { kind });
    }
    node
}

/// Puts in force what is staged.
struct Follower {
    shared: Arc<Shared>,
    staging: Staging<Responder>,
    waiting: Option<readiness::Task>,
}

impl Follower {
    fn new(shared: Arc<Shared>) -> Self {
        let waiting = Some(shared.readiness.register("first push of the control plane"));
        Self { shared, staging: Staging::new(), waiting }
    }

    fn delivered(&mut self, delivery: Delivery, responder: Responder) {
        let staged = self.staging.delivered(delivery, responder);
        for (_, rejections) in &staged.answers {
            for rejection in rejections {
                tracing::warn!(resource = %rejection.name, reason = %rejection.reason, "the control plane sent what cannot be used");
            }
        }
        if let Some(changed) = staged.commit {
            self.commit(&changed);
        }
        // After the commit.
        for (responder, rejections) in staged.answers {
            responder.accept_except(rejections);
        }
    }

    fn commit(&mut self, changed: &Changed) {
        let mut world = self.staging.world();
        world.place = place(&self.shared, &world.snapshot);
        let world = Arc::new(world);
        let old = self.shared.state.commit(world.clone());
        let stale = moved(&old.snapshot, &world.snapshot, changed);
        if !stale.is_empty() {
            for worker in self.shared.workers() {
                worker.evict(&stale);
            }
        }
        let told = changed.workloads.iter().filter(|(_, change)| *change != Change::Added);
        self.shared.endpoints.changed(told.map(|(uid, _)| uid));
        self.waiting = None;
        let (workloads, services, _) = world.snapshot.sizes();
        let (routes, policies) = (world.routes.len(), world.policies.iter().count());
        tracing::debug!(
            generation = world.snapshot.generation(),
            workloads,
            services,
            routes,
            policies,
            "committed"
        );
    }
}

/// Where the pod of this waypoint is, by what the control plane says of it.
fn place(shared: &Shared, snapshot: &Snapshot) -> Option<Place> {
    let network = shared.place.network.clone();
    let address = NetworkAddress { network, address: shared.config.instance_ip };
    let own = snapshot.workload_by_address(&address).filter(|it| it.identity == shared.identity)?;
    Some(Place::of(own))
}

/// Addresses at which somebody else answers now, or nobody, or another protocol: connections to them must not serve any more
/// requests.
fn moved(old: &Snapshot, new: &Snapshot, changed: &Changed) -> HashSet<IpAddr> {
    let same = |before: &Workload, after: &Workload| {
        after.identity == before.identity
            && after.addresses == before.addresses
            && after.tunnel_protocol == before.tunnel_protocol
    };
    changed
        .workloads
        .iter()
        .filter(|(_, change)| *change != Change::Added)
        .filter_map(|(uid, _)| {
            let before = old.workload_by_uid(uid)?;
            let kept = new.workload_by_uid(uid).is_some_and(|after| same(before, after));
            (!kept).then(|| before.addresses.to_vec())
        })
        .flatten()
        .collect()
}
