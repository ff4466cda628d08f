//! Which waypoint an object is bound to (W01 to W06, W11), and what became of that (D44).
//!
//! A binding that was asked for and cannot be had refuses (design: fail closed): it is sent under a name that no service has, or
//! under the one that the waypoint will have. Only [`labels::WAYPOINT_FOR`] takes a binding away, since it says that the
//! waypoint is not for such traffic.

use std::collections::BTreeMap;
use std::net::IpAddr;

use culvert_k8s_api::gateway::{Gateway, GatewayClass};
use culvert_k8s_api::labels;
use culvert_k8s_api::meta::{ObjectMeta, StringMap};
use culvert_k8s_api::object::Kind;
use culvert_proto::workload::{GatewayAddress, NamespacedHostname, gateway_address};

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
    /// Whether the waypoint is in use: what is sent goes through it.
    pub accepted: bool,
    /// `WaypointAccepted`, `WaypointIsNotReady`, `AttachmentDenied` or `UnsupportedTrafficType`.
    pub reason: &'static str,
    /// Which waypoint, and what happens to traffic.
    pub message: String,
    /// What the proxies are told; `None` if they are told of no waypoint.
    pub address: Option<GatewayAddress>,
}

/// The labels of an object that ask for a waypoint.
#[derive(Clone, Copy, Debug)]
pub struct Asks<'a> {
    /// The object's own labels.
    pub labels: &'a StringMap,
    /// Its namespace.
    pub namespace: &'a str,
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

/// The Gateways of a world.
#[derive(Default)]
pub(super) struct Gateways<'a> {
    pub gateways: BTreeMap<(&'a str, &'a str), &'a Gateway>,
    pub classes: BTreeMap<&'a str, &'a GatewayClass>,
}

impl View<'_> {
    /// What the proxies are told of an object's waypoint.
    pub(super) fn waypoint(&self, asks: Asks<'_>) -> Option<GatewayAddress> {
        self.bound(asks)?.address
    }

    /// The same and why; `None` if nothing was asked for.
    pub(super) fn bound(&self, asks: Asks<'_>) -> Option<Bound> {
        let of_namespace = self.namespace_labels(asks.namespace);
        let (home, name, own) = asked(asks.labels, of_namespace, asks.namespace)?;
        if self.is_waypoint(asks.namespace, asks.labels) {
            return None;
        }
        let Some(gateway) = self.gateways.gateways.get(&(home, name)) else {
            // What a waypoint is for is not known before it is there; for services, unless it says otherwise. So a pod that only
            // its namespace binds is not bound yet.
            if asks.traffic == Traffic::Workload && !own {
                return None;
            }
            let message =
                format!("there is no Gateway {home}/{name}: connections are refused until there is");
            return Some(Bound {
                accepted: false,
                reason: "WaypointIsNotReady",
                message,
                address: Some(by_name(home, self.service_host(home, name), gateways::HBONE_PORT)),
            });
        };
        if !self.serves(gateway, asks.traffic) {
            // For the one of both that a namespace's label is not about there is nothing to say.
            return own.then(|| self.unsupported(gateway, asks.traffic));
        }
        Some(self.bound_to(gateway, asks, of_namespace))
    }

    fn bound_to(&self, gateway: &Gateway, asks: Asks<'_>, of_namespace: Option<&StringMap>) -> Bound {
        let (home, name) = (gateway.metadata.namespace.as_str(), gateway.metadata.name.as_str());
        let refused = |reason, why: String, hint: &str| Bound {
            accepted: false,
            reason,
            message: format!("{why}: connections are refused"),
            // A name that nothing has, and that says why to whoever reads that it is not known.
            address: Some(by_name(
                home,
                format!("{hint}.{}", self.service_host(home, name)),
                gateways::HBONE_PORT,
            )),
        };
        let Some((listener, port)) = gateways::hbone(gateway) else {
            let why =
                format!("Gateway {home}/{name} has no listener of protocol HBONE, so it is no waypoint");
            return refused("WaypointIsNotReady", why, "no-hbone-listener");
        };
        if !listener.admits(home, asks.namespace, of_namespace) {
            let why = format!(
                "Gateway {home}/{name} does not admit namespace {} (allowedRoutes of listener {})",
                asks.namespace, listener.name
            );
            return refused("AttachmentDenied", why, "attachment-denied");
        }
        let address = self.address_of(gateway, port);
        if gateway.status.programmed {
            let message = format!("bound to Gateway {home}/{name}");
            return Bound { accepted: true, reason: "WaypointAccepted", message, address: Some(address) };
        }
        let message =
            format!("Gateway {home}/{name} is not programmed yet: connections are refused until it is");
        Bound { accepted: false, reason: "WaypointIsNotReady", message, address: Some(address) }
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
        Bound { accepted: false, reason: "UnsupportedTrafficType", message, address: None }
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
        let class = gateway.spec.gateway_class_name.as_str();
        let ours = gateways::owner(class, self.gateways.classes.get(class).copied(), self.settings.compat);
        let addresses = match ours {
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
        let asks = Asks { labels: &metadata.labels, namespace: &metadata.namespace, traffic };
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
