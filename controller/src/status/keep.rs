//! Says what is wanted whenever that may have changed, as long as this replica leads.

use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::drain::DrainWatcher;
use tokio::sync::watch;
use tokio::time::sleep;

use super::{Desired, Publisher};
use crate::index::Snapshot;

/// Changes come in bursts, and each takes a look at everything that a contributor says something of.
const QUIET: Duration = Duration::from_millis(500);

/// Publishes what `desired` says of each snapshot, until `drain` starts. `None` is the same as before.
pub(super) async fn keep(
    publisher: Publisher,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut leading: watch::Receiver<bool>,
    drain: DrainWatcher,
    mut desired: impl FnMut(&Arc<Snapshot>) -> Option<Desired>,
) {
    loop {
        if *leading.borrow_and_update() {
            let snapshot = snapshots.borrow_and_update().clone();
            if let Some(desired) = desired(&snapshot) {
                publisher.publish(desired);
            }
        }
        let changed = async {
            tokio::select! {
                changed = snapshots.changed() => changed.is_ok(),
                changed = leading.changed() => changed.is_ok(),
            }
        };
        let more = tokio::select! {
            _ = drain.started() => false,
            more = changed => more,
        };
        if !more {
            return;
        }
        sleep(QUIET).await;
    }
}
