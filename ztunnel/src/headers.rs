//! What the two proxies tell each other beside the bytes (Z17, Z18). For logs and metrics only, never for a decision.

use culvert_hbone::headers::{BAGGAGE, Baggage, FORWARDED, Forwarded, TRACEPARENT, Traceparent};
use culvert_model::workload::{Workload, WorkloadType};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::observe::Flow;

/// The network that a connection came from, told to the endpoint on the other one (Z19).
pub const X_FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// The headers of a CONNECT request; begins a trace and notes its id in the flow.
pub fn request(flow: &mut Flow) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(3);
    if let Some(value) = flow.source.workload.as_deref().and_then(|w| baggage(w).encode()) {
        headers.insert(BAGGAGE, value);
    }
    let forwarded = Forwarded {
        client: Some(flow.source.address),
        host: flow.service.as_ref().map(|service| service.key.hostname.to_string()),
    };
    if let Some(value) = forwarded.encode() {
        headers.insert(FORWARDED, value);
    }
    let trace = Traceparent::child_of(None, &mut fastrand::Rng::new());
    headers.insert(TRACEPARENT, trace.encode());
    flow.trace = Some(format!("{:032x}", trace.trace_id));
    headers
}

/// The headers of the CONNECT inside a gateway's tunnel: the same, and the network that the client is on (Z19).
pub fn inner(outer: &HeaderMap, network: &str) -> HeaderMap {
    let mut headers = outer.clone();
    // The default network has no name, and so nothing is said of it.
    if let Some(value) = HeaderValue::from_str(network).ok().filter(|value| !value.is_empty()) {
        headers.insert(X_FORWARDED_NETWORK, value);
    }
    headers
}

/// The headers of a 200.
pub fn response(workload: &Workload) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(1);
    if let Some(value) = baggage(workload).encode() {
        headers.insert(BAGGAGE, value);
    }
    headers
}

/// The trace that the peer began, if it sent one that can be read.
pub fn trace_id(headers: &HeaderMap) -> Option<String> {
    let trace = Traceparent::parse(headers.get(TRACEPARENT)?.as_bytes())?;
    Some(format!("{:032x}", trace.trace_id))
}

fn baggage(workload: &Workload) -> Baggage {
    let kind = match workload.workload_type {
        WorkloadType::Deployment => "deployment",
        WorkloadType::CronJob => "cronjob",
        WorkloadType::Pod => "pod",
        WorkloadType::Job => "job",
    };
    Baggage {
        cluster: workload.cluster_id.to_string(),
        namespace: workload.namespace.to_string(),
        workload_kind: kind.to_owned(),
        workload: workload.workload_name.to_string(),
        service: workload.canonical_name.to_string(),
        version: workload.canonical_revision.to_string(),
        region: workload.locality.region.0.to_string(),
        zone: workload.locality.zone.0.to_string(),
    }
}
