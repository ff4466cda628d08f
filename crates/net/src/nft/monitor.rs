//! Hearing of changes to a namespace's rules, whoever makes them.

use std::io;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::code;
use crate::NetNs;
use crate::netlink::{NetlinkSocket, attr, messages, receive};
use crate::sys;

/// Events of nf_tables in one namespace.
#[derive(Debug)]
pub struct Monitor {
    socket: AsyncFd<socket2::Socket>,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// A transaction was committed.
    Committed {
        /// The process that made it, in the number space of the process that opened the monitor.
        pid: Option<u32>,
        /// Its name.
        process: Option<String>,
    },
    /// Some events were lost because nobody read them in time: look at everything again.
    Lost,
}

impl Monitor {
    /// Starts to listen inside `ns`. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// What netlink gives.
    pub fn open(ns: &NetNs) -> io::Result<Self> {
        let socket = ns.run(|| NetlinkSocket::open(libc::NETLINK_NETFILTER))?;
        socket.join(code::MULTICAST_GROUP)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket: sys::watch(socket.into_inner(), Interest::READABLE)? })
    }

    /// Waits for the next committed transaction, our own included. Safe to cancel: an event is read whole or not at all.
    ///
    /// # Errors
    /// What netlink gives, except an overrun, which is [`Changes::Lost`].
    pub async fn next(&mut self) -> io::Result<Changes> {
        loop {
            let received = self.socket.async_io(Interest::READABLE, receive).await;
            let data = match received {
                Ok(data) => data,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(Changes::Lost),
                Err(error) => return Err(error),
            };
            // Every transaction ends with one message that tells the new generation and who made it.
            let end = messages(&data).find(|m| m.kind == code::SUBSYSTEM << 8 | code::NEW_GEN);
            if let Some(attributes) = end.and_then(|m| m.payload.get(4..)) {
                return Ok(Changes::Committed {
                    pid: attr::find_be(attributes, code::GEN_PROC_PID),
                    process: attr::find_str(attributes, code::GEN_PROC_NAME).map(str::to_owned),
                });
            }
        }
    }
}
