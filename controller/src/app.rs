//! The controller as a whole: opened, run until it is told to stop.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use culvert_k8s_api::manifest::FileError;
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::{self, DrainTrigger, DrainWatcher};
use culvert_runtime::metrics::Metrics;
use culvert_runtime::readiness::{self, Readiness};
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use culvert_xds::server::{DeltaServer, Limits};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::Server;

use crate::args::{Args, SourceKind};
use crate::auth::NodeTokens;
use crate::ca::{self, Authority, CaConfig, CaMetrics, NodeAuthenticator, Serving};
use crate::index::{Index, Snapshot};
use crate::kubernetes::duties::Duties;
use crate::kubernetes::root::RootError;
use crate::kubernetes::{self, Replica};
use crate::metrics::ControllerMetrics;
use crate::provision::run::Provisioner;
use crate::serve::authenticate::{Streams, Tokens};
use crate::serve::identities::Running;
use crate::serve::views::Publisher;
use crate::serve::{admin, listener, proxies};
use crate::sources::Source;
use crate::sources::directory::Directory;
use crate::sources::kubernetes::Kubernetes;
use crate::sources::watch::Watch;

/// A client that is gone without a word is noticed after both.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long connections have to end by themselves: clients come back to the next controller, so there is no need to wait.
const STOP: Duration = Duration::from_secs(1);

/// How often the log says what is waited for, and how often readiness is brought up to date with it.
const SAY: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_secs(1);

/// How long to wait before the root is asked for again.
const RETRY: Duration = Duration::from_secs(1);

/// A running controller.
pub struct App {
    tasks: Tasks,
    drain: DrainTrigger,
    /// Where xDS and certificates are served.
    pub address: SocketAddr,
    /// Where pages are served.
    pub admin_address: SocketAddr,
    /// What is served.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
}

/// A controller whose pages are there, and nothing else: a probe is told what is waited for instead of finding the port closed.
pub struct Opening {
    tasks: Tasks,
    trigger: DrainTrigger,
    drain: DrainWatcher,
    metrics: Metrics,
    waiting: Waiting,
    writer: Unfed,
    /// For the page of clients, as soon as there may be any.
    xds: Arc<OnceLock<admin::Xds>>,
    /// Where pages are served.
    pub admin_address: SocketAddr,
}

/// What readiness waits for, in this order.
struct Waiting {
    root: readiness::Task,
    lists: readiness::Task,
    ports: readiness::Task,
}

/// A [`Writer`] that has no source yet.
struct Unfed {
    index: Index,
    published: watch::Sender<Arc<Snapshot>>,
    served: Publisher,
    metrics: ControllerMetrics,
}

/// What turns changes of the source into snapshots.
struct Writer {
    source: Source,
    index: Index,
    published: watch::Sender<Arc<Snapshot>>,
    served: Publisher,
    metrics: ControllerMetrics,
    reported: BTreeSet<FileError>,
}

impl Opening {
    /// Opens the port of pages: metrics, readiness, debug.
    ///
    /// # Errors
    /// If its address is taken.
    pub fn new(args: &Args, filter: Option<&FilterHandle>) -> anyhow::Result<Self> {
        let tasks = Tasks::new("controller");
        let (trigger, drain) = drain::channel();
        let metrics = Metrics::for_process("controller", env!("CARGO_PKG_VERSION"));
        let readiness = Readiness::new();
        let waiting = Waiting {
            root: readiness.register("root certificate"),
            lists: readiness.register("first list of everything"),
            ports: readiness.register("xDS port"),
        };
        let writer = Unfed::new(args, &metrics);
        let xds = Arc::new(OnceLock::new());
        let snapshots = writer.published.subscribe();
        let pages = admin::pages(readiness, &metrics, filter, snapshots.clone(), xds.clone());
        let pages = proxies::pages(pages, &snapshots, xds.clone(), &tasks);
        let admin_address = serve_pages(args.metrics_listen, pages, &tasks, drain.clone())?;
        Ok(Self { tasks, trigger, drain, metrics, waiting, writer, xds, admin_address })
    }

    /// Reads everything, then opens the port of xDS and certificates and starts. With Kubernetes it waits for the API server as
    /// long as that takes.
    ///
    /// # Errors
    /// If the manifests' directory, the tokens or the authority cannot be used, or an address is taken. A bad manifest is
    /// no reason: it is reported and the rest served.
    pub async fn serve(self, args: &Args) -> anyhow::Result<App> {
        let Parts { source, authority, authenticator, duties } = match args.source {
            SourceKind::Directory => from_directories(args)?,
            SourceKind::Kubernetes => from_kubernetes(args, &self).await?,
        };
        let Self { tasks, trigger, drain, metrics, waiting, writer, xds: page, admin_address } = self;
        if let Some(path) = &args.root_cert_out {
            write_atomically(path, &authority.root_pem())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        waiting.root.done();
        let mut writer = writer.fed(source);
        writer.first(&waiting.lists).await?;
        waiting.lists.done();
        let (snapshots, views) = (writer.published.subscribe(), writer.served.views());

        let serving =
            Serving::new(authority.clone(), args.server_name.clone()).context("serving certificate")?;
        let serving = Arc::new(serving);
        let limits = Limits::default();
        let xds = DeltaServer::new(
            views,
            Streams {
                authenticator: authenticator.clone(),
                snapshots: snapshots.clone(),
                compat: args.compat,
            },
            writer.metrics.clone(),
            limits,
            tasks.clone(),
            drain.clone(),
        );
        let _ = page.set(xds.clone());
        let ca = ca_service(args, authority, authenticator, snapshots.clone(), &metrics);

        let port = TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("cannot listen on {}", args.listen))?;
        let address = port.local_addr()?;
        let connections = listener::accept(port, ca::server_config(serving.clone()), &tasks, drain.clone());
        let router = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_connection_age(limits.youngest())
            .add_service(xds.service())
            .add_service(ca);
        let stopping = drain.clone();
        tasks.spawn("grpc", async move {
            let stop = async move {
                stopping.started().await;
            };
            if let Err(error) = router.serve_with_incoming_shutdown(connections, stop).await {
                tracing::error!(%error, "the gRPC server failed");
            }
        });
        if let Some(duties) = duties {
            let webhook = args.webhook_listen.map(|address| (address, serving));
            duties.start(webhook, snapshots.clone(), args.mesh(), &metrics, &tasks, drain.clone()).await?;
        }
        tasks.spawn("index", writer.run(drain));
        waiting.ports.done();
        Ok(App { tasks, drain: trigger, address, admin_address, snapshots })
    }
}

impl App {
    /// Opens the ports, reads everything and starts: [`Opening::new`] and [`Opening::serve`].
    ///
    /// # Errors
    /// Theirs.
    pub async fn start(args: &Args, filter: Option<&FilterHandle>) -> anyhow::Result<Self> {
        Opening::new(args, filter)?.serve(args).await
    }

    /// Stops accepting, ends every stream and returns soon.
    pub async fn stop(self) {
        self.tasks.close();
        self.drain.start();
        if let culvert_runtime::tasks::Waited::TimedOut { left } = self.tasks.wait(STOP).await {
            tracing::info!(left, "not waiting for connections that are still open");
        }
        self.drain.now();
        self.tasks.abort_all();
    }
}

impl Unfed {
    fn new(args: &Args, metrics: &Metrics) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let first = u64::try_from(since.as_millis()).unwrap_or_default();
        let index = Index::new(args.mesh(), first);
        let current = index.current();
        Self {
            published: watch::Sender::new(current.clone()),
            served: Publisher::new(current),
            index,
            metrics: ControllerMetrics::register(metrics),
        }
    }

    fn fed(self, source: Source) -> Writer {
        let Self { index, published, served, metrics } = self;
        Writer { source, index, published, served, metrics, reported: BTreeSet::new() }
    }
}

impl Writer {
    /// Waits until the source knows all that is, and publishes that: what is served before would take everything back.
    async fn first(&mut self, waiting: &readiness::Task) -> anyhow::Result<()> {
        let mut said = Instant::now();
        while !self.publish() {
            waiting.waits_for(self.source.missing().join(", "));
            match tokio::time::timeout(LOOK, self.source.changed()).await {
                Ok(true) | Err(_) => {}
                Ok(false) => anyhow::bail!("the source ended"),
            }
            if said.elapsed() >= SAY {
                said = Instant::now();
                tracing::info!(missing = ?self.source.missing(), "waiting for the first list");
            }
        }
        Ok(())
    }

    async fn run(mut self, drain: DrainWatcher) {
        loop {
            let more = tokio::select! {
                _ = drain.started() => return,
                more = self.source.changed() => more,
            };
            self.publish();
            if !more {
                tracing::error!("nothing tells what changes any more");
                return;
            }
        }
    }

    /// Makes the next snapshot of what was read, and shows it; false if that is not whole yet.
    fn publish(&mut self) -> bool {
        let started = Instant::now();
        let Some(world) = self.source.world() else { return false };
        let served = !self.index.current().set.types.is_empty();
        if served && world == *self.index.current().world {
            return true;
        }
        let before = self.index.current().generation;
        let snapshot = self.index.apply(world);
        self.metrics.snapshot(&snapshot, started.elapsed().as_secs_f64());
        self.report(&snapshot);
        if snapshot.generation != before {
            tracing::info!(
                generation = snapshot.generation,
                addresses = snapshot.addresses.len(),
                policies = snapshot.policies.len(),
                "changed"
            );
            self.metrics.publishes(snapshot.generation);
            self.served.publish(&snapshot);
        }
        self.published.send_replace(snapshot);
        true
    }

    /// Each error once, when it comes and when it is gone.
    fn report(&mut self, snapshot: &Snapshot) {
        let now: BTreeSet<FileError> = snapshot.world.errors.iter().cloned().collect();
        for error in now.difference(&self.reported) {
            tracing::warn!("refused, what was good before stays in force: {error}");
        }
        for error in self.reported.difference(&now) {
            tracing::info!("mended: {error}");
        }
        self.reported = now;
    }
}

/// What differs between a mesh of directories and one of Kubernetes.
struct Parts {
    source: Source,
    authority: Arc<Authority>,
    authenticator: Arc<dyn NodeAuthenticator>,
    duties: Option<Duties>,
}

fn from_directories(args: &Args) -> anyhow::Result<Parts> {
    let tokens = NodeTokens::load(needed(args.node_tokens.as_deref(), "--node-tokens")?);
    let tokens = tokens.context("node tokens")?;
    let authority = Authority::open(needed(args.ca_dir.as_deref(), "--ca-dir")?, Arc::new(SystemClock))?;
    let paths = args.paths().context("--manifests is needed without --source kubernetes")?;
    // Watched first, read then: what changes in between is read twice, not missed.
    let watch = Box::new(Watch::new(&paths, Some(tokens.path())));
    let directory = Box::new(Directory::open(paths).context("manifests")?);
    Ok(Parts {
        source: Source::Directory { directory, watch, tokens: tokens.clone() },
        authority: Arc::new(authority),
        authenticator: Arc::new(Tokens(tokens)),
        duties: None,
    })
}

async fn from_kubernetes(args: &Args, opening: &Opening) -> anyhow::Result<Parts> {
    let Opening { metrics, tasks, drain, waiting, .. } = opening;
    let client = kube::Client::try_default().await.context("the Kubernetes API server")?;
    let replica = Replica {
        namespace: args.pod_namespace.clone(),
        pod: args.pod_name.clone(),
        trusted: args.trusted_proxy.clone(),
    };
    let identity = loop {
        match kubernetes::start(client.clone(), replica.clone(), metrics, tasks, drain.clone()).await {
            Ok(identity) => break identity,
            // Nobody else can help: to end and be started again would ask the same of the same.
            Err(error @ RootError::Api { .. }) => {
                tracing::warn!(%error, "waiting for the root certificate");
                waiting.root.waits_for(error.to_string());
                tokio::time::sleep(RETRY).await;
            }
            Err(error) => return Err(error.into()),
        }
    };
    if args.untaint_nodes {
        let snapshots = opening.writer.published.subscribe();
        let (to, leading, namespace) = (client.clone(), identity.leading.clone(), args.pod_namespace.clone());
        tasks.spawn("node taints", kubernetes::taint::keep(to, namespace, snapshots, leading, drain.clone()));
    }
    let provisioner = Provisioner {
        client: client.clone(),
        namespace: args.pod_namespace.clone(),
        compat: args.compat,
        settings: args.waypoints(),
    };
    Ok(Parts {
        source: Source::Kubernetes(Box::new(Kubernetes::start(
            client.clone(),
            args.selection(),
            tasks,
            metrics,
        ))),
        authority: identity.authority,
        authenticator: identity.authenticator,
        duties: Some(Duties { client, leading: identity.leading, heard: identity.heard, provisioner }),
    })
}

fn needed<'a>(path: Option<&'a Path>, flag: &str) -> anyhow::Result<&'a Path> {
    path.with_context(|| format!("{flag} is needed"))
}

fn ca_service(
    args: &Args,
    authority: Arc<Authority>,
    authenticator: Arc<dyn NodeAuthenticator>,
    snapshots: watch::Receiver<Arc<Snapshot>>,
    metrics: &Metrics,
) -> culvert_identity::stub::istio_certificate_service_server::IstioCertificateServiceServer<
    ca::service::CaService,
> {
    let config = CaConfig {
        trust_domain: args.trust_domain.as_str().into(),
        default_lifetime: args.cert_ttl,
        max_lifetime: args.cert_ttl,
        ..CaConfig::default()
    };
    let counters = CaMetrics::default();
    metrics.register(|registry| counters.register(registry));
    ca::service(authority, authenticator, Arc::new(Running(snapshots)), config, counters)
}

fn serve_pages(
    address: SocketAddr,
    pages: culvert_runtime::admin::AdminServer,
    tasks: &Tasks,
    drain: DrainWatcher,
) -> anyhow::Result<SocketAddr> {
    let port = std::net::TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let address = port.local_addr()?;
    tasks.spawn("admin", async move {
        if let Err(error) = pages.serve(port, drain).await {
            tracing::error!(%error, "the metrics port failed");
        }
    });
    Ok(address)
}

/// Whoever reads the file sees the old content or the new, never a part.
fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent)?;
    }
    fs::write(&beside, text)?;
    fs::rename(&beside, path)
}
