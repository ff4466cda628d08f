//! The proxy process: what it is made of, how it starts, and how it ends.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::Context;
use culvert_identity::ca_client::GrpcCaClient;
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::token::TokenFile;
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use culvert_runtime::workers::Workers;

use crate::config::ProxyConfig;
use crate::observe::{Connections, Metrics, Observer};
use crate::pods::{self, Pods, Shared};
use crate::state::State;
use crate::{admin, control};

/// After the drain's deadline, for what has been cut to report itself.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs until SIGTERM, then drains.
///
/// # Errors
/// A setting that cannot work, a port that cannot be bound, or an agent that breaks the protocol.
pub fn run(config: ProxyConfig, filter: FilterHandle) -> anyhow::Result<()> {
    culvert_net::socket::raise_nofile_limit().context("raising the limit of open files")?;
    let workers = Workers::start(config.worker_count()?, "worker").context("starting worker threads")?;
    // Control plane, agent and admin live on this thread, away from the traffic (Z03).
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(config, filter, workers))
}

async fn serve(config: ProxyConfig, filter: FilterHandle, workers: Workers) -> anyhow::Result<()> {
    let tasks = Tasks::new("proxy");
    let registry = Registry::for_process("ztunnel", env!("CARGO_PKG_VERSION"));
    let metrics = registry.register(Metrics::new);
    let readiness = Readiness::new();
    let (trigger, watcher) = drain::channel();
    let shared = Arc::new(Shared {
        certificates: certificates(&config)?,
        names: crate::dns::Names::default(),
        state: Arc::new(State::default()),
        endpoints: Arc::default(),
        observer: Observer { metrics, connections: Arc::new(Connections::default()) },
        readiness: readiness.clone(),
        drain: watcher,
        next_worker: AtomicUsize::new(0),
        workers: workers.iter().cloned().collect(),
        config,
    });
    let config = &shared.config;
    let pods = Pods::new(shared.clone());

    let (admin_stop, admin_alive) = drain::channel();
    admin::serve(&tasks, &shared, &pods, &registry, filter, &admin_alive)?;
    tasks.spawn(
        "control plane",
        control::run(shared.clone(), pods.clone(), channel(config, &config.xds_address)?),
    );
    tasks.spawn("pending pods", pods.clone().retry_pending());
    let (failed, mut failure) = tokio::sync::oneshot::channel();
    let (socket, followed) = (config.zds_socket.clone(), pods.clone());
    tasks.spawn("node agent", async move {
        if let Err(error) = pods::run_zds(&socket, followed).await {
            let _ = failed.send(error);
        }
    });
    tracing::info!(node = %config.node, workers = shared.workers.len(), "proxy is up");

    let outcome = tokio::select! {
        signal = culvert_runtime::signal::shutdown() => signal.map(drop).context("waiting for signals"),
        Ok(error) = &mut failure => Err(error.into()),
    };
    tracing::info!(deadline = ?config.drain_deadline, open = shared.observer.connections.len(), "draining");
    drain_pods(&pods, config.drain_deadline).await;
    trigger.start();
    tasks.close();
    tasks.abort_all();
    let _ = tasks.wait(LAST_WORDS).await;
    admin_stop.now();
    workers.shutdown(LAST_WORDS);
    outcome
}

/// All at once: the deadline is one for the process, not one after another.
async fn drain_pods(pods: &Arc<Pods>, deadline: Duration) {
    let all = pods.all();
    futures_util::future::join_all(all.iter().map(|pod| pod.drain(deadline))).await;
}

fn certificates(config: &ProxyConfig) -> anyhow::Result<Arc<CertificateManager>> {
    let address = config.ca_address.as_deref().unwrap_or(&config.xds_address);
    let channel = channel(config, address)?;
    let client = GrpcCaClient::new(channel, TokenFile::new(&config.token_file), &config.cluster_id);
    let settings = ManagerConfig { lifetime: config.certificate_ttl, ..ManagerConfig::default() };
    Ok(Arc::new(CertificateManager::new(Arc::new(client), settings, Arc::new(SystemClock))))
}

fn channel(config: &ProxyConfig, address: &str) -> anyhow::Result<tonic::transport::Channel> {
    let name = config.xds_server_name.clone().unwrap_or_else(|| host(address).to_owned());
    control_channel(ControlEndpoint::new(address, name, &config.xds_root_cert))
        .with_context(|| format!("control plane address {address:?}"))
}

/// The host of `https://host:port`.
fn host(address: &str) -> &str {
    let rest = address.split_once("://").map_or(address, |(_, rest)| rest);
    rest.rsplit_once(':').map_or(rest, |(host, _)| host)
}

/// Binds one of the process's own ports.
pub(crate) fn bind(what: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).with_context(|| format!("{what}: listening on {address}"))
}
