//! What passes between the proxy and the control plane, under Istio's names (Z102).

use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_xds::client::{ClientObserver, Disconnect};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

/// Counters of the discovery stream.
#[derive(Debug, Default)]
pub struct Discovery {
    terminations: Family<Reason, Counter>,
    messages: Family<Url, Counter>,
    bytes: Family<Url, Counter>,
    /// Responses accepted.
    pub accepted: Counter,
    /// Responses with a resource that was refused.
    pub rejected: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Url {
    url: &'static str,
}

impl Discovery {
    /// Registers them.
    pub fn new(registry: &mut Registry) -> Self {
        let counters = Self::default();
        let c = &counters;
        let istio = registry.sub_registry_with_prefix("istio");
        istio.register(
            "xds_connection_terminations",
            "Connections to the control plane that ended, or could not be made",
            c.terminations.clone(),
        );
        istio.register("xds_message", "Responses of the control plane", c.messages.clone());
        istio.register_with_unit("xds_message", "Size of these responses", Unit::Bytes, c.bytes.clone());
        istio.register("xds_accepted", "xDS responses accepted whole", c.accepted.clone());
        istio.register("xds_rejected", "xDS responses with a refused resource", c.rejected.clone());
        counters
    }
}

impl Url {
    /// Types that nobody asked for share one series: the labels are not the control plane's to choose.
    fn of(type_url: &str) -> Self {
        let known = [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL].into_iter().find(|known| *known == type_url);
        Self { url: known.unwrap_or("other") }
    }
}

impl ClientObserver for super::Metrics {
    fn message(&self, type_url: &str, bytes: usize) {
        let url = Url::of(type_url);
        self.discovery.messages.get_or_create(&url).inc();
        self.discovery.bytes.get_or_create(&url).inc_by(bytes as u64);
    }

    fn disconnected(&self, reason: &Disconnect) {
        self.discovery.terminations.get_or_create(&Reason { reason: reason.label() }).inc();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::super::Metrics;
    use super::*;

    /// Z102: names and labels as Istio's dashboards ask for them.
    #[test]
    fn under_istios_names() {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        metrics.message(ADDRESS_TYPE_URL, 1000);
        metrics.message(ADDRESS_TYPE_URL, 500);
        metrics.message(AUTHORIZATION_TYPE_URL, 7);
        for surprise in ["type.googleapis.com/a", "type.googleapis.com/b"] {
            metrics.message(surprise, 1);
        }
        metrics.disconnected(&Disconnect::Connect("no route".into()));
        metrics.disconnected(&Disconnect::Stalled);
        metrics.disconnected(&Disconnect::Stream { code: tonic::Code::Internal, message: "reset".into() });
        metrics.disconnected(&Disconnect::Complete);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in [
            r#"istio_xds_message_total{url="type.googleapis.com/istio.workload.Address"} 2"#,
            r#"istio_xds_message_total{url="type.googleapis.com/istio.security.Authorization"} 1"#,
            r#"istio_xds_message_total{url="other"} 2"#,
            r#"istio_xds_message_bytes_total{url="type.googleapis.com/istio.workload.Address"} 1500"#,
            r#"istio_xds_connection_terminations_total{reason="ConnectionError"} 1"#,
            r#"istio_xds_connection_terminations_total{reason="Error"} 2"#,
            r#"istio_xds_connection_terminations_total{reason="Complete"} 1"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in {text}");
        }
    }
}
