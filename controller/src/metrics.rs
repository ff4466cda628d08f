//! The controller's own metrics.

use culvert_runtime::metrics::Metrics;
use culvert_xds::server::ServerObserver;
use culvert_xds::stream::Answer;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;

use crate::index::Snapshot;

/// Counters and gauges; clones share them.
#[derive(Clone, Debug)]
pub struct ControllerMetrics {
    generation: Gauge,
    resources: Family<Type, Gauge>,
    errors: Gauge,
    translation: Histogram,
    streams: Gauge,
    pushes: Family<Type, Counter>,
    pushed_bytes: Family<Type, Counter>,
    refused: Family<Type, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Type {
    r#type: String,
}

impl ControllerMetrics {
    /// Makes and registers them.
    pub fn register(metrics: &Metrics) -> Self {
        let it = Self {
            generation: Gauge::default(),
            resources: Family::default(),
            errors: Gauge::default(),
            // 1 ms to 1 s: a directory of a hundred objects to one of ten thousand.
            translation: Histogram::new([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]),
            streams: Gauge::default(),
            pushes: Family::default(),
            pushed_bytes: Family::default(),
            refused: Family::default(),
        };
        metrics.register(|registry| {
            let mine = registry.sub_registry_with_prefix("culvert_controller");
            mine.register("generation", "Generation that is served", it.generation.clone());
            mine.register("resources", "Resources that are served, by type", it.resources.clone());
            mine.register("file_errors", "Errors in the files that are watched", it.errors.clone());
            mine.register(
                "translation_seconds",
                "Time from a change read to resources",
                it.translation.clone(),
            );
            mine.register("xds_streams", "Proxies that are connected", it.streams.clone());
            mine.register("xds_pushes", "Responses sent, by type", it.pushes.clone());
            mine.register("xds_pushed_bytes", "Bytes sent, by type", it.pushed_bytes.clone());
            mine.register("xds_refused", "Responses that a proxy refused, by type", it.refused.clone());
        });
        it
    }

    /// Takes note of a new snapshot, made in that many seconds.
    pub fn snapshot(&self, snapshot: &Snapshot, seconds: f64) {
        let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.generation.set(i64::try_from(snapshot.generation).unwrap_or(i64::MAX));
        self.resources.get_or_create(&label("Address")).set(count(snapshot.addresses.len()));
        self.resources.get_or_create(&label("Authorization")).set(count(snapshot.policies.len()));
        self.errors.set(count(snapshot.world.errors.len()));
        self.translation.observe(seconds);
    }
}

impl ServerObserver for ControllerMetrics {
    fn stream(&self, opened: bool) {
        self.streams.inc_by(if opened { 1 } else { -1 });
    }

    fn pushed(&self, type_url: &str, _resources: usize, bytes: usize) {
        self.pushes.get_or_create(&label(type_url)).inc();
        self.pushed_bytes.get_or_create(&label(type_url)).inc_by(bytes as u64);
    }

    fn answered(&self, type_url: &str, answer: &Answer) {
        if let Answer::Nacked { .. } = answer {
            self.refused.get_or_create(&label(type_url)).inc();
        }
    }
}

/// The message's name. A client may ask for any type, so that one we do not have gets one label, not its own.
fn label(type_url: &str) -> Type {
    let name = type_url.rsplit('.').next().unwrap_or_default();
    let known = matches!(name, "Address" | "Authorization" | "Workload");
    Type { r#type: if known { name } else { "other" }.to_owned() }
}
