//! Follows the control plane: what it sends is decoded and staged, committed as one snapshot, and acknowledged once the
//! open connections have been judged by it (design.md, "Generations").

mod local;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use culvert_identity::token::TokenFile;
use culvert_model::Str;
use culvert_model::snapshot::{Change, Changed, Snapshot, SnapshotWriter, Update};
use culvert_model::wire::{self, AddressResource};
use culvert_model::workload::Workload;
use culvert_net::Background;
use culvert_proto::discovery::Node;
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_runtime::readiness;
use culvert_xds::client::{AdsClient, BACKOFF, ClientConfig, Event, MAX_MESSAGE_BYTES, Responder};
use culvert_xds::gate::{Gate, Verdict};
use culvert_xds::state::{Delivery, Rejection, Subscription};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tonic::metadata::MetadataMap;
use tonic::transport::Channel;

use crate::config::ProxyConfig;
use crate::inbound::rejudge;
use crate::observe::Metrics;
use crate::pods::{Pods, Shared};
use crate::state::Retired;

pub use local::run as run_local;

/// Events that wait: the client stops reading the stream while the queue is full, so this bounds messages in memory.
const QUEUE: usize = 4;
/// After this many changed resources the allocator is told to give back what it keeps for reuse: a push of a whole mesh needs
/// as much again as it leaves behind.
const GIVE_BACK_AFTER: usize = 10_000;
/// How long it waits for what else comes with them, so that it happens once a second at most.
const GIVE_BACK_DELAY: Duration = Duration::from_secs(1);
/// On a node whose processors are never idle, decoding a push waits no longer than this for one that is.
const PATIENCE: Duration = Duration::from_millis(100);
const TYPES: [&str; 2] = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL];

/// Follows the control plane until the process ends; while it is away the last snapshot stays in force.
///
/// It is to run on a thread of its own: a push of thousands of workloads takes tens of milliseconds to decode and to put in
/// force, and while the processors are busy traffic goes first.
pub async fn run(shared: Arc<Shared>, pods: Arc<Pods>, channel: Channel, pace: Pace) {
    if let Err(error) = culvert_net::defer_thread() {
        tracing::warn!(%error, "following the control plane cannot give way to traffic");
    }
    let background = Background::of_this_thread()
        .inspect_err(|error| tracing::info!(%error, "without CAP_SYS_NICE, traffic waits a little for large pushes on busy processors"))
        .ok();
    if let Some(background) = &background {
        let _ = pace.watched.set(background.clone());
    }
    let (sink, mut events) = mpsc::channel(QUEUE);
    let client = AdsClient::new(client_config(&shared.config, channel, shared.observer.metrics.clone()));
    let drain = shared.drain.clone();
    let following = culvert_runtime::tasks::Tasks::new("xds");
    following.spawn("xds client", client.run(sink, drain));
    let mut follower = Follower::new(shared, pods, background.map(|it| (it, pace)));
    let mut give_back_at = None;
    loop {
        let give_back = async {
            match give_back_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => follower.heard(event),
                None => return,
            },
            () = give_back => {
                follower.changes = 0;
                give_back_at = None;
                if let Err(error) = culvert_net::heap::give_back() {
                    tracing::debug!(%error, "the allocator gives nothing back");
                }
            }
        }
        if follower.changes >= GIVE_BACK_AFTER && give_back_at.is_none() {
            give_back_at = Some(Instant::now() + GIVE_BACK_DELAY);
        }
    }
}

/// Sees to it, from another thread, that following the control plane keeps pace where processors are never idle.
#[derive(Clone, Debug, Default)]
pub struct Pace {
    watched: Arc<OnceLock<Background>>,
    entered: Arc<Notify>,
}

impl Pace {
    /// Watches for ever; costs nothing while nothing is pushed.
    pub async fn keep(self) {
        loop {
            self.entered.notified().await;
            let Some(background) = self.watched.get() else { continue };
            while background.keep_pace(PATIENCE) {
                tokio::time::sleep(PATIENCE / 4).await;
            }
        }
    }
}

fn client_config(config: &ProxyConfig, channel: Channel, metrics: Arc<Metrics>) -> ClientConfig {
    let token = config.token_file.as_ref().map(TokenFile::new);
    let headers = config.xds_header.clone();
    ClientConfig {
        connect: Arc::new(move || {
            let channel = channel.clone();
            Box::pin(async move { Ok(channel) })
        }),
        credentials: Arc::new(move || {
            let mut metadata = MetadataMap::new();
            if let Some(token) = &token {
                metadata.insert("authorization", token.authorization()?);
            }
            for header in &headers {
                metadata.insert(header.name.clone(), header.value.clone());
            }
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

/// Who asks (Z94).
fn node(config: &ProxyConfig) -> Node {
    let ProxyConfig { node_ip, pod_name, pod_namespace, cluster_domain, .. } = config;
    let id = format!("ztunnel~{node_ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.{cluster_domain}");
    let mut node = culvert_xds::node_with_generations(id);
    let fields = [
        ("NODE_NAME", config.node.as_str()),
        ("NAME", pod_name),
        ("NAMESPACE", pod_namespace),
        ("CLUSTER_ID", &config.cluster_id),
        ("NETWORK", &config.network),
        ("ISTIO_VERSION", env!("CARGO_PKG_VERSION")),
    ];
    let metadata = node.metadata.get_or_insert_default();
    // First, so that nobody's entry can change who this is.
    for entry in &config.node_metadata {
        metadata.fields.entry(entry.key.clone()).or_insert_with(|| string(&entry.value));
    }
    for (key, value) in fields {
        metadata.fields.insert(key.to_owned(), string(value));
    }
    node
}

fn string(text: &str) -> prost_types::Value {
    prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(text.to_owned())) }
}

/// Puts in force what is staged, in the one order that is safe.
struct Follower {
    shared: Arc<Shared>,
    pods: Arc<Pods>,
    staging: Staging<Responder>,
    retired: Retired,
    waiting: Option<readiness::Task>,
    /// Resources that changed since the allocator last gave back.
    changes: usize,
    /// Decoding goes on there. What takes locks that traffic takes too does not: who holds one must come to its end.
    background: Option<(Background, Pace)>,
}

impl Follower {
    fn new(shared: Arc<Shared>, pods: Arc<Pods>, background: Option<(Background, Pace)>) -> Self {
        let waiting = Some(shared.readiness.register("first push of the control plane"));
        let (staging, retired) = (Staging::new(), Retired::default());
        Self { shared, pods, staging, retired, waiting, changes: 0, background }
    }

    fn heard(&mut self, event: Event) {
        match event {
            Event::Connected => {
                tracing::info!("connected to the control plane");
                self.staging.connected();
            }
            Event::Delivery(delivery, responder) => self.delivered(delivery, responder),
            Event::Disconnected { .. } => {}
        }
    }

    fn delivered(&mut self, delivery: Delivery, responder: Responder) {
        let staged = {
            let background = self.background.as_ref();
            let _stay = background.map(|(background, pace)| background.enter(|| pace.entered.notify_one()));
            self.staging.delivered(delivery, responder)
        };
        for (_, rejections) in &staged.answers {
            for rejection in rejections {
                tracing::warn!(resource = %rejection.name, reason = %rejection.reason, "the control plane sent what cannot be used");
            }
        }
        if let Some(changed) = staged.commit {
            self.commit(&changed);
        }
        // After the commit, and after what is open was judged by it.
        for (responder, rejections) in staged.answers {
            let discovery = &self.shared.observer.metrics.discovery;
            if rejections.is_empty() {
                discovery.accepted.inc()
            } else {
                discovery.rejected.inc()
            };
            responder.accept_except(rejections);
        }
    }

    fn commit(&mut self, changed: &Changed) {
        let snapshot = Arc::new(self.staging.writer.snapshot().clone());
        let old = self.shared.state.commit(snapshot.clone());
        if !changed.policies.is_empty() || !changed.workloads.is_empty() {
            let ended = rejudge(&snapshot, &self.shared.observer.connections, self.shared.config.same_node);
            if ended > 0 {
                tracing::info!(ended, "connections that policy no longer allows were ended");
            }
        }
        self.evict(&old, &snapshot, changed);
        let told = changed.workloads.iter().filter(|(_, change)| *change != Change::Added);
        self.shared.endpoints.changed(told.map(|(uid, change)| (uid, *change == Change::Removed)));
        self.retired.retire(old);
        self.changes += changed.workloads.len() + changed.services.len() + changed.policies.len();
        self.waiting = None;
        let (workloads, services, policies) = snapshot.sizes();
        tracing::debug!(generation = snapshot.generation(), workloads, services, policies, "committed");
    }

    /// Tunnels to an address whose workload is gone or is another one now must not serve new streams (trap 18).
    fn evict(&self, old: &Snapshot, new: &Snapshot, changed: &Changed) {
        let stale = moved(old, new, changed);
        if stale.is_empty() {
            return;
        }
        for pod in self.pods.all() {
            for pool in &pod.pools {
                pool.evict(|key, _| stale.contains(&key.peer.ip()) || stale.contains(&key.destination.ip()));
            }
        }
    }
}

/// Addresses at which somebody else answers now, or nobody, or another protocol.
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

/// What has arrived and is not yet in force; `R` is how a delivery is answered.
struct Staging<R> {
    writer: SnapshotWriter,
    gate: Gate,
    /// Acknowledged parts of a push whose end is still to come: the server does not send them again.
    parts: Vec<Update>,
    /// Complete for their type, to be acknowledged with the commit.
    held: Vec<Held<R>>,
    /// Types of which a whole push has been applied.
    applied: HashSet<String>,
    /// Applied and not yet put in force.
    changed: Changed,
}

struct Held<R> {
    type_url: String,
    update: Update,
    rejections: Vec<Rejection>,
    responder: R,
}

/// What follows from a delivery.
struct Staged<R> {
    /// The writer's snapshot is to be put in force; how it differs from the one before.
    commit: Option<Changed>,
    /// To be answered afterwards.
    answers: Vec<(R, Vec<Rejection>)>,
}

impl<R> Staging<R> {
    fn new() -> Self {
        Self {
            writer: SnapshotWriter::new(),
            gate: Gate::new(TYPES),
            parts: Vec::new(),
            held: Vec::new(),
            applied: HashSet::new(),
            changed: Changed::default(),
        }
    }

    /// A new connection: what was held was not acknowledged, so the control plane sends it again.
    fn connected(&mut self) {
        self.gate.connected();
        self.held.clear();
    }

    fn delivered(&mut self, delivery: Delivery, responder: R) -> Staged<R> {
        let verdict = self.gate.delivered(&delivery);
        let type_url = delivery.type_url.clone();
        let (update, rejections) = decode(delivery, &mut self.writer);
        if matches!(verdict, Verdict::Acknowledge) {
            self.parts.push(update);
            return Staged { commit: None, answers: vec![(responder, rejections)] };
        }
        self.held.push(Held { type_url, update, rejections, responder });
        match verdict {
            Verdict::Commit => self.apply(),
            Verdict::Acknowledge | Verdict::Hold => Staged { commit: None, answers: Vec::new() },
        }
    }

    fn apply(&mut self) -> Staged<R> {
        let mut answers = Vec::new();
        for part in self.parts.drain(..) {
            extend(&mut self.changed, self.writer.apply(part).changed);
        }
        for held in self.held.drain(..) {
            extend(&mut self.changed, self.writer.apply(held.update).changed);
            self.applied.insert(held.type_url);
            answers.push((held.responder, held.rejections));
        }
        // Another control plane sends each type by itself, workloads first. Until there are policies too, nothing is in
        // force: a workload without them would let everyone in.
        let whole = TYPES.iter().all(|type_url| self.applied.contains(*type_url));
        Staged { commit: whole.then(|| std::mem::take(&mut self.changed)), answers }
    }
}

fn extend(changed: &mut Changed, more: Changed) {
    changed.workloads.extend(more.workloads);
    changed.services.extend(more.services);
    changed.policies.extend(more.policies);
}

/// Body by body, each dropped with what is kept once already: a push of a whole mesh waits here for its end.
fn decode(delivery: Delivery, writer: &mut SnapshotWriter) -> (Update, Vec<Rejection>) {
    let generation = match delivery.generation {
        culvert_xds::Generation::Ours { number, .. } => number,
        culvert_xds::Generation::Foreign(_) => 0,
    };
    let mut update = Update { generation, ..Update::default() };
    let mut rejections = BTreeMap::new();
    let removed = delivery.removed.into_iter().map(Str::from).collect();
    if delivery.type_url == ADDRESS_TYPE_URL {
        update.removed_addresses = removed;
        for resource in delivery.added {
            match wire::address(&resource.name, &resource.body) {
                Ok(mut address) => {
                    writer.share(&mut address);
                    // The client that accepted it keeps the name too.
                    if let AddressResource::Workload(workload) = &mut address
                        && workload.uid == resource.name
                    {
                        workload.uid = resource.name;
                    }
                    update.addresses.push(address);
                }
                Err(error) => {
                    rejections.insert(resource.name.to_string(), error.to_string());
                }
            }
        }
    } else {
        update.removed_policies = removed;
        for resource in delivery.added {
            let decoded = wire::policy(&resource.name, &resource.body);
            // In force even so: it denies what it might have denied.
            update.policies.push(decoded.policy);
            if let Some(error) = decoded.error {
                rejections.insert(resource.name.to_string(), error.to_string());
            }
        }
    }
    (update, rejections.into_iter().map(|(name, reason)| Rejection { name, reason }).collect())
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
