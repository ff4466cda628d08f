//! From one tunnel to another, as a waypoint does for streams that are no requests.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use bytes::Bytes;
use h2::Reason;

use super::pump::{At, Fault, Pump, TunnelSink, TunnelSource};
use super::{CopyObserver, CopyOutcome, End, IdleLimits, IdleTimer};
use crate::stream::{Side, TunnelStream};

/// Copies between two tunnels, with the semantics of [`super::copy_bidirectional`]. `early` was received from the client before, and
/// goes to the server first.
pub async fn copy_tunnels<O, K>(
    client: TunnelStream,
    early: Bytes,
    server: TunnelStream,
    idle: IdleLimits,
    observer: O,
    kill: K,
) -> CopyOutcome<K::Output>
where
    O: CopyObserver,
    K: Future,
{
    let code = |tunnel: &TunnelStream| match tunnel.side() {
        Side::Server => Reason::CONNECT_ERROR,
        Side::Client => Reason::CANCEL,
    };
    let codes = (code(&client), code(&server));
    let ((client_recv, client_send), (server_recv, server_send)) = (client.split(), server.split());
    let (mut from_client, mut to_client) = (TunnelSource::new(client_recv), TunnelSink::new(client_send));
    let (mut from_server, mut to_server) = (TunnelSource::new(server_recv), TunnelSink::new(server_send));
    let (mut up, mut down) = (Pump::beginning_with(early), Pump::new());
    let mut idle = IdleTimer::new(idle);
    let mut kill = pin!(kill);
    let end = poll_fn(|cx| {
        if let Poll::Ready(reason) = kill.as_mut().poll(cx) {
            return Poll::Ready(End::killed(reason));
        }
        if let Err((at, fault)) = up.poll(cx, &mut from_client, &mut to_server, |n| observer.on_sent(n)) {
            return Poll::Ready(End::of(at == At::Source, fault));
        }
        if let Err((at, fault)) = down.poll(cx, &mut from_server, &mut to_client, |n| observer.on_received(n))
        {
            return Poll::Ready(End::of(at == At::Sink, fault));
        }
        if up.is_done() && down.is_done() {
            return Poll::Ready(End::clean());
        }
        // The reset of one side while the other is blocked, or while its direction has ended, shows in no read.
        if let Poll::Ready(error) = to_client.poll_reset(cx) {
            return Poll::Ready(End::of(true, Fault::Tunnel(error)));
        }
        if let Poll::Ready(error) = to_server.poll_reset(cx) {
            return Poll::Ready(End::of(false, Fault::Tunnel(error)));
        }
        idle.poll(cx, up.moved() + down.moved(), up.is_done() || down.is_done())
    })
    .await;
    if !end.is_clean() {
        to_client.reset(codes.0);
        to_server.reset(codes.1);
    }
    end.outcome(up.moved(), down.moved())
}
