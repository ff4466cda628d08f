//! Where a redirected connection wanted to go.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::AsFd;

use super::canonical;
use crate::sys;

/// The destination that an accepted, redirected connection was addressed to (C41). For a connection that was not
/// redirected it is the socket's own address. IPv4 addresses come as IPv4 also from a dual-stack socket.
///
/// # Errors
/// `ENOENT` when connection tracking does not know the connection, for example after it was flushed: refuse such a
/// connection, its destination is unknown.
pub fn original_destination(socket: &impl AsFd) -> io::Result<SocketAddr> {
    let fd = socket.as_fd();
    let local = socket2::SockRef::from(socket)
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not an IP socket"))?;
    // A dual-stack socket with an IPv4 peer shows a mapped local address; conntrack has it as IPv4.
    if canonical(local).is_ipv4() {
        let a: libc::sockaddr_in = sys::get_option(fd, libc::SOL_IP, libc::SO_ORIGINAL_DST)?;
        let ip = Ipv4Addr::from(u32::from_be(a.sin_addr.s_addr));
        return Ok(SocketAddr::from((ip, u16::from_be(a.sin_port))));
    }
    let a: libc::sockaddr_in6 = sys::get_option(fd, libc::SOL_IPV6, libc::IP6T_SO_ORIGINAL_DST)?;
    let ip = Ipv6Addr::from(a.sin6_addr.s6_addr);
    let addr = SocketAddrV6::new(ip, u16::from_be(a.sin6_port), 0, a.sin6_scope_id);
    Ok(canonical(addr.into()))
}
