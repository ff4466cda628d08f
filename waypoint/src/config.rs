//! The waypoint's settings: flags, environment variables, or keys of a file by the flags' names.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use culvert_model::address::NamespacedHostname;
use culvert_model::identity::{Identity, ParseIdentityError};
use culvert_runtime::config::{Effective, Environment, Layer, Program};
use culvert_runtime::workers::WorkerCount;

/// How the program reads its settings.
pub const PROGRAM: Program = Program { layers, secrets: &[] };

/// HBONE.
pub const HBONE_PORT: u16 = 15008;
/// TCP connect, each attempt.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// TLS and HTTP/2 handshakes, together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Deadline of a drain when nothing says how long there is.
const DEFAULT_DRAIN: Duration = Duration::from_secs(5);

/// Serves the services and workloads that are bound to one Gateway.
#[derive(Clone, Debug, clap::Args)]
pub struct ProxyConfig {
    /// Name of the node that this runs on.
    #[arg(long, env = "NODE_NAME", default_value = "")]
    pub node: String,
    /// Address of the waypoint's pod.
    #[arg(long, env = "INSTANCE_IP", default_value = "127.0.0.1")]
    pub instance_ip: IpAddr,
    /// Name of the waypoint's pod.
    #[arg(long, env = "POD_NAME", default_value = "waypoint")]
    pub pod_name: String,
    /// Namespace of the waypoint's pod and of its Gateway.
    #[arg(long, env = "POD_NAMESPACE")]
    pub pod_namespace: String,
    /// Service account of the waypoint's pod.
    #[arg(long, env = "SERVICE_ACCOUNT")]
    pub service_account: String,
    /// Name of the Gateway.
    #[arg(long, env = "GATEWAY_NAME")]
    pub gateway: String,
    /// Name of the Service by which others are bound to it; the Gateway's if absent.
    #[arg(long, env = "GATEWAY_SERVICE")]
    pub gateway_service: Option<String>,
    /// Cluster id of this node's workloads.
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    pub cluster_id: String,
    /// Network of the waypoint's pod; empty is the default network.
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
    /// Control plane.
    #[arg(long, env = "XDS_ADDRESS", required_unless_present = "local_xds", value_parser = address)]
    pub xds_address: Option<String>,
    /// What there is, from this file instead of a control plane; read again when it changes.
    #[arg(long, env = "LOCAL_XDS_PATH", conflicts_with = "xds_address")]
    pub local_xds: Option<PathBuf>,
    /// Certificate authority, if it is not the control plane.
    #[arg(long, env = "CA_ADDRESS", value_parser = address)]
    pub ca_address: Option<String>,
    /// DNS name in the certificate of the control plane; the host of its address if absent.
    #[arg(long, env = "XDS_SERVER_NAME")]
    pub xds_server_name: Option<String>,
    /// DNS name in the certificate of the certificate authority; the control plane's if absent.
    #[arg(long, env = "CA_SERVER_NAME")]
    pub ca_server_name: Option<String>,
    /// Roots that the certificates of both must lead to. Read anew for each connection.
    #[arg(long, env = "XDS_ROOT_CERT", default_value = "/var/run/secrets/istio/root-cert.pem")]
    pub xds_root_cert: PathBuf,
    /// Bearer token for both.
    #[arg(long, env = "TOKEN_FILE", default_value = "/var/run/secrets/tokens/istio-token")]
    pub token_file: PathBuf,
    /// Worker threads: a number, `N%` of the cores, or 0 for all; by default a share of the machine.
    #[arg(long, env = "WORKERS", default_value = "")]
    pub workers: String,
    /// How long open connections may go on after SIGTERM. By default the grace period less 5 s, or less 1 s if it is at most 10 s;
    /// 5 s if there is none.
    #[arg(long, env = "CONNECTION_TERMINATION_DEADLINE", value_parser = duration)]
    pub drain_deadline: Option<Duration>,
    /// After how many seconds the platform kills a process that it asked to end.
    #[arg(long, env = "TERMINATION_GRACE_PERIOD_SECONDS")]
    pub termination_grace_period_seconds: Option<u64>,
    /// HBONE.
    #[arg(long, env = "HBONE_ADDR", default_value = "[::]:15008")]
    pub hbone_listen: SocketAddr,
    /// Admin page, loopback only.
    #[arg(long, env = "ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    pub admin_listen: SocketAddr,
    /// Metrics.
    #[arg(long, env = "STATS_ADDR", default_value = "[::]:15020")]
    pub metrics_listen: SocketAddr,
    /// Readiness.
    #[arg(long, env = "READINESS_ADDR", default_value = "[::]:15021")]
    pub readiness_listen: SocketAddr,
    /// Lifetime asked for the certificate; the authority may give less.
    #[arg(long, env = "SECRET_TTL", default_value = "24h", value_parser = duration)]
    pub certificate_ttl: Duration,
    /// Unused connections to endpoints are closed after this long.
    #[arg(long, env = "POOL_UNUSED_RELEASE_TIMEOUT", default_value = "5m", value_parser = duration)]
    pub pool_idle: Duration,
    /// HBONE connections at once. Each idle one holds about 30 KB.
    #[arg(long, env = "MAX_CONNECTIONS", default_value_t = 50_000)]
    pub max_connections: usize,
    /// Tunnels at once, of all connections.
    #[arg(long, env = "MAX_TUNNELS", default_value_t = 200_000)]
    pub max_tunnels: usize,
    /// Requests at once, of all tunnels. Each holds about 20 KB while nothing of its bodies waits.
    #[arg(long, env = "MAX_REQUESTS", default_value_t = 100_000)]
    pub max_requests: usize,
    /// Where each setting came from, for the admin page.
    #[arg(skip)]
    pub effective: Effective,
}

/// Ambient's other names of settings that have a variable of their own.
const OTHER_NAMES: [(&str, &str); 5] = [
    ("XDS_ROOT_CA", "xds-root-cert"),
    ("ALT_XDS_HOSTNAME", "xds-server-name"),
    ("ALT_CA_HOSTNAME", "ca-server-name"),
    ("CLUSTER_DOMAIN", "cluster-domain"),
    ("RUST_LOG", "log-level"),
];

fn layers(environment: &Environment) -> Result<Vec<Layer>, culvert_runtime::config::ConfigErrors> {
    let named = OTHER_NAMES.iter().filter_map(|(name, flag)| {
        let value = environment.get(*name).filter(|value| !value.is_empty())?.clone();
        Some(Layer { origin: format!("variable {name}"), entries: vec![((*flag).to_owned(), vec![value])] })
    });
    Ok(named.collect())
}

impl ProxyConfig {
    /// Who this waypoint is.
    ///
    /// # Errors
    /// Names the part that no identity may have.
    pub fn identity(&self) -> Result<Identity, ParseIdentityError> {
        Identity::new(self.trust_domain.as_str(), self.pod_namespace.as_str(), self.service_account.as_str())
    }

    /// The service by whose name others are bound to this waypoint: its Gateway's.
    #[must_use]
    pub fn own_service(&self) -> NamespacedHostname {
        let Self { pod_namespace, cluster_domain, .. } = self;
        let name = self.gateway_service.as_ref().unwrap_or(&self.gateway);
        NamespacedHostname {
            namespace: pod_namespace.as_str().into(),
            hostname: format!("{name}.{pod_namespace}.svc.{cluster_domain}").into(),
        }
    }

    /// How long open connections may go on once the process is to end.
    #[must_use]
    pub fn drain_deadline(&self) -> Duration {
        let left = |grace: u64| if grace > 10 { grace - 5 } else { grace.saturating_sub(1).max(1) };
        let derived = || self.termination_grace_period_seconds.map(|grace| Duration::from_secs(left(grace)));
        self.drain_deadline.or_else(derived).unwrap_or(DEFAULT_DRAIN)
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
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Settings {
        #[command(flatten)]
        proxy: ProxyConfig,
    }

    /// R17.
    #[test]
    fn who_it_is_and_what_it_is_called() {
        let arguments = [
            "waypoint",
            "--pod-namespace=shop",
            "--service-account=front",
            "--gateway=front",
            "--xds-address=controller.culvert-system.svc:15012",
        ];
        let config = Settings::parse_from(arguments).proxy;
        assert_eq!(config.identity().unwrap().to_string(), "spiffe://cluster.local/ns/shop/sa/front");
        assert_eq!(config.own_service().to_string(), "shop/front.shop.svc.cluster.local");
        assert_eq!(config.xds_address.as_deref(), Some("https://controller.culvert-system.svc:15012"));
        assert_eq!(config.drain_deadline(), DEFAULT_DRAIN);
        let grace = ProxyConfig { termination_grace_period_seconds: Some(30), ..config };
        assert_eq!(grace.drain_deadline(), Duration::from_secs(25));
    }
}
