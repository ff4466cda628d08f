//! A control plane over the real xDS server that serves the made-up mesh. It runs where the controller runs, as a process of
//! its own: standard input says when to change things, standard output tells what happened, a JSON object a line.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use culvert_k8s_api::status::{Phase, PodStatus};
use culvert_proto::discovery::Node;
use culvert_proto::workload as proto;
use culvert_runtime::drain;
use culvert_runtime::tasks::Tasks;
use culvert_xds::resources::ResourceSet;
use culvert_xds::server::{Authenticator, DeltaServer, Limits, Peer, Unobserved};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::mesh::Mesh;

/// How often acknowledgements are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Changes wait this long to go together, as Istio's control plane has it (D12).
const DEBOUNCE: Duration = Duration::from_millis(100);

/// Arguments of `scale-control`.
#[derive(Debug, clap::Args)]
pub struct ControlArgs {
    /// The `STATE` directory of the mesh.
    #[arg(long)]
    state: PathBuf,
    /// Where the root of the serving certificate is written.
    #[arg(long)]
    root_cert_out: PathBuf,
    /// The DNS name that proxies expect.
    #[arg(long)]
    server_name: String,
    /// Where to listen.
    #[arg(long)]
    listen: std::net::SocketAddr,
    /// Pods to make up.
    #[arg(long)]
    workloads: usize,
    /// Services to make up.
    #[arg(long)]
    services: usize,
    /// Changed pods a second while there is churn.
    #[arg(long)]
    rate: usize,
}

type Xds = DeltaServer<watch::Receiver<Arc<ResourceSet>>>;

/// Serves until standard input ends.
pub async fn run(args: &ControlArgs) -> anyhow::Result<()> {
    // It stands for one that runs on another machine: what it takes here must not be taken from the traffic.
    let background = culvert_net::Background::of_this_thread()?;
    std::mem::forget(background.enter(|| {}));
    let mut mesh = Mesh::new(args.workloads, args.services, real_pods(&args.state)?);
    let sets = watch::Sender::new(Arc::new(mesh.set()));
    let (tasks, (_trigger, drain)) = (Tasks::new("control"), drain::channel());
    let xds = DeltaServer::new(sets.subscribe(), Anyone, Unobserved, Limits::default(), tasks.clone(), drain);
    let (config, root) = certificates(&args.server_name)?;
    std::fs::write(&args.root_cert_out, root)?;
    let listener = TcpListener::bind(args.listen).await?;
    let connections = accept(listener, TlsAcceptor::from(Arc::new(config)), &tasks);
    let router = Server::builder().add_service(xds.service());
    tasks.spawn("grpc", async move {
        if let Err(error) = router.serve_with_incoming(connections).await {
            eprintln!("culvert-bench scale-control: {error}");
        }
    });
    println!("{}", json!({ "event": "serving" }));
    drive(args, &mut mesh, &sets, &xds).await
}

/// Follows standard input (`churn`, `still`), publishes changes, and tells who acknowledged what and when.
async fn drive(
    args: &ControlArgs,
    mesh: &mut Mesh,
    sets: &watch::Sender<Arc<ResourceSet>>,
    xds: &Xds,
) -> anyhow::Result<()> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut look = tokio::time::interval(LOOK);
    let mut push = tokio::time::interval(DEBOUNCE);
    push.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut churning = false;
    let mut loaded = BTreeSet::new();
    let mut published: BTreeMap<u64, Instant> = BTreeMap::new();
    let mut delays: Vec<Duration> = Vec::new();
    let mut pushes = 0_u64;
    loop {
        tokio::select! {
            line = lines.next_line() => match line?.as_deref() {
                Some("churn") => (churning, pushes) = (true, 0),
                Some("still") => {
                    churning = false;
                    delays.sort_unstable();
                    let at = |share: f64| delays.get((delays.len() as f64 * share) as usize).map_or(0.0, Duration::as_secs_f64);
                    println!("{}", json!({
                        "event": "churned", "pushes": pushes, "acknowledged": delays.len(),
                        "p50_ms": at(0.5) * 1e3, "p99_ms": at(0.99) * 1e3, "max_ms": at(1.0_f64.next_down()) * 1e3,
                    }));
                    delays.clear();
                }
                Some(_) => {}
                None => return Ok(()),
            },
            _ = push.tick(), if churning => {
                mesh.change(args.rate * DEBOUNCE.as_millis() as usize / 1000);
                let set = Arc::new(mesh.set());
                published.insert(set.generation, Instant::now());
                sets.send_replace(set);
                pushes += 1;
            }
            _ = look.tick() => {
                let newest = sets.borrow().generation;
                let clients = xds.clients();
                for client in &clients {
                    let acked = acknowledged(&client.types);
                    if acked.is_some() && loaded.insert((client.peer.name.clone(), client.connected)) {
                        let took = SystemTime::now().duration_since(client.connected).unwrap_or_default();
                        println!("{}", json!({ "event": "loaded", "node": client.peer.name, "seconds": took.as_secs_f64() }));
                    }
                }
                // Sets published while a proxy was busy are skipped, so the oldest that all have counts for those before it.
                let all = clients.iter().map(|client| acknowledged(&client.types)).min().flatten();
                if let Some(all) = all.filter(|_| !published.is_empty()) {
                    let later = published.split_off(&(all.min(newest) + 1));
                    delays.extend(std::mem::replace(&mut published, later).into_values().map(|at| at.elapsed()));
                }
            }
        }
    }
}

/// The generation that every type shows; nothing before all of them do.
fn acknowledged(types: &BTreeMap<String, culvert_xds::stream::TypeStatus>) -> Option<u64> {
    if types.len() < 2 {
        return None;
    }
    types.values().map(|it| it.acked_generation).min().flatten()
}

/// Whoever asks may see this: it is made up.
struct Anyone;

impl Authenticator for Anyone {
    fn authenticate(&self, _metadata: &MetadataMap, node: Option<&Node>) -> Result<Peer, Status> {
        let fields = node.and_then(|node| node.metadata.as_ref()).map(|metadata| &metadata.fields);
        let name = fields.and_then(|fields| fields.get("NODE_NAME")).and_then(|value| value.kind.as_ref());
        let name = match name {
            Some(prost_types::value::Kind::StringValue(name)) => name.clone(),
            _ => String::new(),
        };
        Ok(Peer { name })
    }
}

/// The pods that run, as the controller would tell of them: enrolled, so that their traffic goes through the proxies.
fn real_pods(state: &Path) -> anyhow::Result<Vec<(String, proto::Workload)>> {
    let dir = state.join("status/pods");
    let mut pods = Vec::new();
    for file in std::fs::read_dir(&dir).with_context(|| format!("{}", dir.display()))? {
        let status: PodStatus = serde_json::from_slice(&std::fs::read(file?.path())?)?;
        if status.phase != Phase::Running {
            continue;
        }
        let uid = format!("Kubernetes//Pod/{}/{}", status.namespace, status.name);
        let meshed = status.namespace == super::MESH_NAMESPACE;
        let tunnel = if meshed { proto::TunnelProtocol::Hbone } else { proto::TunnelProtocol::None };
        let addresses = status.pod_ips.iter().map(|ip| match ip {
            std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
            std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
        });
        let workload = proto::Workload {
            uid: uid.clone(),
            name: status.name.clone(),
            namespace: status.namespace.clone(),
            addresses: addresses.collect(),
            tunnel_protocol: tunnel.into(),
            trust_domain: "cluster.local".to_owned(),
            service_account: "default".to_owned(),
            node: status.node_name.clone(),
            cluster_id: "Kubernetes".to_owned(),
            ..proto::Workload::default()
        };
        pods.push((uid, workload));
    }
    Ok(pods)
}

/// A root, and a certificate of it for this name.
fn certificates(name: &str) -> anyhow::Result<(rustls::ServerConfig, String)> {
    let root_key = rcgen::KeyPair::generate()?;
    let mut root = rcgen::CertificateParams::new(Vec::new())?;
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.distinguished_name.push(rcgen::DnType::OrganizationName, "culvert-bench");
    let root_cert = root.self_signed(&root_key)?;
    let issuer = rcgen::Issuer::from_params(&root, &root_key);
    let key = rcgen::KeyPair::generate()?;
    let mut leaf = rcgen::CertificateParams::new(vec![name.to_owned()])?;
    leaf.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let leaf = leaf.signed_by(&key, &issuer)?;
    let private = rustls_pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
    let mut config = rustls::ServerConfig::builder_with_provider(culvert_identity::tls::provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], private)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok((config, root_cert.pem()))
}

fn accept(listener: TcpListener, tls: TlsAcceptor, tasks: &Tasks) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(4);
    tasks.spawn("accept", async move {
        while let Ok((stream, _)) = listener.accept().await {
            let _ = stream.set_nodelay(true);
            // One proxy after another: there are two.
            if let Ok(stream) = tls.accept(stream).await
                && ready.send(Ok(Connection(stream))).await.is_err()
            {
                return;
            }
        }
    });
    ReceiverStream::new(connections)
}

/// A TLS stream, as tonic wants it.
struct Connection(TlsStream<TcpStream>);

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
