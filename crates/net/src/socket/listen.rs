//! Listening sockets.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

use super::{Keepalive, set_mark, set_transparent, tune_accepted};

/// What [`migrate_when_closed`] sets.
const MIGRATE: &str = "ipv4/tcp_migrate_req";

/// How to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// Packet mark of the socket, inherited by what it accepts. The proxy's own is 0x539 (C40, Z115).
    pub mark: Option<u32>,
    /// Accept connections to addresses that are not of this namespace. Needs `CAP_NET_ADMIN`.
    pub transparent: bool,
    /// Share the port with another process of the same user, for rolling updates (Z10).
    pub reuse_port: bool,
    /// Connections that may wait to be accepted. The kernel caps it at `net.core.somaxconn`, 4096 by default.
    pub backlog: i32,
    /// No Nagle delay and this keepalive for every accepted connection (Z114), which inherits them from the listener: set once
    /// here instead of with five calls on each.
    pub accepted: Option<Keepalive>,
    /// How long an accepted connection's sent bytes may stay unacknowledged, inherited too; only with `accepted`.
    pub user_timeout: Option<Duration>,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self {
            mark: None,
            transparent: false,
            reuse_port: false,
            backlog: 1024,
            accepted: None,
            user_timeout: None,
        }
    }
}

/// Listens on one address: nonblocking, close-on-exec, `SO_REUSEADDR`. `[::]` takes IPv4 too.
///
/// # Errors
/// The usual ones of binding; `EAFNOSUPPORT` or `EADDRNOTAVAIL` for IPv6 where there is none.
pub fn listen_tcp(addr: SocketAddr, options: &ListenOptions) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if options.reuse_port {
        socket.set_reuse_port(true)?;
    }
    if let SocketAddr::V6(v6) = addr {
        socket.set_only_v6(!v6.ip().is_unspecified())?;
    }
    if let Some(mark) = options.mark {
        set_mark(&socket, mark)?;
    }
    if options.transparent {
        set_transparent(socket.as_fd(), addr.is_ipv6())?;
    }
    if let Some(keepalive) = &options.accepted {
        tune_accepted(&socket, keepalive, options.user_timeout)?;
    }
    socket.bind(&addr.into())?;
    socket.listen(options.backlog)?;
    Ok(socket.into())
}

/// Listens on a port of every address: `[::]` for both families, or `0.0.0.0` where there is no IPv6 (Z116).
///
/// # Errors
/// As [`listen_tcp`]. A port that is taken on `[::]` is an error, not a reason to fall back.
pub fn listen_tcp_any(port: u16, options: &ListenOptions) -> io::Result<TcpListener> {
    match listen_tcp((Ipv6Addr::UNSPECIFIED, port).into(), options) {
        Err(error) if no_ipv6(&error) => listen_tcp((Ipv4Addr::UNSPECIFIED, port).into(), options),
        outcome => outcome,
    }
}

/// Binds a UDP socket: nonblocking, close-on-exec. A socket on `[::]` is IPv6 only. One with a port of its own shares it
/// with another process of the same user, for rolling updates (Z10).
///
/// # Errors
/// The usual ones of binding.
pub fn bind_udp(addr: SocketAddr, mark: Option<u32>) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if addr.port() != 0 {
        socket.set_reuse_port(true)?;
    }
    if let Some(mark) = mark {
        set_mark(&socket, mark)?;
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Lets connections that wait at a listener, or have not finished their handshake, go on to another listener of its
/// [`reuse_port`](ListenOptions::reuse_port) group when it closes; the kernel resets them otherwise (Z10). A setting of the
/// calling thread's network namespace, since Linux 5.14.
///
/// # Errors
/// The setting cannot be written: an older kernel, or `/proc/sys` is read-only.
pub fn migrate_when_closed() -> io::Result<()> {
    crate::sysctl::write(MIGRATE, "1")
}

/// The kernel has no IPv6 at all, or it is disabled in this namespace.
fn no_ipv6(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Z114: what is accepted needs no option set.
    #[test]
    fn accepted_connections_inherit() {
        let options = ListenOptions { accepted: Some(Keepalive::default()), ..ListenOptions::default() };
        let listener = listen_tcp("127.0.0.1:0".parse().unwrap(), &options).unwrap();
        let _near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        listener.set_nonblocking(false).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let socket = socket2::SockRef::from(&accepted);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Keepalive::default().idle);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Keepalive::default().interval);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), Keepalive::default().count);
    }
}
