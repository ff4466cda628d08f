//! The proxy's settings: flags, environment variables, or keys of a file by the flags' names (Z118). `variables` has the
//! variables that stand for more than one setting, or under another name.

mod variables;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use culvert_runtime::config::{Effective, Program};
use culvert_runtime::workers::WorkerCount;
use tonic::metadata::{Ascii, MetadataKey, MetadataValue};

/// How the programs of this package read their settings.
pub const PROGRAM: Program = Program { layers: variables::layers, secrets: &["xds-header", "ca-header"] };

use crate::bounds::Bounds;

/// Mark of every socket that the proxy opens in a pod's namespace: such traffic is not captured again (C40).
pub const PROXY_MARK: u32 = 0x539;
/// Captured outbound connections (Z01).
pub const OUTBOUND_PORT: u16 = 15001;
/// Captured inbound plaintext (Z01).
pub const INBOUND_PORT: u16 = 15006;
/// HBONE (Z01).
pub const HBONE_PORT: u16 = 15008;
/// The pod's DNS proxy (Z01).
pub const DNS_PORT: u16 = 15053;
/// SOCKS5, where it is switched on (Z01); never a final destination (Z49).
pub const SOCKS_PORT: u16 = 15080;
/// The ports that belong to the proxy inside a pod (Z29, Z49).
pub const OWN_PORTS: [u16; 5] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT, SOCKS_PORT];
/// TCP connect, each attempt (Z25).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection waits for its own pod to become known (Z30).
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(5);
/// TLS and HTTP/2 handshakes, together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether connections between two pods of the node are handed over inside this process instead of through a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum SameNode {
    /// Where the control plane says that no NetworkPolicy selects either pod.
    Auto,
    /// Never.
    Tunnel,
    /// Also where the control plane does not say: somebody vouches that the network restricts no pod.
    Handover,
}

/// Tunnels the traffic of the node's enrolled pods.
#[derive(Clone, Debug, clap::Args)]
pub struct ProxyConfig {
    /// Name of the node that this proxy serves.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Address of the node or the proxy's pod, for the control plane's lists.
    #[arg(long, env = "INSTANCE_IP", default_value = "127.0.0.1")]
    pub node_ip: IpAddr,
    /// Name of the proxy's own pod.
    #[arg(long, env = "POD_NAME", default_value = "ztunnel")]
    pub pod_name: String,
    /// Namespace of the proxy's own pod.
    #[arg(long, env = "POD_NAMESPACE", default_value = "culvert-system")]
    pub pod_namespace: String,
    /// Cluster id of this node's workloads.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Network of this node's workloads; empty is the default network.
    #[arg(long, env = "NETWORK", default_value = "")]
    pub network: String,
    /// Trust domain of this mesh.
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    pub trust_domain: String,
    /// Other trust domains whose identities are accepted, if their roots are in the bundle.
    #[arg(long, env = "TRUST_DOMAIN_ALIASES", value_delimiter = ',')]
    pub trust_domain_aliases: Vec<String>,
    /// DNS domain of services.
    #[arg(long, env = "DOMAIN_SUFFIX", default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Socket of the node agent.
    #[arg(long, env = "ZDS_SOCKET", default_value = "/var/run/ztunnel/ztunnel.sock")]
    pub zds_socket: PathBuf,
    /// Control plane: workload API.
    #[arg(long, env = "XDS_ADDRESS", required_unless_present = "local_xds", value_parser = address)]
    pub xds_address: Option<String>,
    /// Workloads, services and policies from this file instead of a control plane; read again when it changes (Z100).
    #[arg(long, env = "LOCAL_XDS_PATH", conflicts_with = "xds_address")]
    pub local_xds: Option<PathBuf>,
    /// Certificate authority, if it is not the control plane.
    #[arg(long, env = "CA_ADDRESS", requires_all = ["token_file"], value_parser = address)]
    pub ca_address: Option<String>,
    /// DNS name in the control plane's certificate; the host of its address if absent.
    #[arg(long, env = "XDS_SERVER_NAME")]
    pub xds_server_name: Option<String>,
    /// DNS name in the certificate authority's certificate; the control plane's if absent.
    #[arg(long, env = "CA_SERVER_NAME")]
    pub ca_server_name: Option<String>,
    /// Roots that the control plane's certificate must lead to. Read anew for each connection (Z91).
    #[arg(long, env = "XDS_ROOT_CERT", required_unless_present = "local_xds")]
    pub xds_root_cert: Option<PathBuf>,
    /// Roots that the certificate authority's certificate must lead to; the control plane's if absent.
    #[arg(long, env = "CA_ROOT_CERT")]
    pub ca_root_cert: Option<PathBuf>,
    /// Bearer token for the control plane and the certificate authority, mode 0600.
    #[arg(long, env = "TOKEN_FILE", required_unless_present = "local_xds")]
    pub token_file: Option<PathBuf>,
    /// Header `NAME=VALUE` of the workload API's stream; also each variable `XDS_HEADER_NAME`. At most 64.
    #[arg(long)]
    pub xds_header: Vec<Header>,
    /// Header `NAME=VALUE` of each certificate request; also each variable `CA_HEADER_NAME`. At most 64.
    #[arg(long)]
    pub ca_header: Vec<Header>,
    /// `KEY=VALUE` in this proxy's entry for the control plane; also each variable `ISTIO_META_KEY`. At most 256.
    #[arg(long)]
    pub node_metadata: Vec<Metadatum>,
    /// Where DNS queries for other names go, in order; the servers of /etc/resolv.conf if absent (Z82).
    #[arg(long, env = "DNS_UPSTREAM", value_delimiter = ',')]
    pub dns_upstream: Vec<SocketAddr>,
    /// Worker threads: a number, `N%` of the cores, or 0 for all; by default a share of the machine.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", default_value = "")]
    pub workers: WorkerCountArg,
    /// How long open connections may go on after SIGTERM. By default the grace period less 5 s, or less 1 s if it is at
    /// most 10 s; 5 s if there is none (Z09).
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_parser = duration)]
    pub drain_deadline: Option<Duration>,
    /// After how many seconds the platform kills a process that it asked to end.
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS")]
    pub termination_grace_period_seconds: Option<u64>,
    /// Admin page, loopback only.
    #[arg(long, env = "ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_listen: SocketAddr,
    /// Metrics.
    #[arg(long, env = "STATS_ADDR", default_value = "[::]:15020")]
    pub metrics_listen: SocketAddr,
    /// Readiness.
    #[arg(long, env = "READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_listen: SocketAddr,
    /// Lifetime asked for each certificate; the authority may give less.
    #[arg(long, env = "SECRET_TTL", default_value = "24h", value_parser = duration)]
    pub certificate_ttl: Duration,
    /// Unused tunnels are closed after this long.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub pool_idle: Duration,
    /// Between two pods of this node: `auto` hands connections over in this process, without encryption, where the control plane
    /// says that no NetworkPolicy selects either pod; `tunnel` never does; `handover` also does where it does not say.
    #[arg(long, env = "SAME_NODE", value_enum, default_value_t = SameNode::Auto)]
    pub same_node: SameNode,
    /// Whether each pod gets a SOCKS5 proxy at 127.0.0.1:15080 (Z01).
    #[arg(long, env = "UNSTABLE_ENABLE_SOCKS5", default_value_t = false, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true")]
    pub socks5: bool,
    /// How much is served at once, and how long what stands still is kept.
    #[command(flatten)]
    pub bounds: Bounds,
    /// Where each setting came from, for the admin page.
    #[arg(skip)]
    pub effective: Effective,
}

/// Text of `--workers`; empty means by default.
pub type WorkerCountArg = String;

/// A header of calls to the control plane.
#[derive(Clone, Debug)]
pub struct Header {
    /// Lower case.
    pub name: MetadataKey<Ascii>,
    /// Marked as sensitive: no log shows it.
    pub value: MetadataValue<Ascii>,
}

/// An entry of the node's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadatum {
    /// Its key.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Headers of one kind: with names and values of usual lengths they stay far below the 16 KiB that servers take.
const MAX_HEADERS: usize = 64;
/// Entries of the node's metadata, sent once a connection.
const MAX_METADATA: usize = 256;
/// Deadline of a drain when nothing says how long there is (Z09).
const DEFAULT_DRAIN: Duration = Duration::from_secs(5);

impl ProxyConfig {
    /// How long open connections may go on once the process is to end (Z09).
    #[must_use]
    pub fn drain_deadline(&self) -> Duration {
        let left = |grace: u64| if grace > 10 { grace - 5 } else { grace.saturating_sub(1).max(1) };
        let derived = || self.termination_grace_period_seconds.map(|grace| Duration::from_secs(left(grace)));
        self.drain_deadline.or_else(derived).unwrap_or(DEFAULT_DRAIN)
    }

    /// What no single value shows.
    ///
    /// # Errors
    /// Names the setting and its bound.
    pub fn validate(&self) -> anyhow::Result<()> {
        let counts = [
            ("xds-header", self.xds_header.len(), MAX_HEADERS),
            ("ca-header", self.ca_header.len(), MAX_HEADERS),
            ("node-metadata", self.node_metadata.len(), MAX_METADATA),
        ];
        for (name, count, most) in counts {
            anyhow::ensure!(count <= most, "{name}: {count} entries; {most} are allowed");
        }
        let roots = self.ca_root_cert.as_ref().or(self.xds_root_cert.as_ref());
        anyhow::ensure!(
            self.ca_address.is_none() || roots.is_some(),
            "ca-address: needs ca-root-cert or xds-root-cert, the roots that its certificate must lead to"
        );
        self.worker_count().map(drop)
    }

    /// How many worker threads to start.
    ///
    /// # Errors
    /// The text is neither a number nor a percentage.
    pub fn worker_count(&self) -> anyhow::Result<usize> {
        let cores = culvert_runtime::workers::cores();
        if self.workers.is_empty() {
            return Ok(culvert_runtime::workers::default_count(cores, culvert_runtime::workers::cpu_limit()));
        }
        Ok(self.workers.parse::<WorkerCount>()?.resolve(cores))
    }
}

impl FromStr for Header {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("want NAME=VALUE")?;
        let lower = name.to_ascii_lowercase();
        if lower.starts_with("grpc-")
            || ["te", "content-type", "user-agent", "host"].contains(&lower.as_str())
        {
            return Err(format!("header {name:?} belongs to the protocol"));
        }
        let name = lower.parse().map_err(|_| format!("{name:?} is not the name of a text header"))?;
        // Not quoted: values of headers are often secrets.
        let mut value: MetadataValue<Ascii> =
            value.parse().map_err(|_| format!("the value of {name} holds what no header may"))?;
        value.set_sensitive(true);
        Ok(Self { name, value })
    }
}

impl FromStr for Metadatum {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, value) = text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("want KEY=VALUE")?;
        Ok(Self { key: key.to_owned(), value: value.to_owned() })
    }
}

/// `https://HOST[:PORT]`; `https://` may be left out, as in ambient.
fn address(text: &str) -> Result<String, String> {
    match text.split_once("://") {
        None => Ok(format!("https://{text}")),
        Some(("https", _)) => Ok(text.to_owned()),
        Some((scheme, _)) => Err(format!("{scheme:?} is not https; want https://HOST[:PORT]")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    culvert_runtime::units::parse_duration(text).map_err(|e| e.to_string())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
