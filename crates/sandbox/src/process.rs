//! Processes in namespaces: started through the helper, recorded so that a later run can end exactly those, and ended.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use crate::enter::Place;
use crate::lab::NetNsId;
use crate::state::{self, StateDir, StateError};

/// How often a wait for a process that is not our child looks again.
const POLL: Duration = Duration::from_millis(20);

/// A command to start.
#[derive(Clone, Debug)]
pub struct Start {
    /// Names it in records and logs, such as `proxy.node-a`.
    pub label: String,
    /// Program and arguments.
    pub command: Vec<OsString>,
    /// Its whole environment.
    pub environment: Vec<(OsString, OsString)>,
    /// Where it runs.
    pub place: Place,
    /// Output and errors are appended here.
    pub log: PathBuf,
}

/// Starts processes through the helper executable.
#[derive(Clone, Debug)]
pub struct Launcher {
    helper: PathBuf,
    records: PathBuf,
}

/// A process that was started. Dropping it neither ends nor forgets it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    record: Record,
    file: PathBuf,
}

/// What identifies a process beyond its number, which the kernel reuses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its name.
    pub label: String,
    /// Process id; also its process group.
    pub pid: i32,
    /// Start time in clock ticks since boot: field 22 of /proc/PID/stat.
    pub start_time: u64,
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// Its log could not be opened.
    #[error("cannot open log {path}: {source}", path = path.display())]
    Log {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The helper could not be started.
    #[error("cannot start {label} by {helper}: {source}", helper = helper.display())]
    Spawn {
        /// The process.
        label: String,
        /// The helper executable.
        helper: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be recorded.
    #[error(transparent)]
    Record(#[from] StateError),
}

impl Launcher {
    /// `helper` is an executable with the subcommand [`crate::enter::SUBCOMMAND`]: the `culvert` binary.
    pub fn new(helper: PathBuf, state: &StateDir) -> Launcher {
        Launcher { helper, records: state.processes() }
    }

    /// Starts a process in its own process group. It outlives this program if this crashes: the record lets the next run end
    /// it. Must be called inside a tokio runtime.
    pub fn start(&self, start: &Start) -> Result<Running, ProcessError> {
        let log = open_log(&start.log)?;
        let errors =
            log.try_clone().map_err(|source| ProcessError::Log { path: start.log.clone(), source })?;
        let child = Command::new(&self.helper)
            .args(start.place.arguments(&start.command))
            .env_clear()
            .envs(start.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(|source| ProcessError::Spawn {
                label: start.label.clone(),
                helper: self.helper.clone(),
                source,
            })?;
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default();
        // Not reaped yet, so /proc still has it even if it has exited.
        let start_time = start_time(pid).unwrap_or_default();
        let record = Record { label: start.label.clone(), pid, start_time };
        let file = self.records.join(format!("{}.{pid}.json", start.label));
        state::write_json(&file, &record)?;
        Ok(Running { child, record, file })
    }
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        self.record.pid
    }

    /// What identifies it.
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Waits for its end. Cancel safe.
    pub async fn wait(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // What it started in its group goes with it, as a container's processes do.
        let _ = killpg(Pid::from_raw(self.record.pid), Signal::SIGKILL);
        let _ = fs::remove_file(&self.file);
        Ok(status)
    }

    /// Asks it and its group to end.
    pub fn ask_to_end(&self) {
        self.record.signal(Signal::SIGTERM);
    }

    /// SIGTERM, then SIGKILL when `grace` has passed.
    pub async fn end(mut self, grace: Duration) -> io::Result<ExitStatus> {
        self.ask_to_end();
        if let Ok(status) = tokio::time::timeout(grace, self.wait()).await {
            return status;
        }
        self.record.signal(Signal::SIGKILL);
        self.wait().await
    }
}

impl Record {
    /// This very process.
    pub fn own(label: &str) -> Record {
        let pid = i32::try_from(std::process::id()).unwrap_or_default();
        Record { label: label.to_owned(), pid, start_time: start_time(pid).unwrap_or_default() }
    }

    /// Whether this very process, and no later one with its number, runs. A zombie does not.
    pub fn runs(&self) -> bool {
        self.pid > 1 && start_time(self.pid) == Some(self.start_time) && !is_zombie(self.pid)
    }

    /// Sends a signal to the process and its group; nothing if it does not run.
    pub fn signal(&self, signal: Signal) {
        if self.runs() {
            let _ = kill(Pid::from_raw(self.pid), signal);
            let _ = killpg(Pid::from_raw(self.pid), signal);
        }
    }
}

/// The recorded processes of a state directory. Unreadable records are skipped.
pub fn recorded(state: &StateDir) -> Vec<Record> {
    let Ok(entries) = fs::read_dir(state.processes()) else { return Vec::new() };
    entries.flatten().filter_map(|entry| state::read_json(&entry.path()).ok().flatten()).collect()
}

/// The processes whose network namespace is one of `namespaces`: whatever a pod started in a group of its own.
pub fn inside(namespaces: &BTreeSet<NetNsId>) -> Vec<Record> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| {
            NetNsId::of(Path::new(&format!("/proc/{pid}/ns/net"))).is_ok_and(|id| namespaces.contains(&id))
        })
        .filter_map(|pid| Some(Record { label: "stray".to_owned(), pid, start_time: start_time(pid)? }))
        .collect()
}

/// Ends what `find` finds until it finds nothing: SIGTERM, then SIGKILL after `grace`. Returns what even that did not end.
pub fn end_all(find: impl Fn() -> Vec<Record>, grace: Duration) -> Vec<Record> {
    let asked = find();
    asked.iter().for_each(|record| record.signal(Signal::SIGTERM));
    wait_until_gone(&asked, grace);
    // Killing takes the kernel a moment; two seconds is far more than it needs for anything but stuck I/O.
    for _ in 0..(Duration::from_secs(2).as_millis() / POLL.as_millis()) {
        let left: Vec<_> = find().into_iter().filter(Record::runs).collect();
        if left.is_empty() {
            return left;
        }
        for record in &left {
            let _ = kill(Pid::from_raw(record.pid), Signal::SIGKILL);
        }
        std::thread::sleep(POLL);
    }
    find().into_iter().filter(Record::runs).collect()
}

/// The environment that commands get of ours: where programs are, and the language.
pub fn base_environment() -> Vec<(OsString, OsString)> {
    const KEPT: [&str; 6] = ["PATH", "HOME", "USER", "LANG", "LC_ALL", "TZ"];
    std::env::vars_os().filter(|(name, _)| KEPT.iter().any(|kept| name == kept)).collect()
}

fn wait_until_gone(records: &[Record], grace: Duration) {
    for _ in 0..(grace.as_millis() / POLL.as_millis()) {
        if !records.iter().any(Record::runs) {
            return;
        }
        std::thread::sleep(POLL);
    }
}

fn open_log(path: &Path) -> Result<File, ProcessError> {
    let failed = |source| ProcessError::Log { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(failed)?;
    }
    File::options().create(true).append(true).open(path).map_err(failed)
}

/// Fields of /proc/PID/stat after the command's name, which is in parentheses and may hold anything.
fn stat_field(pid: i32, after_name: usize) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(after_name).map(str::to_owned)
}

/// Start time of a process, `None` if there is none with that number.
pub fn start_time(pid: i32) -> Option<u64> {
    // Field 22 of the line; the name is field 2.
    stat_field(pid, 19)?.parse().ok()
}

fn is_zombie(pid: i32) -> bool {
    stat_field(pid, 0).is_some_and(|state| state == "Z" || state == "X")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_means_one_process_only() {
        let own = Record::own("me");
        assert!(own.runs());
        assert!(!Record { start_time: own.start_time + 1, ..own }.runs());
    }

    #[test]
    fn init_is_never_signalled() {
        let init = Record { label: "init".into(), pid: 1, start_time: start_time(1).unwrap_or_default() };
        assert!(!init.runs());
    }
}
