//! Which addresses the interfaces of a namespace have.

use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;

use crate::NetNs;
use crate::netlink::{Message, NetlinkSocket, attr};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// The kernel's groups of changes of addresses, IPv4 and IPv6.
const GROUPS: [u32; 2] = [5, 9];
/// Another machine may have it: duplicate address detection said so, or has not ended.
const NOT_USABLE: u32 = libc::IFA_F_DADFAILED | libc::IFA_F_TENTATIVE;
/// struct ifaddrmsg: family, prefix length, flags, scope, index (4).
const HEADER: usize = 8;
/// Changes taken in at a time. What is left is met by the next question; that something changed is known from the first.
const MAX_CHANGES: usize = 64;

/// What the interfaces had when something last changed, and the socket that tells of changes.
#[derive(Debug)]
pub(crate) struct Addresses {
    changes: socket2::Socket,
    known: Option<Vec<IpAddr>>,
}

impl NetNs {
    /// Whether an interface of this namespace has this address and may use it.
    ///
    /// As fresh as asking the kernel each time, which announces a change before the call that made it returns; but listing addresses
    /// waits for whoever configures any interface of the machine, and so is done only after a change. Otherwise it costs one
    /// system call that never waits. One descriptor for a namespace that is asked about.
    ///
    /// It is not whether a socket could be bound to it: `ip_nonlocal_bind` lets one be bound to anything.
    ///
    /// # Errors
    /// What netlink gives; then nothing is known.
    pub fn has_address(&self, address: IpAddr) -> io::Result<bool> {
        let mut kept = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        let addresses = match &mut *kept {
            Some(addresses) => addresses,
            none => none.insert(Addresses { changes: self.run(follow)?, known: None }),
        };
        if addresses.changed() {
            addresses.known = None;
        }
        let known = match &addresses.known {
            Some(known) => known,
            None => addresses.known.insert(self.run(list)?),
        };
        Ok(known.contains(&address.to_canonical()))
    }
}

impl Addresses {
    /// Whether there was a change since the last question; also if there were too many to be told of.
    fn changed(&mut self) -> bool {
        for seen in 0..MAX_CHANGES {
            // What changed does not matter, so the rest of the message may be lost.
            match self.changes.read(&mut [0; 16]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return seen > 0,
                Err(_) => return true,
            }
        }
        true
    }
}

fn follow() -> io::Result<socket2::Socket> {
    let socket = NetlinkSocket::open(libc::NETLINK_ROUTE)?;
    for group in GROUPS {
        socket.join(group)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket.into_inner())
}

fn list() -> io::Result<Vec<IpAddr>> {
    let mut socket = NetlinkSocket::open(libc::NETLINK_ROUTE)?;
    let answers = socket.dump(Message::new(libc::RTM_GETADDR, 0, &[0; HEADER]))?;
    Ok(answers.iter().filter_map(|(_, answer)| usable(answer)).collect())
}

/// The address that an answer is about, if it can be used.
fn usable(answer: &[u8]) -> Option<IpAddr> {
    let attributes = answer.get(HEADER..)?;
    // The wider attribute has all flags, the header's byte the lowest eight: both of ours are among them.
    let flags = attr::find_ne(attributes, IFA_FLAGS).unwrap_or_else(|| u32::from(answer[2]));
    if flags & NOT_USABLE != 0 {
        return None;
    }
    // On a point-to-point interface the first is the peer's, and its own is the second.
    let bytes = attr::find(attributes, IFA_LOCAL).or_else(|| attr::find(attributes, IFA_ADDRESS))?;
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(four).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|sixteen| Ipv6Addr::from(sixteen).into())
}
