//! Which interfaces of a node lead to a pod.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::NetNs;
use crate::netlink::{Message, NetlinkSocket, attr};

const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINK_NETNSID: u16 = 37;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;
/// struct ifinfomsg: family, padding, type (2), index (4), flags (4), change (4).
const HEADER: usize = 16;

/// The names of the interfaces in `node` whose other end is in `pod`. None for a pod that is not attached by a pair (macvlan, a
/// device of its own), or whose pair ends elsewhere.
///
/// # Errors
/// What netlink gives.
pub fn node_side(pod: &NetNs, node: &NetNs) -> io::Result<Vec<String>> {
    let mut inside = pod.run(|| NetlinkSocket::open(libc::NETLINK_ROUTE))?;
    let mut outside = node.run(|| NetlinkSocket::open(libc::NETLINK_ROUTE))?;
    let mut names = Vec::new();
    for (_, link) in inside.dump(Message::new(libc::RTM_GETLINK, 0, &[0; HEADER]))? {
        let Some((index, attributes)) = split(&link) else { continue };
        // An index alone names an interface of the same namespace: what a macvlan sits on, not a peer.
        let elsewhere = attr::find(attributes, IFLA_LINK_NETNSID).is_some();
        if let (true, Some(peer)) = (elsewhere, attr::find_ne(attributes, IFLA_LINK))
            && let Some(name) = peer_name(&mut outside, pod, peer, index)?
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// The name of interface `peer`, if its other end is interface `index` of `pod`. Indices repeat from namespace to namespace, so
/// both ends must name each other and the kernel must say that the namespace is this pod's.
fn peer_name(outside: &mut NetlinkSocket, pod: &NetNs, peer: u32, index: u32) -> io::Result<Option<String>> {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&peer.to_ne_bytes());
    let answers = match outside.ask(Message::new(libc::RTM_GETLINK, 0, &header)) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
        answers => answers?,
    };
    let Some((_, attributes)) = answers.iter().find_map(|(_, link)| split(link)) else { return Ok(None) };
    let same = attr::find_ne(attributes, IFLA_LINK) == Some(index)
        && attr::find_ne(attributes, IFLA_LINK_NETNSID) == namespace_number(outside, pod)?;
    Ok(attr::find_str(attributes, IFLA_IFNAME).filter(|_| same).map(str::to_owned))
}

/// By which number interfaces of the socket's namespace refer to `of`; `None` if none does.
fn namespace_number(socket: &mut NetlinkSocket, of: &NetNs) -> io::Result<Option<u32>> {
    let mut message = Message::new(libc::RTM_GETNSID, 0, &[0; 4]);
    message.attrs.put_ne(NETNSA_FD, of.as_fd().as_raw_fd().cast_unsigned());
    let answers = socket.ask(message)?;
    let number = answers.iter().find_map(|(_, payload)| attr::find_ne(payload.get(4..)?, NETNSA_NSID));
    Ok(number.filter(|number| *number != u32::MAX))
}

fn split(link: &[u8]) -> Option<(u32, &[u8])> {
    let index = link.get(4..8)?.first_chunk::<4>()?;
    Some((u32::from_ne_bytes(*index), link.get(HEADER..)?))
}
