//! What a rule does once its tests have passed.

use std::net::SocketAddr;

use super::code;
use super::expr::{Ct, Meta, Rule, Verdict, octets};

impl Rule {
    /// Counts packets and bytes that get here.
    #[must_use]
    pub fn counter(self) -> Self {
        self.push("counter", |_| {})
    }

    /// Packet mark = value.
    #[must_use]
    pub fn set_mark(self, value: u32) -> Self {
        self.immediate(code::REG_1, &value.to_ne_bytes()).store_mark()
    }

    /// Packet mark = connection mark (C35, restore).
    #[must_use]
    pub fn restore_mark(self) -> Self {
        self.load_ct(Ct::Mark).store_mark()
    }

    fn store_mark(self) -> Self {
        self.push("meta", |a| {
            a.put_be(code::META_SREG, code::REG_1).put_be(code::META_KEY, code::meta(Meta::Mark));
        })
    }

    /// Connection mark = (connection mark & !mask) ^ value (C35, set-xmark).
    #[must_use]
    pub fn set_ct_mark(self, value: u32, mask: u32) -> Self {
        self.load_ct(Ct::Mark).bitwise(&(!mask).to_ne_bytes(), &value.to_ne_bytes()).store_ct(Ct::Mark)
    }

    /// Puts the connection to be tracked into a conntrack zone (C38). Only in a chain of priority below -200.
    #[must_use]
    pub fn set_ct_zone(self, zone: u16) -> Self {
        self.immediate(code::REG_1, &zone.to_ne_bytes()).store_ct(Ct::Zone)
    }

    /// Puts only the original direction of the connection to be tracked into a zone; replies are looked for in the default
    /// one. Only in a chain of priority below -200.
    #[must_use]
    pub fn set_ct_original_zone(self, zone: u16) -> Self {
        self.immediate(code::REG_1, &zone.to_ne_bytes()).push("ct", |a| {
            a.put_be(code::CT_SREG, code::REG_1)
                .put_be(code::CT_KEY, code::ct(Ct::Zone))
                .put(code::CT_DIRECTION, &[code::CT_ORIGINAL]);
        })
    }

    fn store_ct(self, key: Ct) -> Self {
        self.push("ct", |a| {
            a.put_be(code::CT_SREG, code::REG_1).put_be(code::CT_KEY, code::ct(key));
        })
    }

    /// Exempts the packet from connection tracking. Only in a chain of priority below -200.
    #[must_use]
    pub fn notrack(self) -> Self {
        self.push("notrack", |_| {})
    }

    /// Redirects to a port of this machine. Only in nat chains of prerouting and output.
    #[must_use]
    pub fn redirect(self, port: u16) -> Self {
        self.immediate(code::REG_1, &port.to_be_bytes()).push("redir", |a| {
            a.put_be(code::REDIR_PROTO_MIN, code::REG_1)
                .put_be(code::REDIR_PROTO_MAX, code::REG_1)
                .put_be(code::REDIR_FLAGS, code::NAT_PORT_SPECIFIED);
        })
    }

    /// Rewrites the destination. The family must have been tested before. Port 0 keeps the port.
    #[must_use]
    pub fn dnat(self, to: SocketAddr) -> Self {
        self.nat(code::NAT_DNAT, to)
    }

    /// Rewrites the source. The family must have been tested before. Port 0 leaves the port to the kernel.
    #[must_use]
    pub fn snat(self, to: SocketAddr) -> Self {
        self.nat(code::NAT_SNAT, to)
    }

    fn nat(self, kind: u32, to: SocketAddr) -> Self {
        let mut rule = self.immediate(code::REG_1, &octets(to.ip()));
        let mut flags = code::NAT_ADDRESS_SPECIFIED;
        if to.port() != 0 {
            rule = rule.immediate(code::REG_2, &to.port().to_be_bytes());
            flags |= code::NAT_PORT_SPECIFIED;
        }
        let family = if to.is_ipv4() { code::NFPROTO_IPV4 } else { code::NFPROTO_IPV6 };
        rule.push("nat", |a| {
            a.put_be(code::NAT_TYPE, kind)
                .put_be(code::NAT_FAMILY, family.into())
                .put_be(code::NAT_ADDR_MIN, code::REG_1)
                .put_be(code::NAT_ADDR_MAX, code::REG_1);
            if to.port() != 0 {
                a.put_be(code::NAT_PROTO_MIN, code::REG_2).put_be(code::NAT_PROTO_MAX, code::REG_2);
            }
            a.put_be(code::NAT_FLAGS, flags);
        })
    }

    /// Rewrites the source to the address of the outgoing interface.
    #[must_use]
    pub fn masquerade(self) -> Self {
        self.push("masq", |_| {})
    }

    /// Answers with "port unreachable", which a client sees as a refused connection. Only in filter chains of input, forward
    /// and output.
    #[must_use]
    pub fn reject(self) -> Self {
        self.push("reject", |a| {
            a.put_be(code::REJECT_TYPE, code::REJECT_ICMPX_UNREACH)
                .put(code::REJECT_ICMP_CODE, &[code::REJECT_ICMPX_PORT_UNREACH]);
        })
    }

    /// Ends the rule with a verdict.
    #[must_use]
    pub fn verdict(self, verdict: Verdict) -> Self {
        self.push("immediate", |a| {
            a.put_be(code::IMMEDIATE_DREG, code::REG_VERDICT).nest(code::IMMEDIATE_DATA, |d| {
                d.nest(code::DATA_VERDICT, |v| {
                    v.put_be(code::VERDICT_CODE, code::verdict(&verdict));
                    if let Verdict::Jump(chain) | Verdict::Goto(chain) = &verdict {
                        v.put_str(code::VERDICT_CHAIN, chain);
                    }
                });
            });
        })
    }

    /// Ends the rule with accept.
    #[must_use]
    pub fn accept(self) -> Self {
        self.verdict(Verdict::Accept)
    }
}
