//! Which waypoint an object is bound to (W01 to W06, W11), and what became of that (D44).
//!
//! A binding that was asked for and cannot be had refuses (design: fail closed): it is sent under a name that no service has, or
//! under the one that the waypoint will have. Only [`labels::WAYPOINT_FOR`] takes a binding away, since it says that the
//! waypoint is not for such traffic.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use culvert_k8s_api::gateway::{Gateway, GatewayClass};
use culvert_k8s_api::labels;
use culvert_k8s_api::meta::{ObjectMeta, StringMap};
use culvert_k8s_api::object::Kind;
use culvert_proto::workload::{GatewayAddress, NamespacedHostname, WeightedWaypoint, gateway_address};

use super::MeshSettings;
use super::services::network_address;
use super::view::View;
use crate::gateways::{self, Owner};
use crate::index::World;

/// What is sent through a waypoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    /// What is addressed to a service.
    Service,
    /// What is addressed to a workload itself.
    Workload,
}

/// What became of a binding: the reason of condition `istio.io/WaypointBound`, and the rest for a person.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bound {
    /// Whether what was asked for is in force.
    pub accepted: bool,
    /// `WaypointAccepted`, `WaypointIsNotReady`, `AttachmentDenied`, `UnsupportedTrafficType`, `CanaryInvalidWeight` or
    /// `CanarySameAsPrimary`.
    pub reason: &'static str,
    /// Which waypoint, and what happens to traffic.
    pub message: String,
    /// What the proxies are told; `None` if they are told of no waypoint.
    pub address: Option<GatewayAddress>,
    /// The same with a canary: both, with their shares of a hundred. Empty without.
    pub weighted: Vec<WeightedWaypoint>,
}

/// An object that may ask for a waypoint.
#[derive(Clone, Copy, Debug)]
pub struct Asks<'a> {
    /// Its labels, its annotations and its namespace.
    pub meta: &'a ObjectMeta,
    /// What it is.
    pub traffic: Traffic,
}

/// `(namespace, name)` of the Gateway that labels ask for, the object's own before its namespace's (W02). The flag says that it was
/// the object itself that asked.
pub fn asked<'a>(
    of: &'a StringMap,
    inherited: Option<&'a StringMap>,
    namespace: &'a str,
) -> Option<(&'a str, &'a str, bool)> {
    let own = of.contains_key(labels::USE_WAYPOINT);
    let source = if own { of } else { inherited? };
    let name = source.get(labels::USE_WAYPOINT)?.as_str();
    if name.is_empty() || name == labels::WAYPOINT_NONE {
        return None;
    }
    let home = source.get(labels::USE_WAYPOINT_NAMESPACE).map_or(namespace, String::as_str);
    Some((home, name, own))
}

impl Bound {
    fn not(reason: &'static str, message: String, address: Option<GatewayAddress>) -> Self {
        Self { accepted: false, reason, message, address, weighted: Vec::new() }
    }
}

/// The Gateways of a world.
#[derive(Default)]
pub(super) struct Gateways<'a> {
    pub gateways: BTreeMap<(&'a str, &'a str), &'a Gateway>,
    pub classes: BTreeMap<&'a str, &'a GatewayClass>,
}

impl View<'_> {
    /// What the proxies are told of an object's waypoint: the one, and both where a canary has a share.
    pub(super) fn waypoint(&self, asks: Asks<'_>) -> (Option<GatewayAddress>, Vec<WeightedWaypoint>) {
        self.bound(asks).map_or((None, Vec::new()), |bound| (bound.address, bound.weighted))
    }

    /// The same and why; `None` if nothing was asked for.
    pub(super) fn bound(&self, asks: Asks<'_>) -> Option<Bound> {
        let (meta, namespace) = (asks.meta, asks.meta.namespace.as_str());
        if self.is_waypoint(namespace, &meta.labels) {
            return None;
        }
        let (home, name, own) = asked(&meta.labels, self.namespace_labels(namespace), namespace)?;
        let bound = self.bound_by_name(home, name, own, asks)?;
        let canary = bound.accepted && asks.traffic == Traffic::Service;
        Some(if canary { self.with_canary(bound, (home, name), asks) } else { bound })
    }

    fn bound_by_name(&self, home: &str, name: &str, own: bool, asks: Asks<'_>) -> Option<Bound> {
        let Some(gateway) = self.gateways.gateways.get(&(home, name)) else {
            // What a waypoint is for is not known before it is there; for services, unless it says otherwise. So a pod that only
            // its namespace binds is not bound yet.
            if asks.traffic == Traffic::Workload && !own {
                return None;
            }
            let message =
                format!("there is no Gateway {home}/{name}: connections are refused until there is");
            // Not by the name that the waypoint had: until it is gone too it would let pass what no policy is left for.
            let host = format!("no-gateway.{}", self.service_host(home, name));
            let address = by_name(home, host, gateways::HBONE_PORT);
            return Some(Bound::not("WaypointIsNotReady", message, Some(address)));
        };
        if !self.serves(gateway, asks.traffic) {
            // For the one of both that a namespace's label is not about there is nothing to say.
            return own.then(|| self.unsupported(gateway, asks.traffic));
        }
        Some(self.bound_to(gateway, asks))
    }

    /// W09: a share of the connections goes through a second waypoint. One that cannot be used has none, which is said.
    fn with_canary(&self, bound: Bound, primary: (&str, &str), asks: Asks<'_>) -> Bound {
        let Some((by, home, name)) = self.canary(asks.meta) else { return bound };
        let without = |reason, why: String| {
            let message = format!(
                "the canary is not used, all connections go through Gateway {}/{}: {why}",
                primary.0, primary.1
            );
            Bound { accepted: false, reason, message, ..bound.clone() }
        };
        if (home, name) == primary {
            return without("CanarySameAsPrimary", "it is the same Gateway".to_owned());
        }
        let weight = by.annotations.get(labels::USE_WAYPOINT_CANARY_WEIGHT).map_or("", String::as_str);
        let Some(share) = weight.parse::<u32>().ok().filter(|share| *share <= 100) else {
            let annotation = labels::USE_WAYPOINT_CANARY_WEIGHT;
            let why = format!("annotation {annotation} {weight:?} is no whole number from 0 to 100");
            return without("CanaryInvalidWeight", why);
        };
        let Some(canary) = self.bound_by_name(home, name, true, asks) else { return bound };
        if !canary.accepted {
            // What happens to connections there is not what happens here.
            let why = canary.message.split(": connections").next().unwrap_or_default();
            return without(canary.reason, why.to_owned());
        }
        let message = format!("{}, {share} of 100 connections to Gateway {home}/{name}", bound.message);
        let part = |destination: &Option<GatewayAddress>, weight| WeightedWaypoint {
            destination: destination.clone(),
            weight,
        };
        let weighted = vec![part(&bound.address, 100 - share), part(&canary.address, share)];
        Bound { message, weighted, ..bound }
    }

    /// Which second waypoint an object's labels ask for, or its namespace's: the one that asks, and the Gateway's namespace and name.
    fn canary<'m>(&'m self, meta: &'m ObjectMeta) -> Option<(&'m ObjectMeta, &'m str, &'m str)> {
        let namespace = meta.namespace.as_str();
        let of_namespace = self.namespaces.get(namespace).copied();
        let asking = |meta: &&ObjectMeta| meta.labels.contains_key(labels::USE_WAYPOINT_CANARY);
        let by = [Some(meta), of_namespace].into_iter().flatten().find(asking)?;
        let name = by.labels[labels::USE_WAYPOINT_CANARY].as_str();
        if name.is_empty() || name == labels::WAYPOINT_NONE {
            return None;
        }
        let home = by.labels.get(labels::USE_WAYPOINT_CANARY_NAMESPACE).map_or(namespace, String::as_str);
        Some((by, home, name))
    }

    /// The Gateways of ours, as `namespace/name`, whose waypoints are told of what is for a service: the one that it is bound to and
    /// its canary. Also before they are ready, so that they know all of it from the first request on.
    pub(super) fn serving(&self, meta: &ObjectMeta) -> BTreeSet<String> {
        let namespace = meta.namespace.as_str();
        if self.is_waypoint(namespace, &meta.labels) {
            return BTreeSet::new();
        }
        let Some((home, name, _)) = asked(&meta.labels, self.namespace_labels(namespace), namespace) else {
            return BTreeSet::new();
        };
        let canary = self.canary(meta).map(|(_, home, name)| (home, name));
        let serves = |(home, name): &(&str, &str)| {
            let Some(gateway) = self.gateways.gateways.get(&(*home, *name)) else { return false };
            let admits = gateways::hbone(gateway).is_some_and(|(listener, _)| {
                listener.admits(home, namespace, self.namespace_labels(namespace))
            });
            admits && self.serves(gateway, Traffic::Service) && self.owner(gateway) == Owner::Us
        };
        let both = [Some((home, name)), canary].into_iter().flatten();
        both.filter(serves).map(|(home, name)| format!("{home}/{name}")).collect()
    }

    /// Namespace and name of the Gateway that a service asks for, whatever became of that.
    pub(super) fn wanted<'m>(&'m self, meta: &'m ObjectMeta) -> Option<(&'m str, &'m str)> {
        let namespace = meta.namespace.as_str();
        asked(&meta.labels, self.namespace_labels(namespace), namespace).map(|(home, name, _)| (home, name))
    }

    /// Whether there is somebody at a Gateway, given as `namespace/name`.
    pub(super) fn is_programmed(&self, gateway: &str) -> bool {
        let gateway = gateway.split_once('/').and_then(|key| self.gateways.gateways.get(&key));
        gateway.is_some_and(|it| it.status.programmed)
    }

    /// Whose a Gateway is.
    pub(super) fn owner(&self, gateway: &Gateway) -> Owner {
        let class = gateway.spec.gateway_class_name.as_str();
        gateways::owner(class, self.gateways.classes.get(class).copied(), self.settings.compat)
    }

    fn bound_to(&self, gateway: &Gateway, asks: Asks<'_>) -> Bound {
        let (home, name) = (gateway.metadata.namespace.as_str(), gateway.metadata.name.as_str());
        let namespace = asks.meta.namespace.as_str();
        let refused = |reason, why: String, hint: &str| {
            // A name that nothing has, and that says why to whoever reads that it is not known.
            let host = format!("{hint}.{}", self.service_host(home, name));
            let address = by_name(home, host, gateways::HBONE_PORT);
            Bound::not(reason, format!("{why}: connections are refused"), Some(address))
        };
        let Some((listener, port)) = gateways::hbone(gateway) else {
            let why =
                format!("Gateway {home}/{name} has no listener of protocol HBONE, so it is no waypoint");
            return refused("WaypointIsNotReady", why, "no-hbone-listener");
        };
        if !listener.admits(home, namespace, self.namespace_labels(namespace)) {
            let why = format!(
                "Gateway {home}/{name} does not admit namespace {namespace} (allowedRoutes of listener {})",
                listener.name
            );
            return refused("AttachmentDenied", why, "attachment-denied");
        }
        if self.owner(gateway) == Owner::Unknown {
            let class = &gateway.spec.gateway_class_name;
            let why = format!("Gateway {home}/{name} has class {class}, which does not exist");
            return refused("WaypointIsNotReady", why, "no-class");
        }
        let address = Some(self.address_of(gateway, port));
        if gateway.status.programmed {
            let message = format!("bound to Gateway {home}/{name}");
            let weighted = Vec::new();
            return Bound { accepted: true, reason: "WaypointAccepted", message, address, weighted };
        }
        let message =
            format!("Gateway {home}/{name} is not programmed yet: connections are refused until it is");
        Bound::not("WaypointIsNotReady", message, address)
    }

    fn unsupported(&self, gateway: &Gateway, traffic: Traffic) -> Bound {
        let what = match traffic {
            Traffic::Service => "a service",
            Traffic::Workload => "a workload",
        };
        let message = format!(
            "Gateway {}/{} is for {} ({}), so what is addressed to {what} does not go through it",
            gateway.metadata.namespace,
            gateway.metadata.name,
            self.purpose(gateway),
            labels::WAYPOINT_FOR
        );
        Bound::not("UnsupportedTrafficType", message, None)
    }

    /// W04: the Gateway's label, else its class's, else `service`.
    fn purpose<'g>(&'g self, gateway: &'g Gateway) -> &'g str {
        let class = self.gateways.classes.get(gateway.spec.gateway_class_name.as_str());
        let of_class = || class?.metadata.labels.get(labels::WAYPOINT_FOR);
        let purpose = gateway.metadata.labels.get(labels::WAYPOINT_FOR).or_else(of_class);
        purpose.map_or("service", String::as_str)
    }

    /// A purpose that is not known is none that takes a binding away.
    fn serves(&self, gateway: &Gateway, traffic: Traffic) -> bool {
        match (self.purpose(gateway), traffic) {
            ("service", _) => traffic == Traffic::Service,
            ("workload", _) => traffic == Traffic::Workload,
            ("none", _) => false,
            _ => true,
        }
    }

    /// W11: what is made for a waypoint has none itself.
    fn is_waypoint(&self, namespace: &str, of: &StringMap) -> bool {
        let name = of.get(labels::GATEWAY_NAME);
        let gateway = name.and_then(|name| self.gateways.gateways.get(&(namespace, name.as_str())));
        gateway.is_some_and(|it| it.hbone().is_some())
    }

    /// Where a waypoint is reached: by the name of its Service if that is ours to make, else as its addresses say.
    fn address_of(&self, gateway: &Gateway, port: u16) -> GatewayAddress {
        let home = gateway.metadata.namespace.as_str();
        let addresses = match self.owner(gateway) {
            Owner::Us => &gateway.spec.addresses,
            Owner::Other | Owner::Unknown => &gateway.status.addresses,
        };
        for address in addresses {
            if let Some(ip) = address.value.parse::<IpAddr>().ok().filter(|_| address.is_ip()) {
                let address = network_address(&self.settings.network, ip);
                let destination = Some(gateway_address::Destination::Address(address));
                return GatewayAddress { destination, hbone_mtls_port: port.into() };
            }
            if address.is_hostname() && !address.value.is_empty() {
                return by_name(&self.namespace_of(&address.value, home), address.value.clone(), port);
            }
        }
        let name = gateways::name_of(gateway).unwrap_or(&gateway.metadata.name);
        by_name(home, self.service_host(home, name), port)
    }

    /// Services are told apart by namespace and name: that of a service of the cluster is in its name.
    fn namespace_of(&self, hostname: &str, home: &str) -> String {
        let rest = hostname.strip_suffix(self.settings.cluster_domain.as_str());
        let rest = rest.and_then(|rest| rest.strip_suffix(".svc."));
        rest.and_then(|rest| rest.rsplit_once('.')).map_or(home, |(_, namespace)| namespace).to_owned()
    }
}

/// What is bound, and whether.
#[derive(Clone, Debug)]
pub struct Binding<'a> {
    /// `Service`, `ServiceEntry` or `WorkloadEntry`.
    pub kind: Kind,
    /// The object's.
    pub metadata: &'a ObjectMeta,
    /// What became of it.
    pub bound: Bound,
}

/// Kinds that a binding depends on.
pub const BOUND_BY: [Kind; 6] = [
    Kind::Namespace,
    Kind::Service,
    Kind::ServiceEntry,
    Kind::WorkloadEntry,
    Kind::Gateway,
    Kind::GatewayClass,
];

/// Every binding that somebody asked for and that has a status to say it in (D44).
pub fn bindings<'a>(world: &'a World, settings: &'a MeshSettings) -> Vec<Binding<'a>> {
    let view = View::of(world, settings, &BOUND_BY);
    let mut all = Vec::new();
    let mut add = |kind, metadata: &'a ObjectMeta, traffic| {
        let asks = Asks { meta: metadata, traffic };
        if let Some(bound) = view.bound(asks) {
            all.push(Binding { kind, metadata, bound });
        }
    };
    for service in view.services.values() {
        add(Kind::Service, &service.metadata, Traffic::Service);
    }
    for entry in view.service_entries.values() {
        add(Kind::ServiceEntry, &entry.metadata, Traffic::Service);
    }
    for entry in view.workload_entries.values() {
        add(Kind::WorkloadEntry, &entry.metadata, Traffic::Workload);
    }
    all
}

fn by_name(namespace: &str, hostname: String, port: u16) -> GatewayAddress {
    let destination = NamespacedHostname { namespace: namespace.to_owned(), hostname };
    GatewayAddress {
        destination: Some(gateway_address::Destination::Hostname(destination)),
        hbone_mtls_port: port.into(),
    }
}
