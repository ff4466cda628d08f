//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Parser;
use culvert_runtime::units::parse_duration;
use serde_json::{Map, Value};

use crate::kubernetes::review::TrustedProxy;
use crate::provision::render;
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
    /// With --source kubernetes, address of the admission webhook; without it there is none.
    #[arg(long, value_name = "ADDR")]
    pub webhook_listen: Option<SocketAddr>,
    /// DNS name in the certificate of the port; give it again for more.
    #[arg(long, value_name = "NAME", default_value = "culvert-controller.culvert-system.svc")]
    pub server_name: Vec<String>,
    /// With --source kubernetes, whose pods may have the certificates of all pods on their node, and configuration:
    /// NAMESPACE/SERVICEACCOUNT. Any other pod may have its own certificate only, and that of a waypoint also what its Gateway's
    /// waypoint is told.
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
    /// GatewayClass istio-waypoint is ours too, by Istio's controller name. Not beside a control plane of Istio's.
    #[arg(long)]
    pub compat: bool,
    /// With --source kubernetes, the image of waypoints.
    #[arg(long, value_name = "IMAGE", default_value = "culvert/waypoint:latest")]
    pub waypoint_image: String,
    /// When a node fetches that image.
    #[arg(long, value_name = "WHEN", default_value = "IfNotPresent", value_parser = ["Always", "IfNotPresent", "Never"])]
    pub waypoint_pull_policy: String,
    /// Secret that opens the registry; it must be in each namespace that has a waypoint. May be repeated.
    #[arg(long, value_name = "NAME")]
    pub waypoint_pull_secret: Vec<String>,
    /// Requests and limits of waypoints, as a JSON object.
    #[arg(
        long,
        value_name = "JSON",
        default_value = r#"{"requests":{"cpu":"100m","memory":"128Mi"},"limits":{"cpu":"2","memory":"1Gi"}}"#
    )]
    pub waypoint_resources: JsonMap,
    /// Laid over the spec of waypoints' pods, as a JSON object: nodeSelector, affinity, tolerations, topologySpreadConstraints.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub waypoint_scheduling: JsonMap,
    /// Environment of waypoints, NAME=VALUE; may be repeated. Where the control plane is and what the mesh is called is there already.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub waypoint_env: Vec<(String, String)>,
    /// Seconds that a waypoint's open connections have when it is replaced.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u32).range(2..=86_400))]
    pub waypoint_grace_seconds: u32,
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

/// A JSON object on the command line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JsonMap(pub Map<String, Value>);

impl FromStr for JsonMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match serde_json::from_str(text) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err("is no JSON object".to_owned()),
            Err(error) => Err(format!("is no JSON object: {error}")),
        }
    }
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| "has no =".to_owned())?;
    let good = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    if good {
        Ok((name.to_owned(), value.to_owned()))
    } else {
        Err(format!("{name:?} is no name of a variable"))
    }
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

    /// What waypoints are made with.
    pub fn waypoints(&self) -> render::Settings {
        let controller = self.server_name.first().map_or("", String::as_str);
        let env = [
            ("XDS_ADDRESS", format!("https://{controller}:{}", self.listen.port())),
            ("XDS_SERVER_NAME", controller.to_owned()),
            ("XDS_ROOT_CERT", "/var/run/secrets/istio/root-cert.pem".to_owned()),
            ("TOKEN_FILE", "/var/run/secrets/tokens/istio-token".to_owned()),
            ("TRUST_DOMAIN", self.trust_domain.clone()),
            ("DOMAIN_SUFFIX", self.cluster_domain.clone()),
        ];
        let env = env.map(|(name, value)| (name.to_owned(), value)).into_iter();
        render::Settings {
            image: self.waypoint_image.clone(),
            pull_policy: self.waypoint_pull_policy.clone(),
            pull_secrets: self.waypoint_pull_secret.clone(),
            resources: self.waypoint_resources.0.clone(),
            scheduling: self.waypoint_scheduling.0.clone(),
            env: env.chain(self.waypoint_env.iter().cloned()).collect(),
            grace: self.waypoint_grace_seconds,
            cluster_domain: self.cluster_domain.clone(),
        }
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
            compat: self.compat,
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
