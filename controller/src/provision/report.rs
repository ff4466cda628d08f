//! What is said in the status of Gateways and GatewayClasses (D46). Pure.

use std::net::IpAddr;

use culvert_k8s_api::gateway::{Gateway, GatewayAddress, GatewayClass, HBONE, Listener};
use serde_json::{Value, json};

use super::keeper::{Progress, Provisioned};
use crate::gateways;
use crate::status::{Condition, Wanted};

/// The features of the Gateway API that work with these classes, sorted. They are about routes of Gateways; those of a mesh belong to no
/// class.
const FEATURES: [&str; 0] = [];

/// Of a class of ours.
pub fn class(class: &GatewayClass) -> Wanted {
    let features: Vec<Value> = FEATURES.iter().map(|name| json!({ "name": name })).collect();
    let accepted = match &class.spec.parameters_ref {
        None => {
            Condition::new("Accepted", true, "Accepted", "Gateways of this class are waypoints of this mesh")
        }
        Some(reference) => {
            let message = format!(
                "spec.parametersRef ({} {}) is not read: overlays for a class are in a ConfigMap with label {}",
                reference.kind,
                reference.name,
                culvert_k8s_api::labels::DEFAULTS_FOR_CLASS
            );
            Condition::new("Accepted", false, "InvalidParameters", message)
        }
    };
    Wanted::of(class.metadata.uid.as_str(), class.metadata.generation)
        .condition(accepted)
        .field("supportedFeatures", features.into())
}

/// Of a Gateway of a class of ours. `provisioned` is what is known of what was made for it; `None` if nothing is yet.
pub fn gateway(gateway: &Gateway, provisioned: Option<&Provisioned>) -> Wanted {
    let said =
        if gateways::has_own_addresses(gateway) { unmanaged(gateway) } else { managed(gateway, provisioned) };
    let programmed = said.programmed.status == Some(true);
    let listeners = &gateway.spec.listeners;
    let of_listeners: Vec<Value> =
        (0..listeners.len()).map(|index| listener(listeners, index, programmed)).collect();
    Wanted::of(gateway.metadata.uid.as_str(), gateway.metadata.generation)
        .condition(said.accepted)
        .condition(said.programmed)
        .field("addresses", said.addresses)
        .field("listeners", of_listeners.into())
}

struct Said {
    accepted: Condition,
    programmed: Condition,
    addresses: Value,
}

impl Said {
    fn refused(reason: &'static str, message: &str) -> Self {
        Self {
            accepted: Condition::new("Accepted", false, reason, message),
            programmed: Condition::new("Programmed", false, "Invalid", message),
            addresses: json!([]),
        }
    }
}

/// Somebody else runs what is behind these addresses: they are passed on to proxies as they are (D61).
fn unmanaged(gateway: &Gateway) -> Said {
    if gateway.hbone().is_none() {
        return Said::refused("ListenersNotValid", &no_hbone());
    }
    for address in &gateway.spec.addresses {
        let good = (address.is_ip() && address.value.parse::<IpAddr>().is_ok())
            || (address.is_hostname() && !address.value.is_empty());
        if !good {
            let kind = address.type_.as_deref().unwrap_or("IPAddress");
            let message =
                format!("spec.addresses: {kind} {:?} is neither an IP address nor a hostname", address.value);
            return Said::refused("UnsupportedAddress", &message);
        }
    }
    let what = "it has addresses of its own: nothing is made for it, and proxies go to the first of them";
    let addresses: Vec<Value> = gateway
        .spec
        .addresses
        .iter()
        .map(|it| json!({ "type": it.type_.as_deref().unwrap_or("IPAddress"), "value": it.value }))
        .collect();
    Said {
        accepted: accepted(gateway, what),
        programmed: Condition::new("Programmed", true, "Programmed", what),
        addresses: addresses.into(),
    }
}

fn managed(gateway: &Gateway, provisioned: Option<&Provisioned>) -> Said {
    let nothing = Provisioned {
        progress: Progress::Pending,
        hostname: None,
        addresses: Vec::new(),
        available: 0,
        problem: String::new(),
    };
    let is = provisioned.unwrap_or(&nothing);
    if let Progress::Invalid(invalid) = &is.progress {
        let mut said = Said::refused(invalid.reason, &invalid.message);
        said.addresses = addresses(is);
        return said;
    }
    let not = |reason, message: String| Condition::new("Programmed", false, reason, message);
    // A controller that begins, or has something to write, knows for a moment less than the last one said.
    if is.progress == Progress::Pending && gateway.status.programmed {
        let mut addresses = addresses(is);
        if addresses.as_array().is_none_or(Vec::is_empty) {
            let before = &gateway.status.addresses;
            let kind = |it: &GatewayAddress| it.type_.clone().unwrap_or_else(|| "IPAddress".to_owned());
            addresses = before.iter().map(|it| json!({ "type": kind(it), "value": it.value })).collect();
        }
        let programmed =
            Condition::new("Programmed", true, "Programmed", "what it is made of is being written again");
        return Said { accepted: accepted(gateway, "it is a waypoint of this mesh"), programmed, addresses };
    }
    let programmed = match &is.progress {
        Progress::Failed(message) => not("NoResources", message.clone()),
        Progress::Pending => not("Pending", "what it is made of is being written".to_owned()),
        Progress::Done | Progress::Invalid(_) if is.hostname.is_none() => {
            not("AddressNotAssigned", "its Service is not known yet".to_owned())
        }
        Progress::Done | Progress::Invalid(_) if is.available == 0 => {
            let problem = if is.problem.is_empty() { String::new() } else { format!(" ({})", is.problem) };
            not(
                "NoResources",
                format!(
                    "its Deployment has no available replica{problem}, so what is bound to it is refused"
                ),
            )
        }
        Progress::Done | Progress::Invalid(_) => {
            let message = format!("{} of its instances are available", is.available);
            Condition::new("Programmed", true, "Programmed", message)
        }
    };
    Said {
        accepted: accepted(gateway, "it is a waypoint of this mesh"),
        programmed,
        addresses: addresses(is),
    }
}

fn addresses(is: &Provisioned) -> Value {
    let ips = is.addresses.iter().map(|ip| json!({ "type": "IPAddress", "value": ip.to_string() }));
    let mut all: Vec<Value> = ips.collect();
    // Headless, it is reached by its name alone.
    if let (true, Some(hostname)) = (all.is_empty(), &is.hostname) {
        all.push(json!({ "type": "Hostname", "value": hostname }));
    }
    all.into()
}

fn accepted(gateway: &Gateway, message: &str) -> Condition {
    let listeners = &gateway.spec.listeners;
    let bad = (0..listeners.len()).find_map(|index| problem(listeners, index).map(|it| (index, it.message)));
    match bad {
        None => Condition::new("Accepted", true, "Accepted", message),
        Some((index, why)) => {
            let message = format!("{message}, without listener {}: {why}", listeners[index].name);
            Condition::new("Accepted", true, "ListenersNotValid", message)
        }
    }
}

fn no_hbone() -> String {
    format!("no listener has protocol {HBONE}, which a waypoint takes connections by")
}

/// Why a listener is not taken.
struct Problem {
    reason: &'static str,
    message: String,
    conflict: bool,
}

fn problem(listeners: &[Listener], index: usize) -> Option<Problem> {
    let listener = &listeners[index];
    let refused = |reason, message: String| Some(Problem { reason, message, conflict: false });
    let other = listeners.iter().enumerate().find(|(other, it)| *other != index && it.port == listener.port);
    if let Some((_, other)) = other.filter(|(_, it)| it.protocol != listener.protocol) {
        let message = format!("listener {} has port {} with another protocol", other.name, other.port);
        return Some(Problem { reason: "ProtocolConflict", message, conflict: true });
    }
    if !gateways::supported(listener) {
        let message = format!("protocol {:?} is not supported: a waypoint has {HBONE}", listener.protocol);
        return refused("UnsupportedProtocol", message);
    }
    let first = listeners.iter().position(gateways::supported);
    if first.is_some_and(|first| first != index) {
        return refused(
            "PortUnavailable",
            format!("a waypoint has one listener of protocol {HBONE}, the first"),
        );
    }
    None
}

fn listener(listeners: &[Listener], index: usize, programmed: bool) -> Value {
    let it = &listeners[index];
    let problem = problem(listeners, index);
    let conflict = match &problem {
        Some(problem) if problem.conflict => {
            Condition::new("Conflicted", true, problem.reason, problem.message.as_str())
        }
        _ => Condition::new("Conflicted", false, "NoConflicts", ""),
    };
    let accepted = match &problem {
        None => Condition::new("Accepted", true, "Accepted", ""),
        Some(problem) => Condition::new("Accepted", false, problem.reason, problem.message.as_str()),
    };
    let of_whole = match (&problem, programmed) {
        (Some(problem), _) => Condition::new("Programmed", false, "Invalid", problem.message.as_str()),
        (None, true) => Condition::new("Programmed", true, "Programmed", ""),
        (None, false) => Condition::new("Programmed", false, "Pending", "the Gateway is not programmed"),
    };
    let asked = it.allowed_routes.iter().flat_map(|routes| &routes.kinds).map(|kind| kind.kind.as_str());
    let asked: Vec<&str> = asked.collect();
    let references = if asked.is_empty() {
        Condition::new("ResolvedRefs", true, "ResolvedRefs", "")
    } else {
        let message =
            format!("routes are for services, and none is attached to a waypoint: {}", asked.join(", "));
        Condition::new("ResolvedRefs", false, "InvalidRouteKinds", message)
    };
    let conditions = [accepted, of_whole, references, conflict];
    json!({
        "name": it.name,
        // None is accepted, so none is attached.
        "attachedRoutes": 0,
        "supportedKinds": [],
        "conditions": conditions.iter().map(Condition::to_json).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
