//! A whole agent on a node of its own, as in a cluster: an API server, a proxy, the CNI plugin and its configuration, pods as bare namespaces.
//! Only the API server and /proc are not the real ones. Needs root.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::{Duration, Instant};

use culvert_net::netns::NetNs;
use culvert_net::{probes, redirect};
use culvert_runtime::tasks::{Tasks, Waited};
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::fake_api::{Asked, FakeApi, list, refusal};
use super::{AgentConfig, AgentPorts, KubernetesConfig, SourceKind, life};
use crate::authority::Authority;
use crate::cni::{Invocation, PLUGIN, execute};
use crate::pod_tests::shared;
use crate::pods::{Pods, run_zds};

const SOON: Duration = Duration::from_secs(10);
const SETS: &str = "/apis/apps/v1/namespaces/culvert-system/daemonsets";
const CONF: &str = r#"{"cniVersion":"1.0.0","name":"k","plugins":[{"type":"bridge"}]}"#;

struct World {
    dir: tempfile::TempDir,
    node: Arc<NetNs>,
    api: FakeApi,
    /// With this the API server refuses everything, if it is not 0.
    refuses: Arc<AtomicU16>,
    /// Pod `a` runs, with an annotation that says so.
    runs: Arc<AtomicBool>,
    tasks: Tasks,
    agent: Option<oneshot::Sender<()>>,
}

impl World {
    /// With a pod `a` of an ambient namespace, whose sandbox is being made, and one that stays outside.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["bin", "net.d", "run", "account", "netns", "proc/1/ns"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("account/token"), "secret").unwrap();
        fs::write(dir.path().join("account/ca.crt"), "ca").unwrap();
        fs::write(dir.path().join("net.d/10-k.conflist"), CONF).unwrap();
        let node = Arc::new(NetNs::create().unwrap());
        symlink(path_of(&node), dir.path().join("proc/1/ns/net")).unwrap();
        let refuses = Arc::new(AtomicU16::new(0));
        let runs = Arc::new(AtomicBool::new(false));
        let (refused, running) = (Arc::clone(&refuses), Arc::clone(&runs));
        let api = FakeApi::start(move |asked: &Asked| match refused.load(Ordering::Relaxed) {
            0 => answer(asked, running.load(Ordering::Relaxed)),
            code => refusal(code),
        })
        .await;
        Self { dir, node, api, refuses, runs, tasks: Tasks::new("test"), agent: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn start(&mut self) {
        let kubernetes = KubernetesConfig {
            host_proc: self.path("proc"),
            netns_dir: self.path("netns"),
            cni_bin_dir: self.path("bin"),
            cni_conf_dir: self.path("net.d"),
            run_dir: self.path("run"),
            account_dir: self.path("account"),
            ..KubernetesConfig::default()
        };
        let anywhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let config = AgentConfig {
            node: "n".into(),
            source: SourceKind::Kubernetes,
            manifests: None,
            state: None,
            zds_socket: Some(self.path("zds.sock")),
            last_good: None,
            node_netns: None,
            exclude_namespaces: vec!["kube-system".into()],
            enablement_selectors: "[]".parse().unwrap(),
            dns_capture: true,
            kubelet_uid: 0,
            kubelet_cgroup: None,
            ports: AgentPorts { metrics: anywhere, readiness: anywhere, admin: anywhere },
            kubernetes,
        };
        let (stop, stopped) = oneshot::channel::<()>();
        self.agent = Some(stop);
        let client = self.api.client.clone();
        self.tasks.spawn("agent", async move {
            let tasks = Tasks::new("agent");
            let stop = async { drop(stopped.await) };
            Box::pin(life::serve(&config, None, &tasks, Some(client), stop)).await.unwrap();
            tasks.abort_all();
            assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        });
    }

    /// As kubelet ends it; returns when it has ended.
    async fn stop(&mut self) {
        drop(self.agent.take());
        let tasks = std::mem::replace(&mut self.tasks, Tasks::new("test"));
        tasks.close();
        assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        assert_eq!(tasks.panics(), 0);
    }

    fn pod(&self, name: &str) -> Arc<NetNs> {
        let netns = Arc::new(NetNs::create().unwrap());
        netns.run(|| Command::new("ip").args(["link", "set", "lo", "up"]).status()).unwrap();
        symlink(path_of(&netns), self.path("netns").join(name)).unwrap();
        netns
    }

    fn conf(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path("net.d/10-k.conflist")).unwrap()).unwrap()
    }

    /// What the runtime does for a pod, by the entry that is in the configuration.
    async fn add(&self, name: &str) -> bool {
        let mut conf = self.conf()["plugins"][1].clone();
        conf["cniVersion"] = json!("1.0.0");
        conf["name"] = json!("k");
        conf["prevResult"] = json!({"cniVersion": "1.0.0", "ips": [{"address": "100.64.1.2/24"}]});
        let invocation = Invocation {
            command: Some("ADD".into()),
            netns: self.path("netns").join(name),
            args: format!("K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={}", uid(name)),
        };
        tokio::task::spawn_blocking(move || execute(&invocation, &conf.to_string()).is_ok()).await.unwrap()
    }
}

fn path_of(netns: &NetNs) -> String {
    format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd())
}

fn uid(name: &str) -> &'static str {
    if name == "a" { "0f3a2b1c-1111-2222-3333-444455556666" } else { "uid" }
}

fn pod(name: &str, mode: &str, runs: bool) -> Value {
    let annotations = if runs { json!({"ambient.istio.io/redirection": "enabled"}) } else { json!({}) };
    let status = match runs {
        true => json!({"phase": "Running", "podIPs": [{"ip": "100.64.1.2"}]}),
        false => json!({"phase": "Pending"}),
    };
    json!({"metadata": {"name": name, "namespace": "shop", "uid": uid(name), "annotations": annotations,
            "labels": {"istio.io/dataplane-mode": mode}},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "readinessProbe": {"tcpSocket": {"port": 8080}}}]},
        "status": status})
}

fn daemonset() -> Value {
    json!({"metadata": {"name": "culvert-agent", "resourceVersion": "1"}, "spec": {"selector": {}, "template": {}}})
}

fn answer(asked: &Asked, runs: bool) -> (u16, Value) {
    match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/api/v1/pods") => list(&[pod("a", "ambient", runs), pod("b", "none", false)]),
        ("GET", "/api/v1/namespaces") => list(&[json!({"metadata": {"name": "shop"}})]),
        ("GET", SETS) => list(&[daemonset()]),
        ("GET", path) if path.starts_with(SETS) => (200, daemonset()),
        ("PATCH", _) => (200, json!({"metadata": {}, "spec": {"containers": []}})),
        _ => refusal(404),
    }
}

async fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: it never came");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn has_rules(netns: &NetNs) -> bool {
    redirect::is_installed(netns).unwrap()
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().count() == 0
}

/// C16, C17, C29, C31, C33, C79, C80, C81, H18, H19, TRAP20: a pod starts when its traffic is the mesh's. An agent that is replaced leaves all of it; one whose chart is
/// removed leaves nothing, though it may ask and write nothing any more, not even what it knew nothing of.
#[tokio::test]
async fn a_node_is_left_as_it_should_be() {
    let mut world = World::new().await;
    let (a, b, stray) = (world.pod("a"), world.pod("b"), world.pod("stray"));
    redirect::install(&stray, &redirect::RedirectConfig::default()).unwrap();
    world.start();
    eventually("the plugin is installed", || world.conf()["plugins"][1]["type"] == PLUGIN).await;
    let (proxy, _drain) = shared(&Authority::new(), None);
    let served = Pods::new(proxy);
    let proxies = Tasks::new("proxy");
    let (socket, followed) = (world.path("zds.sock"), served.clone());
    proxies.spawn("proxy", async move { drop(run_zds(&socket, followed).await) });

    eventually("the agent listens", || world.path("run/pluginevent.sock").exists()).await;
    assert!(world.add("a").await && world.add("b").await);
    assert!(has_rules(&a) && !has_rules(&b));
    assert_eq!(served.all().len(), 1);
    let enabled = |it: &Asked| it.path.ends_with("/shop/pods/a/status") && it.body.contains("\"enabled\"");
    tokio::time::timeout(SOON, world.api.until(enabled)).await.unwrap();
    assert_eq!(probes::targets(&world.node), ["100.64.1.2:8080".parse().unwrap()].into());

    // It is replaced.
    world.stop().await;
    assert!(has_rules(&a) && world.path("bin").join(PLUGIN).exists());
    assert_eq!(world.conf()["plugins"][1]["type"], PLUGIN);
    assert_eq!(probes::targets(&world.node).len(), 1);
    assert_eq!(served.all().len(), 1);

    // Its successor, who has not heard the plugin, finds it by its processes.
    let process = world.path("proc/20");
    fs::create_dir_all(process.join("ns")).unwrap();
    symlink(path_of(&a), process.join("ns/net")).unwrap();
    fs::write(process.join("cgroup"), format!("0::/kubepods/pod{}/c\n", uid("a"))).unwrap();
    fs::write(process.join("stat"), format!("20 (x) S {}7 0", "0 ".repeat(18))).unwrap();
    world.runs.store(true, Ordering::Relaxed);
    world.start();
    let watching = |it: &&Asked| it.is_watch() && it.path == SETS;
    eventually("it watches its DaemonSet", || world.api.asked().iter().filter(watching).count() == 2).await;
    eventually("it listens", || {
        std::os::unix::net::UnixStream::connect(world.path("run/pluginevent.sock")).is_ok()
    })
    .await;
    assert!(has_rules(&a));
    assert_eq!(served.all().len(), 1);
    // And once more when the proxy has found it.
    assert!(world.add("a").await);

    // The chart is removed: DaemonSet, then rights, then kubelet ends the agent.
    world.api.show(SETS, "DELETED", &daemonset());
    let cleared =
        |it: &Asked| it.path.ends_with("/shop/pods/a/status") && it.body.contains("redirection\":null");
    tokio::time::timeout(SOON, world.api.until(cleared)).await.unwrap();
    world.refuses.store(403, Ordering::Relaxed);
    let begun = Instant::now();
    world.stop().await;
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    for (name, netns) in [("a", &a), ("b", &b), ("stray", &stray)] {
        assert!(!has_rules(netns), "{name}");
    }
    assert_eq!(world.conf(), serde_json::from_str::<Value>(CONF).unwrap());
    assert!(is_empty(&world.path("bin")) && is_empty(&world.path("run")) && !world.path("zds.sock").exists());
    let tables = world.node.run(|| Command::new("nft").args(["list", "tables"]).output()).unwrap();
    assert_eq!(String::from_utf8_lossy(&tables.stdout), "");
    assert!(served.all().is_empty());
    proxies.abort_all();
}

/// C79: an agent that never heard from the API server leaves nothing either.
#[tokio::test]
async fn a_node_is_left_by_an_agent_that_knew_no_pod() {
    let mut world = World::new().await;
    let stray = world.pod("stray");
    redirect::install(&stray, &redirect::RedirectConfig::default()).unwrap();
    // From before.
    fs::write(world.path("bin").join(PLUGIN), "old").unwrap();
    world.refuses.store(403, Ordering::Relaxed);
    world.start();
    eventually("the plugin is repaired meanwhile", || world.conf()["plugins"][1]["type"] == PLUGIN).await;
    let claims =
        base64::Engine::encode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, r#"{"exp":99999999999}"#);
    fs::write(world.path("account/token"), format!("e30.{claims}.x")).unwrap();
    world.refuses.store(401, Ordering::Relaxed);
    world.stop().await;
    assert!(!has_rules(&stray) && is_empty(&world.path("bin")));
    assert_eq!(world.conf(), serde_json::from_str::<Value>(CONF).unwrap());
}
