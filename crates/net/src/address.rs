//! Which addresses the interfaces of a namespace have.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::NetNs;
use crate::netlink::{Message, attr};

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
/// Another machine may have it: duplicate address detection said so, or has not ended.
const NOT_USABLE: u32 = libc::IFA_F_DADFAILED | libc::IFA_F_TENTATIVE;
/// struct ifaddrmsg: family, prefix length, flags, scope, index (4).
const HEADER: usize = 8;

impl NetNs {
    /// Whether an interface of this namespace has this address and may use it. Asks the kernel each time, since an address may
    /// go at any moment; a few microseconds, without entering the namespace once its first question has been asked.
    ///
    /// Not whether a socket could be bound to it: `ip_nonlocal_bind` lets one be bound to anything.
    ///
    /// # Errors
    /// What netlink gives; then nothing is known.
    pub fn has_address(&self, address: IpAddr) -> io::Result<bool> {
        let address = address.to_canonical();
        let mut header = [0; HEADER];
        header[0] = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 } as u8;
        let answers = self.routing(|socket| socket.dump(Message::new(libc::RTM_GETADDR, 0, &header)))?;
        Ok(answers.iter().any(|(_, answer)| usable(answer) == Some(address)))
    }
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
