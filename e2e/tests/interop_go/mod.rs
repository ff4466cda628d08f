//! Builds the Go program of `e2e/interop` and drives it: one process a command, its JSON lines as events.
#![allow(dead_code, reason = "each test target uses a part of it")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything awaited here may take: a small machine under load, not the protocols, sets it.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Events read but not yet asked for; a process that prints more is held back by its pipe.
const EVENT_QUEUE: usize = 4096;

/// The folder of the Go module.
pub fn module() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("interop")
}

/// The built program. The first call of a process builds it; the toolchain's cache makes that short when nothing changed.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(build)
}

fn build() -> PathBuf {
    let module = module();
    let out = module.join("bin");
    std::fs::create_dir_all(&out).expect("e2e/interop/bin");
    // Test processes may run side by side: only one links at a time.
    let lock = File::create(out.join(".lock")).expect("lock file");
    lock.lock().expect("lock");
    let built = Command::new("go").args(["build", "-o", "bin/interop", "."]).current_dir(&module).output();
    let output = match built {
        Ok(output) => output,
        Err(error) => panic!("cannot run `go`: {error}. These tests build e2e/interop with Go 1.26 or newer"),
    };
    assert!(
        output.status.success(),
        "go build of e2e/interop failed:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    out.join("interop")
}

/// Runs a command that ends by itself; its events, or a panic with what it printed if it failed.
pub fn run(args: &[&str]) -> Vec<Value> {
    match try_run(None, args) {
        Ok(events) => events,
        Err(text) => panic!("interop {args:?} failed:\n{text}"),
    }
}

/// As [`run`], inside the network namespace of that path when given, and with a failure as its whole output.
pub fn try_run(netns: Option<&Path>, args: &[&str]) -> Result<Vec<Value>, String> {
    let output = command(netns, args).stdin(Stdio::null()).output().expect("start interop");
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("{text}{}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(text.lines().map(|line| serde_json::from_str(line).expect("a JSON line")).collect())
}

fn command(netns: Option<&Path>, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    if let Some(path) = netns {
        command.arg("--netns").arg(path);
    }
    command.args(args);
    command
}

/// A command that runs on. Dropping it kills the process.
pub struct Peer {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    events: Receiver<Value>,
    /// Every event so far that was waited past, oldest first.
    pub seen: Vec<Value>,
}

impl Peer {
    /// Starts a command in this process's namespace.
    pub fn start(args: &[&str]) -> Peer {
        Peer::start_in(None, args)
    }

    /// Starts a command, inside the network namespace of that path when given.
    pub fn start_in(netns: Option<&Path>, args: &[&str]) -> Peer {
        let mut child =
            command(netns, args).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("start interop");
        let stdout = child.stdout.take().expect("piped");
        let (sender, events) = sync_channel(EVENT_QUEUE);
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines() {
                let Ok(line) = line else { return };
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if sender.send(event).is_err() {
                    return;
                }
            }
        });
        let stdin = child.stdin.take();
        Peer { name: args[0].to_owned(), child, stdin, events, seen: Vec::new() }
    }

    /// Waits for an event of that name.
    pub fn wait(&mut self, event: &str) -> Value {
        self.wait_for(event, |_| true)
    }

    /// Waits for an event of that name which satisfies `accept`; earlier ones are kept in `seen`.
    ///
    /// Panics after [`PATIENCE`], or when the process ends, with what was seen.
    pub fn wait_for(&mut self, event: &str, accept: impl Fn(&Value) -> bool) -> Value {
        let limit = Instant::now() + PATIENCE;
        loop {
            let left = limit.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(found) => {
                    self.seen.push(found.clone());
                    if found["event"] == event && accept(&found) {
                        return found;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!("{}: no {event} within {PATIENCE:?}; seen:\n{}", self.name, self.history())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("{} ended before {event}; seen:\n{}", self.name, self.history())
                }
            }
        }
    }

    /// Events that arrived by now and were not waited for are moved to `seen` as well.
    pub fn drain(&mut self) {
        self.seen.extend(self.events.try_iter());
    }

    /// The seen events of one name.
    pub fn of(&self, event: &str) -> Vec<&Value> {
        self.seen.iter().filter(|found| found["event"] == event).collect()
    }

    /// Sends one line to its standard input.
    pub fn tell(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("open");
        writeln!(stdin, "{line}").expect("write to the peer");
    }

    /// Closes its standard input and waits for it to end by itself.
    pub fn finish(mut self) -> Vec<Value> {
        drop(self.stdin.take());
        let limit = Instant::now() + PATIENCE;
        while let Ok(event) = self.events.recv_timeout(limit.saturating_duration_since(Instant::now())) {
            self.seen.push(event);
        }
        assert!(Instant::now() < limit, "{} did not end; seen:\n{}", self.name, self.history());
        let status = self.child.wait().expect("wait");
        assert!(status.success(), "{} ended with {status}; seen:\n{}", self.name, self.history());
        std::mem::take(&mut self.seen)
    }

    fn history(&self) -> String {
        self.seen.iter().map(|event| format!("  {event}\n")).collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The events of one name among those of a command that ended.
pub fn of<'a>(events: &'a [Value], event: &str) -> Vec<&'a Value> {
    events.iter().filter(|found| found["event"] == event).collect()
}
