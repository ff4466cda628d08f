//! Entering namespaces, sockets in them, packets and events. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use common::{CLIENT, POD, SOON, World, addr, dial, exchange, ip, listen, listen_any, within};
use culvert_net::NetNs;
use culvert_net::capture::{Capture, CaptureOptions};
use culvert_net::nft::{Batch, Changes, Monitor};
use culvert_net::socket::{
    Acceptor, DialError, DialOptions, Keepalive, Reserve, TcpState, arm_reset, connect, exhausted,
    raise_nofile_limit, tcp_info, tune_accepted,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Z02.
#[test]
fn a_thread_always_comes_home() {
    let home = NetNs::current().unwrap().id();
    let (a, b) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    assert_ne!(a.id(), home);
    assert_ne!(a.id(), b.id());
    let here = || NetNs::current().unwrap().id();
    let inside = a.run(|| {
        let nested = b.run(|| Ok(here()))?;
        assert_eq!(nested, b.id());
        let same = a.run(|| Ok(here()))?;
        assert_eq!(same, a.id());
        Ok(here())
    });
    assert_eq!(inside.unwrap(), a.id());
    assert_eq!(here(), home);
    let panicked = catch_unwind(AssertUnwindSafe(|| a.run(|| -> io::Result<()> { panic!("inside") })));
    assert!(panicked.is_err());
    assert_eq!(here(), home);
    let failed = a.run(|| Err::<(), _>(io::Error::from(ErrorKind::AddrInUse)));
    assert_eq!(failed.unwrap_err().kind(), ErrorKind::AddrInUse);
    assert_eq!(here(), home);
    assert_eq!(a.try_clone().unwrap().id(), a.id());
}

#[test]
fn only_network_namespaces_are_taken() {
    for path in ["/proc/self/ns/mnt", "/proc/self/ns/uts", "/dev/null", "/proc/self/status"] {
        let file = std::fs::File::open(path).unwrap();
        let error = NetNs::from_fd(OwnedFd::from(file)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path}: {error}");
    }
    assert!(NetNs::open("/proc/self/ns/net").is_ok());
    assert_eq!(NetNs::open("/nonexistent").unwrap_err().kind(), ErrorKind::NotFound);
}

/// As fresh as if asked each time, of the interfaces and not of what a socket may be bound to.
#[test]
fn a_namespace_has_the_addresses_of_its_interfaces() {
    let ns = NetNs::create().unwrap();
    let has = |address: &str| ns.has_address(address.parse().unwrap()).unwrap();
    ip(&ns, "link set lo up");
    ip(&ns, "link add way type veth peer name out");
    ip(&ns, "link set way up");
    assert!(has("127.0.0.1") && has("::1") && has("::ffff:127.0.0.1"));
    assert!(!has("100.64.1.9") && !has("fd00::9"));
    ip(&ns, "address add 100.64.1.9/24 dev way");
    ip(&ns, "address add fd00::9/64 dev way nodad");
    assert!(has("100.64.1.9") && has("fd00::9"));
    assert!(!has("100.64.1.1"), "of its network, but nobody here");
    ip(&ns, "address del 100.64.1.9/24 dev way");
    assert!(!has("100.64.1.9"), "gone at once");
    for host in 1..=200 {
        ip(&ns, &format!("address add 100.64.2.{host}/32 dev way"));
    }
    assert!(has("100.64.2.200") && !has("100.64.2.201"), "after more changes than are taken in at a time");
    ns.run(|| std::fs::write("/proc/sys/net/ipv4/ip_nonlocal_bind", "1")).unwrap();
    assert!(ns.run(|| std::net::TcpListener::bind("100.64.1.9:0")).is_ok(), "could be bound");
    assert!(!has("100.64.1.9"), "and still is not here");
    ip(&ns, "link del way");
    assert!(!has("100.64.2.200") && !has("fd00::9") && has("127.0.0.1"), "gone with their interface");
}

#[tokio::test]
async fn dial_errors_tell_what_happened() {
    let world = World::new();
    let fails = async |to| {
        connect(&world.pod, to, &DialOptions::default(), Duration::from_millis(300)).await.unwrap_err()
    };
    assert!(matches!(fails(addr(CLIENT[0], 1)).await, DialError::Refused(_)));
    assert!(matches!(fails(addr(CLIENT[1], 1)).await, DialError::Refused(_)));
    ip(&world.router, "route add unreachable 203.0.113.0/24");
    assert!(matches!(fails(addr("203.0.113.1", 1)).await, DialError::Unreachable(..)));
    ip(&world.router, "route add blackhole 192.0.2.0/24");
    let blackhole = fails(addr("192.0.2.1", 1)).await;
    assert!(matches!(blackhole, DialError::TimedOut(_)), "{blackhole}");
    let mixed = DialOptions { source: Some(addr(CLIENT[1], 0)), ..DialOptions::default() };
    let error = connect(&world.pod, addr(CLIENT[0], 1), &mixed, SOON).await.unwrap_err();
    assert!(matches!(error, DialError::Other(..)), "{error}");
}

/// Z04, Z114.
#[tokio::test]
async fn socket_options_take_effect() {
    assert!(raise_nofile_limit().unwrap() >= 1024);
    let world = World::new();
    let server = listen_any(&world.client, 8080, None);
    let options = DialOptions {
        nodelay: true,
        keepalive: Some(Keepalive {
            idle: Duration::from_secs(30),
            interval: Duration::from_secs(5),
            count: 3,
        }),
        user_timeout: Some(Duration::from_secs(20)),
        ..DialOptions::default()
    };
    let mut dialed = connect(&world.pod, addr(CLIENT[0], 8080), &options, SOON).await.unwrap();
    let (mut served, _) = within(server.accept()).await.unwrap();
    tune_accepted(&served, &Keepalive::default(), None).unwrap();
    assert!(served.nodelay().unwrap() && dialed.nodelay().unwrap());
    let seen = socket2::SockRef::from(&dialed);
    assert!(seen.keepalive().unwrap());
    assert_eq!(seen.tcp_keepalive_time().unwrap(), Duration::from_secs(30));
    assert_eq!(seen.tcp_user_timeout().unwrap(), Some(Duration::from_secs(20)));
    assert_eq!(socket2::SockRef::from(&served).tcp_keepalive_retries().unwrap(), 9);
    exchange(&mut dialed, &mut served).await;
    let info = tcp_info(&dialed).unwrap();
    assert_eq!(info.state, TcpState::Established);
    assert!(info.rtt > Duration::ZERO && info.mss > 500, "{info:?}");

    arm_reset(&served).unwrap();
    drop(served);
    let error = within(dialed.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_capture_sees_what_passes_an_interface_and_a_bridge() {
    let world = World::new();
    // A bridge between two more namespaces: what it forwards is not addressed to it.
    let (fabric, a, b) = (NetNs::create().unwrap(), NetNs::create().unwrap(), NetNs::create().unwrap());
    ip(&fabric, "link add br0 type bridge");
    ip(&fabric, "link set br0 up");
    for (n, ns) in [(1, &a), (2, &b)] {
        use std::os::fd::{AsFd, AsRawFd};
        let path = format!("/proc/{}/fd/{}", std::process::id(), ns.as_fd().as_raw_fd());
        ip(&fabric, &format!("link add p{n} type veth peer name eth0 netns {path}"));
        ip(&fabric, &format!("link set p{n} master br0 up"));
        ip(ns, &format!("addr add 10.7.0.{n}/24 dev eth0"));
        ip(ns, "link set eth0 up");
    }
    let options = || CaptureOptions::default().marker("MARKER-1").marker("never").keep(1 << 20);
    for (ns, interface, from, to, target) in [
        (&*world.router, "veth2", &*world.client, &*world.pod, addr(POD[1], 8080)),
        (&*world.router, "veth1", &*world.client, &*world.pod, addr(POD[0], 8080)),
        (&fabric, "br0", &a, &b, addr("10.7.0.2", 8080)),
    ] {
        let capture = Capture::start(ns, interface, options()).unwrap();
        let server = listen(to, target);
        let mut client = dial(from, target, None).await.unwrap();
        let (mut served, _) = within(server.accept()).await.unwrap();
        client.write_all(b"one way: MARKER-1.").await.unwrap();
        within(served.read_exact(&mut [0; 18])).await.unwrap();
        served.write_all(b"back: MARKER-1.").await.unwrap();
        within(client.read_exact(&mut [0; 15])).await.unwrap();
        let report = capture.stop().unwrap();
        assert_eq!(report.hits(b"MARKER-1"), 2, "{interface}");
        assert_eq!(report.hits(b"never"), 0);
        assert_eq!(report.dropped, 0);
        assert!(report.port(8080) >= 5, "{interface}: {:?}", report.port_packets);
        assert_eq!(report.port(15008), 0);
        assert_eq!(report.kept.len() as u64, report.packets);
        assert_eq!(report.kept.iter().map(Vec::len).sum::<usize>() as u64, report.bytes);
    }
    assert!(Capture::start(&fabric, "nothing", options()).is_err());
}

#[tokio::test]
async fn a_monitor_hears_of_changes_in_its_namespace_only() {
    let (ns, other) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    let mut monitor = Monitor::open(&ns).unwrap();
    let mut batch = Batch::new();
    batch.add_table("elsewhere").commit(&other).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(50), monitor.next()).await.is_err());
    batch.commit(&ns).unwrap();
    let change = within(monitor.next()).await.unwrap();
    let Changes::Committed { pid, process } = change else { panic!("{change:?}") };
    assert!(pid.is_some() && process.is_some());
}

/// With a descriptor in reserve the connection that has waited longest is told, and none that does not exist.
#[tokio::test]
async fn one_in_reserve() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = Acceptor::new(listener).unwrap();
    let reserve = Reserve::new().unwrap();
    assert!(!reserve.refuse_one(&acceptor), "nobody waits");
    let mut first = tokio::net::TcpStream::connect(address).await.unwrap();
    let _second = tokio::net::TcpStream::connect(address).await.unwrap();
    assert!(reserve.refuse_one(&acceptor));
    assert_eq!(first.read_u8().await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let (_stream, peer) = within(acceptor.accept()).await.unwrap();
    assert_eq!(peer, _second.local_addr().unwrap());
    assert!(exhausted(&io::Error::from_raw_os_error(24)) && exhausted(&io::Error::from_raw_os_error(23)));
    assert!(!exhausted(&io::Error::from(ErrorKind::ConnectionAborted)));
}
