//! Stopping, in the pod itself, what must not get around the proxy, also in the moments in which the redirect rules are away.
//!
//! The guard is a second table, which belongs to a netlink socket of this process: nobody else can change it, whatever rights they have
//! in the pod, and `nft flush ruleset` leaves it alone. With it a flush by hand lets no packet out, and breaks no connection that goes
//! through the proxy: its packets are sent again once the rules are back, and connection tracking, which the guard needs too, still
//! knows them. The guard ends with the socket, so it does nothing for a pod whose agent is away.

use std::sync::{Mutex, PoisonError};

use super::{RedirectConfig, rules};
use crate::NetNs;
use crate::netlink::NetlinkSocket;
use crate::nft::{Batch, NftError, read_table};

/// Name of the table.
const TABLE: &str = "culvert_guard";

/// In force until it is dropped or lifted.
#[derive(Debug)]
pub struct Guard {
    socket: Mutex<NetlinkSocket>,
}

impl Guard {
    /// Not yet in force.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn open(ns: &NetNs) -> std::io::Result<Self> {
        let socket = ns.run(|| NetlinkSocket::open(libc::NETLINK_NETFILTER))?;
        Ok(Self { socket: Mutex::new(socket) })
    }

    /// Lets pass what these rules let pass, and nothing else. Its counters begin at 0. Put the rules in force before.
    ///
    /// # Errors
    /// Before kernel 5.12, or if somebody else has a table of this name. What was in force before still is.
    pub fn guard(&self, config: &RedirectConfig) -> Result<(), NftError> {
        let Some(program) = rules::guard(config) else { return self.lift() };
        let mut batch = Batch::new();
        batch.replace_owned_table(TABLE);
        program.put(&mut batch, TABLE);
        self.commit(&batch)
    }

    /// Lets everything pass.
    ///
    /// # Errors
    /// See [`NftError`]: then it stays in force.
    pub fn lift(&self) -> Result<(), NftError> {
        let mut batch = Batch::new();
        batch.delete_owned_table(TABLE);
        self.commit(&batch)
    }

    fn commit(&self, batch: &Batch) -> Result<(), NftError> {
        batch.commit_by(&mut self.socket.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Packets that a guard of this namespace has stopped since it was put in force; `None` if none is.
#[must_use]
pub fn stopped(ns: &NetNs) -> Option<u64> {
    let table = read_table(ns, TABLE, &[]).ok()?;
    Some(table.counted().iter().map(|(_, packets)| packets).sum())
}
