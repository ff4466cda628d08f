//! Two nodes, a server and two clients: one enrolled pair, one direct pair, between the same two nodes.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::client::Outcome;

/// A running mesh, taken down when dropped.
#[derive(Debug)]
pub struct World {
    culvert: PathBuf,
    bench: PathBuf,
    dir: PathBuf,
    setup: Setup,
}

/// What differs from world to world.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// Another proxy instead of ours.
    pub peer: Option<PathBuf>,
    /// The server is on the client's node.
    pub same_node: bool,
    /// More arguments of our proxy.
    pub proxy_args: Vec<&'static str>,
    /// Makes a directory of programs to use, in the world's directory, from that of ours.
    pub programs: Option<fn(&Path, &Path) -> anyhow::Result<PathBuf>>,
}

/// Which pair of pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Outside of the mesh: plain TCP.
    Direct,
    /// Through two proxies.
    Mesh,
}

impl Route {
    fn namespace(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Mesh => "mesh",
        }
    }
}

impl World {
    /// Writes the manifests and starts everything. `name` tells it from the others of this run.
    pub fn start(culvert: PathBuf, name: &str, setup: Setup) -> anyhow::Result<Self> {
        let bench = std::env::current_exe()?;
        let dir = std::env::temp_dir().join(format!("bench-{}-{name}", std::process::id()));
        let manifests = dir.join("manifests");
        std::fs::create_dir_all(&manifests)?;
        for path in [Route::Direct, Route::Mesh] {
            std::fs::write(
                manifests.join(format!("{}.yaml", path.namespace())),
                manifest(path, &bench, setup.same_node),
            )?;
        }
        let world = Self { culvert, bench, dir, setup };
        let mut up = world.command();
        up.args(["up", "--detach", "-f"]).arg(&manifests).stdout(Stdio::null());
        up.args(world.setup.proxy_args.iter().map(|argument| format!("--proxy-arg={argument}")));
        let ours = world.culvert.parent().context("culvert has no directory")?;
        if let Some(programs) = world.setup.programs {
            up.arg("--bin-dir").arg(programs(&world.dir, ours)?);
        } else if let Some(peer) = &world.setup.peer {
            up.arg("--bin-dir").arg(culvert_e2e::ambient::programs(&world.dir, ours, peer, &[])?);
        }
        let up = up.status()?;
        ensure!(up.success(), "culvert up failed ({up}); its state is in {}", world.dir.display());
        Ok(world)
    }

    /// One measurement in the client pod of a pair.
    pub fn measure(
        &self,
        path: Route,
        measure: &str,
        connections: usize,
        seconds: u64,
    ) -> anyhow::Result<Outcome> {
        let mut client = self.load(path, measure, connections, seconds)?.stdout(Stdio::piped()).spawn()?;
        let outcome = outcome(&mut BufReader::new(client.stdout.take().context("piped")?))?;
        let status = client.wait()?;
        ensure!(status.success(), "the client failed ({status}) at {measure}");
        ensure!(outcome.failed == 0, "{} of {connections} workers failed at {measure}", outcome.failed);
        Ok(outcome)
    }

    /// The measuring client in the client pod of a pair, to be started.
    pub fn load(
        &self,
        path: Route,
        measure: &str,
        connections: usize,
        seconds: u64,
    ) -> anyhow::Result<Command> {
        let target = self.target(path)?;
        let mut client = self.client(path);
        client.args(["--measure", measure, "--target", &target]).args([
            "--connections",
            &connections.to_string(),
            "--seconds",
            &seconds.to_string(),
        ]);
        Ok(client)
    }

    /// Opens idle connections through the mesh; they close when the child's standard input does.
    pub fn idle(&self, connections: usize) -> anyhow::Result<Child> {
        let target = self.target(Route::Mesh)?;
        let mut child = self
            .client(Route::Mesh)
            .args(["--measure", "idle", "--target", &target, "--connections", &connections.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("piped")?).read_line(&mut line)?;
        ensure!(line.contains("open"), "idle connections could not be opened");
        Ok(child)
    }

    /// Resident memory of each node's proxy, bytes.
    pub fn proxy_memory(&self) -> anyhow::Result<Vec<(String, u64)>> {
        self.proxies()?.into_iter().map(|(node, pid)| Ok((node, resident(pid)?))).collect()
    }

    /// Each node's proxy and its process id.
    pub fn proxies(&self) -> anyhow::Result<Vec<(String, u64)>> {
        let status = self.status()?;
        let programs = status["system"].as_array().context("status names no programs")?;
        let proxies: Vec<_> = programs.iter().filter(|program| program["role"] == "proxy").collect();
        ensure!(!proxies.is_empty(), "status names no proxy");
        proxies
            .into_iter()
            .map(|proxy| {
                let pid = proxy["pid"].as_u64().context("a proxy without pid")?;
                Ok((proxy["node"].as_str().unwrap_or("?").to_owned(), pid))
            })
            .collect()
    }

    /// Processor time that the proxies have used, seconds.
    pub fn proxy_cpu(&self) -> anyhow::Result<f64> {
        self.proxies()?.iter().map(|(_, pid)| processor_time(*pid)).sum()
    }

    /// Where the server of a pair is.
    pub fn target(&self, path: Route) -> anyhow::Result<String> {
        let status = self.status()?;
        for pod in status["pods"].as_array().context("status has no pods")? {
            if pod["namespace"] == path.namespace() && pod["name"] == "server" {
                let ip = pod["podIPs"][0].as_str().context("the server has no address")?;
                return Ok(if ip.contains(':') { format!("[{ip}]:9000") } else { format!("{ip}:9000") });
            }
        }
        bail!("status names no server in {}", path.namespace())
    }

    fn status(&self) -> anyhow::Result<Value> {
        let output = self.command().args(["status", "-o", "json"]).output()?;
        serde_json::from_slice(&output.stdout).context("culvert status -o json")
    }

    /// `culvert-bench` in the client pod of a pair, to be given a subcommand.
    pub fn bench(&self, path: Route) -> Command {
        let mut command = self.command();
        command.args(["exec", "-n", path.namespace(), "client", "--"]).arg(&self.bench);
        command
    }

    /// `culvert-bench` where the controller runs.
    pub fn bench_beside_controller(&self) -> Command {
        let mut command = self.command();
        command.args(["exec", "controller", "--"]).arg(&self.bench);
        command
    }

    /// Replaces a node's proxy by a new process.
    pub fn restart_proxy(&self, node: &str) -> anyhow::Result<()> {
        let status =
            self.command().args(["restart", "proxy", "--node", node]).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "the proxy of {node} did not restart ({status})");
        Ok(())
    }

    /// Where everything of this world is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn client(&self, path: Route) -> Command {
        let mut command = self.bench(path);
        command.arg("client");
        command
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.culvert);
        command.env("CULVERT_STATE", self.dir.join("state"));
        command
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.command().arg("down").stdout(Stdio::null()).status();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// The next outcome that a client prints.
pub fn outcome(printed: &mut impl BufRead) -> anyhow::Result<Outcome> {
    let mut line = String::new();
    printed.read_line(&mut line)?;
    serde_json::from_str(&line).with_context(|| format!("the client's outcome, which was {line:?}"))
}

fn manifest(path: Route, bench: &Path, same_node: bool) -> String {
    let namespace = path.namespace();
    let label = if path == Route::Mesh { "\n  labels: {istio.io/dataplane-mode: ambient}" } else { "" };
    let bench = bench.display();
    let node = if same_node { "node-a" } else { "node-b" };
    format!(
        "apiVersion: v1
kind: Namespace
metadata:
  name: {namespace}{label}
---
apiVersion: v1
kind: Pod
metadata: {{name: server, namespace: {namespace}}}
spec:
  nodeName: {node}
  containers:
    - {{name: main, image: bench, command: ['{bench}', serve], readinessProbe: {{tcpSocket: {{port: 9000}}}}}}
---
apiVersion: v1
kind: Pod
metadata: {{name: client, namespace: {namespace}}}
spec:
  nodeName: node-a
  containers:
    - {{name: main, image: bench, command: [sleep, infinity]}}
"
    )
}

/// Resident memory of a process, bytes.
pub fn resident(pid: u64) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().nth(1).context("no VmRSS")?.parse()?;
    Ok(kib * 1024)
}

/// utime and stime of /proc/PID/stat, in seconds; the kernel counts in hundredths on every machine of today.
pub fn processor_time(pid: u64) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("no stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| -> anyhow::Result<f64> { Ok(fields.get(at).context("a short stat")?.parse()?) };
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}
