//! A world of nodes and pods, started through `culvert up` from manifests that a test writes and edits.

pub mod build;
mod look;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

pub use build::WorldBuilder;

/// Longest wait for something that the product does by itself; each is far quicker.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How often a condition is looked at that nothing announces.
const POLL: Duration = Duration::from_millis(10);

/// A pod, by namespace and name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod(pub &'static str, pub &'static str);

/// Address families.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// A running world. Dropping it takes everything down; after a failure the programs' logs are kept and their place told.
#[derive(Debug)]
pub struct World {
    culvert: PathBuf,
    peer: PathBuf,
    dir: PathBuf,
}

/// A program in a pod that goes on while the test does something else. Dropping it ends it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    name: String,
}

impl World {
    /// Begins to describe one. `peer` is the program that pods run: `env!("CARGO_BIN_EXE_peer")` in a test.
    #[must_use]
    pub fn builder(name: &str, peer: &str) -> WorldBuilder {
        WorldBuilder::new(name, Path::new(peer))
    }

    /// The state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.dir.join("s")
    }

    /// Writes a manifest, whole, as an editor does: the old text or the new one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, file: &str, yaml: &str) -> Result<()> {
        let manifests = self.dir.join("m");
        let beside = manifests.join(format!(".{file}.tmp"));
        fs::write(&beside, yaml)?;
        fs::rename(&beside, manifests.join(file)).with_context(|| format!("writing {file}"))
    }

    /// A manifest as it is.
    ///
    /// # Errors
    /// If there is none.
    pub fn read(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.dir.join("m").join(file)).with_context(|| format!("reading {file}"))
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// If there is none.
    pub fn remove(&self, file: &str) -> Result<()> {
        fs::remove_file(self.dir.join("m").join(file)).with_context(|| format!("removing {file}"))
    }

    /// A command that runs in a pod.
    #[must_use]
    pub fn exec(&self, pod: Pod) -> Command {
        let mut command = self.command();
        command.args(["exec", "-n", pod.0, pod.1, "--"]);
        command
    }

    /// Has the peer program do something in a pod and gives its last line.
    ///
    /// # Errors
    /// If it fails or says nothing.
    pub fn peer(&self, pod: Pod, args: &[&str]) -> Result<Value> {
        let output = self.exec(pod).arg(&self.peer).args(args).stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "peer {args:?} in {}: {}", pod.1, said(&output));
        let text = String::from_utf8(output.stdout)?;
        let last = text.lines().last().with_context(|| format!("peer {args:?} said nothing"))?;
        serde_json::from_str(last).with_context(|| format!("peer said {last:?}"))
    }

    /// Has the peer program do something that goes on.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn_peer(&self, pod: Pod, args: &[&str]) -> Result<Running> {
        let mut child = self.exec(pod).arg(&self.peer).args(args).stdout(Stdio::piped()).spawn()?;
        let lines = BufReader::new(child.stdout.take().context("piped")?);
        Ok(Running { child, lines, name: format!("peer {args:?} in {}", pod.1) })
    }

    /// `culvert restart`: the supervisor replaces a program and answers when the new one is ready.
    ///
    /// # Errors
    /// If it does not come back.
    pub fn restart(&self, role: &str, node: Option<&str>) -> Result<()> {
        let mut command = self.command();
        command.args(["restart", role]);
        if let Some(node) = node {
            command.args(["--node", node]);
        }
        let output = command.output()?;
        ensure!(output.status.success(), "culvert restart {role}: {}", said(&output));
        Ok(())
    }

    /// `culvert`, with this world's state: any of its subcommands.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.culvert);
        command.env("CULVERT_STATE", self.state_dir());
        command
    }

    fn keep_logs(&self) {
        let kept = std::env::temp_dir()
            .join(format!("culvert-failed-{}", self.dir.file_name().unwrap_or_default().to_string_lossy()));
        let state = self.state_dir();
        for name in ["nodes", "controller", "pods", "supervisor.log", "report.json"] {
            let _ = fs::create_dir_all(&kept);
            let _ = Command::new("cp").arg("-r").arg(state.join(name)).arg(&kept).output();
        }
        eprintln!("logs are in {}", kept.display());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.keep_logs();
        }
        match self.command().arg("down").output() {
            Ok(output) if output.status.success() => drop(fs::remove_dir_all(&self.dir)),
            Ok(output) => eprintln!("culvert down: {}", said(&output)),
            Err(error) => eprintln!("culvert down: {error}"),
        }
    }
}

impl Running {
    /// The next line it says.
    ///
    /// # Errors
    /// If it ends without one.
    pub fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        self.lines.read_line(&mut line)?;
        if line.is_empty() {
            bail!("{} ended ({})", self.name, self.child.wait()?);
        }
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
    }

    /// Waits for its end; its last line.
    ///
    /// # Errors
    /// If it fails or says nothing.
    pub fn finish(mut self) -> Result<Value> {
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{}: {status}", self.name);
        let last = rest.lines().last().with_context(|| format!("{} said nothing more", self.name))?;
        serde_json::from_str(last).with_context(|| format!("{} said {last:?}", self.name))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks until `look` finds something.
///
/// # Errors
/// `what`, if that takes longer than `patience`; the last error of `look` with it.
pub fn wait_for<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        let seen = look();
        match seen {
            Ok(Some(found)) => return Ok(found),
            _ if started.elapsed() < patience => std::thread::sleep(POLL),
            Ok(None) => bail!("{what}: not within {patience:?}"),
            Err(error) => return Err(error.context(format!("{what}: not within {patience:?}"))),
        }
    }
}

fn said(output: &Output) -> String {
    format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
}
