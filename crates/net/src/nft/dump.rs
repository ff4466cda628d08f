//! What a table holds now, and whether that is what was meant.

use std::io;
use std::net::SocketAddr;

use super::batch::{request, userdata};
use super::code;
use super::expr::Rule;
use super::table::{Chain, Element, Set, chain_shape, unpair};
use crate::NetNs;
use crate::netlink::attr::{self, attrs};
use crate::netlink::{Answers, NetlinkSocket, attr::Attrs};

/// A table as the kernel holds it.
#[derive(Debug)]
pub struct Installed {
    table: String,
    chains: Vec<Vec<u8>>,
    rules: Vec<Vec<u8>>,
    /// One entry for each set that was asked about, in that order.
    sets: Vec<Vec<Element>>,
}

/// Reads the chains and rules of a table and the contents of the sets named.
///
/// # Errors
/// `ENOENT` when the table, or a set, is not there.
pub fn read_table(ns: &NetNs, table: &str, sets: &[&str]) -> io::Result<Installed> {
    ns.netfilter(|socket| read(socket, table, sets))
}

fn read(socket: &mut NetlinkSocket, table: &str, sets: &[&str]) -> io::Result<Installed> {
    let payloads = |answers: Answers| -> Vec<Vec<u8>> {
        // After the netlink header come 4 bytes of the subsystem's own.
        answers.into_iter().filter_map(|(_, p)| p.get(4..).map(<[u8]>::to_vec)).collect()
    };
    let in_table =
        |attribute: u16| move |p: &Vec<u8>| attr::find_str(p, attribute).is_some_and(|name| name == table);

    let mut chains = payloads(socket.dump(request(code::GET_CHAIN, 0))?);
    chains.retain(in_table(code::CHAIN_TABLE));
    if chains.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    let mut get_rules = request(code::GET_RULE, 0);
    get_rules.attrs.put_str(code::RULE_TABLE, table);
    let mut rules = payloads(socket.dump(get_rules)?);
    rules.retain(in_table(code::RULE_TABLE));

    let mut contents = Vec::new();
    for set in sets {
        let mut get = request(code::GET_SET_ELEM, 0);
        get.attrs.put_str(code::SET_ELEM_LIST_TABLE, table).put_str(code::SET_ELEM_LIST_SET, set);
        contents.push(payloads(socket.dump(get)?).iter().flat_map(|p| elements(p)).collect());
    }
    Ok(Installed { table: table.to_owned(), chains, rules, sets: contents })
}

impl Installed {
    /// Name of the table.
    #[must_use]
    pub fn table(&self) -> &str {
        &self.table
    }

    /// Chain and comment of each rule, in order.
    #[must_use]
    pub fn comments(&self) -> Vec<(String, String)> {
        self.rules.iter().map(|r| (chain_of(r).to_owned(), comment(r))).collect()
    }

    /// Packets counted by each rule that counts, under its comment.
    #[must_use]
    pub fn counted(&self) -> Vec<(String, u64)> {
        let packets = |rule: &Vec<u8>| {
            let list = attr::find(rule, code::RULE_EXPRESSIONS)?;
            let counter =
                attrs(list).find(|e| attr::find_str(e.value, code::EXPR_NAME) == Some("counter"))?;
            let data = attr::find(counter.value, code::EXPR_DATA)?;
            let count = attr::find(data, code::COUNTER_PACKETS)?.first_chunk::<8>()?;
            Some((comment(rule), u64::from_be_bytes(*count)))
        };
        self.rules.iter().filter_map(packets).collect()
    }

    /// The pairs of address and port in the set at this place of the list given to [`read_table`].
    #[must_use]
    pub fn pairs(&self, index: usize) -> Vec<SocketAddr> {
        self.sets.get(index).into_iter().flatten().filter_map(unpair).collect()
    }

    /// Whether the table holds exactly these chains, with their hooks.
    #[must_use]
    pub fn has_chains(&self, wanted: &[Chain]) -> bool {
        self.chains.len() == wanted.len()
            && wanted.iter().all(|chain| {
                let shape = chain_shape(chain);
                self.chains.iter().any(|have| attr::includes(have, shape.as_bytes()))
            })
    }

    /// Whether the chain holds exactly these rules, in this order, comparing each expression.
    #[must_use]
    pub fn has_rules(&self, chain: &str, wanted: &[Rule]) -> bool {
        let have: Vec<&Vec<u8>> = self.rules.iter().filter(|r| chain_of(r) == chain).collect();
        have.len() == wanted.len() && have.iter().zip(wanted).all(|(have, want)| same_rule(have, want))
    }

    /// Whether the set at this place of the list given to [`read_table`] holds what was meant.
    #[must_use]
    pub fn has_set(&self, index: usize, wanted: &Set) -> bool {
        let Some(mut have) = self.sets.get(index).cloned() else { return false };
        // The kernel adds an end at the lowest address of an interval set; it says nothing.
        have.retain(|(key, end)| !(*end && key.iter().all(|b| *b == 0)));
        let mut wanted = wanted.elements();
        have.sort();
        wanted.sort();
        have == wanted
    }
}

fn chain_of(rule: &[u8]) -> &str {
    attr::find_str(rule, code::RULE_CHAIN).unwrap_or_default()
}

fn comment(rule: &[u8]) -> String {
    let data = attr::find(rule, code::RULE_USERDATA).unwrap_or_default();
    match data.split_first_chunk::<2>() {
        Some(([code::USERDATA_COMMENT, len], rest)) => {
            let text = rest.get(..usize::from(*len)).unwrap_or(rest);
            String::from_utf8_lossy(text.strip_suffix(b"\0").unwrap_or(text)).into_owned()
        }
        _ => String::new(),
    }
}

fn same_rule(have: &[u8], want: &Rule) -> bool {
    let list = attr::find(have, code::RULE_EXPRESSIONS).unwrap_or_default();
    let have_exprs: Vec<&[u8]> = attrs(list).map(|a| a.value).collect();
    attr::find(have, code::RULE_USERDATA) == Some(&userdata(&want.comment))
        && have_exprs.len() == want.exprs.len()
        && have_exprs.iter().zip(&want.exprs).all(|(have, want)| {
            let mut shape = Attrs::default();
            shape.put_str(code::EXPR_NAME, want.name);
            if !want.data.as_bytes().is_empty() {
                shape.nest(code::EXPR_DATA, |d| {
                    d.append(&want.data);
                });
            }
            attr::includes(have, shape.as_bytes())
        })
}

fn elements(payload: &[u8]) -> Vec<Element> {
    let list = attr::find(payload, code::SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    attrs(list)
        .filter_map(|e| {
            let key = attr::find(attr::find(e.value, code::SET_ELEM_KEY)?, code::DATA_VALUE)?;
            let flags = attr::find_be(e.value, code::SET_ELEM_FLAGS).unwrap_or(0);
            Some((key.to_vec(), flags & code::SET_ELEM_INTERVAL_END != 0))
        })
        .collect()
}
