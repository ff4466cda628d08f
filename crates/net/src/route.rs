//! Policy routing over rtnetlink: just enough for the return path of spoofed connections (C39).

use std::io;

use crate::netlink::{CREATE, EXCL, Message, NetlinkSocket, REPLACE, attr};

const FRA_PRIORITY: u16 = 6;
const FRA_FWMARK: u16 = 10;
const FRA_TABLE: u16 = 15;
const FRA_FWMASK: u16 = 16;
const FR_ACT_TO_TBL: u8 = 1;
const RTA_OIF: u16 = 4;
/// The loopback interface is the first of every namespace, always.
const LOOPBACK_INDEX: u32 = 1;

/// A rule "packets with this mark look in this table".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MarkRule {
    pub preference: u32,
    pub mark: u32,
    pub mask: u32,
    pub table: u8,
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::V4 => libc::AF_INET as u8,
            Self::V6 => libc::AF_INET6 as u8,
        }
    }
}

/// A routing socket of the namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Routing {
    socket: NetlinkSocket,
}

impl Routing {
    /// Opens it in the current namespace.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Self { socket: NetlinkSocket::open(libc::NETLINK_ROUTE)? })
    }

    /// Adds the rule; it may be there.
    pub(crate) fn add_rule(&mut self, family: Family, rule: MarkRule) -> io::Result<()> {
        tolerate(
            self.socket.request(rule_message(libc::RTM_NEWRULE, CREATE | EXCL, family, rule)),
            &[libc::EEXIST],
        )
    }

    /// Deletes every rule of this preference that leads to this table, whatever its mark; there may be none.
    pub(crate) fn delete_rules(&mut self, family: Family, preference: u32, table: u8) -> io::Result<()> {
        // One request deletes one rule. We add one; this many at most are cleaned if others added more.
        for _ in 0..16 {
            let mut message = Message::new(libc::RTM_DELRULE, 0, &rule_header(family, table));
            message.attrs.put_ne(FRA_PRIORITY, preference).put_ne(FRA_TABLE, table.into());
            match self.socket.request(message) {
                Ok(()) => {}
                other => return tolerate(other, &[libc::ENOENT, libc::EAFNOSUPPORT]),
            }
        }
        Ok(())
    }

    /// Whether the rule is there.
    pub(crate) fn has_rule(&mut self, family: Family, rule: MarkRule) -> io::Result<bool> {
        let wanted = rule_message(libc::RTM_NEWRULE, 0, family, rule);
        let mut header = [0_u8; 12];
        header[0] = family.number();
        let answers = self.socket.dump(Message::new(libc::RTM_GETRULE, 0, &header))?;
        Ok(answers.iter().any(|(_, payload)| {
            payload.len() >= 12
                && payload[0] == family.number()
                && payload[7] == FR_ACT_TO_TBL
                && attr::includes(&payload[12..], wanted.attrs.as_bytes())
        }))
    }

    /// Adds "everything is local, on the loopback interface" to a table; it may be there.
    pub(crate) fn add_local_default(&mut self, family: Family, table: u8) -> io::Result<()> {
        self.socket.request(local_default(libc::RTM_NEWROUTE, CREATE | REPLACE, family, table))
    }

    /// Deletes that route; it may be missing.
    pub(crate) fn delete_local_default(&mut self, family: Family, table: u8) -> io::Result<()> {
        tolerate(
            self.socket.request(local_default(libc::RTM_DELROUTE, 0, family, table)),
            &[libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::EAFNOSUPPORT, libc::ENETUNREACH],
        )
    }

    /// Whether that route is there.
    pub(crate) fn has_local_default(&mut self, family: Family, table: u8) -> io::Result<bool> {
        let mut header = [0_u8; 12];
        header[0] = family.number();
        let answers = self.socket.dump(Message::new(libc::RTM_GETROUTE, 0, &header))?;
        Ok(answers.iter().any(|(_, payload)| {
            payload.len() >= 12
                && payload[0] == family.number()
                && payload[1] == 0
                && payload[4] == table
                && payload[7] == libc::RTN_LOCAL
                && attr::find_ne(&payload[12..], RTA_OIF) == Some(LOOPBACK_INDEX)
        }))
    }
}

/// Whether IPv6 works on the loopback interface of the current namespace (C46). Without it the kernel would refuse the
/// route, and nothing could use it.
pub(crate) fn ipv6_enabled() -> bool {
    std::fs::read("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|value| value.first() == Some(&b'0'))
}

/// struct fib_rule_hdr: family, dst_len, src_len, tos, table, two reserved, action, flags (4).
fn rule_header(family: Family, table: u8) -> [u8; 12] {
    [family.number(), 0, 0, 0, table, 0, 0, FR_ACT_TO_TBL, 0, 0, 0, 0]
}

fn rule_message(kind: u16, flags: u16, family: Family, rule: MarkRule) -> Message {
    let mut message = Message::new(kind, flags, &rule_header(family, rule.table));
    message
        .attrs
        .put_ne(FRA_PRIORITY, rule.preference)
        .put_ne(FRA_FWMARK, rule.mark)
        .put_ne(FRA_FWMASK, rule.mask)
        .put_ne(FRA_TABLE, rule.table.into());
    message
}

fn local_default(kind: u16, flags: u16, family: Family, table: u8) -> Message {
    let scope = match family {
        Family::V4 => libc::RT_SCOPE_HOST,
        Family::V6 => libc::RT_SCOPE_UNIVERSE,
    };
    // struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags (4).
    let header = [family.number(), 0, 0, 0, table, libc::RTPROT_STATIC, scope, libc::RTN_LOCAL, 0, 0, 0, 0];
    let mut message = Message::new(kind, flags, &header);
    message.attrs.put_ne(RTA_OIF, LOOPBACK_INDEX);
    message
}

fn tolerate(outcome: io::Result<()>, errnos: &[i32]) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error().is_some_and(|e| errnos.contains(&e)) => Ok(()),
        other => other,
    }
}
