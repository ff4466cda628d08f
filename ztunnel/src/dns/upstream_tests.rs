use culvert_runtime::tasks::Tasks;

use super::*;
use crate::dns::fake::{Behaviour, Fake, answer, failing, fake, good, huge, no_such_name, refusing, silent};
use crate::world::{serve, service, snapshot, workload};

const QUERY: &[u8] = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x03www\x07example\0\0\x01\0\x01";
/// Short, so that the tests are; long enough for a loaded machine to answer over loopback.
const SHORT: Patience = Patience { server: Duration::from_secs(1), all: Duration::from_millis(2500) };

async fn fakes(tasks: &Tasks, behaviours: &[Behaviour]) -> (Vec<Fake>, Upstream) {
    let mut fakes = Vec::new();
    for behaviour in behaviours {
        fakes.push(fake(tasks, *behaviour).await);
    }
    let servers: Vec<_> = fakes.iter().map(|fake| fake.address).collect();
    let upstream = Upstream::new(servers.into(), Arc::new(NetNs::current().unwrap()));
    (fakes, Upstream { patience: SHORT, ..upstream })
}

fn nobody(_: SocketAddr) -> bool {
    false
}

fn asked(fakes: &[Fake]) -> Vec<u32> {
    fakes.iter().map(|fake| fake.asked.load(Ordering::Relaxed)).collect()
}

/// Z82: what the server says is what the client gets, under the client's id.
#[tokio::test]
async fn answers_and_codes_are_passed_on() {
    let tasks = Tasks::new("test");
    for transport in [Transport::Udp, Transport::Tcp] {
        let (_, upstream) = fakes(&tasks, &[good]).await;
        assert_eq!(upstream.ask(QUERY, transport, nobody).await.unwrap(), answer(QUERY, 0));
        let (fakes, upstream) = fakes(&tasks, &[no_such_name, good]).await;
        assert_eq!(upstream.ask(QUERY, transport, nobody).await.unwrap(), answer(QUERY, 3));
        assert_eq!(asked(&fakes), [1, 0], "NXDOMAIN is an answer");
    }
    tasks.abort_all();
}

/// A silent server is passed over for the next, which then is the first to be asked.
#[tokio::test]
async fn a_dead_server_costs_its_time_once() {
    let tasks = Tasks::new("test");
    let (fakes, upstream) = fakes(&tasks, &[silent, good]).await;
    assert_eq!(upstream.ask(QUERY, Transport::Udp, nobody).await.unwrap(), answer(QUERY, 0));
    assert_eq!(asked(&fakes), [1, 1]);
    let start = Instant::now();
    assert!(upstream.ask(QUERY, Transport::Udp, nobody).await.is_ok());
    assert!(start.elapsed() < SHORT.server, "the server that answers is asked first");
    assert_eq!(asked(&fakes), [1, 2]);
    tasks.abort_all();
}

/// A port that nobody listens on is passed over at once.
#[tokio::test]
async fn a_closed_port_is_passed_over() {
    let tasks = Tasks::new("test");
    for transport in [Transport::Udp, Transport::Tcp] {
        let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let (fakes, upstream) = fakes(&tasks, &[good]).await;
        let upstream = Upstream { servers: [closed, fakes[0].address].into(), ..upstream };
        let start = Instant::now();
        assert!(upstream.ask(QUERY, transport, nobody).await.is_ok());
        assert!(start.elapsed() < SHORT.server);
    }
    tasks.abort_all();
}

/// One that fails or refuses is passed over; when all do, the first one's code is the answer (Z82).
#[tokio::test]
async fn unwilling_servers() {
    let tasks = Tasks::new("test");
    let (fakes_a, upstream) = fakes(&tasks, &[failing, refusing, good]).await;
    assert_eq!(upstream.ask(QUERY, Transport::Udp, nobody).await.unwrap(), answer(QUERY, 0));
    assert_eq!(asked(&fakes_a), [1, 1, 1]);
    let (_, upstream) = fakes(&tasks, &[refusing, failing]).await;
    assert_eq!(upstream.ask(QUERY, Transport::Tcp, nobody).await.unwrap(), answer(QUERY, 5));
    tasks.abort_all();
}

/// All dead: an error within the time for all, each asked twice at most.
#[tokio::test]
async fn nobody_answers() {
    let tasks = Tasks::new("test");
    let (fakes, upstream) = fakes(&tasks, &[silent]).await;
    let start = Instant::now();
    let error = upstream.ask(QUERY, Transport::Udp, nobody).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert!(start.elapsed() < SHORT.all + SHORT.server, "{:?}", start.elapsed());
    assert_eq!(asked(&fakes), [2], "a datagram may be lost, so it is sent twice");
    tasks.abort_all();
}

/// An answer that is longer than is read is cut so that the client asks by TCP, where all of it is passed on.
#[tokio::test]
async fn long_answers() {
    let tasks = Tasks::new("test");
    let (_, upstream) = fakes(&tasks, &[huge]).await;
    let cut = upstream.ask(QUERY, Transport::Udp, nobody).await.unwrap();
    assert_eq!(cut.len(), QUERY.len());
    assert_eq!((cut[2] & 0x02, &cut[6..12]), (0x02, &[0; 6][..]));
    assert_eq!(cut[..2], QUERY[..2]);
    assert_eq!(upstream.ask(QUERY, Transport::Tcp, nobody).await.unwrap().len(), 6000);
    tasks.abort_all();
}

/// A server that would be asked in a circle is not asked at all.
#[tokio::test]
async fn no_loop() {
    let tasks = Tasks::new("test");
    let (fakes, upstream) = fakes(&tasks, &[good, good]).await;
    let own = fakes[0].address;
    assert!(upstream.ask(QUERY, Transport::Udp, |server| server == own).await.is_ok());
    assert_eq!(asked(&fakes), [0, 1]);
    let error = upstream.ask(QUERY, Transport::Udp, |_| true).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotConnected);
    assert_eq!(asked(&fakes), [0, 1]);
    tasks.abort_all();
}

/// The cluster's DNS may be in the mesh: its own queries must not be answered by asking it.
#[test]
fn who_leads_back() {
    const DNS: &str = "kube-system/kube-dns.kube-system.svc.cluster.local";
    let dns = serve(workload("kube-system", "dns", &["100.64.1.5", "fd00::5"]), DNS, &[(53, 53)]);
    let other = workload("shop", "client", &["100.64.1.2"]);
    let snapshot = snapshot([dns.clone(), other.clone()], [service(DNS, &["198.18.128.10"])]);
    let back = |client: &Workload, server: &str| leads_back(&snapshot, client, server.parse().unwrap());
    for server in
        ["198.18.128.10:53", "100.64.1.5:53", "[::ffff:100.64.1.5]:53", "[fd00::5]:53", "127.0.0.1:15053"]
    {
        assert!(back(&dns, server), "{server}");
    }
    assert!(!back(&dns, "198.18.0.3:53") && !back(&dns, "127.0.0.1:53"));
    assert!(!back(&other, "198.18.128.10:53") && !back(&other, "100.64.1.5:53"));
    assert!(back(&other, "[::1]:15053"), "our own listener in the pod");
}

#[test]
fn an_answer_to_another_question_is_not_ours() {
    let mut good = QUERY.to_vec();
    good[2] |= 0x80;
    assert!(answers(&good, QUERY));
    assert!(!answers(QUERY, QUERY), "a query is no answer");
    let mut other_id = good.clone();
    other_id[0] ^= 1;
    assert!(!answers(&other_id, QUERY));
    let mut other_name = good.clone();
    other_name[14] = b'x';
    assert!(!answers(&other_name, QUERY));
    assert!(!answers(&good[..20], QUERY));
}

#[test]
fn the_question_ends_where_it_ends() {
    assert_eq!(question_length(&QUERY[12..]), Some(17));
    assert_eq!(question_length(b"\x03ww"), None);
    assert_eq!(question_length(b"\xc0\x0c\0\x01\0\x01"), None);
}
