//! One stream of a tunnel: what it asks for is checked, judged, and handed to the pod from the client's own address.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_hbone::copy::copy_bidirectional;
use culvert_hbone::server::Incoming;
use culvert_model::authorize::Permit;
use culvert_model::outcome::Reason;
use culvert_model::workload::Workload;
use culvert_net::socket::{DialError, DialOptions, connect};
use http::{HeaderMap, StatusCode};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::accept::Peer;
use super::rejudge::judge_again;
use super::target::target;
use super::{authorize, proxy_protocol};
use crate::config::CONNECT_TIMEOUT;
use crate::headers;
use crate::io::{Counting, Side, killed};
use crate::observe::flow::{End, Failure, Security};
use crate::observe::limits::Limit;
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::outbound::end;
use crate::pods::Pod;

/// Serves one CONNECT request from its headers to its last byte.
pub async fn serve(pod: Arc<Pod>, peer: Arc<Peer>, mut incoming: Incoming) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let mut tracked = begin(&pod, &peer, Security::MutualTls);
    tracked.flow.tunnel = Some(peer.local);
    tracked.flow.trace = headers::trace_id(&incoming.headers);
    let asked = asked(&incoming);
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    let opening = Box::pin(open(&pod, &peer, asked, &mut tracked));
    let opened = match unless_abandoned(opening, incoming.abandoned()).await {
        Ok(opened) => opened,
        Err(gone) => return tracked.finish(End::Failed(gone)),
    };
    match opened {
        Ok((upstream, workload)) => {
            let Ok(tunnel) = incoming.accept(headers::response(&workload)) else {
                let _ = culvert_net::socket::arm_reset(&upstream);
                tracked.finish(End::Failed(Failure::new(
                    Reason::ClientReset,
                    "the client left before it was answered",
                )));
                return;
            };
            forward(&pod, upstream, tunnel, tracked).await;
        }
        Err((status, failure)) => {
            let _ = incoming.refuse(status, HeaderMap::new());
            tracked.finish(End::Failed(failure));
        }
    }
}

/// Begins the record of a connection of `peer` to the pod.
pub fn begin(pod: &Pod, peer: &Peer, security: Security) -> Tracked {
    let mut flow = Flow::new(Direction::Inbound, peer.address, SocketAddr::new(peer.local.ip(), 0));
    flow.mark(Phase::Accept);
    flow.security = security;
    flow.source.identity = Some(peer.facts.identity.clone());
    flow.destination.identity = Some(pod.identity.clone());
    pod.shared.observer.begin(flow)
}

/// What to answer, and why.
pub type Refused = (StatusCode, Failure);

/// The authority of what is a CONNECT request.
fn asked(incoming: &Incoming) -> Result<String, Failure> {
    incoming.validate_connect().map_err(|e| Failure::new(Reason::BadRequest, e.to_string()))?;
    Ok(incoming.authority.clone())
}

/// `opening`, cut short when the client gives up: its dial stops, and nothing of it reaches the pod.
async fn unless_abandoned<T, E: std::fmt::Display>(
    opening: impl Future<Output = T>,
    abandoned: impl Future<Output = E>,
) -> Result<T, Failure> {
    tokio::select! {
        biased;
        opened = opening => Ok(opened),
        gone = abandoned => Err(Failure::new(
            Reason::ClientReset,
            format!("the client gave up before it was answered: {gone}"),
        )),
    }
}

/// Checks what is asked for, judges it, and connects to the pod from the client's address. The only way into a pod for whoever
/// proved an identity, in a tunnel or on the same node.
///
/// # Errors
/// What to answer instead of 200 (Z20), and why.
pub async fn open(
    pod: &Arc<Pod>,
    peer: &Peer,
    asked: Result<String, Failure>,
    tracked: &mut Tracked,
) -> Result<(TcpStream, Arc<Workload>), Refused> {
    let authority = asked.map_err(|f| (StatusCode::BAD_REQUEST, f))?;
    if peer.facts.not_after <= SystemTime::now() {
        let failure =
            Failure::new(Reason::PeerIdentity, "the client's certificate has expired since its handshake");
        return Err((StatusCode::UNAUTHORIZED, failure));
    }
    let workload = pod.workload().await.ok_or_else(|| {
        let detail = format!("the control plane does not know {} yet", pod.workload_uid);
        (StatusCode::SERVICE_UNAVAILABLE, Failure::new(Reason::UnknownSource, detail))
    })?;
    tracked.flow.destination.workload = Some(workload.clone());
    let target = target(&pod.shared.state.load(), &workload, peer.local.ip(), &authority)
        .map_err(|f| (StatusCode::BAD_REQUEST, f))?;
    tracked.flow.service = target.service;
    tracked.flow.destination.address = target.address;
    tracked.flow.mark(Phase::Resolve);
    tracked.flow.source.workload = known_source(pod, peer);
    let identity = &peer.facts.identity;
    let permit =
        authorize::decide(pod, &workload, Some(identity), peer.address, target.address, &mut tracked.flow)
            .map_err(|f| (StatusCode::UNAUTHORIZED, f))?;
    tracked.flow.mark(Phase::Authorize);
    let unavailable = |failure| (StatusCode::SERVICE_UNAVAILABLE, failure);
    let upstream = match target.proxied {
        None => dial(pod, Some(peer.address), target.address, permit).await.map_err(unavailable)?,
        Some(destination) => {
            let header = proxy_protocol::header(peer.address, destination, identity);
            // The header says who came, so the connection itself comes from the proxy (Z53).
            let upstream = dial(pod, None, target.address, permit).await.map_err(unavailable)?;
            introduce(upstream, &header).await.map_err(unavailable)?
        }
    };
    tracked.flow.mark(Phase::Connect);
    Ok((upstream, workload))
}

/// Sends what goes before the client's bytes. A new socket's buffer holds the whole header, so this does not wait.
async fn introduce(mut upstream: TcpStream, header: &[u8]) -> Result<TcpStream, Failure> {
    match timeout(CONNECT_TIMEOUT, upstream.write_all(header)).await {
        Ok(Ok(())) => Ok(upstream),
        Ok(Err(error)) => Err(Failure::new(Reason::UpstreamReset, format!("PROXY protocol header: {error}"))),
        Err(_) => Err(Failure::new(Reason::ConnectTimeout, "no PROXY protocol header taken in 10 s")),
    }
}

/// The workload at the peer's address, if its account is the one that the certificate proves: for telemetry.
fn known_source(pod: &Pod, peer: &Peer) -> Option<Arc<Workload>> {
    let snapshot = pod.shared.state.load();
    let address = culvert_model::address::NetworkAddress {
        network: pod.shared.config.network.as_str().into(),
        address: peer.address.ip(),
    };
    snapshot.workload_by_address(&address).filter(|w| w.identity == peer.facts.identity).cloned()
}

/// Connects to the pod, from the client's address if one is given (Z51). Demands the permit: nothing is delivered unjudged.
pub async fn dial(
    pod: &Pod,
    client: Option<SocketAddr>,
    target: SocketAddr,
    _permit: Permit,
) -> Result<TcpStream, Failure> {
    let source = client.and_then(|client| imitated(client, target));
    let options = DialOptions { source, ..pod.dial_options() };
    connect(&pod.netns, target, &options, CONNECT_TIMEOUT).await.map_err(|error| undelivered(&error))
}

/// The address to connect from in the client's place. A client at the pod's own address (it called its own service) is not
/// imitated: the reply would never leave the pod's stack. Nor is one of the other family, which no socket could be.
fn imitated(client: SocketAddr, target: SocketAddr) -> Option<SocketAddr> {
    let spoof = client.ip() != target.ip() && client.is_ipv4() == target.is_ipv4();
    spoof.then(|| SocketAddr::new(client.ip(), 0))
}

fn undelivered(error: &DialError) -> Failure {
    let reason = match error {
        DialError::Refused(..) => Reason::ConnectionRefused,
        DialError::Unreachable(..) => Reason::Unreachable,
        DialError::TimedOut(..) => Reason::ConnectTimeout,
        DialError::Exhausted(..) => {
            return Failure::new(Reason::Overloaded, error.to_string()).beyond(Limit::Descriptors);
        }
        DialError::Other(..) => Reason::Internal,
    };
    Failure::new(reason, error.to_string())
}

async fn forward(
    pod: &Pod,
    upstream: TcpStream,
    tunnel: culvert_hbone::stream::TunnelStream,
    mut tracked: Tracked,
) {
    tracked.flow.mark(Phase::Open);
    let live = tracked.opened();
    judge_again(&pod.shared, &live);
    let counting = Counting::new(live.clone(), Side::Destination);
    let idle = pod.shared.config.bounds.idle();
    let outcome = copy_bidirectional(upstream, tunnel, idle, &counting, killed(&live, pod.watcher())).await;
    counting.phases(&mut tracked.flow);
    tracked.finish(end(outcome, Side::Destination));
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// Z51: from the client's own address, except where no reply would come back.
    #[test]
    fn whom_the_pod_sees() {
        let imitated = |client: &str, target: &str| {
            super::imitated(client.parse().unwrap(), target.parse().unwrap()).map(|a| a.to_string())
        };
        assert_eq!(imitated("100.64.2.7:40000", "100.64.1.9:80").as_deref(), Some("100.64.2.7:0"));
        assert_eq!(imitated("[fd00::7]:40000", "[fd00::9]:80").as_deref(), Some("[fd00::7]:0"));
        assert_eq!(imitated("100.64.1.9:40000", "100.64.1.9:80"), None, "the pod itself");
        assert_eq!(imitated("100.64.2.7:40000", "[fd00::9]:80"), None, "another family");
    }

    /// Z20: why the pod did not take the connection is told apart in the log.
    #[test]
    fn why_it_was_not_delivered() {
        let to = "100.64.1.9:80".parse().unwrap();
        let error = || io::Error::other("why");
        for (failed, reason) in [
            (DialError::Refused(to), Reason::ConnectionRefused),
            (DialError::Unreachable(to, error()), Reason::Unreachable),
            (DialError::TimedOut(to), Reason::ConnectTimeout),
            (DialError::Exhausted(to, error()), Reason::Overloaded),
            (DialError::Other(to, error()), Reason::Internal),
        ] {
            let failure = undelivered(&failed);
            assert_eq!(failure.reason, reason);
            assert!(failure.detail.contains("100.64.1.9:80"), "{failure}");
        }
    }

    /// A client that leaves stops the dial; one that stays gets its outcome, and an outcome that is there wins.
    #[tokio::test]
    async fn a_dial_ends_with_its_client() {
        struct Dial(std::sync::Arc<AtomicBool>);
        impl Drop for Dial {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stopped = std::sync::Arc::new(AtomicBool::new(false));
        let dial = Dial(stopped.clone());
        let never = async move {
            let _held = dial;
            std::future::pending::<()>().await;
        };
        let left = unless_abandoned(never, async { "stream reset" }).await.unwrap_err();
        assert_eq!(left.reason, Reason::ClientReset);
        assert!(left.detail.contains("stream reset"));
        assert!(stopped.load(Ordering::Relaxed), "the dial was dropped");
        let stays = unless_abandoned(async { 7 }, std::future::pending::<&str>()).await;
        assert_eq!(stays.unwrap(), 7);
        assert_eq!(unless_abandoned(async { 7 }, async { "reset" }).await.unwrap(), 7);
    }
}
