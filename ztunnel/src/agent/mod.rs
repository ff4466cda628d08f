//! The node agent: decides which pods of its node join, writes each one's redirect rules, hands its namespace to the
//! proxy, and keeps checking that both hold.
//!
//! `source` says what should be (`exclusions` reads annotations), `plan` compares it with what is (pure), `enrol` does it,
//! `attest` keeps rules in force, `zds` talks to the proxy, `report` tells the control plane, `metrics` and `admin` tell people.
//! In Kubernetes `announce` hears the CNI plugin, which `install` puts on the node (`conflist` is the pure part), `annotate` writes
//! reports and `events`, `presence` watches whether another agent comes, and `leave` takes everything away if none does. `life` puts it
//! all together.

mod admin;
mod annotate;
mod announce;
mod attest;
#[cfg(test)]
mod chart_tests;
#[cfg(test)]
mod churn_tests;
mod conflist;
mod enrol;
mod events;
mod exclusions;
#[cfg(test)]
mod fake_api;
mod install;
mod leave;
#[cfg(test)]
mod leave_tests;
mod life;
#[cfg(test)]
mod life_tests;
mod metrics;
mod plan;
mod presence;
mod report;
mod source;
mod zds;
#[cfg(test)]
mod zds_tests;

use std::path::{Path, PathBuf};

use anyhow::Context;
use culvert_k8s_api::enrolment::{EnablementSelectors, Settings};
use culvert_net::netns::NetNs;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;

pub use admin::AgentPorts;
#[cfg(test)]
pub(crate) use install::OWN_PODS;
pub use metrics::AgentMetrics;
pub use plan::{Action, Desired, Enrolled, plan};
pub use zds::{AddError, Sessions, ZdsServer};

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
    /// Which pods join, in place of ambient's labels: a list of pairs of podSelector and namespaceSelector in JSON (C02).
    #[arg(long, default_value = "[]")]
    pub enablement_selectors: EnablementSelectors,
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
    /// The node's `/proc/sys/net`, writable; a container's own is not.
    #[arg(long, default_value = "/host/sysctl/net")]
    pub sysctl_dir: PathBuf,
    /// The node's directory of network namespaces, by the same path here and on the node.
    #[arg(long, default_value = "/var/run/netns")]
    pub netns_dir: PathBuf,
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
            sysctl_dir: "/host/sysctl/net".into(),
            netns_dir: "/var/run/netns".into(),
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
    /// On which, besides labels, it depends whether a pod joins.
    fn settings(&self) -> Settings {
        Settings {
            excluded_namespaces: self.exclude_namespaces.clone(),
            system_namespace: match self.in_kubernetes() {
                true => self.kubernetes.system_namespace.clone(),
                false => Settings::default().system_namespace,
            },
            enablement: self.enablement_selectors.clone(),
        }
    }

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
    let outcome = Box::pin(life::serve(&config, filter.as_ref(), &tasks, None, stop)).await;
    tasks.abort_all();
    outcome
}
