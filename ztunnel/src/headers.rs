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
    headers.insert(TRACEPARENT, begin_trace(flow));
    headers
}

/// Begins a trace, notes its id in the flow, and gives the header that says so.
pub fn begin_trace(flow: &mut Flow) -> HeaderValue {
    let trace = Traceparent::child_of(None, &mut fastrand::Rng::new());
    flow.trace = Some(format!("{:032x}", trace.trace_id));
    trace.encode()
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::observe::Direction;
    use crate::world::{service, workload};

    fn flow() -> Flow {
        let (from, to) = ("100.64.1.2:40000".parse().unwrap(), "198.18.128.9:80".parse().unwrap());
        let mut flow = Flow::new(Direction::Outbound, from, to);
        flow.source.workload = Some(Arc::new(workload("shop", "client", &["100.64.1.2"])));
        flow.service = Some(Arc::new(service("shop/cart.shop.svc.cluster.local", &["198.18.128.9"])));
        flow
    }

    /// Z17: who asks and for what, and a trace that both ends log.
    #[test]
    fn a_request_says_who_asks() {
        let mut flow = flow();
        let headers = request(&mut flow);
        let baggage = headers[BAGGAGE].to_str().unwrap();
        for member in [
            "k8s.cluster.name=Kubernetes",
            "k8s.namespace.name=shop",
            "k8s.pod.name=client",
            "service.name=client",
            "service.version=latest",
        ] {
            assert!(baggage.split(',').any(|one| one == member), "{member} in {baggage}");
        }
        let forwarded = headers[FORWARDED].to_str().unwrap();
        assert!(forwarded.contains("100.64.1.2:40000"), "{forwarded}");
        assert!(
            forwarded.contains("host=") && forwarded.contains("cart.shop.svc.cluster.local"),
            "{forwarded}"
        );
        assert!(flow.trace.is_some());
        assert_eq!(trace_id(&headers), flow.trace, "the other proxy reads the same trace");
        assert!(headers.get(X_FORWARDED_NETWORK).is_none());
    }

    /// Z17: what is not known is not said.
    #[test]
    fn nobody_known() {
        let mut flow =
            Flow::new(Direction::Outbound, "100.64.1.2:1".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        assert!(request(&mut flow).get(BAGGAGE).is_none());
        assert_eq!(trace_id(&HeaderMap::new()), None);
        let garbage = [(TRACEPARENT, HeaderValue::from_static("00-xyz"))].into_iter().collect();
        assert_eq!(trace_id(&garbage), None);
    }

    /// Z19: the inner request says the client's network too, unless it is the one without a name.
    #[test]
    fn the_clients_network() {
        let outer = request(&mut flow());
        let within = inner(&outer, "network-1");
        assert_eq!(within[X_FORWARDED_NETWORK], "network-1");
        assert_eq!(within.len(), outer.len() + 1);
        assert_eq!(inner(&outer, ""), outer);
        assert_eq!(inner(&outer, "no\nheader"), outer);
    }
}
