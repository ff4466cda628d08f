//! An agent on directories in a temporary place, pods as bare namespaces, and proxies that only speak the node-agent protocol.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use culvert_net::redirect::{RedirectConfig, Verdict, verify};
use culvert_net::seqpacket::SeqPacket;
use culvert_net::{NetNs, NetNsId};
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    Ack, Version, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use culvert_runtime::tasks::{Task, Tasks, Waited};
use culvert_ztunnel::agent::{AgentConfig, AgentPorts, KubernetesConfig, SourceKind, run_until};
use parking_lot::Mutex;
use prost::Message;
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// Nothing here takes longer unless it is broken.
pub const SOON: Duration = Duration::from_secs(10);

pub struct World {
    dir: tempfile::TempDir,
    node: Arc<NetNs>,
    tasks: Tasks,
    agent: Option<oneshot::Sender<()>>,
    pub ports: AgentPorts,
    /// Namespaces whose pods never join, as the next agent is told.
    pub excluded: Vec<String>,
}

#[derive(Clone)]
pub struct Pod {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub netns: Arc<NetNs>,
}

impl World {
    /// With one namespace that joins, `shop`, and one that does not, `outside`.
    pub fn new() -> Self {
        Self::on(Arc::new(NetNs::create().unwrap()))
    }

    /// On a node of the test's own.
    pub fn on(node: Arc<NetNs>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for sub in ["manifests", "netns", "state/status/pods", "state/nodes/node-a/redirection"] {
            fs::create_dir_all(dir.path().join(sub)).unwrap();
        }
        let world = Self {
            dir,
            node,
            tasks: Tasks::new("test"),
            agent: None,
            ports: free_ports(),
            excluded: vec!["kube-system".into()],
        };
        world.namespace("shop", "ambient");
        world.namespace("outside", "none");
        world
    }

    pub fn start(&mut self) {
        assert!(self.agent.is_none());
        let (stop, stopped) = oneshot::channel();
        let config = AgentConfig {
            node: "node-a".into(),
            source: SourceKind::Directory,
            manifests: Some(self.path("manifests")),
            state: Some(self.path("state")),
            zds_socket: None,
            last_good: None,
            node_netns: Some(ns_path(&self.node)),
            exclude_namespaces: self.excluded.clone(),
            enablement_selectors: "[]".parse().unwrap(),
            dns_capture: true,
            kubelet_uid: 0,
            kubelet_cgroup: None,
            ports: self.ports,
            kubernetes: KubernetesConfig::default(),
        };
        self.agent = Some(stop);
        self.tasks.spawn("agent", async move {
            run_until(config, None, async { drop(stopped.await) }).await.unwrap();
        });
    }

    pub fn node(&self) -> &NetNs {
        &self.node
    }

    /// Returns when the agent is gone.
    pub async fn stop(&mut self) {
        drop(self.agent.take());
        let tasks = std::mem::replace(&mut self.tasks, Tasks::new("test"));
        tasks.close();
        assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        assert_eq!(tasks.panics(), 0);
    }

    pub fn path(&self, sub: &str) -> PathBuf {
        self.dir.path().join(sub)
    }

    pub fn manifest(&self, file: &str, text: &str) {
        write_whole(&self.path("manifests").join(file), text.as_bytes());
    }

    pub fn namespace(&self, name: &str, mode: &str) {
        let labels = json!({"istio.io/dataplane-mode": mode});
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.manifest(&format!("ns-{name}.yaml"), &object.to_string());
    }

    /// The value of a metric, by its name and labels as they are written.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let (_, text) = get(self.ports.metrics, "/metrics").await?;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    pub async fn metric_becomes(&self, name: &str, expected: impl Fn(f64) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let now = self.metric(name).await;
            if now.is_some_and(&expected) {
                return;
            }
            assert!(Instant::now() < deadline, "{name} is {now:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// A pod with this specification of its own.
    pub fn specify(&self, pod: &Pod, containers: &Value) {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": pod.namespace},
            "spec": {"nodeName": "node-a", "containers": containers},
        });
        self.manifest(&format!("pod-{}-{}.yaml", pod.namespace, pod.name), &object.to_string());
    }

    /// A running pod of the node, in the state in which kubelet shows it.
    pub fn pod(&self, namespace: &str, name: &str) -> Pod {
        let netns = Arc::new(NetNs::create().unwrap());
        ip(&netns, "link set lo up");
        self.pod_in(namespace, name, netns)
    }

    pub fn pod_in(&self, namespace: &str, name: &str, netns: Arc<NetNs>) -> Pod {
        self.incarnation(namespace, name, &format!("uid-{name}"), "100.64.1.2", netns)
    }

    /// A pod with a uid and an address of the test's choice.
    pub fn incarnation(&self, namespace: &str, name: &str, uid: &str, ip: &str, netns: Arc<NetNs>) -> Pod {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        let pod = Pod { uid: uid.to_owned(), namespace, name, netns };
        self.mount(&pod);
        self.describe(&pod, &json!({}), &json!({}), false);
        self.status(&pod, "Running", &[ip]);
        pod
    }

    /// The pod is gone, with everything that names it.
    pub fn delete(&self, pod: &Pod) {
        fs::remove_file(self.netns_path(pod)).unwrap();
        fs::remove_file(self.status_path(pod)).unwrap();
        fs::remove_file(self.path(&format!("manifests/pod-{}-{}.yaml", pod.namespace, pod.name))).unwrap();
    }

    /// Puts the pod's namespace where its status says that it is.
    pub fn mount(&self, pod: &Pod) {
        let path = self.netns_path(pod);
        let _ = fs::remove_file(&path);
        symlink(ns_path(&pod.netns), path).unwrap();
    }

    pub fn netns_path(&self, pod: &Pod) -> PathBuf {
        self.path("netns").join(&pod.uid)
    }

    pub fn describe(&self, pod: &Pod, labels: &Value, annotations: &Value, host_network: bool) {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name, "namespace": pod.namespace, "labels": labels, "annotations": annotations},
            "spec": {"nodeName": "node-a", "hostNetwork": host_network, "serviceAccountName": format!("sa-{}", pod.name),
                "containers": [{"name": "main", "image": "none"}]},
        });
        self.manifest(&format!("pod-{}-{}.yaml", pod.namespace, pod.name), &object.to_string());
    }

    pub fn status(&self, pod: &Pod, phase: &str, ips: &[&str]) {
        self.raw_status(pod, &json!({"netns": self.netns_path(pod), "phase": phase, "podIPs": ips}));
    }

    pub fn raw_status(&self, pod: &Pod, more: &Value) {
        let mut status = json!({"uid": pod.uid, "namespace": pod.namespace, "name": pod.name, "nodeName": "node-a", "ready": true});
        status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        write_whole(&self.status_path(pod), status.to_string().as_bytes());
    }

    pub fn status_path(&self, pod: &Pod) -> PathBuf {
        self.path("state/status/pods").join(format!("{}.{}.json", pod.namespace, pod.name))
    }

    /// What the agent reports of a pod: `enabled`, `pending` or nothing, and the error.
    pub fn report(&self, pod: &Pod) -> Option<(String, Option<String>)> {
        let path = self.path("state/nodes/node-a/redirection").join(format!("{}.json", pod.uid));
        let report: Value = serde_json::from_slice(&fs::read(path).ok()?).unwrap();
        let text = |key: &str| report.get(key).map(|it| it.as_str().unwrap().to_owned());
        Some((text("redirection").unwrap(), text("error")))
    }

    pub fn is_enabled(&self, pod: &Pod) -> bool {
        self.report(pod).is_some_and(|(redirection, _)| redirection == "enabled")
    }

    pub async fn enabled(&self, pod: &Pod) {
        eventually(&format!("{} is enabled", pod.name), || self.is_enabled(pod)).await;
        assert_eq!(verify(&pod.netns, &RedirectConfig::default()).unwrap(), Verdict::Intact);
    }

    pub async fn not_reported(&self, pod: &Pod) {
        eventually(&format!("{} is not reported", pod.name), || self.report(pod).is_none()).await;
    }

    pub async fn proxy(&self) -> Proxy {
        self.refusing_proxy(&[]).await
    }

    /// A proxy that cannot serve some pods; it has its snapshot when this returns.
    pub async fn refusing_proxy(&self, uids: &[&str]) -> Proxy {
        let socket = self.path("state/nodes/node-a/ztunnel.sock");
        let deadline = Instant::now() + SOON;
        loop {
            let seen = Arc::new(Mutex::new(Seen::default()));
            seen.lock().refuses = uids.iter().map(|uid| (*uid).to_owned()).collect();
            match SeqPacket::connect(&socket).await {
                Ok(connection) => {
                    let task = Tasks::new("proxy").spawn("proxy", speak(connection, seen.clone()));
                    let proxy = Proxy { seen, task };
                    let (complete, ended) = (|| proxy.seen.lock().complete, || proxy.seen.lock().ended);
                    eventually("the proxy has its snapshot", || complete() || ended()).await;
                    if complete() {
                        return proxy;
                    }
                    // It was the agent before that still listened.
                }
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Agents of many tests listen in one namespace. A port that is free now may be another's in a moment, so each is taken from an address
/// of its own: 127.0.0.0/8 is large.
fn free_ports() -> AgentPorts {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed) & 0xff;
    let ip = Ipv4Addr::from_bits(0x7f00_0000 | (std::process::id() & 0xffff) << 8 | n);
    let at = |port| SocketAddr::from((ip, port));
    AgentPorts { metrics: at(15014), readiness: at(8000), admin: at(15010) }
}

/// Takes the name of our table in a namespace, which then cannot be written while this process lives: `owner` tables belong to one
/// netlink socket. It ends when its input does.
pub fn own_table(world: &World, netns: &NetNs) -> std::process::Child {
    use std::io::Write;
    let file = world.path("owner.nft");
    fs::write(
        &file,
        "add table inet culvert\ndelete table inet culvert\nadd table inet culvert { flags owner; }\n",
    )
    .unwrap();
    // Interactive, so that it keeps its socket, and with it the table.
    let mut owner = netns
        .run(|| {
            let (input, output) = (std::process::Stdio::piped(), std::process::Stdio::null());
            Command::new("nft").arg("-i").stdin(input).stdout(output).spawn()
        })
        .unwrap();
    let input = owner.stdin.as_mut().unwrap();
    input.write_all(format!("include \"{}\"\n", file.display()).as_bytes()).unwrap();
    input.flush().unwrap();
    owner
}

/// Status and body of a GET.
pub async fn get(at: SocketAddr, path: &str) -> Option<(u16, String)> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(at).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// A node with a pod (10.2.0.2) and a server elsewhere (10.1.0.2).
pub fn routed() -> (Arc<NetNs>, Arc<NetNs>, Arc<NetNs>) {
    let [client, node, pod] = std::array::from_fn(|_| Arc::new(NetNs::create().unwrap()));
    for ns in [&client, &node, &pod] {
        ip(ns, "link set lo up");
    }
    node.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")).unwrap();
    for (ns, n) in [(&client, 1), (&pod, 2)] {
        ip(&node, &format!("link add veth{n} type veth peer name eth0 netns {}", ns_path(ns).display()));
        ip(&node, &format!("addr add 10.{n}.0.1/24 dev veth{n}"));
        ip(&node, &format!("link set veth{n} up"));
        ip(ns, &format!("addr add 10.{n}.0.2/24 dev eth0"));
        ip(ns, "link set eth0 up");
        ip(ns, &format!("route add default via 10.{n}.0.1"));
    }
    (client, node, pod)
}

/// What a proxy was told.
#[derive(Default)]
pub struct Seen {
    pub pods: BTreeMap<String, (WorkloadInfo, NetNsId)>,
    pub events: Vec<String>,
    pub complete: bool,
    /// The agent is gone.
    pub ended: bool,
    pub refuses: BTreeSet<String>,
}

pub struct Proxy {
    pub seen: Arc<Mutex<Seen>>,
    task: Task,
}

impl Proxy {
    pub fn has(&self, pod: &Pod) -> bool {
        self.seen.lock().pods.get(&pod.uid).is_some_and(|(_, id)| *id == pod.netns.id())
    }

    /// Messages so far, as `add uid`, `del uid` and `snapshot`.
    pub fn events(&self) -> Vec<String> {
        self.seen.lock().events.clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn speak(agent: SeqPacket, seen: Arc<Mutex<Seen>>) {
    let hello = ZdsHello { version: Version::V1.into() };
    if agent.send(&hello.encode_to_vec(), None).await.is_ok() {
        answer(&agent, &seen).await;
    }
    seen.lock().ended = true;
}

async fn answer(agent: &SeqPacket, seen: &Mutex<Seen>) {
    while let Ok(Some((bytes, mut fds))) = agent.recv().await {
        let error = {
            let mut seen = seen.lock();
            match WorkloadRequest::decode(bytes.as_slice()).unwrap().payload.unwrap() {
                Payload::Add(add) => {
                    seen.events.push(format!("add {}", add.uid));
                    let netns = NetNs::from_fd(fds.remove(0)).unwrap();
                    if seen.refuses.contains(&add.uid) {
                        "its ports are taken".to_owned()
                    } else {
                        seen.pods.insert(add.uid, (add.workload_info.unwrap(), netns.id()));
                        String::new()
                    }
                }
                Payload::Del(del) => {
                    seen.events.push(format!("del {}", del.uid));
                    seen.pods.remove(&del.uid);
                    String::new()
                }
                Payload::SnapshotSent(_) => {
                    seen.events.push("snapshot".to_owned());
                    seen.complete = true;
                    String::new()
                }
                Payload::Keep(keep) => panic!("kept {}", keep.uid),
            }
        };
        let payload = Some(workload_response::Payload::Ack(Ack { error }));
        if agent.send(&WorkloadResponse { payload }.encode_to_vec(), None).await.is_err() {
            return;
        }
    }
}

pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "it takes too long until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

pub fn ns_path(ns: &NetNs) -> PathBuf {
    format!("/proc/{}/fd/{}", std::process::id(), ns.as_fd().as_raw_fd()).into()
}

/// Runs a program in a namespace; panics with its message if it fails.
pub fn run_in(ns: &NetNs, program: &str, args: &str) -> String {
    let out = ns.run(|| Command::new(program).args(args.split_whitespace()).output()).unwrap();
    assert!(out.status.success(), "{program} {args}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

pub fn ip(ns: &NetNs, args: &str) -> String {
    run_in(ns, "ip", args)
}

fn write_whole(path: &std::path::Path, bytes: &[u8]) {
    let beside = path.with_file_name(".new");
    fs::write(&beside, bytes).unwrap();
    fs::rename(&beside, path).unwrap();
}
