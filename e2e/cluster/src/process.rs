//! Programs that go on: started with a log, recorded so that a later run can find and end exactly those.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_sandbox::process::{Record, end_all, start_time};
use nix::sys::signal::Signal;

use crate::files::Files;

/// How often a condition is looked at that nothing announces.
pub(crate) const POLL: Duration = Duration::from_millis(20);
/// Between SIGTERM and SIGKILL at the end of everything.
const GRACE: Duration = Duration::from_secs(3);

/// A program that was started.
#[derive(Clone, Debug)]
pub struct Process {
    record: Record,
    file: PathBuf,
}

impl Process {
    /// Starts `command`, its output appended to the label's log. What `command` is follows by exec, unless `behind` says that it
    /// forks and waits (as `unshare --fork` and `nsenter --pid` do): then its child is what counts.
    pub(crate) fn start(files: &Files, label: &str, mut command: Command, behind: bool) -> Result<Self> {
        let log = files.log(label);
        fs::create_dir_all(log.parent().context("logs have a directory")?)?;
        fs::create_dir_all(files.processes())?;
        let log = File::options().create(true).append(true).open(&log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child = command.spawn().with_context(|| format!("starting {label}: {command:?}"))?;
        let mut pid = i32::try_from(child.id())?;
        if behind {
            let started = Instant::now();
            pid = loop {
                if let Some(pid) = child_of(pid) {
                    break pid;
                }
                if let Some(status) = child.try_wait()? {
                    bail!("{label} ended at once ({status}): see {}", files.log(label).display());
                }
                if started.elapsed() > Duration::from_secs(5) {
                    bail!("{label} does not start");
                }
                sleep(Duration::from_millis(1));
            };
        }
        // Nobody waits for it otherwise, and its number would stay taken.
        std::thread::Builder::new().stack_size(64 * 1024).spawn(move || child.wait())?;
        let record = Record { label: label.to_owned(), pid, start_time: start_time(pid).unwrap_or_default() };
        let file = files.processes().join(format!("{label}.json"));
        fs::write(&file, serde_json::to_vec(&record)?)?;
        Ok(Self { record, file })
    }

    /// Finds one that was started before.
    ///
    /// # Errors
    /// If none of that name was recorded.
    pub fn find(files: &Files, label: &str) -> Result<Self> {
        let file = files.processes().join(format!("{label}.json"));
        let text = fs::read(&file).with_context(|| format!("no program {label} was started here"))?;
        Ok(Self { record: serde_json::from_slice(&text)?, file })
    }

    /// Its process id on this machine.
    pub fn pid(&self) -> i32 {
        self.record.pid
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        self.record.runs()
    }

    /// SIGKILL, and waits for its end.
    ///
    /// # Errors
    /// If it does not end within five seconds.
    pub fn kill(&self) -> Result<()> {
        self.record.signal(Signal::SIGKILL);
        let started = Instant::now();
        while self.record.runs() {
            if started.elapsed() > Duration::from_secs(5) {
                bail!("{} (process {}) does not end", self.record.label, self.record.pid);
            }
            sleep(POLL);
        }
        let _ = fs::remove_file(&self.file);
        Ok(())
    }
}

/// Ends every program that was started here.
pub(crate) fn end_recorded(files: &Files) -> Result<()> {
    let find = || {
        let Ok(entries) = fs::read_dir(files.processes()) else { return Vec::new() };
        let read = |path: PathBuf| serde_json::from_slice::<Record>(&fs::read(path).ok()?).ok();
        entries.flatten().filter_map(|entry| read(entry.path())).filter(Record::runs).collect()
    };
    let left = end_all(find, GRACE);
    if let Some(left) = left.first() {
        bail!("{} (process {}) does not end", left.label, left.pid);
    }
    Ok(())
}

/// The first child of a process.
fn child_of(pid: i32) -> Option<i32> {
    let children = fs::read_to_string(Path::new("/proc").join(format!("{pid}/task/{pid}/children"))).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
