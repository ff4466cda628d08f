//! A pod as it runs: real sockets in a namespace of its own, a fake authority, and no control plane. As root only.

mod bounds;
mod socks;

use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use clap::Parser;
use culvert_hbone::client::{Client, ClientHandle, TunnelRequest};
use culvert_hbone::config::ClientConfig;
use culvert_hbone::error::ConnectError;
use culvert_hbone::io::TunnelIo;
use culvert_identity::ca_client::CaClient;
use culvert_identity::manager::{CertificateManager, ManagerConfig};
use culvert_identity::tls::{client_config, unnamed};
use culvert_model::balance::Observed;
use culvert_model::identity::Identity;
use culvert_model::service::Service;
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::{ApplicationTunnel, TunnelProtocol, Workload};
use culvert_net::netns::NetNs;
use culvert_net::redirect::{RedirectConfig, install};
use culvert_net::socket::{DialOptions, Reserve, connect};
use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::{self, DrainTrigger};
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio_rustls::TlsConnector;

use crate::authority::Authority;
use crate::config::{ProxyConfig, SOURCE_TIMEOUT};
use crate::dns::fake::{fake_in, many};
use crate::observe::{Connections, Metrics, Observer};
use crate::pods::{Places, Pod, PodInfo, Pods, Shared};
use crate::state::State;
use crate::world::{by_name, identity, serve, service, snapshot, workload};

mod pool_tests;

/// Long enough for a loaded machine; nothing waits for it to pass.
pub(crate) const SOON: Duration = Duration::from_secs(30);
const LOCAL: &str = "127.0.0.1";

#[derive(Parser)]
struct Settings {
    #[command(flatten)]
    proxy: ProxyConfig,
}

/// One pod, `shop/cart`, served.
struct World {
    authority: Arc<Authority>,
    netns: Arc<NetNs>,
    pod: Arc<Pod>,
    tasks: Tasks,
    _drain: DrainTrigger,
}

/// A namespace with its loopback interface up, and a way out that leads nowhere.
pub(crate) fn namespace() -> Arc<NetNs> {
    let netns = NetNs::create().expect("these tests run as root");
    ip(&netns, "link set lo up");
    ip(&netns, "link add way type veth peer name out");
    ip(&netns, "address add 100.64.1.9/24 dev way");
    ip(&netns, "link set way up");
    ip(&netns, "link set out up");
    ip(&netns, "route add default via 100.64.1.1");
    Arc::new(netns)
}

/// What pods share, and the process's drain.
pub(crate) fn shared(authority: &Arc<Authority>, dns: Option<SocketAddr>) -> (Arc<Shared>, DrainTrigger) {
    shared_by(authority.clone(), dns, &[])
}

/// The same, by any authority and with more arguments.
pub(crate) fn shared_by(
    authority: Arc<dyn CaClient>,
    dns: Option<SocketAddr>,
    more: &[String],
) -> (Arc<Shared>, DrainTrigger) {
    let mut arguments = vec!["ztunnel".to_owned()];
    for (name, value) in [("node", "n"), ("xds-address", "-"), ("xds-root-cert", "-"), ("token-file", "-")] {
        arguments.push(format!("--{name}={value}"));
    }
    arguments.extend(dns.map(|server| format!("--dns-upstream={server}")));
    arguments.extend_from_slice(more);
    let (trigger, watcher) = drain::channel();
    let config = Settings::parse_from(arguments).proxy;
    let places = Places::new(config.bounds.max_connections, config.bounds.max_pod_connections, u64::MAX);
    let shared = Arc::new(Shared {
        config,
        state: Arc::new(State::default()),
        certificates: Arc::new(CertificateManager::new(
            authority,
            ManagerConfig::default(),
            Arc::new(SystemClock),
        )),
        names: Default::default(),
        endpoints: Arc::default(),
        observer: Observer {
            metrics: Metrics::new(&mut Registry::default()),
            connections: Arc::new(Connections::default()),
        },
        workers: vec![Handle::current()],
        readiness: Readiness::new(),
        drain: watcher,
        next_worker: AtomicUsize::new(0),
        local: Default::default(),
        places,
        reserve: Reserve::new().unwrap(),
    });
    (shared, trigger)
}

/// Another namespace, 100.64.1.1, at the other end of the pod's way out.
pub(crate) fn neighbour(pod: &NetNs) -> NetNs {
    let netns = NetNs::create().unwrap();
    let (process, descriptor) = (std::process::id(), netns.as_fd().as_raw_fd());
    ip(pod, &format!("link set out netns /proc/{process}/fd/{descriptor}"));
    ip(&netns, "link set lo up");
    ip(&netns, "address add 100.64.1.1/24 dev out");
    ip(&netns, "link set out up");
    netns
}

pub(crate) fn ip(netns: &NetNs, command: &str) {
    let ran = netns.run(|| Command::new("ip").args(command.split(' ')).status());
    assert!(ran.unwrap().success(), "ip {command}");
}

/// What a world is made of.
struct Setup {
    authority: Arc<Authority>,
    netns: Arc<NetNs>,
    /// The pod's name and account.
    name: &'static str,
    dns: Option<SocketAddr>,
}

impl World {
    /// The pod `shop/cart`.
    fn new(
        workloads: impl IntoIterator<Item = Workload>,
        services: impl IntoIterator<Item = Service>,
    ) -> Self {
        let setup = Setup { authority: Authority::new(), netns: namespace(), name: "cart", dns: None };
        Self::start(setup, snapshot(workloads, services))
    }

    fn start(setup: Setup, known: Arc<Snapshot>) -> Self {
        let Setup { authority, netns, name, dns } = setup;
        let (shared, trigger) = shared(&authority, dns);
        shared.state.commit(known);
        let info = PodInfo {
            name: name.into(),
            namespace: "shop".into(),
            service_account: name.into(),
            native_tunnel: false,
        };
        let pod = Pod::start(shared, info, netns.clone()).unwrap();
        Self { authority, netns, pod, tasks: Tasks::new("test"), _drain: trigger }
    }

    /// A listener of the application.
    fn listen(&self, address: &str) -> TcpListener {
        let listener = self.netns.run(|| std::net::TcpListener::bind(address)).unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    async fn dial(&self, from: Option<&str>, to: &str) -> TcpStream {
        let source = from.map(|from| SocketAddr::new(from.parse().unwrap(), 0));
        let options = DialOptions { source, ..DialOptions::default() };
        connect(&self.netns, to.parse().unwrap(), &options, SOON).await.unwrap()
    }

    /// An HBONE connection of `client` to the pod, from `from`; and the client's address.
    async fn tunnel(&self, client: &Identity, from: &str) -> (ClientHandle, SocketAddr) {
        let stream = self.dial(Some(from), "127.0.0.1:15008").await;
        let address = stream.local_addr().unwrap();
        let tls = client_config(&self.authority.certificate(client), &[identity("shop", "cart")]);
        let tls = TlsConnector::from(tls).connect(unnamed(), stream).await.unwrap();
        let (handle, driver) = Client::handshake(tls, &ClientConfig::default()).await.unwrap();
        self.tasks.spawn("client", async move {
            let _ = driver.await;
        });
        (handle, address)
    }

    /// The status that a CONNECT of `client` gets.
    async fn status(&self, client: &Identity, authority: &str) -> u16 {
        let (handle, _) = self.tunnel(client, LOCAL).await;
        match open(&handle, authority).await {
            Ok(_) => 200,
            Err(ConnectError::Refused { status, .. }) => status.as_u16(),
            Err(other) => panic!("{other}"),
        }
    }

    async fn end(self) {
        self.tasks.abort_all();
        self.pod.stop().await;
    }
}

async fn open(handle: &ClientHandle, authority: &str) -> Result<TunnelIo, ConnectError> {
    let request = TunnelRequest { authority: authority.to_owned(), ..TunnelRequest::default() };
    handle.connect(request).await.map(|(stream, _)| TunnelIo::new(stream))
}

pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, what).await.expect("it happens soon")
}

fn cart() -> Workload {
    workload("shop", "cart", &["100.64.1.9"])
}

fn client() -> Identity {
    identity("shop", "client")
}

/// Z51: the application sees the client's own address. Z27: its half-close, and the answer after it.
#[tokio::test]
async fn the_client_is_seen_as_itself() {
    let world = World::new([cart()], []);
    let app = world.listen("127.0.0.1:8080");
    let (handle, _) = world.tunnel(&client(), "127.0.0.2").await;
    let (stream, accepted) =
        soon(async { tokio::join!(open(&handle, "127.0.0.1:8080"), app.accept()) }).await;
    let (mut stream, (mut accepted, from)) = (stream.unwrap(), accepted.unwrap());
    assert_eq!(from.ip().to_string(), "127.0.0.2");
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut heard = String::new();
    soon(accepted.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "question");
    accepted.write_all(b"answer").await.unwrap();
    drop(accepted);
    let mut heard = String::new();
    soon(stream.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "answer");
    world.end().await;
}

/// Z18: the answer that opens a stream says who answers; one that refuses says nothing.
#[tokio::test]
async fn who_answers() {
    let world = World::new([cart()], []);
    let _app = world.listen("127.0.0.1:8080");
    let (handle, _) = world.tunnel(&client(), LOCAL).await;
    let request = |authority: &str| TunnelRequest { authority: authority.into(), ..TunnelRequest::default() };
    let (_stream, headers) = soon(handle.connect(request("127.0.0.1:8080"))).await.unwrap();
    let baggage = headers["baggage"].to_str().unwrap();
    assert!(baggage.contains("k8s.pod.name=cart"), "{baggage}");
    for refused in ["127.0.0.1:8081", "100.64.9.9:8080"] {
        match soon(handle.connect(request(refused))).await {
            Err(ConnectError::Refused { headers, .. }) => assert!(headers.get("baggage").is_none()),
            other => panic!("{other:?}"),
        }
    }
    world.end().await;
}

/// Z30: a pod that the control plane does not know yet is waited for, and nothing leaves it in plaintext meanwhile.
#[tokio::test(start_paused = true)]
async fn a_pod_that_is_not_known_yet_is_waited_for() {
    let state = State::default();
    let uid = cart().uid;
    let begun = tokio::time::Instant::now();
    assert!(state.workload(&uid, SOURCE_TIMEOUT).await.is_none());
    assert_eq!(begun.elapsed(), Duration::from_secs(5));
    let told = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        state.commit(snapshot([workload("shop", "other", &[])], []));
        tokio::time::sleep(Duration::from_secs(1)).await;
        state.commit(snapshot([cart()], []));
    };
    let begun = tokio::time::Instant::now();
    let (found, ()) = tokio::join!(state.workload(&uid, SOURCE_TIMEOUT), told);
    assert_eq!(found.map(|found| found.uid.clone()), Some(uid));
    assert_eq!(begun.elapsed(), Duration::from_secs(2), "as soon as it is known");
}

/// Z20, Z47, Z49: what a request is answered that does not become a stream.
#[tokio::test]
async fn statuses() {
    let world = World::new([cart()], []);
    for (authority, status) in [
        ("127.0.0.1:8081", 503),
        ("100.64.9.9:8080", 400),
        ("127.0.0.1:15008", 400),
        ("nobody.shop.svc.cluster.local:80", 400),
    ] {
        assert_eq!(soon(world.status(&client(), authority)).await, status, "{authority}");
    }
    world.end().await;
}

/// A bound workload accepts only its waypoint (design.md): anybody else is answered 401.
#[tokio::test]
async fn a_bound_workload_accepts_only_its_waypoint() {
    const WAYPOINT: &str = "shop/waypoint.shop.svc.cluster.local";
    let bound = Workload { waypoint: Some(by_name(WAYPOINT)), ..cart() };
    let waypoint = serve(workload("shop", "waypoint", &["100.64.1.50"]), WAYPOINT, &[(15008, 15008)]);
    let world = World::new([bound, waypoint], [service(WAYPOINT, &["198.18.128.50"])]);
    let _app = world.listen("127.0.0.1:8080");
    assert_eq!(soon(world.status(&client(), "127.0.0.1:8080")).await, 401);
    assert_eq!(soon(world.status(&identity("shop", "waypoint"), "127.0.0.1:8080")).await, 200);
    world.end().await;
}

/// Z55, Z56: plaintext from outside is delivered from its own address, unless the pod is bound to a waypoint: then it is
/// reset, and nothing of it reaches the application.
#[tokio::test]
async fn plaintext_from_outside() {
    for (waypoint, served) in [(None, true), (Some(by_name("shop/waypoint.shop.svc.cluster.local")), false)] {
        let world = World::new([Workload { waypoint, ..cart() }], []);
        install(&world.netns, &RedirectConfig::default()).unwrap();
        let outside = neighbour(&world.netns);
        let app = world.listen("100.64.1.9:8080");
        let to = "100.64.1.9:8080".parse().unwrap();
        let mut near = soon(connect(&outside, to, &DialOptions::default(), SOON)).await.unwrap();
        if served {
            let (mut far, from) = soon(app.accept()).await.unwrap();
            assert_eq!(from.ip().to_string(), "100.64.1.1");
            far.write_all(b"answer").await.unwrap();
            let mut heard = [0; 6];
            soon(near.read_exact(&mut heard)).await.unwrap();
            assert_eq!(&heard, b"answer");
        } else {
            let cut = soon(near.read_u8()).await.unwrap_err();
            assert_eq!(cut.kind(), std::io::ErrorKind::ConnectionReset);
            assert!(tokio::time::timeout(Duration::ZERO, app.accept()).await.is_err());
        }
        world.end().await;
    }
}

/// Z53: the gateway behind the proxy is told who came and for what, before the first byte, from the pod's own address.
#[tokio::test]
async fn proxy_protocol_comes_first() {
    let tunnel = ApplicationTunnel { proxy_protocol: true, port: 15088 };
    let world = World::new([Workload { application_tunnel: Some(tunnel), ..cart() }], []);
    let app = world.listen("127.0.0.1:15088");
    let (handle, client_address) = world.tunnel(&client(), "127.0.0.2").await;
    let (stream, accepted) =
        soon(async { tokio::join!(open(&handle, "198.18.128.9:80"), app.accept()) }).await;
    let (mut stream, (mut accepted, from)) = (stream.unwrap(), accepted.unwrap());
    assert_eq!(from.ip().to_string(), LOCAL, "not imitated");
    stream.write_all(b"question").await.unwrap();
    let mut expected =
        crate::inbound::proxy_header(client_address, "198.18.128.9:80".parse().unwrap(), &client());
    expected.extend_from_slice(b"question");
    let mut heard = vec![0; expected.len()];
    soon(accepted.read_exact(&mut heard)).await.unwrap();
    assert_eq!(heard, expected);
    world.end().await;
}

/// A client that gives up while the application is dialled stops the dial: its task ends long before the dial would.
#[tokio::test]
async fn a_client_that_gives_up_stops_the_dial() {
    let world = World::new([cart()], []);
    // With a full queue and nobody who accepts, a SYN is dropped: the dial waits.
    let listener = world.netns.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&"127.0.0.1:8080".parse::<SocketAddr>().unwrap().into())?;
        socket.listen(0)?;
        Ok(socket)
    });
    let _first = world.dial(None, "127.0.0.1:8080").await;
    let (handle, _) = world.tunnel(&client(), LOCAL).await;
    let opening = {
        let handle = handle.clone();
        world.tasks.spawn("opening", async move {
            let _ = open(&handle, "127.0.0.1:8080").await;
        })
    };
    let streams = || world.pod.tasks.names().iter().filter(|name| name.contains("inbound stream")).count();
    let until = |count| {
        let streams = &streams;
        async move {
            while streams() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    };
    soon(until(1)).await;
    opening.abort();
    let left = tokio::time::timeout(Duration::from_secs(5), until(0)).await;
    assert!(left.is_ok(), "the dial went on without its client");
    drop(listener);
    world.end().await;
}

/// Z42, Z43: a captured connection to a service whose endpoint is a name goes where the pod's DNS says.
#[tokio::test]
async fn a_name_is_looked_up_for_a_connection() {
    const DB: &str = "shop/db.example";
    let netns = namespace();
    let tasks = Tasks::new("dns");
    let dns = fake_in(&netns, &tasks, one);
    let endpoint = Workload {
        hostname: "db.example".into(),
        tunnel_protocol: TunnelProtocol::None,
        ..serve(workload("shop", "db", &[]), DB, &[(5432, 5433)])
    };
    let setup = Setup { authority: Authority::new(), netns, name: "cart", dns: Some(dns.address) };
    let world = World::start(setup, snapshot([cart(), endpoint], [service(DB, &["198.18.128.9"])]));
    install(&world.netns, &RedirectConfig::default()).unwrap();
    let app = world.listen("127.0.0.9:5433");
    for _ in 0..2 {
        let (mut near, far) =
            soon(async { tokio::join!(world.dial(None, "198.18.128.9:5432"), app.accept()) }).await;
        let (mut far, _) = far.unwrap();
        near.write_all(b"question").await.unwrap();
        let mut heard = [0; 8];
        soon(far.read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, b"question");
    }
    assert_eq!(dns.asked.load(std::sync::atomic::Ordering::Relaxed), 1, "the second connection knew");
    assert_eq!(world.pod.shared.names.len(), 1);
    tasks.abort_all();
    world.end().await;
}

/// Z21, Z34, Z41, Z51, Z92: from one pod's application to another's, through both proxies; Z45 differs: the endpoint that cannot
/// be reached is passed over for the one that can.
#[tokio::test]
async fn from_pod_to_pod() {
    const WEB: &str = "shop/web.shop.svc.cluster.local";
    let (authority, netns) = (Authority::new(), namespace());
    let other = Arc::new(neighbour(&netns));
    ip(&netns, "route add unreachable 100.64.1.77/32");
    // Nearly always chosen first.
    let gone = serve(workload("shop", "gone", &["100.64.1.77"]), WEB, &[(80, 8080)]);
    let gone = Workload { capacity: 1_000_000, ..gone };
    let web = serve(workload("shop", "web", &["100.64.1.1"]), WEB, &[(80, 8080)]);
    let known = snapshot([cart(), gone, web], [service(WEB, &["198.18.128.9"])]);
    let near = Setup { authority: authority.clone(), netns, name: "cart", dns: None };
    let near = World::start(near, known.clone());
    let far = World::start(Setup { authority, netns: other, name: "web", dns: None }, known.clone());
    for world in [&near, &far] {
        install(&world.netns, &RedirectConfig::default()).unwrap();
    }
    let app = far.listen("100.64.1.1:8080");
    for _ in 0..3 {
        let (mut asking, answering) =
            soon(async { tokio::join!(near.dial(None, "198.18.128.9:80"), app.accept()) }).await;
        let (mut answering, from) = answering.unwrap();
        assert_eq!(from.ip().to_string(), "100.64.1.9", "the client itself");
        asking.write_all(b"question").await.unwrap();
        let mut heard = [0; 8];
        soon(answering.read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, b"question");
        let live = far.pod.shared.observer.connections.all();
        assert!(live.iter().all(|live| live.facts.identity == Some(identity("shop", "cart"))), "proven");
        let seen = &near.pod.shared.endpoints;
        let load = |name| seen.load(known.workload_by_uid(&format!("Kubernetes//Pod/shop/{name}")).unwrap());
        assert_eq!((load("gone"), load("web")), (0, 1), "what is in progress is load");
        drop(answering);
        assert_eq!(soon(asking.read(&mut heard)).await.unwrap(), 0, "its end arrives as an end");
    }
    assert_eq!(near.pod.pools[0].stats().connections, 1, "one tunnel for all (Z21)");
    let shared = near.pod.shared.clone();
    let metrics = &shared.observer.metrics;
    assert_eq!(metrics.connect_retries.get(), metrics.endpoint_cooldowns.get());
    assert!((1..=3).contains(&metrics.connect_retries.get()), "while it is avoided nobody tries it");
    near.end().await;
    far.end().await;
    assert_eq!(shared.endpoints.sizes().0, 0, "nothing stays behind");
}

/// 127.0.0.9 for whatever is asked.
fn one(query: &[u8]) -> Option<Vec<u8>> {
    let mut answer = hickory_proto::op::Message::from_vec(&many(query)?).unwrap();
    answer.answers.truncate(1);
    Some(answer.to_vec().unwrap())
}

pub(crate) fn info(name: &str) -> PodInfo {
    PodInfo {
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        native_tunnel: false,
    }
}

/// C67, C63: after a snapshot the pods that it did not name are no longer served; one that was to be kept is.
#[tokio::test]
async fn a_snapshot_drops_what_it_does_not_name() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    assert_eq!(shared.readiness.pending(), ["node agent snapshot"]);
    pods.session_started();
    for name in ["named", "kept", "left"] {
        pods.add(name, info(name), namespace()).await.unwrap();
    }
    pods.snapshot_complete().await;
    assert!(shared.readiness.is_ready());
    let left = pods.get("left").unwrap();

    pods.session_started();
    pods.add("named", info("named"), pods.get("named").unwrap().netns.clone()).await.unwrap();
    pods.keep("kept").unwrap();
    pods.snapshot_complete().await;
    assert!(pods.get("named").is_some() && pods.get("kept").is_some());
    assert!(pods.get("left").is_none());
    let gone = SocketAddr::from(([127, 0, 0, 1], 15008));
    let refused = connect(&left.netns, gone, &DialOptions::default(), SOON).await;
    assert!(refused.is_err(), "nobody listens in a pod that was dropped");
    assert!(pods.keep("named").is_err(), "C63: to be kept is said before the snapshot only");
}

/// C68: the same namespace again changes nothing; another one replaces the pod, and the old one is no longer served.
#[tokio::test]
async fn another_namespace_is_another_pod() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared);
    let (first, second) = (namespace(), namespace());
    pods.add("pod", info("cart"), first.clone()).await.unwrap();
    let served = pods.get("pod").unwrap();
    pods.add("pod", info("cart"), first.clone()).await.unwrap();
    assert!(Arc::ptr_eq(&served, &pods.get("pod").unwrap()));
    pods.add("pod", info("cart"), second.clone()).await.unwrap();
    assert!(!Arc::ptr_eq(&served, &pods.get("pod").unwrap()));
    let hbone = SocketAddr::from(([127, 0, 0, 1], 15008));
    assert!(connect(&second, hbone, &DialOptions::default(), SOON).await.is_ok());
    assert!(connect(&first, hbone, &DialOptions::default(), SOON).await.is_err());
}

/// C69: a pod whose sockets cannot be opened is pending, says why, and keeps the process from being ready.
#[tokio::test]
async fn a_pod_that_cannot_be_served_is_pending() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    pods.session_started();
    let netns = namespace();
    let taken = netns.run(|| std::net::TcpListener::bind("0.0.0.0:15008")).unwrap();
    let error = pods.add("pod", info("cart"), netns.clone()).await.unwrap_err();
    assert!(error.to_lowercase().contains("in use"), "{error}");
    pods.snapshot_complete().await;
    assert_eq!(shared.readiness.pending(), ["pods that cannot be served yet"]);
    drop(taken);
    pods.add("pod", info("cart"), netns).await.unwrap();
    assert!(shared.readiness.is_ready());
}

/// Z112: the dump holds everything that the proxy knows, each part under its name.
#[tokio::test]
async fn the_dump_holds_everything() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let cart = workload("shop", "cart", &["100.64.1.9"]);
    shared.state.commit(snapshot([cart], [service("shop/cart.shop.svc.cluster.local", &["198.18.128.1"])]));
    let pods = Pods::new(shared.clone());
    pods.add("pod", info("cart"), namespace()).await.unwrap();
    shared.certificates.get(&identity("shop", "cart")).await.unwrap();
    let dump = crate::admin::config_dump(&shared, &pods);
    assert_eq!(dump["workloads"][0]["uid"], "Kubernetes//Pod/shop/cart");
    assert_eq!(dump["services"][0]["key"], "shop/cart.shop.svc.cluster.local");
    assert_eq!(dump["certificates"][0]["identity"], "spiffe://cluster.local/ns/shop/sa/cart");
    assert_eq!(dump["pods"][0]["name"], "cart");
    for (part, entries) in [("policies", 0), ("connections", 0)] {
        assert_eq!(dump[part].as_array().map(Vec::len), Some(entries), "{part}");
    }
    assert_eq!(dump["node"], "n");
    assert!(dump["config"].is_object());
    assert_eq!(dump["version"], env!("CARGO_PKG_VERSION"));
}

/// Z90: a certificate comes with the first pod of an identity that the control plane names, and goes with the last.
#[tokio::test]
async fn a_certificate_comes_with_the_first_pod_and_goes_with_the_last() {
    let (shared, _drain) = shared(&Authority::new(), None);
    let pods = Pods::new(shared.clone());
    let (cart, certificates) = (identity("shop", "cart"), &shared.certificates);
    for name in ["cart", "cart-2"] {
        let info = PodInfo { service_account: "cart".into(), ..info(name) };
        pods.add(name, info, namespace()).await.unwrap();
    }
    assert!(
        certificates.list().is_empty(),
        "the authority would refuse what the control plane does not know yet"
    );
    shared.state.commit(snapshot([workload("shop", "cart", &["100.64.1.9"])], []));
    soon(async {
        while certificates.current(&cart).is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    pods.remove("cart").await;
    assert!(certificates.current(&cart).is_some(), "another pod of the identity is there");
    pods.remove("cart-2").await;
    assert!(certificates.list().is_empty());
}
