//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use culvert_runtime::units::parse_duration;

use crate::kubernetes::review::TrustedProxy;
use crate::sources::directory::Paths;
use crate::sources::kubernetes::selection::{NamespaceSelector, Selection};
use crate::translate::MeshSettings;

/// Watches a directory of Kubernetes manifests and serves workloads, services, policies and certificates to the mesh's
/// proxies.
#[derive(Clone, Debug, Parser)]
#[command(name = "controller", version)]
pub struct Args {
    /// Where the world is read: a directory of manifests, or the Kubernetes API server (that of the pod this runs in, or of
    /// KUBECONFIG).
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = SourceKind::Directory)]
    pub source: SourceKind,
    /// Directory of manifests (*.yaml, *.yml, *.json), with those below it.
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Directory with pods/ and services/, the status that whoever runs the pods writes.
    #[arg(long, value_name = "DIR")]
    pub status: Option<PathBuf>,
    /// Directory with NODE/redirection/*.json, which each node's agent writes.
    #[arg(long, value_name = "DIR")]
    pub redirection: Option<PathBuf>,
    /// JSON object: node to the hex SHA-256 of its token.
    #[arg(long, value_name = "FILE")]
    pub node_tokens: Option<PathBuf>,
    /// Where the root key and certificate are kept; made if they are not there.
    #[arg(long, value_name = "DIR")]
    pub ca_dir: Option<PathBuf>,
    /// Where the last good content of each manifest is kept, so that a restart does not forget it. [default: last-good in
    /// the CA directory]
    #[arg(long, value_name = "DIR")]
    pub last_good: Option<PathBuf>,
    /// Where to write the root certificate for clients of this port.
    #[arg(long, value_name = "FILE")]
    pub root_cert_out: Option<PathBuf>,
    /// Address of xDS and the certificate API.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15012")]
    pub listen: SocketAddr,
    /// Address of metrics, readiness and debug pages. Debug pages show what is in the mesh to whoever reaches them.
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:15014")]
    pub metrics_listen: SocketAddr,
    /// DNS name in the certificate of the port; give it again for more.
    #[arg(long, value_name = "NAME", default_value = "culvert-controller.culvert-system.svc")]
    pub server_name: Vec<String>,
    /// With --source kubernetes, whose pods may have the certificates of all pods on their node, and configuration:
    /// NAMESPACE/SERVICEACCOUNT. Any other pod may have its own certificate only.
    #[arg(
        long,
        env = "TRUSTED_PROXIES",
        value_name = "NAMESPACE/ACCOUNT",
        value_delimiter = ',',
        default_value = "culvert-system/ztunnel"
    )]
    pub trusted_proxy: Vec<TrustedProxy>,
    /// With --source kubernetes, the namespace that this runs in: its Secrets and its Lease are there.
    #[arg(long, env = "POD_NAMESPACE", value_name = "NAME", default_value = "culvert-system")]
    pub pod_namespace: String,
    /// With --source kubernetes, the name of this replica, which no other has.
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "controller")]
    pub pod_name: String,
    /// With --source kubernetes, the mesh is about the namespaces that a label selector matches; give it again for more. Without any it
    /// is about all of them. The root namespace and the controller's own belong to it in any case.
    #[arg(long, value_name = "SELECTOR")]
    pub discovery_selector: Vec<NamespaceSelector>,
    /// With --source kubernetes, take the taint culvert.dev/not-ready (or cni.istio.io/not-ready) off a node as soon as its agent is
    /// ready.
    #[arg(long)]
    pub untaint_nodes: bool,
    /// Trust domain of every identity.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Lifetime of workloads' certificates; a longer one that is asked for is cut to it.
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub cert_ttl: Duration,
    /// Namespace whose policies without a selector are for the whole mesh.
    #[arg(long, value_name = "NAME", default_value = "istio-system")]
    pub root_namespace: String,
    /// What service names end with.
    #[arg(long, value_name = "NAME", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Whether the NetworkPolicies among the manifests are all that the network enforces. `unknown` where it has kinds of its own
    /// that are not: then no connection is handed over within a node.
    #[arg(long, value_name = "WHICH", value_enum, default_value_t = NetworkPolicies::Manifests)]
    pub network_policies: NetworkPolicies,
    /// Log filter, such as info,culvert_xds=debug.
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
    /// Log as JSON lines.
    #[arg(long)]
    pub log_json: bool,
    /// Settings file in YAML: a key for each flag, by its name without dashes in front. Flags win.
    #[arg(long, env = "CONFIG_FILE", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print every setting, its value and where that was written, as a settings file, and end.
    #[arg(long)]
    pub print_config: bool,
}

/// Where the world is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceKind {
    /// Directories of manifests and statuses.
    Directory,
    /// The Kubernetes API server.
    Kubernetes,
}

/// What the network enforces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum NetworkPolicies {
    /// The NetworkPolicies among the manifests, and nothing else.
    Manifests,
    /// Nobody here can say.
    Unknown,
}

impl Args {
    /// Where to read; `None` without a directory of manifests.
    pub fn paths(&self) -> Option<Paths> {
        let beside = || Some(self.ca_dir.as_ref()?.join("last-good"));
        Some(Paths {
            manifests: self.manifests.clone()?,
            status: self.status.clone(),
            redirection: self.redirection.clone(),
            last_good: self.last_good.clone().or_else(beside),
        })
    }

    /// Which namespaces the mesh is about.
    pub fn selection(&self) -> Selection {
        let always = [self.root_namespace.clone(), self.pod_namespace.clone()];
        Selection::new(self.discovery_selector.clone(), always)
    }

    /// What translation depends on.
    pub fn mesh(&self) -> MeshSettings {
        MeshSettings {
            trust_domain: self.trust_domain.clone(),
            root_namespace: self.root_namespace.clone(),
            cluster_domain: self.cluster_domain.clone(),
            network_policies: self.network_policies == NetworkPolicies::Manifests,
            ..MeshSettings::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// D09, D53, D55, D76: ambient's ports, without those that speak plaintext about what the mesh is, and certificates for a day.
    #[test]
    fn what_holds_if_nothing_is_said() {
        let args = Args::parse_from(["controller"]);
        let of = |address: SocketAddr| (address.ip().is_unspecified(), address.port());
        assert_eq!((of(args.listen), of(args.metrics_listen)), ((true, 15012), (true, 15014)));
        assert_eq!(args.cert_ttl, Duration::from_secs(24 * 60 * 60));
        assert_eq!(
            (args.trust_domain.as_str(), args.root_namespace.as_str()),
            ("cluster.local", "istio-system")
        );
        assert!(!args.untaint_nodes);
        let mesh = args.mesh();
        assert_eq!((mesh.cluster_domain.as_str(), mesh.network_policies), ("cluster.local", true));
    }
}
