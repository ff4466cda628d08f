//! Where an outgoing connection goes. One decision, from one snapshot (Z29-Z45); nothing is dialled here.
//!
//! ```text
//! own port on the pod itself          -> refused: SelfCall
//! a service's address   bound         -> the waypoint, asked for the address as it is (it balances)
//!                       passthrough   -> as if the service were not there, but without workload waypoint
//!                       otherwise     -> one of its endpoints, or refused: never passed through
//! a workload's address  bound         -> its waypoint
//!                       otherwise     -> the workload
//! anything else                       -> passed through as it is
//! ```

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use smallvec::SmallVec;

mod endpoint;
mod explain;
mod gateway;

use crate::Str;
use crate::address::NetworkAddress;
use crate::balance::{Candidate, Client, Observed, Place, pick};
use crate::identity::Identity;
use crate::outcome::Reason;
use crate::service::{LoadBalancingMode, Service};
use crate::snapshot::{Destination, Snapshot};
use crate::workload::{TunnelProtocol, Workload};

pub use explain::{Addressed, Considered, Explanation, explain};

/// What is known of an outgoing connection.
#[derive(Clone, Copy, Debug)]
pub struct OutboundFacts<'a> {
    /// The workload whose namespace the socket is in.
    pub source: &'a Workload,
    /// The address that the application connected from: a service that keeps clients knows them by it.
    pub client: IpAddr,
    /// Where the application connected to.
    pub original_destination: SocketAddr,
    /// Workloads (uid) that must not be chosen: they already failed for this connection. A refusal is then the last word.
    pub exclude: &'a [Str],
    /// Where the source is; its network is the one on which `original_destination` is looked up.
    pub place: &'a Place,
    /// The ports that the proxy listens on inside the pod: 15001, 15006, 15008 and 15053.
    pub own_ports: &'a [u16],
}

/// Where a connection goes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "one a connection, and the large one is the usual one")]
pub enum Resolved {
    /// Not ours: as it is, without encryption (Z37). Also where a service asks for it and its address is nobody we know (Z36).
    Passthrough {
        /// The original destination.
        destination: SocketAddr,
    },
    /// To a workload that is not in the mesh, as plain TCP (Z41).
    Plain {
        /// The workload's address and port.
        destination: SocketAddr,
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was addressed.
        service: Option<Arc<Service>>,
    },
    /// Through HBONE.
    Tunnel(TunnelRoute),
    /// To a workload that has a name instead of an address (Z42): look it up, then [`NeedsDns::with_address`].
    NeedsDns(NeedsDns),
}

/// A way through a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelRoute {
    /// Where to open the tunnel: the peer's address and HBONE port.
    pub peer: SocketAddr,
    /// `:authority` of the CONNECT request.
    pub authority: String,
    /// The peer must prove to be one of these; never empty.
    pub expected: SmallVec<[Identity; 2]>,
    /// What the peer is.
    pub kind: TunnelKind,
    /// The peer.
    pub workload: Arc<Workload>,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
    /// The final destination as far as it is known here: the endpoint and its port, or what the application asked for if a
    /// waypoint chooses.
    pub target: SocketAddr,
}

/// What is at the other end of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TunnelKind {
    /// The destination itself.
    Direct,
    /// The waypoint of the service.
    ServiceWaypoint,
    /// The waypoint of the workload.
    WorkloadWaypoint,
    /// The gateway of another network: a second tunnel runs inside the first, to whatever the gateway chooses (Z40).
    Gateway(InnerRoute),
}

/// The tunnel inside the tunnel to a network's gateway (Z26). It must not be pooled: each may end at another endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerRoute {
    /// `:authority` of the inner CONNECT request: the service's host name and port.
    pub authority: String,
    /// The inner peer must prove to be one of these; never empty.
    pub expected: SmallVec<[Identity; 2]>,
}

/// A workload that is known by a host name only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NeedsDns {
    /// The name to look up.
    pub hostname: Str,
    /// The port at the address found.
    pub port: u16,
    /// The workload.
    pub workload: Arc<Workload>,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
}

/// Why a connection goes nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Refusal {
    /// For logs and metrics.
    pub reason: Reason,
    /// For people.
    pub detail: String,
}

impl Refusal {
    fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl Resolved {
    /// The workload to connect to and the port there, if it was chosen among several: another might do as well. `None` where
    /// the address asked for is its own.
    pub fn chosen(&self) -> Option<(&Arc<Workload>, u16)> {
        match self {
            Self::Plain { workload, service: Some(_), destination } => Some((workload, destination.port())),
            Self::NeedsDns(needed) => needed.service.as_ref().map(|_| (&needed.workload, needed.port)),
            Self::Tunnel(route) if route.kind != TunnelKind::Direct => {
                Some((&route.workload, route.peer.port()))
            }
            Self::Tunnel(route) => route.service.as_ref().map(|_| (&route.workload, route.target.port())),
            Self::Passthrough { .. } | Self::Plain { service: None, .. } => None,
        }
    }

    /// The workload to connect to, if any is known.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        match self {
            Self::Passthrough { .. } => None,
            Self::Plain { workload, .. } => Some(workload),
            Self::NeedsDns(needed) => Some(&needed.workload),
            Self::Tunnel(route) => Some(&route.workload),
        }
    }
}

impl NeedsDns {
    /// The way, now that the name has an address.
    pub fn with_address(self, address: IpAddr) -> Resolved {
        endpoint::at(&self.workload, self.service.as_ref(), address, self.port)
    }
}

/// Decides where a connection goes. `observed` and `random` are those of [`pick`].
///
/// # Errors
/// [`Refusal`]: what was addressed is known and cannot be reached as it has to be. It is never passed through instead.
pub fn resolve(
    snapshot: &Snapshot,
    facts: &OutboundFacts<'_>,
    observed: &dyn Observed,
    random: &mut dyn FnMut(u64) -> u64,
) -> Result<Resolved, Refusal> {
    let asked =
        SocketAddr::new(facts.original_destination.ip().to_canonical(), facts.original_destination.port());
    refuse_self_call(facts, asked)?;
    let address = NetworkAddress { network: facts.place.network.clone(), address: asked.ip() };
    let client = Client { place: facts.place, address: facts.client };
    let mut chooser = Chooser { snapshot, facts, client, asked, observed, random };
    match snapshot.destination(&address, &facts.source.namespace) {
        Destination::Service(service) => chooser.resolve_service(service),
        Destination::Workload(workload) => chooser.resolve_workload(workload, true),
        Destination::Unknown => Ok(Resolved::Passthrough { destination: asked }),
    }
}

/// The proxy answering itself would be a loop (Z29).
fn refuse_self_call(facts: &OutboundFacts<'_>, asked: SocketAddr) -> Result<(), Refusal> {
    let ip = asked.ip();
    // Connecting to the unspecified address is connecting to the loopback one.
    let own_host = ip.is_loopback() || ip.is_unspecified() || facts.source.addresses.contains(&ip);
    if own_host && facts.own_ports.contains(&asked.port()) {
        return Err(Refusal::new(Reason::SelfCall, format!("{asked} is the proxy's own port")));
    }
    Ok(())
}

/// What one decision is made with.
struct Chooser<'a> {
    snapshot: &'a Snapshot,
    facts: &'a OutboundFacts<'a>,
    client: Client<'a>,
    /// The original destination; an IPv4 address is never in its mapped form.
    asked: SocketAddr,
    observed: &'a dyn Observed,
    random: &'a mut dyn FnMut(u64) -> u64,
}

impl<'a> Chooser<'a> {
    /// One endpoint of a service that `fit` names a port of, among those that have not failed for this connection.
    fn pick(
        &mut self,
        service: &Service,
        fit: &dyn Fn(&'a Workload) -> Option<u16>,
    ) -> Option<Candidate<'a>> {
        let exclude = self.facts.exclude;
        let fit = |workload: &'a Arc<Workload>| {
            // Ports first: they are what most often tells endpoints apart, and uids are long.
            fit(workload).filter(|_| !exclude.contains(&workload.uid))
        };
        let endpoints = self.snapshot.endpoints(&service.key);
        pick(&endpoints, &fit, &service.load_balancing, &self.client, self.observed, self.random)
    }

    fn resolve_service(&mut self, service: &Arc<Service>) -> Result<Resolved, Refusal> {
        if let Some(waypoint) = self.waypoint_of(service) {
            if !self.source_is(waypoint) {
                return self.resolve_waypoint(waypoint, TunnelKind::ServiceWaypoint, Some(service));
            }
        } else if !service.weighted_waypoints.is_empty() {
            return Err(Refusal::new(
                Reason::UnknownWaypoint,
                format!("every waypoint of {} has weight 0", service.key),
            ));
        }
        if service.load_balancing.mode == LoadBalancingMode::Passthrough {
            return self.past_service();
        }
        self.resolve_endpoint(service)
    }

    /// The service asks for the original destination (Z36); a workload there is still reached as what it is, though never
    /// through its own waypoint, because a service was addressed (Z38).
    fn past_service(&mut self) -> Result<Resolved, Refusal> {
        let network = self.facts.place.network.clone();
        match self.snapshot.workload_by_address(&NetworkAddress { network, address: self.asked.ip() }) {
            Some(workload) => self.resolve_workload(workload, false),
            None => Ok(Resolved::Passthrough { destination: self.asked }),
        }
    }

    /// Traffic addressed to a workload itself.
    fn resolve_workload(&mut self, workload: &Arc<Workload>, bound: bool) -> Result<Resolved, Refusal> {
        if let Some(waypoint) = workload.waypoint.as_deref().filter(|_| bound)
            && !self.source_is(waypoint)
        {
            return self.resolve_waypoint(waypoint, TunnelKind::WorkloadWaypoint, None);
        }
        if self.facts.exclude.contains(&workload.uid) {
            let detail = format!("{} was asked for by its address and failed", workload.uid);
            return Err(Refusal::new(Reason::NoHealthyUpstream, detail));
        }
        endpoint::refuse_unspeakable(workload)?;
        Ok(endpoint::at(workload, None, self.asked.ip(), self.asked.port()))
    }
}

/// Whether a tunnel can be opened to it.
fn speaks_hbone(workload: &Workload) -> bool {
    workload.tunnel_protocol == TunnelProtocol::Hbone
}
