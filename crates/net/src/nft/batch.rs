//! One atomic transaction.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use super::code;
use super::expr::{Rule, octets};
use crate::NetNs;
use crate::netlink::attr::Attrs;
use crate::netlink::{ACK, APPEND, CREATE, Message, NetlinkSocket, messages};

/// Most operations of one transaction; each acknowledgement may take 1 KiB of the socket's 4 MiB.
pub const MAX_OPERATIONS: usize = 4096;
/// Elements of one message: each takes at most 44 bytes, and an attribute holds 64 KiB.
const ELEMENTS_PER_MESSAGE: usize = 1024;
/// The kernel's limit for table, chain and set names, with the final NUL.
const NAME_MAX: usize = 256;

/// Why a transaction did not happen. None of it did.
#[derive(Debug, thiserror::Error)]
pub enum NftError {
    /// The kernel refused one operation.
    #[error("nf_tables refused to {operation}: {source}{detail}")]
    Refused {
        /// Which operation, in words.
        operation: String,
        /// The kernel's own sentence in brackets, if it gave one.
        detail: String,
        /// Its errno.
        source: io::Error,
    },
    /// More than [`MAX_OPERATIONS`].
    #[error("a transaction of {0} operations exceeds {MAX_OPERATIONS}")]
    TooLarge(usize),
    /// Empty, or longer than the kernel takes.
    #[error("bad name {0:?}")]
    BadName(String),
    /// The kernel acknowledged fewer operations than were sent.
    #[error("nf_tables acknowledged {acknowledged} of {sent} operations")]
    Unacknowledged {
        /// Acknowledgements received.
        acknowledged: usize,
        /// Operations sent.
        sent: usize,
    },
    /// Netlink or the namespace failed.
    #[error("nf_tables: {0}")]
    Io(#[from] io::Error),
}

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
}

impl Chain {
    /// A base chain that accepts what reaches its end.
    #[must_use]
    pub fn base(name: &str, kind: HookType, point: HookPoint, priority: i32) -> Self {
        Self { name: name.to_owned(), hook: Some(Hook { kind, point, priority, drop: false }) }
    }

    /// A chain to jump to.
    #[must_use]
    pub fn regular(name: &str) -> Self {
        Self { name: name.to_owned(), hook: None }
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
        }
    }

    /// Type number (as `nft` numbers them, for display), length of a key, flags.
    fn shape(&self) -> (u32, u32, u32) {
        match self.key {
            SetKey::Ipv4(_) => (7, 4, code::SET_FLAG_INTERVAL | code::SET_FLAG_CONSTANT),
            SetKey::Ipv6(_) => (8, 16, code::SET_FLAG_INTERVAL | code::SET_FLAG_CONSTANT),
            SetKey::Ports(_) => (13, 2, code::SET_FLAG_CONSTANT),
        }
    }
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

/// A transaction being put together: operations run in order, and either all of them take effect at once or none.
#[derive(Debug, Default)]
pub struct Batch {
    operations: Vec<(String, Message)>,
    bad_name: Option<String>,
    sets: u32,
}

impl Batch {
    /// An empty transaction.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a table; it may exist.
    pub fn add_table(&mut self, table: &str) -> &mut Self {
        self.name(table);
        self.push(format!("add table {table}"), code::NEW_TABLE, CREATE, |a| {
            a.put_str(code::TABLE_NAME, table);
        })
    }

    /// Removes a table with all it holds; it may be missing. (Adding it first is what makes that true on kernels before
    /// 6.3, which have no "destroy".)
    pub fn delete_table(&mut self, table: &str) -> &mut Self {
        self.add_table(table).push(format!("delete table {table}"), code::DEL_TABLE, 0, |a| {
            a.put_str(code::TABLE_NAME, table);
        })
    }

    /// Makes a table empty, whether or not it existed.
    pub fn replace_table(&mut self, table: &str) -> &mut Self {
        self.delete_table(table).add_table(table)
    }

    /// Makes a chain; it may exist.
    pub fn add_chain(&mut self, table: &str, chain: &Chain) -> &mut Self {
        self.name(&chain.name);
        self.push(format!("add chain {table} {}", chain.name), code::NEW_CHAIN, CREATE, |a| {
            a.put_str(code::CHAIN_TABLE, table).put_str(code::CHAIN_NAME, &chain.name);
            if let Some(hook) = chain.hook {
                put_hook(a, hook);
            }
        })
    }

    /// Makes a set and fills it. Make it before the rules that look in it.
    pub fn add_set(&mut self, table: &str, set: &Set) -> &mut Self {
        self.name(&set.name);
        self.sets += 1;
        let (id, (key_type, key_len, flags)) = (self.sets, set.shape());
        self.push(format!("add set {table} {}", set.name), code::NEW_SET, CREATE, |a| {
            a.put_str(code::SET_TABLE, table)
                .put_str(code::SET_NAME, &set.name)
                .put_be(code::SET_FLAGS, flags)
                .put_be(code::SET_KEY_TYPE, key_type)
                .put_be(code::SET_KEY_LEN, key_len)
                .put_be(code::SET_ID, id);
        });
        for elements in set.elements().chunks(ELEMENTS_PER_MESSAGE) {
            self.push(format!("fill set {table} {}", set.name), code::NEW_SET_ELEM, CREATE, |a| {
                a.put_str(code::SET_ELEM_LIST_TABLE, table)
                    .put_str(code::SET_ELEM_LIST_SET, &set.name)
                    .nest(code::SET_ELEM_LIST_ELEMENTS, |list| {
                        elements.iter().for_each(|e| put_element(list, e))
                    });
            });
        }
        self
    }

    /// Appends a rule to a chain.
    pub fn add_rule(&mut self, table: &str, chain: &str, rule: &Rule) -> &mut Self {
        self.push(
            format!("add rule {table} {chain} ({})", rule.comment),
            code::NEW_RULE,
            CREATE | APPEND,
            |a| {
                a.put_str(code::RULE_TABLE, table).put_str(code::RULE_CHAIN, chain).nest(
                    code::RULE_EXPRESSIONS,
                    |list| {
                        for expr in &rule.exprs {
                            list.nest(code::LIST_ELEM, |e| {
                                e.put_str(code::EXPR_NAME, expr.name).nest(code::EXPR_DATA, |d| {
                                    d.append(&expr.data);
                                });
                            });
                        }
                    },
                );
                a.put(code::RULE_USERDATA, &userdata(&rule.comment));
            },
        )
    }

    /// Applies the transaction in a namespace.
    ///
    /// # Errors
    /// See [`NftError`]; in every case nothing has changed.
    pub fn commit(&self, ns: &NetNs) -> Result<(), NftError> {
        if let Some(name) = &self.bad_name {
            return Err(NftError::BadName(name.clone()));
        }
        if self.operations.len() > MAX_OPERATIONS {
            return Err(NftError::TooLarge(self.operations.len()));
        }
        let mut socket = ns.run(|| NetlinkSocket::open(libc::NETLINK_NETFILTER))?;
        let count = self.operations.len() as u32;
        let first = socket.sequence(count + 2);
        socket.send(&self.encode(first))?;
        self.outcome(&socket, first)
    }

    fn encode(&self, first: u32) -> Vec<u8> {
        // The batch's own messages say in their header which subsystem it is for.
        let bracket = [&[libc::AF_UNSPEC as u8, 0][..], &code::SUBSYSTEM.to_be_bytes()].concat();
        let mut out = Vec::new();
        Message::new(code::BATCH_BEGIN, 0, &bracket).write(first, &mut out);
        for (seq, (_, message)) in (first + 1..).zip(&self.operations) {
            message.write(seq, &mut out);
        }
        Message::new(code::BATCH_END, 0, &bracket).write(first + 1 + self.operations.len() as u32, &mut out);
        out
    }

    /// Reads the answers. The kernel handles a batch inside the send, so all of them are there already.
    fn outcome(&self, socket: &NetlinkSocket, first: u32) -> Result<(), NftError> {
        socket.set_nonblocking()?;
        let mut acknowledged = 0;
        loop {
            let data = match socket.recv() {
                Ok(data) => data,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            };
            for message in messages(&data) {
                match message.outcome() {
                    Some(Ok(())) => acknowledged += 1,
                    Some(Err(refusal)) => {
                        let index = message.seq.wrapping_sub(first).wrapping_sub(1) as usize;
                        // An error for the opening message is one of the commit as a whole.
                        let operation =
                            self.operations.get(index).map_or("commit the transaction", |(name, _)| name);
                        return Err(NftError::Refused {
                            operation: operation.to_owned(),
                            detail: refusal.detail.clone().map(|d| format!(" ({d})")).unwrap_or_default(),
                            source: refusal.into(),
                        });
                    }
                    None => {}
                }
            }
        }
        let sent = self.operations.len();
        if acknowledged == sent { Ok(()) } else { Err(NftError::Unacknowledged { acknowledged, sent }) }
    }

    fn push(&mut self, operation: String, kind: u16, flags: u16, fill: impl FnOnce(&mut Attrs)) -> &mut Self {
        let mut message = request(kind, flags | ACK);
        fill(&mut message.attrs);
        self.operations.push((operation, message));
        self
    }

    fn name(&mut self, name: &str) {
        if name.is_empty() || name.len() >= NAME_MAX || name.contains('\0') {
            self.bad_name.get_or_insert_with(|| name.to_owned());
        }
    }
}

/// A message of the nf_tables subsystem for family inet.
pub(crate) fn request(kind: u16, flags: u16) -> Message {
    Message::new(code::SUBSYSTEM << 8 | kind, flags, &[code::NFPROTO_INET, 0, 0, 0])
}

fn put_hook(a: &mut Attrs, hook: Hook) {
    let kind = match hook.kind {
        HookType::Filter => "filter",
        HookType::Nat => "nat",
        HookType::Route => "route",
    };
    a.nest(code::CHAIN_HOOK, |h| {
        h.put_be(code::HOOK_NUM, hook.point as u32)
            .put_be(code::HOOK_PRIORITY, hook.priority.cast_unsigned());
    })
    .put_be(code::CHAIN_POLICY, u32::from(!hook.drop))
    .put_str(code::CHAIN_TYPE, kind);
}

/// The attributes by which a dumped chain is recognised as this one.
pub(crate) fn chain_shape(chain: &Chain) -> Attrs {
    let mut a = Attrs::default();
    a.put_str(code::CHAIN_NAME, &chain.name);
    if let Some(hook) = chain.hook {
        put_hook(&mut a, hook);
    }
    a
}

fn put_element(list: &mut Attrs, (key, end): &Element) {
    list.nest(code::LIST_ELEM, |e| {
        e.nest(code::SET_ELEM_KEY, |k| {
            k.put(code::DATA_VALUE, key);
        });
        if *end {
            e.put_be(code::SET_ELEM_FLAGS, code::SET_ELEM_INTERVAL_END);
        }
    });
}

pub(crate) fn userdata(comment: &str) -> Vec<u8> {
    let mut data = vec![code::USERDATA_COMMENT, comment.len() as u8 + 1];
    data.extend_from_slice(comment.as_bytes());
    data.push(0);
    data
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

    #[test]
    fn bad_names_are_refused_before_anything_is_sent() {
        let ns = NetNs::current().unwrap();
        let error = Batch::new().add_table("").commit(&ns).unwrap_err();
        assert!(matches!(error, NftError::BadName(_)), "{error}");
    }
}
