//! The process: what it is made of, how it starts, and how it ends.

use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use culvert_identity::ca_client::{CaClient, CaError, GrpcCaClient, Signing};
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::token::TokenFile;
use culvert_model::identity::Identity;
use culvert_net::socket::{Keepalive, ListenOptions, listen_tcp, listen_tcp_any};
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::{self, DrainTrigger, Drained};
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use culvert_runtime::workers::Workers;
use tokio::sync::Notify;
use tonic::transport::Channel;

use crate::config::ProxyConfig;
use crate::observe::Metrics;
use crate::shared::Shared;
use crate::{accept, admin, control};

/// After the drain's deadline, for what has been cut to report itself.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Silence before a dead client's proxy is looked for; HTTP/2's own PING usually finds it first.
const KEEPALIVE: Keepalive =
    Keepalive { idle: Duration::from_secs(180), interval: Duration::from_secs(180), count: 9 };
/// Longest between two looks for connections that are not used any more.
const SWEEP: Duration = Duration::from_secs(30);

/// Runs until SIGTERM, then drains.
///
/// # Errors
/// A setting that cannot work, or a port that cannot be bound.
pub fn run(config: ProxyConfig, filter: FilterHandle) -> anyhow::Result<()> {
    culvert_net::socket::raise_nofile_limit().context("raising the limit of open files")?;
    let workers = Workers::start(config.worker_count()?, "worker").context("starting worker threads")?;
    // Control plane and admin live on this thread, away from the traffic.
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(serve(config, filter, workers))
}

async fn serve(config: ProxyConfig, filter: FilterHandle, workers: Workers) -> anyhow::Result<()> {
    let tasks = Tasks::new("waypoint");
    let registry = Registry::for_process("waypoint", env!("CARGO_PKG_VERSION"));
    let metrics = registry.register(Metrics::new);
    let (readiness, (trigger, watcher)) = (Readiness::new(), drain::channel());
    let identity = config.identity().context("the waypoint's own identity")?;
    let certificates = certificates(&config)?;
    let told = (metrics, readiness.clone(), watcher);
    let shared = Shared::new(config, identity, certificates, told, workers.iter().cloned());
    let config = &shared.config;

    let (admin_stop, admin_alive) = drain::channel();
    let quit = Arc::new(Notify::new());
    admin::serve(&tasks, &shared, &registry, filter, &quit, &admin_alive)?;
    drop(admin_alive);
    begin(&tasks, &shared)?;
    match (&config.local_xds, &config.xds_address) {
        (Some(file), _) => {
            tasks.spawn("local configuration", control::run_local(shared.clone(), file.clone()));
        }
        (None, Some(address)) => {
            let channel = channel(address, config.xds_server_name.as_ref(), &config.xds_root_cert)?;
            tasks.spawn("control plane", control::run(shared.clone(), channel));
        }
        (None, None) => anyhow::bail!("neither xds-address nor local-xds is set"),
    }
    tracing::info!(gateway = %shared.own, identity = %shared.identity, workers = shared.workers().len(), "waypoint is up");
    let outcome = culvert_runtime::signal::shutdown_or(quit.notified())
        .await
        .map(|by| tracing::info!(?by, "asked to end"))
        .context("waiting for signals");
    end(&shared, tasks, trigger).await;
    admin_stop.now();
    workers.shutdown(LAST_WORDS);
    outcome
}

/// Starts what serves traffic: the listener, the certificate, and the looks for what is not used any more.
fn begin(tasks: &Tasks, shared: &Arc<Shared>) -> anyhow::Result<()> {
    let options = ListenOptions { accepted: Some(KEEPALIVE), ..ListenOptions::default() };
    let address = shared.config.hbone_listen;
    let listener = match address.ip() == Ipv6Addr::UNSPECIFIED {
        // IPv4 alone where there is nothing else.
        true => listen_tcp_any(address.port(), &options),
        false => listen_tcp(address, &options),
    };
    let listener = listener.with_context(|| format!("HBONE: listening on {address}"))?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    tasks.spawn("hbone", accept::listen(shared.clone(), listener));

    let waiting = shared.readiness.register("certificate");
    let mut certificate = shared.certificates.subscribe(&shared.identity)?;
    tasks.spawn("certificate", async move {
        let _ = certificate.wait_for(Option::is_some).await;
        waiting.done();
    });
    for worker in shared.workers().iter().cloned() {
        let period = (worker.clients.idle() / 2).clamp(Duration::from_secs(1), SWEEP);
        let clients = worker.clients.clone();
        worker.spawn("sweep", async move {
            loop {
                tokio::time::sleep(period).await;
                clients.sweep();
            }
        });
    }
    Ok(())
}

/// Lets what is open finish until the deadline, and then ends it.
async fn end(shared: &Arc<Shared>, tasks: Tasks, trigger: DrainTrigger) {
    let deadline = shared.config.drain_deadline();
    tracing::info!(?deadline, "draining");
    trigger.start();
    // The process itself holds a watcher, so its tasks tell when they are done.
    let open = async {
        while shared.workers().iter().any(|worker| worker.is_serving()) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    if tokio::time::timeout(deadline, open).await.is_err() {
        let left: usize = shared.workers().iter().map(|worker| worker.tasks.len()).sum();
        tracing::warn!(left, outcome = ?Drained::Forced { left }, "the deadline of the drain passed");
    }
    trigger.now();
    tasks.abort_all();
    let _ = tasks.wait(LAST_WORDS).await;
    for worker in shared.workers() {
        worker.tasks.abort_all();
        let _ = worker.tasks.wait(LAST_WORDS).await;
    }
}

fn certificates(config: &ProxyConfig) -> anyhow::Result<Arc<CertificateManager>> {
    let client: Arc<dyn CaClient> = match config.ca_address.as_ref().or(config.xds_address.as_ref()) {
        Some(address) => {
            let name = config.ca_server_name.as_ref().or(config.xds_server_name.as_ref());
            let channel = channel(address, name, &config.xds_root_cert)?;
            Arc::new(GrpcCaClient::new(channel, TokenFile::new(&config.token_file), &config.cluster_id))
        }
        None => Arc::new(NoAuthority),
    };
    let settings = ManagerConfig { lifetime: config.certificate_ttl, ..ManagerConfig::default() };
    Ok(Arc::new(CertificateManager::new(client, settings, Arc::new(SystemClock))))
}

/// With a local file and no authority nothing can be served, and the reason says why.
struct NoAuthority;

impl CaClient for NoAuthority {
    fn sign<'a>(&'a self, _: &'a str, _: &'a Identity, _: Duration) -> Signing<'a> {
        Box::pin(std::future::ready(Err(CaError::Unreachable("no certificate authority is set".to_owned()))))
    }
}

fn channel(address: &str, name: Option<&String>, roots: &Path) -> anyhow::Result<Channel> {
    let name = name.cloned().unwrap_or_else(|| host(address).to_owned());
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
