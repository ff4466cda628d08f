//! A captured connection: who opened it, and where it was going before it was redirected here.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::outcome::Reason;
use culvert_net::socket::{arm_reset, canonical, original_destination, tune_accepted};
use smallvec::SmallVec;
use tokio::net::TcpStream;

use super::connect::{self, Hop};
use super::{forward, resolve};
use crate::observe::flow::{End, Failure};
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::pods::{KEEPALIVE, Pod};

/// Endpoints tried before the client is told: a connection must not wait for a whole service to time out.
const MAX_ATTEMPTS: usize = 3;

/// Serves one captured connection from accept to close.
pub async fn serve(pod: Arc<Pod>, worker: usize, stream: std::net::TcpStream, client: SocketAddr) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let stream = match prepare(stream) {
        Ok(stream) => stream,
        Err(error) => {
            tracing::debug!(pod = %pod.workload_uid, %error, "a captured connection was gone before it was served");
            return;
        }
    };
    // Without conntrack's word the destination is our own port: somebody dialled it, nothing was captured.
    let own = stream.local_addr().map(canonical).unwrap_or(client);
    let destination = original_destination(&stream).map(canonical).unwrap_or(own);
    let mut tracked = pod.shared.observer.begin(Flow::new(Direction::Outbound, client, destination));
    tracked.flow.mark(Phase::Accept);
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(open(&pod, worker, destination, &mut tracked)).await {
        Ok(hop) => forward::run(&pod, stream, hop, tracked).await,
        Err(failure) => {
            // The client must not take this for an empty answer: a reset before any byte, never a clean end.
            let _ = arm_reset(&stream);
            drop(stream);
            tracked.finish(End::Failed(failure));
        }
    }
}

fn prepare(stream: std::net::TcpStream) -> std::io::Result<TcpStream> {
    stream.set_nonblocking(true)?;
    tune_accepted(&stream, &KEEPALIVE)?;
    TcpStream::from_std(stream)
}

async fn open(
    pod: &Arc<Pod>,
    worker: usize,
    destination: SocketAddr,
    tracked: &mut Tracked,
) -> Result<Hop, Failure> {
    let source = pod.workload().await.ok_or_else(|| {
        Failure::new(
            Reason::UnknownSource,
            format!("the control plane does not know {} yet", pod.workload_uid),
        )
    })?;
    tracked.flow.source.identity = Some(pod.identity.clone());
    tracked.flow.source.workload = Some(source.clone());
    let mut failed: SmallVec<[culvert_model::Str; MAX_ATTEMPTS]> = SmallVec::new();
    let mut last = None;
    while failed.len() < MAX_ATTEMPTS {
        let resolved = match resolve::decide(pod, &source, destination, &failed, &mut tracked.flow) {
            Ok(resolved) => resolved,
            // Every endpoint there is has been tried: what the last one said is more than "there is none".
            Err(failure) => return Err(last.unwrap_or(failure)),
        };
        tracked.flow.mark(Phase::Resolve);
        let endpoint = tracked.flow.destination.workload.as_ref().map(|w| w.uid.clone());
        match connect::open(pod, worker, &resolved, &mut tracked.flow).await {
            Ok(hop) => return Ok(hop),
            Err(error) => match endpoint {
                Some(uid) if error.another_may_do && tracked.flow.service.is_some() => {
                    tracing::debug!(pod = %pod.workload_uid, endpoint = %uid, failure = %error.failure, "trying another endpoint");
                    failed.push(uid);
                    last = Some(error.failure);
                }
                _ => return Err(error.failure),
            },
        }
    }
    Err(last.unwrap_or_else(|| Failure::new(Reason::NoHealthyUpstream, "no endpoint was tried")))
}
