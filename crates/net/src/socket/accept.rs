//! Accepting on one thread what another will serve.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// A listener whose connections belong to no reactor yet: tokio's own registers each with the listener's thread, and
/// moving it to the thread that serves it would register it twice.
#[derive(Debug)]
pub struct Acceptor {
    listener: AsyncFd<Socket>,
}

impl Acceptor {
    /// Watches a nonblocking listener on the current runtime.
    ///
    /// # Errors
    /// The reactor cannot watch it.
    pub fn new(listener: TcpListener) -> io::Result<Self> {
        Ok(Self { listener: sys::watch(Socket::from(listener), Interest::READABLE)? })
    }

    /// The next connection, blocking mode as accepted, and its peer with IPv4-mapped addresses as IPv4.
    ///
    /// Cancel safe: a connection is either returned or still in the queue.
    ///
    /// # Errors
    /// What accept(2) says: `EMFILE` and the like, or the fate of a connection that is already gone.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        loop {
            let mut ready = self.listener.readable().await?;
            match ready.try_io(|listener| listener.get_ref().accept()) {
                Ok(accepted) => {
                    let (socket, peer) = accepted?;
                    let peer = peer.as_socket().ok_or(io::ErrorKind::Unsupported)?;
                    return Ok((socket.into(), super::canonical(peer)));
                }
                Err(_would_block) => {}
            }
        }
    }

    /// A connection that waits already, as from [`accept`](Self::accept).
    ///
    /// # Errors
    /// `WouldBlock` where none waits; else as [`accept`](Self::accept).
    pub fn try_accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (socket, peer) = self.listener.get_ref().accept()?;
        let peer = peer.as_socket().ok_or(io::ErrorKind::Unsupported)?;
        Ok((socket.into(), super::canonical(peer)))
    }
}
