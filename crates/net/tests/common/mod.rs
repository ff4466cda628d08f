//! A client, a router and a pod, each a namespace:
//!
//! ```text
//! client 10.1.0.2, fd00:1::2 ── router .1 ── pod 10.2.0.2, fd00:2::2
//! ```
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_net::NetNs;
use culvert_net::socket::{ListenOptions, listen_tcp, listen_tcp_any};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

pub const PROXY_MARK: u32 = 0x539;
/// Nothing here takes longer unless it is broken.
pub const SOON: Duration = Duration::from_secs(5);

pub struct World {
    pub client: Arc<NetNs>,
    pub router: Arc<NetNs>,
    pub pod: Arc<NetNs>,
}

pub const CLIENT: [&str; 2] = ["10.1.0.2", "fd00:1::2"];
pub const POD: [&str; 2] = ["10.2.0.2", "fd00:2::2"];

impl World {
    pub fn new() -> Self {
        let [client, router, pod] = std::array::from_fn(|_| Arc::new(NetNs::create().unwrap()));
        for ns in [&client, &router, &pod] {
            ip(ns, "link set lo up");
            // Addresses are ours alone: no waiting for duplicates.
            ns_write(ns, "/proc/sys/net/ipv6/conf/default/accept_dad", "0");
        }
        ns_write(&router, "/proc/sys/net/ipv4/ip_forward", "1");
        ns_write(&router, "/proc/sys/net/ipv6/conf/all/forwarding", "1");
        // Strict source checks, which many machines set, must not break the return path.
        ns_write(&pod, "/proc/sys/net/ipv4/conf/all/rp_filter", "1");
        for (ns, n) in [(&client, 1), (&pod, 2)] {
            let path = format!("/proc/{}/fd/{}", std::process::id(), ns_fd(ns));
            ip(&router, &format!("link add veth{n} type veth peer name eth0 netns {path}"));
            ip(&router, &format!("addr add 10.{n}.0.1/24 dev veth{n}"));
            ip(&router, &format!("addr add fd00:{n}::1/64 dev veth{n} nodad"));
            ip(&router, &format!("link set veth{n} up"));
            ip(ns, &format!("addr add 10.{n}.0.2/24 dev eth0"));
            ip(ns, &format!("addr add fd00:{n}::2/64 dev eth0 nodad"));
            ip(ns, "link set eth0 up");
            ip(ns, &format!("route add default via 10.{n}.0.1"));
            ip(ns, &format!("-6 route add default via fd00:{n}::1"));
        }
        let world = Self { client, router, pod };
        world.wait_until_connected();
        world
    }

    /// A new interface carries IPv6 only some time after it is set up, when the kernel has noticed its carrier.
    fn wait_until_connected(&self) {
        let deadline = Instant::now() + SOON;
        for (from, to) in [(&self.client, POD), (&self.pod, CLIENT)] {
            for ip in to {
                let answered = || {
                    let attempt = from.run(|| {
                        std::net::TcpStream::connect_timeout(&addr(ip, 1), Duration::from_millis(20))
                    });
                    attempt.is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
                };
                while !answered() {
                    assert!(Instant::now() < deadline, "{ip} cannot be reached");
                }
            }
        }
    }
}

fn ns_fd(ns: &NetNs) -> i32 {
    use std::os::fd::AsFd;
    ns.as_fd().as_raw_fd()
}

/// Runs `ip` in a namespace; panics with its message if it fails.
pub fn ip(ns: &NetNs, args: &str) -> String {
    let out = ns.run(|| Command::new("ip").args(args.split_whitespace()).output()).unwrap();
    assert!(out.status.success(), "ip {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub fn ns_write(ns: &NetNs, path: &str, value: &str) {
    ns.run(|| fs::write(path, value)).unwrap();
}

pub fn addr(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse::<IpAddr>().unwrap(), port)
}

pub fn listen_any(ns: &NetNs, port: u16, mark: Option<u32>) -> TcpListener {
    let options = ListenOptions { mark, ..ListenOptions::default() };
    TcpListener::from_std(ns.run(|| listen_tcp_any(port, &options)).unwrap()).unwrap()
}

pub fn listen(ns: &NetNs, at: SocketAddr) -> TcpListener {
    TcpListener::from_std(ns.run(|| listen_tcp(at, &ListenOptions::default())).unwrap()).unwrap()
}

pub fn udp(ns: &NetNs, at: SocketAddr, mark: Option<u32>) -> UdpSocket {
    let deadline = Instant::now() + SOON;
    loop {
        match ns.run(|| culvert_net::socket::bind_udp(at, mark)) {
            // A program that another test starts holds copies of our sockets, closed ones too, until its exec.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {}
            outcome => return UdpSocket::from_std(outcome.unwrap()).unwrap(),
        }
    }
}

/// Connects as a program in the namespace would, marked or not.
pub async fn dial(ns: &NetNs, to: SocketAddr, mark: Option<u32>) -> io::Result<TcpStream> {
    let options = culvert_net::socket::DialOptions { mark, ..Default::default() };
    let socket = culvert_net::socket::socket_for(ns, to, &options)?;
    within(socket.connect(to)).await
}

/// Panics if it takes too long: a lost packet must fail the test, not hang it.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(SOON, future).await.expect("it takes too long")
}

/// Sends `ping` one way and `pong` the other.
pub async fn exchange(a: &mut TcpStream, b: &mut TcpStream) {
    let mut buf = [0; 4];
    a.write_all(b"ping").await.unwrap();
    within(b.read_exact(&mut buf)).await.unwrap();
    assert_eq!(&buf, b"ping");
    b.write_all(b"pong").await.unwrap();
    within(a.read_exact(&mut buf)).await.unwrap();
    assert_eq!(&buf, b"pong");
}
