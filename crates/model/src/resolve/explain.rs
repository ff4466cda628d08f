//! Why a connection goes where it goes: [`resolve`] itself, and what it chose from.

use serde::Serialize;

use super::endpoint::Way;
use super::gateway::{locate, written};
use super::{OutboundFacts, Refusal, Resolved, resolve};
use crate::Str;
use crate::address::{GatewayAddress, NamespacedHostname, NetworkAddress};
use crate::balance::{Observed, rank, usable};
use crate::service::Service;
use crate::snapshot::{Destination, Snapshot};
use crate::workload::Workload;

/// A decision and what it was made from.
#[derive(Clone, Debug)]
pub struct Explanation {
    /// What [`resolve`] returns for the same arguments.
    pub verdict: Result<Resolved, Refusal>,
    /// What is at the address.
    pub addressed: Addressed,
    /// The waypoints that the connection has to go through, with their weights where there are several.
    pub waypoints: Vec<(String, Option<u32>)>,
    /// The endpoints that were there to choose from: of the service, or of its waypoint. Empty where several waypoints share.
    pub endpoints: Vec<Considered>,
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Addressed {
    /// A service.
    Service(NamespacedHostname),
    /// A workload, by uid.
    Workload(Str),
    /// Nobody that is known.
    Unknown,
}

/// One endpoint, as a choice sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Considered {
    /// The workload.
    pub uid: Str,
    /// Its port for the one asked for.
    pub target_port: Option<u16>,
    /// Its weight.
    pub capacity: u32,
    /// How many leading scopes it shares with the client; `None` where the service's rule leaves it out.
    pub rank: Option<usize>,
    /// Connections to it in progress.
    pub load: u32,
    /// Connecting to it failed a moment ago.
    pub cooling: bool,
    /// Why it could not be chosen; `None` where it could.
    pub why_not: Option<&'static str>,
}

/// [`resolve`], with what it chose from.
pub fn explain(
    snapshot: &Snapshot,
    facts: &OutboundFacts<'_>,
    observed: &dyn Observed,
    random: &mut dyn FnMut(u64) -> u64,
) -> Explanation {
    let verdict = resolve(snapshot, facts, observed, random);
    let address = facts.original_destination.ip().to_canonical();
    let address = NetworkAddress { network: facts.place.network.clone(), address };
    let (addressed, service, bound) = match snapshot.destination(&address, &facts.source.namespace) {
        Destination::Service(service) => {
            (Addressed::Service(service.key.clone()), Some(service), service.waypoint.as_deref())
        }
        Destination::Workload(workload) => {
            (Addressed::Workload(workload.uid.clone()), None, workload.waypoint.as_deref())
        }
        Destination::Unknown => (Addressed::Unknown, None, None),
    };
    let weighted = service.map_or(&[][..], |service| &service.weighted_waypoints);
    let waypoints = match weighted {
        [] => bound.iter().map(|gateway| (written(gateway), None)).collect(),
        some => some.iter().map(|(gateway, weight)| (written(gateway), Some(*weight))).collect(),
    };
    let port = facts.original_destination.port();
    let endpoints = match (weighted, bound, service) {
        ([], Some(gateway), _) => instances(snapshot, facts, observed, gateway),
        ([], None, Some(service)) => all(snapshot, facts, observed, service, &|workload| {
            let target = workload.services.get(&service.key)?.target(port);
            Some((target, Way::to(workload, service, facts, snapshot).why_not()))
        }),
        _ => Vec::new(),
    };
    Explanation { verdict, addressed, waypoints, endpoints }
}

fn instances(
    snapshot: &Snapshot,
    facts: &OutboundFacts<'_>,
    observed: &dyn Observed,
    gateway: &GatewayAddress,
) -> Vec<Considered> {
    let Destination::Service(service) = locate(snapshot, facts, gateway) else { return Vec::new() };
    all(snapshot, facts, observed, service, &|workload| {
        let ports = workload.services.get(&service.key)?;
        let away = (workload.network != facts.place.network).then_some("on another network");
        let why_not = away.or(workload.addresses.is_empty().then_some("no address"));
        Some((Some(ports.target(gateway.hbone_port).unwrap_or(gateway.hbone_port)), why_not))
    })
}

type Offer<'a> = &'a dyn Fn(&Workload) -> Option<(Option<u16>, Option<&'static str>)>;

fn all(
    snapshot: &Snapshot,
    facts: &OutboundFacts<'_>,
    observed: &dyn Observed,
    service: &Service,
    offer: Offer<'_>,
) -> Vec<Considered> {
    let balancing = &service.load_balancing;
    let one = |workload: &std::sync::Arc<Workload>| {
        let (target_port, no_way) = offer(workload)?;
        let rank = rank(workload, balancing, facts.place);
        let why_not = [
            (target_port.is_none(), "does not offer the port"),
            (!usable(workload, balancing), "not ready"),
            (workload.capacity == 0, "weight 0"),
            (facts.exclude.contains(&workload.uid), "failed for this connection"),
            (rank.is_none(), "not near enough"),
        ];
        let why_not = why_not.iter().find(|(is, _)| *is).map(|(_, why)| *why).or(no_way);
        Some(Considered {
            uid: workload.uid.clone(),
            target_port,
            capacity: workload.capacity,
            rank,
            load: observed.load(workload),
            cooling: target_port.is_some_and(|port| observed.cooling(workload, port)),
            why_not,
        })
    };
    snapshot.endpoints(&service.key).filter_map(one).collect()
}
