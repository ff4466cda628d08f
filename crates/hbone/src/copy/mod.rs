//! Moves bytes between a TCP socket and a tunnel, or between two TCP sockets, keeping what TCP promises: a half-close stays a
//! half-close, a reset arrives as a reset and never as a clean end, and a slow reader slows the writer.
//!
//! Both directions run in the caller's task. A direction that has nothing to read holds no buffer.

mod buffer;
mod pump;
mod tunnels;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use h2::Reason;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::error::{LostCause, StreamError};
use crate::stream::{Side, TunnelStream};
use pump::{Fault, Pump, TcpSink, TcpSource, TunnelSink, TunnelSource};
pub use tunnels::copy_tunnels;

/// Counts bytes as they pass, for live views of a connection.
pub trait CopyObserver: Send + Sync {
    /// `bytes` went from the first socket to the tunnel or the second socket.
    fn on_sent(&self, _bytes: u64) {}
    /// `bytes` came back.
    fn on_received(&self, _bytes: u64) {}
}

/// How a copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyOutcome<R> {
    /// Bytes from the first socket, handed to the tunnel or the second socket.
    pub sent: u64,
    /// Bytes written to the first socket.
    pub received: u64,
    /// What ended it.
    pub close_cause: CloseCause<R>,
    /// The code of the peer's RST_STREAM, if that ended it.
    pub reason: Option<Reason>,
    /// The socket's error, if that ended it.
    pub error: Option<io::ErrorKind>,
}

/// How long a copy may stand still; each is measured to within twice its length. `None` is for ever, which is what TCP promises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IdleLimits {
    /// While both directions are open.
    pub open: Option<Duration>,
    /// Once one direction has ended: the application at its end is often gone, and nothing else would say so.
    pub half_closed: Option<Duration>,
}

/// What ended a copy. After anything but `Clean`, both sides have been reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloseCause<R> {
    /// Both directions ended with their half-close.
    Clean,
    /// The first socket was reset or failed.
    ClientReset,
    /// The tunnel's stream, or the second socket, was reset or failed.
    PeerReset,
    /// The connection under the tunnel was lost.
    ConnectionLost(LostCause),
    /// No byte passed for the idle time.
    IdleTimeout,
    /// One direction had ended, and no byte passed in the other for the time that such a copy may stand still.
    HalfClosedTimeout,
    /// The caller's future resolved, with its reason.
    Killed(R),
}

/// A socket that sends RST when dropped, unless it is disarmed: a copy that is cancelled must not look like a clean end.
struct ResetOnDrop {
    socket: TcpStream,
    armed: bool,
}

/// What ended it, before the bytes are counted in.
struct End<R> {
    cause: CloseCause<R>,
    reason: Option<Reason>,
    error: Option<io::ErrorKind>,
}

/// Fires when a count has not changed for a whole period. Looks at the count only when its timer fires, so moving bytes costs
/// nothing, and it fires between one and two periods after the last byte. Without a limit there is no timer.
struct IdleTimer {
    limits: IdleLimits,
    timer: Option<(Pin<Box<Sleep>>, Duration)>,
    half_closed: bool,
    seen: u64,
}

impl CopyObserver for () {}

impl<T: CopyObserver + ?Sized> CopyObserver for std::sync::Arc<T> {
    fn on_sent(&self, bytes: u64) {
        (**self).on_sent(bytes);
    }

    fn on_received(&self, bytes: u64) {
        (**self).on_received(bytes);
    }
}

/// Makes dropping `socket` send RST instead of FIN.
pub fn arm_reset(socket: &TcpStream) {
    // Fails only on a socket that is already dead, which then needs no reset.
    let _ = socket.set_zero_linger();
}

/// Copies between `tcp` and `tunnel` until both directions have ended, or one fails, or it stood still for longer than `idle`
/// allows, or `kill` resolves. Pass `std::future::pending()` for no `kill`. Both are closed on return: with FIN and END_STREAM after
/// a clean end, else with RST and RST_STREAM: `CONNECT_ERROR` from the side that answered the CONNECT, as RFC 9113 8.5 asks of
/// a proxy whose TCP connection failed, and `CANCEL` from the side that sent it. Dropping the future resets both.
pub async fn copy_bidirectional<O, K>(
    tcp: TcpStream,
    tunnel: TunnelStream,
    idle: IdleLimits,
    observer: O,
    kill: K,
) -> CopyOutcome<K::Output>
where
    O: CopyObserver,
    K: Future,
{
    let mut tcp = ResetOnDrop::new(tcp);
    let code = if tunnel.side() == Side::Server { Reason::CONNECT_ERROR } else { Reason::CANCEL };
    let (recv, send) = tunnel.split();
    let (mut source, mut sink) = (TunnelSource::new(recv), TunnelSink::new(send));
    let (mut up, mut down) = (Pump::new(), Pump::new());
    let mut idle = IdleTimer::new(idle);
    let end = {
        let (read, write) = tcp.socket.split();
        let (mut tcp_source, mut tcp_sink) = (TcpSource::new(read), TcpSink::new(write.as_ref()));
        let mut failure = pin!(failure(write.as_ref()));
        let mut watched = true;
        let mut kill = pin!(kill);
        poll_fn(|cx| {
            if let Poll::Ready(reason) = kill.as_mut().poll(cx) {
                return Poll::Ready(End::killed(reason));
            }
            if let Err((at, fault)) = up.poll(cx, &mut tcp_source, &mut sink, |n| observer.on_sent(n)) {
                return Poll::Ready(End::of(at == pump::At::Source, fault));
            }
            if let Err((at, fault)) = down.poll(cx, &mut source, &mut tcp_sink, |n| observer.on_received(n)) {
                return Poll::Ready(End::of(at == pump::At::Sink, fault));
            }
            if up.is_done() && down.is_done() {
                return Poll::Ready(End::clean());
            }
            // The reset of one side while the other is blocked, or while this direction has ended, shows in no read.
            if let Poll::Ready(error) = sink.poll_reset(cx) {
                return Poll::Ready(End::of(false, Fault::Tunnel(error)));
            }
            if let Some(error) = watch(cx, !up.is_reading(), &mut watched, failure.as_mut()) {
                return Poll::Ready(End::of(true, Fault::Socket(error)));
            }
            idle.poll(cx, up.moved() + down.moved(), up.is_done() || down.is_done())
        })
        .await
    };
    if end.is_clean() {
        tcp.armed = false;
    } else {
        sink.reset(code);
    }
    end.outcome(up.moved(), down.moved())
}

/// Copies between two sockets, for traffic that passes in plaintext, with the semantics of [`copy_bidirectional`].
pub async fn copy_tcp<O, K>(
    client: TcpStream,
    server: TcpStream,
    idle: IdleLimits,
    observer: O,
    kill: K,
) -> CopyOutcome<K::Output>
where
    O: CopyObserver,
    K: Future,
{
    let (mut client, mut server) = (ResetOnDrop::new(client), ResetOnDrop::new(server));
    let (mut up, mut down) = (Pump::new(), Pump::new());
    let mut idle = IdleTimer::new(idle);
    let end = {
        let (client_read, client_write) = client.socket.split();
        let (server_read, server_write) = server.socket.split();
        let (mut client_source, mut client_sink) =
            (TcpSource::new(client_read), TcpSink::new(client_write.as_ref()));
        let (mut server_source, mut server_sink) =
            (TcpSource::new(server_read), TcpSink::new(server_write.as_ref()));
        let mut client_failure = pin!(failure(client_write.as_ref()));
        let mut server_failure = pin!(failure(server_write.as_ref()));
        let mut watched = [true, true];
        let mut kill = pin!(kill);
        poll_fn(|cx| {
            if let Poll::Ready(reason) = kill.as_mut().poll(cx) {
                return Poll::Ready(End::killed(reason));
            }
            if let Err((at, fault)) =
                up.poll(cx, &mut client_source, &mut server_sink, |n| observer.on_sent(n))
            {
                return Poll::Ready(End::of(at == pump::At::Source, fault));
            }
            if let Err((at, fault)) =
                down.poll(cx, &mut server_source, &mut client_sink, |n| observer.on_received(n))
            {
                return Poll::Ready(End::of(at == pump::At::Sink, fault));
            }
            if up.is_done() && down.is_done() {
                return Poll::Ready(End::clean());
            }
            if let Some(error) = watch(cx, !up.is_reading(), &mut watched[0], client_failure.as_mut()) {
                return Poll::Ready(End::of(true, Fault::Socket(error)));
            }
            if let Some(error) = watch(cx, !down.is_reading(), &mut watched[1], server_failure.as_mut()) {
                return Poll::Ready(End::of(false, Fault::Socket(error)));
            }
            idle.poll(cx, up.moved() + down.moved(), up.is_done() || down.is_done())
        })
        .await
    };
    if end.is_clean() {
        client.armed = false;
        server.armed = false;
    }
    end.outcome(up.moved(), down.moved())
}

/// Resolves when the socket has failed (a reset from the other end, for one), without reading or writing. `None` if the
/// kernel flagged an error and then had none to tell.
async fn failure(socket: &TcpStream) -> Option<io::ErrorKind> {
    match socket.ready(Interest::ERROR).await {
        Ok(_) => socket.take_error().ok().flatten().map(|error| error.kind()),
        Err(error) => Some(error.kind()),
    }
}

/// Polls a socket's failure where no read or write would show it, and no more once it has resolved.
fn watch(
    cx: &mut Context<'_>,
    wanted: bool,
    watched: &mut bool,
    failure: Pin<&mut impl Future<Output = Option<io::ErrorKind>>>,
) -> Option<io::ErrorKind> {
    if !wanted || !*watched {
        return None;
    }
    match failure.poll(cx) {
        Poll::Ready(error) => {
            *watched = false;
            error
        }
        Poll::Pending => None,
    }
}

impl ResetOnDrop {
    fn new(socket: TcpStream) -> Self {
        Self { socket, armed: true }
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if self.armed {
            arm_reset(&self.socket);
        }
    }
}

impl<R> End<R> {
    fn clean() -> Self {
        Self { cause: CloseCause::Clean, reason: None, error: None }
    }

    fn idle(half_closed: bool) -> Self {
        let cause = if half_closed { CloseCause::HalfClosedTimeout } else { CloseCause::IdleTimeout };
        Self { cause, reason: None, error: None }
    }

    fn killed(reason: R) -> Self {
        Self { cause: CloseCause::Killed(reason), reason: None, error: None }
    }

    /// A fault, at the first socket (`client`) or at the other side.
    fn of(client: bool, fault: Fault) -> Self {
        let cause = if client { CloseCause::ClientReset } else { CloseCause::PeerReset };
        match fault {
            Fault::Socket(error) => Self { cause, reason: None, error: Some(error) },
            Fault::Tunnel(StreamError::Reset(reason)) => Self { cause, reason: Some(reason), error: None },
            Fault::Tunnel(StreamError::ConnectionLost { cause }) => {
                Self { cause: CloseCause::ConnectionLost(cause), reason: None, error: None }
            }
            Fault::Tunnel(StreamError::Finished) => Self { cause, reason: None, error: None },
        }
    }

    fn is_clean(&self) -> bool {
        matches!(self.cause, CloseCause::Clean)
    }

    fn outcome(self, sent: u64, received: u64) -> CopyOutcome<R> {
        CopyOutcome { sent, received, close_cause: self.cause, reason: self.reason, error: self.error }
    }
}

impl IdleTimer {
    fn new(limits: IdleLimits) -> Self {
        Self { limits, timer: limits.open.map(timer), half_closed: false, seen: 0 }
    }

    fn poll<R>(&mut self, cx: &mut Context<'_>, count: u64, half_closed: bool) -> Poll<End<R>> {
        if half_closed && !self.half_closed {
            self.half_closed = true;
            self.seen = count;
            // Whichever is shorter: a limit for what is open holds for what is half open too.
            self.timer = self.limits.half_closed.into_iter().chain(self.limits.open).min().map(timer);
        }
        let Some((timer, period)) = &mut self.timer else { return Poll::Pending };
        while timer.as_mut().poll(cx).is_ready() {
            if std::mem::replace(&mut self.seen, count) == count {
                return Poll::Ready(End::idle(half_closed));
            }
            timer.as_mut().reset(Instant::now() + *period);
        }
        Poll::Pending
    }
}

fn timer(period: Duration) -> (Pin<Box<Sleep>>, Duration) {
    (Box::pin(sleep(period)), period)
}
