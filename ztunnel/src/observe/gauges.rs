//! What is open now: counted when the metrics are asked for, so that nothing on a connection's way pays for it.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::flow::Direction;
use super::limits::Limit;
use crate::dns::{MAX_IN_FLIGHT, MAX_NAMES};
use crate::outbound::MAX_TUNNELS;
use crate::pods::{Pods, Shared};

/// Gauges of the process.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Tunnel connections by who dialled them.
    tunnels: Family<DirectionLabel, Gauge>,
    /// Streams on them.
    streams: Family<DirectionLabel, Gauge>,
    /// TCP sockets of open connections and tunnels (Z104).
    sockets: Gauge,
    /// Threads that carry traffic, what runs on them, and what waits for them (Z104).
    workers: Gauge,
    tasks: Gauge,
    queued: Gauge,
}

/// An accepted tunnel connection, counted until it is dropped.
#[derive(Debug)]
pub struct AcceptedTunnel(Gauge);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DirectionLabel {
    direction: &'static str,
}

impl Gauges {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let gauges = Self::default();
        let culvert = registry.sub_registry_with_prefix("culvert");
        culvert.register("tunnels", "Open tunnel connections", gauges.tunnels.clone());
        culvert.register("tunnel_streams", "Open streams in tunnels", gauges.streams.clone());
        let istio = registry.sub_registry_with_prefix("istio");
        let sockets = gauges.sockets.clone();
        istio.register("tcp_sockets_open", "TCP sockets of open connections and tunnels", sockets);
        let build: Gauge = Gauge::default();
        build.set(1);
        let tag = env!("CARGO_PKG_VERSION");
        registry
            .sub_registry_with_prefix("istio")
            .sub_registry_with_labels(
                [("component".into(), "ztunnel".into()), ("tag".into(), tag.into())].into_iter(),
            )
            .register("build", "The running program", build);
        let tokio = registry.sub_registry_with_prefix("tokio");
        tokio.register("num_workers", "Threads that carry traffic", gauges.workers.clone());
        tokio.register("num_alive_tasks", "Tasks on these threads", gauges.tasks.clone());
        tokio.register("global_queue_depth", "Tasks that wait for a thread", gauges.queued.clone());
        gauges
    }

    /// A tunnel connection was accepted.
    pub fn tunnel_accepted(&self) -> AcceptedTunnel {
        let gauge = self.tunnels.get_or_create(&DirectionLabel::of(Direction::Inbound)).clone();
        gauge.inc();
        AcceptedTunnel(gauge)
    }
}

impl DirectionLabel {
    fn of(direction: Direction) -> Self {
        let direction = match direction {
            Direction::Outbound => "outbound",
            Direction::Inbound => "inbound",
        };
        Self { direction }
    }
}

impl Drop for AcceptedTunnel {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Brings every gauge up to date, and adds what open connections have carried since the last time.
pub fn measure(shared: &Shared, pods: &Pods) {
    let metrics = &shared.observer.metrics;
    let [mut sockets, mut inbound_streams] = [0_i64; 2];
    for live in shared.observer.connections.all() {
        metrics.traffic(&live);
        let tunnelled = live.facts.tunnel.is_some();
        // Of what is handed over in this process there are two records, and one pair of sockets.
        sockets += match (tunnelled, live.facts.handed_in_by.is_some()) {
            (_, true) => 0,
            (true, _) => 1,
            (false, _) => 2,
        };
        inbound_streams += i64::from(tunnelled && live.facts.direction == Direction::Inbound);
    }
    let most = |(used, bound): (usize, usize), more: (usize, usize)| (used.max(more.0), bound.max(more.1));
    let (mut pod_most, mut tunnels_most, mut queries_most) = ((0, 0), (0, MAX_TUNNELS), (0, MAX_IN_FLIGHT));
    let [mut dialled, mut outbound_streams] = [0_usize; 2];
    for pod in pods.all() {
        pod_most = most(pod_most, pod.places.used());
        queries_most.0 = queries_most.0.max(MAX_IN_FLIGHT - pod.dns_queries.available_permits());
        for stats in pod.pools.iter().map(|pool| pool.stats()) {
            dialled += stats.connections;
            outbound_streams += stats.streams;
            tunnels_most.0 = tunnels_most.0.max(stats.connections);
        }
    }
    let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let gauges = &metrics.gauges;
    let (inbound, outbound) =
        (DirectionLabel::of(Direction::Inbound), DirectionLabel::of(Direction::Outbound));
    gauges.tunnels.get_or_create(&outbound).set(gauge(dialled));
    gauges.streams.get_or_create(&outbound).set(gauge(outbound_streams));
    gauges.streams.get_or_create(&inbound).set(inbound_streams);
    let accepted = gauges.tunnels.get_or_create(&inbound).get();
    gauges.sockets.set(sockets + gauge(dialled) + accepted);

    let runtimes = || shared.workers.iter().map(tokio::runtime::Handle::metrics);
    gauges.workers.set(gauge(runtimes().map(|r| r.num_workers()).sum()));
    gauges.tasks.set(gauge(runtimes().map(|r| r.num_alive_tasks()).sum()));
    gauges.queued.set(gauge(runtimes().map(|r| r.global_queue_depth()).sum()));

    let limits = &metrics.limits;
    limits.set(Limit::Connections, shared.places.used());
    limits.set(Limit::PodConnections, pod_most);
    limits.set(Limit::Tunnels, tunnels_most);
    limits.set(Limit::DnsQueries, queries_most);
    limits.set(Limit::DnsNames, (shared.names.len(), MAX_NAMES));
    limits.set(Limit::Series, metrics.series());
    limits.reached_times(Limit::DnsNames, shared.names.take_sweeps());
}
