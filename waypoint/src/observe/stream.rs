//! The record of one stream that is no requests.

use std::sync::Arc;
use std::time::Instant;

use culvert_model::workload::Workload;

use super::labels::{Labels, Parties};
use super::request::Shown;
use crate::accept::Asked;
use crate::endpoint::Endpoint;
use crate::shared::{Failure, Shared};

/// Everything there is to say about one stream.
pub struct Stream {
    asked: Asked,
    begun: Instant,
    opened: bool,
    /// The workload that asked.
    pub source: Option<Arc<Workload>>,
    /// Who was to answer.
    pub endpoint: Option<Endpoint>,
    /// The policy that decided.
    pub policy: Option<String>,
    /// Bytes from the source.
    pub sent: u64,
    /// Bytes to the source.
    pub received: u64,
}

impl Stream {
    /// A stream begins.
    pub fn begin(asked: &Asked) -> Self {
        Self {
            asked: asked.clone(),
            begun: Instant::now(),
            opened: false,
            source: None,
            endpoint: None,
            policy: None,
            sent: 0,
            received: 0,
        }
    }

    /// Its destination has accepted.
    pub fn opened(&mut self, shared: &Shared) {
        self.opened = true;
        self.source = super::source(shared, &shared.state.load().snapshot, &self.asked.peer);
        shared.metrics.opened(self.labels("-"));
    }

    /// It is over.
    pub fn finish(self, shared: &Shared, failure: Option<Failure>) {
        let flags = failure.as_ref().map_or("-", |failure| failure.reason.response_flag());
        if self.opened {
            // By the labels that it was opened with, so that the two can be compared.
            shared.metrics.closed(self.labels("-"), self.sent, self.received);
        } else if let Some(failure) = &failure {
            shared.metrics.refused(failure.reason);
        }
        let endpoint = self.endpoint.as_ref();
        tracing::info!(
            target: "access",
            direction = "waypoint",
            src.addr = %self.asked.peer.address,
            src.workload = self.source.as_ref().map(|w| tracing::field::display(w.name.clone())),
            src.namespace = %self.asked.peer.facts.identity.namespace(),
            src.identity = %self.asked.peer.facts.identity,
            dst.addr = endpoint.map(|it| tracing::field::display(Shown(&it.address))),
            dst.service = self.asked.target.service().map(|it| tracing::field::display(it.key.hostname.clone())),
            dst.workload = endpoint.map(|it| tracing::field::display(it.workload.name.clone())),
            protocol = "tcp",
            policy = self.policy.as_deref(),
            bytes_sent = self.sent,
            bytes_recv = self.received,
            duration = %format_args!("{:.3}ms", self.begun.elapsed().as_secs_f64() * 1e3),
            flags,
            reason = failure.as_ref().map(|f| f.reason.as_str()),
            error = failure.as_ref().map(|f| f.detail.as_str()),
            "stream"
        );
    }

    fn labels(&self, flags: &'static str) -> Labels {
        let parties = Parties {
            identity: &self.asked.peer.facts.identity,
            source: self.source.as_ref(),
            service: self.asked.target.service(),
            destination: self.endpoint.as_ref().map(|it| &it.workload),
        };
        Labels::new("tcp", flags, &parties)
    }
}
