//! The bounds of the proxy as metrics: how much of each is used, and how often each was reached (docs/operations/limits.md).

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// At most one log line in this time for each bound: who floods the proxy must not flood its log.
const BETWEEN_LINES: Duration = Duration::from_secs(1);

/// A bound that can be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Limit {
    /// Connections of all pods.
    Connections,
    /// Connections of one pod.
    PodConnections,
    /// What one pod may have when the proxy is nearly full.
    PodShare,
    /// Streams on one tunnel connection.
    Streams,
    /// Tunnel connections of one pod on one worker.
    Tunnels,
    /// Size of a request's headers.
    Headers,
    /// Time for a handshake.
    HandshakeTime,
    /// Time without a byte.
    IdleTime,
    /// Time without a byte when one side has ended.
    HalfClosedTime,
    /// DNS queries of one pod under way.
    DnsQueries,
    /// Names looked up for connections that are kept.
    DnsNames,
    /// Open files.
    Descriptors,
    /// Label sets of metrics.
    Series,
}

/// Counters and gauges, one series a bound.
#[derive(Debug)]
pub struct Limits {
    reached: Family<Label, Counter>,
    used: Family<Label, Gauge>,
    bound: Family<Label, Gauge>,
    /// When a line was written, and how many have been held back since.
    lines: Mutex<[(Option<Instant>, u64); Limit::ALL.len()]>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Label {
    limit: Limit,
}

impl Limit {
    /// Every bound.
    pub const ALL: [Self; 13] = [
        Self::Connections,
        Self::PodConnections,
        Self::PodShare,
        Self::Streams,
        Self::Tunnels,
        Self::Headers,
        Self::HandshakeTime,
        Self::IdleTime,
        Self::HalfClosedTime,
        Self::DnsQueries,
        Self::DnsNames,
        Self::Descriptors,
        Self::Series,
    ];

    /// Its name in metrics, logs and docs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::PodConnections => "pod_connections",
            Self::PodShare => "pod_share",
            Self::Streams => "streams",
            Self::Tunnels => "tunnels",
            Self::Headers => "headers",
            Self::HandshakeTime => "handshake_time",
            Self::IdleTime => "idle_time",
            Self::HalfClosedTime => "half_closed_time",
            Self::DnsQueries => "dns_queries",
            Self::DnsNames => "dns_names",
            Self::Descriptors => "descriptors",
            Self::Series => "series",
        }
    }
}

impl Limits {
    /// Registers the families, with every bound at 0 so that a first time shows as a change.
    pub fn new(registry: &mut Registry) -> Self {
        let limits = Self {
            reached: Family::default(),
            used: Family::default(),
            bound: Family::default(),
            lines: Mutex::default(),
        };
        for limit in Limit::ALL {
            drop(limits.reached.get_or_create(&Label { limit }));
        }
        let culvert = registry.sub_registry_with_prefix("culvert");
        culvert.register("limit_reached", "How often a bound was reached", limits.reached.clone());
        culvert.register(
            "limit_used",
            "Current use of a bound; of one that is for each pod, the pod that uses most",
            limits.used.clone(),
        );
        culvert.register("limit_bound", "The bound", limits.bound.clone());
        limits
    }

    /// A bound was reached: somebody was refused, cut or delayed.
    pub fn reached(&self, limit: Limit) {
        self.reached.get_or_create(&Label { limit }).inc();
    }

    /// A bound was reached so many times.
    pub fn reached_times(&self, limit: Limit, times: u64) {
        self.reached.get_or_create(&Label { limit }).inc_by(times);
    }

    /// How often it was reached.
    pub fn times(&self, limit: Limit) -> u64 {
        self.reached.get_or_create(&Label { limit }).get()
    }

    /// What is used of a bound now.
    pub fn set(&self, limit: Limit, (used, bound): (usize, usize)) {
        let gauge = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.used.get_or_create(&Label { limit }).set(gauge(used));
        self.bound.get_or_create(&Label { limit }).set(gauge(bound));
    }

    /// Whether it is time for another log line about the bound: then with how many were held back.
    pub fn line_due(&self, limit: Limit) -> Option<u64> {
        let (last, held_back) = &mut self.lines.lock()[limit as usize];
        let now = Instant::now();
        if last.is_some_and(|last| now.duration_since(last) < BETWEEN_LINES) {
            *held_back += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(held_back))
    }
}

impl EncodeLabelValue for Limit {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        self.as_str().encode(encoder)
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::*;

    #[test]
    fn every_bound_is_there_from_the_start() {
        let mut registry = Registry::default();
        let limits = Limits::new(&mut registry);
        limits.reached(Limit::Streams);
        limits.set(Limit::Connections, (3, 10));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for limit in Limit::ALL {
            let times = if limit == Limit::Streams { 1 } else { 0 };
            let line = format!("culvert_limit_reached_total{{limit=\"{}\"}} {times}\n", limit.as_str());
            assert!(text.contains(&line), "{line} in {text}");
            assert_eq!(Limit::ALL[limit as usize], limit, "the index of its line");
        }
        assert!(text.contains("culvert_limit_used{limit=\"connections\"} 3\n"), "{text}");
        assert!(text.contains("culvert_limit_bound{limit=\"connections\"} 10\n"), "{text}");
    }

    /// One line a second and bound, and it says how many were not written.
    #[test]
    fn lines_are_few() {
        let limits = Limits::new(&mut Registry::default());
        assert_eq!(limits.line_due(Limit::Streams), Some(0));
        let written = (0..1000).filter(|_| limits.line_due(Limit::Streams).is_some()).count();
        assert!(written < 100, "{written}");
        assert_eq!(limits.line_due(Limit::Tunnels), Some(0), "another bound has its own");
        limits.lines.lock()[Limit::Streams as usize].0 = None;
        assert!(limits.line_due(Limit::Streams).is_some_and(|held_back| held_back >= 900));
    }
}
