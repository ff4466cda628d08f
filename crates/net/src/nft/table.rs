//! What a table is made of: chains and sets.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::code;
use super::expr::octets;
use crate::netlink::attr::Attrs;

/// What kind of work a base chain does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookType {
    /// Accept, drop, mark.
    Filter,
    /// Address translation; sees only the first packet of a connection.
    Nat,
    /// Output only: a changed mark makes the kernel route the packet again.
    Route,
}

/// Where a base chain hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum HookPoint {
    /// Every packet that arrives.
    Prerouting = 0,
    /// Packets for this machine.
    Input = 1,
    /// Packets passing through.
    Forward = 2,
    /// Packets of local processes.
    Output = 3,
    /// Every packet that leaves.
    Postrouting = 4,
    /// Every packet that one interface takes in, before anything else looks at it, bridged or routed (kernel 5.10).
    Ingress = 5,
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// What kind of work it does.
    pub kind: HookType,
    /// Where it hangs.
    pub point: HookPoint,
    /// Order among chains there: raw -300, conntrack -200, mangle -150, dstnat -100, filter 0, srcnat 100.
    pub priority: i32,
    /// Discard what reaches the end, instead of accepting it.
    pub drop: bool,
}

/// A chain: with a hook a base chain, without one the target of jumps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Unique in its table.
    pub name: String,
    /// Where it hangs, if it is a base chain.
    pub hook: Option<Hook>,
    /// The interface it hangs on; only at [`HookPoint::Ingress`].
    pub device: Option<String>,
}

impl Chain {
    /// A base chain that accepts what reaches its end.
    #[must_use]
    pub fn base(name: &str, kind: HookType, point: HookPoint, priority: i32) -> Self {
        Self { name: name.to_owned(), hook: Some(Hook { kind, point, priority, drop: false }), device: None }
    }

    /// A filter that sees everything an interface takes in, before connection tracking.
    #[must_use]
    pub fn ingress(name: &str, device: &str, priority: i32) -> Self {
        let hook = Hook { kind: HookType::Filter, point: HookPoint::Ingress, priority, drop: false };
        Self { name: name.to_owned(), hook: Some(hook), device: Some(device.to_owned()) }
    }

    /// A chain to jump to.
    #[must_use]
    pub fn regular(name: &str) -> Self {
        Self { name: name.to_owned(), hook: None, device: None }
    }
}

/// What a set holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SetKey {
    /// Networks of IPv4; those of IPv6 are left out.
    Ipv4(Vec<IpNet>),
    /// Networks of IPv6; those of IPv4 are left out.
    Ipv6(Vec<IpNet>),
    /// TCP or UDP ports.
    Ports(BTreeSet<u16>),
    /// Pairs of IPv4 address and port; those of IPv6 are left out.
    Ipv4Port(BTreeSet<SocketAddr>),
    /// Pairs of IPv6 address and port; those of IPv4 are left out.
    Ipv6Port(BTreeSet<SocketAddr>),
}

/// A constant set, filled when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Unique in its table.
    pub name: String,
    /// Its contents. Networks may overlap: they are merged.
    pub key: SetKey,
}

/// An element as the kernel stores it: the key, and whether it ends an interval (exclusively).
pub(crate) type Element = (Vec<u8>, bool);

impl Set {
    pub(crate) fn elements(&self) -> Vec<Element> {
        match &self.key {
            SetKey::Ports(ports) => ports.iter().map(|p| (p.to_be_bytes().to_vec(), false)).collect(),
            SetKey::Ipv4(nets) => intervals(nets.iter().filter(|n| n.addr().is_ipv4())),
            SetKey::Ipv6(nets) => intervals(nets.iter().filter(|n| n.addr().is_ipv6())),
            SetKey::Ipv4Port(pairs) => pairs.iter().filter(|p| p.is_ipv4()).map(pair).collect(),
            SetKey::Ipv6Port(pairs) => pairs.iter().filter(|p| p.is_ipv6()).map(pair).collect(),
        }
    }

    /// Type number (as `nft` numbers them, for display), length of a key, flags.
    pub(crate) fn shape(&self) -> (u32, u32, u32) {
        match self.key {
            SetKey::Ipv4(_) => (7, 4, code::SET_FLAG_INTERVAL | code::SET_FLAG_CONSTANT),
            SetKey::Ipv6(_) => (8, 16, code::SET_FLAG_INTERVAL | code::SET_FLAG_CONSTANT),
            SetKey::Ports(_) => (13, 2, code::SET_FLAG_CONSTANT),
            // Each part takes whole registers of 4 bytes; 6 bits a part in the type.
            SetKey::Ipv4Port(_) => (7 << 6 | 13, 8, code::SET_FLAG_CONSTANT),
            SetKey::Ipv6Port(_) => (8 << 6 | 13, 20, code::SET_FLAG_CONSTANT),
        }
    }
}

fn pair(pair: &SocketAddr) -> Element {
    let mut key = octets(pair.ip());
    key.extend_from_slice(&pair.port().to_be_bytes());
    key.extend_from_slice(&[0; 2]);
    (key, false)
}

/// The other way round; `None` for a key of another shape.
pub(crate) fn unpair((key, _): &Element) -> Option<SocketAddr> {
    let (address, rest) = key.split_at_checked(key.len().checked_sub(4)?)?;
    let ip = match address.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(address).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(address).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes([rest[0], rest[1]])))
}

/// Each network as a start and, unless it reaches the last address, an end; adjacent ones joined.
fn intervals<'a>(nets: impl Iterator<Item = &'a IpNet>) -> Vec<Element> {
    let mut out: Vec<Element> = Vec::new();
    for net in IpNet::aggregate(&nets.map(IpNet::trunc).collect()) {
        let start = octets(net.network());
        // The kernel wants no end that is also a start.
        if out.last().is_some_and(|(key, end)| *end && *key == start) {
            out.pop();
        } else {
            out.push((start, false));
        }
        if let Some(end) = successor(net.broadcast()) {
            out.push((octets(end), true));
        }
    }
    out
}

fn successor(ip: IpAddr) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(v4) => v4.to_bits().checked_add(1).map(|bits| IpAddr::V4(bits.into())),
        IpAddr::V6(v6) => v6.to_bits().checked_add(1).map(|bits| IpAddr::V6(bits.into())),
    }
}

/// The hook of a base chain; nothing for a regular one.
pub(crate) fn put_hook(a: &mut Attrs, chain: &Chain) {
    let Some(hook) = chain.hook else { return };
    let kind = match hook.kind {
        HookType::Filter => "filter",
        HookType::Nat => "nat",
        HookType::Route => "route",
    };
    a.nest(code::CHAIN_HOOK, |h| {
        h.put_be(code::HOOK_NUM, hook.point as u32)
            .put_be(code::HOOK_PRIORITY, hook.priority.cast_unsigned());
        if let Some(device) = &chain.device {
            h.put_str(code::HOOK_DEV, device);
        }
    })
    .put_be(code::CHAIN_POLICY, u32::from(!hook.drop))
    .put_str(code::CHAIN_TYPE, kind);
}

/// The attributes by which a dumped chain is recognised as this one.
pub(crate) fn chain_shape(chain: &Chain) -> Attrs {
    let mut a = Attrs::default();
    a.put_str(code::CHAIN_NAME, &chain.name);
    put_hook(&mut a, chain);
    a
}

pub(crate) fn put_element(list: &mut Attrs, (key, end): &Element) {
    list.nest(code::LIST_ELEM, |e| {
        e.nest(code::SET_ELEM_KEY, |k| {
            k.put(code::DATA_VALUE, key);
        });
        if *end {
            e.put_be(code::SET_ELEM_FLAGS, code::SET_ELEM_INTERVAL_END);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(nets: &[&str]) -> Vec<(IpAddr, bool)> {
        let nets = nets.iter().map(|n| n.parse().unwrap()).collect();
        let set = Set { name: "s".into(), key: SetKey::Ipv4(nets) };
        set.elements()
            .into_iter()
            .map(|(k, end)| (IpAddr::from(<[u8; 4]>::try_from(k).unwrap()), end))
            .collect()
    }

    #[test]
    fn intervals_are_merged_and_do_not_run_past_the_last_address() {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        assert_eq!(
            set(&["10.0.0.0/8", "10.1.0.0/16", "192.168.1.1/32", "fd00::/8"]),
            [
                (ip("10.0.0.0"), false),
                (ip("11.0.0.0"), true),
                (ip("192.168.1.1"), false),
                (ip("192.168.1.2"), true)
            ]
        );
        assert_eq!(set(&["255.0.0.0/8"]), [(ip("255.0.0.0"), false)]);
        assert_eq!(set(&["0.0.0.0/0"]), [(ip("0.0.0.0"), false)]);
        // Adjacent, but not one network: 10.0.0.0-10.0.2.255.
        assert_eq!(set(&["10.0.0.0/23", "10.0.2.0/24"]), [(ip("10.0.0.0"), false), (ip("10.0.3.0"), true)]);
    }
}
