//! The controller's own metrics, and the same under the names that dashboards of ambient know (D78).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_runtime::metrics::Metrics;
use culvert_xds::server::ServerObserver;
use culvert_xds::stream::Answer;
use parking_lot::Mutex;
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
    convergence: Histogram,
    services: Gauge,
    short_pushes: Family<Type, Counter>,
    rejects: Counter,
    published: Arc<Mutex<Published>>,
}

/// When recent generations were published, the oldest first.
type Published = VecDeque<(u64, Instant)>;

/// Generations whose age is remembered: with ten a second, those of a minute and a half.
const REMEMBERED: usize = 1_000;

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
            // 10 ms to 30 s: Istio's own bounds with two below them.
            convergence: Histogram::new([0.01, 0.03, 0.1, 0.5, 1.0, 3.0, 5.0, 10.0, 20.0, 30.0]),
            services: Gauge::default(),
            short_pushes: Family::default(),
            rejects: Counter::default(),
            published: Arc::default(),
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
            let known = registry.sub_registry_with_prefix("pilot");
            known.register("xds", "Proxies that are connected", it.streams.clone());
            known.register("xds_pushes", "Responses sent, by type: wds, wads", it.short_pushes.clone());
            known.register("total_xds_rejects", "Responses that a proxy refused", it.rejects.clone());
            known.register("services", "Services that are served", it.services.clone());
            known.register(
                "proxy_convergence_time",
                "Seconds from the oldest change that a proxy lacked to its answer that it has all",
                it.convergence.clone(),
            );
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
        self.services.set(count(snapshot.services));
        self.translation.observe(seconds);
    }

    /// Takes note that a generation is there to be sent.
    pub fn publishes(&self, generation: u64) {
        let mut published = self.published.lock();
        if published.len() == REMEMBERED {
            published.pop_front();
        }
        published.push_back((generation, Instant::now()));
    }
}

/// The age of the oldest generation after `before`, up to `generation`.
fn waited(published: &Published, before: u64, generation: u64, now: Instant) -> Option<Duration> {
    let at = published.partition_point(|(number, _)| *number <= before);
    let (_, since) = published.get(at).filter(|(number, _)| *number <= generation)?;
    Some(now.saturating_duration_since(*since))
}

impl ServerObserver for ControllerMetrics {
    fn stream(&self, opened: bool) {
        self.streams.inc_by(if opened { 1 } else { -1 });
    }

    fn pushed(&self, type_url: &str, _resources: usize, bytes: usize) {
        self.pushes.get_or_create(&label(type_url)).inc();
        self.short_pushes.get_or_create(&short(type_url)).inc();
        self.pushed_bytes.get_or_create(&label(type_url)).inc_by(bytes as u64);
    }

    fn answered(&self, type_url: &str, answer: &Answer) {
        if let Answer::Nacked { .. } = answer {
            self.refused.get_or_create(&label(type_url)).inc();
            self.rejects.inc();
        }
    }

    fn converged(&self, before: Option<u64>, generation: u64) {
        // A new stream waits for no change.
        let Some(before) = before else { return };
        if let Some(waited) = waited(&self.published.lock(), before, generation, Instant::now()) {
            self.convergence.observe(waited.as_secs_f64());
        }
    }
}

/// As Istio calls the type in its metrics.
fn short(type_url: &str) -> Type {
    let name = match type_url.rsplit('.').next() {
        Some("Address" | "Workload") => "wds",
        Some("Authorization") => "wads",
        _ => "other",
    };
    Type { r#type: name.to_owned() }
}

/// The message's name. A client may ask for any type, so that one we do not have gets one label, not its own.
fn label(type_url: &str) -> Type {
    let name = type_url.rsplit('.').next().unwrap_or_default();
    let known = matches!(name, "Address" | "Authorization" | "Workload");
    Type { r#type: if known { name } else { "other" }.to_owned() }
}

#[cfg(test)]
mod tests {
    use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};

    use super::*;

    /// D78.
    #[test]
    fn what_passes_is_counted_under_the_names_that_dashboards_know() {
        let metrics = Metrics::for_process("controller", "1");
        let it = ControllerMetrics::register(&metrics);
        it.stream(true);
        it.pushed(ADDRESS_TYPE_URL, 1, 10);
        it.pushed(ADDRESS_TYPE_URL, 1, 10);
        it.pushed(AUTHORIZATION_TYPE_URL, 1, 10);
        it.answered(AUTHORIZATION_TYPE_URL, &Answer::Nacked { message: String::new() });
        it.publishes(8);
        it.converged(None, 8);
        it.publishes(9);
        it.converged(Some(8), 9);
        let text = metrics.encode();
        for line in [
            "pilot_xds 1",
            "pilot_xds_pushes_total{type=\"wds\"} 2",
            "pilot_xds_pushes_total{type=\"wads\"} 1",
            "pilot_total_xds_rejects_total 1",
            "pilot_proxy_convergence_time_count 1",
        ] {
            assert!(text.lines().any(|it| it == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_proxy_waits_from_the_oldest_change_that_it_lacks() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let published = Published::from([(3, at(1)), (4, at(2)), (5, at(4))]);
        for (before, generation, expected) in
            [(4, 5, Some(6)), (3, 5, Some(8)), (1, 5, Some(9)), (5, 5, None), (5, 6, None), (2, 2, None)]
        {
            let expected = expected.map(Duration::from_secs);
            assert_eq!(waited(&published, before, generation, at(10)), expected, "{before} {generation}");
        }
    }
}
