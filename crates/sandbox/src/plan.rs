//! The address plan: which addresses nodes, pods and services get. Pure.
//!
//! Everything lives in ranges that no real network should route: RFC 2544 benchmarking (198.18.0.0/15), RFC 6598 shared
//! addresses (100.64.0.0/10) and RFC 4193 local IPv6. Each sandbox has namespaces of its own, so two of them never clash.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Highest node number: the third byte of a pod's IPv4 address, and 10+n must stay a byte.
pub const MAX_NODES: u16 = 200;
/// Host numbers of pods on one node: 1 is left free for a gateway, 255 is the broadcast address of the /24.
pub const POD_HOSTS: std::ops::RangeInclusive<u16> = 2..=254;
/// Host numbers of services: the low 15 bits of 198.18.128.0/17 without the first and the last.
pub const SERVICE_HOSTS: std::ops::RangeInclusive<u16> = 1..=0x7ffe;

/// Which address families a sandbox uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 alone. The IPv6 stack stays on (loopback works), but no address is given out.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both, IPv4 first.
    #[default]
    Dual,
}

/// Hands out host numbers by the hash of a name, so that a name gets the same address in each run.
#[derive(Debug)]
pub struct Pool {
    range: std::ops::RangeInclusive<u16>,
    taken: BTreeMap<u16, String>,
}

impl Family {
    /// Whether IPv4 addresses are given out.
    pub fn v4(self) -> bool {
        self != Family::Ipv6
    }

    /// Whether IPv6 addresses are given out.
    pub fn v6(self) -> bool {
        self != Family::Ipv4
    }

    /// Keeps those of `addresses` that belong to a family in use; the order stays.
    pub fn keep(self, addresses: impl IntoIterator<Item = IpAddr>) -> Vec<IpAddr> {
        addresses.into_iter().filter(|a| if a.is_ipv4() { self.v4() } else { self.v6() }).collect()
    }
}

impl Pool {
    /// A pool over `range`, all free.
    pub fn new(range: std::ops::RangeInclusive<u16>) -> Self {
        Pool { range, taken: BTreeMap::new() }
    }

    /// The number of `key`: what it holds already, or the first free one from its hash on. `None` when all are taken.
    pub fn take(&mut self, key: &str) -> Option<u16> {
        if let Some(host) = self.taken.iter().find_map(|(host, owner)| (owner == key).then_some(*host)) {
            return Some(host);
        }
        let (first, last) = (*self.range.start(), *self.range.end());
        let span = last - first + 1;
        let start = u16::try_from(fnv1a(key.as_bytes()) % u32::from(span)).expect("less than span, a u16");
        let host = (0..span)
            .map(|step| first + (u32::from(start) + u32::from(step)).rem_euclid(u32::from(span)) as u16)
            .find(|host| !self.taken.contains_key(host))?;
        self.taken.insert(host, key.to_owned());
        Some(host)
    }

    /// Takes one given number for `key`; false if another key holds it or it is outside the range.
    pub fn claim(&mut self, host: u16, key: &str) -> bool {
        if !self.range.contains(&host) {
            return false;
        }
        self.taken.entry(host).or_insert_with(|| key.to_owned()) == key
    }

    /// Who holds numbers now.
    pub fn owners(&self) -> Vec<String> {
        self.taken.values().cloned().collect()
    }

    /// Frees what `key` holds.
    pub fn release(&mut self, key: &str) {
        self.taken.retain(|_, owner| owner != key);
    }
}

/// Addresses of node `n` (1-based) on the fabric: 198.18.0.(10+n) and fd00:18::(10+n, hexadecimal 10).
pub fn node_addresses(n: u16) -> [IpAddr; 2] {
    let n = n.min(MAX_NODES);
    [fabric_v4(10 + n as u8).into(), fabric_v6(0x10 + n).into()]
}

/// Addresses of the controller's namespace.
pub fn controller_addresses() -> [IpAddr; 2] {
    [fabric_v4(2).into(), fabric_v6(2).into()]
}

/// Addresses of the cluster DNS server; they are in the controller's namespace.
pub fn dns_addresses() -> [IpAddr; 2] {
    [fabric_v4(3).into(), fabric_v6(3).into()]
}

/// Networks of the pods of node `n`.
pub fn pod_networks(n: u16) -> [IpNet; 2] {
    let n = n.min(MAX_NODES);
    [
        net4(Ipv4Addr::new(100, 64, n as u8, 0), 24).into(),
        net6(Ipv6Addr::new(0xfd00, 0x64, n, 0, 0, 0, 0, 0), 64).into(),
    ]
}

/// Addresses of the pod with host number `host` on node `n`.
pub fn pod_addresses(n: u16, host: u16) -> [IpAddr; 2] {
    let n = n.min(MAX_NODES);
    [
        Ipv4Addr::new(100, 64, n as u8, host as u8).into(),
        Ipv6Addr::new(0xfd00, 0x64, n, 0, 0, 0, 0, host).into(),
    ]
}

/// Networks of the service addresses.
pub fn service_networks() -> [IpNet; 2] {
    [
        net4(Ipv4Addr::new(198, 18, 128, 0), 17).into(),
        net6(Ipv6Addr::new(0xfd00, 0x18, 0x80, 0, 0, 0, 0, 0), 112).into(),
    ]
}

/// Addresses of the service with host number `host`.
pub fn service_addresses(host: u16) -> [IpAddr; 2] {
    let [high, low] = host.to_be_bytes();
    [
        Ipv4Addr::new(198, 18, 0x80 | high, low).into(),
        Ipv6Addr::new(0xfd00, 0x18, 0x80, 0, 0, 0, 0, host).into(),
    ]
}

/// The host number inside a service address, if it is in the service network.
pub fn service_host(address: IpAddr) -> Option<u16> {
    if !service_networks().iter().any(|net| net.contains(&address)) {
        return None;
    }
    Some(match address {
        IpAddr::V4(v4) => u16::from_be_bytes([v4.octets()[2] & 0x7f, v4.octets()[3]]),
        IpAddr::V6(v6) => v6.segments()[7],
    })
}

/// Prefix length of the fabric network for `address`'s family.
pub fn fabric_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 17 } else { 64 }
}

/// FNV-1a: stable over runs and machines, unlike the hashers of the standard library.
pub fn fnv1a(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

fn fabric_v4(host: u8) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, 0, host)
}

fn fabric_v6(host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x18, 0, 0, 0, 0, 0, host)
}

fn net4(address: Ipv4Addr, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(address, prefix)
}

fn net6(address: Ipv6Addr, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(address, prefix)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_and_collisions_move_on() {
        let mut pool = Pool::new(1..=3);
        let a = pool.take("a").unwrap();
        assert_eq!(pool.take("a"), Some(a));
        let mut all = vec![a, pool.take("b").unwrap(), pool.take("c").unwrap()];
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3]);
        assert_eq!(pool.take("d"), None);
        pool.release("b");
        assert!(pool.take("d").is_some());
        assert!(!pool.claim(a, "d"));
        assert!(pool.claim(a, "a"));
    }

    #[test]
    fn service_addresses_carry_their_number() {
        for host in [1, 255, 256, 0x7ffe] {
            for address in service_addresses(host) {
                assert_eq!(service_host(address), Some(host), "{address}");
            }
        }
        assert_eq!(service_addresses(5)[0].to_string(), "198.18.128.5");
        assert_eq!(service_addresses(5)[1].to_string(), "fd00:18:80::5");
        assert_eq!(service_host(node_addresses(1)[0]), None);
    }

    #[test]
    fn the_plan_is_the_documented_one() {
        assert_eq!(node_addresses(1).map(|a| a.to_string()), ["198.18.0.11", "fd00:18::11"]);
        assert_eq!(pod_addresses(2, 7).map(|a| a.to_string()), ["100.64.2.7", "fd00:64:2::7"]);
        assert_eq!(Family::Ipv6.keep(dns_addresses())[0].to_string(), "fd00:18::3");
    }
}
