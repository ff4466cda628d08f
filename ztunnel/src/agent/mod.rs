//! The node agent: decides which pods of its node join, writes each one's redirect rules, hands its namespace to the
//! proxy, and keeps checking that both hold.
//!
//! `source` says what should be (`exclusions` reads annotations), `plan` compares it with what is (pure), `enrol` does it,
//! `attest` keeps rules in force, `zds` talks to the proxy, `report` tells the control plane, `metrics` and `admin` tell people.

mod admin;
mod attest;
#[cfg(test)]
mod churn_tests;
mod enrol;
mod exclusions;
mod metrics;
mod plan;
mod report;
mod source;
mod zds;
#[cfg(test)]
mod zds_tests;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use culvert_net::netns::NetNs;
use culvert_net::seqpacket::SeqPacketListener;
use culvert_runtime::drain;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;

pub use admin::AgentPorts;
pub use metrics::AgentMetrics;
pub use plan::{Action, Desired, Enrolled, plan};
pub use zds::{AddError, Sessions, ZdsServer};

/// Rules and registrations are compared with what should be at least this often, whatever notifications say.
const RESYNC: Duration = Duration::from_secs(2);
/// Changes of files come in bursts: one pass serves those that arrive so close together.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// Enrols the node's pods.
#[derive(Clone, Debug, clap::Args)]
pub struct AgentConfig {
    /// Name of the node that this agent serves.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Directory of manifests: namespaces and pods with their labels.
    #[arg(long)]
    pub manifests: PathBuf,
    /// State directory: pod status is read from it, redirection status written to it.
    #[arg(long)]
    pub state: PathBuf,
    /// Socket for the proxy; `<state>/nodes/<node>/ztunnel.sock` if absent.
    #[arg(long, env = "ZDS_SOCKET")]
    pub zds_socket: Option<PathBuf>,
    /// Where the last good content of each manifest is kept over a restart; `<state>/nodes/<node>/manifests` if absent.
    #[arg(long)]
    pub last_good: Option<PathBuf>,
    /// The node's network namespace, where pods' interfaces have their other ends; the agent's own if absent.
    #[arg(long)]
    pub node_netns: Option<PathBuf>,
    /// Namespaces whose pods never join (C06).
    #[arg(long, value_delimiter = ',', default_value = "kube-system")]
    pub exclude_namespaces: Vec<String>,
    /// Whether pods' DNS goes to the proxy, where a pod does not say (C11).
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
    /// User of the node's kubelet: nobody else's connections count as probes.
    #[arg(long, default_value_t = 0)]
    pub kubelet_uid: u32,
    /// Cgroup (of version 2) of the node's kubelet, such as /sys/fs/cgroup/system.slice/kubelet.service: only what runs there probes.
    #[arg(long)]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Where it listens.
    #[command(flatten)]
    pub ports: AgentPorts,
}

impl AgentConfig {
    fn node_dir(&self) -> PathBuf {
        self.state.join("nodes").join(&self.node)
    }

    fn socket(&self) -> PathBuf {
        self.zds_socket.clone().unwrap_or_else(|| self.node_dir().join("ztunnel.sock"))
    }

    fn last_good(&self) -> PathBuf {
        self.last_good.clone().unwrap_or_else(|| self.node_dir().join("manifests"))
    }

    fn node_netns(&self) -> std::io::Result<NetNs> {
        match &self.node_netns {
            Some(path) => NetNs::open(path),
            None => NetNs::current(),
        }
    }
}

/// Serves until SIGTERM. Rules stay as they are: they must outlive the agent, or a restart would open a gap.
///
/// # Errors
/// The socket cannot be bound or a directory cannot be read at start.
pub async fn run(config: AgentConfig, filter: FilterHandle) -> anyhow::Result<()> {
    // Two descriptors a pod and more while it changes.
    culvert_net::socket::raise_nofile_limit().context("raising the limit of open files")?;
    run_until(config, Some(filter), async { drop(culvert_runtime::signal::shutdown().await) }).await
}

/// Serves until `stop` resolves.
///
/// # Errors
/// As for [`run`].
pub async fn run_until(
    config: AgentConfig,
    filter: Option<FilterHandle>,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let tasks = Tasks::new("agent");
    let outcome = serve(&config, filter.as_ref(), &tasks, stop).await;
    tasks.abort_all();
    outcome
}

async fn serve(
    config: &AgentConfig,
    filter: Option<&FilterHandle>,
    tasks: &Tasks,
    stop: impl Future<Output = ()>,
) -> anyhow::Result<()> {
    let registry = Registry::for_process("agent", env!("CARGO_PKG_VERSION"));
    let metrics = registry.register(AgentMetrics::new);
    let readiness = Readiness::new();
    let starting = readiness.register("what was enrolled before is found again");
    let (_alive, drain) = drain::channel();
    admin::serve(tasks, &config.ports, &registry, &metrics, &readiness, filter, &drain)?;
    let socket = config.socket();
    let mut source = source::DirectorySource::open(config).context("reading what pods there are")?;
    let reports = report::Reports::open(&config.node_dir())?;
    let listener =
        SeqPacketListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let zds = ZdsServer::new(tasks.clone(), metrics.clone());
    let node = config.node_netns().context("opening the node's namespace")?;
    let kubelet = attest::KubeletConfig { uid: config.kubelet_uid, cgroup: config.kubelet_cgroup.clone() };
    let sentry =
        attest::Sentry::new(node, kubelet, metrics.clone(), tasks.clone()).context("starting to attest")?;
    let alarm = sentry.alarm();
    let mut enroller = enrol::Enroller::new(sentry.clone(), zds.clone(), reports, metrics.clone());

    // What was enrolled before this agent started is found again before the proxy is told anything: the first snapshot
    // must not make it drop a pod that runs.
    enroller.pass(&source.view()?).await;
    sentry.release_strangers();
    tasks.spawn("zds accept", zds.clone().serve(listener));
    starting.done();
    tracing::info!(node = %config.node, socket = %socket.display(), "agent is ready");

    let mut sessions = zds.sessions();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => return Ok(()),
            () = source.changed() => tokio::time::sleep(DEBOUNCE).await,
            _ = sessions.changed() => {}
            () = alarm.notified() => {}
            () = tokio::time::sleep(RESYNC) => {}
        }
        metrics.beat();
        match source.view() {
            Ok(view) => enroller.pass(&view).await,
            // What should be is not known: what is stays, rather than un-enrolling everyone.
            Err(error) => tracing::warn!(error = format!("{error:#}"), "pods cannot be listed"),
        }
    }
}
