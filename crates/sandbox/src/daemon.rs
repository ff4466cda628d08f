//! One of the system's own programs: started when what it needs is there, watched, started again when it ends.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert_runtime::tasks::Tasks;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::container::exit_code;
use crate::lab::NetNs;
use crate::probe::Probe;
use crate::process::{Launcher, Running, Start};
use crate::supervisor::Event;

/// First pause before a restart; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// Longest pause before a restart.
const LAST_BACKOFF: Duration = Duration::from_secs(15);
/// A program that ran this long starts over with the first pause.
const SETTLED: Duration = Duration::from_secs(10);
/// Pause between looks at files and ports until the program is ready.
const EAGER: Duration = Duration::from_millis(50);
/// Pause between looks once it is.
const CALM: Duration = Duration::from_secs(2);
/// A new process that is not ready after this long does not take over.
const TAKE_OVER: Duration = Duration::from_secs(30);
/// For one answer.
const TIMEOUT: Duration = Duration::from_secs(1);

/// What a system program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The control plane; one.
    Controller,
    /// Enrols the pods of a node.
    Agent,
    /// Carries the traffic of a node.
    Proxy,
}

/// A system program to run.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// What it is.
    pub role: Role,
    /// Its node; `None` for the controller.
    pub node: Option<String>,
    /// What runs.
    pub start: Start,
    /// Files that must be there before it starts.
    pub needs: Vec<PathBuf>,
    /// Files removed before each start: an earlier process's would look like readiness.
    pub stale: Vec<PathBuf>,
    /// Where it may run. With two, a restart starts the new process in the other one and lets the old process finish its
    /// connections meanwhile, as a rolling update does; with one, the new process waits for the old one's end.
    pub slots: Vec<Slot>,
    /// Between SIGTERM and SIGKILL at the end of everything.
    pub grace: Duration,
    /// How long a process that was replaced may go on serving its connections.
    pub drain: Duration,
}

/// A place for a system program.
#[derive(Clone, Debug)]
pub struct Slot {
    /// Its namespace.
    pub netns: NetNs,
    /// When a process there is ready: all of these.
    pub ready: Vec<Probe>,
}

/// What a system program is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonState {
    /// Its process, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
    /// Where that runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<PathBuf>,
    /// It is ready.
    pub ready: bool,
    /// How often it was started again after it ended by itself.
    pub restarts: u32,
    /// What is wrong, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// News of a system program, by its label; `None`: it is gone and no more news come.
#[derive(Clone, Debug)]
pub struct DaemonNews {
    /// The label of its [`Start`].
    pub label: String,
    /// What it is doing now.
    pub state: Option<DaemonState>,
}

/// A request to restart; answered when the new process is ready.
pub type Restart = oneshot::Sender<Result<(), String>>;

struct Daemon {
    spec: DaemonSpec,
    launcher: Launcher,
    tasks: Tasks,
    restarts: mpsc::Receiver<Restart>,
    news: mpsc::Sender<Event>,
    state: DaemonState,
    /// Index of the slot in use.
    slot: usize,
    /// Ends when the process that was replaced, in the other slot, has left.
    leaving: Option<oneshot::Receiver<()>>,
    /// Who waits for the next readiness.
    waiting: Vec<Restart>,
}

/// Why a run is over.
enum Ended {
    Exited(i32),
    Restart(Running),
    Stopped(Running),
}

/// Runs a system program until `stop`.
pub async fn run(
    spec: DaemonSpec,
    launcher: Launcher,
    tasks: Tasks,
    stop: CancellationToken,
    restarts: mpsc::Receiver<Restart>,
    news: mpsc::Sender<Event>,
) {
    let mut daemon = Daemon {
        spec,
        launcher,
        tasks,
        restarts,
        news,
        state: DaemonState::default(),
        slot: 0,
        leaving: None,
        waiting: Vec::new(),
    };
    daemon.live(&stop).await;
    let gone = DaemonNews { label: daemon.spec.start.label.clone(), state: None };
    let _ = daemon.news.send(Event::Daemon(gone)).await;
}

impl Daemon {
    async fn live(&mut self, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        let mut next = None;
        loop {
            let started = Instant::now();
            let ended = match next.take() {
                Some(running) => self.watch(running, stop).await,
                None => {
                    tokio::select! {
                        () = self.needs() => {}
                        () = stop.cancelled() => return,
                    }
                    match self.start(self.slot) {
                        Some(running) => self.watch(running, stop).await,
                        None => Ended::Exited(126),
                    }
                }
            };
            match ended {
                Ended::Stopped(running) => return self.end(running).await,
                Ended::Restart(running) if self.spec.slots.len() > 1 => {
                    next = Some(self.take_over(running, stop).await);
                    continue;
                }
                Ended::Restart(running) => {
                    self.change(|state| (state.pid, state.ready, state.problem) = (None, false, None)).await;
                    self.end(running).await;
                    continue;
                }
                Ended::Exited(code) => self.crashed(code, backoff).await,
            }
            if started.elapsed() >= SETTLED {
                backoff = FIRST_BACKOFF;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = stop.cancelled() => return,
            }
            backoff = (backoff * 2).min(LAST_BACKOFF);
        }
    }

    async fn crashed(&mut self, code: i32, pause: Duration) {
        let log = self.spec.start.log.display();
        tracing::warn!(program = self.spec.start.label, code, ?pause, %log, "ended by itself, starts again");
        let problem = format!("ended with code {code}: see {log}");
        self.change(|state| {
            state.restarts = state.restarts.saturating_add(1);
            (state.pid, state.ready, state.problem) = (None, false, Some(problem));
        })
        .await;
    }

    /// Waits for the files it needs.
    async fn needs(&mut self) {
        let needs = self.spec.needs.clone();
        for file in needs {
            while !file.exists() {
                let problem = format!("waits for {}", file.display());
                if self.state.problem.as_deref() != Some(&problem) {
                    self.change(|state| state.problem = Some(problem)).await;
                }
                tokio::time::sleep(EAGER).await;
            }
        }
    }

    fn start(&self, slot: usize) -> Option<Running> {
        for file in &self.spec.stale {
            let _ = std::fs::remove_file(file);
        }
        let mut start = self.spec.start.clone();
        self.spec.slots[slot].netns.path().clone_into(&mut start.place.netns);
        match self.launcher.start(&start) {
            Ok(running) => {
                tracing::info!(program = start.label, pid = running.pid(), "started");
                Some(running)
            }
            Err(error) => {
                tracing::error!(%error, "cannot start");
                None
            }
        }
    }

    /// Looks after a process until something ends that.
    async fn watch(&mut self, mut running: Running, stop: &CancellationToken) -> Ended {
        let (pid, netns) = (running.pid(), self.spec.slots[self.slot].netns.path().to_owned());
        self.change(|state| {
            state.ready &= state.pid == Some(pid);
            (state.pid, state.netns) = (Some(pid), Some(netns));
        })
        .await;
        loop {
            let ready = self.is_ready(self.slot).await;
            let problem = ready.as_ref().err().cloned();
            self.change(|state| (state.ready, state.problem) = (ready.is_ok(), problem)).await;
            if ready.is_ok() {
                self.answer(&Ok(()));
            }
            let pause = if ready.is_ok() { CALM } else { EAGER };
            tokio::select! {
                status = running.wait() => return Ended::Exited(exit_code(status)),
                () = stop.cancelled() => return Ended::Stopped(running),
                Some(restart) = self.restarts.recv() => {
                    self.waiting.push(restart);
                    return Ended::Restart(running);
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Starts a new process beside `old` and, when it is ready, asks `old` to go. Returns the one that serves.
    async fn take_over(&mut self, old: Running, stop: &CancellationToken) -> Running {
        let slot = (self.slot + 1) % self.spec.slots.len();
        if let Some(leaving) = self.leaving.take() {
            // Bounded: it is killed when its drain is over.
            let _ = leaving.await;
        }
        let Some(mut new) = self.start(slot) else {
            self.answer(&Err("the new process does not start".to_owned()));
            return old;
        };
        let failure = tokio::select! {
            ready = self.becomes_ready(slot) => ready.err(),
            status = new.wait() => Some(format!("the new process ended with code {}", exit_code(status))),
            () = stop.cancelled() => Some("everything ends".to_owned()),
        };
        if let Some(failure) = failure {
            self.end(new).await;
            self.answer(&Err(failure));
            return old;
        }
        self.slot = slot;
        let (left, leaving) = oneshot::channel();
        self.leaving = Some(leaving);
        old.ask_to_end();
        let drain = self.spec.drain;
        self.tasks.spawn("drain", async move {
            let _ = old.end(drain).await;
            let _ = left.send(());
        });
        let pid = new.pid();
        self.change(|state| (state.pid, state.ready) = (Some(pid), true)).await;
        new
    }

    async fn becomes_ready(&self, slot: usize) -> Result<(), String> {
        let started = Instant::now();
        loop {
            match self.is_ready(slot).await {
                Err(why) if started.elapsed() >= TAKE_OVER => return Err(why),
                Err(_) => tokio::time::sleep(EAGER).await,
                Ok(()) => return Ok(()),
            }
        }
    }

    async fn is_ready(&self, slot: usize) -> Result<(), String> {
        for probe in &self.spec.slots[slot].ready {
            probe.ask(TIMEOUT).await.map_err(|error| format!("not ready: {error}"))?;
        }
        Ok(())
    }

    fn answer(&mut self, outcome: &Result<(), String>) {
        self.waiting.drain(..).for_each(|restart| drop(restart.send(outcome.clone())));
    }

    async fn end(&self, running: Running) {
        if let Err(error) = running.end(self.spec.grace).await {
            tracing::warn!(program = self.spec.start.label, %error, "cannot wait for its end");
        }
    }

    /// Changes the state and tells it if that made a difference.
    async fn change(&mut self, change: impl FnOnce(&mut DaemonState)) {
        let before = self.state.clone();
        change(&mut self.state);
        if self.state != before {
            let news = DaemonNews { label: self.spec.start.label.clone(), state: Some(self.state.clone()) };
            let _ = self.news.send(Event::Daemon(news)).await;
        }
    }
}
