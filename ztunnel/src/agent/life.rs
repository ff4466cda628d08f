//! The agent's life: it finds what was enrolled before, then goes on in passes, and leaves the node as it should be left.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use culvert_net::seqpacket::SeqPacketListener;
use culvert_net::sysctl;
use culvert_runtime::drain;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::{Readiness, Task as Pending};
use culvert_runtime::tasks::{Task, Tasks};
use culvert_runtime::telemetry::FilterHandle;
use kube::Client;
use tokio::sync::{Notify, watch};

use super::announce::Waiters;
use super::attest::Sentry;
use super::enrol::Enroller;
use super::install::Installer;
use super::presence::Presence;
use super::source::{self, Source};
use super::{AgentConfig, AgentMetrics, Sessions, ZdsServer, admin, annotate, leave, report};

/// Rules and registrations are compared with what should be at least this often, whatever notifications say.
const RESYNC: Duration = Duration::from_secs(2);
/// Changes of files come in bursts: one pass serves those that arrive so close together.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// What there is in a cluster only.
struct Kubernetes {
    client: Client,
    presence: Arc<Presence>,
    installer: Installer,
    /// Installs and repairs, once it has begun.
    installing: Option<Task>,
    /// What keeps the agent from being ready until it is done for the first time.
    pending: Option<Pending>,
}

/// What the passes need.
struct Agent {
    source: Source,
    enroller: Enroller<Sentry>,
    waiters: Waiters,
    sessions: watch::Receiver<Sessions>,
    alarm: Arc<Notify>,
    metrics: AgentMetrics,
}

struct Opened {
    source: Source,
    reports: report::Reports,
}

/// Until `stop` resolves. In a cluster `client` asks the API server, if it is given, else as a pod there does.
pub(super) async fn serve(
    config: &AgentConfig,
    filter: Option<&FilterHandle>,
    tasks: &Tasks,
    client: Option<Client>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let registry = Registry::for_process("agent", env!("CARGO_PKG_VERSION"));
    let metrics = registry.register(AgentMetrics::new);
    let readiness = Readiness::new();
    let starting = readiness.register("what was enrolled before is found again");
    let (_alive, drain) = drain::channel();
    admin::serve(tasks, &config.ports, &registry, &metrics, &readiness, filter, &drain)?;
    let mut kubernetes = match config.in_kubernetes() {
        true => Some(Kubernetes::connect(config, client, &readiness, tasks).await?),
        false => None,
    };
    if let Some(kubernetes) = &mut kubernetes
        && kubernetes.installer.was_here()
    {
        // Before it is known what pods there are: the entry may be missing, and pods start meanwhile.
        kubernetes.install(tasks, &metrics);
    }
    tokio::pin!(stop);
    let opened = tokio::select! {
        opened = open(config, kubernetes.as_ref(), tasks, &metrics) => Some(opened?),
        () = &mut stop => None,
    };
    let Some(opened) = opened else {
        if let Some(kubernetes) = &mut kubernetes
            && kubernetes.is_for_good(config).await
        {
            kubernetes.leave(config, None).await;
        }
        return Ok(());
    };
    let mut agent = start(config, opened, tasks, &metrics).await?;
    if let Some(kubernetes) = &mut kubernetes {
        kubernetes.install(tasks, &metrics);
    }
    starting.done();
    tracing::info!(node = %config.node, "agent is ready");
    agent.work_until(stop).await;
    if let Some(kubernetes) = &mut kubernetes {
        // Meanwhile it goes on: it may be seconds.
        if agent.work_until(Box::pin(kubernetes.is_for_good(config))).await {
            kubernetes.leave(config, Some(agent)).await;
        }
    }
    Ok(())
}

/// What was enrolled before this agent started is found again before the proxy is told anything: the first snapshot must not make it
/// drop a pod that runs.
async fn start(
    config: &AgentConfig,
    opened: Opened,
    tasks: &Tasks,
    metrics: &AgentMetrics,
) -> anyhow::Result<Agent> {
    let Opened { mut source, reports } = opened;
    let socket = config.socket()?;
    let listener =
        SeqPacketListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let zds = ZdsServer::new(tasks.clone(), metrics.clone());
    let node = config.node_netns().context("opening the node's namespace")?;
    let sentry =
        Sentry::new(node, config.kubelet(), metrics.clone(), tasks.clone()).context("starting to attest")?;
    let alarm = sentry.alarm();
    let mut enroller = Enroller::new(sentry.clone(), zds.clone(), reports, metrics.clone());
    enroller.pass(&source.view()?).await;
    sentry.release_strangers();
    tasks.spawn("zds accept", zds.clone().serve(listener));
    let waiters = match config.in_kubernetes() {
        true => {
            let socket = config.kubernetes.event_socket();
            Waiters::listen(&socket, &config.kubernetes.host_proc, tasks, metrics)
                .with_context(|| format!("listening on {}", socket.display()))?
        }
        false => Waiters::none(),
    };
    let sessions = zds.sessions();
    Ok(Agent { source, enroller, waiters, sessions, alarm, metrics: metrics.clone() })
}

impl Agent {
    /// One pass after each change, and every [`RESYNC`].
    async fn work_until<T>(&mut self, end: impl Future<Output = T>) -> T {
        tokio::pin!(end);
        loop {
            tokio::select! {
                ended = &mut end => return ended,
                () = self.source.changed() => tokio::time::sleep(DEBOUNCE).await,
                () = self.waiters.arrival() => {}
                _ = self.sessions.changed() => {}
                () = self.alarm.notified() => {}
                () = tokio::time::sleep(RESYNC) => {}
            }
            self.metrics.beat();
            self.waiters.announce(&mut self.source);
            match self.source.view() {
                Ok(view) => {
                    self.enroller.pass(&view).await;
                    self.waiters.answer(&mut self.source, &view, &self.enroller);
                }
                // What should be is not known: what is stays, rather than un-enrolling everyone.
                Err(error) => tracing::warn!(error = format!("{error:#}"), "pods cannot be listed"),
            }
        }
    }
}

impl Kubernetes {
    async fn connect(
        config: &AgentConfig,
        client: Option<Client>,
        readiness: &Readiness,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let client = match client {
            Some(client) => client,
            None => Client::try_default().await.context("finding the API server")?,
        };
        sysctl::writable_at(config.kubernetes.sysctl_dir.clone());
        Ok(Self {
            presence: Presence::watch(&client, &config.kubernetes, tasks),
            installer: Installer::new(&config.kubernetes, config.settings())?,
            installing: None,
            pending: Some(readiness.register("the CNI plugin is installed")),
            client,
        })
    }

    fn install(&mut self, tasks: &Tasks, metrics: &AgentMetrics) {
        if let Some(pending) = self.pending.take() {
            let installer = self.installer.clone();
            self.installing = Some(tasks.spawn("install", installer.run(pending, metrics.clone())));
        }
    }

    async fn is_for_good(&self, config: &AgentConfig) -> bool {
        leave::is_for_good(&self.client, &config.kubernetes, &config.node, &self.presence).await
    }

    /// The plugin's entry first, so that no pod starts with rules any more, its program last: a runtime that has not read
    /// its configuration again still looks for it (H19).
    async fn leave(&mut self, config: &AgentConfig, agent: Option<Agent>) {
        if let Some(task) = self.installing.take() {
            task.abort();
        }
        self.installer.remove_entry();
        if let Some(Agent { mut source, mut enroller, .. }) = agent {
            leave::release_all(&mut enroller, &mut source).await;
        }
        leave::sweep(config);
        self.installer.remove_rest();
        if let Ok(socket) = config.socket() {
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Returns when it is known what pods there are.
async fn open(
    config: &AgentConfig,
    kubernetes: Option<&Kubernetes>,
    tasks: &Tasks,
    metrics: &AgentMetrics,
) -> anyhow::Result<Opened> {
    let Some(kubernetes) = kubernetes else {
        let source = source::DirectorySource::open(config).context("reading what pods there are")?;
        let reports = report::Reports::open(&config.node_dir()?)?;
        return Ok(Opened { source: Source::Directory(Box::new(source)), reports });
    };
    let cluster = source::Cluster::watch(&kubernetes.client, &config.node, tasks);
    while cluster.snapshot().is_none() {
        // Without an API server there is nothing else to do: it is not stuck.
        let _ = tokio::time::timeout(RESYNC, cluster.changed.notified()).await;
        metrics.beat();
    }
    let annotations = annotate::Annotations::new(cluster.clone());
    let client = &kubernetes.client;
    tasks.spawn("annotate", Arc::clone(&annotations).run(client.clone()));
    tasks.spawn("events", Arc::clone(&annotations).tell(client.clone(), config.node.clone()));
    tasks.spawn("withdraw", withdraw(Arc::clone(&kubernetes.presence), Arc::clone(&annotations)));
    let host_proc = config.kubernetes.host_proc.clone();
    let source = source::KubernetesSource::new(cluster, config.settings(), config.dns_capture, host_proc);
    Ok(Opened {
        source: Source::Kubernetes(Box::new(source)),
        reports: report::Reports::Annotations(annotations),
    })
}

/// When the DaemonSet goes the right to write annotations goes too, within a second and before the agent is told to end: they are taken away
/// at once. They come back if the DaemonSet does.
async fn withdraw(presence: Arc<Presence>, annotations: Arc<annotate::Annotations>) {
    loop {
        annotations.withdraw(presence.ending().await);
    }
}
