//! One of the system's own programs: started when what it needs is there, watched, started again when it ends.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert_runtime::tasks::Tasks;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::container::exit_code;
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
    /// When it is ready: all of these.
    pub ready: Vec<Probe>,
    /// Between SIGTERM and SIGKILL at the end of everything.
    pub grace: Duration,
    /// When asked to restart, how long the old process may go on serving its connections beside the new one; `None`: the
    /// new one waits for its end.
    pub overlap: Option<Duration>,
}

/// What a system program is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonState {
    /// Its process, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i32>,
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
    stop: CancellationToken,
    restarts: mpsc::Receiver<Restart>,
    news: mpsc::Sender<Event>,
    state: DaemonState,
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
    let waiting = Vec::new();
    let mut daemon =
        Daemon { spec, launcher, tasks, stop, restarts, news, state: DaemonState::default(), waiting };
    let stop = daemon.stop.clone();
    daemon.live(&stop).await;
    let gone = DaemonNews { label: daemon.spec.start.label.clone(), state: None };
    let _ = daemon.news.send(Event::Daemon(gone)).await;
}

impl Daemon {
    async fn live(&mut self, stop: &CancellationToken) {
        let mut backoff = FIRST_BACKOFF;
        loop {
            tokio::select! {
                () = self.needs() => {}
                () = stop.cancelled() => return,
            }
            let started = Instant::now();
            match self.once(stop).await {
                Ended::Stopped(running) => return self.end(running).await,
                Ended::Restart(running) => {
                    self.change(|state| {
                        *state = DaemonState { restarts: state.restarts, ..DaemonState::default() }
                    })
                    .await;
                    self.replace(running).await;
                    continue;
                }
                Ended::Exited(code) => {
                    let label = &self.spec.start.label;
                    let log = self.spec.start.log.display();
                    tracing::warn!(program = label, code, pause = ?backoff, %log, "ended by itself, starts again");
                    let problem = format!("ended with code {code}: see {log}");
                    self.change(|state| {
                        *state = DaemonState {
                            pid: None,
                            ready: false,
                            restarts: state.restarts.saturating_add(1),
                            problem: Some(problem),
                        }
                    })
                    .await;
                }
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

    async fn once(&mut self, stop: &CancellationToken) -> Ended {
        for file in &self.spec.stale {
            let _ = std::fs::remove_file(file);
        }
        let mut running = match self.launcher.start(&self.spec.start) {
            Ok(running) => running,
            Err(error) => {
                tracing::error!(%error, "cannot start");
                return Ended::Exited(126);
            }
        };
        let pid = running.pid();
        tracing::info!(program = self.spec.start.label, pid, "started");
        self.change(|state| (state.pid, state.ready) = (Some(pid), false)).await;
        loop {
            let ready = self.is_ready().await;
            let problem = ready.as_ref().err().cloned();
            self.change(|state| (state.ready, state.problem) = (ready.is_ok(), problem)).await;
            if ready.is_ok() {
                self.waiting.drain(..).for_each(|restart| drop(restart.send(Ok(()))));
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

    async fn is_ready(&self) -> Result<(), String> {
        for probe in &self.spec.ready {
            probe.ask(TIMEOUT).await.map_err(|error| format!("not ready: {error}"))?;
        }
        Ok(())
    }

    /// Lets the old process go: beside the new one, or before it.
    async fn replace(&self, running: Running) {
        match self.spec.overlap {
            None => self.end(running).await,
            Some(drain) => {
                running.ask_to_end();
                self.tasks.spawn("drain", async move {
                    let _ = running.end(drain).await;
                });
            }
        }
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
