//! Bytes, both ways, until both sides are done or one is cut.

use std::sync::Arc;

use culvert_hbone::copy::{CloseCause, CopyOutcome, copy_bidirectional, copy_tcp};
use culvert_model::outcome::Reason;
use tokio::net::TcpStream;

use super::connect::Hop;
use crate::io::{Counting, Side, killed};
use crate::observe::flow::{End, Failure};
use crate::observe::limits::Limit;
use crate::observe::{Phase, Tracked};
use crate::pods::Pod;

/// Carries an open connection to its end.
pub async fn run(pod: &Arc<Pod>, client: TcpStream, hop: Hop, mut tracked: Tracked) {
    tracked.flow.mark(Phase::Open);
    let live = tracked.opened();
    let counting = Counting::new(live.clone(), Side::Source);
    let killed = killed(&live, pod.watcher());
    let idle = pod.shared.config.bounds.idle();
    let outcome = match hop {
        Hop::Tunnel(tunnel) => copy_bidirectional(client, tunnel, idle, &counting, killed).await,
        // Boxed: what only these connections need is not part of every connection's task.
        Hop::Handover(handed) => Box::pin(handed.forward(&pod.shared, client, &counting, killed)).await,
        Hop::Plain(upstream) => copy_tcp(client, upstream, idle, &counting, killed).await,
    };
    counting.phases(&mut tracked.flow);
    tracked.finish(end(outcome, Side::Source));
}

/// What the copy's outcome means, when its first socket was on `side`.
pub fn end(outcome: CopyOutcome<Failure>, side: Side) -> End {
    let detail = match (outcome.reason, outcome.error) {
        (Some(code), _) => format!(" ({code})"),
        (None, Some(error)) => format!(" ({error})"),
        (None, None) => String::new(),
    };
    let from_source =
        End::Cut(Failure::new(Reason::ClientReset, format!("the source reset the connection{detail}")));
    let from_destination = End::Cut(Failure::new(
        Reason::UpstreamReset,
        format!("the destination reset the connection{detail}"),
    ));
    match (outcome.close_cause, side) {
        (CloseCause::Clean, _) => End::Clean,
        (CloseCause::ClientReset, Side::Source) | (CloseCause::PeerReset, Side::Destination) => from_source,
        (CloseCause::ClientReset, Side::Destination) | (CloseCause::PeerReset, Side::Source) => {
            from_destination
        }
        (CloseCause::ConnectionLost(cause), _) => End::Cut(Failure::new(
            Reason::TunnelLost,
            format!("the connection to the peer was lost: {cause}"),
        )),
        (CloseCause::IdleTimeout, _) => {
            End::Cut(Failure::new(Reason::IdleTimeout, "no bytes for too long").beyond(Limit::IdleTime))
        }
        (CloseCause::HalfClosedTimeout, _) => End::Cut(
            Failure::new(Reason::IdleTimeout, "one side had ended, and no bytes from the other for too long")
                .beyond(Limit::HalfClosedTime),
        ),
        (CloseCause::Killed(failure), _) => End::Cut(failure),
    }
}
