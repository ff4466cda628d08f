use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use culvert_hbone::config::ServerConfig;
use culvert_hbone::pool::{Pool, PoolConfig};
use culvert_hbone::server::Server;
use culvert_identity::certificate::WorkloadCertificate;
use culvert_identity::tls::{client_config, server_config};
use culvert_identity::verify::TrustDomains;
use culvert_runtime::tasks::Tasks;
use http::{HeaderMap, HeaderValue, StatusCode};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::authority::Authority;
use crate::headers::{X_FORWARDED_NETWORK, inner};
use crate::world::identity;

/// Two networks: this side's client, the other side's gateway and, behind it, one endpoint.
struct World {
    tasks: Tasks,
    authority: Arc<Authority>,
    dials: AtomicUsize,
    /// What the gateway and the endpoint heard, in order: who, authority, headers.
    heard: Mutex<Vec<Heard>>,
    /// Accounts of the endpoints that the gateway chooses, in order.
    endpoints: Mutex<VecDeque<Endpoint>>,
}

/// Who heard it, the authority, and the headers.
type Heard = (&'static str, String, HeaderMap);

struct Endpoint {
    certificate: Arc<WorkloadCertificate>,
    answer: StatusCode,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            tasks: Tasks::new("test"),
            authority: Authority::new(),
            dials: AtomicUsize::new(0),
            heard: Mutex::default(),
            endpoints: Mutex::default(),
        })
    }

    fn certificate(&self, account: &str) -> Arc<WorkloadCertificate> {
        self.authority.certificate(&identity("shop", account))
    }

    fn endpoint(&self, account: &str, answer: StatusCode) {
        let certificate = self.certificate(account);
        self.endpoints.lock().push_back(Endpoint { certificate, answer });
    }

    fn spawner(&self) -> Spawner {
        let tasks = self.tasks.clone();
        Arc::new(move |driver: Pin<Box<dyn Future<Output = ()> + Send>>| {
            tasks.spawn("driver", driver);
        })
    }

    /// A connection to the gateway, as a client that expects `expected` there.
    async fn dial(
        self: &Arc<Self>,
        expected: &Identity,
    ) -> Result<(tokio_rustls::client::TlsStream<DuplexStream>, ConnectionFacts), Failure> {
        self.dials.fetch_add(1, Ordering::Relaxed);
        let (near, far) = duplex(64 * 1024);
        self.tasks.spawn("gateway", self.clone().serve_gateway(far));
        let tls = client_config(&self.certificate("client"), std::slice::from_ref(expected));
        let stream = TlsConnector::from(tls).connect(unnamed(), near).await;
        Ok((stream.map_err(|e| tls_failure(&e, &"the gateway"))?, ConnectionFacts::default()))
    }

    async fn serve_gateway(self: Arc<Self>, io: DuplexStream) {
        let Some(mut connection) = accept(io, &self.certificate("gateway")).await else { return };
        while let Some(Ok(incoming)) = connection.accept().await {
            let (authority, headers) = (incoming.authority.clone(), incoming.headers.clone());
            self.heard.lock().push(("gateway", authority, headers));
            let Some(endpoint) = self.endpoints.lock().pop_front() else {
                let _ = incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
                continue;
            };
            let tunnel = incoming.accept(HeaderMap::new()).unwrap();
            self.tasks.spawn("endpoint", self.clone().serve_endpoint(TunnelIo::new(tunnel), endpoint));
        }
    }

    /// Answers what it is asked, and sends back what it is sent.
    async fn serve_endpoint(self: Arc<Self>, io: TunnelIo, endpoint: Endpoint) {
        let Some(mut connection) = accept(io, &endpoint.certificate).await else { return };
        while let Some(Ok(incoming)) = connection.accept().await {
            let (authority, headers) = (incoming.authority.clone(), incoming.headers.clone());
            self.heard.lock().push(("endpoint", authority, headers));
            if endpoint.answer != StatusCode::OK {
                let _ = incoming.refuse(endpoint.answer, HeaderMap::new());
                continue;
            }
            let stream = TunnelIo::new(incoming.accept(HeaderMap::new()).unwrap());
            self.tasks.spawn("echo", async move {
                let (mut from, mut to) = tokio::io::split(stream);
                let _ = tokio::io::copy(&mut from, &mut to).await;
                let _ = to.shutdown().await;
            });
        }
    }
}

async fn accept<IO: AsyncRead + AsyncWrite + Unpin>(
    io: IO,
    certificate: &WorkloadCertificate,
) -> Option<culvert_hbone::server::ServerConnection<tokio_rustls::server::TlsStream<IO>>> {
    let tls = server_config(certificate, &Arc::new(TrustDomains::new("cluster.local", [])));
    let stream = TlsAcceptor::from(tls).accept(io).await.ok()?;
    Server::handshake(stream, &ServerConfig::default()).await.ok()
}

fn key() -> TunnelKey {
    TunnelKey {
        peer: "198.51.100.1:15008".parse().unwrap(),
        expected: [identity("shop", "gateway")].into_iter().collect(),
        destination: "198.18.128.9:80".parse().unwrap(),
    }
}

fn pool(world: &World) -> TunnelPool {
    Pool::new(PoolConfig::default(), world.spawner())
}

async fn connect(
    world: &Arc<World>,
    pool: &TunnelPool,
    expected: &str,
) -> Result<(TunnelStream, Identity), HopError> {
    let request = || TunnelRequest {
        authority: "cart.shop.svc.cluster.local:80".to_owned(),
        headers: [("baggage".parse().unwrap(), HeaderValue::from_static("k8s.namespace.name=shop"))]
            .into_iter()
            .collect(),
    };
    let outer = request();
    let request = Request {
        inner: TunnelRequest { headers: inner(&outer.headers, "network-1"), ..request() },
        outer,
        inner_tls: client_config(&world.certificate("client"), &[identity("shop", expected)]),
    };
    let gateway = identity("shop", "gateway");
    let dial = || world.dial(&gateway);
    let (key, spawn) = (key(), world.spawner());
    let opening = open(pool, &key, &dial, request, &spawn);
    tokio::time::timeout(Duration::from_secs(20), opening).await.expect("it ends")
}

/// Z40: bytes reach an endpoint behind the gateway, both ways, with a half-close at the end of each.
#[tokio::test]
async fn bytes_go_through_both_tunnels() {
    let world = World::new();
    world.endpoint("cart", StatusCode::OK);
    let (stream, peer) = connect(&world, &pool(&world), "cart").await.unwrap();
    assert_eq!(peer, identity("shop", "cart"), "whom the bytes reach, not the gateway");
    let (mut read, mut write) = tokio::io::split(TunnelIo::new(stream));
    let sent: Vec<u8> = (0..300_000_u32).map(|n| n.wrapping_mul(31) as u8).collect();
    let expected = sent.clone();
    let send = async {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let ((), received) = tokio::join!(send, read.read_to_end(&mut back));
    received.unwrap();
    assert!(back == expected);
    world.tasks.abort_all();
}

/// Z16, Z19: both requests name the service; only the inner one tells the client's network.
#[tokio::test]
async fn what_each_is_asked() {
    let world = World::new();
    world.endpoint("cart", StatusCode::OK);
    connect(&world, &pool(&world), "cart").await.unwrap();
    let heard = world.heard.lock();
    let (outer, inner) = (&heard[0], &heard[1]);
    assert_eq!((outer.0, &*outer.1), ("gateway", "cart.shop.svc.cluster.local:80"));
    assert_eq!((inner.0, &*inner.1), ("endpoint", "cart.shop.svc.cluster.local:80"));
    assert!(outer.2.get(X_FORWARDED_NETWORK).is_none());
    assert_eq!(inner.2.get(X_FORWARDED_NETWORK).unwrap(), "network-1");
    assert_eq!(inner.2.get("baggage").unwrap(), "k8s.namespace.name=shop");
    world.tasks.abort_all();
}

/// Z26: the outer tunnel is pooled, the inner one is not: each connection may reach another endpoint.
#[tokio::test]
async fn only_the_outer_tunnel_is_shared() {
    let world = World::new();
    world.endpoint("cart", StatusCode::OK);
    world.endpoint("cart", StatusCode::OK);
    let pool = pool(&world);
    let first = connect(&world, &pool, "cart").await.unwrap();
    let second = connect(&world, &pool, "cart").await.unwrap();
    assert_eq!(world.dials.load(Ordering::Relaxed), 1);
    assert!(world.endpoints.lock().is_empty(), "two inner tunnels, to two endpoints");
    drop((first, second));
    world.tasks.abort_all();
}

/// Z26: the gateway cannot stand in for an endpoint, nor any endpoint that the service does not name.
#[tokio::test]
async fn somebody_else_behind_the_gateway() {
    let world = World::new();
    let pool = pool(&world);
    for stranger in ["gateway", "thief"] {
        world.endpoint(stranger, StatusCode::OK);
        let error = connect(&world, &pool, "cart").await.unwrap_err();
        assert_eq!(error.failure.reason, Reason::PeerIdentity, "{}", error.failure);
        assert!(error.failure.detail.contains("198.51.100.1:15008"), "{}", error.failure);
        assert!(!error.another_may_do);
    }
    assert!(world.heard.lock().iter().all(|(who, ..)| *who == "gateway"), "nothing was asked of a stranger");
    world.tasks.abort_all();
}

/// A gateway that is somebody else gets nothing, and another one may do.
#[tokio::test]
async fn somebody_else_at_the_gateway() {
    let world = World::new();
    let pool = pool(&world);
    let wrong = identity("shop", "other-gateway");
    let dial = || world.dial(&wrong);
    let request = TunnelRequest { authority: "cart.shop:80".into(), headers: HeaderMap::new() };
    let request = Request {
        outer: request.clone(),
        inner: request,
        inner_tls: client_config(&world.certificate("client"), &[identity("shop", "cart")]),
    };
    let error = open(&pool, &key(), &dial, request, &world.spawner()).await.unwrap_err();
    assert_eq!((error.failure.reason, error.another_may_do), (Reason::PeerIdentity, true));
    world.tasks.abort_all();
}

/// Z20: the gateway's refusal and the endpoint's mean what they mean anywhere; only the gateway's is tried elsewhere.
#[tokio::test]
async fn refusals() {
    let world = World::new();
    let pool = pool(&world);
    let nobody = connect(&world, &pool, "cart").await.unwrap_err();
    assert_eq!((nobody.failure.reason, nobody.another_may_do), (Reason::ConnectionRefused, true));
    for (status, reason) in [(401, Reason::AuthorizationPolicy), (503, Reason::ConnectionRefused)] {
        world.endpoint("cart", StatusCode::from_u16(status).unwrap());
        let error = connect(&world, &pool, "cart").await.unwrap_err();
        assert_eq!((error.failure.reason, error.another_may_do), (reason, false));
        assert!(error.failure.detail.contains("behind"), "{}", error.failure);
    }
    world.tasks.abort_all();
}
