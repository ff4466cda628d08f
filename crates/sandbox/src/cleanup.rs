//! Removes all that a run made: at its end, and at the next start after a crash.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use crate::lab::{self, LabError, NetNsId};
use crate::process::{self, Record};
use crate::state::{StateDir, StateError};

/// How long processes have between SIGTERM and SIGKILL.
pub const GRACE: Duration = Duration::from_secs(3);

/// What stood in the way.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// Processes that did not end even by SIGKILL.
    #[error("process {pid} ({label}) does not end")]
    Process {
        /// Its number.
        pid: i32,
        /// Its name.
        label: String,
    },
    /// A namespace could not be unmounted.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// A file could not be removed.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Ends every process that was started for `state` or runs in one of its namespaces, unmounts the namespaces, and removes
/// the files except those named in `keep`. The caller holds the lock. Nothing there is no error.
pub fn cleanup(state: &StateDir, keep: &[&str]) -> Result<(), CleanupError> {
    end_processes(state)?;
    lab::unmount(&state.netns())?;
    Ok(state.remove(keep)?)
}

/// The first part of [`cleanup`]: only the processes.
pub fn end_processes(state: &StateDir) -> Result<(), CleanupError> {
    let namespaces = namespaces(state);
    let find = || -> Vec<Record> {
        let mut found = process::recorded(state);
        found.extend(process::inside(&namespaces));
        found.retain(Record::runs);
        found
    };
    match process::end_all(find, GRACE).into_iter().next() {
        Some(Record { pid, label, .. }) => Err(CleanupError::Process { pid, label }),
        None => Ok(()),
    }
}

/// The namespaces of `state`, whatever process made them. A file that is not mounted has the identity of an ordinary file,
/// which no process has as its namespace.
fn namespaces(state: &StateDir) -> BTreeSet<NetNsId> {
    let Ok(entries) = fs::read_dir(state.netns()) else { return BTreeSet::new() };
    entries.flatten().filter_map(|entry| NetNsId::of(&entry.path()).ok()).collect()
}
