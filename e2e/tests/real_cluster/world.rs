//! A cluster with the mesh installed by the chart, and what a test does in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_cluster::files::Files;
use culvert_cluster::images::Image;
use culvert_cluster::{Api, Cluster, Node, Programs, run};
use culvert_e2e::programs;
use culvert_net::capture::{Capture, CaptureOptions, CaptureReport};
use culvert_net::netns::NetNs;
use culvert_sandbox::lab::BRIDGE;
use serde_json::{Value, json};

/// The namespace of the release.
pub const SYSTEM: &str = "culvert-system";
/// What the mesh does by itself within a moment.
pub const MOMENT: Duration = Duration::from_secs(5);
/// What Kubernetes does by itself: starting pods, replacing them.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Of what a capture sees, so much is kept to tell where a marker was seen.
const KEPT: usize = 64 << 20;
/// Version of the chart and of the images.
const TAG: &str = env!("CARGO_PKG_VERSION");

/// See the module. Takes the cluster down when dropped; after a failure the logs are kept, and their place is told.
pub struct World {
    pub cluster: Cluster,
    pub api: Api,
}

impl World {
    /// Starts a cluster and brings every image to its nodes. Nothing is installed yet.
    pub fn start() -> Result<Self> {
        let files = Files::new(std::env::temp_dir().join(format!("culvert-cluster-{}", std::process::id())));
        let cluster = Cluster::up(&files, Programs::new(&kubernetes()?)?).inspect_err(|_| {
            let kept = std::env::temp_dir().join("culvert-cluster-failed");
            let _ = fs::remove_dir_all(&kept);
            let _ = Command::new("cp").arg("-r").arg(files.at("logs")).arg(&kept).output();
            eprintln!("logs are in {}", kept.display());
            let _ = Cluster::down(&files);
        })?;
        let world = Self { api: cluster.api(), cluster };
        images()?.iter().try_for_each(|image| world.bring(image))?;
        Ok(world)
    }

    /// Brings an image to every node.
    pub fn bring(&self, image: &Image) -> Result<()> {
        let files = self.cluster.files();
        let archive = files.at("image.tar");
        image.write(&files.at("image"), &archive)?;
        self.cluster.import(&archive)?;
        Ok(fs::remove_file(&archive)?)
    }

    /// Installs the Gateway API's own definitions, at their standard channel.
    pub fn gateway_api(&self, version: &str) -> Result<()> {
        let module = format!("sigs.k8s.io/gateway-api@{version}");
        let said =
            run(Command::new("go").args(["mod", "download", "-json", &module]).env("GOTOOLCHAIN", "auto"))?;
        let said: Value = serde_json::from_str(&said)?;
        let dir = Path::new(said["Dir"].as_str().context("no directory")?).join("config/crd/standard");
        self.api.kubectl(&["apply", "--server-side", "-f", &dir.to_string_lossy()])?;
        self.api.wait("the kinds of the Gateway API", PATIENCE, |api| {
            let served = api.get("/apis/gateway.networking.k8s.io/v1")?;
            let has = |name: &str| {
                served["resources"].as_array().is_some_and(|all| all.iter().any(|it| it["name"] == name))
            };
            Ok(["httproutes", "grpcroutes", "gateways"].iter().all(|it| has(it)).then_some(()))
        })
    }

    /// Installs the chart with helm and waits until all of it is ready.
    pub fn install(&self, values: &[&str]) -> Result<()> {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert");
        let mut helm = self.api.command("helm");
        helm.args(["upgrade", "--install", "culvert"]).arg(chart);
        helm.args(["--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "90s"]);
        for value in values {
            helm.args(["--set", value]);
        }
        run(&mut helm).map(drop)
    }

    /// Removes the chart and waits until its pods have gone.
    pub fn uninstall(&self) -> Result<()> {
        run(self.api.command("helm").args([
            "uninstall",
            "culvert",
            "--namespace",
            SYSTEM,
            "--wait",
            "--timeout",
            "90s",
        ]))?;
        self.api
            .wait("the end of the mesh's pods", PATIENCE, |_| Ok(self.pods(SYSTEM)?.is_empty().then_some(())))
    }

    /// Applies the manifests of an example, each after `change`.
    pub fn apply_example(&self, name: &str, change: impl Fn(&str) -> String) -> Result<()> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
        let mut files: Vec<PathBuf> = fs::read_dir(&dir)?.map(|it| Ok(it?.path())).collect::<Result<_>>()?;
        // Namespaces first, as a person would do it.
        files.sort_by_key(|file| {
            !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("namespace"))
        });
        for file in files {
            self.api
                .apply(&change(&fs::read_to_string(&file)?))
                .with_context(|| format!("{}", file.display()))?;
        }
        Ok(())
    }

    /// The pods of a namespace.
    pub fn pods(&self, namespace: &str) -> Result<Vec<Value>> {
        let list = self.api.get(&format!("/api/v1/namespaces/{namespace}/pods"))?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until every pod of a namespace is ready, and there are so many.
    pub fn wait_ready(&self, namespace: &str, count: usize) -> Result<()> {
        self.api.wait(&format!("{count} ready pods in {namespace}"), PATIENCE, |_| {
            let pods = self.pods(namespace)?;
            Ok((pods.len() == count && pods.iter().all(is_ready)).then_some(()))
        })
    }

    /// Sets or, with "-" at its end, removes a label of a namespace.
    pub fn label(&self, namespace: &str, label: &str) -> Result<()> {
        self.api.kubectl(&["label", "--overwrite", "namespace", namespace, label]).map(drop)
    }

    /// What a pod's agent says of it.
    pub fn redirection(pod: &Value) -> Option<&str> {
        pod["metadata"]["annotations"]["ambient.istio.io/redirection"].as_str()
    }

    /// Waits until every pod of a namespace says so.
    pub fn wait_redirection(&self, namespace: &str, wanted: Option<&str>, patience: Duration) -> Result<()> {
        self.api.wait(&format!("{wanted:?} for every pod of {namespace}"), patience, |_| {
            let pods = self.pods(namespace)?;
            Ok((!pods.is_empty() && pods.iter().all(|pod| Self::redirection(pod) == wanted)).then_some(()))
        })
    }

    /// Runs a command in a pod (`namespace/name`).
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        run(self.exec_command(pod).args(command))
    }

    fn exec_command(&self, pod: &str) -> Command {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let mut kubectl = self.api.command("kubectl");
        kubectl.args(["exec", "-n", namespace, name, "--"]);
        kubectl
    }

    /// Something that goes on in a pod.
    pub fn spawn(&self, pod: &str, command: &[&str]) -> Result<Child> {
        let mut exec = self.exec_command(pod);
        Ok(exec.args(command).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?)
    }

    /// `curl` in a pod.
    pub fn curl(&self, pod: &str, url: &str) -> Result<String> {
        self.exec(pod, &["curl", "--silent", "--show-error", "--fail", "--max-time", "5", url])
    }

    /// Listens to the wire between the nodes while `during` runs.
    pub fn capture<T>(&self, marker: &str, during: impl FnOnce() -> Result<T>) -> Result<(T, CaptureReport)> {
        let fabric = NetNs::open(self.cluster.files().namespaces().join("fabric"))?;
        let capture = Capture::start(&fabric, BRIDGE, CaptureOptions::default().marker(marker).keep(KEPT))?;
        let outcome = during();
        let report = capture.stop()?;
        ensure!(report.dropped == 0, "{} packets could not be looked at", report.dropped);
        Ok((outcome?, report))
    }

    /// A request with a marker of its own, and what the wire showed meanwhile.
    pub fn marked_request(&self, pod: &str, url: &str) -> Result<(String, CaptureReport)> {
        let marker = format!("marker-{:016x}{:016x}", rand_word(), rand_word());
        let (_, report) = self.capture(&marker, || self.curl(pod, &format!("{url}{marker}")))?;
        Ok((marker, report))
    }

    /// What the containers of a program of the mesh said on a node, those that ended too, oldest first.
    pub fn log(&self, node: &Node, program: &str) -> Result<String> {
        self.log_of(node, SYSTEM, program)
    }

    /// What the containers of pods of a namespace said on a node, by the first part of the pods' names.
    pub fn log_of(&self, node: &Node, namespace: &str, program: &str) -> Result<String> {
        let pods = node.dir().join("var/log/pods");
        let mut files = Vec::new();
        for pod in fs::read_dir(&pods)?.flatten() {
            if !pod.file_name().to_string_lossy().starts_with(&format!("{namespace}_{program}-")) {
                continue;
            }
            for container in fs::read_dir(pod.path())?.flatten() {
                files.extend(fs::read_dir(container.path())?.flatten().map(|it| it.path()));
            }
        }
        files.sort_by_key(|file| fs::metadata(file).and_then(|it| it.modified()).ok());
        let mut all = String::new();
        for file in files {
            for line in fs::read_to_string(file).unwrap_or_default().lines() {
                // Time, stream and a tag stand before what was said.
                all.push_str(line.splitn(4, ' ').nth(3).unwrap_or(line));
                all.push('\n');
            }
        }
        Ok(all)
    }

    /// Waits for a line of a node's proxy that holds every word.
    pub fn logged(&self, node: &str, words: &[&str]) -> Result<String> {
        let node = self.cluster.node(node)?;
        self.api.wait(&format!("a line of the proxy of {} with {words:?}", node.name()), MOMENT, |_| {
            let log = self.log(node, "ztunnel")?;
            Ok(log.lines().rev().find(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned))
        })
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let files = self.cluster.files().clone();
        if std::thread::panicking() {
            let kept = std::env::temp_dir().join("culvert-cluster-failed");
            let _ = fs::remove_dir_all(&kept);
            let _ = fs::create_dir_all(&kept);
            let _ = Command::new("cp").arg("-r").arg(files.at("logs")).arg(&kept).output();
            for node in self.cluster.nodes() {
                let pods = node.dir().join("var/log/pods");
                let _ = Command::new("cp").arg("-rL").arg(pods).arg(kept.join(node.name())).output();
            }
            for (name, args) in [
                ("pods", ["get", "pods,nodes", "-A", "-o", "wide"]),
                ("events", ["get", "events", "-A", "-o", "wide"]),
            ] {
                let said = self.api.kubectl(&args).unwrap_or_else(|error| error.to_string());
                let _ = fs::write(kept.join(name), said);
            }
            eprintln!("logs are in {}", kept.display());
        }
        if let Err(error) = Cluster::down(&files) {
            eprintln!("the cluster could not be taken down: {error:#}");
        }
    }
}

/// Fails if a marker was read on the wire, and says between whom.
pub fn unread(report: &CaptureReport, marker: &str) -> Result<()> {
    let holds = |packet: &&Vec<u8>| packet.windows(marker.len()).any(|part| part == marker.as_bytes());
    let between = |packet: &Vec<u8>| match packet.get(12..14) {
        Some([8, 0]) if packet.len() > 38 => {
            let ip = |at: usize| {
                format!("{}.{}.{}.{}", packet[at], packet[at + 1], packet[at + 2], packet[at + 3])
            };
            let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
            format!("{}:{} -> {}:{}", ip(26), port(34), ip(30), port(36))
        }
        Some([0x86, 0xdd]) if packet.len() > 58 => {
            let ip = |at: usize| {
                let bytes: [u8; 16] = packet[at..at + 16].try_into().unwrap_or_default();
                std::net::Ipv6Addr::from(bytes)
            };
            let port = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
            format!("[{}]:{} -> [{}]:{}", ip(22), port(54), ip(38), port(56))
        }
        _ => "another protocol".to_owned(),
    };
    let hits = report.hits(marker.as_bytes());
    let seen: Vec<_> = report.kept.iter().filter(holds).take(5).map(between).collect();
    ensure!(hits == 0, "{marker:?} was read on the wire in {hits} packets, the first {seen:?}");
    Ok(())
}

/// Ready, and not about to go.
pub fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array();
    pod["metadata"]["deletionTimestamp"].is_null()
        && conditions.into_iter().flatten().any(|it| it["type"] == "Ready" && it["status"] == "True")
}

/// The programs of Kubernetes.
fn kubernetes() -> Result<PathBuf> {
    #[expect(clippy::disallowed_methods, reason = "a test's own setting")]
    let programs = std::env::var_os("KUBERNETES_BIN").context(
        "KUBERNETES_BIN is not set: the directory of kube-apiserver and kubelet (`make e2e` builds it)",
    )?;
    Ok(programs.into())
}

/// Ours, and one that stands for both images of the examples: programs of this machine under their names.
fn images() -> Result<Vec<Image>> {
    let ours = |program: &str| {
        Image::of_program(&format!("docker.io/culvert/{program}:{TAG}"), &programs::program(program)?)
    };
    let application = Image::of_machine(
        &["docker.io/curlimages/curl:8.16.0", "docker.io/library/python:3.13-alpine", "culvert.test/peer:1"],
        &["sh", "sleep", "cat", "curl", "/usr/bin/python3", env!("CARGO_BIN_EXE_peer")],
        &["/usr/lib/python3.11"],
    )?;
    Ok(vec![ours("controller")?, ours("ztunnel")?, ours("waypoint")?, application])
}

fn rand_word() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// A Deployment of the peer program that serves, and its Service; one pod on each node if there are two.
pub fn echo(namespace: &str, replicas: u16) -> String {
    let labels = json!({ "app": "echo" });
    let probe = json!({ "tcpSocket": { "port": 9000 }, "periodSeconds": 1, "timeoutSeconds": 2 });
    let container = json!({
        "name": "main", "image": "culvert.test/peer:1", "command": ["peer", "serve"],
        "ports": [{ "name": "echo", "containerPort": 9000 }], "readinessProbe": probe, "livenessProbe": probe,
    });
    let spread = json!([{ "maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule",
        // Those of a replacement by themselves: beside the old ones both could end on one node.
        "matchLabelKeys": ["pod-template-hash"], "labelSelector": { "matchLabels": labels } }]);
    let pod = json!({ "metadata": { "labels": labels }, "spec": {
        // The program takes no signal: it serves until it is killed, when everybody has heard that it goes.
        "terminationGracePeriodSeconds": 6, "containers": [container], "topologySpreadConstraints": spread } });
    let deployment = json!({ "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": "echo", "namespace": namespace },
        "spec": { "replicas": replicas, "selector": { "matchLabels": labels }, "template": pod,
            "strategy": { "rollingUpdate": { "maxSurge": 1, "maxUnavailable": 0 } } } });
    let service = json!({ "apiVersion": "v1", "kind": "Service", "metadata": { "name": "echo", "namespace": namespace },
        "spec": { "selector": labels, "ipFamilyPolicy": "PreferDualStack", "ports": [{ "name": "tcp", "port": 9000 }] } });
    format!("{deployment}\n---\n{service}\n")
}
