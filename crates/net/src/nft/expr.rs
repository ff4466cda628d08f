//! Rules as lists of nf_tables expressions.
//!
//! An expression reads or writes registers. Every test here loads a value into register 1 and compares it, so rules are
//! built from small steps that do not depend on each other; only NAT uses register 2 as well.

use std::net::IpAddr;

use ipnet::IpNet;

use super::code;
use crate::netlink::attr::Attrs;

/// A field of a packet that `meta` can load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Meta {
    /// Packet mark.
    Mark,
    /// Name of the interface the packet came in by.
    IifName,
    /// Name of the interface the packet leaves by.
    OifName,
    /// User that owns the sending socket.
    SkUid,
    /// IPv4 or IPv6, in a table of family inet.
    NfProto,
    /// Transport protocol number.
    L4Proto,
}

/// A property of a tracked connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ct {
    /// New, established and so on, as a bit set: see [`Rule::ct_state`].
    State,
    /// The packet's direction: 0 original, 1 reply.
    Direction,
    /// What has happened to it, as a bit set: see [`Rule::ct_status`].
    Status,
    /// Connection mark.
    Mark,
    /// Conntrack zone; only to set, before tracking (priority below -200).
    Zone,
}

/// What a rule decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let pass this hook's chain.
    Accept,
    /// Discard.
    Drop,
    /// Back to the calling chain, or to a base chain's policy.
    Return,
    /// Run another chain, then go on with the next rule.
    Jump(String),
    /// Run another chain instead of the rest of this one.
    Goto(String),
}

/// How a comparison must come out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less, as big-endian bytes.
    Lt,
    /// Greater, as big-endian bytes.
    Gt,
}

/// One expression: its name and attributes, as the kernel takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expr {
    pub name: &'static str,
    pub data: Attrs,
}

/// A rule: tests, then statements, in order. Built by chaining.
///
/// ```
/// use culvert_net::nft::Rule;
/// let rule = Rule::new("web to the proxy").tcp().dport(80).redirect(15001);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub(crate) comment: String,
    pub(crate) exprs: Vec<Expr>,
}

impl Rule {
    /// An empty rule, which matches everything. The comment, at most 127 bytes (the rest is cut), is shown by
    /// `nft list` and in errors.
    #[must_use]
    pub fn new(comment: &str) -> Self {
        let end = (0..=comment.len().min(127)).rev().find(|i| comment.is_char_boundary(*i)).unwrap_or(0);
        Self { comment: comment[..end].to_owned(), exprs: Vec::new() }
    }

    pub(super) fn push(mut self, name: &'static str, fill: impl FnOnce(&mut Attrs)) -> Self {
        let mut data = Attrs::default();
        fill(&mut data);
        self.exprs.push(Expr { name, data });
        self
    }

    // ---- loads into register 1 ----

    fn load_meta(self, key: Meta) -> Self {
        self.push("meta", |a| {
            a.put_be(code::META_DREG, code::REG_1).put_be(code::META_KEY, code::meta(key));
        })
    }

    pub(super) fn load_ct(self, key: Ct) -> Self {
        self.push("ct", |a| {
            a.put_be(code::CT_DREG, code::REG_1).put_be(code::CT_KEY, code::ct(key));
        })
    }

    fn load_payload(self, base: u32, offset: u32, len: u32) -> Self {
        self.load_payload_to(code::REG_1, base, offset, len)
    }

    fn load_payload_to(self, register: u32, base: u32, offset: u32, len: u32) -> Self {
        self.push("payload", |a| {
            a.put_be(code::PAYLOAD_DREG, register)
                .put_be(code::PAYLOAD_BASE, base)
                .put_be(code::PAYLOAD_OFFSET, offset)
                .put_be(code::PAYLOAD_LEN, len);
        })
    }

    /// Loads the source or destination address; the family must have been tested before.
    fn load_address(self, v6: bool, destination: bool) -> Self {
        let (offset, len) = match (v6, destination) {
            (false, false) => (12, 4),
            (false, true) => (16, 4),
            (true, false) => (8, 16),
            (true, true) => (24, 16),
        };
        self.load_payload(code::NETWORK_HEADER, offset, len)
    }

    /// Loads an immediate value into a register.
    pub(super) fn immediate(self, register: u32, value: &[u8]) -> Self {
        self.push("immediate", |a| {
            a.put_be(code::IMMEDIATE_DREG, register).nest(code::IMMEDIATE_DATA, |d| {
                d.put(code::DATA_VALUE, value);
            });
        })
    }

    fn cmp(self, op: Cmp, value: &[u8]) -> Self {
        self.push("cmp", |a| {
            a.put_be(code::CMP_SREG, code::REG_1).put_be(code::CMP_OP, code::cmp(op)).nest(
                code::CMP_DATA,
                |d| {
                    d.put(code::DATA_VALUE, value);
                },
            );
        })
    }

    /// Register 1 = (register 1 & mask) ^ xor.
    pub(super) fn bitwise(self, mask: &[u8], xor: &[u8]) -> Self {
        self.push("bitwise", |a| {
            a.put_be(code::BITWISE_SREG, code::REG_1)
                .put_be(code::BITWISE_DREG, code::REG_1)
                .put_be(code::BITWISE_LEN, mask.len() as u32)
                .nest(code::BITWISE_MASK, |d| {
                    d.put(code::DATA_VALUE, mask);
                })
                .nest(code::BITWISE_XOR, |d| {
                    d.put(code::DATA_VALUE, xor);
                });
        })
    }

    fn lookup(self, set: &str, invert: bool) -> Self {
        self.push("lookup", |a| {
            a.put_str(code::LOOKUP_SET, set)
                .put_be(code::LOOKUP_SREG, code::REG_1)
                .put_be(code::LOOKUP_FLAGS, u32::from(invert));
        })
    }

    // ---- tests ----

    /// Only IPv4.
    #[must_use]
    pub fn ipv4(self) -> Self {
        self.load_meta(Meta::NfProto).cmp(Cmp::Eq, &[code::NFPROTO_IPV4])
    }

    /// Only IPv6.
    #[must_use]
    pub fn ipv6(self) -> Self {
        self.load_meta(Meta::NfProto).cmp(Cmp::Eq, &[code::NFPROTO_IPV6])
    }

    /// Only TCP.
    #[must_use]
    pub fn tcp(self) -> Self {
        self.load_meta(Meta::L4Proto).cmp(Cmp::Eq, &[libc::IPPROTO_TCP as u8])
    }

    /// Only UDP.
    #[must_use]
    pub fn udp(self) -> Self {
        self.load_meta(Meta::L4Proto).cmp(Cmp::Eq, &[libc::IPPROTO_UDP as u8])
    }

    /// Source port; TCP or UDP must have been tested before.
    #[must_use]
    pub fn sport(self, op: Cmp, port: u16) -> Self {
        self.load_payload(code::TRANSPORT_HEADER, 0, 2).cmp(op, &port.to_be_bytes())
    }

    /// Destination port equal; TCP or UDP must have been tested before.
    #[must_use]
    pub fn dport(self, port: u16) -> Self {
        self.dport_cmp(Cmp::Eq, port)
    }

    /// Destination port compared; TCP or UDP must have been tested before.
    #[must_use]
    pub fn dport_cmp(self, op: Cmp, port: u16) -> Self {
        self.load_payload(code::TRANSPORT_HEADER, 2, 2).cmp(op, &port.to_be_bytes())
    }

    /// Destination port in a set of `inet_service`.
    #[must_use]
    pub fn dport_in(self, set: &str) -> Self {
        self.load_payload(code::TRANSPORT_HEADER, 2, 2).lookup(set, false)
    }

    /// Source port in a set of `inet_service`.
    #[must_use]
    pub fn sport_in(self, set: &str) -> Self {
        self.load_payload(code::TRANSPORT_HEADER, 0, 2).lookup(set, false)
    }

    /// Destination address and port in a set of pairs; tests the family too. TCP or UDP must have been tested before.
    #[must_use]
    pub fn destination_and_port_in(self, set: &str, v6: bool) -> Self {
        let rule = if v6 { self.ipv6() } else { self.ipv4() };
        // The parts of a key lie in registers one after the other.
        let second = if v6 { code::REG_2 } else { code::REG32_01 };
        rule.load_address(v6, true).load_payload_to(second, code::TRANSPORT_HEADER, 2, 2).lookup(set, false)
    }

    /// Source address in a network; tests the family too.
    #[must_use]
    pub fn source(self, net: impl Into<IpNet>) -> Self {
        self.address(net.into(), false, Cmp::Eq)
    }

    /// Destination address in a network; tests the family too.
    #[must_use]
    pub fn destination(self, net: impl Into<IpNet>) -> Self {
        self.address(net.into(), true, Cmp::Eq)
    }

    /// Destination address of that family, outside the network.
    #[must_use]
    pub fn destination_not(self, net: impl Into<IpNet>) -> Self {
        self.address(net.into(), true, Cmp::Ne)
    }

    fn address(self, net: IpNet, destination: bool, op: Cmp) -> Self {
        let net = net.trunc();
        let v6 = matches!(net, IpNet::V6(_));
        let rule = if v6 { self.ipv6() } else { self.ipv4() }.load_address(v6, destination);
        let value = octets(net.network());
        if net.prefix_len() == net.max_prefix_len() {
            return rule.cmp(op, &value);
        }
        let zero = vec![0; value.len()];
        rule.bitwise(&octets(net.netmask()), &zero).cmp(op, &value)
    }

    /// Destination address in a set of `ipv4_addr` or `ipv6_addr`; tests the family too.
    #[must_use]
    pub fn destination_in(self, set: &str, v6: bool) -> Self {
        let rule = if v6 { self.ipv6() } else { self.ipv4() };
        rule.load_address(v6, true).lookup(set, false)
    }

    /// Interface the packet came in by.
    #[must_use]
    pub fn iifname(self, op: Cmp, name: &str) -> Self {
        self.load_meta(Meta::IifName).cmp(op, &interface(name))
    }

    /// Interface the packet leaves by.
    #[must_use]
    pub fn oifname(self, op: Cmp, name: &str) -> Self {
        self.load_meta(Meta::OifName).cmp(op, &interface(name))
    }

    /// User that owns the sending socket.
    #[must_use]
    pub fn skuid(self, uid: u32) -> Self {
        self.load_meta(Meta::SkUid).cmp(Cmp::Eq, &uid.to_ne_bytes())
    }

    /// The sending socket is of a process in the cgroup (of version 2) with this id, or in one below it; `level` says how far the
    /// cgroup is below the root. Not in postrouting (kernel 5.13).
    #[must_use]
    pub fn cgroup(self, level: u32, id: u64) -> Self {
        self.push("socket", |a| {
            a.put_be(code::SOCKET_DREG, code::REG_1)
                .put_be(code::SOCKET_KEY, code::SOCKET_CGROUP_V2)
                .put_be(code::SOCKET_LEVEL, level);
        })
        .cmp(Cmp::Eq, &id.to_ne_bytes())
    }

    /// Packet mark under a mask.
    #[must_use]
    pub fn mark(self, op: Cmp, value: u32, mask: u32) -> Self {
        self.load_meta(Meta::Mark).bitwise(&mask.to_ne_bytes(), &[0; 4]).cmp(op, &value.to_ne_bytes())
    }

    /// Connection mark under a mask.
    #[must_use]
    pub fn ct_mark(self, op: Cmp, value: u32, mask: u32) -> Self {
        self.load_ct(Ct::Mark).bitwise(&mask.to_ne_bytes(), &[0; 4]).cmp(op, &value.to_ne_bytes())
    }

    /// Connection state has any of these bits: invalid 1, established 2, related 4, new 8, untracked 64.
    #[must_use]
    pub fn ct_state(self, bits: u32) -> Self {
        self.load_ct(Ct::State).bitwise(&bits.to_ne_bytes(), &[0; 4]).cmp(Cmp::Ne, &[0; 4])
    }

    /// Connection status has any of these bits: confirmed 8, source translated 16, destination translated 32.
    #[must_use]
    pub fn ct_status(self, bits: u32) -> Self {
        self.load_ct(Ct::Status).bitwise(&bits.to_ne_bytes(), &[0; 4]).cmp(Cmp::Ne, &[0; 4])
    }

    /// Packets of the connection's reply direction, or of its original one.
    #[must_use]
    pub fn ct_reply(self, reply: bool) -> Self {
        self.load_ct(Ct::Direction).cmp(Cmp::Eq, &[u8::from(reply)])
    }

    /// A random number below `modulus` comes out 0: one packet (in a nat chain: one connection) in `modulus`.
    #[must_use]
    pub fn one_in(self, modulus: u32) -> Self {
        self.push("numgen", |a| {
            a.put_be(code::NG_DREG, code::REG_1)
                .put_be(code::NG_MODULUS, modulus.max(1))
                .put_be(code::NG_TYPE, code::NG_RANDOM)
                .put_be(code::NG_OFFSET, 0);
        })
        .cmp(Cmp::Eq, &[0; 4])
    }
}

pub(crate) fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// An interface name as `meta` loads it: 16 bytes, NUL padded; longer names do not exist.
fn interface(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(15)) {
        *to = from;
    }
    bytes
}
