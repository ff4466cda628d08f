//! The example, running: its files can be edited, commands run in its pods, its logs read and its wire listened to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use culvert_net::capture::{Capture, CaptureOptions, CaptureReport};
use culvert_net::netns::NetNs;
use culvert_sandbox::lab::BRIDGE;
use culvert_sandbox::report::Report;
use culvert_sandbox::state::{self, StateDir};

use crate::args::DemoArgs;

/// The example's files, so that the demo needs nothing but this program and its two neighbours.
const FILES: [(&str, &str); 4] = [
    ("namespaces.yaml", include_str!("../../../examples/hello/namespaces.yaml")),
    ("server.yaml", include_str!("../../../examples/hello/server.yaml")),
    ("clients.yaml", include_str!("../../../examples/hello/clients.yaml")),
    ("policy.yaml", include_str!("../../../examples/hello/policy.yaml")),
];
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(20);
/// A `curl` that gets no answer in this time has failed, seconds.
const CURL_SECONDS: &str = "5";

/// A running example, taken down when dropped.
pub struct World {
    exe: PathBuf,
    dir: PathBuf,
    state: StateDir,
    up: bool,
}

impl World {
    /// Writes the example's files and starts it.
    pub fn start(args: &DemoArgs) -> anyhow::Result<Self> {
        let dir = PathBuf::from(format!("/tmp/culvert-demo-{}", std::process::id()));
        fs::create_dir_all(dir.join("manifests"))
            .with_context(|| format!("cannot make {}", dir.display()))?;
        let mut world =
            Self { exe: std::env::current_exe()?, state: StateDir::new(&dir.join("state"))?, dir, up: false };
        for (name, text) in FILES {
            world.edit(name, |_| text.to_owned())?;
        }
        let mut command = world.culvert();
        command.args(["up", "--detach", "-f"]).arg(world.dir.join("manifests"));
        command.args(["--family", args.family.name()]);
        if let Some(bin_dir) = &args.bin_dir {
            command.arg("--bin-dir").arg(bin_dir);
        }
        world.up = !args.keep;
        let output = command.stdin(Stdio::null()).output()?;
        ensure!(
            output.status.success(),
            "culvert up failed: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        world.up = true;
        // Ready pods become endpoints at every proxy a moment later.
        world.settle()?;
        Ok(world)
    }

    /// Takes everything down.
    pub fn stop(mut self) -> anyhow::Result<()> {
        self.up = false;
        let status = self.culvert().arg("down").stdout(Stdio::null()).status()?;
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))?;
        ensure!(status.success(), "culvert down failed");
        Ok(())
    }

    /// Leaves everything up; returns where its state is.
    pub fn keep(mut self) -> PathBuf {
        self.up = false;
        self.state.root().to_owned()
    }

    /// Puts every file back as it was and waits until that is in force.
    pub fn reset(&self) -> anyhow::Result<()> {
        for (name, text) in FILES {
            if fs::read_to_string(self.manifest(name))? != text {
                self.edit(name, |_| text.to_owned())?;
            }
        }
        self.settle()
    }

    /// Waits until every pod is ready and what the files allow is allowed again.
    fn settle(&self) -> anyhow::Result<()> {
        let url = "http://hello.hello/";
        self.until(Duration::from_secs(15), "every pod is ready and the example works", || {
            let report = self.report()?;
            let ready = report.problems.is_empty() && report.pods.iter().all(|pod| pod.ready);
            Ok(ready && self.curl("client", url).is_ok() && self.curl("outside/outsider", url).is_ok())
        })
        .map(drop)
    }

    /// Changes a manifest, whole at once.
    pub fn edit(&self, name: &str, change: impl FnOnce(String) -> String) -> anyhow::Result<()> {
        let path = self.manifest(name);
        let old = fs::read_to_string(&path).unwrap_or_default();
        let temporary = self.dir.join("edited");
        fs::write(&temporary, change(old))?;
        fs::rename(&temporary, &path).with_context(|| format!("cannot write {}", path.display()))
    }

    /// `curl` in a pod; its output if it succeeded, else what it said.
    pub fn curl(&self, pod: &str, url: &str) -> anyhow::Result<String> {
        let output = self
            .exec(pod)
            .args(["curl", "--silent", "--show-error", "--fail", "--max-time", CURL_SECONDS, url])
            .stdin(Stdio::null())
            .output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Something that goes on in a pod.
    pub fn spawn(&self, pod: &str, command: &[&str]) -> anyhow::Result<Child> {
        Ok(self
            .exec(pod)
            .args(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?)
    }

    /// Listens to the wire between the nodes while `during` runs.
    pub fn capture(
        &self,
        marker: &str,
        during: impl FnOnce() -> anyhow::Result<()>,
    ) -> anyhow::Result<CaptureReport> {
        let fabric = NetNs::open(self.state.netns().join("fabric"))?;
        let capture = Capture::start(&fabric, BRIDGE, CaptureOptions::default().marker(marker))?;
        let outcome = during();
        let report = capture.stop()?;
        outcome?;
        ensure!(report.dropped == 0, "{} packets could not be looked at", report.dropped);
        Ok(report)
    }

    /// The lines of a node's proxy that hold every one of `words`.
    pub fn proxy_log(&self, node: &str, words: &[&str]) -> anyhow::Result<Vec<String>> {
        let path = self.state.node(node).join("logs").join("proxy.log");
        let log = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(log
            .lines()
            .filter(|line| words.iter().all(|word| line.contains(word)))
            .map(str::to_owned)
            .collect())
    }

    /// What is, as `culvert status` sees it.
    pub fn report(&self) -> anyhow::Result<Report> {
        state::read_json(&self.state.report())?.context("there is no report")
    }

    /// Waits for a condition; returns how long it took.
    pub fn until(
        &self,
        patience: Duration,
        what: &str,
        mut condition: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<Duration> {
        let started = Instant::now();
        while !condition()? {
            ensure!(started.elapsed() < patience, "not within {patience:?}: {what}");
            std::thread::sleep(POLL);
        }
        Ok(started.elapsed())
    }

    fn exec(&self, pod: &str) -> Command {
        let (namespace, name) = pod.split_once('/').unwrap_or(("hello", pod));
        let mut command = self.culvert();
        command.args(["exec", "-n", namespace, name, "--"]);
        command
    }

    fn culvert(&self) -> Command {
        let mut command = Command::new(&self.exe);
        command.env("CULVERT_STATE", self.state.root());
        command
    }

    fn manifest(&self, name: &str) -> PathBuf {
        Path::new(&self.dir).join("manifests").join(name)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.up {
            let _ = self.culvert().arg("down").stdout(Stdio::null()).status();
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}
