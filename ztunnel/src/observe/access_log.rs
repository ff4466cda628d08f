//! One line a connection, target `access` (Z108), early refusals too.

use super::flow::{Flow, Phase, Security};

macro_rules! emit {
    ($level:ident, $flow:ident, $message:literal) => {{
        let failure = $flow.failure();
        let dry_run = dry_run($flow);
        tracing::$level!(
            target: "access",
            direction = %$flow.direction,
            src.addr = %$flow.source.address,
            src.workload = $flow.source.workload_name().map(|n| tracing::field::display(n.clone())),
            src.namespace = $flow.source.namespace().map(|n| tracing::field::display(n.clone())),
            src.identity = $flow.source.identity.as_ref().map(tracing::field::display),
            src.cluster = $flow.source.cluster().map(|c| tracing::field::display(c.clone())),
            dst.addr = %$flow.destination.address,
            dst.hbone_addr = $flow.tunnel.map(tracing::field::display),
            dst.service = $flow.service.as_ref().map(|s| tracing::field::display(s.key.hostname.clone())),
            dst.workload = $flow.destination.workload_name().map(|n| tracing::field::display(n.clone())),
            dst.namespace = $flow.destination.namespace().map(|n| tracing::field::display(n.clone())),
            dst.identity = $flow.destination.identity.as_ref().map(tracing::field::display),
            dst.cluster = $flow.destination.cluster().map(|c| tracing::field::display(c.clone())),
            security = security($flow.security),
            policy = $flow.policy.as_ref().map(tracing::field::display),
            dry_run = dry_run.as_deref(),
            attempts = ($flow.attempts > 1).then_some($flow.attempts),
            bytes_sent = $flow.sent,
            bytes_recv = $flow.received,
            duration = %format_args!("{:.3}ms", $flow.elapsed().as_secs_f64() * 1e3),
            phases = %Phases($flow),
            trace = $flow.trace.as_deref(),
            reason = failure.map(|f| f.reason.as_str()),
            blame = failure.map(|f| tracing::field::display(format!("{:?}", f.reason.blame()).to_lowercase())),
            error = failure.map(|f| f.detail.as_str()),
            $message
        );
    }};
}
/// Writes the line of a connection that is over.
pub fn write(flow: &Flow) {
    // The macro needs its level at compile time, hence the two calls of one shape.
    match flow.failure() {
        None => emit!(info, flow, "connection complete"),
        Some(_) => emit!(warn, flow, "connection failed"),
    }
}

fn security(security: Security) -> &'static str {
    match security {
        Security::MutualTls => "mutual_tls",
        Security::SameNode => "same_node",
        Security::Plaintext => "none",
    }
}

fn dry_run(flow: &Flow) -> Option<String> {
    if flow.dry_run.is_empty() {
        return None;
    }
    Some(
        flow.dry_run
            .iter()
            .map(|(policy, would)| format!("{policy} would {would}"))
            .collect::<Vec<_>>()
            .join(", "),
    )
}

/// `resolve=12us connect=340us ...`: when each phase that was reached ended, after the accept.
struct Phases<'a>(&'a Flow);

impl std::fmt::Display for Phases<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut space = "";
        for phase in Phase::ALL {
            if let Some(at) = self.0.phase(phase) {
                write!(f, "{space}{}={}us", phase.as_str(), at.as_micros())?;
                space = " ";
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use culvert_model::outcome::Reason;
    use parking_lot::Mutex;
    use tracing::field::{Field, Visit};
    use tracing::span::{Attributes, Id, Record};
    use tracing::{Event, Metadata, Subscriber};

    use super::*;
    use crate::observe::Direction;
    use crate::observe::flow::{End, Failure};
    use crate::world;

    type Line = BTreeMap<String, String>;

    /// Keeps the lines of target `access`.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<Line>>>);

    struct Fields(Line);

    impl Visit for Fields {
        fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
            self.0.insert(field.name().to_owned(), format!("{value:?}"));
        }

        fn record_str(&mut self, field: &Field, value: &str) {
            self.0.insert(field.name().to_owned(), value.to_owned());
        }
    }

    impl Subscriber for Lines {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == "access"
        }

        fn new_span(&self, _: &Attributes<'_>) -> Id {
            Id::from_u64(1)
        }

        fn record(&self, _: &Id, _: &Record<'_>) {}

        fn record_follows_from(&self, _: &Id, _: &Id) {}

        fn event(&self, event: &Event<'_>) {
            let mut fields = Fields(Line::new());
            fields.0.insert("level".into(), event.metadata().level().to_string());
            event.record(&mut fields);
            self.0.lock().push(fields.0);
        }

        fn enter(&self, _: &Id) {}

        fn exit(&self, _: &Id) {}
    }

    fn line(flow: &Flow) -> Line {
        let lines = Lines::default();
        tracing::subscriber::with_default(lines.clone(), || write(flow));
        let line = lines.0.lock().pop();
        line.expect("a line")
    }

    fn flow() -> Flow {
        let mut flow = Flow::new(
            Direction::Inbound,
            "100.64.1.2:40000".parse().unwrap(),
            "100.64.2.3:8080".parse().unwrap(),
        );
        flow.source.workload = Some(Arc::new(world::workload("shop", "client", &["100.64.1.2"])));
        flow.source.identity = Some(world::identity("shop", "client"));
        flow.destination.workload = Some(Arc::new(world::workload("shop", "web", &["100.64.2.3"])));
        flow.destination.identity = Some(world::identity("shop", "web"));
        flow.service = Some(Arc::new(world::service("shop/web.shop.svc.cluster.local", &["198.18.128.1"])));
        flow.tunnel = Some("100.64.2.3:15008".parse().unwrap());
        flow.security = Security::MutualTls;
        (flow.sent, flow.received) = (7, 9);
        flow
    }

    /// Z108: who and where, what was decided, how much, how long; INFO when all is well, and then no reason.
    #[test]
    fn who_what_and_why() {
        let mut complete = flow();
        complete.mark(Phase::Open);
        complete.end = Some(End::Clean);
        let said = line(&complete);
        for (field, value) in [
            ("level", "INFO"),
            ("message", "connection complete"),
            ("direction", "inbound"),
            ("src.addr", "100.64.1.2:40000"),
            ("src.workload", "client"),
            ("src.namespace", "shop"),
            ("src.identity", "spiffe://cluster.local/ns/shop/sa/client"),
            ("src.cluster", "Kubernetes"),
            ("dst.addr", "100.64.2.3:8080"),
            ("dst.hbone_addr", "100.64.2.3:15008"),
            ("dst.service", "web.shop.svc.cluster.local"),
            ("dst.workload", "web"),
            ("dst.namespace", "shop"),
            ("dst.identity", "spiffe://cluster.local/ns/shop/sa/web"),
            ("dst.cluster", "Kubernetes"),
            ("security", "mutual_tls"),
            ("bytes_sent", "7"),
            ("bytes_recv", "9"),
        ] {
            assert_eq!(said.get(field).map(String::as_str), Some(value), "{field} in {said:?}");
        }
        assert!(said["duration"].ends_with("ms") && said["phases"].contains("open="), "{said:?}");
        assert!(
            ["reason", "blame", "error", "policy", "trace"].iter().all(|field| !said.contains_key(*field))
        );

        let mut failed = flow();
        failed.policy =
            Some(culvert_model::policy::PolicyKey { namespace: "shop".into(), name: "no".into() });
        failed.end = Some(End::Failed(Failure::new(Reason::AuthorizationPolicy, "denied by a rule")));
        let said = line(&failed);
        for (field, value) in [
            ("level", "WARN"),
            ("message", "connection failed"),
            ("reason", "authorization_policy"),
            ("blame", "policy"),
            ("policy", "shop/no"),
            ("error", "denied by a rule"),
        ] {
            assert_eq!(said.get(field).map(String::as_str), Some(value), "{field} in {said:?}");
        }
    }
}
