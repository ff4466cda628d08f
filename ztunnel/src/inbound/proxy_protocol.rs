//! PROXY protocol version 2, as far as a gateway behind this proxy is told who came (Z53). Only writing; nothing here reads.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use culvert_model::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// The source's SPIFFE identity (Z53), from the range that the specification leaves to applications.
const TLV_IDENTITY: u8 = 0xd0;

/// The header that comes before the first byte: who connects, to what, and the identity that TLS proved.
///
/// Addresses of two families are both written as IPv6, the IPv4 one mapped. An identity has at most 255 + 2 * 253 bytes and
/// 17 of fixed text, so the header is at most 832 bytes.
pub fn header(source: SocketAddr, destination: SocketAddr, identity: &Identity) -> Vec<u8> {
    let mut addresses = Vec::with_capacity(36);
    let family = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            addresses.extend_from_slice(&from.octets());
            addresses.extend_from_slice(&to.octets());
            TCP_OVER_IPV4
        }
        (from, to) => {
            addresses.extend_from_slice(&mapped(from).octets());
            addresses.extend_from_slice(&mapped(to).octets());
            TCP_OVER_IPV6
        }
    };
    addresses.extend_from_slice(&source.port().to_be_bytes());
    addresses.extend_from_slice(&destination.port().to_be_bytes());
    let identity = identity.to_string();
    let length = |bytes: usize| u16::try_from(bytes).expect("an identity's parts are bounded").to_be_bytes();

    let mut header = Vec::with_capacity(SIGNATURE.len() + 4 + addresses.len() + 3 + identity.len());
    header.extend_from_slice(&SIGNATURE);
    header.extend_from_slice(&[VERSION_COMMAND, family]);
    header.extend_from_slice(&length(addresses.len() + 3 + identity.len()));
    header.extend_from_slice(&addresses);
    header.push(TLV_IDENTITY);
    header.extend_from_slice(&length(identity.len()));
    header.extend_from_slice(identity.as_bytes());
    header
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::identity;

    const WHO: &[u8] = b"spiffe://cluster.local/ns/shop/sa/client";

    /// Z53, byte for byte: the specification's section 2.2 for IPv4.
    #[test]
    fn ipv4() {
        let header = header(
            "100.64.1.2:40000".parse().unwrap(),
            "198.18.128.9:80".parse().unwrap(),
            &identity("shop", "client"),
        );
        let mut expected = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11".to_vec();
        expected.extend_from_slice(&[0, 12 + 3 + 40]);
        expected.extend_from_slice(&[100, 64, 1, 2, 198, 18, 128, 9, 0x9c, 0x40, 0, 80]);
        expected.extend_from_slice(&[0xd0, 0, 40]);
        expected.extend_from_slice(WHO);
        assert_eq!(header, expected);
    }

    /// Z53: IPv6, and two families in one header.
    #[test]
    fn ipv6_and_mixed() {
        let who = identity("shop", "client");
        let v6 = header("[fd00::2]:40000".parse().unwrap(), "[fd00::9]:80".parse().unwrap(), &who);
        assert_eq!(v6[12..16], [0x21, 0x21, 0, 36 + 3 + 40]);
        assert_eq!(v6[16..20], [0xfd, 0, 0, 0]);
        assert_eq!(v6[48..52], [0x9c, 0x40, 0, 80]);
        assert_eq!(v6.len(), 16 + 36 + 3 + 40);
        let mixed = header("100.64.1.2:40000".parse().unwrap(), "[fd00::9]:80".parse().unwrap(), &who);
        assert_eq!(mixed[13], 0x21);
        assert_eq!(mixed[16..32], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 100, 64, 1, 2]);
        let written_mapped =
            header("[::ffff:100.64.1.2]:40000".parse().unwrap(), "100.64.1.9:80".parse().unwrap(), &who);
        assert_eq!(written_mapped[13], 0x11, "a mapped address is an IPv4 address");
    }
}
