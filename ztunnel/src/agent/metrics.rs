//! What the agent counts (C71, C77).

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// One pass over the pods may be held up by a proxy that does not answer: at most eight of them, 5 s each. Beyond, something hangs.
const STALLED: Duration = Duration::from_secs(60);

/// The agent's counters; clones share them.
#[derive(Clone, Debug)]
pub struct AgentMetrics {
    /// Proxies that have every pod (C71).
    pub connected: Gauge,
    reconciled: Family<EventLabel, Counter>,
    pods: Family<StateLabel, Gauge>,
    /// Pods with an annotation that has no effect because something in it is wrong.
    pub wrong_annotations: Gauge,
    /// Times that altered rules were put in force again.
    pub healed: Counter,
    /// Packets that would have gone around the proxy while rules were altered, and were stopped in the pod.
    pub stopped_packets: Counter,
    /// Interfaces of the node that let nothing in or out now, because the pod's rules cannot be put in force.
    pub held: Gauge,
    /// From a request to its acknowledgement by a proxy, seconds.
    pub zds_round_trip: Histogram,
    /// Whether the node's rules for probes could not be written (1) or are as they should be (0).
    pub probes_failed: Gauge,
    plugin_requests: Family<CodeLabel, Counter>,
    installs: Family<ResultLabel, Counter>,
    install_ready: Gauge,
    pulse: Arc<Mutex<Instant>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    response_code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

/// What was done for a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
#[allow(non_camel_case_types, reason = "the labels are those of the field")]
pub enum Event {
    /// It joined.
    add,
    /// It was enrolled already, and something of it changed or was tried again.
    update,
    /// It left.
    delete,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EventLabel {
    r#type: Event,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

impl AgentMetrics {
    /// Registers all of them.
    pub fn new(registry: &mut Registry) -> Self {
        // 0.25 ms to 8 s: an acknowledgement takes about a millisecond, and 5 s at most.
        let buckets = exponential_buckets(0.000_25, 2.0, 16);
        let metrics = Self {
            connected: Gauge::default(),
            reconciled: Family::default(),
            pods: Family::default(),
            wrong_annotations: Gauge::default(),
            healed: Counter::default(),
            stopped_packets: Counter::default(),
            held: Gauge::default(),
            zds_round_trip: Histogram::new(buckets),
            probes_failed: Gauge::default(),
            plugin_requests: Family::default(),
            installs: Family::default(),
            install_ready: Gauge::default(),
            pulse: Arc::new(Mutex::new(Instant::now())),
        };
        metrics.pods(0, 0);
        registry.register("ztunnel_connected", "Proxies that are connected", metrics.connected.clone());
        registry.register(
            "nodeagent_reconcile_events",
            "What was done for pods, by type",
            metrics.reconciled.clone(),
        );
        registry.register("culvert_agent_pods", "Pods of this node, by state", metrics.pods.clone());
        registry.register(
            "culvert_agent_wrong_annotations",
            "Pods with an annotation that is wrong and has no effect",
            metrics.wrong_annotations.clone(),
        );
        registry.register(
            "culvert_agent_rules_healed",
            "Altered rules put in force again",
            metrics.healed.clone(),
        );
        registry.register(
            "culvert_agent_stopped_packets",
            "Packets stopped that would have gone around the proxy",
            metrics.stopped_packets.clone(),
        );
        registry.register("culvert_agent_held_interfaces", "Interfaces that are held", metrics.held.clone());
        registry.register(
            "culvert_agent_probe_rules_failed",
            "Whether the node's rules for probes cannot be written",
            metrics.probes_failed.clone(),
        );
        registry.register(
            "istio_cni_plugin_requests",
            "Requests of the CNI plugin, by response code",
            metrics.plugin_requests.clone(),
        );
        registry.register(
            "istio_cni_installs",
            "Times that the CNI plugin was installed, by result",
            metrics.installs.clone(),
        );
        registry.register(
            "istio_cni_install_ready",
            "Whether the CNI plugin is installed",
            metrics.install_ready.clone(),
        );
        registry.register_with_unit(
            "culvert_agent_zds_round_trip",
            "From a request to a proxy to its acknowledgement",
            Unit::Seconds,
            metrics.zds_round_trip.clone(),
        );
        metrics
    }

    /// Something was done for a pod.
    pub fn reconciled(&self, event: Event) {
        self.reconciled.get_or_create(&EventLabel { r#type: event }).inc();
        self.beat();
    }

    /// How many pods there are now.
    pub fn pods(&self, enrolled: usize, pending: usize) {
        for (state, count) in [("enrolled", enrolled), ("pending", pending)] {
            self.pods.get_or_create(&StateLabel { state }).set(count as i64);
        }
    }

    /// A request of the CNI plugin was answered.
    pub fn plugin_answered(&self, response_code: u16) {
        self.plugin_requests.get_or_create(&CodeLabel { response_code }).inc();
    }

    /// The CNI plugin was installed, or could not be.
    pub fn installed(&self, ok: bool) {
        let result = if ok { "SUCCESS" } else { "FAILURE" };
        self.installs.get_or_create(&ResultLabel { result }).inc();
    }

    /// Whether the CNI plugin is installed now.
    pub fn install_ready(&self, ready: bool) {
        self.install_ready.set(ready.into());
    }

    /// The agent goes on.
    pub fn beat(&self) {
        *self.pulse.lock() = Instant::now();
    }

    /// It has not done so for too long.
    pub fn stalled(&self) -> bool {
        self.pulse.lock().elapsed() > STALLED
    }

    /// Counters that nobody reads.
    #[cfg(test)]
    pub fn unread() -> Self {
        Self::new(&mut Registry::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C71, C77: the names that dashboards ask for.
    #[test]
    fn metrics_have_the_names_of_the_field() {
        let mut registry = Registry::default();
        let metrics = AgentMetrics::new(&mut registry);
        metrics.reconciled(Event::add);
        metrics.plugin_answered(200);
        metrics.plugin_answered(503);
        metrics.installed(true);
        metrics.installed(false);
        metrics.install_ready(true);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "nodeagent_reconcile_events_total{type=\"add\"} 1",
            "istio_cni_plugin_requests_total{response_code=\"200\"} 1",
            "istio_cni_plugin_requests_total{response_code=\"503\"} 1",
            "istio_cni_installs_total{result=\"SUCCESS\"} 1",
            "istio_cni_installs_total{result=\"FAILURE\"} 1",
            "istio_cni_install_ready 1",
            "ztunnel_connected 0",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
    }
}
