//! The counters of the process: Istio's request and TCP metrics by their names and labels (W70), and the control plane's.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use culvert_model::outcome::Reason;
use culvert_xds::client::{ClientObserver, Disconnect};
use parking_lot::Mutex;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::labels::{Labels, RequestLabels};

/// Label sets kept at most: beyond, what happens is counted without its parties. At about 600 bytes a set and 500 a histogram of it,
/// 25 MB at worst.
const MAX_SERIES: usize = 10_000;

/// Istio's buckets of milliseconds.
const MILLISECONDS: [f64; 20] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 3e4, 6e4, 3e5, 6e5, 18e5,
    36e5, 72e5,
];
/// Istio's buckets of bytes.
const BYTES: [f64; 8] = [1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9];

/// Counts.
#[derive(Debug)]
pub struct Metrics {
    requests: Family<RequestLabels, Counter>,
    durations: Family<RequestLabels, Histogram, fn() -> Histogram>,
    request_bytes: Family<RequestLabels, Histogram, fn() -> Histogram>,
    response_bytes: Family<RequestLabels, Histogram, fn() -> Histogram>,
    opened: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    sent: Family<Labels, Counter>,
    received: Family<Labels, Counter>,
    refused: Family<ReasonLabel, Counter>,
    disconnected: Family<WhyLabel, Counter>,
    messages: Family<TypeLabel, Counter>,
    /// Requests that are being served.
    pub active_requests: Gauge,
    request_series: Mutex<HashSet<RequestLabels>>,
    stream_series: Mutex<HashSet<Labels>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhyLabel {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabel {
    url: String,
}

/// What a request took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sizes {
    /// From its head to the last byte of the response.
    pub duration: Duration,
    /// Bytes of the request's body.
    pub request: u64,
    /// Bytes of the response's body.
    pub response: u64,
}

impl Metrics {
    /// Registers every family.
    pub fn new(registry: &mut Registry) -> Arc<Self> {
        let milliseconds: fn() -> Histogram = || Histogram::new(MILLISECONDS);
        let bytes: fn() -> Histogram = || Histogram::new(BYTES);
        let metrics = Self {
            requests: Family::default(),
            durations: Family::new_with_constructor(milliseconds),
            request_bytes: Family::new_with_constructor(bytes),
            response_bytes: Family::new_with_constructor(bytes),
            opened: Family::default(),
            closed: Family::default(),
            sent: Family::default(),
            received: Family::default(),
            refused: Family::default(),
            disconnected: Family::default(),
            messages: Family::default(),
            active_requests: Gauge::default(),
            request_series: Mutex::default(),
            stream_series: Mutex::default(),
        };
        let m = &metrics;
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register("requests", "Requests answered", m.requests.clone());
        istio.register(
            "request_duration_milliseconds",
            "Time to the last byte of the response",
            m.durations.clone(),
        );
        istio.register("request_bytes", "Size of requests' bodies", m.request_bytes.clone());
        istio.register("response_bytes", "Size of responses' bodies", m.response_bytes.clone());
        istio.register("tcp_connections_opened", "Streams opened that are no requests", m.opened.clone());
        istio.register("tcp_connections_closed", "Streams closed that are no requests", m.closed.clone());
        istio.register("tcp_sent_bytes", "Bytes from the source to the destination", m.sent.clone());
        istio.register("tcp_received_bytes", "Bytes from the destination to the source", m.received.clone());
        let own = registry.sub_registry_with_prefix("culvert_waypoint");
        own.register(
            "tunnels_refused",
            "Connections and tunnels refused before anything was sent",
            m.refused.clone(),
        );
        own.register("active_requests", "Requests being served", m.active_requests.clone());
        let xds = registry.sub_registry_with_prefix("istio_xds");
        xds.register(
            "connection_terminations",
            "Connections to the control plane that ended",
            m.disconnected.clone(),
        );
        xds.register("message", "Messages of the control plane", m.messages.clone());
        Arc::new(metrics)
    }

    /// A request is over.
    pub fn request(&self, labels: RequestLabels, sizes: Sizes) {
        let labels = bounded(&self.request_series, labels, RequestLabels::without_parties);
        self.requests.get_or_create(&labels).inc();
        self.durations.get_or_create(&labels).observe(sizes.duration.as_secs_f64() * 1e3);
        #[allow(clippy::cast_precision_loss, reason = "buckets are powers of ten")]
        let bytes = |n: u64| n as f64;
        self.request_bytes.get_or_create(&labels).observe(bytes(sizes.request));
        self.response_bytes.get_or_create(&labels).observe(bytes(sizes.response));
    }

    /// A stream is open.
    pub fn opened(&self, labels: Labels) {
        let labels = bounded(&self.stream_series, labels, Labels::without_parties);
        self.opened.get_or_create(&labels).inc();
    }

    /// A stream is over.
    pub fn closed(&self, labels: Labels, sent: u64, received: u64) {
        let labels = bounded(&self.stream_series, labels, Labels::without_parties);
        self.closed.get_or_create(&labels).inc();
        self.sent.get_or_create(&labels).inc_by(sent);
        self.received.get_or_create(&labels).inc_by(received);
    }

    /// A connection or tunnel was refused.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }
}

impl ClientObserver for Metrics {
    fn message(&self, type_url: &str, _bytes: usize) {
        self.messages.get_or_create(&TypeLabel { url: type_url.to_owned() }).inc();
    }

    fn disconnected(&self, reason: &Disconnect) {
        self.disconnected.get_or_create(&WhyLabel { reason: reason.label().to_owned() }).inc();
    }
}

/// The labels themselves while there is room for another series, else what is said `instead`.
fn bounded<L: Clone + Eq + Hash>(series: &Mutex<HashSet<L>>, labels: L, instead: impl FnOnce(&L) -> L) -> L {
    let mut series = series.lock();
    if series.contains(&labels) {
        return labels;
    }
    if series.len() >= MAX_SERIES {
        return instead(&labels);
    }
    series.insert(labels.clone());
    labels
}
