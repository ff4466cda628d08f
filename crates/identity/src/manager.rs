//! Keeps a fresh certificate for each identity that has a pod on this node.
//!
//! One task an identity owns its renewal (`renewal`), which makes every fetch single-flight by construction; the fetches of
//! all tasks share a few slots, given first to those that a connection waits for (`slots`, Z89). Readers look at an
//! immutable table and never wait for a writer.

mod renewal;
mod slots;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use culvert_model::identity::Identity;
use culvert_runtime::backoff::Bounds;
use culvert_runtime::clock::SharedClock;
use culvert_runtime::tasks::{Task, Tasks};
use parking_lot::Mutex;
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

use crate::bundle::TrustBundle;
use crate::ca_client::CaClient;
use crate::certificate::WorkloadCertificate;
use renewal::Renewal;
use slots::Slots;

/// Settings of a [`CertificateManager`].
#[derive(Debug, Clone)]
pub struct ManagerConfig {
    /// The lifetime asked for. Default 24 h (Z88); the authority may shorten it.
    pub lifetime: Duration,
    /// How long [`CertificateManager::get`] waits for a certificate that is not there. Default 5 s.
    pub wait: Duration,
    /// Longest fetch. Default 10 s; a renewal is given a quarter of the remaining lifetime if that is less.
    pub fetch_timeout: Duration,
    /// Fetches at the same time. Default 8 (Z89).
    pub concurrency: usize,
    /// Most identities. Default 4096: a node runs a few hundred pods, each with at most one; each identity costs one task
    /// and about 10 KiB.
    pub max_identities: usize,
    /// Delays after failures. Default 500 ms doubling to 150 s (Z89).
    pub retry: Bounds,
    /// Source of jitter.
    pub random: fastrand::Rng,
}

/// Holder of the certificates of one node.
pub struct CertificateManager {
    shared: Arc<Shared>,
    tasks: Tasks,
    runtime: Handle,
}

/// Why there is no certificate to give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// None came in time.
    #[error("no certificate for {identity} after {waited:?}: {}", .last.as_deref().unwrap_or("the authority has not answered yet"))]
    Unavailable {
        /// For whom.
        identity: Box<Identity>,
        /// How long the caller waited.
        waited: Duration,
        /// Why the last attempt failed, if one ended.
        last: Option<String>,
    },
    /// The identity was forgotten while the caller waited.
    #[error("{0} has no pod on this node any more")]
    Forgotten(Box<Identity>),
    /// The table is full.
    #[error("no room for {identity}: {max} identities are held already")]
    TooMany {
        /// For whom there is none.
        identity: Box<Identity>,
        /// [`ManagerConfig::max_identities`].
        max: usize,
    },
}

/// How an identity is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum CertificateState {
    /// The first fetch has not ended.
    Initializing,
    /// A valid certificate is at hand, even if the last renewal failed.
    Available,
    /// No valid certificate, and the last fetch failed.
    Unavailable,
}

/// One line of the admin page. Times are RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// Whose.
    pub identity: Identity,
    /// How it is doing.
    pub state: CertificateState,
    /// Serial number of the certificate, hex.
    pub serial: Option<String>,
    /// Start of validity.
    pub not_before: Option<String>,
    /// End of validity.
    pub not_after: Option<String>,
    /// See [`WorkloadCertificate::generation`].
    pub generation: Option<u64>,
    /// Fetches that failed since the last that did not.
    pub failures: u32,
    /// Why the last fetch failed, if it did.
    pub last_error: Option<String>,
}

/// Counters since the start, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchCounts {
    /// Certificates obtained.
    pub issued: u64,
    /// Fetches that failed.
    pub failed: u64,
}

/// What the manager and all its tasks hold in common.
struct Shared {
    ca: Arc<dyn CaClient>,
    config: ManagerConfig,
    clock: SharedClock,
    /// Replaced as a whole under `writing`; a change is rare (a pod with a new service account), a read is not.
    entries: ArcSwap<HashMap<Identity, Arc<Entry>>>,
    writing: Mutex<fastrand::Rng>,
    slots: Arc<Slots>,
    generation: AtomicU64,
    failed: AtomicU64,
    /// The roots that came last: most certificates of a node share them.
    roots: Mutex<Option<Arc<TrustBundle>>>,
}

/// One identity.
struct Entry {
    identity: Identity,
    /// Nothing from the expiry of a certificate until the next one.
    current: watch::Sender<Option<Arc<WorkloadCertificate>>>,
    progress: Mutex<Progress>,
    demand: Arc<Demand>,
    task: OnceLock<Task>,
}

#[derive(Debug, Default)]
struct Progress {
    failures: u32,
    last_error: Option<String>,
}

/// Connections that wait for a certificate.
#[derive(Default)]
struct Demand {
    waiting: AtomicUsize,
    raised: Notify,
}

/// One waiting connection; counted until dropped.
struct Waiting(Arc<Demand>);

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            lifetime: Duration::from_secs(24 * 60 * 60),
            wait: Duration::from_secs(5),
            fetch_timeout: Duration::from_secs(10),
            concurrency: 8,
            max_identities: 4096,
            retry: Bounds::doubling(Duration::from_millis(500), Duration::from_secs(150)),
            random: fastrand::Rng::new(),
        }
    }
}

impl CertificateManager {
    /// A manager without identities. Its tasks run on the runtime of the caller.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    #[must_use]
    pub fn new(ca: Arc<dyn CaClient>, mut config: ManagerConfig, clock: SharedClock) -> Self {
        let shared = Shared {
            ca,
            clock,
            entries: ArcSwap::default(),
            writing: Mutex::new(config.random.fork()),
            slots: Slots::new(config.concurrency.max(1)),
            generation: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            roots: Mutex::new(None),
            config,
        };
        Self { shared: Arc::new(shared), tasks: Tasks::new("certificates"), runtime: Handle::current() }
    }

    /// A valid certificate of this identity: the one at hand, or the first that comes within [`ManagerConfig::wait`]. An
    /// identity seen for the first time is kept fresh from now on, until [`CertificateManager::forget`].
    ///
    /// # Errors
    /// [`CertificateError`]; an expired certificate is never returned in its place.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>, CertificateError> {
        if let Some(certificate) = self.current(identity) {
            return Ok(certificate);
        }
        let (mut receiver, waiting) = {
            let entry = self.ensure(identity)?;
            (entry.current.subscribe(), Waiting::new(entry.demand.clone()))
        };
        // Nothing of the entry is held below: a forgotten one ends the wait by dropping its sender.
        let clock = &self.shared.clock;
        let usable = |certificate: &Option<Arc<WorkloadCertificate>>| {
            certificate.as_ref().is_some_and(|certificate| !certificate.expired(clock.now()))
        };
        let waited = self.shared.config.wait;
        let found = tokio::select! {
            biased;
            found = receiver.wait_for(usable) => found.map(|found| found.clone()),
            () = clock.sleep(waited) => {
                let last = self.entry(identity).and_then(|entry| entry.progress.lock().last_error.clone());
                return Err(CertificateError::Unavailable { identity: Box::new(identity.clone()), waited, last });
            }
        };
        drop(waiting);
        found.ok().flatten().ok_or_else(|| CertificateError::Forgotten(Box::new(identity.clone())))
    }

    /// The certificate at hand, if it is valid. Neither waits nor starts anything.
    #[must_use]
    pub fn current(&self, identity: &Identity) -> Option<Arc<WorkloadCertificate>> {
        let entry = self.entry(identity)?;
        let certificate = entry.current.borrow().clone()?;
        (!certificate.expired(self.shared.clock.now())).then_some(certificate)
    }

    /// Starts to hold a certificate of this identity, without hurry (Z90).
    ///
    /// # Errors
    /// [`CertificateError::TooMany`].
    pub fn prefetch(&self, identity: &Identity) -> Result<(), CertificateError> {
        self.ensure(identity).map(drop)
    }

    /// Like [`CertificateManager::prefetch`], and follows what becomes of it: nothing until the first certificate, each new one
    /// as it comes, nothing again if one expires unrenewed. The sender goes away when the identity is forgotten.
    ///
    /// # Errors
    /// [`CertificateError::TooMany`].
    pub fn subscribe(
        &self,
        identity: &Identity,
    ) -> Result<watch::Receiver<Option<Arc<WorkloadCertificate>>>, CertificateError> {
        self.ensure(identity).map(|entry| entry.current.subscribe())
    }

    /// Stops renewing and drops the key (Z90): its last pod has left this node. Certificates already handed out stay usable
    /// until they expire.
    pub fn forget(&self, identity: &Identity) {
        let _writing = self.shared.writing.lock();
        let mut entries = HashMap::clone(&self.shared.entries.load());
        let Some(entry) = entries.remove(identity) else { return };
        self.shared.entries.store(Arc::new(entries));
        if let Some(task) = entry.task.get() {
            task.abort();
        }
        tracing::debug!(%identity, "forgot certificate");
    }

    /// Every identity, sorted, for the admin page.
    #[must_use]
    pub fn list(&self) -> Vec<CertificateStatus> {
        let now = self.shared.clock.now();
        let entries = self.shared.entries.load();
        let mut list: Vec<_> = entries.values().map(|entry| entry.status(now)).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    /// How many fetches went well and how many did not.
    #[must_use]
    pub fn counts(&self) -> FetchCounts {
        FetchCounts {
            issued: self.shared.generation.load(Ordering::Relaxed),
            failed: self.shared.failed.load(Ordering::Relaxed),
        }
    }

    fn entry(&self, identity: &Identity) -> Option<Arc<Entry>> {
        self.shared.entries.load().get(identity).cloned()
    }

    fn ensure(&self, identity: &Identity) -> Result<Arc<Entry>, CertificateError> {
        if let Some(entry) = self.entry(identity) {
            return Ok(entry);
        }
        let mut random = self.shared.writing.lock();
        let mut entries = HashMap::clone(&self.shared.entries.load());
        if let Some(entry) = entries.get(identity) {
            return Ok(entry.clone());
        }
        let max = self.shared.config.max_identities;
        if entries.len() >= max {
            return Err(CertificateError::TooMany { identity: Box::new(identity.clone()), max });
        }
        let entry = Arc::new(Entry::new(identity.clone()));
        let renewal = Renewal::new(self.shared.clone(), entry.clone(), random.fork());
        let task = self.tasks.spawn_on(&self.runtime, "renewal", renewal.run());
        entry.task.set(task).expect("the entry was made three lines up and nobody else has it");
        entries.insert(identity.clone(), entry.clone());
        self.shared.entries.store(Arc::new(entries));
        Ok(entry)
    }
}

impl Drop for CertificateManager {
    fn drop(&mut self) {
        self.tasks.abort_all();
    }
}

impl fmt::Debug for CertificateManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateManager").field("identities", &self.shared.entries.load().len()).finish()
    }
}

impl Entry {
    fn new(identity: Identity) -> Self {
        Self {
            identity,
            current: watch::Sender::new(None),
            progress: Mutex::default(),
            demand: Arc::default(),
            task: OnceLock::new(),
        }
    }

    fn status(&self, now: SystemTime) -> CertificateStatus {
        let certificate = self.current.borrow().clone();
        let progress = self.progress.lock();
        let state = match &certificate {
            Some(certificate) if !certificate.expired(now) => CertificateState::Available,
            None if progress.failures == 0 => CertificateState::Initializing,
            _ => CertificateState::Unavailable,
        };
        let certificate = certificate.as_deref();
        CertificateStatus {
            identity: self.identity.clone(),
            state,
            serial: certificate.map(|c| c.serial().to_owned()),
            not_before: certificate.map(|c| rfc3339(c.not_before())),
            not_after: certificate.map(|c| rfc3339(c.not_after())),
            generation: certificate.map(WorkloadCertificate::generation),
            failures: progress.failures,
            last_error: progress.last_error.clone(),
        }
    }
}

impl Waiting {
    fn new(demand: Arc<Demand>) -> Self {
        demand.waiting.fetch_add(1, Ordering::AcqRel);
        demand.raised.notify_one();
        Self(demand)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

fn rfc3339(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_else(|_| format!("{time:?}"))
}

#[cfg(test)]
mod tests;
