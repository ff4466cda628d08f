//! Istio's TCP metrics, names and labels (Z103-Z106), so that existing dashboards work. Unlike Z107, what is refused
//! early counts too.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use culvert_model::Str;
use culvert_model::workload::Workload;
use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use super::connections::Live;
use super::discovery::Discovery;
use super::flow::{Direction, Flow, Party, Security};
use super::gauges::{AcceptedTunnel, Gauges};
use super::limits::{Limit, Limits};

/// Label sets kept at most: beyond, a connection is counted under `unknown` workloads. At about 600 bytes a set in five
/// families, of which that of failures has sets of its own, that is 30 MB at worst.
const MAX_SERIES: usize = 10_000;

/// The counters of the process.
#[derive(Debug)]
pub struct Metrics {
    /// How near the bounds are.
    pub limits: Limits,
    /// What is open now.
    pub gauges: Gauges,
    /// What passes between the proxy and the control plane.
    pub discovery: Discovery,
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    failed: Family<FailedLabels, Counter>,
    sent: Family<Labels, Counter<u64, AtomicU64>>,
    received: Family<Labels, Counter<u64, AtomicU64>>,
    /// Pods served now.
    pub active_pods: Gauge,
    /// Pods whose proxy could not start yet.
    pub pending_pods: Gauge,
    /// Pods begun to be served, ever.
    pub pods_started: Counter,
    /// Pods no longer served, ever.
    pub pods_stopped: Counter,
    /// DNS queries that pods made.
    pub dns_requests: Counter,
    /// DNS queries passed on.
    pub dns_upstream_requests: Counter,
    /// DNS queries passed on that got no answer.
    pub dns_upstream_failures: Counter,
    /// How long they took, all servers together, seconds.
    pub dns_upstream_duration: Histogram,
    /// Names of workloads looked up for connections (Z42, Z104).
    pub on_demand_dns: Counter,
    /// Endpoints tried after another one failed (Z45).
    pub connect_retries: Counter,
    /// Times that an endpoint began to be avoided because connecting to it failed.
    pub endpoint_cooldowns: Counter,
    series: Mutex<HashSet<Labels>>,
    failed_series: Mutex<HashSet<FailedLabels>>,
}

/// Istio's standard TCP labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Labels {
    reporter: &'static str,
    source_workload: Label,
    source_canonical_service: Label,
    source_canonical_revision: Label,
    source_workload_namespace: Label,
    source_principal: Label,
    source_app: Label,
    source_version: Label,
    source_cluster: Label,
    source_region: Label,
    source_zone: Label,
    destination_service: Label,
    destination_service_name: Label,
    destination_service_namespace: Label,
    destination_workload: Label,
    destination_canonical_service: Label,
    destination_canonical_revision: Label,
    destination_workload_namespace: Label,
    destination_principal: Label,
    destination_app: Label,
    destination_version: Label,
    destination_cluster: Label,
    destination_region: Label,
    destination_zone: Label,
    request_protocol: &'static str,
    response_flags: &'static str,
    connection_security_policy: &'static str,
}

/// [`Labels`] and why.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailedLabels {
    #[prometheus(flatten)]
    labels: Labels,
    reason: &'static str,
}

/// A label's value; `unknown` where there is none.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Label(Option<Str>);

impl Metrics {
    /// Registers every family.
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let metrics = Self {
            limits: Limits::new(registry),
            gauges: Gauges::new(registry),
            discovery: Discovery::new(registry),
            opened: Family::default(),
            closed: Family::default(),
            failed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            active_pods: Gauge::default(),
            pending_pods: Gauge::default(),
            pods_started: Counter::default(),
            pods_stopped: Counter::default(),
            dns_requests: Counter::default(),
            dns_upstream_requests: Counter::default(),
            dns_upstream_failures: Counter::default(),
            // 0.5 ms to 8 s: a cluster's DNS answers within the first, and after 4.5 s nobody is asked any more.
            dns_upstream_duration: Histogram::new(exponential_buckets(0.0005, 2.0, 15)),
            on_demand_dns: Counter::default(),
            connect_retries: Counter::default(),
            endpoint_cooldowns: Counter::default(),
            series: Mutex::default(),
            failed_series: Mutex::default(),
        };
        let m = &metrics;
        registry.register_collector(Box::new(super::windows::Windows(culvert_hbone::Budget::of_process())));
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register("tcp_connections_opened", "TCP connections opened", m.opened.clone());
        istio.register("tcp_connections_closed", "TCP connections closed", m.closed.clone());
        istio.register(
            "tcp_connections_failed",
            "TCP connections that never opened, by reason",
            m.failed.clone(),
        );
        istio.register("tcp_sent_bytes", "Bytes from the source to the destination", m.sent.clone());
        istio.register("tcp_received_bytes", "Bytes from the destination to the source", m.received.clone());
        istio.register("dns_requests", "DNS queries from pods", m.dns_requests.clone());
        istio.register("dns_upstream_requests", "DNS queries passed on", m.dns_upstream_requests.clone());
        istio.register(
            "dns_upstream_failures",
            "DNS queries passed on without answer",
            m.dns_upstream_failures.clone(),
        );
        istio.register_with_unit(
            "dns_upstream_request_duration",
            "Time until a DNS query passed on was answered or given up",
            Unit::Seconds,
            m.dns_upstream_duration.clone(),
        );
        istio.register("on_demand_dns", "Names looked up for connections", m.on_demand_dns.clone());
        istio.register(
            "connect_retries",
            "Endpoints tried because another one failed",
            m.connect_retries.clone(),
        );
        istio.register(
            "endpoint_cooldowns",
            "Times that an endpoint began to be avoided because connecting to it failed",
            m.endpoint_cooldowns.clone(),
        );
        let pods = registry.sub_registry_with_prefix("workload_manager");
        pods.register("active_proxy_count", "Pods served now", m.active_pods.clone());
        pods.register("pending_proxy_count", "Pods that could not be served yet", m.pending_pods.clone());
        pods.register("proxies_started", "Pods begun to be served", m.pods_started.clone());
        pods.register("proxies_stopped", "Pods no longer served", m.pods_stopped.clone());
        Arc::new(metrics)
    }

    pub(super) fn opened(&self, flow: &Flow) {
        self.opened.get_or_create(&self.bounded(Labels::of(flow))).inc();
    }

    pub(super) fn closed(&self, flow: &Flow) {
        self.closed.get_or_create(&self.bounded(Labels::of(flow))).inc();
    }

    pub(super) fn failed(&self, flow: &Flow) {
        let reason = flow.failure().map_or("-", |f| f.reason.as_str());
        let labels = FailedLabels { labels: Labels::of(flow), reason };
        // By themselves: each label set may fail for each reason, and who never succeeds needs no other series.
        let mut series = self.failed_series.lock();
        let labels = bounded(&mut series, labels, |labels| {
            self.limits.reached(Limit::Series);
            FailedLabels { labels: labels.labels.without_parties(), reason }
        });
        drop(series);
        self.failed.get_or_create(&labels).inc();
    }

    /// Label sets kept, of the family that has most, and how many may be.
    pub fn series(&self) -> (usize, usize) {
        (self.series.lock().len().max(self.failed_series.lock().len()), MAX_SERIES)
    }

    /// See [`Gauges::tunnel_accepted`].
    pub fn tunnel_accepted(&self) -> AcceptedTunnel {
        self.gauges.tunnel_accepted()
    }

    /// Adds what a connection carried since it was last asked.
    pub fn traffic(&self, live: &Live) {
        let (sent, received) = (live.sent(), live.received());
        let mut told = live.told.lock();
        let labels = self.bounded(live.labels.clone());
        self.sent.get_or_create(&labels).inc_by(sent - told.0);
        self.received.get_or_create(&labels).inc_by(received - told.1);
        *told = (sent, received);
    }

    /// The label set itself while there is room for another series, else the same connection without its parties.
    fn bounded(&self, labels: Labels) -> Labels {
        bounded(&mut self.series.lock(), labels, |labels| {
            self.limits.reached(Limit::Series);
            labels.without_parties()
        })
    }
}

/// The labels themselves while there is room for another series, else what is said `instead`.
fn bounded<L: Clone + Eq + Hash>(series: &mut HashSet<L>, labels: L, instead: impl FnOnce(L) -> L) -> L {
    if series.contains(&labels) {
        return labels;
    }
    if series.len() >= MAX_SERIES {
        return instead(labels);
    }
    series.insert(labels.clone());
    labels
}

impl Labels {
    /// The labels of a connection as far as it is known.
    pub fn of(flow: &Flow) -> Self {
        let reporter = match flow.direction {
            Direction::Outbound => "source",
            Direction::Inbound => "destination",
        };
        let flags = flow.failure().map_or("-", |f| f.reason.response_flag());
        let security = match flow.security {
            Security::MutualTls => "mutual_tls",
            // Nothing was encrypted, and dashboards that ask for mutual TLS should not be told so.
            Security::SameNode => "same_node",
            Security::Plaintext => "unknown",
        };
        let mut labels = Self::anonymous(reporter, flags, security);
        let service = flow.service.as_deref();
        labels.destination_service = Label(service.map(|s| s.key.hostname.clone()));
        labels.destination_service_name = Label(service.map(|s| s.name.clone()));
        labels.destination_service_namespace = Label(service.map(|s| s.key.namespace.clone()));
        labels.source_principal = principal(&flow.source);
        labels.destination_principal = principal(&flow.destination);
        if let Some(w) = &flow.source.workload {
            labels.set_source(w);
        }
        if let Some(w) = &flow.destination.workload {
            labels.set_destination(w);
        }
        labels
    }

    fn set_source(&mut self, w: &Workload) {
        self.source_workload = Label::of(&w.workload_name);
        self.source_canonical_service = Label::of(&w.canonical_name);
        self.source_canonical_revision = Label::of(&w.canonical_revision);
        self.source_workload_namespace = Label::of(&w.namespace);
        self.source_app = Label::of(&w.canonical_name);
        self.source_version = Label::of(&w.canonical_revision);
        self.source_cluster = Label::of(&w.cluster_id);
        self.source_region = Label::of(&w.locality.region.0);
        self.source_zone = Label::of(&w.locality.zone.0);
    }

    fn set_destination(&mut self, w: &Workload) {
        self.destination_workload = Label::of(&w.workload_name);
        self.destination_canonical_service = Label::of(&w.canonical_name);
        self.destination_canonical_revision = Label::of(&w.canonical_revision);
        self.destination_workload_namespace = Label::of(&w.namespace);
        self.destination_app = Label::of(&w.canonical_name);
        self.destination_version = Label::of(&w.canonical_revision);
        self.destination_cluster = Label::of(&w.cluster_id);
        self.destination_region = Label::of(&w.locality.region.0);
        self.destination_zone = Label::of(&w.locality.zone.0);
    }

    fn without_parties(&self) -> Self {
        Self::anonymous(self.reporter, self.response_flags, self.connection_security_policy)
    }

    fn anonymous(reporter: &'static str, flags: &'static str, security: &'static str) -> Self {
        let none = || Label(None);
        Self {
            reporter,
            source_workload: none(),
            source_canonical_service: none(),
            source_canonical_revision: none(),
            source_workload_namespace: none(),
            source_principal: none(),
            source_app: none(),
            source_version: none(),
            source_cluster: none(),
            source_region: none(),
            source_zone: none(),
            destination_service: none(),
            destination_service_name: none(),
            destination_service_namespace: none(),
            destination_workload: none(),
            destination_canonical_service: none(),
            destination_canonical_revision: none(),
            destination_workload_namespace: none(),
            destination_principal: none(),
            destination_app: none(),
            destination_version: none(),
            destination_cluster: none(),
            destination_region: none(),
            destination_zone: none(),
            request_protocol: "tcp",
            response_flags: flags,
            connection_security_policy: security,
        }
    }
}

impl Label {
    fn of(text: &Str) -> Self {
        Self((!text.is_empty()).then(|| text.clone()))
    }
}

fn principal(party: &Party) -> Label {
    Label(party.identity.as_ref().map(|i| Str::from(i.to_string())))
}

impl EncodeLabelValue for Label {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.0.as_deref().unwrap_or("unknown").encode(encoder)
    }
}
