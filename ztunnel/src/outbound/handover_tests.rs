//! Two pods of one node: real sockets in two namespaces that a wire joins, one proxy for both. As root only.

use std::time::{Duration, SystemTime};

use culvert_identity::ca_client::{CaClient, CaError, Signing};
use culvert_model::identity::Identity;
use culvert_model::policy::{Action, Group, Match, Policy, PolicyKey, PolicyScope, Rule, StringMatch};
use culvert_model::snapshot::{Snapshot, SnapshotWriter, Update};
use culvert_model::wire::AddressResource;
use culvert_model::workload::PodFacts;
use culvert_net::capture::{Capture, CaptureOptions};
use culvert_net::netns::NetNs;
use culvert_net::redirect::{RedirectConfig, install};
use culvert_net::socket::{DialOptions, connect};
use culvert_runtime::drain::DrainTrigger;
use http::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;
use crate::authority::Authority;
use crate::observe::Direction;
use crate::pod_tests::{SOON, info, ip, namespace, neighbour, shared_by, soon};
use crate::pods::Pods;
use crate::world::{identity, workload};

const CART: &str = "100.64.1.9";
const WEB: &str = "100.64.1.1";
const APP: &str = "100.64.1.1:8080";
const MARKER: &[u8] = b"what nobody on the wire may read";

/// The pods `shop/cart` and `shop/web`, both served by one proxy.
struct Node {
    shared: Arc<Shared>,
    pods: Arc<Pods>,
    cart: Arc<NetNs>,
    web: Arc<NetNs>,
    _drain: DrainTrigger,
}

/// A pod as our control plane describes it.
fn told(name: &str, address: &str, network_policies: NetworkPolicies) -> Workload {
    let facts = PodFacts { uid: format!("uid-{name}").into(), network_policies };
    Workload { pod: Some(Box::new(facts)), ..workload("shop", name, &[address]) }
}

fn cart() -> Workload {
    told("cart", CART, NetworkPolicies::None)
}

fn web() -> Workload {
    told("web", WEB, NetworkPolicies::None)
}

fn known(workloads: [Workload; 2], policies: Vec<Policy>) -> Arc<Snapshot> {
    let addresses = workloads.into_iter().map(AddressResource::Workload).collect();
    Arc::new(SnapshotWriter::new().apply(Update { addresses, policies, ..Update::default() }).snapshot)
}

fn deny_cart() -> Policy {
    let one = Match {
        principals: vec![StringMatch::Exact("cluster.local/ns/shop/sa/cart".into())],
        ..Match::default()
    };
    Policy {
        key: PolicyKey { namespace: "shop".into(), name: "no-cart".into() },
        scope: PolicyScope::Namespace,
        action: Action::Deny,
        groups: vec![Group { rules: vec![Rule { matches: vec![one] }] }],
        dry_run: false,
        undecodable: None,
    }
}

impl Node {
    async fn new(mode: &str, workloads: [Workload; 2]) -> Self {
        Self::with(Authority::new(), mode, workloads).await
    }

    async fn with(ca: Arc<dyn CaClient>, mode: &str, workloads: [Workload; 2]) -> Self {
        let (shared, drain) = shared_by(ca, None, &[format!("--same-node={mode}")]);
        shared.state.commit(known(workloads, Vec::new()));
        let pods = Pods::new(shared.clone());
        let cart = namespace();
        let web = Arc::new(neighbour(&cart));
        for (name, netns) in [("cart", &cart), ("web", &web)] {
            pods.add(&format!("uid-{name}"), info(name), netns.clone()).await.unwrap();
            install(netns, &RedirectConfig::default()).unwrap();
        }
        Self { shared, pods, cart, web, _drain: drain }
    }

    fn pod(&self, name: &str) -> Arc<Pod> {
        self.pods.get(&format!("uid-{name}")).unwrap()
    }

    fn app(&self) -> TcpListener {
        let listener = self.web.run(|| std::net::TcpListener::bind(APP)).unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    async fn dial(&self) -> TcpStream {
        soon(connect(&self.cart, APP.parse().unwrap(), &DialOptions::default(), SOON)).await.unwrap()
    }

    /// An open connection: the client's end and the application's.
    async fn open(&self, app: &TcpListener) -> (TcpStream, TcpStream) {
        let (mut near, accepted) = soon(async { tokio::join!(self.dial(), app.accept()) }).await;
        let (mut far, from) = accepted.unwrap();
        assert_eq!(from.ip().to_string(), CART, "the client itself (Z51)");
        near.write_all(MARKER).await.unwrap();
        let mut heard = vec![0; MARKER.len()];
        soon(far.read_exact(&mut heard)).await.unwrap();
        assert_eq!(heard, MARKER);
        (near, far)
    }

    /// Tunnels that cart's proxy has opened.
    fn tunnels(&self) -> usize {
        self.pod("cart").pools[0].stats().connections
    }

    /// The decision, for a connection of cart to web's application.
    fn decide(&self, change: impl FnOnce(&mut TunnelRoute, &mut Flow)) -> Result<(), NotHere> {
        let snapshot = self.shared.state.load_full();
        let find =
            |name: &str| snapshot.workload_by_uid(&format!("Kubernetes//Pod/shop/{name}")).unwrap().clone();
        let mut route = TunnelRoute {
            peer: format!("{WEB}:15008").parse().unwrap(),
            authority: APP.into(),
            expected: [identity("shop", "web")].into_iter().collect(),
            kind: TunnelKind::Direct,
            workload: find("web"),
            service: None,
            target: APP.parse().unwrap(),
        };
        let client = format!("{CART}:40000").parse().unwrap();
        let mut flow = Flow::new(Direction::Outbound, client, route.target);
        flow.source.workload = Some(find("cart"));
        change(&mut route, &mut flow);
        destination(&self.pod("cart"), &route, &flow).map(drop)
    }

    async fn end(self) {
        for name in ["cart", "web"] {
            self.pods.remove(&format!("uid-{name}")).await;
        }
    }
}

async fn is_reset(stream: &mut TcpStream) {
    let cut = soon(stream.read_u8()).await.unwrap_err();
    assert_eq!(cut.kind(), std::io::ErrorKind::ConnectionReset);
}

fn uid(name: &str) -> Str {
    format!("Kubernetes//Pod/shop/{name}").into()
}

/// Z28 differs, Z51: no tunnel, no handshake, nothing on the wire; both sides' records say so, each with both identities.
#[tokio::test]
async fn handed_over_past_the_wire() {
    let node = Node::new("auto", [cart(), web()]).await;
    let app = node.app();
    let capture = Capture::start(&node.cart, "way", CaptureOptions::default().marker(MARKER)).unwrap();
    let (mut near, mut far) = node.open(&app).await;
    let live = node.shared.observer.connections.all();
    assert_eq!(live.len(), 2, "one record for each side");
    for live in &live {
        assert_eq!(
            (live.facts.identity.as_ref(), live.facts.tunnel),
            (Some(&identity("shop", "cart")), None)
        );
        assert_eq!(live.sent(), MARKER.len() as u64);
    }
    let inbound = live.iter().find(|live| live.facts.direction == Direction::Inbound).unwrap();
    assert_eq!((&inbound.facts.pod, &inbound.facts.handed_in_by), (&uid("web"), &Some(uid("cart"))));
    assert_eq!(inbound.facts.destination.to_string(), APP, "the pod's own port (Z50)");
    // The client has said all; the answer still comes (Z27).
    near.shutdown().await.unwrap();
    assert_eq!(soon(far.read(&mut [0])).await.unwrap(), 0);
    far.write_all(b"answer").await.unwrap();
    drop(far);
    let mut heard = String::new();
    soon(near.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "answer");
    let seen = tokio::task::spawn_blocking(|| capture.stop()).await.unwrap().unwrap();
    assert_eq!((seen.dropped, seen.port(15008), seen.port(8080), seen.hits(MARKER)), (0, 0, 0, 0));
    assert_eq!(node.tunnels(), 0);
    node.end().await;
}

/// Z28 differs: one condition that does not hold, and the tunnel is taken.
#[tokio::test]
async fn every_condition_has_to_hold() {
    let node = Node::new("auto", [cart(), web()]).await;
    let elsewhere = |uid| Err(NotHere::Elsewhere(uid));
    assert_eq!(node.decide(|_, _| {}), Ok(()));
    let waypoint = |route: &mut TunnelRoute, _: &mut Flow| route.kind = TunnelKind::WorkloadWaypoint;
    assert_eq!(node.decide(waypoint), Err(NotHere::Indirect(uid("web"))));
    let native = |route: &mut TunnelRoute, _: &mut Flow| {
        route.workload = Arc::new(Workload { native_tunnel: true, ..web() });
    };
    assert_eq!(node.decide(native), Err(NotHere::Indirect(uid("web"))));
    let unknown = |route: &mut TunnelRoute, _: &mut Flow| {
        route.workload = Arc::new(told("other", WEB, NetworkPolicies::None));
    };
    assert_eq!(node.decide(unknown), elsewhere(uid("other")));
    let nobody = |_: &mut TunnelRoute, flow: &mut Flow| flow.source.workload = None;
    assert_eq!(node.decide(nobody), elsewhere(uid("cart")));
    let expected = |route: &mut TunnelRoute, _: &mut Flow| {
        route.expected = [identity("shop", "other")].into_iter().collect();
    };
    assert_eq!(node.decide(expected), Err(NotHere::Unexpected(uid("web"))));
    for address in ["100.64.1.8:40000", "127.0.0.1:40000", "[fd00::9]:40000"] {
        let address: SocketAddr = address.parse().unwrap();
        let client = |_: &mut TunnelRoute, flow: &mut Flow| flow.source.address = address;
        assert_eq!(node.decide(client), Err(NotHere::Client(address.ip())));
    }
    let absent = |route: &mut TunnelRoute, _: &mut Flow| {
        route.peer = "100.64.1.77:15008".parse().unwrap();
        route.target = "100.64.1.77:8080".parse().unwrap();
    };
    assert!(matches!(node.decide(absent), Err(NotHere::Address(..))));
    ip(&node.web, "address del 100.64.1.1/24 dev out");
    assert!(matches!(node.decide(|_, _| {}), Err(NotHere::Address(..))), "the address went a moment ago");
    ip(&node.web, "address add 100.64.1.1/24 dev out");
    assert_eq!(node.decide(|_, _| {}), Ok(()));
    // A pod of the same name that the agent names beside it: neither is it for certain.
    node.pods.add("uid-new", info("web"), namespace()).await.unwrap();
    assert_eq!(node.decide(|_, _| {}), elsewhere(uid("web")));
    node.pods.remove("uid-new").await;
    assert_eq!(node.decide(|_, _| {}), Ok(()));
    // Its drain, as at an update of the proxy: nothing new.
    let web = node.pod("web");
    let _held = web.watcher();
    let draining = node.shared.clone();
    let drain = {
        let web = web.clone();
        node.shared.workers[0].spawn(async move { web.drain(Duration::from_secs(30)).await })
    };
    while !web.watcher().is_draining() {
        tokio::task::yield_now().await;
    }
    assert_eq!(node.decide(|_, _| {}), Err(NotHere::Draining(uid("web"))));
    drain.abort();
    drop(draining);
    node.pods.remove("uid-web").await;
    assert_eq!(node.decide(|_, _| {}), elsewhere(uid("web")));
    node.end().await;
}

/// Z28 differs: the uid and the account that the agent says have to be those that the control plane says, of both pods.
#[tokio::test]
async fn agent_and_control_plane_mean_the_same_pods() {
    let other_uid = |mut of: Workload| {
        of.pod.as_mut().unwrap().uid = "uid-before".into();
        of
    };
    let other_account = |of: Workload| Workload { identity: identity("shop", "other"), ..of };
    for (from, to, disputed) in [
        (cart(), other_uid(web()), "web"),
        (other_uid(cart()), web(), "cart"),
        (cart(), other_account(web()), "web"),
        (other_account(cart()), web(), "cart"),
    ] {
        let node = Node::new("auto", [from, to]).await;
        assert_eq!(node.decide(|_, _| {}), Err(NotHere::Disputed(uid(disputed))));
        node.end().await;
    }
}

/// Z28 differs: what each setting makes of what is known of NetworkPolicies.
#[test]
fn settings() {
    use NetworkPolicies as N;
    use SameNode::{Auto, Handover, Tunnel};
    let unrestricted = |mode, from, to| {
        let (from, to) = (told("cart", CART, from), told("web", WEB, to));
        unrestricted(mode, &from, &to).map_err(|why| match why {
            NotHere::Off => "off".to_owned(),
            NotHere::Restricted(uid) => format!("restricted {uid}"),
            NotHere::Unknown(uid) => format!("unknown {uid}"),
            other => panic!("{other}"),
        })
    };
    let refused = |what: &str| Err(what.to_owned());
    let (cart, web) = ("Kubernetes//Pod/shop/cart", "Kubernetes//Pod/shop/web");
    for (mode, from, to, expected) in [
        (Auto, N::None, N::None, Ok(())),
        (Auto, N::Unknown, N::None, refused(&format!("unknown {cart}"))),
        (Auto, N::None, N::Unknown, refused(&format!("unknown {web}"))),
        (Auto, N::Selected, N::None, refused(&format!("restricted {cart}"))),
        (Auto, N::None, N::Selected, refused(&format!("restricted {web}"))),
        (Handover, N::None, N::None, Ok(())),
        (Handover, N::Unknown, N::Unknown, Ok(())),
        (Handover, N::Unknown, N::Selected, refused(&format!("restricted {web}"))),
        (Handover, N::Selected, N::Unknown, refused(&format!("restricted {cart}"))),
        (Tunnel, N::None, N::None, refused("off")),
    ] {
        assert_eq!(unrestricted(mode, from, to), expected, "{mode:?} {from:?} {to:?}");
    }
    // Another control plane says nothing.
    let silent = |name, address| workload("shop", name, &[address]);
    let (from, to) = (silent("cart", CART), silent("web", WEB));
    assert!(super::unrestricted(Auto, &from, &to).is_err());
    assert!(super::unrestricted(Handover, &from, &to).is_ok());
}

/// Z28 differs: where it is not handed over it goes through a tunnel, encrypted, and works.
#[tokio::test]
async fn through_a_tunnel_otherwise() {
    let silent = |name: &str, address: &str| workload("shop", name, &[address]);
    for (mode, workloads) in [
        ("auto", [silent("cart", CART), silent("web", WEB)]),
        ("auto", [cart(), told("web", WEB, NetworkPolicies::Selected)]),
        ("tunnel", [cart(), web()]),
    ] {
        let node = Node::new(mode, workloads).await;
        let app = node.app();
        let capture = Capture::start(&node.cart, "way", CaptureOptions::default().marker(MARKER)).unwrap();
        let (near, far) = node.open(&app).await;
        let seen = tokio::task::spawn_blocking(|| capture.stop()).await.unwrap().unwrap();
        assert!(seen.port(15008) > 0, "{mode}");
        assert_eq!((seen.dropped, seen.port(8080), seen.hits(MARKER)), (0, 0, 0));
        assert_eq!(node.tunnels(), 1, "{mode}");
        drop((near, far));
        node.end().await;
    }
}

/// Z28 differs, Z50: policy is asked as at the other end of a tunnel; who is refused is reset before any byte and gets no tunnel instead.
#[tokio::test]
async fn refused_as_through_a_tunnel() {
    let node = Node::new("auto", [cart(), web()]).await;
    let app = node.app();
    node.shared.state.commit(known([cart(), web()], vec![deny_cart()]));
    is_reset(&mut node.dial().await).await;
    // A workload that is bound to a waypoint is reached by nobody else.
    let bound = Workload { waypoint: Some(crate::world::by_name("shop/w.shop.svc.cluster.local")), ..web() };
    node.shared.state.commit(known([cart(), bound.clone()], Vec::new()));
    is_reset(&mut node.dial().await).await;
    // Z47, Z49: the target is checked, whatever the source's side made of it.
    let peer = Peer {
        address: format!("{CART}:40000").parse().unwrap(),
        local: format!("{WEB}:15008").parse().unwrap(),
        facts: PeerFacts {
            identity: identity("shop", "cart"),
            not_after: SystemTime::now() + SOON,
            cipher: None,
            kx_group: None,
        },
    };
    node.shared.state.commit(known([cart(), web()], Vec::new()));
    let web = node.pod("web");
    for (authority, expired, status) in [
        ("100.64.1.77:8080", false, StatusCode::BAD_REQUEST),
        ("100.64.1.1:15006", false, StatusCode::BAD_REQUEST),
        (APP, true, StatusCode::UNAUTHORIZED),
    ] {
        let not_after = if expired { SystemTime::UNIX_EPOCH } else { peer.facts.not_after };
        let peer = Peer { facts: PeerFacts { not_after, ..peer.facts.clone() }, ..peer };
        let mut inbound = inbound::begin(&web, &peer, Security::SameNode);
        let (answer, failure) =
            inbound::open(&web, &peer, Ok(authority.into()), &mut inbound).await.unwrap_err();
        assert_eq!(answer, status, "{authority}: {failure}");
        inbound.finish(End::Failed(failure));
    }
    assert!(tokio::time::timeout(Duration::ZERO, app.accept()).await.is_err(), "nothing reached the pod");
    assert_eq!(node.tunnels(), 0);
    node.end().await;
}

/// Z27: nobody listens: a reset before any byte, not an end.
#[tokio::test]
async fn a_port_that_refuses() {
    let node = Node::new("auto", [cart(), web()]).await;
    is_reset(&mut node.dial().await).await;
    assert_eq!(node.tunnels(), 0);
    node.end().await;
}

/// Z67, Z28 differs: a policy that is tightened, and a NetworkPolicy that comes to select a pod, end what is open; both ends see a reset.
#[tokio::test]
async fn what_changes_ends_it() {
    let restricted = |name, address| told(name, address, NetworkPolicies::Selected);
    for (after, reason) in [
        (known([cart(), web()], vec![deny_cart()]), Reason::AuthorizationPolicyLate),
        (known([cart(), restricted("web", WEB)], vec![]), Reason::NetworkPolicy),
        (known([restricted("cart", CART), web()], vec![]), Reason::NetworkPolicy),
        (known([cart(), workload("shop", "web", &[WEB])], vec![]), Reason::NetworkPolicy),
    ] {
        let node = Node::new("auto", [cart(), web()]).await;
        let app = node.app();
        let (mut near, mut far) = node.open(&app).await;
        let connections = &node.shared.observer.connections;
        let mode = node.shared.config.same_node;
        assert_eq!(inbound::rejudge(&node.shared.state.load(), connections, mode), 0, "nothing has changed");
        node.shared.state.commit(after.clone());
        assert_eq!(inbound::rejudge(&after, connections, mode), 1);
        let why = connections.all().iter().find_map(|live| live.killed_for().map(|why| why.reason));
        assert_eq!(why, Some(reason));
        is_reset(&mut near).await;
        is_reset(&mut far).await;
        node.end().await;
    }
}

/// Either pod that goes takes its connections with it, and nothing new is handed to it.
#[tokio::test]
async fn either_pod_that_goes_ends_it() {
    for gone in ["cart", "web"] {
        let node = Node::new("auto", [cart(), web()]).await;
        let app = node.app();
        let (mut near, mut far) = node.open(&app).await;
        node.pods.remove(&format!("uid-{gone}")).await;
        is_reset(&mut near).await;
        is_reset(&mut far).await;
        soon(async {
            while !node.shared.observer.connections.is_empty() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        if gone == "web" {
            is_reset(&mut node.dial().await).await;
        }
        assert!(tokio::time::timeout(Duration::ZERO, app.accept()).await.is_err());
        node.end().await;
    }
}

/// A pod that drains lets go of what it was handed by its deadline, as of everything else.
#[tokio::test]
async fn a_drain_waits_for_it_until_its_deadline() {
    let node = Node::new("auto", [cart(), web()]).await;
    let app = node.app();
    let (mut near, mut far) = node.open(&app).await;
    let web = node.pod("web");
    let drain = async { web.drain(Duration::from_millis(300)).await };
    let goes_on = async {
        while !web.watcher().is_draining() {
            tokio::task::yield_now().await;
        }
        far.write_all(b"x").await.unwrap();
        assert_eq!(near.read_u8().await.unwrap(), b'x', "what is open goes on");
        is_reset(&mut near).await;
    };
    soon(async { tokio::join!(drain, goes_on) }).await;
    node.end().await;
}

/// It signs for everybody but one.
struct Choosy(Arc<Authority>, Identity);

impl CaClient for Choosy {
    fn sign<'a>(&'a self, csr: &'a str, identity: &'a Identity, lifetime: Duration) -> Signing<'a> {
        if *identity == self.1 {
            return Box::pin(async { Err(CaError::Unreachable("not for you".into())) });
        }
        self.0.sign(csr, identity, lifetime)
    }
}

/// Z28 differs: without a certificate of either side it is refused, as a tunnel would be.
#[tokio::test]
async fn without_a_certificate_it_is_refused() {
    for without in ["cart", "web"] {
        let ca = Arc::new(Choosy(Authority::new(), identity("shop", without)));
        let node = Node::with(ca, "auto", [cart(), web()]).await;
        let app = node.app();
        assert_eq!(node.decide(|_, _| {}), Ok(()), "it is no matter of which way");
        is_reset(&mut node.dial().await).await;
        assert!(tokio::time::timeout(Duration::ZERO, app.accept()).await.is_err());
        assert_eq!(node.tunnels(), 0);
        node.end().await;
    }
}
