//! One stream of a tunnel: what it asks for is checked, judged, and handed to the pod from the client's own address.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use culvert_hbone::copy::copy_bidirectional;
use culvert_hbone::server::Incoming;
use culvert_model::authorize::Permit;
use culvert_model::outcome::Reason;
use culvert_model::workload::Workload;
use culvert_net::socket::{DialError, DialOptions, connect};
use http::{HeaderMap, StatusCode};
use tokio::net::TcpStream;

use super::accept::Peer;
use super::authorize;
use crate::config::{CONNECT_TIMEOUT, OWN_PORTS, PROXY_MARK};
use crate::headers;
use crate::io::{Counting, Side, killed};
use crate::observe::flow::{End, Failure, Security};
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::outbound::end;
use crate::pods::{KEEPALIVE, Pod};

/// Serves one CONNECT request from its headers to its last byte.
pub async fn serve(pod: Arc<Pod>, peer: Arc<Peer>, incoming: Incoming) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let mut flow = Flow::new(Direction::Inbound, peer.address, SocketAddr::new(peer.local.ip(), 0));
    flow.mark(Phase::Accept);
    flow.tunnel = Some(peer.local);
    flow.security = Security::MutualTls;
    flow.source.identity = Some(peer.facts.identity.clone());
    flow.destination.identity = Some(pod.identity.clone());
    flow.trace = headers::trace_id(&incoming.headers);
    let mut tracked = pod.shared.observer.begin(flow);
    match open(&pod, &peer, &incoming, &mut tracked).await {
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

type Refused = (StatusCode, Failure);

async fn open(
    pod: &Arc<Pod>,
    peer: &Peer,
    incoming: &Incoming,
    tracked: &mut Tracked,
) -> Result<(TcpStream, Arc<Workload>), Refused> {
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
    let target = target(pod, peer, incoming, &workload, tracked).map_err(|f| (StatusCode::BAD_REQUEST, f))?;
    tracked.flow.destination.address = target;
    tracked.flow.mark(Phase::Resolve);
    tracked.flow.source.workload = known_source(pod, peer);
    let identity = Some(&peer.facts.identity);
    let permit = authorize::decide(pod, &workload, identity, peer.address, target, &mut tracked.flow)
        .map_err(|f| (StatusCode::UNAUTHORIZED, f))?;
    tracked.flow.mark(Phase::Authorize);
    let upstream = dial(pod, peer.address, target, permit)
        .await
        .map_err(|failure| (StatusCode::SERVICE_UNAVAILABLE, failure))?;
    tracked.flow.mark(Phase::Connect);
    Ok((upstream, workload))
}

/// The address and port asked for: the pod's own, by address or by the name of a service that it is an endpoint of
/// (Z47, Z48), and none of the proxy's ports (Z49).
fn target(
    pod: &Pod,
    peer: &Peer,
    incoming: &Incoming,
    workload: &Workload,
    tracked: &mut Tracked,
) -> Result<SocketAddr, Failure> {
    let (host, port) =
        incoming.validate_connect().map_err(|e| Failure::new(Reason::BadRequest, e.to_string()))?;
    let target = match host.parse::<IpAddr>() {
        Ok(ip) => {
            let ip = ip.to_canonical();
            if ip != peer.local.ip() && !workload.addresses.contains(&ip) {
                let detail = format!("{ip} is not an address of this pod ({})", peer.local.ip());
                return Err(Failure::new(Reason::WrongDestination, detail));
            }
            SocketAddr::new(ip, port)
        }
        Err(_) => {
            let snapshot = pod.shared.state.load();
            let service = snapshot.service_by_hostname(host, &workload.namespace).ok_or_else(|| {
                Failure::new(Reason::WrongDestination, format!("{host} is no service that we know"))
            })?;
            let ports = workload.services.get(&service.key).ok_or_else(|| {
                Failure::new(Reason::WrongDestination, format!("this pod is no endpoint of {host}"))
            })?;
            let target = ports
                .target(port)
                .ok_or_else(|| Failure::new(Reason::UnknownPort, format!("{host} has no port {port}")))?;
            tracked.flow.service = Some(service.clone());
            SocketAddr::new(peer.local.ip(), target)
        }
    };
    if OWN_PORTS.contains(&target.port()) {
        let detail = format!("port {} belongs to the proxy", target.port());
        return Err(Failure::new(Reason::SelfCall, detail));
    }
    Ok(target)
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

/// Connects to the pod from the client's address (Z51). Demands the permit: nothing is delivered unjudged.
pub async fn dial(
    pod: &Pod,
    client: SocketAddr,
    target: SocketAddr,
    _permit: Permit,
) -> Result<TcpStream, Failure> {
    // A client at the pod's own address (it called its own service) is not imitated: the reply would never leave the
    // pod's stack.
    let spoof = client.ip() != target.ip() && client.is_ipv4() == target.is_ipv4();
    let options = DialOptions {
        mark: Some(PROXY_MARK),
        source: spoof.then(|| SocketAddr::new(client.ip(), 0)),
        nodelay: true,
        keepalive: Some(KEEPALIVE),
        ..DialOptions::default()
    };
    connect(&pod.netns, target, &options, CONNECT_TIMEOUT).await.map_err(|error| {
        let reason = match error {
            DialError::Refused { .. } => Reason::ConnectionRefused,
            DialError::Unreachable { .. } => Reason::Unreachable,
            DialError::TimedOut { .. } => Reason::ConnectTimeout,
            DialError::Other { .. } => Reason::Internal,
        };
        Failure::new(reason, error.to_string())
    })
}

async fn forward(
    pod: &Pod,
    upstream: TcpStream,
    tunnel: culvert_hbone::stream::TunnelStream,
    mut tracked: Tracked,
) {
    tracked.flow.mark(Phase::Open);
    let live = tracked.opened();
    let counting = Counting::new(live.clone(), Side::Destination);
    let outcome = copy_bidirectional(upstream, tunnel, None, &counting, killed(&live, pod.watcher())).await;
    counting.phases(&mut tracked.flow);
    tracked.finish(end(outcome, Side::Destination));
}
