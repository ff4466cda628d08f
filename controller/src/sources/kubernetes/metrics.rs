//! What the watchers do, in numbers.

use std::time::SystemTime;

use culvert_runtime::metrics::Metrics;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;

use super::kinds::Watched;

/// By kind; clones share them. There are as many kinds as are watched.
#[derive(Clone, Debug, Default)]
pub(super) struct WatchMetrics {
    objects: Family<Kind, Gauge>,
    lists: Family<Kind, Counter>,
    errors: Family<Kind, Counter>,
    last_event: Family<Kind, Gauge>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    /// As in `kubectl get`: two groups may have one name, and differ by what follows it.
    kind: String,
}

fn label(of: &Watched) -> Kind {
    let kind = if of.group.is_empty() { of.plural.clone() } else { format!("{}.{}", of.plural, of.group) };
    Kind { kind }
}

impl WatchMetrics {
    pub fn register(metrics: &Metrics) -> Self {
        let it = Self::default();
        metrics.register(|registry| {
            let mine = registry.sub_registry_with_prefix("culvert_controller_watch");
            mine.register("objects", "Objects that are known, by kind", it.objects.clone());
            mine.register("lists", "Lists begun, by kind: one is the first", it.lists.clone());
            mine.register("errors", "Lists and watches that failed, by kind", it.errors.clone());
            let help = "When the API server last said something of a kind";
            mine.register("last_event_timestamp_seconds", help, it.last_event.clone());
        });
        it
    }

    pub fn event(&self, of: &Watched, list: bool) {
        let label = label(of);
        if list {
            self.lists.get_or_create(&label).inc();
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.last_event.get_or_create(&label).set(i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    }

    pub fn error(&self, of: &Watched) {
        self.errors.get_or_create(&label(of)).inc();
    }

    /// `None` if the kind is not watched any more.
    pub fn objects(&self, of: &Watched, count: Option<usize>) {
        let label = label(of);
        match count {
            Some(count) => {
                self.objects.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
            None => {
                self.objects.remove(&label);
                self.lists.remove(&label);
                self.errors.remove(&label);
                self.last_event.remove(&label);
            }
        }
    }
}
