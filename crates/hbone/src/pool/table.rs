//! Which connections there are, and what a caller has to do next. No IO and no waiting.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

use tokio::sync::watch;

use super::{ConnectionFacts, DialFailure, PoolConfig};
use crate::client::ClientHandle;
use crate::link::StreamGuard;

/// None while the dial runs; then its failure, or `Some(None)` for success.
type Outcome<E> = Option<Option<DialFailure<E>>>;

/// One open connection. The pool's hold on it keeps it open.
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) handle: ClientHandle,
    pub(super) facts: Arc<ConnectionFacts>,
}

/// What a caller has to do next.
pub(super) enum Step<E> {
    Use(Arc<Connection>, StreamGuard),
    Wait(watch::Receiver<Outcome<E>>),
    Dial(DialTicket<E>),
    /// With the number of connections open.
    Full(usize),
    Draining,
}

/// The turn to dial for a key.
pub(super) struct DialTicket<E> {
    pub(super) id: u64,
    pub(super) epoch: u64,
    pub(super) outcome: watch::Sender<Outcome<E>>,
}

/// Connections by key.
pub(super) struct Table<K, E> {
    entries: HashMap<K, Entry<E>>,
    next_id: u64,
    /// Counts evictions: a dial begun before one may have used what was evicted.
    epoch: u64,
    /// Dials in progress, counted against the limit of connections.
    dialling: usize,
    draining: bool,
}

struct Entry<E> {
    /// Oldest first, so that new streams fill the old and the young can go idle.
    connections: Vec<Arc<Connection>>,
    dial: Option<watch::Receiver<Outcome<E>>>,
}

impl<K: Hash + Eq, E> Table<K, E> {
    /// Decides for a caller that wants a connection numbered `from` or later, `open` connections being open.
    pub(super) fn step(&mut self, key: &K, from: u64, open: usize, config: &PoolConfig) -> Step<E>
    where
        K: Clone,
    {
        if self.draining {
            return Step::Draining;
        }
        let entry = match self.entries.get_mut(key) {
            Some(entry) => entry,
            None => self.entries.entry(key.clone()).or_default(),
        };
        let latest = (config.now)() + config.expiry_margin;
        entry.connections.retain(|connection| {
            connection.facts.valid_until.is_none_or(|until| latest < until)
                && connection.handle.unusable().is_none()
        });
        if let Some((connection, guard)) = entry.pick(from, config) {
            return Step::Use(connection, guard);
        }
        if let Some(dial) = &entry.dial {
            return Step::Wait(dial.clone());
        }
        let taken = open + self.dialling;
        if taken >= config.max_connections || entry.connections.len() >= config.max_connections_per_key {
            // Better a slow place than none.
            if let Some((connection, guard)) = entry.any_place(from, config) {
                return Step::Use(connection, guard);
            }
            self.forget_if_empty(key);
            return Step::Full(taken);
        }
        let (outcome, waiting) = watch::channel(None);
        entry.dial = Some(waiting);
        self.dialling += 1;
        self.next_id += 1;
        Step::Dial(DialTicket { id: self.next_id, epoch: self.epoch, outcome })
    }

    /// A dial made `connection`.
    pub(super) fn dialled(&mut self, key: &K, epoch: u64, connection: Arc<Connection>) {
        if !self.draining
            && epoch == self.epoch
            && let Some(entry) = self.entries.get_mut(key)
        {
            entry.connections.push(connection);
        }
        self.dial_ended(key);
    }

    /// A dial failed or was cancelled.
    pub(super) fn dial_ended(&mut self, key: &K) {
        self.dialling -= 1;
        if let Some(entry) = self.entries.get_mut(key) {
            entry.dial = None;
        }
        self.forget_if_empty(key);
    }

    /// Takes out what `stale` names.
    pub(super) fn evict(&mut self, mut stale: impl FnMut(&K, &Connection) -> bool) -> Vec<Arc<Connection>> {
        self.epoch += 1;
        let mut out = Vec::new();
        for (key, entry) in &mut self.entries {
            out.extend(entry.connections.extract_if(.., |connection| stale(key, connection)));
        }
        self.entries.retain(|_, entry| !entry.is_empty());
        out
    }

    /// Takes connection `id` out if no stream uses it.
    pub(super) fn retire_idle(&mut self, key: &K, id: u64) -> Option<Arc<Connection>> {
        let connections = &mut self.entries.get_mut(key)?.connections;
        // Streams get their place under this table's lock, so none can begin between the check and the removal.
        let at = connections.iter().position(|c| c.id == id && c.handle.streams() == 0)?;
        let connection = connections.remove(at);
        self.forget_if_empty(key);
        Some(connection)
    }

    /// Takes connection `id` out: it has ended.
    pub(super) fn remove(&mut self, key: &K, id: u64) {
        if let Some(entry) = self.entries.get_mut(key) {
            entry.connections.retain(|connection| connection.id != id);
        }
        self.forget_if_empty(key);
    }

    /// Takes everything out and admits nothing more.
    pub(super) fn drain(&mut self) -> Vec<Arc<Connection>> {
        self.draining = true;
        let mut out = Vec::new();
        for entry in self.entries.values_mut() {
            out.append(&mut entry.connections);
        }
        self.entries.retain(|_, entry| !entry.is_empty());
        out
    }

    fn forget_if_empty(&mut self, key: &K) {
        if self.entries.get(key).is_some_and(Entry::is_empty) {
            self.entries.remove(key);
        }
    }
}

impl<E> Entry<E> {
    fn is_empty(&self) -> bool {
        self.connections.is_empty() && self.dial.is_none()
    }

    /// A place on the oldest connection that has one, moves its bytes and carries no bulk; on another one only if there are too
    /// many of them.
    fn pick(&self, from: u64, config: &PoolConfig) -> Option<(Arc<Connection>, StreamGuard)> {
        let (mut stalled, mut bulk) = (0, 0);
        for connection in self.connections.iter().filter(|connection| connection.id >= from) {
            let link = connection.handle.link();
            if link.is_stalled(config.stall_grace) {
                stalled += 1;
            } else if link.carries_bulk() {
                bulk += 1;
            } else if let Some(guard) = connection.handle.reserve() {
                return Some((connection.clone(), guard));
            }
        }
        if stalled >= config.max_stalled || bulk >= config.max_bulk {
            return self.any_place(from, config);
        }
        None
    }

    /// A place on any connection: rather on one that moves its bytes, then on the one with the fewest streams.
    fn any_place(&self, from: u64, config: &PoolConfig) -> Option<(Arc<Connection>, StreamGuard)> {
        let mut usable: Vec<_> = self.connections.iter().filter(|connection| connection.id >= from).collect();
        usable.sort_by_key(|c| (c.handle.link().is_stalled(config.stall_grace), c.handle.streams()));
        usable.into_iter().find_map(|c| c.handle.reserve().map(|guard| (c.clone(), guard)))
    }
}

impl<K, E> Default for Table<K, E> {
    fn default() -> Self {
        Self { entries: HashMap::new(), next_id: 0, epoch: 0, dialling: 0, draining: false }
    }
}

impl<E> Default for Entry<E> {
    fn default() -> Self {
        Self { connections: Vec::new(), dial: None }
    }
}
