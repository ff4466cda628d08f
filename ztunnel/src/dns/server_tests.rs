use std::sync::atomic::Ordering;

use culvert_model::snapshot::Snapshot;
use culvert_net::netns::NetNs;
use hickory_proto::op::{Message, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use prometheus_client::registry::Registry;

use super::*;
use crate::dns::fake::{Fake, fake, good, silent};
use crate::world::{serve, service, snapshot, workload};

const DNS: &str = "kube-system/kube-dns.kube-system.svc.cluster.local";

/// One pod's DNS, and what it asks.
struct World {
    tasks: Tasks,
    server: Arc<DnsServer>,
    udp: SocketAddr,
    tcp: SocketAddr,
    registry: Registry,
}

/// `client` and the cluster's DNS are pods; `web` is a service.
fn known() -> Arc<Snapshot> {
    let client = workload("shop", "client", &["100.64.1.2"]);
    let dns = serve(workload("kube-system", "dns", &["100.64.1.5"]), DNS, &[(53, 53)]);
    let web = service("shop/web.shop.svc.cluster.local", &["198.18.128.1"]);
    snapshot([client, dns], [web, service(DNS, &["198.18.128.10"])])
}

fn world(tasks: &Tasks, client: &str, upstream: &[&Fake]) -> World {
    let mut registry = Registry::default();
    let state = Arc::new(State::default());
    state.commit(known());
    let server = DnsServer::new(
        client.into(),
        state,
        Upstream::new(
            upstream.iter().map(|fake| fake.address).collect(),
            Arc::new(NetNs::current().unwrap()),
        ),
        "cluster.local".into(),
        Metrics::new(&mut registry),
        tasks.clone(),
        Arc::new(Semaphore::new(MAX_IN_FLIGHT)),
    );
    let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    udp.set_nonblocking(true).unwrap();
    tcp.set_nonblocking(true).unwrap();
    let (at_udp, at_tcp) = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
    server.serve(DnsSockets { udp: vec![udp], tcp: vec![tcp] }).unwrap();
    World { tasks: tasks.clone(), server, udp: at_udp, tcp: at_tcp, registry }
}

fn query(name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

impl World {
    async fn ask_udp(&self, name: &str) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.send_to(&query(name), self.udp).await.unwrap();
        let mut buffer = vec![0; 4096];
        let length = timeout(Duration::from_secs(20), socket.recv(&mut buffer)).await.unwrap().unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    /// Asks all names on one connection.
    async fn ask_tcp(&self, names: &[&str]) -> Vec<Message> {
        let mut stream = TcpStream::connect(self.tcp).await.unwrap();
        let mut answers = Vec::new();
        for name in names {
            let query = query(name);
            stream.write_u16(query.len() as u16).await.unwrap();
            stream.write_all(&query).await.unwrap();
            let mut answer = vec![0; stream.read_u16().await.unwrap().into()];
            stream.read_exact(&mut answer).await.unwrap();
            answers.push(Message::from_vec(&answer).unwrap());
        }
        answers
    }

    /// The value of a metric's line.
    fn metric(&self, line: &str) -> f64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let line = format!("{line} ");
        let value = text.lines().find_map(|found| found.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("no {line}in {text}")).parse().unwrap()
    }
}

fn addresses(message: &Message) -> Vec<String> {
    assert_eq!(message.metadata.id, 0x1234);
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

/// Z76, Z78, Z82: over UDP and TCP, names of the mesh are answered here, with the search domains of the client's own
/// namespace, and others upstream.
#[tokio::test]
async fn over_udp_and_tcp() {
    let tasks = Tasks::new("test");
    let fake = fake(&tasks, good).await;
    let world = world(&tasks, "Kubernetes//Pod/shop/client", &[&fake]);
    assert_eq!(addresses(&world.ask_udp("web.shop.svc.cluster.local.").await), ["198.18.128.1"]);
    assert_eq!(fake.asked.load(Ordering::Relaxed), 0);
    assert_eq!(world.ask_udp("www.example.").await.metadata.response_code, ResponseCode::NoError);
    assert_eq!(fake.asked.load(Ordering::Relaxed), 1);
    let searched = "web.shop.svc.cluster.local.shop.svc.cluster.local.";
    let answers = world.ask_tcp(&["web.shop.svc.cluster.local.", "www.example.", searched]).await;
    assert_eq!(addresses(&answers[0]), ["198.18.128.1"]);
    assert_eq!(answers[1].metadata.response_code, ResponseCode::NoError);
    assert_eq!(
        addresses(&answers[2]),
        ["web.shop.svc.cluster.local.", "198.18.128.1"],
        "an alias, and its address"
    );
    assert_eq!(fake.asked.load(Ordering::Relaxed), 2);
    world.tasks.abort_all();
}

/// Z84: the names that dashboards know.
#[tokio::test]
async fn metrics() {
    let tasks = Tasks::new("test");
    let fake = fake(&tasks, good).await;
    let world = world(&tasks, "Kubernetes//Pod/shop/client", &[&fake]);
    world.ask_udp("web.shop.svc.cluster.local.").await;
    world.ask_udp("www.example.").await;
    assert_eq!(world.metric("istio_dns_requests_total"), 2.0);
    assert_eq!(world.metric("istio_dns_upstream_requests_total"), 1.0);
    assert_eq!(world.metric("istio_dns_upstream_failures_total"), 0.0);
    assert_eq!(world.metric("istio_dns_upstream_request_duration_seconds_count"), 1.0);
    let took = world.metric("istio_dns_upstream_request_duration_seconds_sum");
    assert!(took > 0.0 && took < 5.0, "{took}");
    world.tasks.abort_all();
}

/// Z82: nobody upstream is SERVFAIL, told before the client's resolver gives up, and counted.
#[tokio::test]
async fn upstream_is_dead() {
    let tasks = Tasks::new("test");
    let world = world(&tasks, "Kubernetes//Pod/shop/client", &[]);
    for answer in [world.ask_udp("www.example.").await, world.ask_tcp(&["www.example."]).await.remove(0)] {
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    }
    assert_eq!(world.metric("istio_dns_upstream_failures_total"), 2.0);
    world.tasks.abort_all();
}

/// The cluster's DNS, itself in the mesh, is told SERVFAIL at once instead of being asked its own question for ever.
#[tokio::test]
async fn the_clusters_dns_is_not_asked_its_own_question() {
    let tasks = Tasks::new("test");
    let cluster_dns = Fake { address: "198.18.128.10:53".parse().unwrap(), asked: Arc::default() };
    let world = world(&tasks, "Kubernetes//Pod/kube-system/dns", &[&cluster_dns]);
    let answer = world.ask_udp("www.example.").await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    let took = world.metric("istio_dns_upstream_request_duration_seconds_sum");
    assert!(took < 1.0, "nobody was waited for: {took} s");
    world.tasks.abort_all();
}

/// The bound: what comes beyond it is dropped, so that the resolver asks again, and what is answered here frees its place.
#[tokio::test]
async fn queries_under_way_are_bounded() {
    let tasks = Tasks::new("test");
    let fake = fake(&tasks, silent).await;
    let world = world(&tasks, "Kubernetes//Pod/shop/client", &[&fake]);
    let held = world.server.in_flight.clone().acquire_many_owned(MAX_IN_FLIGHT as u32).await.unwrap();
    let mut stream = TcpStream::connect(world.tcp).await.unwrap();
    assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0, "closed without an answer");
    assert_eq!(world.metric("istio_dns_requests_total"), 0.0);
    assert_eq!(world.metric(r#"culvert_limit_reached_total{limit="dns_queries"}"#), 1.0);
    drop(held);
    assert_eq!(addresses(&world.ask_udp("web.shop.svc.cluster.local.").await), ["198.18.128.1"]);
    assert_eq!(world.server.in_flight.available_permits(), MAX_IN_FLIGHT);
    world.tasks.abort_all();
}
