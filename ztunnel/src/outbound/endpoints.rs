//! What this proxy has seen of the endpoints it connects to: how many connections to each are in progress, and where
//! connecting failed a moment ago. All pods of the node share it.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use culvert_model::Str;
use culvert_model::balance::Observed;
use culvert_model::workload::Workload;
use parking_lot::Mutex;
use tokio::time::Instant;

/// For so long an endpoint is avoided after the first failure; after each further one for twice as long.
pub const FIRST_COOLDOWN: Duration = Duration::from_secs(1);
/// At most for so long: about what it takes a control plane to notice a dead node.
pub const LONGEST_COOLDOWN: Duration = Duration::from_secs(32);
/// Endpoints that are avoided at once. Each is about 100 bytes here and one reference to a name: 400 KB at worst. Beyond, a
/// failure is not remembered.
const MAX_COOLING: usize = 4096;
/// Locks that the counters are spread over: with 16, two of eight threads rarely meet.
const SHARDS: usize = 16;

/// Connections in progress and late failures, by endpoint.
#[derive(Debug, Default)]
pub struct EndpointTable {
    hasher: RandomState,
    /// By workload uid; an entry lives while a connection does, so there are never more than connections.
    open: [Mutex<HashMap<Str, Open>>; SHARDS],
    /// Entries of `cooling`: while there is none, which is the usual state, nobody asks for its lock.
    remembered: AtomicUsize,
    eras: AtomicU64,
    cooling: Mutex<CoolingTable>,
}

/// A connection in progress, until it is dropped.
#[derive(Debug)]
pub struct InProgress {
    table: Arc<EndpointTable>,
    uid: Str,
    /// Which [`Open`] counts it.
    era: u64,
}

#[derive(Debug)]
struct Open {
    connections: u32,
    /// An endpoint that goes and comes back under its name begins anew: earlier connections are of an earlier era.
    era: u64,
}

#[derive(Debug, Default)]
struct CoolingTable {
    by_port: HashMap<(Str, u16), Cooling>,
    /// When entries that no longer matter are next looked for.
    sweep_at: Option<Instant>,
}

#[derive(Debug)]
struct Cooling {
    failures: u32,
    until: Instant,
}

impl EndpointTable {
    /// A connection to this workload begins.
    pub fn begin(self: &Arc<Self>, uid: &Str) -> InProgress {
        let mut shard = self.shard(uid).lock();
        let open = match shard.get_mut(uid) {
            Some(open) => open,
            None => {
                let era = self.eras.fetch_add(1, Ordering::Relaxed);
                shard.entry(uid.clone()).or_insert(Open { connections: 0, era })
            }
        };
        open.connections += 1;
        InProgress { table: self.clone(), uid: uid.clone(), era: open.era }
    }

    /// Connecting to this port of it failed; others are preferred for a while. A failure while it is avoided already is of a
    /// connection that began earlier, or had no choice, and does not make it longer.
    ///
    /// Returns for how long from now, `None` where nothing changed.
    pub fn failed(&self, uid: &Str, port: u16) -> Option<Duration> {
        let now = Instant::now();
        let mut table = self.cooling.lock();
        if table.by_port.len() >= MAX_COOLING {
            table.sweep(now);
        }
        let full = table.by_port.len() >= MAX_COOLING;
        let key = (uid.clone(), port);
        let failures = match table.by_port.get(&key) {
            Some(cooling) if now < cooling.until => return None,
            Some(cooling) if !cooling.is_forgotten(now) => cooling.failures + 1,
            None if full => return None,
            _ => 1,
        };
        let cooldown = FIRST_COOLDOWN.saturating_mul(1 << (failures - 1).min(5)).min(LONGEST_COOLDOWN);
        table.by_port.insert(key, Cooling { failures, until: now + cooldown });
        self.remembered.store(table.by_port.len(), Ordering::Relaxed);
        Some(cooldown)
    }

    /// Connecting to this port of it succeeded: whatever failed before is forgotten.
    pub fn succeeded(&self, uid: &Str, port: u16) {
        if self.remembered.load(Ordering::Relaxed) > 0 {
            let mut table = self.cooling.lock();
            table.by_port.remove(&(uid.clone(), port));
            self.remembered.store(table.by_port.len(), Ordering::Relaxed);
        }
    }

    /// The control plane says something new of these workloads (uid, whether it is gone): failures of the past say nothing of
    /// them any more, and where one is gone, its connections nothing of another that gets its name.
    pub fn changed<'a>(&self, workloads: impl Iterator<Item = (&'a Str, bool)> + Clone) {
        for (uid, _) in workloads.clone().filter(|(_, gone)| *gone) {
            self.shard(uid).lock().remove(uid);
        }
        if self.remembered.load(Ordering::Relaxed) > 0 {
            let changed: HashSet<&Str> = workloads.map(|(uid, _)| uid).collect();
            let mut table = self.cooling.lock();
            table.by_port.retain(|(uid, _), _| !changed.contains(uid));
            self.remembered.store(table.by_port.len(), Ordering::Relaxed);
        }
    }

    /// How many workloads have connections in progress, and how many endpoints' failures are remembered.
    pub fn sizes(&self) -> (usize, usize) {
        let open = self.open.iter().map(|shard| shard.lock().len()).sum();
        (open, self.cooling.lock().by_port.len())
    }

    fn shard(&self, uid: &str) -> &Mutex<HashMap<Str, Open>> {
        // Taken modulo a small number, so every bit of it fits.
        &self.open[(self.hasher.hash_one(uid) % SHARDS as u64) as usize]
    }
}

impl Observed for EndpointTable {
    fn load(&self, workload: &Workload) -> u32 {
        self.shard(&workload.uid).lock().get(&workload.uid).map_or(0, |open| open.connections)
    }

    fn cooling(&self, workload: &Workload, port: u16) -> bool {
        if self.remembered.load(Ordering::Relaxed) == 0 {
            return false;
        }
        let now = Instant::now();
        let mut table = self.cooling.lock();
        if table.sweep_at.is_none_or(|at| at <= now) {
            table.sweep(now);
            self.remembered.store(table.by_port.len(), Ordering::Relaxed);
        }
        table.by_port.get(&(workload.uid.clone(), port)).is_some_and(|cooling| now < cooling.until)
    }
}

impl CoolingTable {
    fn sweep(&mut self, now: Instant) {
        self.by_port.retain(|_, cooling| !cooling.is_forgotten(now));
        self.sweep_at = Some(now + LONGEST_COOLDOWN);
    }
}

impl Cooling {
    /// It has been used again for so long that its next failure would be the first.
    fn is_forgotten(&self, now: Instant) -> bool {
        self.until + LONGEST_COOLDOWN <= now
    }
}

impl Drop for InProgress {
    fn drop(&mut self) {
        let mut shard = self.table.shard(&self.uid).lock();
        let Some(open) = shard.get_mut(&self.uid).filter(|open| open.era == self.era) else { return };
        open.connections -= 1;
        if open.connections == 0 {
            shard.remove(&self.uid);
        }
    }
}

#[cfg(test)]
#[path = "endpoints_tests.rs"]
mod tests;
