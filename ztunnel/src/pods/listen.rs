//! Accepting connections inside a pod and giving each to a worker.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use culvert_net::socket::{Acceptor, canonical, exhausted};
use culvert_runtime::backoff::{Backoff, Bounds};
use culvert_runtime::drain::DrainWatcher;

use super::pod::Shared;
use crate::observe::limits::Limit;

/// Between tries to accept when the process or the machine is out of descriptors or memory: spinning would only make it worse.
/// The one connection that is reset before each pause tells its client; the rest waits, 1024 at most for each listener.
const PAUSE: Bounds = Bounds::doubling(Duration::from_millis(10), Duration::from_millis(500));

/// At the end of a listener: what waits in a full queue, twice, so that a flood cannot hold the drain up.
const LAST: usize = 2048;

/// Accepts until the drain starts, then takes what waits and closes the listener at once (Z08): another proxy's listener on
/// the same port takes what comes next, and what was not accepted yet (see `migrate_when_closed`).
pub async fn accept(
    listener: TcpListener,
    drain: DrainWatcher,
    shared: &Shared,
    serve: impl Fn(TcpStream, SocketAddr),
) {
    let acceptor = match Acceptor::new(listener) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            tracing::error!(%error, "a listener cannot be watched");
            return;
        }
    };
    let mut pause = Backoff::new(PAUSE, fastrand::Rng::new());
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            _ = drain.started() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                pause.reset();
                serve(stream, peer);
            }
            Err(error) if exhausted(&error) => {
                let refused = shared.reserve.refuse_one(&acceptor);
                let limits = &shared.observer.metrics.limits;
                limits.reached(Limit::Descriptors);
                if let Some(others) = limits.line_due(Limit::Descriptors) {
                    tracing::warn!(%error, refused, others, "connections wait: out of descriptors or memory");
                }
                tokio::select! {
                    () = tokio::time::sleep(pause.next_delay()) => {}
                    _ = drain.started() => return,
                }
            }
            // The connection was gone before it was accepted: the next one is another's.
            Err(_) => {}
        }
    }
    for _ in 0..LAST {
        match acceptor.try_accept() {
            Ok((stream, peer)) => serve(stream, peer),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock || exhausted(&error) => return,
            Err(_) => {}
        }
    }
}

/// Takes an accepted connection over on the thread that serves it; with it comes the address at which it was accepted. Its
/// options it has from its listener.
///
/// # Errors
/// The connection is gone already.
pub fn adopt(stream: TcpStream) -> io::Result<(tokio::net::TcpStream, SocketAddr)> {
    stream.set_nonblocking(true)?;
    let local = canonical(stream.local_addr()?);
    Ok((tokio::net::TcpStream::from_std(stream)?, local))
}
