//! The one snapshot that every decision reads, and the word that it has changed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Guard};
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::Workload;
use tokio::sync::watch;

/// What the proxy knows now. Readers take no lock; there is one writer, [`crate::control`].
#[derive(Debug)]
pub struct State {
    snapshot: ArcSwap<Snapshot>,
    changes: watch::Sender<u64>,
}

/// Snapshots that were replaced and that a decision may still read. They are kept until none does, so that it is always the
/// control thread that drops them: what an update replaced can be thousands of workloads, and whoever drops the last
/// reference spends milliseconds on it.
#[derive(Debug, Default)]
pub struct Retired(VecDeque<Arc<Snapshot>>);

/// A decision reads its snapshot for microseconds, so there is rarely one here. With more than these something holds them for
/// long, and they are its to drop: memory matters more.
const MAX_RETIRED: usize = 64;

impl Retired {
    /// Takes in a replaced snapshot, and drops those that nobody reads any more.
    pub fn retire(&mut self, snapshot: Arc<Snapshot>) {
        self.0.push_back(snapshot);
        // Nobody can get hold of a snapshot that is no longer in force, so a count of one stays one.
        self.0.retain(|old| Arc::strong_count(old) > 1);
        if self.0.len() > MAX_RETIRED {
            self.0.pop_front();
        }
    }
}

impl Default for State {
    fn default() -> Self {
        Self { snapshot: ArcSwap::from_pointee(Snapshot::default()), changes: watch::Sender::new(0) }
    }
}

impl State {
    /// The snapshot of this moment, for one decision.
    pub fn load(&self) -> Guard<Arc<Snapshot>> {
        self.snapshot.load()
    }

    /// The snapshot of this moment, to keep.
    pub fn load_full(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Replaces the snapshot and tells who waits. Returns the one that was in force, for [`Retired`].
    pub fn commit(&self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        let old = self.snapshot.swap(snapshot);
        self.changes.send_modify(|n| *n += 1);
        old
    }

    /// Changes from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The workload of this uid, waiting for it to become known (Z30).
    pub async fn workload(&self, uid: &str, patience: Duration) -> Option<Arc<Workload>> {
        if let Some(found) = self.load().workload_by_uid(uid) {
            return Some(found.clone());
        }
        let mut changes = self.changes();
        let known = async {
            loop {
                if let Some(found) = self.load().workload_by_uid(uid) {
                    return found.clone();
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(patience, known).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_reads_a_replaced_snapshot_never_drops_it() {
        let (state, mut retired) = (State::default(), Retired::default());
        let guard = state.load();
        let read = Arc::downgrade(&guard);
        retired.retire(state.commit(Arc::default()));
        drop(guard);
        assert!(read.upgrade().is_some(), "the reader is done, and the snapshot is still there");
        retired.retire(state.commit(Arc::default()));
        assert!(read.upgrade().is_none());
        assert!(retired.0.is_empty(), "nobody reads the second");

        let held: Vec<_> = (0..2 * MAX_RETIRED)
            .map(|_| {
                let held = state.load_full();
                retired.retire(state.commit(Arc::default()));
                held
            })
            .collect();
        assert_eq!(retired.0.len(), MAX_RETIRED);
        drop(held);
    }
}
