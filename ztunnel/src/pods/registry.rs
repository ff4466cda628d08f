//! Which pods are served, and which should be but cannot be yet.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use culvert_model::Str;
use culvert_net::netns::NetNs;
use culvert_runtime::readiness;
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use serde::Serialize;

use super::pod::{Pod, PodInfo, Shared};

/// C69: a pod whose proxy could not start is tried again this often.
const RETRY: Duration = Duration::from_secs(5);

/// Every pod of the node that the agent has named.
#[derive(Debug)]
pub struct Pods {
    shared: Arc<Shared>,
    // Held while a pod starts or stops, so that two messages about one pod never interleave.
    gate: tokio::sync::Mutex<()>,
    table: Mutex<Table>,
    /// Pods that have another namespace now, while they drain.
    replaced: Tasks,
}

#[derive(Debug, Default)]
struct Table {
    running: HashMap<Str, Arc<Pod>>,
    pending: HashMap<Str, Pending>,
    /// Named since the session began; `None` once the snapshot is complete.
    named: Option<HashSet<Str>>,
    waiting_for_snapshot: Option<readiness::Task>,
    waiting_for_pending: Option<readiness::Task>,
}

#[derive(Debug)]
struct Pending {
    info: PodInfo,
    netns: Arc<NetNs>,
    error: String,
}

/// A pod as the admin page lists it.
#[derive(Debug, Serialize)]
pub struct Listed {
    uid: Str,
    name: Str,
    namespace: Str,
    service_account: Str,
    state: &'static str,
    error: Option<String>,
}

impl Pods {
    /// None yet; the process is not ready before the agent's first snapshot (Z06).
    pub fn new(shared: Arc<Shared>) -> Arc<Self> {
        let table = Table {
            waiting_for_snapshot: Some(shared.readiness.register("node agent snapshot")),
            ..Table::default()
        };
        Arc::new(Self {
            shared,
            gate: tokio::sync::Mutex::new(()),
            table: Mutex::new(table),
            replaced: Tasks::new("replaced pods"),
        })
    }

    /// A session with the agent began: what it does not name before the snapshot is complete is gone.
    pub fn session_started(&self) {
        self.table.lock().named = Some(HashSet::new());
    }

    /// Serves a pod. The same namespace again changes nothing; another namespace replaces the pod (C68), and so does
    /// ending tunnels itself or no more.
    ///
    /// # Errors
    /// Why the pod cannot be served now; it is tried again every 5 s until it is removed (C69).
    pub async fn add(&self, uid: &str, info: PodInfo, netns: Arc<NetNs>) -> Result<(), String> {
        let _gate = self.gate.lock().await;
        let uid = Str::from(uid);
        self.name(&uid);
        let replaced = {
            let mut table = self.table.lock();
            match table.running.get(&uid) {
                Some(pod) if pod.netns.id() == netns.id() && pod.info.native_tunnel == info.native_tunnel => {
                    return Ok(());
                }
                Some(_) => table.running.remove(&uid),
                None => None,
            }
        };
        let outcome = self.start(uid, info, netns);
        if let Some(pod) = replaced {
            self.stopped(&pod);
            // Beside the rest: the agent waits 5 s for an acknowledgement, and a drain may take as long.
            let deadline = self.shared.config.drain_deadline();
            self.replaced.spawn("replaced pod", async move { pod.drain(deadline).await });
        }
        outcome
    }

    /// A pod whose namespace the agent does not have, but which runs on.
    ///
    /// # Errors
    /// The snapshot is already complete: the protocol does not allow it (C63).
    #[allow(clippy::result_unit_err, reason = "there is one way to fail, and the caller names it")]
    pub fn keep(&self, uid: &str) -> Result<(), ()> {
        match &mut self.table.lock().named {
            Some(named) => {
                named.insert(uid.into());
                Ok(())
            }
            None => Err(()),
        }
    }

    /// The pod is gone, and its namespace is going: no goodbye to anyone (Z12).
    pub async fn remove(&self, uid: &str) {
        let _gate = self.gate.lock().await;
        let pod = {
            let mut table = self.table.lock();
            table.pending.remove(uid);
            table.running.remove(uid)
        };
        self.count();
        if let Some(pod) = pod {
            self.stopped(&pod);
            pod.stop().await;
        }
    }

    /// What was served before this session but not named in it is gone (C67).
    pub async fn snapshot_complete(&self) {
        let (named, ready) = {
            let mut table = self.table.lock();
            (table.named.take(), table.waiting_for_snapshot.take())
        };
        let stale: Vec<Str> = match named {
            Some(named) => {
                let table = self.table.lock();
                table
                    .running
                    .keys()
                    .chain(table.pending.keys())
                    .filter(|u| !named.contains(*u))
                    .cloned()
                    .collect()
            }
            None => Vec::new(),
        };
        for uid in stale {
            tracing::info!(%uid, "the agent no longer names this pod");
            self.remove(&uid).await;
        }
        drop(ready);
    }

    /// Tries again what could not start, for ever.
    pub async fn retry_pending(self: Arc<Self>) {
        loop {
            tokio::time::sleep(RETRY).await;
            let _gate = self.gate.lock().await;
            let due: Vec<_> = self.table.lock().pending.drain().collect();
            for (uid, pending) in due {
                let _ = self.start(uid, pending.info, pending.netns);
            }
            self.count();
        }
    }

    /// The pod of this uid, if it is served.
    pub fn get(&self, uid: &str) -> Option<Arc<Pod>> {
        self.table.lock().running.get(uid).cloned()
    }

    /// Every pod that is served.
    pub fn all(&self) -> Vec<Arc<Pod>> {
        self.table.lock().running.values().cloned().collect()
    }

    /// For the admin page.
    pub fn list(&self) -> Vec<Listed> {
        let table = self.table.lock();
        let running = table.running.iter().map(|(uid, pod)| Listed::new(uid, &pod.info, "running", None));
        let pending =
            table.pending.iter().map(|(uid, p)| Listed::new(uid, &p.info, "pending", Some(p.error.clone())));
        let mut all: Vec<_> = running.chain(pending).collect();
        all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        all
    }

    fn start(&self, uid: Str, info: PodInfo, netns: Arc<NetNs>) -> Result<(), String> {
        let started = Pod::start(self.shared.clone(), info.clone(), netns.clone());
        let outcome = match started {
            Ok(pod) => {
                tracing::info!(%uid, namespace = %info.namespace, name = %info.name, "pod is served");
                self.shared.observer.metrics.pods_started.inc();
                // What ends tunnels itself judges its own traffic: it is reached by a tunnel, also from its own node.
                if pod.terminated {
                    self.shared.local.insert(uid.clone(), &pod);
                }
                let mut table = self.table.lock();
                table.pending.remove(&uid);
                table.running.insert(uid, pod);
                Ok(())
            }
            Err(error) => {
                let error = error.to_string();
                tracing::warn!(%uid, namespace = %info.namespace, name = %info.name, %error, "pod cannot be served yet");
                self.table.lock().pending.insert(uid, Pending { info, netns, error: error.clone() });
                Err(error)
            }
        };
        self.count();
        outcome
    }

    fn name(&self, uid: &Str) {
        if let Some(named) = &mut self.table.lock().named {
            named.insert(uid.clone());
        }
    }

    fn stopped(&self, pod: &Pod) {
        tracing::info!(namespace = %pod.info.namespace, name = %pod.info.name, "pod is no longer served");
        self.shared.observer.metrics.pods_stopped.inc();
        self.shared.local.remove(pod);
        let identity_in_use = self.table.lock().running.values().any(|other| other.identity == pod.identity);
        if !identity_in_use {
            self.shared.certificates.forget(&pod.identity);
        }
        self.count();
    }

    fn count(&self) {
        let mut table = self.table.lock();
        let metrics = &self.shared.observer.metrics;
        metrics.active_pods.set(table.running.len() as i64);
        metrics.pending_pods.set(table.pending.len() as i64);
        if table.pending.is_empty() {
            table.waiting_for_pending = None;
        } else if table.waiting_for_pending.is_none() {
            table.waiting_for_pending =
                Some(self.shared.readiness.register("pods that cannot be served yet"));
        }
    }
}

impl Listed {
    fn new(uid: &Str, info: &PodInfo, state: &'static str, error: Option<String>) -> Self {
        Self {
            uid: uid.clone(),
            name: info.name.clone(),
            namespace: info.namespace.clone(),
            service_account: info.service_account.clone(),
            state,
            error,
        }
    }
}
