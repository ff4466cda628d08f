//! The proxy process: what it is made of, how it starts, and how it ends.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use anyhow::Context;
use culvert_identity::ca_client::{CaClient, CaError, GrpcCaClient, Signing};
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::token::TokenFile;
use culvert_model::identity::Identity;
use culvert_net::socket::Reserve;
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use culvert_runtime::workers::Workers;
use tokio::sync::Notify;

use crate::config::ProxyConfig;
use crate::observe::{Connections, Metrics, Observer};
use crate::pods::{self, Places, Pods, Shared};
use crate::state::State;
use crate::{admin, control};

/// After the drain's deadline, for what has been cut to report itself.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Runs until SIGTERM, then drains.
///
/// # Errors
/// A setting that cannot work, a port that cannot be bound, or an agent that breaks the protocol.
pub fn run(mut config: ProxyConfig, filter: FilterHandle) -> anyhow::Result<()> {
    if config.dns_upstream.is_empty() {
        // Without one there is nobody to ask, which each query then says.
        config.dns_upstream =
            crate::dns::servers(&std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default());
    }
    config.validate()?;
    let descriptors = culvert_net::socket::raise_nofile_limit().context("raising the limit of open files")?;
    let workers = Workers::start(config.worker_count()?, "worker").context("starting worker threads")?;
    for worker in workers.iter() {
        // The workers outlive it, so nobody waits for it.
        drop(worker.spawn(async {
            if let Err(error) = culvert_net::prompt_thread() {
                tracing::debug!(%error, "traffic waits for its turn as everything else does");
            }
        }));
    }
    // Control plane, agent and admin live on this thread, away from the traffic (Z03).
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(
        config,
        filter,
        workers,
        descriptors,
    ))
}

async fn serve(
    config: ProxyConfig,
    filter: FilterHandle,
    workers: Workers,
    descriptors: u64,
) -> anyhow::Result<()> {
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
        local: pods::LocalPods::default(),
        places: Places::new(config.bounds.max_connections, config.bounds.max_pod_connections, descriptors),
        reserve: Reserve::new().context("a descriptor in reserve")?,
        workers: workers.iter().cloned().collect(),
        config,
    });
    let config = &shared.config;
    let pods = Pods::new(shared.clone());

    let (admin_stop, admin_alive) = drain::channel();
    let quit = Arc::new(Notify::new());
    admin::serve(&tasks, &shared, &pods, &registry, filter, &quit, &admin_alive)?;
    let following = Workers::start(1, "control").context("starting the control thread")?;
    match (&config.local_xds, &config.xds_address) {
        (Some(file), _) => {
            let follow = control::run_local(shared.clone(), pods.clone(), file.clone());
            tasks.spawn_on(following.handle(0), "local configuration", follow);
        }
        (None, Some(address)) => {
            let channel = {
                // The channel's own tasks run where it is made.
                let _there = following.handle(0).enter();
                xds_channel(config, address)?
            };
            let pace = control::Pace::default();
            tasks.spawn("pace", pace.clone().keep());
            let follow = control::run(shared.clone(), pods.clone(), channel, pace);
            tasks.spawn_on(following.handle(0), "control plane", follow);
        }
        (None, None) => anyhow::bail!("neither xds-address nor local-xds is set"),
    }
    tasks.spawn("pending pods", pods.clone().retry_pending());
    let mut failure = follow_agent(&tasks, config, &pods);
    tracing::info!(node = %config.node, workers = shared.workers.len(), "proxy is up");

    let outcome = tokio::select! {
        asked = culvert_runtime::signal::shutdown_or(quit.notified()) => {
            asked.map(|by| tracing::info!(?by, "asked to end")).context("waiting for signals")
        }
        Ok(error) = &mut failure => Err(error.into()),
    };
    let deadline = config.drain_deadline();
    tracing::info!(?deadline, open = shared.observer.connections.len(), "draining");
    drain_pods(&pods, deadline).await;
    trigger.start();
    tasks.close();
    tasks.abort_all();
    let _ = tasks.wait(LAST_WORDS).await;
    admin_stop.now();
    following.shutdown(LAST_WORDS);
    workers.shutdown(LAST_WORDS);
    outcome
}

/// Follows the node's agent; says so if that breaks the protocol.
fn follow_agent(
    tasks: &Tasks,
    config: &ProxyConfig,
    pods: &Arc<Pods>,
) -> tokio::sync::oneshot::Receiver<pods::ZdsError> {
    let (failed, failure) = tokio::sync::oneshot::channel();
    let (socket, followed) = (config.zds_socket.clone(), pods.clone());
    tasks.spawn("node agent", async move {
        if let Err(error) = pods::run_zds(&socket, followed).await {
            let _ = failed.send(error);
        }
    });
    failure
}

/// All at once: the deadline is one for the process, not one after another.
async fn drain_pods(pods: &Arc<Pods>, deadline: Duration) {
    let all = pods.all();
    futures_util::future::join_all(all.iter().map(|pod| pod.drain(deadline))).await;
}

fn certificates(config: &ProxyConfig) -> anyhow::Result<Arc<CertificateManager>> {
    let client: Arc<dyn CaClient> = match config.ca_address.as_ref().or(config.xds_address.as_ref()) {
        Some(address) => {
            let token = config.token_file.as_ref().context("token-file is not set")?;
            let client =
                GrpcCaClient::new(ca_channel(config, address)?, TokenFile::new(token), &config.cluster_id);
            let headers = config.ca_header.iter().map(|header| (header.name.clone(), header.value.clone()));
            Arc::new(client.with_headers(headers))
        }
        None => Arc::new(NoAuthority),
    };
    let settings = ManagerConfig { lifetime: config.certificate_ttl, ..ManagerConfig::default() };
    Ok(Arc::new(CertificateManager::new(client, settings, Arc::new(SystemClock))))
}

/// With a local file and no authority: plaintext works, tunnels do not, and the reason says why.
struct NoAuthority;

impl CaClient for NoAuthority {
    fn sign<'a>(&'a self, _: &'a str, _: &'a Identity, _: Duration) -> Signing<'a> {
        Box::pin(std::future::ready(Err(CaError::Unreachable("no certificate authority is set".to_owned()))))
    }
}

fn xds_channel(config: &ProxyConfig, address: &str) -> anyhow::Result<tonic::transport::Channel> {
    channel(address, config.xds_server_name.as_ref(), config.xds_root_cert.as_ref())
}

fn ca_channel(config: &ProxyConfig, address: &str) -> anyhow::Result<tonic::transport::Channel> {
    let name = config.ca_server_name.as_ref().or(config.xds_server_name.as_ref());
    channel(address, name, config.ca_root_cert.as_ref().or(config.xds_root_cert.as_ref()))
}

fn channel(
    address: &str,
    name: Option<&String>,
    roots: Option<&PathBuf>,
) -> anyhow::Result<tonic::transport::Channel> {
    let name = name.cloned().unwrap_or_else(|| host(address).to_owned());
    let roots = roots.with_context(|| format!("no roots are set for {address}"))?;
    control_channel(ControlEndpoint::new(address, name, roots))
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
