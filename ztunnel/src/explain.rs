//! `GET /debug/explain?source=POD&destination=HOST:PORT`: where a connection would go now and whether it would be let in. It is
//! decided by the functions that decide on connections, with what this proxy knows and has seen; nothing is dialled.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_model::authorize::{self, ConnectionFacts};
use culvert_model::balance::Place;
use culvert_model::dns::{DnsDecision, QueryFamily, lookup};
use culvert_model::resolve::{self, OutboundFacts, Refusal, Resolved, TunnelKind};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::Workload;
use serde_json::{Value, json};

use crate::config::OWN_PORTS;
use crate::outbound::endpoints::EndpointTable;

/// Why no answer can be given.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// A parameter is missing.
    #[error("say who asks for what: ?source=NAMESPACE/POD&destination=HOST:PORT")]
    Incomplete,
    /// No workload has this name.
    #[error("no workload is known as {0:?}: give NAMESPACE/POD, or a uid")]
    UnknownSource(String),
    /// The name is several workloads'.
    #[error("{0:?} is the name of several workloads: give NAMESPACE/POD, or a uid")]
    AmbiguousSource(String),
    /// It is neither address and port nor name and port.
    #[error("{0:?} is no HOST:PORT")]
    BadDestination(String),
    /// The mesh does not know the name.
    #[error("the mesh does not answer for the name {0:?}: ask the cluster's DNS, and give the address")]
    UnknownHost(String),
}

/// What a question is answered from.
#[derive(Clone, Copy, Debug)]
pub struct Knowledge<'a> {
    /// What the control plane said.
    pub snapshot: &'a Snapshot,
    /// What this proxy saw of endpoints.
    pub seen: &'a EndpointTable,
    /// The cluster of this node's workloads.
    pub cluster: &'a str,
    /// The DNS domain of services.
    pub domain: &'a str,
}

/// What `source` would get that connects to `destination`.
///
/// # Errors
/// [`ExplainError`]: the question is not understood.
pub fn explain(
    known: &Knowledge<'_>,
    source: Option<&str>,
    destination: Option<&str>,
) -> Result<Value, ExplainError> {
    let (Some(source), Some(destination)) = (source, destination) else {
        return Err(ExplainError::Incomplete);
    };
    let snapshot = known.snapshot;
    let source = find(snapshot, known.cluster, source)?;
    let asked = address(snapshot, source, known.domain, destination)?;
    let own = source.addresses.iter().find(|own| own.is_ipv4() == asked.is_ipv4());
    let client = own.or(source.addresses.first()).copied().unwrap_or(asked.ip());
    let facts = OutboundFacts {
        source,
        client,
        original_destination: asked,
        exclude: &[],
        place: &Place::of(source),
        own_ports: &OWN_PORTS,
    };
    let random = &mut |bound: u64| fastrand::u64(..bound.max(1));
    let explained = resolve::explain(snapshot, &facts, known.seen, random);
    let waypoints = explained.waypoints.iter().map(|(name, weight)| json!({"name": name, "weight": weight}));
    Ok(json!({
        "generation": snapshot.generation(),
        "source": {"uid": source.uid, "identity": source.identity, "address": client},
        "asked": asked,
        "addressed": explained.addressed,
        "waypoints": waypoints.collect::<Vec<_>>(),
        "endpoints": explained.endpoints,
        "decision": decision(&explained.verdict),
        "authorization": authorization(snapshot, source, client, &explained.verdict),
    }))
}

fn find<'a>(snapshot: &'a Snapshot, cluster: &str, source: &str) -> Result<&'a Arc<Workload>, ExplainError> {
    if let Some(found) = snapshot.workload_by_uid(source) {
        return Ok(found);
    }
    if source.contains('/') {
        let found = snapshot.workload_by_uid(&format!("{cluster}//Pod/{source}"));
        return found.ok_or_else(|| ExplainError::UnknownSource(source.to_owned()));
    }
    let mut named = snapshot.workloads().filter(|workload| *workload.name == *source);
    match (named.next(), named.next()) {
        (Some(found), None) => Ok(found),
        (None, _) => Err(ExplainError::UnknownSource(source.to_owned())),
        (Some(_), Some(_)) => Err(ExplainError::AmbiguousSource(source.to_owned())),
    }
}

/// Names are looked up as the pod's resolver and its DNS do.
fn address(
    snapshot: &Snapshot,
    source: &Workload,
    domain: &str,
    destination: &str,
) -> Result<SocketAddr, ExplainError> {
    if let Ok(address) = destination.parse() {
        return Ok(address);
    }
    let bad = || ExplainError::BadDestination(destination.to_owned());
    let (host, port) = destination.rsplit_once(':').ok_or_else(bad)?;
    let port = port.parse().map_err(|_| bad())?;
    if host.is_empty() || host.contains([':', '/']) {
        return Err(bad());
    }
    // The order of a pod's resolver: with each search domain, then as it is.
    let namespace = &source.namespace;
    let searched = [format!(".{namespace}.svc.{domain}"), format!(".svc.{domain}"), format!(".{domain}")];
    let searched = searched.iter().filter(|_| !host.ends_with('.')).map(|suffix| format!("{host}{suffix}"));
    let mut names = searched.chain([host.to_owned()]);
    let answer = names.find_map(|name| {
        [QueryFamily::V4, QueryFamily::V6].into_iter().find_map(|family| {
            let random = &mut |bound: u64| fastrand::u64(..bound.max(1));
            match lookup(snapshot, source, domain, &name, family, random) {
                DnsDecision::Answer { addresses, .. } => addresses.first().copied(),
                DnsDecision::NoData | DnsDecision::Forward => None,
            }
        })
    });
    let ip: IpAddr = answer.ok_or_else(|| ExplainError::UnknownHost(host.to_owned()))?;
    Ok(SocketAddr::new(ip, port))
}

fn decision(verdict: &Result<Resolved, Refusal>) -> Value {
    match verdict {
        Err(refusal) => json!({"way": "refused", "reason": refusal.reason, "detail": refusal.detail}),
        Ok(Resolved::Passthrough { destination }) => {
            json!({"way": "passthrough", "destination": destination})
        }
        Ok(Resolved::Plain { destination, workload, .. }) => {
            json!({"way": "plain", "destination": destination, "workload": workload.uid})
        }
        Ok(Resolved::NeedsDns(needed)) => {
            let (hostname, port) = (&needed.hostname, needed.port);
            json!({"way": "lookup", "hostname": hostname, "port": port, "workload": needed.workload.uid})
        }
        Ok(Resolved::Tunnel(route)) => json!({
            "way": "tunnel",
            "to": kind(&route.kind),
            "peer": route.peer,
            "authority": route.authority,
            "expected": route.expected.as_slice(),
            "workload": route.workload.uid,
        }),
    }
}

fn kind(kind: &TunnelKind) -> &'static str {
    match kind {
        TunnelKind::Direct => "destination",
        TunnelKind::ServiceWaypoint => "service waypoint",
        TunnelKind::WorkloadWaypoint => "workload waypoint",
        TunnelKind::Gateway(_) => "network gateway",
    }
}

/// What the destination's proxy would say, which knows the same policies; null where no proxy stands before it.
fn authorization(
    snapshot: &Snapshot,
    source: &Workload,
    client: IpAddr,
    verdict: &Result<Resolved, Refusal>,
) -> Value {
    let Ok(Resolved::Tunnel(route)) = verdict else { return Value::Null };
    if route.kind != TunnelKind::Direct {
        return Value::Null;
    }
    let facts = ConnectionFacts {
        identity: Some(&source.identity),
        source: SocketAddr::new(client, 0),
        destination: route.target,
    };
    let explained = authorize::explain(snapshot, &route.workload, &facts);
    let (allowed, policy, dry_run) = match &explained.verdict {
        Ok(permit) => (true, permit.by(), permit.dry_run()),
        Err(denial) => (false, denial.policy.as_ref(), &denial.dry_run[..]),
    };
    let denial = explained.verdict.as_ref().err();
    json!({
        "allowed": allowed,
        "policy": policy.map(ToString::to_string),
        "reason": denial.map(|denial| denial.reason),
        "detail": denial.map(|denial| &denial.detail),
        "dry_run": dry_run,
        "steps": explained.steps,
    })
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
