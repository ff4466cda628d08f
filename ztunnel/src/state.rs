//! The one snapshot that every decision reads, and the word that it has changed.

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

    /// Replaces the snapshot and tells who waits.
    pub fn commit(&self, snapshot: Arc<Snapshot>) {
        self.snapshot.store(snapshot);
        self.changes.send_modify(|n| *n += 1);
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
