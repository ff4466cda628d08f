//! One atomic transaction.

use std::io;

use super::code;
use super::expr::Rule;
use super::table::{Chain, Set, put_element, put_hook};
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

    /// Like [`replace_table`](Self::replace_table), for a table that belongs to the socket which sends this: only from that socket can it
    /// be changed, it outlives a flush of the whole ruleset by somebody else, and it ends with the socket (kernel 5.12).
    pub(crate) fn replace_owned_table(&mut self, table: &str) -> &mut Self {
        self.delete_owned_table(table).add_owned_table(table)
    }

    fn add_owned_table(&mut self, table: &str) -> &mut Self {
        self.push(format!("add table {table}"), code::NEW_TABLE, CREATE, |a| {
            a.put_str(code::TABLE_NAME, table).put_be(code::TABLE_FLAGS, code::TABLE_FLAG_OWNER);
        })
    }

    /// Removes a table of the socket's own; it may be missing.
    pub(crate) fn delete_owned_table(&mut self, table: &str) -> &mut Self {
        self.name(table);
        self.add_owned_table(table).push(format!("delete table {table}"), code::DEL_TABLE, 0, |a| {
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
            put_hook(a, chain);
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
        ns.netfilter(|socket| match self.commit_by(socket) {
            // The socket is in an unknown state.
            Err(NftError::Io(error)) => Err(error),
            outcome => Ok(outcome),
        })?
    }

    /// Applies the transaction in the namespace of this socket.
    pub(crate) fn commit_by(&self, socket: &mut NetlinkSocket) -> Result<(), NftError> {
        if let Some(name) = &self.bad_name {
            return Err(NftError::BadName(name.clone()));
        }
        if self.operations.len() > MAX_OPERATIONS {
            return Err(NftError::TooLarge(self.operations.len()));
        }
        let count = self.operations.len() as u32;
        let first = socket.sequence(count + 2);
        socket.send(&self.encode(first))?;
        socket.set_nonblocking(true)?;
        let outcome = self.outcome(socket, first);
        socket.set_nonblocking(false)?;
        outcome?
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

    /// Reads the answers. The kernel handles a batch inside the send, so all of them are there already. The outer error is one of
    /// the socket.
    fn outcome(&self, socket: &NetlinkSocket, first: u32) -> io::Result<Result<(), NftError>> {
        let (mut acknowledged, mut refused) = (0, None);
        loop {
            let data = match socket.recv() {
                Ok(data) => data,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            };
            for message in messages(&data) {
                let index = message.seq.wrapping_sub(first) as usize;
                match message.outcome() {
                    // What was asked earlier is of no interest.
                    _ if index > self.operations.len() + 1 => {}
                    Some(Ok(())) => acknowledged += 1,
                    // The first one is the cause.
                    Some(Err(refusal)) if refused.is_none() => refused = Some((index, refusal)),
                    _ => {}
                }
            }
        }
        if let Some((index, refusal)) = refused {
            // An error for the opening message is one of the commit as a whole.
            let named = index.checked_sub(1).and_then(|index| self.operations.get(index));
            return Ok(Err(NftError::Refused {
                operation: named.map_or("commit the transaction", |(name, _)| name).to_owned(),
                detail: refusal.detail.clone().map(|d| format!(" ({d})")).unwrap_or_default(),
                source: refusal.into(),
            }));
        }
        let sent = self.operations.len();
        Ok(if acknowledged == sent { Ok(()) } else { Err(NftError::Unacknowledged { acknowledged, sent }) })
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

pub(crate) fn userdata(comment: &str) -> Vec<u8> {
    let mut data = vec![code::USERDATA_COMMENT, comment.len() as u8 + 1];
    data.extend_from_slice(comment.as_bytes());
    data.push(0);
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_names_are_refused_before_anything_is_sent() {
        let ns = NetNs::current().unwrap();
        let error = Batch::new().add_table("").commit(&ns).unwrap_err();
        assert!(matches!(error, NftError::BadName(_)), "{error}");
    }
}
