//! Accepting connections inside a pod and giving each to a worker.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use culvert_net::socket::{Acceptor, canonical};
use culvert_runtime::drain::DrainWatcher;

/// When the process or the machine is out of descriptors or memory: spinning on accept would only make it worse.
const PAUSE: Duration = Duration::from_millis(100);

/// Accepts until the drain starts, then closes the listener at once (Z08): another proxy's listener on the same port
/// takes what comes next.
pub async fn accept(listener: TcpListener, drain: DrainWatcher, serve: impl Fn(TcpStream, SocketAddr)) {
    let acceptor = match Acceptor::new(listener) {
        Ok(acceptor) => acceptor,
        Err(error) => {
            tracing::error!(%error, "a listener cannot be watched");
            return;
        }
    };
    loop {
        let accepted = tokio::select! {
            accepted = acceptor.accept() => accepted,
            _ = drain.started() => return,
        };
        match accepted {
            Ok((stream, peer)) => serve(stream, peer),
            Err(error) if exhausted(&error) => {
                tracing::warn!(%error, "connections wait: out of descriptors or memory");
                tokio::time::sleep(PAUSE).await;
            }
            // The connection was gone before it was accepted: the next one is another's.
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

fn exhausted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}
