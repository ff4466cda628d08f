//! One container of a pod: waits until the pod may start, runs the command, asks for readiness, restarts it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert_k8s_api::core::RestartPolicy;
use culvert_k8s_api::status::{Redirection, RedirectionStatus};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cluster::Key;
use crate::probe::Probe;
use crate::process::{Launcher, Start};
use crate::state;
use crate::supervisor::Event;

/// First pause before a restart; it doubles.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
/// Longest pause before a restart.
const LAST_BACKOFF: Duration = Duration::from_secs(30);
/// A command that ran this long starts over with the first pause.
const SETTLED: Duration = Duration::from_secs(10);
/// How often the agent's word is looked for.
const GATE_POLL: Duration = Duration::from_millis(50);
/// Pause between probes until the first success: readiness is what everybody waits for.
const EAGER: Duration = Duration::from_millis(100);

/// A container to run.
#[derive(Clone, Debug)]
pub struct ContainerSpec {
    /// Its pod.
    pub pod: Key,
    /// The pod's incarnation.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// What runs.
    pub start: Start,
    /// What follows its end.
    pub restart: RestartPolicy,
    /// When it may have traffic; without one as soon as it runs.
    pub readiness: Option<Readiness>,
    /// Where the agent reports that the pod is redirected. As under a CNI plugin, nothing of an enrolled pod runs before:
    /// its first connections would bypass the mesh.
    pub gate: Option<PathBuf>,
    /// Between SIGTERM and SIGKILL.
    pub grace: Duration,
}

/// A readiness probe with its timing.
#[derive(Clone, Debug)]
pub struct Readiness {
    /// The question.
    pub probe: Probe,
    /// Before the first.
    pub delay: Duration,
    /// Between two.
    pub period: Duration,
    /// For one answer.
    pub timeout: Duration,
    /// Failures in a row that make it unready.
    pub failures: u32,
}

/// What a container is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", tag = "state")]
pub enum ContainerState {
    /// Not running; the reason is for people.
    Waiting {
        /// Why.
        reason: String,
    },
    /// Running.
    Running {
        /// Its process.
        pid: i32,
        /// It may have traffic.
        ready: bool,
    },
    /// Ended for good.
    Exited {
        /// Exit code; 128 and the signal if one ended it.
        code: i32,
    },
}

/// News of a container.
#[derive(Clone, Debug)]
pub struct ContainerNews {
    /// Its pod.
    pub pod: Key,
    /// The pod's incarnation.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// What it is doing now; `None`: it is gone and no more news come.
    pub state: Option<ContainerState>,
    /// How often it was started again.
    pub restarts: u32,
}

struct Container {
    spec: ContainerSpec,
    launcher: Launcher,
    stop: CancellationToken,
    news: mpsc::Sender<Event>,
    restarts: u32,
}

/// Why a run of the command is over.
enum Ended {
    /// By itself, with this code.
    Exited(i32),
    /// The pod is being removed.
    Stopped,
}

/// Runs a container until it has ended for good and `stop` is called.
pub async fn run(
    spec: ContainerSpec,
    launcher: Launcher,
    stop: CancellationToken,
    news: mpsc::Sender<Event>,
) {
    let mut container = Container { spec, launcher, stop, news, restarts: 0 };
    container.live().await;
    container.tell(None).await;
}

impl Container {
    async fn live(&mut self) {
        if !self.admitted().await {
            return;
        }
        let mut backoff = FIRST_BACKOFF;
        loop {
            let started = Instant::now();
            let Ended::Exited(code) = self.once().await else { return };
            let again = match self.spec.restart {
                RestartPolicy::Always => true,
                RestartPolicy::OnFailure => code != 0,
                RestartPolicy::Never => false,
            };
            if !again {
                self.tell(Some(ContainerState::Exited { code })).await;
                return self.stop.cancelled().await;
            }
            if started.elapsed() >= SETTLED {
                backoff = FIRST_BACKOFF;
            }
            let reason = format!("ended with code {code}, starts again in {} s", backoff.as_secs());
            self.tell(Some(ContainerState::Waiting { reason })).await;
            tokio::select! {
                () = tokio::time::sleep(backoff) => {}
                () = self.stop.cancelled() => return,
            }
            backoff = (backoff * 2).min(LAST_BACKOFF);
            self.restarts = self.restarts.saturating_add(1);
        }
    }

    /// Waits at the gate; false if the pod is removed meanwhile.
    async fn admitted(&mut self) -> bool {
        let Some(gate) = self.spec.gate.clone() else { return true };
        let mut told = String::new();
        loop {
            let status = state::read_json::<RedirectionStatus>(&gate).ok().flatten();
            let reason = match status {
                Some(RedirectionStatus { redirection: Redirection::Enabled, .. }) => return true,
                Some(RedirectionStatus { error: Some(error), .. }) => format!("waits for the mesh: {error}"),
                _ => "waits for the mesh".to_owned(),
            };
            if reason != told {
                told.clone_from(&reason);
                self.tell(Some(ContainerState::Waiting { reason })).await;
            }
            tokio::select! {
                () = tokio::time::sleep(GATE_POLL) => {}
                () = self.stop.cancelled() => return false,
            }
        }
    }

    /// One run of the command.
    async fn once(&mut self) -> Ended {
        let mut running = match self.launcher.start(&self.spec.start) {
            Ok(running) => running,
            Err(error) => {
                tracing::warn!(pod = %self.spec.pod, container = self.spec.name, %error, "cannot start");
                return Ended::Exited(126);
            }
        };
        let pid = running.pid();
        let unprobed = self.spec.readiness.is_none();
        self.tell(Some(ContainerState::Running { pid, ready: unprobed })).await;
        let stop = self.stop.clone();
        tokio::select! {
            status = running.wait() => return Ended::Exited(exit_code(status)),
            () = stop.cancelled() => {}
            () = self.watch(pid) => {}
        }
        if let Err(error) = running.end(self.spec.grace).await {
            tracing::warn!(pod = %self.spec.pod, %error, "cannot wait for the container's end");
        }
        Ended::Stopped
    }

    /// Asks for readiness for as long as the command runs. Does not end.
    async fn watch(&self, pid: i32) {
        let Some(readiness) = &self.spec.readiness else { return std::future::pending().await };
        tokio::time::sleep(readiness.delay).await;
        let (mut ready, mut failures) = (false, 0);
        loop {
            let answer = readiness.probe.ask(readiness.timeout).await;
            failures = if answer.is_ok() { 0 } else { failures + 1 };
            let now = answer.is_ok() || (ready && failures < readiness.failures);
            if now != ready {
                ready = now;
                self.tell(Some(ContainerState::Running { pid, ready })).await;
            }
            tokio::time::sleep(if ready { readiness.period } else { EAGER.min(readiness.period) }).await;
        }
    }

    async fn tell(&self, state: Option<ContainerState>) {
        let news = ContainerNews {
            pod: self.spec.pod.clone(),
            uid: self.spec.uid.clone(),
            name: self.spec.name.clone(),
            state,
            restarts: self.restarts,
        };
        let _ = self.news.send(Event::Container(news)).await;
    }
}

/// As a shell counts it: 128 and the signal's number if a signal ended it.
pub fn exit_code(status: std::io::Result<std::process::ExitStatus>) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.map_or(126, |status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default()))
}
