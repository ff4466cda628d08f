//! What all connections share, and what each worker thread has to itself.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use culvert_identity::manager::CertificateManager;
use culvert_model::address::NamespacedHostname;
use culvert_model::balance::Place;
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::workload::Locality;
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use crate::config::ProxyConfig;
use crate::connect::{TunnelPool, tunnel_pool};
use crate::endpoint::Endpoints;
use crate::http::retry::Budget;
use crate::http::upstream::ClientPool;
use crate::observe::Metrics;
use crate::state::State;
use crate::tls::TlsConfigs;

/// Requests mirrored at once by one worker: with 256 KiB of each body on its way, 32 MB.
const MAX_MIRRORS: usize = 128;

/// One for the process.
pub struct Shared {
    /// Settings.
    pub config: ProxyConfig,
    /// Who this waypoint is.
    pub identity: Identity,
    /// The service by whose name others are bound to it.
    pub own: NamespacedHostname,
    /// Where it is.
    pub place: Place,
    /// Its certificate.
    pub certificates: Arc<CertificateManager>,
    /// TLS made of that.
    pub tls: TlsConfigs,
    /// What it knows.
    pub state: State,
    /// What it has seen of endpoints.
    pub endpoints: Arc<Endpoints>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// What it still waits for.
    pub readiness: Readiness,
    /// The process's drain.
    pub drain: DrainWatcher,
    /// Places of tunnels.
    pub tunnels: Arc<Semaphore>,
    /// Places of requests.
    pub requests: Arc<Semaphore>,
    workers: Vec<Arc<Worker>>,
    next: AtomicUsize,
}

/// One for each worker thread: a connection and what is opened for it stay on their thread.
pub struct Worker {
    /// The thread's runtime.
    pub runtime: Handle,
    /// What runs there.
    pub tasks: Tasks,
    /// HBONE connections to endpoints.
    pub tunnels: TunnelPool,
    /// HTTP connections to endpoints.
    pub clients: Arc<ClientPool>,
    /// Places of mirrored requests.
    pub mirrors: Arc<Semaphore>,
    /// How much may be repeated.
    pub budget: Budget,
}

/// Why something was refused or failed.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{reason}: {detail}")]
pub struct Failure {
    /// In the mesh's vocabulary.
    pub reason: Reason,
    /// The particulars, for a person.
    pub detail: String,
}

impl Failure {
    /// A reason and its particulars.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }
}

impl Shared {
    /// With these workers.
    pub fn new(
        config: ProxyConfig,
        identity: Identity,
        certificates: Arc<CertificateManager>,
        (metrics, readiness, drain): (Arc<Metrics>, Readiness, DrainWatcher),
        runtimes: impl IntoIterator<Item = Handle>,
    ) -> Arc<Self> {
        let workers = runtimes.into_iter().map(|runtime| Arc::new(Worker::new(runtime, &config))).collect();
        Arc::new(Self {
            own: config.own_service(),
            place: Place {
                network: config.network.as_str().into(),
                locality: Locality::default(),
                node: config.node.as_str().into(),
                cluster: config.cluster_id.as_str().into(),
            },
            tls: TlsConfigs::new(&config),
            tunnels: Arc::new(Semaphore::new(config.max_tunnels)),
            requests: Arc::new(Semaphore::new(config.max_requests)),
            config,
            identity,
            certificates,
            state: State::default(),
            endpoints: Arc::default(),
            metrics,
            readiness,
            drain,
            workers,
            next: AtomicUsize::new(0),
        })
    }

    /// All workers; never none.
    pub fn workers(&self) -> &[Arc<Worker>] {
        &self.workers
    }

    /// The one whose turn it is.
    pub fn next_worker(&self) -> &Arc<Worker> {
        &self.workers[self.next.fetch_add(1, Ordering::Relaxed) % self.workers.len()]
    }
}

impl Worker {
    fn new(runtime: Handle, config: &ProxyConfig) -> Self {
        let tasks = Tasks::new("worker");
        Self {
            tunnels: tunnel_pool(runtime.clone(), tasks.clone(), config.pool_idle),
            clients: Arc::new(ClientPool::new(config.pool_idle)),
            mirrors: Arc::new(Semaphore::new(MAX_MIRRORS)),
            budget: Budget::default(),
            runtime,
            tasks,
        }
    }

    /// Connections to these addresses must serve no new requests.
    pub fn evict(&self, stale: &HashSet<IpAddr>) {
        self.tunnels.evict(|key, _| stale.contains(&key.peer.ip()) || stale.contains(&key.destination.ip()));
        self.clients.evict(stale);
    }

    /// Whether anything is being served: all but what runs for as long as the thread.
    pub fn is_serving(&self) -> bool {
        self.tasks.names().iter().any(|name| matches!(*name, "stream" | "hbone connection" | "upgraded"))
    }

    /// Spawns here.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn_on(&self.runtime, name, task);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("tasks", &self.tasks).finish_non_exhaustive()
    }
}
