//! Outgoing connections from inside a pod's namespace, with the client's address where asked.

use std::io;
use std::net::{SocketAddr, TcpStream as StdTcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

use super::{Keepalive, canonical, exhausted, set_keepalive, set_mark, set_transparent};
use crate::NetNs;
use crate::sys;

/// How to dial.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DialOptions {
    /// Packet mark, so that the pod's rules do not send the connection back to the proxy (Z115).
    pub mark: Option<u32>,
    /// Appear to come from this address, which need not be ours (Z51). With port 0 the kernel picks a port for the
    /// four-tuple at connect, so that one address can have more than 64 Ki connections. Ignored where it is the
    /// destination's own address (Z51): that is a self call, which gets this source anyway, and spoofed would loop.
    pub source: Option<SocketAddr>,
    /// Send small writes at once.
    pub nodelay: bool,
    /// Probe an idle peer.
    pub keepalive: Option<Keepalive>,
    /// Give up when sent data stays unacknowledged this long.
    pub user_timeout: Option<Duration>,
}

/// Why a dial failed, in the words a person would use.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The host answered that nobody listens there.
    #[error("{0} refused the connection")]
    Refused(SocketAddr),
    /// No route, or the network said that it cannot deliver.
    #[error("{0} is unreachable: {1}")]
    Unreachable(SocketAddr, #[source] io::Error),
    /// No answer in time.
    #[error("{0} did not answer in time")]
    TimedOut(SocketAddr),
    /// The process or the machine is out of descriptors or memory.
    #[error("connecting to {0}: {1}")]
    Exhausted(SocketAddr, #[source] io::Error),
    /// Anything else, usually ours: no permission, address families that differ.
    #[error("connecting to {0}: {1}")]
    Other(SocketAddr, #[source] io::Error),
}

impl DialError {
    fn new(dst: SocketAddr, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ECONNREFUSED) => Self::Refused(dst),
            Some(libc::ETIMEDOUT) => Self::TimedOut(dst),
            Some(
                libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::ENETDOWN
                | libc::EADDRNOTAVAIL,
            ) => Self::Unreachable(dst, error),
            _ if exhausted(&error) => Self::Exhausted(dst, error),
            _ => Self::Other(dst, error),
        }
    }
}

/// A socket made, configured and bound inside `ns`, ready to connect to `dst` from anywhere. `dst` gives the family.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`] if source and destination differ in family; `EPERM` without `CAP_NET_ADMIN` for a
/// mark or a source; what entering the namespace gives.
pub fn socket_for(ns: &NetNs, dst: SocketAddr, options: &DialOptions) -> io::Result<TcpSocket> {
    let dst = canonical(dst);
    let source = options.source.map(canonical).filter(|s| s.ip() != dst.ip());
    if source.is_some_and(|s| s.is_ipv4() != dst.is_ipv4()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "source and destination differ in address family",
        ));
    }
    // Only creation needs the namespace: the socket stays in it. The thread is back before anything else.
    let socket =
        ns.run(|| Socket::new(Domain::for_address(dst), Type::STREAM.nonblocking(), Some(Protocol::TCP)))?;
    if let Some(mark) = options.mark {
        set_mark(&socket, mark)?;
    }
    socket.set_tcp_nodelay(options.nodelay)?;
    if let Some(keepalive) = &options.keepalive {
        set_keepalive(&socket, keepalive)?;
    }
    if let Some(timeout) = options.user_timeout {
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    if let Some(source) = source {
        set_transparent(socket.as_fd(), source.is_ipv6())?;
        if source.port() == 0 {
            // The option is of the IP level for IPv6 sockets too.
            sys::enable(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT)?;
        }
        socket.bind(&source.into())?;
    }
    Ok(TcpSocket::from_std_stream(StdTcpStream::from(socket)))
}

/// Connects from inside `ns` to `dst`, waiting at most `timeout`.
///
/// Dropping the future abandons the attempt and closes the socket.
///
/// # Errors
/// See [`DialError`].
pub async fn connect(
    ns: &NetNs,
    dst: SocketAddr,
    options: &DialOptions,
    timeout: Duration,
) -> Result<TcpStream, DialError> {
    let dst = canonical(dst);
    let socket = socket_for(ns, dst, options).map_err(|e| DialError::new(dst, e))?;
    match tokio::time::timeout(timeout, socket.connect(dst)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(DialError::new(dst, error)),
        Err(_elapsed) => Err(DialError::TimedOut(dst)),
    }
}
