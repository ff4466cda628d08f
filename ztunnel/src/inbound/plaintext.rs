//! Plain TCP from outside the mesh (Z55-Z57): no identity, so whatever demands one refuses it.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_hbone::copy::copy_tcp;
use culvert_model::address::NetworkAddress;
use culvert_model::outcome::Reason;
use culvert_net::socket::{arm_reset, canonical, original_destination};
use tokio::net::TcpStream;

use super::rejudge::judge_again;
use super::{authorize, deliver};
use crate::config::OWN_PORTS;
use crate::io::{Counting, Side, killed};
use crate::observe::flow::{End, Failure};
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::outbound::end;
use crate::pods::{Pod, adopt};

/// Serves one captured plaintext connection to the pod.
pub async fn serve(pod: Arc<Pod>, _worker: usize, stream: std::net::TcpStream, from: SocketAddr) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let Ok((client, own)) = adopt(stream) else { return };
    let target = original_destination(&client).map_or(own, canonical);
    let mut flow = Flow::new(Direction::Inbound, from, target);
    flow.mark(Phase::Accept);
    let mut tracked = pod.shared.observer.begin(flow);
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(open(&pod, from, target, &mut tracked)).await {
        Ok(upstream) => {
            tracked.flow.mark(Phase::Open);
            let live = tracked.opened();
            judge_again(&pod.shared, &live);
            let counting = Counting::new(live.clone(), Side::Source);
            let idle = pod.shared.config.bounds.idle();
            let outcome = copy_tcp(client, upstream, idle, &counting, killed(&live, pod.watcher())).await;
            counting.phases(&mut tracked.flow);
            tracked.finish(end(outcome, Side::Source));
        }
        Err(failure) => {
            let _ = arm_reset(&client);
            drop(client);
            tracked.finish(End::Failed(failure));
        }
    }
}

async fn open(
    pod: &Arc<Pod>,
    from: SocketAddr,
    target: SocketAddr,
    tracked: &mut Tracked,
) -> Result<TcpStream, Failure> {
    if OWN_PORTS.contains(&target.port()) {
        return Err(Failure::new(Reason::SelfCall, format!("port {} belongs to the proxy", target.port())));
    }
    let workload = pod.workload().await.ok_or_else(|| {
        Failure::new(
            Reason::UnknownSource,
            format!("the control plane does not know {} yet", pod.workload_uid),
        )
    })?;
    tracked.flow.destination.identity = Some(pod.identity.clone());
    tracked.flow.destination.workload = Some(workload.clone());
    // By address alone: for telemetry, never for policy.
    let address = NetworkAddress { network: pod.shared.config.network.as_str().into(), address: from.ip() };
    tracked.flow.source.workload = pod.shared.state.load().workload_by_address(&address).cloned();
    tracked.flow.mark(Phase::Resolve);
    let permit = authorize::decide(pod, &workload, None, from, target, &mut tracked.flow)?;
    tracked.flow.mark(Phase::Authorize);
    let upstream = deliver::dial(pod, Some(from), target, permit).await?;
    tracked.flow.mark(Phase::Connect);
    Ok(upstream)
}
