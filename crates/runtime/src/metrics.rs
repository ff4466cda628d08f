//! Metrics: one registry a process, encoded as OpenMetrics text, with what the kernel knows about the process.

use std::fmt::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

pub use prometheus_client;

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The registry of a process; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    registry: Arc<Mutex<Registry>>,
}

impl Metrics {
    /// An empty registry.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A registry with the metrics that every program has: `process_*`, and `culvert_build_info{component,version} 1`.
    #[must_use]
    pub fn for_process(component: &'static str, version: &'static str) -> Self {
        let metrics = Self::new();
        metrics.register(|registry| {
            let build: Gauge = Gauge::default();
            build.set(1);
            let labels = [("component".into(), component.into()), ("version".into(), version.into())];
            registry.sub_registry_with_labels(labels.into_iter()).register(
                "culvert_build_info",
                "The running program",
                build,
            );
            registry.register_collector(Box::new(ProcessCollector));
        });
        metrics
    }

    /// Registers metrics. The lock is the encoder's: do only that here.
    pub fn register<R>(&self, register: impl FnOnce(&mut Registry) -> R) -> R {
        register(&mut self.registry.lock())
    }

    /// Everything, as text of [`CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        // Writing to a String cannot fail; a metric that fails to encode is cut short, which a scraper sees by the missing EOF.
        if let Err(error) = prometheus_client::encoding::text::encode(&mut text, &self.registry.lock()) {
            tracing::warn!(%error, "metrics are incomplete");
        }
        text
    }
}

/// The kernel's account of this process, read when it is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessStats {
    /// Open file descriptors.
    pub open_fds: u64,
    /// The soft limit on them; `None` if unlimited.
    pub max_fds: Option<u64>,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// Address space in bytes.
    pub virtual_bytes: u64,
    /// User and system time used, in seconds.
    pub cpu_seconds: f64,
    /// When it started, in seconds since 1970.
    pub start_seconds: f64,
    /// Threads.
    pub threads: u64,
}

/// Clock ticks in /proc are 1/100 s on every architecture culvert builds for (the kernel's USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

impl ProcessStats {
    /// Reads them from /proc; `None` if it is not mounted or not as expected.
    #[must_use]
    pub fn read() -> Option<Self> {
        let read = |path| std::fs::read_to_string(path).ok();
        // One descriptor is the directory being listed.
        let open_fds = std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as u64;
        Self::parse(
            open_fds,
            &read("/proc/self/stat")?,
            &read("/proc/self/status")?,
            &read("/proc/self/limits")?,
            &read("/proc/stat")?,
        )
    }

    fn parse(open_fds: u64, stat: &str, status: &str, limits: &str, system: &str) -> Option<Self> {
        // The command, in parentheses, may hold spaces and parentheses: fields count from the last one. The first is field 3.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let kilobytes = |key| first_number(status, key).map(|kilobytes| kilobytes * 1024);
        let boot = first_number(system, "btime")?;
        #[allow(clippy::cast_precision_loss, reason = "seconds since 1970 fit")]
        let start_seconds = boot as f64 + field(22)? / TICKS_PER_SECOND;
        Some(Self {
            open_fds,
            max_fds: first_number(limits, "Max open files"),
            resident_bytes: kilobytes("VmRSS:")?,
            virtual_bytes: kilobytes("VmSize:")?,
            cpu_seconds: (field(14)? + field(15)?) / TICKS_PER_SECOND,
            start_seconds,
            threads: first_number(status, "Threads:")?,
        })
    }
}

fn first_number(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(key))?.split_whitespace().next()?.parse().ok()
}

#[derive(Debug)]
struct ProcessCollector;

impl Collector for ProcessCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(stats) = ProcessStats::read() else { return Ok(()) };
        let mut put = |name: &str, help: &str, metric: &dyn EncodeMetric| {
            metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
        };
        let gauge = |value: u64| ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
        put("process_open_fds", "Open file descriptors", &gauge(stats.open_fds))?;
        if let Some(limit) = stats.max_fds {
            put("process_max_fds", "Limit on open file descriptors", &gauge(limit))?;
        }
        put("process_resident_memory_bytes", "Resident memory", &gauge(stats.resident_bytes))?;
        put("process_virtual_memory_bytes", "Address space", &gauge(stats.virtual_bytes))?;
        put("process_threads", "Threads", &gauge(stats.threads))?;
        put("process_cpu_seconds", "User and system time used", &ConstCounter::new(stats.cpu_seconds))?;
        put("process_start_time_seconds", "Start, seconds since 1970", &ConstGauge::new(stats.start_seconds))
    }
}

/// A label value that is a `Display`, for label sets written by hand.
///
/// # Errors
/// The encoder's own.
pub fn write_label(
    encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>,
    key: &str,
    value: impl fmt::Display,
) -> fmt::Result {
    let mut label = encoder.encode_label();
    let mut encoded = label.encode_label_key()?;
    encoded.write_str(key)?;
    let mut encoded = encoded.encode_label_value()?;
    write!(encoded, "{value}")?;
    encoded.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodes_process_and_build() {
        let metrics = Metrics::for_process("proxy", "1.2.3");
        let text = metrics.encode();
        assert!(text.contains("culvert_build_info{component=\"proxy\",version=\"1.2.3\"} 1\n"), "{text}");
        assert!(text.contains("# TYPE process_cpu_seconds counter\n"), "{text}");
        for name in [
            "process_open_fds",
            "process_resident_memory_bytes",
            "process_start_time_seconds",
            "process_cpu_seconds_total",
        ] {
            assert!(text.lines().any(|line| line.starts_with(&format!("{name} "))), "{name} in {text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn an_open_file_is_counted() {
        // Other tests of this process open files at the same time, so only a lower bound is sure.
        let files: Vec<_> = (0..50).map(|_| std::fs::File::open("/proc/self/stat").unwrap()).collect();
        let stats = ProcessStats::read().unwrap();
        assert!(stats.open_fds >= files.len() as u64 + 3, "{stats:?}");
        assert!(stats.resident_bytes > 1 << 20 && stats.threads >= 1, "{stats:?}");
    }

    #[test]
    fn reads_a_command_with_parentheses() {
        let stat = "7 (a b) (c)) S 1 7 7 0 -1 0 0 0 0 0 250 50 0 0 20 0 3 0 1000 0 0";
        let status = "Name:\tx\nVmSize:\t    2048 kB\nVmRSS:\t     1024 kB\nThreads:\t3\n";
        let stats =
            ProcessStats::parse(9, stat, status, "Max open files            unlimited", "btime 1000\n")
                .unwrap();
        let expected = ProcessStats {
            open_fds: 9,
            max_fds: None,
            resident_bytes: 1 << 20,
            virtual_bytes: 2 << 20,
            cpu_seconds: 3.0,
            start_seconds: 1010.0,
            threads: 3,
        };
        assert_eq!(stats, expected);
    }
}
