//! Which services routes are for, at which ports, and which of several kinds counts there (GEP-1294).
//!
//! A route without a port is for every port of its service. A message without a port is for every port that no message names, so
//! where another route names a port, the message of the first is also sent for that port: both count there, as they were written.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use culvert_k8s_api::core::{Protocol, ServiceType};
use culvert_k8s_api::meta::ObjectMeta;
use culvert_k8s_api::routes::{GROUP, ParentRef, Route, RouteType};
use culvert_proto::waypoint as proto;

use super::backends::{From, REASONS, Unresolved};
use super::convert::{self, Converted};
use super::{ParentStatus, RouteName, Routed, Verdict};
use crate::gateways::Owner;
use crate::translate::view::View;

/// What is said of several faults or references, up to here.
const MAX_SAID: usize = 5;

/// A route that is for a service.
struct Attached<'a> {
    route: &'a Route,
    parent: &'a ParentRef,
    /// The parent's kind, namespace and name.
    object: (&'a str, &'a str, &'a str),
    /// Namespace and host name.
    service: (String, String),
    /// 0 for every port.
    port: u32,
    /// The Gateways that serve it.
    gateways: BTreeSet<String>,
}

/// A service, to those that can be told apart only by their kind: the consumer's namespace, empty of a producer route.
type Audience<'a> = (&'a (String, String), &'a str);

/// Translates every route.
pub(super) fn route_all(view: &View<'_>) -> Routed {
    let mut routed = Routed::default();
    let mut attached = Vec::new();
    for route in &view.routes {
        let mut statuses = Vec::new();
        for parent in &route.spec.parents {
            match attach(view, route, parent) {
                Some(Ok(it)) => attached.push(it),
                Some(Err(refused)) => {
                    let accepted = Verdict::no("NoMatchingParent", refused);
                    let resolved = Verdict::yes("ResolvedRefs", String::new());
                    statuses.push(ParentStatus { parent: parent.clone(), accepted, resolved, partly: None });
                }
                None => {}
            }
        }
        if !statuses.is_empty() {
            routed.status.insert(name_of(route), statuses);
        }
    }
    let ports = named_ports(&attached);
    let ranks = ranks(&attached, &ports);
    for it in &attached {
        let from = From { view, route: it.route, parent: it.object };
        let converted = convert::route(&from, (&it.service.0, &it.service.1));
        let effective: Vec<u32> = effective(it, &ports)
            .filter(|port| ranks.get(&(audience(it), *port)) == Some(&rank(it.route.of)))
            .collect();
        for port in &effective {
            let message = Arc::new(proto::Route { port: *port, ..converted.message.clone() });
            for gateway in &it.gateways {
                routed
                    .told
                    .entry(gateway.clone())
                    .or_default()
                    .insert(resource(&message), Arc::clone(&message));
            }
        }
        let said = status(view, it, &converted, effective.is_empty());
        routed.status.entry(name_of(it.route)).or_default().push(said);
    }
    // Those that were refused were found first: in the order in which the route has them.
    for route in &view.routes {
        if let Some(statuses) = routed.status.get_mut(&name_of(route)) {
            statuses.sort_by_key(|it| route.spec.parents.iter().position(|parent| *parent == it.parent));
        }
    }
    routed
}

fn name_of(route: &Route) -> RouteName {
    (route.of, route.metadata.namespace.clone(), route.metadata.name.clone())
}

/// `None` if the parent is not ours to judge, else the service, or why there is none.
fn attach<'a>(
    view: &View<'a>,
    route: &'a Route,
    parent: &'a ParentRef,
) -> Option<Result<Attached<'a>, String>> {
    let namespace = parent.namespace.as_deref().unwrap_or(&route.metadata.namespace);
    let key = (namespace, parent.name.as_str());
    let what = format!("{} {namespace}/{}", parent.kind, parent.name);
    let attached = |meta: &ObjectMeta, hostname: String, port: u32| Attached {
        route,
        parent,
        object: (&parent.kind, namespace, &parent.name),
        service: (namespace.to_owned(), hostname),
        port,
        gateways: view.serving(meta),
    };
    let of_ports = |ports: &[(u32, Option<&str>)]| port(parent, &what, ports);
    Some(match (parent.group.as_str(), parent.kind.as_str()) {
        ("", "Service") => match view.services.get(&key) {
            None => Err(format!("{what} does not exist")),
            Some(it) if it.spec.type_ == ServiceType::ExternalName || it.is_headless() => {
                Err(format!("{what} has no address of its own, so nothing is addressed to it"))
            }
            Some(it) => {
                let tcp = it.spec.ports.iter().filter(|it| it.protocol == Protocol::Tcp);
                let ports: Vec<_> = tcp.map(|it| (it.port.get().into(), it.name.as_deref())).collect();
                let hostname = view.service_host(namespace, &parent.name);
                of_ports(&ports).map(|port| attached(&it.metadata, hostname, port))
            }
        },
        ("networking.istio.io", "ServiceEntry") => match view.service_entries.get(&key) {
            None => Err(format!("{what} does not exist")),
            Some(it) => {
                let ports: Vec<_> =
                    it.spec.ports.iter().map(|it| (it.number.get().into(), Some(it.name.as_str()))).collect();
                let hostname = it.spec.hosts.first().cloned().unwrap_or_default();
                of_ports(&ports).map(|port| attached(&it.metadata, hostname, port))
            }
        },
        (GROUP, "Gateway") => {
            let gateway = view.gateways.gateways.get(&key)?;
            if view.owner(gateway) != Owner::Us {
                return None;
            }
            Err(format!(
                "{what} is a waypoint, which takes routes by the services that it serves: name a Service"
            ))
        }
        _ => return None,
    })
}

/// The port that a parent is meant at, 0 for all.
fn port(parent: &ParentRef, what: &str, ports: &[(u32, Option<&str>)]) -> Result<u32, String> {
    let by_name = match &parent.section_name {
        Some(name) => {
            let found = ports.iter().find(|(_, of)| *of == Some(name.as_str()));
            Some(found.map(|(port, _)| *port).ok_or_else(|| format!("{what} has no port of name {name}"))?)
        }
        None => None,
    };
    let by_number = match parent.port.map(|port| u32::from(port.get())) {
        Some(port) if ports.iter().any(|(of, _)| *of == port) => Some(port),
        Some(port) => return Err(format!("{what} has no TCP port {port}")),
        None => None,
    };
    match (by_name, by_number) {
        (Some(name), Some(number)) if name != number => {
            Err(format!("{what}: port {number} and sectionName are two different ports"))
        }
        (name, number) => Ok(name.or(number).unwrap_or(0)),
    }
}

fn audience<'s>(it: &'s Attached<'_>) -> Audience<'s> {
    let own = it.route.metadata.namespace.as_str();
    (&it.service, if own == it.service.0 { "" } else { own })
}

/// The ports of each service that any route names.
fn named_ports<'s>(attached: &'s [Attached<'_>]) -> BTreeMap<&'s (String, String), BTreeSet<u32>> {
    let mut ports: BTreeMap<_, BTreeSet<u32>> = BTreeMap::new();
    for it in attached.iter().filter(|it| it.port != 0) {
        ports.entry(&it.service).or_default().insert(it.port);
    }
    ports
}

/// Where a route counts: at its port, or at every one, those that others name among them.
fn effective<'p>(
    it: &Attached<'_>,
    ports: &'p BTreeMap<&(String, String), BTreeSet<u32>>,
) -> impl Iterator<Item = u32> + use<'p> {
    let others = ports.get(&it.service).into_iter().flatten().copied();
    let named = it.port;
    std::iter::once(named).chain(others.filter(move |_| named == 0))
}

/// GEP-1294, "Route types": of several kinds at one port the first counts.
fn rank(of: RouteType) -> u8 {
    match of {
        RouteType::Grpc => 0,
        RouteType::Http => 1,
        RouteType::Tls => 2,
        RouteType::Tcp => 3,
    }
}

fn ranks<'s>(
    attached: &'s [Attached<'_>],
    ports: &BTreeMap<&(String, String), BTreeSet<u32>>,
) -> BTreeMap<(Audience<'s>, u32), u8> {
    let mut ranks = BTreeMap::new();
    for it in attached {
        for port in effective(it, ports) {
            let best = ranks.entry((audience(it), port)).or_insert(u8::MAX);
            *best = rank(it.route.of).min(*best);
        }
    }
    ranks
}

/// The name of a message.
pub(super) fn resource(route: &proto::Route) -> String {
    let proto::Route { kind, namespace, name, service_namespace, service_hostname, port, .. } = route;
    format!("{kind}/{namespace}/{name}/{service_namespace}/{service_hostname}/{port}")
}

fn status(view: &View<'_>, it: &Attached<'_>, converted: &Converted, shadowed: bool) -> ParentStatus {
    let who = if it.gateways.is_empty() {
        "no waypoint of this mesh serves it, so nothing carries the route out".to_owned()
    } else {
        let all: Vec<&str> = it.gateways.iter().map(String::as_str).collect();
        let waiting: Vec<&str> = all.iter().copied().filter(|it| !view.is_programmed(it)).collect();
        let more = if waiting.is_empty() {
            String::new()
        } else {
            format!("; not programmed yet: {}", waiting.join(", "))
        };
        format!("carried out by waypoint {}{more}", all.join(", "))
    };
    let (broken, rules) = (&converted.broken, converted.rules);
    let faults = || {
        let one = |(index, why): &(usize, String)| format!("rule {index}: {why}");
        broken.iter().take(MAX_SAID).map(one).collect::<Vec<_>>().join("; ")
    };
    let outside = &it.route.spec.faults;
    let answered = "what they match is answered with an error";
    let accepted = if shadowed {
        let message = "a route of a kind that comes before it is for the same ports: GRPCRoute, HTTPRoute, TLSRoute, TCPRoute is the order";
        Verdict::no("Conflicted", message.to_owned())
    } else if !outside.is_empty() || (rules > 0 && broken.len() == rules) {
        let why = if broken.is_empty() { outside[0].to_string() } else { faults() };
        Verdict::no("UnsupportedValue", format!("no rule can be carried out, and {answered}: {why}"))
    } else {
        Verdict::yes("Accepted", who)
    };
    let partly = (accepted.is && !broken.is_empty()).then(|| {
        // The first words are the Gateway API's.
        format!("Dropped Rule: {answered}: {}", faults())
    });
    let resolved = resolved(&converted.unresolved);
    ParentStatus { parent: it.parent.clone(), accepted, resolved, partly }
}

fn resolved(unresolved: &[Unresolved]) -> Verdict {
    let reason = REASONS.into_iter().find(|reason| unresolved.iter().any(|it| it.reason == *reason));
    let Some(reason) = reason else { return Verdict::yes("ResolvedRefs", String::new()) };
    let words: BTreeSet<&str> = unresolved.iter().map(|it| it.message.as_str()).collect();
    Verdict::no(reason, words.into_iter().take(MAX_SAID).collect::<Vec<_>>().join("; "))
}
