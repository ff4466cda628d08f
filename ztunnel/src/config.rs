//! The proxy's settings: flags, or environment variables of the same names.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use culvert_runtime::workers::WorkerCount;

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
/// SOCKS5 in ambient; never a final destination (Z49).
pub const SOCKS_PORT: u16 = 15080;
/// The ports that belong to the proxy inside a pod (Z29, Z49).
pub const OWN_PORTS: [u16; 5] = [OUTBOUND_PORT, INBOUND_PORT, HBONE_PORT, DNS_PORT, SOCKS_PORT];
/// TCP connect, each attempt (Z25).
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a connection waits for its own pod to become known (Z30).
pub const SOURCE_TIMEOUT: Duration = Duration::from_secs(5);
/// TLS and HTTP/2 handshakes, together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

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
    #[arg(long, env = "XDS_ADDRESS")]
    pub xds_address: String,
    /// Certificate authority, if it is not the control plane.
    #[arg(long, env = "CA_ADDRESS")]
    pub ca_address: Option<String>,
    /// DNS name in the control plane's certificate; the host of its address if absent.
    #[arg(long, env = "XDS_SERVER_NAME")]
    pub xds_server_name: Option<String>,
    /// Roots that the control plane's certificate must lead to.
    #[arg(long, env = "XDS_ROOT_CERT")]
    pub xds_root_cert: PathBuf,
    /// Bearer token for the control plane and the certificate authority, mode 0600.
    #[arg(long, env = "TOKEN_FILE")]
    pub token_file: PathBuf,
    /// Where DNS queries for other names go, in order.
    #[arg(long, env = "DNS_UPSTREAM", value_delimiter = ',')]
    pub dns_upstream: Vec<SocketAddr>,
    /// Worker threads: a number, `N%` of the cores, or 0 for all; by default a share of the machine.
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", default_value = "")]
    pub workers: WorkerCountArg,
    /// How long open connections may go on after SIGTERM.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", default_value = "5s", value_parser = duration)]
    pub drain_deadline: Duration,
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
}

/// Text of `--workers`; empty means by default.
pub type WorkerCountArg = String;

impl ProxyConfig {
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

fn duration(text: &str) -> Result<Duration, String> {
    culvert_runtime::units::parse_duration(text).map_err(|e| e.to_string())
}
