//! The proxy as a process: its ports, its sockets, its limit of open files. It has an agent that hands it one pod, and no control
//! plane. As root only.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]
#![allow(clippy::needless_update, reason = "messages may grow")]

mod agent_support;

use std::collections::BTreeSet;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use agent_support::{SOON, eventually, ip, run_in};
use culvert_net::NetNs;
use culvert_net::seqpacket::{SeqPacket, SeqPacketListener};
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    AddWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse, workload_response,
};
use prost::Message;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use socket2::{SockRef, Type};

/// Of the mesh's own (C40).
const MARK: u32 = 0x539;

struct Proxy {
    child: Child,
    own: NetNs,
    pod: NetNs,
    _agent: SeqPacket,
    _dir: tempfile::TempDir,
}

impl Proxy {
    /// Started with a soft limit of 256 open files and a hard one of 4096; serves one pod when this returns.
    async fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (own, pod) = (NetNs::create().unwrap(), NetNs::create().unwrap());
        ip(&own, "link set lo up");
        ip(&pod, "link set lo up");
        let path = |name: &str| dir.path().join(name);
        let key = rcgen::KeyPair::generate().unwrap();
        let root = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        fs::write(path("root.pem"), root.pem()).unwrap();
        fs::write(path("token"), "token").unwrap();
        fs::set_permissions(path("token"), fs::Permissions::from_mode(0o600)).unwrap();
        let agent = SeqPacketListener::bind(path("zds.sock")).unwrap();
        let mut command = Command::new("prlimit");
        command
            .args(["--nofile=256:4096", env!("CARGO_BIN_EXE_ztunnel"), "proxy", "--node=n", "--workers=1"])
            // Nobody listens there: connections wait for their pod to become known.
            .args(["--xds-address=https://127.0.0.1:1", "--xds-server-name=controller.test"])
            .arg(format!("--xds-root-cert={}", path("root.pem").display()))
            .arg(format!("--token-file={}", path("token").display()))
            .arg(format!("--zds-socket={}", path("zds.sock").display()))
            .args(arguments)
            .stdout(Stdio::null());
        let child = own.run(|| command.spawn()).unwrap();
        let agent = tokio::time::timeout(SOON, agent.accept()).await.unwrap().unwrap();
        let hello = agent.recv().await.unwrap();
        assert!(hello.is_some(), "the proxy says hello");
        let info = WorkloadInfo {
            name: "cart".into(),
            namespace: "shop".into(),
            service_account: "cart".into(),
            ..WorkloadInfo::default()
        };
        let add = AddWorkload { uid: "uid-cart".into(), workload_info: Some(info), ..AddWorkload::default() };
        for (payload, netns) in
            [(Payload::Add(add), Some(pod.as_fd())), (Payload::SnapshotSent(SnapshotSent::default()), None)]
        {
            let request = WorkloadRequest { payload: Some(payload) };
            agent.send(&request.encode_to_vec(), netns).await.unwrap();
            let (bytes, _) = agent.recv().await.unwrap().unwrap();
            let answer = WorkloadResponse::decode(bytes.as_slice()).unwrap().payload.unwrap();
            let workload_response::Payload::Ack(ack) = answer;
            assert_eq!(ack.error, "");
        }
        Self { child, own, pod, _agent: agent, _dir: dir }
    }

    /// Every socket of the process that is in `netns`, as a descriptor of the test's own.
    fn sockets(&self, netns: &NetNs) -> Vec<OwnedFd> {
        let inodes: BTreeSet<String> = table(netns).into_iter().map(|entry| entry.inode).collect();
        let pid = self.child.id();
        let process = pidfd_open(Pid::from_raw(pid as i32).unwrap(), PidfdFlags::empty()).unwrap();
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let of_netns = descriptors.filter_map(|entry| {
            let entry = entry.ok()?;
            let link = fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
            let inode = link.strip_prefix("socket:[")?.strip_suffix(']')?;
            let number = entry.file_name().to_string_lossy().parse().ok()?;
            inodes.contains(inode).then(|| pidfd_getfd(&process, number, PidfdGetfdFlags::empty()).unwrap())
        });
        of_netns.collect()
    }

    fn dial(&self, port: u16) -> TcpStream {
        self.pod.run(|| TcpStream::connect(("127.0.0.1", port))).unwrap()
    }

    fn lowest_unused_file(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let used: BTreeSet<usize> =
            open.map(|it| it.unwrap().file_name().to_string_lossy().parse().unwrap()).collect();
        (0..).find(|number| !used.contains(number)).unwrap()
    }

    fn limit_open_files(&self, limit: usize) {
        let ran = Command::new("prlimit")
            .args(["--pid", &self.child.id().to_string(), &format!("--nofile={limit}:4096")])
            .status();
        assert!(ran.unwrap().success());
    }

    /// The value of a line of the metrics.
    fn metric(&self, line: &str) -> f64 {
        let mut stream = self.own.run(|| TcpStream::connect("127.0.0.1:15020")).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let line = format!("{line} ");
        let value = text.lines().find_map(|found| found.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("no {line}in {text}")).parse().unwrap()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A line of /proc/net/tcp and its like.
struct Entry {
    protocol: &'static str,
    local: SocketAddr,
    listens: bool,
    inode: String,
}

fn table(netns: &NetNs) -> Vec<Entry> {
    let mut entries = Vec::new();
    for protocol in ["tcp", "tcp6", "udp", "udp6"] {
        // The calling thread's: it is the one that is in the namespace.
        let text = netns.run(|| fs::read_to_string(format!("/proc/thread-self/net/{protocol}"))).unwrap();
        for line in text.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (address, port) = words[1].split_once(':').unwrap();
            let local = SocketAddr::new(address_of(address), u16::from_str_radix(port, 16).unwrap());
            entries.push(Entry { protocol, local, listens: words[3] == "0A", inode: words[9].to_owned() });
        }
    }
    entries
}

/// Words of 32 bits, each in the machine's order.
fn address_of(hex: &str) -> std::net::IpAddr {
    let word = |at: usize| u32::from_str_radix(&hex[at..at + 8], 16).unwrap().to_ne_bytes();
    if hex.len() == 8 {
        return word(0).into();
    }
    let bytes: Vec<u8> = [0, 8, 16, 24].into_iter().flat_map(word).collect();
    <[u8; 16]>::try_from(bytes).unwrap().into()
}

/// What is listened on, and UDP ports, in words.
fn ports(netns: &NetNs) -> BTreeSet<String> {
    let served = |entry: &Entry| entry.listens || entry.protocol.starts_with("udp");
    let words = |entry: Entry| format!("{} {}", entry.protocol.trim_end_matches('6'), entry.local);
    table(netns).into_iter().filter(served).map(words).collect()
}

fn set(words: &[&str]) -> BTreeSet<String> {
    words.iter().map(ToString::to_string).collect()
}

/// Z01: all ports in the pod's namespace, and all in the proxy's own, and no other. SOCKS5 only where it is switched on.
#[tokio::test]
async fn every_port_and_no_other() {
    let in_pod = [
        "tcp [::]:15001",
        "tcp [::]:15006",
        "tcp [::]:15008",
        "tcp 127.0.0.1:15053",
        "tcp [::1]:15053",
        "udp 127.0.0.1:15053",
        "udp [::1]:15053",
    ];
    let own = ["tcp 127.0.0.1:15000", "tcp [::]:15020", "tcp [::]:15021"];
    let proxy = Proxy::start(&[]).await;
    assert_eq!(ports(&proxy.pod), set(&in_pod));
    assert_eq!(ports(&proxy.own), set(&own));
    drop(proxy);
    let proxy = Proxy::start(&["--socks5"]).await;
    assert_eq!(ports(&proxy.pod), set(&[&in_pod[..], &["tcp 127.0.0.1:15080"]].concat()));
}

/// Z04: started with a soft limit of 256 open files, it has all that the hard limit allows.
#[tokio::test]
async fn open_files_up_to_the_hard_limit() {
    let proxy = Proxy::start(&[]).await;
    let limits = fs::read_to_string(format!("/proc/{}/limits", proxy.child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let files: Vec<&str> = files.split_whitespace().skip(3).take(2).collect();
    assert_eq!(files, ["4096", "4096"]);
    // What follows from it: two for each connection, and some for the rest.
    assert_eq!(proxy.metric(r#"culvert_limit_bound{limit="connections"}"#), 1536.0);
    assert_eq!(proxy.metric(r#"culvert_limit_bound{limit="pod_connections"}"#), 768.0);
}

/// Z114: no delay, keepalive after 180 s, 9 probes of 180 s, and no user timeout unless asked for, on live sockets. Z115: the mark on
/// every socket of the proxy in the pod, listening or accepted, TCP or UDP.
#[tokio::test]
async fn every_socket_in_a_pod() {
    for (arguments, time, timeout) in [
        (&["--socks5"][..], 180, None),
        (&["--keepalive-time=60s", "--tcp-user-timeout=45s"], 60, Some(Duration::from_secs(45))),
    ] {
        let proxy = Proxy::start(arguments).await;
        let _held: Vec<_> = [15001, 15006, 15008, 15053].into_iter().map(|port| proxy.dial(port)).collect();
        // 15006 has nowhere to go and is reset at once.
        let accepted = || {
            let sockets = proxy.sockets(&proxy.pod);
            sockets.into_iter().filter(|fd| SockRef::from(fd).peer_addr().is_ok()).count()
        };
        eventually("connections are accepted", || accepted() >= 3).await;
        let mut tuned = 0;
        for fd in proxy.sockets(&proxy.pod) {
            let socket = SockRef::from(&fd);
            assert_eq!(socket.mark().unwrap(), MARK, "{:?}", socket.local_addr());
            let local = socket.local_addr().unwrap().as_socket().unwrap();
            let carries = matches!(local.port(), 15001 | 15008);
            if socket.r#type().unwrap() == Type::STREAM && socket.peer_addr().is_ok() && carries {
                assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
                assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(time));
                assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(180));
                assert_eq!(socket.tcp_keepalive_retries().unwrap(), 9);
                assert_eq!(socket.tcp_user_timeout().unwrap(), timeout);
                tuned += 1;
            }
        }
        assert_eq!(tuned, 2, "one for each of the two ports");
    }
}

/// Z115 (ours is larger): at least 128 connections wait on each port while the proxy is busy; what is bounded is said by the
/// kernel.
#[tokio::test]
async fn the_backlog() {
    let proxy = Proxy::start(&["--socks5"]).await;
    let listening = run_in(&proxy.pod, "ss", "-H -l -t -n");
    let backlogs: Vec<u32> =
        listening.lines().map(|line| line.split_whitespace().nth(2).unwrap().parse().unwrap()).collect();
    assert_eq!(backlogs.len(), 6, "{listening}");
    assert!(backlogs.iter().all(|backlog| *backlog >= 128), "{listening}");
}

/// Out of descriptors: what waits is told one by one, accepting does not spin, and once there are descriptors again everything is
/// as before.
#[tokio::test]
async fn out_of_descriptors() {
    const REACHED: &str = r#"culvert_limit_reached_total{limit="descriptors"}"#;
    let proxy = Proxy::start(&[]).await;
    assert_eq!(proxy.metric(REACHED), 0.0);
    let listening = proxy.sockets(&proxy.pod).len();
    // The limit is one of numbers: none is left below it, so only the one in reserve can be used.
    proxy.limit_open_files(proxy.lowest_unused_file());
    let waiting: Vec<_> = (0..20).map(|_| proxy.dial(15001)).collect();
    let reset = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        matches!(stream.read(&mut [0]), Err(error) if error.kind() == ErrorKind::ConnectionReset)
    };
    // A socket says once that it was reset.
    let mut told = BTreeSet::new();
    eventually("some are told", || {
        told.extend(waiting.iter().enumerate().filter(|(_, stream)| reset(stream)).map(|(number, _)| number));
        told.len() >= 8
    })
    .await;
    proxy.limit_open_files(4096);
    let reached = proxy.metric(REACHED);
    // The pauses double from 10 ms to 500 ms: a spin would be thousands.
    assert!((3.0..100.0).contains(&reached), "{reached} times");
    drop(waiting);
    // Those of the pod alone: elsewhere the proxy looks for its control plane, and answers the question for metrics.
    let of_pod = || proxy.sockets(&proxy.pod).len();
    eventually("all are closed", || of_pod() <= listening).await;
    let served = proxy.dial(15001);
    eventually("and served again", || of_pod() > listening).await;
    assert!(!reset(&served));
}

/// Z104: the further names, from a proxy that runs. Z102: the connections to the control plane that could not be made.
#[tokio::test]
async fn every_metric() {
    let proxy = Proxy::start(&[]).await;
    // To the proxy's own port: refused, and counted (Z107 differs).
    drop(proxy.dial(15006));
    let text = || {
        let mut stream = proxy.own.run(|| TcpStream::connect("127.0.0.1:15020")).unwrap();
        stream.write_all(b"GET /stats/prometheus HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let has = |start: &str| text().lines().any(|line| line.starts_with(start));
    for start in [
        "istio_tcp_connections_failed_total{reporter=\"destination\"",
        "istio_xds_connection_terminations_total{reason=",
    ] {
        eventually(start, || has(start)).await;
    }
    let build = format!("istio_build{{component=\"ztunnel\",tag=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
    for start in [
        build.as_str(),
        "istio_tcp_sockets_open 0",
        "istio_on_demand_dns_total 0",
        "workload_manager_active_proxy_count 1",
        "workload_manager_pending_proxy_count 0",
        "workload_manager_proxies_started_total 1",
        "workload_manager_proxies_stopped_total 0",
        "tokio_num_workers 1",
        "tokio_num_alive_tasks ",
        "process_open_fds ",
        "process_max_fds 4096",
        "process_resident_memory_bytes ",
        "process_cpu_seconds_total ",
        "process_start_time_seconds ",
        "culvert_limit_used{limit=\"connections\"} ",
        "culvert_tunnels{direction=\"outbound\"} 0",
    ] {
        assert!(has(start), "{start} in {}", text());
    }
}
