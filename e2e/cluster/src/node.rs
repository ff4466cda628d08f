//! A node: namespaces of network, mounts and processes, and containerd, kubelet and kube-proxy in them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use culvert_sandbox::plan;
use culvert_sandbox::process::start_time;
use serde_json::{Value, json};

use crate::cluster::Programs;
use crate::control_plane::{DNS_SERVICE, DOMAIN, proxy_config};
use crate::files::Files;
use crate::images;
use crate::process::{POLL, Process};
use crate::shell::run;

/// What a node has of its own; everything else of the file system is the machine's.
const OWN: [&str; 5] = ["run", "var/lib", "var/log", "etc/cni", "opt/cni"];
/// The programs of a node in the order in which they are started.
pub(crate) const PROGRAMS: [&str; 3] = ["containerd", "kubelet", "kube-proxy"];
/// A kubelet that finds its runtime runs longer than this.
const SETTLED: Duration = Duration::from_secs(1);
/// Where version 1 of cgroups has its hierarchies.
const CGROUPS: &str = "/sys/fs/cgroup";
/// Where Debian puts CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// A node of the cluster.
#[derive(Clone, Debug)]
pub struct Node {
    files: Files,
    programs: Programs,
    name: String,
    number: u16,
}

impl Node {
    pub(crate) fn new(files: Files, programs: Programs, name: &str, number: u16) -> Self {
        Self { files, programs, name: name.to_owned(), number }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it keeps what it has of its own of the file system.
    pub fn dir(&self) -> PathBuf {
        self.files.node(&self.name)
    }

    /// Its network namespace.
    pub fn network(&self) -> PathBuf {
        self.files.node_namespace(&self.name)
    }

    /// The process that holds its namespaces; the first process of the node.
    ///
    /// # Errors
    /// If it was never started.
    pub fn holder(&self) -> Result<Process> {
        Process::find(&self.files, &self.label("holder"))
    }

    /// One of its programs: containerd, kubelet, kube-proxy.
    ///
    /// # Errors
    /// If it was never started.
    pub fn program(&self, program: &str) -> Result<Process> {
        Process::find(&self.files, &self.label(program))
    }

    /// A command on the node: in its namespaces of network, mounts and processes.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn command(&self, program: impl AsRef<Path>) -> Result<Command> {
        let holder = self.holder()?;
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", holder.pid())).args(["--net", "--mount", "--pid", "--"]);
        command.arg(program.as_ref()).env("PATH", self.programs.search_path());
        Ok(command)
    }

    /// Turns the node on: first with an empty disk, later with what it kept.
    pub(crate) fn boot(&self) -> Result<()> {
        self.hold()?;
        self.cgroups()?;
        for program in PROGRAMS {
            let mut process = self.start(program)?;
            // kubelet ends when containerd does not answer yet, and is started again, as a service manager would.
            let begun = Instant::now();
            while program == "kubelet" && begun.elapsed() < SETTLED {
                sleep(POLL);
                if !process.runs() {
                    process = self.start(program)?;
                }
            }
        }
        Ok(())
    }

    /// Cuts its power: every process of it ends at once, its mounts and its pods' namespaces go, its disk stays. The node's own network
    /// namespace stays with its routes; links and rules in it go.
    ///
    /// # Errors
    /// If it does not run, or does not end.
    pub fn cut_power(&self) -> Result<()> {
        self.holder()?.kill()?;
        // Links of pods go with their namespaces. Rules are memory, and /run is.
        let net = format!("--net={}", self.network().display());
        run(Command::new("nsenter").args([&net, "--", "nft", "flush", "ruleset"]))?;
        fs::remove_dir_all(self.dir().join("run")).context("emptying /run of the node")?;
        fs::create_dir(self.dir().join("run"))?;
        Ok(())
    }

    /// Turns it on again after [`cut_power`](Self::cut_power).
    ///
    /// # Errors
    /// If something of it cannot be started.
    pub fn power_on(&self) -> Result<()> {
        self.boot()
    }

    /// Starts one of its programs, also again after it ended.
    ///
    /// # Errors
    /// If it is none of a node's, or the node does not run.
    pub fn start(&self, program: &str) -> Result<Process> {
        let path = if program == "containerd" { PathBuf::from(program) } else { self.programs.path(program) };
        let mut command = self.command(path)?;
        match program {
            "containerd" => {
                let config = self.config("containerd.toml");
                fs::write(&config, containerd_config())?;
                command.arg("--config").arg(config);
            }
            "kubelet" => {
                let config = self.config("kubelet.json");
                fs::write(&config, self.kubelet_config().to_string())?;
                command.arg("--config").arg(config);
                command.arg("--kubeconfig").arg(self.files.at(&format!("kubeconfig-{}", self.name)));
                command.arg(format!("--hostname-override={}", self.name));
                let addresses = plan::node_addresses(self.number).map(|address| address.to_string());
                command.arg(format!("--node-ip={}", addresses.join(",")));
            }
            "kube-proxy" => {
                let config = self.config("kube-proxy.json");
                fs::write(&config, proxy_config(&self.files, &self.name).to_string())?;
                command.arg("--config").arg(config);
            }
            other => anyhow::bail!("{other:?} is no program of a node: one of {PROGRAMS:?}"),
        }
        Process::start(&self.files, &self.label(program), command, true)
    }

    /// Brings an image archive to the node; containerd must run.
    ///
    /// # Errors
    /// With what containerd's tool said.
    pub fn import(&self, archive: &Path) -> Result<()> {
        run(self.command("ctr")?.args(["-n", "k8s.io", "images", "import"]).arg(archive))?;
        Ok(())
    }

    /// The network namespaces of its pods, as the runtime names them.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn pod_namespaces(&self) -> Result<Vec<String>> {
        let said = run(self.command("ls")?.arg("/run/netns"))?;
        Ok(said.split_whitespace().map(str::to_owned).collect())
    }

    /// The ids on this machine of the node's processes whose first words are these, the oldest first.
    ///
    /// # Errors
    /// If the node does not run.
    pub fn processes(&self, words: &[&str]) -> Result<Vec<i32>> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        // A container has a namespace of processes of its own, below the node's; what they share is the node's view of its cgroup.
        let holder = self.holder()?.pid();
        let own = namespace(holder).context("the node does not run")?;
        let cgroup = self.cgroup();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
            let mut line = line.split(|byte| *byte == 0);
            if !words.iter().all(|word| line.next() == Some(word.as_bytes())) {
                continue;
            }
            let inside = fs::read_to_string(entry.path().join("cgroup"))
                .is_ok_and(|text| text.contains(&format!("{cgroup}/")));
            if inside || namespace(pid).as_ref() == Some(&own) {
                found.push((start_time(pid).unwrap_or_default(), pid));
            }
        }
        found.sort_unstable();
        Ok(found.into_iter().map(|(_, pid)| pid).collect())
    }

    fn label(&self, program: &str) -> String {
        format!("{}.{program}", self.name)
    }

    fn config(&self, name: &str) -> PathBuf {
        self.files.at(&format!("{}.{name}", self.name))
    }

    /// Makes the namespaces, and mounts the node's own directories over the machine's.
    fn hold(&self) -> Result<()> {
        let dir = self.dir();
        for own in OWN {
            fs::create_dir_all(dir.join(own))?;
            fs::create_dir_all(Path::new("/").join(own))?;
        }
        for below in ["run/netns", "run/lock", "var/log/pods", "var/log/containers", "etc/cni/net.d"] {
            fs::create_dir_all(dir.join(below))?;
        }
        let plugins = dir.join("opt/cni/bin");
        if !plugins.exists() {
            fs::create_dir_all(&plugins)?;
            run(Command::new("cp").arg("-r").arg(format!("{PLUGINS}/.")).arg(&plugins))?;
        }
        fs::write(dir.join("resolv.conf"), format!("nameserver {}\n", plan::dns_addresses()[0]))?;
        let network = dir.join("etc/cni/net.d/10-pods.conflist");
        if !network.exists() {
            fs::write(network, cni_config(self.number).to_string())?;
        }
        let mut unshare = Command::new("nsenter");
        unshare
            .arg(format!("--net={}", self.network().display()))
            .args(["--", "unshare", "--mount", "--pid"]);
        unshare.args(["--fork", "--kill-child", "--mount-proc", "--"]).arg(self.programs.path("pause"));
        Process::start(&self.files, &self.label("holder"), unshare, true)?;
        // Shared within the node, so that kubelet's and containerd's mounts reach each other; a group of its own for each
        // directory, or what is mounted in one would appear below the state directory too.
        let mut script = String::from("set -e; mount --make-rshared /\n");
        for own in OWN {
            let from = dir.join(own);
            script += &format!(
                "mount --bind {} /{own}; mount --make-private /{own}; mount --make-shared /{own}\n",
                from.display()
            );
        }
        run(self.command("sh")?.args(["-c", &script]))?;
        Ok(())
    }

    fn cgroup(&self) -> String {
        format!("{}/{}", cgroup_root(&self.files), self.name)
    }

    /// kubelet's own root in every hierarchy. A new cpuset is empty and takes no process.
    fn cgroups(&self) -> Result<()> {
        for hierarchy in hierarchies() {
            let mut at = hierarchy.clone();
            for part in self.cgroup().split('/').filter(|part| !part.is_empty()) {
                let above = at.clone();
                at.push(part);
                fs::create_dir_all(&at).with_context(|| format!("making cgroup {}", at.display()))?;
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    if above.join(file).exists() && fs::read_to_string(at.join(file))?.trim().is_empty() {
                        fs::write(at.join(file), fs::read_to_string(above.join(file))?)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn kubelet_config(&self) -> Value {
        json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
            // The cluster is cut off from everything: whoever reaches a kubelet is inside.
            "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
            "authorization": { "mode": "AlwaysAllow" },
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "clusterDNS": [DNS_SERVICE], "clusterDomain": DOMAIN,
            "resolvConf": self.dir().join("resolv.conf"),
            "cgroupDriver": "cgroupfs", "cgroupRoot": self.cgroup(), "failCgroupV1": false,
            "enforceNodeAllocatable": [], "localStorageCapacityIsolation": false,
            "evictionHard": { "memory.available": "1Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%" },
            "imageGCHighThresholdPercent": 100, "serializeImagePulls": false,
            "featureGates": { "KubeletCrashLoopBackOffMax": true },
            "crashLoopBackOff": { "maxContainerRestartPeriod": "1s" },
            "nodeStatusUpdateFrequency": "2s", "volumeStatsAggPeriod": "0s",
        })
    }
}

/// Below each hierarchy: one for each state directory, so that two clusters do not meet.
pub(crate) fn cgroup_root(files: &Files) -> String {
    format!("/culvert-{:08x}", plan::fnv1a(files.dir().as_os_str().as_encoded_bytes()))
}

/// Removes what is left of the nodes' cgroups: kubelet would take them for orphans. The processes in them have ended.
pub(crate) fn remove_cgroups(files: &Files) {
    for hierarchy in hierarchies() {
        let root = hierarchy.join(cgroup_root(files).trim_start_matches('/'));
        let _ = Command::new("find").arg(root).args(["-depth", "-type", "d", "-delete"]).output();
    }
}

/// Hierarchies by their real names: some are links to another.
fn hierarchies() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(CGROUPS) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn containerd_config() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
stream_server_port = "0"
disable_apparmor = true
# Without CAP_SYS_RESOURCE nothing may lower a score.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/opt/cni/bin"
conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
"#,
        pause = images::PAUSE
    )
}

/// Pods are routed, each by a link of its own: traffic between two pods of a node passes the node's rules.
fn cni_config(number: u16) -> Value {
    let [v4, v6] = plan::pod_networks(number);
    json!({
        "cniVersion": "1.0.0", "name": "pods",
        "plugins": [
            { "type": "ptp", "ipMasq": false, "ipam": { "type": "host-local",
                "ranges": [[{ "subnet": v4 }], [{ "subnet": v6 }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}
