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
            dst.addr = %$flow.destination.address,
            dst.hbone_addr = $flow.tunnel.map(tracing::field::display),
            dst.service = $flow.service.as_ref().map(|s| tracing::field::display(s.key.hostname.clone())),
            dst.workload = $flow.destination.workload_name().map(|n| tracing::field::display(n.clone())),
            dst.namespace = $flow.destination.namespace().map(|n| tracing::field::display(n.clone())),
            dst.identity = $flow.destination.identity.as_ref().map(tracing::field::display),
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
