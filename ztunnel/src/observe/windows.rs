//! What stalled streams hold, read when it is asked for.

use std::fmt;

use culvert_hbone::Budget;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

/// Tells of a budget.
#[derive(Debug)]
pub struct Windows(pub Budget);

impl Collector for Windows {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let values = [
            (
                "culvert_tunnel_window_bytes",
                "Windows of the streams that hold bytes their reader has not taken",
                self.0.charged(),
            ),
            (
                "culvert_tunnel_window_budget_bytes",
                "What they may hold before windows shrink",
                self.0.limit(),
            ),
        ];
        for (name, help, value) in values {
            let gauge = ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX));
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn both_are_told() {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Windows(Budget::new(7))));
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        assert!(text.contains("\nculvert_tunnel_window_bytes 0\n"), "{text}");
        assert!(text.contains("\nculvert_tunnel_window_budget_bytes 7\n"), "{text}");
    }
}
