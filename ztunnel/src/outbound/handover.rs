//! Between two pods of one node: the stream is handed over in this process, without a tunnel (Z28 differs;
//! docs/decisions/0008-same-node.md).
//!
//! What the other side of a tunnel would do is done here, by the same code: target, waypoint, policy, delivery from the client's
//! address, a record of its own. Only the bytes take a shorter way. Where any condition fails there is a tunnel, as if this file
//! did not exist; a *refusal* is never a reason for a tunnel.
//!
//! Both sockets belong to the worker that accepted the connection: the destination's is made in its namespace from here, as every
//! delivery is, since a socket stays in the namespace that it was made in. So no byte crosses threads (decision 0002).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_hbone::copy::{CopyObserver, CopyOutcome, copy_tcp};
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::PeerFacts;
use culvert_model::Str;
use culvert_model::outcome::Reason;
use culvert_model::resolve::{TunnelKind, TunnelRoute};
use culvert_model::workload::{NetworkPolicies, Workload};
use culvert_net::socket::canonical;
use culvert_runtime::drain::DrainWatcher;
use tokio::net::TcpStream;

use super::connect::HopError;
use super::forward::end;
use crate::config::{HBONE_PORT, SameNode};
use crate::headers;
use crate::inbound::{self, Peer};
use crate::io::{Counting, Side, killed};
use crate::observe::flow::{End, Failure, Security};
use crate::observe::{Flow, Phase, Tracked};
use crate::pods::{Place, Pod, Served, Shared};

/// Why a connection takes a tunnel although it might have stayed on its node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotHere {
    /// The setting says so.
    #[error("handing over is switched off")]
    Off,
    /// A waypoint, a gateway, or a pod that ends HBONE itself.
    #[error("{0} is not reached by its own address and port alone")]
    Indirect(Str),
    /// The agent has not handed it to us, or has handed us two of its name.
    #[error("{0} is not one pod of this node")]
    Elsewhere(Str),
    /// The control plane and the agent speak of different pods of one name.
    #[error("{0} has another uid or account at the agent than at the control plane")]
    Disputed(Str),
    /// The route asks for somebody else.
    #[error("{0} is not whom the route expects")]
    Unexpected(Str),
    /// The network enforces something on it where it crosses its interface.
    #[error("a NetworkPolicy selects {0}")]
    Restricted(Str),
    /// The network may enforce something on it.
    #[error("whether a NetworkPolicy selects {0} is not known")]
    Unknown(Str),
    /// The client shows an address that a tunnel would not show.
    #[error("the client's address {0} is not its workload's, or of another family")]
    Client(IpAddr),
    /// It would leave the namespace again, in plaintext.
    #[error("no interface of the pod has {0}: {1}")]
    Address(IpAddr, String),
    /// It takes nothing new.
    #[error("{0} is going away")]
    Draining(Str),
}

/// The pod that a connection can be handed to.
pub struct There {
    pod: Arc<Pod>,
    /// Held from before the connection is opened until it is over: the pod is not drained before, and can cut it.
    watcher: DrainWatcher,
}

/// An open connection between two pods of this node.
#[derive(Debug)]
pub struct Handover {
    upstream: TcpStream,
    inbound: Tracked,
    watcher: DrainWatcher,
    _place: Place,
}

/// Both records count the same bytes.
struct Both<'a>(&'a Counting, &'a Counting);

/// Whether a connection along `route` can be handed over, and to which pod.
///
/// # Errors
/// The first condition that does not hold.
pub fn destination(pod: &Arc<Pod>, route: &TunnelRoute, flow: &Flow) -> Result<There, NotHere> {
    let (shared, to) = (&pod.shared, &route.workload);
    let mode = shared.config.same_node;
    if mode == SameNode::Tunnel {
        return Err(NotHere::Off);
    }
    let direct = matches!(route.kind, TunnelKind::Direct) && route.peer.ip() == route.target.ip();
    if !direct || to.native_tunnel {
        return Err(NotHere::Indirect(to.uid.clone()));
    }
    let there = shared.local.only(&to.uid).ok_or_else(|| NotHere::Elsewhere(to.uid.clone()))?;
    let here = shared.local.only(&pod.workload_uid).filter(|here| Arc::ptr_eq(&here.pod, pod));
    let (Some(here), Some(from)) = (here, &flow.source.workload) else {
        return Err(NotHere::Elsewhere(pod.workload_uid.clone()));
    };
    undisputed(&here, from)?;
    undisputed(&there, to)?;
    if !route.expected.contains(&there.pod.identity) {
        return Err(NotHere::Unexpected(to.uid.clone()));
    }
    unrestricted(mode, from, to)?;
    let client = canonical(flow.source.address).ip();
    if client.is_ipv4() != route.target.is_ipv4() || !from.addresses.contains(&client) {
        return Err(NotHere::Client(client));
    }
    let watcher = there.pod.watcher();
    if watcher.is_draining() {
        return Err(NotHere::Draining(to.uid.clone()));
    }
    match there.pod.netns.has_address(route.target.ip()) {
        Ok(true) => Ok(There { pod: there.pod, watcher }),
        Ok(false) => Err(NotHere::Address(route.target.ip(), "none of them".to_owned())),
        Err(error) => Err(NotHere::Address(route.target.ip(), error.to_string())),
    }
}

/// The agent and the control plane mean the same pod. A control plane that is not ours does not say uids.
fn undisputed(served: &Served, workload: &Workload) -> Result<(), NotHere> {
    let same_uid = workload.pod.as_ref().is_none_or(|said| said.uid == served.uid);
    if same_uid && served.pod.identity == workload.identity {
        return Ok(());
    }
    Err(NotHere::Disputed(workload.uid.clone()))
}

/// Whether the network has nothing to say between two pods: a connection that is handed over never crosses the interfaces where
/// NetworkPolicies are enforced.
///
/// # Errors
/// [`NotHere::Off`], [`NotHere::Restricted`] or [`NotHere::Unknown`].
pub fn unrestricted(mode: SameNode, from: &Workload, to: &Workload) -> Result<(), NotHere> {
    for workload in [from, to] {
        match (mode, workload.network_policies()) {
            (SameNode::Tunnel, _) => return Err(NotHere::Off),
            (_, NetworkPolicies::Selected) => return Err(NotHere::Restricted(workload.uid.clone())),
            (SameNode::Auto, NetworkPolicies::Unknown) => {
                return Err(NotHere::Unknown(workload.uid.clone()));
            }
            (SameNode::Handover, NetworkPolicies::Unknown) | (_, NetworkPolicies::None) => {}
        }
    }
    Ok(())
}

/// Opens it: everything that the destination's side of a tunnel does before it answers, and the same answers.
pub async fn open(
    pod: &Arc<Pod>,
    there: There,
    route: &TunnelRoute,
    certificate: &WorkloadCertificate,
    flow: &mut Flow,
) -> Result<Handover, HopError> {
    let There { pod: there, watcher } = there;
    flow.security = Security::SameNode;
    flow.tunnel = None;
    flow.destination.identity = Some(there.identity.clone());
    headers::begin_trace(flow);
    let facts = PeerFacts {
        identity: pod.identity.clone(),
        not_after: certificate.not_after(),
        cipher: None,
        kx_group: None,
    };
    let peer = Peer {
        address: canonical(flow.source.address),
        local: SocketAddr::new(route.target.ip(), HBONE_PORT),
        facts,
    };
    let mut inbound = inbound::begin(&there, &peer, Security::SameNode);
    inbound.flow.trace = flow.trace.clone();
    let place = match there.place() {
        Ok(place) => place,
        Err(failure) => {
            let detail = format!("{}: {}", route.target, failure.detail);
            inbound.finish(End::Failed(failure));
            return Err(HopError::before_sending(Failure::new(Reason::Overloaded, detail)));
        }
    };
    let opened = tokio::select! {
        biased;
        opened = admit(&there, &peer, route, &mut inbound) => opened,
        () = watcher.forced() => {
            let failure = Failure::new(Reason::Draining, "the proxy stopped serving this pod");
            Err((HopError::last(failure.clone()), failure))
        }
    };
    match opened {
        Ok(upstream) => {
            flow.mark(Phase::Connect);
            // Attested by the agent, which is more than its address says.
            inbound.flow.source.workload = flow.source.workload.clone();
            Ok(Handover { upstream, inbound, watcher, _place: place })
        }
        Err((error, failure)) => {
            inbound.finish(End::Failed(failure));
            Err(error)
        }
    }
}

/// The destination's side. A certificate that a tunnel would need is needed here too: without one the authority, or somebody who
/// took it away, does not want the pod to be spoken to.
async fn admit(
    there: &Arc<Pod>,
    peer: &Peer,
    route: &TunnelRoute,
    inbound: &mut Tracked,
) -> Result<TcpStream, (HopError, Failure)> {
    if let Err(error) = there.shared.certificates.get(&there.identity).await {
        let why = format!("no certificate for {}: {error}", there.identity);
        let failure = Failure::new(Reason::NoCertificate, why);
        return Err((HopError::before_sending(failure.clone()), failure));
    }
    inbound.flow.mark(Phase::Certificate);
    let opened = inbound::open(there, peer, Ok(route.authority.clone()), inbound).await;
    opened
        .map(|(upstream, _)| upstream)
        .map_err(|(status, failure)| (HopError::answered(status, &route.target), failure))
}

impl Handover {
    /// Carries it to its end. Whatever ends either pod's side ends both: `cut` is the source's.
    pub async fn forward(
        self,
        shared: &Shared,
        client: TcpStream,
        counting: &Counting,
        cut: impl Future<Output = Failure>,
    ) -> CopyOutcome<Failure> {
        let Self { upstream, mut inbound, watcher, _place } = self;
        inbound.flow.mark(Phase::Open);
        let live = inbound.opened();
        inbound::judge_again(shared, &live);
        let theirs = Counting::new(live.clone(), Side::Source);
        let cut_there = killed(&live, watcher);
        let cut = async move {
            tokio::select! {
                failure = cut_there => failure,
                failure = cut => failure,
            }
        };
        let outcome =
            copy_tcp(client, upstream, shared.config.bounds.idle(), Both(counting, &theirs), cut).await;
        theirs.phases(&mut inbound.flow);
        inbound.finish(end(outcome.clone(), Side::Source));
        outcome
    }
}

impl CopyObserver for Both<'_> {
    fn on_sent(&self, bytes: u64) {
        self.0.on_sent(bytes);
        self.1.on_sent(bytes);
    }

    fn on_received(&self, bytes: u64) {
        self.0.on_received(bytes);
        self.1.on_received(bytes);
    }
}

#[cfg(test)]
#[path = "handover_tests.rs"]
mod tests;
