//! The node agent: decides which pods of its node join, writes each one's redirect rules, hands its namespace to the
//! proxy, and keeps checking that both hold.
//!
//! `source` says what should be (`exclusions` reads annotations), `plan` compares it with what is (pure), `enrol` does it,
//! `attest` keeps rules in force, `zds` talks to the proxy, `report` tells the control plane, `metrics` and `admin` tell people.
//! In Kubernetes `announce` hears the CNI plugin, which `install` puts on the node (`conflist` is the pure part), `annotate` writes
//! reports, and `leave` takes everything away at the end.

mod admin;
mod annotate;
mod announce;
mod attest;
#[cfg(test)]
mod churn_tests;
mod conflist;
mod enrol;
mod exclusions;
mod install;
mod leave;
mod metrics;
mod plan;
mod report;
mod source;
mod zds;
#[cfg(test)]
mod zds_tests;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use culvert_k8s_api::enrolment::Settings;
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
    /// Where pods and namespaces come from.
    #[arg(long, value_enum, default_value_t = SourceKind::Directory)]
    pub source: SourceKind,
    /// Directory of manifests: namespaces and pods with their labels. Needed unless the source is Kubernetes.
    #[arg(long)]
    pub manifests: Option<PathBuf>,
    /// State directory: pod status is read from it, redirection status written to it. Needed unless the source is Kubernetes.
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Socket for the proxy; `<state>/nodes/<node>/ztunnel.sock` if absent, in Kubernetes /var/run/ztunnel/ztunnel.sock.
    #[arg(long, env = "ZDS_SOCKET")]
    pub zds_socket: Option<PathBuf>,
    /// Where the last good content of each manifest is kept over a restart; `<state>/nodes/<node>/manifests` if absent.
    #[arg(long)]
    pub last_good: Option<PathBuf>,
    /// The node's network namespace, where pods' interfaces have their other ends; if absent the agent's own, in Kubernetes that of
    /// the node's first process.
    #[arg(long)]
    pub node_netns: Option<PathBuf>,
    /// Namespaces whose pods never join (C06).
    #[arg(long, value_delimiter = ',', default_value = "kube-system")]
    pub exclude_namespaces: Vec<String>,
    /// Whether pods' DNS goes to the proxy, where a pod does not say (C11).
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
    /// User of the node's kubelet: nobody else's connections count as probes. In Kubernetes a kubelet that runs is found.
    #[arg(long, default_value_t = 0)]
    pub kubelet_uid: u32,
    /// Cgroup (of version 2) of the node's kubelet, such as /sys/fs/cgroup/system.slice/kubelet.service: only what runs there probes.
    #[arg(long)]
    pub kubelet_cgroup: Option<PathBuf>,
    /// Where it listens.
    #[command(flatten)]
    pub ports: AgentPorts,
    /// What only Kubernetes needs.
    #[command(flatten)]
    pub kubernetes: KubernetesConfig,
}

/// Where pods and namespaces come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceKind {
    /// A directory of manifests.
    #[default]
    Directory,
    /// The API server of the cluster that the agent runs in.
    Kubernetes,
}

/// The agent's place in a cluster.
#[derive(Clone, Debug, clap::Args)]
pub struct KubernetesConfig {
    /// The node's proc file system.
    #[arg(long, default_value = "/host/proc")]
    pub host_proc: PathBuf,
    /// Namespace of the mesh's own pods.
    #[arg(long, env = "POD_NAMESPACE", default_value = "culvert-system")]
    pub system_namespace: String,
    /// The agent's DaemonSet: when it is gone, so is everything that the agent put on the node.
    #[arg(long, default_value = "culvert-agent")]
    pub daemonset: String,
    /// The node's directory of CNI plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    pub cni_bin_dir: PathBuf,
    /// The node's directory of CNI configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    pub cni_conf_dir: PathBuf,
    /// Directory, by the same path here and on the node, for the plugin's socket and its way to the API server.
    #[arg(long, default_value = "/var/run/culvert")]
    pub run_dir: PathBuf,
    /// The agent's service account: token and certificate authority.
    #[arg(long, default_value = "/var/run/secrets/kubernetes.io/serviceaccount")]
    pub account_dir: PathBuf,
    /// The API server's address, for the plugin.
    #[arg(long, env = "KUBERNETES_SERVICE_HOST", default_value = "kubernetes.default.svc")]
    pub api_host: String,
    /// Its port.
    #[arg(long, env = "KUBERNETES_SERVICE_PORT", default_value_t = 443)]
    pub api_port: u16,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            host_proc: "/host/proc".into(),
            system_namespace: "culvert-system".into(),
            daemonset: "culvert-agent".into(),
            cni_bin_dir: "/opt/cni/bin".into(),
            cni_conf_dir: "/etc/cni/net.d".into(),
            run_dir: "/var/run/culvert".into(),
            account_dir: "/var/run/secrets/kubernetes.io/serviceaccount".into(),
            api_host: "kubernetes.default.svc".into(),
            api_port: 443,
        }
    }
}

impl KubernetesConfig {
    /// Where the plugin asks.
    fn event_socket(&self) -> PathBuf {
        self.run_dir.join("pluginevent.sock")
    }
}

impl AgentConfig {
    fn in_kubernetes(&self) -> bool {
        self.source == SourceKind::Kubernetes
    }

    /// Manifests and state.
    fn directories(&self) -> anyhow::Result<(&Path, &Path)> {
        let manifests = self.manifests.as_deref().context("--manifests is needed without Kubernetes")?;
        Ok((manifests, self.state.as_deref().context("--state is needed without Kubernetes")?))
    }

    fn node_dir(&self) -> anyhow::Result<PathBuf> {
        Ok(self.directories()?.1.join("nodes").join(&self.node))
    }

    fn socket(&self) -> anyhow::Result<PathBuf> {
        match &self.zds_socket {
            Some(path) => Ok(path.clone()),
            None if self.in_kubernetes() => Ok("/var/run/ztunnel/ztunnel.sock".into()),
            None => Ok(self.node_dir()?.join("ztunnel.sock")),
        }
    }

    fn last_good(&self) -> anyhow::Result<PathBuf> {
        self.last_good.clone().map_or_else(|| Ok(self.node_dir()?.join("manifests")), Ok)
    }

    fn node_netns(&self) -> std::io::Result<NetNs> {
        match &self.node_netns {
            Some(path) => NetNs::open(path),
            None if self.in_kubernetes() => NetNs::open(self.kubernetes.host_proc.join("1/ns/net")),
            None => NetNs::current(),
        }
    }

    fn kubelet(&self) -> attest::KubeletConfig {
        let found = self.in_kubernetes().then(|| source::kubelet_uid(&self.kubernetes.host_proc)).flatten();
        attest::KubeletConfig { uid: found.unwrap_or(self.kubelet_uid), cgroup: self.kubelet_cgroup.clone() }
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
    let socket = config.socket()?;
    let Opened { mut source, reports, client } = open(config, tasks).await?;
    let listener =
        SeqPacketListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let zds = ZdsServer::new(tasks.clone(), metrics.clone());
    let node = config.node_netns().context("opening the node's namespace")?;
    let sentry = attest::Sentry::new(node, config.kubelet(), metrics.clone(), tasks.clone())
        .context("starting to attest")?;
    let alarm = sentry.alarm();
    let mut enroller = enrol::Enroller::new(sentry.clone(), zds.clone(), reports, metrics.clone());

    // What was enrolled before this agent started is found again before the proxy is told anything: the first snapshot
    // must not make it drop a pod that runs.
    enroller.pass(&source.view()?).await;
    sentry.release_strangers();
    tasks.spawn("zds accept", zds.clone().serve(listener));
    let mut waiters = announce::Waiters::none();
    let mut installer = None;
    if config.in_kubernetes() {
        let socket = config.kubernetes.event_socket();
        waiters = announce::Waiters::listen(&socket, tasks, &metrics)
            .with_context(|| format!("listening on {}", socket.display()))?;
        let plugin = install::Installer::new(&config.kubernetes, &config.exclude_namespaces)?;
        let pending = readiness.register("the CNI plugin is installed");
        let task = tasks.spawn("install", plugin.clone().run(pending, metrics.clone()));
        installer = Some((plugin, task));
    }
    starting.done();
    tracing::info!(node = %config.node, socket = %socket.display(), "agent is ready");

    let mut sessions = zds.sessions();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            () = &mut stop => break,
            () = source.changed() => tokio::time::sleep(DEBOUNCE).await,
            () = waiters.arrival() => {}
            _ = sessions.changed() => {}
            () = alarm.notified() => {}
            () = tokio::time::sleep(RESYNC) => {}
        }
        metrics.beat();
        waiters.announce(&mut source);
        match source.view() {
            Ok(view) => {
                enroller.pass(&view).await;
                waiters.answer(&mut source, &view, &enroller);
            }
            // What should be is not known: what is stays, rather than un-enrolling everyone.
            Err(error) => tracing::warn!(error = format!("{error:#}"), "pods cannot be listed"),
        }
    }
    if let (Some(client), Some((installer, task))) = (client, installer)
        && leave::is_for_good(&client, &config.kubernetes).await
    {
        task.abort();
        installer.remove();
        leave::release_all(&mut enroller, &mut source).await;
    }
    Ok(())
}

struct Opened {
    source: source::Source,
    reports: report::Reports,
    client: Option<kube::Client>,
}

/// Returns when it is known what pods there are.
async fn open(config: &AgentConfig, tasks: &Tasks) -> anyhow::Result<Opened> {
    if !config.in_kubernetes() {
        let source = source::DirectorySource::open(config).context("reading what pods there are")?;
        let reports = report::Reports::open(&config.node_dir()?)?;
        return Ok(Opened { source: source::Source::Directory(Box::new(source)), reports, client: None });
    }
    let client = kube::Client::try_default().await.context("finding the API server")?;
    let cluster = source::Cluster::watch(&client, &config.node, tasks);
    let settings = Settings {
        excluded_namespaces: config.exclude_namespaces.clone(),
        system_namespace: config.kubernetes.system_namespace.clone(),
    };
    while cluster.snapshot().is_none() {
        cluster.changed.notified().await;
    }
    let annotations = annotate::Annotations::new(cluster.clone());
    tasks.spawn("annotate", Arc::clone(&annotations).run(client.clone()));
    let host_proc = config.kubernetes.host_proc.clone();
    let source = source::KubernetesSource::new(cluster, settings, config.dns_capture, host_proc);
    Ok(Opened {
        source: source::Source::Kubernetes(Box::new(source)),
        reports: report::Reports::Annotations(annotations),
        client: Some(client),
    })
}
