//! What happened to each connection: one [`flow::Flow`] a connection, and its projections (access log, metrics, the list
//! of live connections).

pub mod access_log;
pub mod connections;
mod discovery;
pub mod flow;
mod gauges;
pub mod limits;
pub mod metrics;
mod windows;

use std::sync::Arc;

pub use connections::{Connections, Live};
pub use flow::{Direction, Flow, Phase};
pub use gauges::measure;
pub use metrics::Metrics;

/// What every connection reports to; one for the process.
#[derive(Clone, Debug)]
pub struct Observer {
    /// Counters by workload, service and identity.
    pub metrics: Arc<Metrics>,
    /// What is open now.
    pub connections: Arc<Connections>,
}

impl Observer {
    /// Begins to account for a connection that was accepted just now.
    pub fn begin(&self, flow: Flow) -> Tracked {
        Tracked { flow: Box::new(flow), live: None, observer: self.clone(), finished: false }
    }

    /// A connection is refused before anything is done for it, because a bound is reached: counted each time, logged once a
    /// second.
    pub fn refuse(&self, mut flow: Flow, failure: flow::Failure) {
        let limit = failure.limit;
        flow.end = Some(flow::End::Failed(failure));
        self.metrics.failed(&flow);
        let Some(limit) = limit else { return access_log::write(&flow) };
        self.metrics.limits.reached(limit);
        if let Some(others) = self.metrics.limits.line_due(limit) {
            access_log::write(&flow);
            tracing::warn!(limit = limit.as_str(), others, "a bound is reached: connections are refused");
        }
    }
}

/// A flow that is reported exactly once, however its task ends.
#[derive(Debug)]
pub struct Tracked {
    /// What is known so far.
    pub flow: Box<Flow>,
    live: Option<Arc<Live>>,
    observer: Observer,
    finished: bool,
}

impl Tracked {
    /// From here on it is an open connection: counted, listed and closable.
    pub fn opened(&mut self) -> Arc<Live> {
        let live = self.observer.connections.open(&self.flow);
        self.observer.metrics.opened(&self.flow);
        tracing::debug!(target: "access", direction = %self.flow.direction, src.addr = %self.flow.source.address, dst.addr = %self.flow.destination.address, "connection opened");
        self.live = Some(live.clone());
        live
    }

    /// The connection is over.
    pub fn finish(mut self, end: flow::End) {
        self.report(end);
    }

    fn report(&mut self, end: flow::End) {
        self.finished = true;
        self.flow.mark(Phase::Close);
        if let flow::End::Cut(failure) | flow::End::Failed(failure) = &end
            && let Some(limit) = failure.limit
        {
            self.observer.metrics.limits.reached(limit);
        }
        self.flow.end = Some(end);
        if let Some(live) = self.live.take() {
            self.flow.sent = live.sent();
            self.flow.received = live.received();
            self.observer.connections.close(&live);
            self.observer.metrics.traffic(&live);
            self.observer.metrics.closed(&self.flow);
        } else {
            self.observer.metrics.failed(&self.flow);
        }
        access_log::write(&self.flow);
    }
}

impl Drop for Tracked {
    // A task that is dropped (its pod went away, the process drains by force) still leaves a record.
    fn drop(&mut self) {
        if !self.finished {
            self.report(flow::End::Failed(flow::Failure::new(
                culvert_model::outcome::Reason::Draining,
                "the proxy stopped serving this pod",
            )));
        }
    }
}

#[cfg(test)]
mod tests;
