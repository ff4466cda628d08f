//! Who may bear the address that pods let pass: the kubelet, to ports that are probed. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{CLIENT, POD, World, addr, ip, listen_any, within};
use culvert_net::NetNs;
use culvert_net::probes::{self, Cgroup, Kubelet};
use culvert_net::redirect::{RedirectConfig, install};
use socket2::{Domain, Socket, Type};

const UNBOUND: Kubelet = Kubelet { uid: 0, cgroup: None };
const NOBODY: u32 = 65_534;

/// Whether a process of that user, in that cgroup, can connect.
fn connects(from: &NetNs, uid: u32, cgroup: Option<&Path>, to: SocketAddr) -> bool {
    let join = cgroup.map(|it| format!("echo $$ > {}/cgroup.procs && ", it.display())).unwrap_or_default();
    let script = format!("{join}exec 3<>/dev/tcp/{}/{}", to.ip(), to.port());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).uid(uid).stdin(Stdio::null()).stderr(Stdio::null());
    from.run(|| command.status()).unwrap().success()
}

/// Whether a program that binds to the probe address itself can connect.
fn forges(from: &NetNs, source: &str, to: SocketAddr) -> bool {
    from.run(|| {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.bind(&addr(source, 0).into())?;
        Ok(socket.connect_timeout(&to.into(), Duration::from_millis(300)).is_ok())
    })
    .unwrap()
}

fn targets(ports: &[u16]) -> BTreeSet<SocketAddr> {
    POD.iter().flat_map(|ip| ports.iter().map(|port| addr(ip, *port))).collect()
}

/// A cgroup of version 2 for one test, wherever it is mounted.
struct TestCgroup(PathBuf);

impl TestCgroup {
    fn new() -> Self {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
        let root = mount.expect("cgroup v2 is mounted").split(' ').nth(1).unwrap().to_owned();
        let path = PathBuf::from(root).join(format!("culvert-probes-{}", std::process::id()));
        fs::create_dir_all(path.join("kubelet")).unwrap();
        fs::create_dir_all(path.join("other")).unwrap();
        Self(path)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        for sub in ["kubelet", "other", ""] {
            let _ = fs::remove_dir(self.0.join(sub));
        }
    }
}

/// C42, C50, TRAP4: differently from both, only the kubelet's user is let through, and only to ports that the pod's probes declare.
#[tokio::test]
async fn only_the_kubelet_reaches_only_what_is_probed() {
    let world = World::new();
    let rules = RedirectConfig { probe_ports: BTreeSet::from([8080]), ..RedirectConfig::default() };
    install(&world.pod, &rules).unwrap();
    let probed = listen_any(&world.pod, 8080, None);
    let _other = listen_any(&world.pod, 9090, None);
    for ip in POD {
        assert!(!connects(&world.router, 0, None, addr(ip, 8080)), "without the node's rules it is captured");
    }
    // 9090 is in the node's set, as if another pod had had this address; the pod itself does not let it pass.
    let targets = targets(&[8080, 9090]);
    probes::set(&world.router, UNBOUND, &targets).unwrap();
    assert!(probes::holds(&world.router, UNBOUND, &targets).unwrap());
    assert_eq!(probes::targets(&world.router), targets);
    for (ip, source) in POD.into_iter().zip(["169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"]) {
        assert!(connects(&world.router, 0, None, addr(ip, 8080)), "{ip}");
        let (_, peer) = within(probed.accept()).await.unwrap();
        assert_eq!(culvert_net::socket::canonical(peer).ip(), addr(source, 0).ip());
        assert!(!connects(&world.router, NOBODY, None, addr(ip, 8080)), "another user, {ip}");
        assert!(!connects(&world.router, 0, None, addr(ip, 9090)), "another port, {ip}");
        assert!(!connects(&world.client, 0, None, addr(ip, 8080)), "from elsewhere, {ip}");
        // Whoever gives himself the address: a process of the node, one of another machine.
        for ns in [&world.router, &world.client] {
            self::ip(
                ns,
                &format!("addr add {source}/{} dev lo", if ip.contains(':') { "128 nodad" } else { "32" }),
            );
            assert!(!forges(ns, source, addr(ip, 8080)), "{source} to {ip}");
        }
    }
    // Not in the set: captured, though the pod would let it pass.
    let none_left = BTreeSet::from([addr(POD[0], 1)]);
    probes::set(&world.router, UNBOUND, &none_left).unwrap();
    assert!(!probes::holds(&world.router, UNBOUND, &targets).unwrap());
    assert!(!connects(&world.router, 0, None, addr(POD[0], 8080)));
    probes::set(&world.router, UNBOUND, &BTreeSet::new()).unwrap();
    assert!(probes::holds(&world.router, UNBOUND, &BTreeSet::new()).unwrap());
    // What is not a pod's is as it was.
    let server = listen_any(&world.client, 8080, None);
    assert!(connects(&world.router, 0, None, addr(CLIENT[0], 8080)));
    within(server.accept()).await.unwrap();
}

/// Where there is cgroup v2, other processes of the kubelet's user are kept out too.
#[tokio::test]
async fn a_process_of_root_outside_the_kubelets_cgroup_is_no_kubelet() {
    let world = World::new();
    let rules = RedirectConfig { probe_ports: BTreeSet::from([8080]), ..RedirectConfig::default() };
    install(&world.pod, &rules).unwrap();
    let _probed = listen_any(&world.pod, 8080, None);
    let cgroups = TestCgroup::new();
    let (own, other) = (cgroups.0.join("kubelet"), cgroups.0.join("other"));
    let kubelet = Kubelet { uid: 0, cgroup: Some(Cgroup::open(&own).unwrap()) };
    assert_eq!(kubelet.cgroup.unwrap().level, 2);
    probes::set(&world.router, kubelet, &targets(&[8080])).unwrap();
    assert!(probes::holds(&world.router, kubelet, &targets(&[8080])).unwrap());
    for ip in POD {
        let target = addr(ip, 8080);
        assert!(connects(&world.router, 0, Some(&own), target), "{ip}");
        assert!(!connects(&world.router, 0, Some(&other), target), "{ip}");
        assert!(!connects(&world.router, 0, None, target), "{ip}");
        assert!(!connects(&world.router, NOBODY, None, target), "{ip}");
    }
    assert!(Cgroup::open(Path::new("/proc")).is_err());
}
