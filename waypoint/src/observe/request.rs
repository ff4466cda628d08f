//! The record of one request, reported exactly once, however it ends.

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use culvert_model::outcome::Reason;
use culvert_model::service::Service;
use culvert_model::workload::Workload;
use http::{Method, StatusCode};
use tokio::sync::OwnedSemaphorePermit;

use super::labels::{Labels, Parties, RequestLabels};
use super::metrics::Sizes;
use crate::accept::Peer;
use crate::endpoint::{Address, Endpoint};
use crate::http::route::Chosen;
use crate::shared::{Failure, Shared};

/// Longest path that is written into the log.
const MAX_PATH: usize = 512;

/// Everything there is to say about one request.
pub struct Exchange {
    shared: Arc<Shared>,
    peer: Arc<Peer>,
    begun: Instant,
    method: Method,
    /// `Host`.
    pub authority: String,
    /// As it came, cut where it is long.
    path: String,
    protocol: &'static str,
    /// The workload that asked.
    pub source: Option<Arc<Workload>>,
    /// What was asked for.
    pub service: Option<Arc<Service>>,
    /// Kind, name and rule of the route.
    pub route: Option<Chosen>,
    /// The policy that decided.
    pub policy: Option<String>,
    /// What policies on trial would have done.
    pub dry_run: Option<String>,
    /// Who was to answer.
    pub endpoint: Option<Endpoint>,
    /// How many endpoints were tried.
    pub attempts: u32,
    /// The response's status; none if there was no response.
    pub status: Option<StatusCode>,
    /// gRPC's own status.
    pub grpc_status: Option<u16>,
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
    /// Bytes of the request's body, counted as they pass.
    pub request_bytes: Arc<AtomicU64>,
    /// Bytes of the response's body.
    pub response_bytes: u64,
    /// All of it has passed.
    pub complete: bool,
    /// Its place among the requests that are being served.
    pub place: Option<OwnedSemaphorePermit>,
}

impl Exchange {
    /// A request begins.
    pub fn begin(
        shared: &Arc<Shared>,
        peer: &Arc<Peer>,
        (method, path): (&Method, &str),
        grpc: bool,
    ) -> Self {
        shared.metrics.active_requests.inc();
        Self {
            shared: shared.clone(),
            peer: peer.clone(),
            begun: Instant::now(),
            method: method.clone(),
            authority: String::new(),
            path: path.chars().take(MAX_PATH).collect(),
            protocol: if grpc { "grpc" } else { "http" },
            source: None,
            service: None,
            route: None,
            policy: None,
            dry_run: None,
            endpoint: None,
            attempts: 0,
            status: None,
            grpc_status: None,
            failure: None,
            request_bytes: Arc::default(),
            response_bytes: 0,
            complete: false,
            place: None,
        }
    }

    /// It failed, for this reason.
    pub fn fail(&mut self, reason: Reason, detail: impl Display) {
        self.failure = Some(Failure::new(reason, detail.to_string()));
    }

    /// When it began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    fn report(&mut self) {
        if !self.complete && self.failure.is_none() {
            // Nobody else ended it.
            self.fail(Reason::ClientReset, "the client left before it had the whole response");
        }
        let sizes = Sizes {
            duration: self.begun.elapsed(),
            request: self.request_bytes.load(Ordering::Relaxed),
            response: self.response_bytes,
        };
        let flags = self.failure.as_ref().map_or("-", |failure| failure.reason.response_flag());
        let parties = Parties {
            identity: &self.peer.facts.identity,
            source: self.source.as_ref(),
            service: self.service.as_ref(),
            destination: self.endpoint.as_ref().map(|it| &it.workload),
        };
        let labels = Labels::new(self.protocol, flags, &parties);
        let code = self.status.map_or(0, |status| status.as_u16());
        self.shared.metrics.request(RequestLabels::new(labels, code, self.grpc_status), sizes);
        self.write(code, &sizes);
    }

    fn write(&self, code: u16, sizes: &Sizes) {
        let failure = self.failure.as_ref();
        let endpoint = self.endpoint.as_ref();
        tracing::info!(
            target: "access",
            direction = "waypoint",
            src.addr = %self.peer.address,
            src.workload = self.source.as_ref().map(|w| tracing::field::display(w.name.clone())),
            src.namespace = %self.peer.facts.identity.namespace(),
            src.identity = %self.peer.facts.identity,
            dst.addr = endpoint.map(|it| tracing::field::display(Shown(&it.address))),
            dst.service = self.service.as_ref().map(|it| tracing::field::display(it.key.hostname.clone())),
            dst.workload = endpoint.map(|it| tracing::field::display(it.workload.name.clone())),
            protocol = self.protocol,
            method = %self.method,
            authority = %self.authority,
            path = %self.path,
            status = code,
            grpc_status = self.grpc_status,
            route = self.route.as_ref().map(tracing::field::display),
            policy = self.policy.as_deref(),
            dry_run = self.dry_run.as_deref(),
            attempts = (self.attempts > 1).then_some(self.attempts),
            bytes_sent = sizes.request,
            bytes_recv = sizes.response,
            duration = %format_args!("{:.3}ms", sizes.duration.as_secs_f64() * 1e3),
            reason = failure.map(|f| f.reason.as_str()),
            blame = failure.map(|f| tracing::field::display(format!("{:?}", f.reason.blame()).to_lowercase())),
            error = failure.map(|f| f.detail.as_str()),
            "request"
        );
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.shared.metrics.active_requests.dec();
        self.report();
    }
}

/// An endpoint's address, for the log.
pub struct Shown<'a>(pub &'a Address);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Address::At(address) => write!(f, "{address}"),
            Address::Named(name, port) => write!(f, "{name}:{port}"),
        }
    }
}
