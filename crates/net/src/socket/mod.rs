//! TCP and UDP sockets as a transparent proxy needs them.
//!
//! Functions that make a socket do so in the calling thread's namespace; wrap them in [`crate::NetNs::run`]. Functions
//! that take a [`crate::NetNs`] do that themselves.

mod accept;
mod dial;
mod info;
mod listen;
mod original;
mod reserve;
mod tunnel;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

pub use accept::Acceptor;
pub use dial::{DialError, DialOptions, connect, socket_for};
pub use info::{TcpInfo, TcpState, tcp_info};
pub use listen::{ListenOptions, bind_udp, listen_tcp, listen_tcp_any, migrate_when_closed};
pub use original::original_destination;
pub use reserve::{Reserve, exhausted};
pub use tunnel::tune_tunnel;

use crate::sys;

/// TCP keepalive, in whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe, 1 s to 32767 s.
    pub idle: Duration,
    /// Between probes, 1 s to 32767 s.
    pub interval: Duration,
    /// Unanswered probes before the connection is given up, 1 to 127.
    pub count: u32,
}

impl Default for Keepalive {
    /// 180 s, 180 s, 9: what ambient uses on sockets towards applications (Z114).
    fn default() -> Self {
        Self { idle: Duration::from_secs(180), interval: Duration::from_secs(180), count: 9 }
    }
}

/// Sets what every accepted connection needs: no Nagle delay, and keepalive (Z114); and, if one is given, how long what was sent
/// may stay unacknowledged.
///
/// # Errors
/// `EINVAL` for a keepalive out of bounds.
pub fn tune_accepted(
    stream: &impl AsFd,
    keepalive: &Keepalive,
    user_timeout: Option<Duration>,
) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    if user_timeout.is_some() {
        socket.set_tcp_user_timeout(user_timeout)?;
    }
    set_keepalive(&socket, keepalive)
}

/// From now on closing the connection sends RST instead of FIN, and drops what is unsent (`SO_LINGER` of 0). Used to
/// carry a reset through the tunnel.
///
/// # Errors
/// Only if the descriptor is not a socket.
pub fn arm_reset(stream: &impl AsFd) -> io::Result<()> {
    let linger = libc::linger { l_onoff: 1, l_linger: 0 };
    sys::set_option(stream.as_fd(), libc::SOL_SOCKET, libc::SO_LINGER, &linger)
}

/// Sets the packet mark of a socket. Needs `CAP_NET_ADMIN`.
///
/// # Errors
/// `EPERM` without the capability.
pub fn set_mark(socket: &impl AsFd, mark: u32) -> io::Result<()> {
    sys::set_option(socket.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, &mark)
}

/// Raises the limit of open files to the hard limit and returns the new soft limit (Z04): each tunnelled connection
/// takes two descriptors.
///
/// # Errors
/// If the kernel refuses, which it does not for the hard limit.
pub fn raise_nofile_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// An address of a dual-stack socket in the form a person means: `::ffff:10.0.0.1` becomes `10.0.0.1`.
#[must_use]
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(IpAddr::V4(v4), v6.port()),
            None => addr,
        },
        SocketAddr::V4(_) => addr,
    }
}

fn set_keepalive(socket: &socket2::Socket, keepalive: &Keepalive) -> io::Result<()> {
    socket.set_tcp_keepalive(
        &socket2::TcpKeepalive::new()
            .with_time(keepalive.idle)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.count),
    )
}

/// Lets a socket bind to, and receive for, an address that is not of this machine.
fn set_transparent(fd: BorrowedFd<'_>, v6: bool) -> io::Result<()> {
    if v6 {
        sys::enable(fd, libc::SOL_IPV6, libc::IPV6_TRANSPARENT)?;
        return sys::enable(fd, libc::SOL_IPV6, libc::IPV6_FREEBIND);
    }
    sys::enable(fd, libc::SOL_IP, libc::IP_TRANSPARENT)?;
    sys::enable(fd, libc::SOL_IP, libc::IP_FREEBIND)
}
