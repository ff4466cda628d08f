//! Which workloads are pods of this node, for connections that need not leave it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use culvert_model::Str;
use parking_lot::RwLock;
use smallvec::SmallVec;

use super::Pod;

/// The pods that are served, by their workload's uid. As many entries as the agent has named pods.
#[derive(Debug, Default)]
pub struct LocalPods {
    // Written when a pod comes or goes; read once a connection, for as long as a lookup takes.
    by_workload: RwLock<HashMap<Str, SmallVec<[Entry; 1]>>>,
}

/// A pod that is served, and its uid as the agent says.
#[derive(Clone, Debug)]
pub struct Served {
    /// `metadata.uid`: another one is another pod, whatever its name.
    pub uid: Str,
    /// The pod.
    pub pod: Arc<Pod>,
}

/// Weak: a pod ends when the registry drops it, not when this table is tidied.
#[derive(Debug)]
struct Entry {
    uid: Str,
    pod: Weak<Pod>,
}

impl LocalPods {
    /// The pod of a workload. `None` if there is none, and if there are two: while one replaces another of its name, neither is it
    /// for certain.
    pub fn only(&self, workload_uid: &str) -> Option<Served> {
        let table = self.by_workload.read();
        let [only] = table.get(workload_uid)?.as_slice() else { return None };
        Some(Served { uid: only.uid.clone(), pod: only.pod.upgrade()? })
    }

    pub(super) fn insert(&self, uid: Str, pod: &Arc<Pod>) {
        let entry = Entry { uid, pod: Arc::downgrade(pod) };
        self.by_workload.write().entry(pod.workload_uid.clone()).or_default().push(entry);
    }

    pub(super) fn remove(&self, pod: &Pod) {
        let mut table = self.by_workload.write();
        let Some(entries) = table.get_mut(&pod.workload_uid) else { return };
        entries.retain(|entry| !std::ptr::eq(entry.pod.as_ptr(), pod));
        if entries.is_empty() {
            table.remove(&pod.workload_uid);
        }
    }
}
