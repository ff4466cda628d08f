//! A captured connection: who opened it, and where it was going before it was redirected here.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_model::Str;
use culvert_model::outcome::{Blame, Reason};
use culvert_model::resolve::Resolved;
use culvert_model::workload::Workload;
use culvert_net::socket::{arm_reset, canonical, original_destination};

use super::connect::{self, Hop, HopError};
use super::endpoints::InProgress;
use super::retry::{Attempt, Missed, until_open};
use super::{forward, lookup, resolve};
use crate::observe::flow::{End, Failure};
use crate::observe::{Direction, Flow, Phase, Tracked};
use crate::pods::{Pod, adopt};

/// Serves one captured connection from accept to close.
pub async fn serve(pod: Arc<Pod>, worker: usize, stream: std::net::TcpStream, client: SocketAddr) {
    // Held while it is being opened too: a drain waits for what it has accepted.
    let _watcher = pod.watcher();
    let (stream, own) = match adopt(stream) {
        Ok(adopted) => adopted,
        Err(error) => {
            tracing::debug!(pod = %pod.workload_uid, %error, "a captured connection was gone before it was served");
            return;
        }
    };
    // Without conntrack's word the destination is our own port: somebody dialled it, nothing was captured.
    let destination = original_destination(&stream).map(canonical).unwrap_or(own);
    let mut tracked = pod.shared.observer.begin(Flow::new(Direction::Outbound, client, destination));
    tracked.flow.mark(Phase::Accept);
    // Boxed: what opening takes is given back before the bytes flow, and a task is as large as its largest state.
    match Box::pin(open_to(&pod, worker, destination, &mut tracked)).await {
        Ok(Opened { hop, in_progress }) => {
            forward::run(&pod, stream, hop, tracked).await;
            drop(in_progress);
        }
        Err(failure) => {
            // The client must not take this for an empty answer: a reset before any byte, never a clean end.
            let _ = arm_reset(&stream);
            drop(stream);
            tracked.finish(End::Failed(failure));
        }
    }
}

/// Decides where a connection to `destination` goes, and opens the way.
///
/// # Errors
/// Why not.
pub async fn open_to(
    pod: &Arc<Pod>,
    worker: usize,
    destination: SocketAddr,
    tracked: &mut Tracked,
) -> Result<Opened, Failure> {
    let source = pod.workload().await.ok_or_else(|| {
        Failure::new(
            Reason::UnknownSource,
            format!("the control plane does not know {} yet", pod.workload_uid),
        )
    })?;
    tracked.flow.source.identity = Some(pod.identity.clone());
    tracked.flow.source.workload = Some(source.clone());
    until_open(&mut Opening { pod, worker, source, destination, flow: &mut tracked.flow }).await
}

/// A connection that is being opened.
struct Opening<'a> {
    pod: &'a Arc<Pod>,
    worker: usize,
    source: Arc<Workload>,
    destination: SocketAddr,
    flow: &'a mut Flow,
}

/// A connection that is open.
pub struct Opened {
    /// The way onwards.
    pub hop: Hop,
    /// Counts as the endpoint's load while it lives; `None` where nobody knows who is connected to.
    pub in_progress: Option<InProgress>,
}

impl Attempt for Opening<'_> {
    type Hop = Opened;

    async fn attempt(&mut self, failed: &[Str]) -> Result<Opened, Missed> {
        let decided = resolve::decide(self.pod, &self.source, self.destination, failed, self.flow)
            .map_err(Missed::Undecided)?;
        let table = &self.pod.shared.endpoints;
        let in_progress = decided.workload().map(|workload| table.begin(&workload.uid));
        // From here on a failure is that of the workload chosen, if there was a choice.
        let chosen = decided.chosen().map(|(workload, port)| (workload.uid.clone(), port));
        let metrics = &self.pod.shared.observer.metrics;
        self.flow.attempts += 1;
        if !failed.is_empty() {
            metrics.connect_retries.inc();
        }
        match (self.connect(decided, chosen.as_ref().map(|(uid, _)| uid)).await, &chosen) {
            (Ok(hop), chosen) => {
                chosen.iter().for_each(|(uid, port)| table.succeeded(uid, *port));
                Ok(Opened { hop, in_progress })
            }
            (Err(missed), chosen) => {
                if let (Missed::Endpoint { failure, .. }, Some((uid, port))) = (&missed, chosen)
                    && failure.reason.blame() == Blame::Upstream
                    && let Some(cooldown) = table.failed(uid, *port)
                {
                    metrics.endpoint_cooldowns.inc();
                    tracing::debug!(endpoint = %uid, port, ?cooldown, "others are preferred for a while");
                }
                Err(missed)
            }
        }
    }
}

impl Opening<'_> {
    async fn connect(&mut self, decided: Resolved, endpoint: Option<&Str>) -> Result<Hop, Missed> {
        let resolved = match decided {
            Resolved::NeedsDns(needed) => {
                lookup::address(self.pod, &self.source, self.destination, needed, self.flow)
                    .await
                    .map_err(|failure| missed(HopError::before_sending(failure), endpoint))?
            }
            decided => decided,
        };
        self.flow.mark(Phase::Resolve);
        connect::open(self.pod, self.worker, &resolved, self.flow)
            .await
            .map_err(|error| missed(error, endpoint))
    }
}

fn missed(error: HopError, endpoint: Option<&Str>) -> Missed {
    match endpoint {
        Some(uid) if error.another_may_do => Missed::Endpoint { uid: uid.clone(), failure: error.failure },
        _ => Missed::Last(error.failure),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Z45 differs: only what nobody can have acted on is tried elsewhere, and only where a service was asked for.
    #[test]
    fn what_may_be_tried_elsewhere() {
        let failure = || Failure::new(Reason::ConnectionRefused, "refused");
        let uid = Str::from("Kubernetes//Pod/shop/cart");
        let error = |another_may_do| HopError { failure: failure(), another_may_do };
        assert!(matches!(missed(error(true), Some(&uid)), Missed::Endpoint { uid: of, .. } if of == uid));
        assert!(matches!(missed(error(false), Some(&uid)), Missed::Last(_)));
        assert!(matches!(missed(error(true), None), Missed::Last(_)), "an address stands for one workload");
    }
}
