//! Plays API server, kubelet, kube-proxy and cluster DNS for a directory of manifests.
//!
//! One task owns all state ([`Supervisor`]); containers, system programs, the directory and requests each have a task that
//! only tells it what happened. After each burst of news everything derived is computed again and what changed is put into
//! effect, so there is one place where the order of things matters.

mod pods;
mod podspec;
mod programs;
mod publish;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::manifest::{DirError, Loaded};
use culvert_runtime::tasks::Tasks;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::cleanup::{self, CleanupError};
use crate::cluster::{Key, ServiceAddresses};
use crate::container::ContainerNews;
use crate::control::{self, Reply, Request};
use crate::daemon::{DaemonNews, DaemonState, Restart, Role};
use crate::dns::{self, DnsError, Zone};
use crate::lab::{Lab, LabError, NetNs};
use crate::manifests::Manifests;
use crate::plan::{self, Family, Pool};
use crate::process::{Launcher, Record};
use crate::report::Report;
use crate::serviceproxy::Rules;
use crate::state::{self, MAX_NODE_NAME, StateDir, StateError};
use crate::system::{Programs, System};
use crate::trim;

/// News that wait: each task has at most one on its way, so this only smooths bursts of a few hundred pods.
const NEWS: usize = 1024;
/// Requests to restart one program that wait.
const RESTARTS: usize = 4;
/// How long containers and programs have at the end of everything before they are killed.
const FAREWELL: Duration = Duration::from_secs(3);

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The directory of manifests, absolute.
    pub manifests: PathBuf,
    /// Where state lies.
    pub state: StateDir,
    /// Address families.
    pub family: Family,
    /// The executable with the hidden subcommand: `culvert` itself.
    pub helper: PathBuf,
    /// The mesh's programs; `None` for pods, services and DNS alone.
    pub programs: Option<Programs>,
}

/// Why the supervisor did not start, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The manifests cannot be read.
    #[error(transparent)]
    Manifests(#[from] DirError),
    /// The namespaces cannot be made.
    #[error(transparent)]
    Lab(#[from] LabError),
    /// Something could not be removed.
    #[error("cannot clean up: {0}")]
    Cleanup(#[from] CleanupError),
    /// Cluster DNS does not start.
    #[error(transparent)]
    Dns(#[from] DnsError),
    /// The control socket does not open.
    #[error("cannot listen on {path}: {source}", path = path.display())]
    Control {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A node's name does not fit.
    #[error("node name {node:?} is too long: at most {MAX_NODE_NAME} bytes")]
    NodeName {
        /// The name.
        node: String,
    },
    /// A node has no address left.
    #[error("node {node} has no address left")]
    NodeFull {
        /// The node.
        node: String,
    },
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// The manifests in force changed.
    Loaded(Loaded),
    /// The directory of manifests cannot be read (the last good content stays in force).
    Unreadable(String),
    /// A container did something.
    Container(ContainerNews),
    /// A system program did something.
    Daemon(DaemonNews),
    /// Somebody asks for something.
    Request(Request, oneshot::Sender<Reply>),
    /// A request is done: the reply goes out once the report shows it.
    Finished(Reply, oneshot::Sender<Reply>),
}

struct Daemon {
    label: String,
    role: Role,
    node: Option<String>,
    log: PathBuf,
    state: DaemonState,
    restarts: mpsc::Sender<Restart>,
}

struct Supervisor {
    options: Options,
    lab: Lab,
    launcher: Launcher,
    system: Option<System>,
    tasks: Tasks,
    stop: CancellationToken,
    /// Ends the system programs; pods go before them.
    stop_system: CancellationToken,
    sender: mpsc::Sender<Event>,
    loaded: Loaded,
    pods: BTreeMap<Key, pods::Slot>,
    pod_pools: BTreeMap<String, Pool>,
    daemons: BTreeMap<String, Daemon>,
    service_addresses: ServiceAddresses,
    service_files: BTreeMap<Key, Vec<IpAddr>>,
    zone: watch::Sender<Arc<Zone>>,
    /// What is in effect on each node.
    rules: BTreeMap<String, Rules>,
    rule_problems: BTreeMap<String, String>,
    service_problems: Vec<String>,
    directory_problem: Option<String>,
    /// Pods that could not be made.
    failures: BTreeMap<Key, String>,
    report: Report,
    reported: bool,
    /// The pods of the first manifests have been made.
    populated: bool,
    /// To be sent after the next report.
    replies: Vec<(Reply, oneshot::Sender<Reply>)>,
}

/// Runs a sandbox until `stop`, then removes all of it. What an earlier run left after a crash is removed first.
pub async fn run(options: Options, stop: CancellationToken) -> Result<(), SupervisorError> {
    let state = options.state.clone();
    let _lock = state.lock()?;
    // The logs of a supervisor in the background are already being written.
    let keep = ["supervisor.log", "lock"];
    cleanup::cleanup(&state, &keep)?;
    let outcome = supervise(options, stop).await;
    cleanup::cleanup(&state, if outcome.is_ok() { &[] } else { &keep[..1] })?;
    outcome
}

async fn supervise(options: Options, stop: CancellationToken) -> Result<(), SupervisorError> {
    let (manifests, loaded) = Manifests::open(&options.manifests)?;
    let (sender, mut events) = mpsc::channel(NEWS);
    let mut supervisor = Supervisor::start(options, loaded, sender, stop.clone())?;
    supervisor.tasks.spawn("manifests", watch_manifests(manifests, supervisor.sender.clone()));
    loop {
        tokio::select! {
            event = events.recv() => {
                // The supervisor itself holds a sender.
                let Some(event) = event else { break };
                supervisor.take(event);
                while let Ok(event) = events.try_recv() {
                    supervisor.take(event);
                }
                supervisor.publish();
                for (reply, to) in supervisor.replies.drain(..) {
                    let _ = to.send(reply);
                }
            }
            () = stop.cancelled() => break,
        }
    }
    supervisor.shut_down(events).await
}

async fn watch_manifests(mut manifests: Manifests, events: mpsc::Sender<Event>) {
    loop {
        let event = match manifests.changed().await {
            Ok(loaded) => Event::Loaded(loaded),
            Err(error) => {
                tokio::time::sleep(FAREWELL).await;
                Event::Unreadable(error.to_string())
            }
        };
        if events.send(event).await.is_err() {
            return;
        }
    }
}

impl Supervisor {
    fn start(
        options: Options,
        loaded: Loaded,
        sender: mpsc::Sender<Event>,
        stop: CancellationToken,
    ) -> Result<Supervisor, SupervisorError> {
        let state = &options.state;
        let lab = Lab::create(&state.netns(), options.family)?;
        let tasks = Tasks::new("sandbox");
        let (zone, watched) = watch::channel(Arc::new(Zone::default()));
        let dns = options.family.keep(plan::dns_addresses());
        dns::serve(&tasks, lab.controller(), &dns, watched)?;
        let path = state.control_socket();
        let listener = control::listen(&path).map_err(|source| SupervisorError::Control { path, source })?;
        tasks.spawn("control", control::serve(listener, sender.clone(), tasks.clone()));
        tasks.spawn("logs", trim::trim_logs(state.clone()));
        let nsswitch = podspec::nsswitch(std::path::Path::new("/etc/nsswitch.conf"));
        state::write_whole(&state.nsswitch(), nsswitch.as_bytes(), 0o644)?;
        for directory in ["pods", "services"] {
            let path = state.status().join(directory);
            std::fs::create_dir_all(&path).map_err(state::io_error("create", &path))?;
        }
        let system = options
            .programs
            .clone()
            .map(|programs| System::new(programs, state.clone(), options.manifests.clone(), options.family));
        let mut supervisor = Supervisor {
            launcher: Launcher::new(options.helper.clone(), state),
            service_addresses: ServiceAddresses::new(options.family),
            report: empty_report(&options),
            options,
            lab,
            system,
            tasks,
            stop_system: CancellationToken::new(),
            stop,
            sender,
            loaded,
            pods: BTreeMap::new(),
            pod_pools: BTreeMap::new(),
            daemons: BTreeMap::new(),
            service_files: BTreeMap::new(),
            zone,
            rules: BTreeMap::new(),
            rule_problems: BTreeMap::new(),
            service_problems: Vec::new(),
            directory_problem: None,
            failures: BTreeMap::new(),
            reported: false,
            populated: false,
            replies: Vec::new(),
        };
        supervisor.populate()?;
        Ok(supervisor)
    }

    /// Nodes, programs and pods of the first manifests.
    fn populate(&mut self) -> Result<(), SupervisorError> {
        // All tokens are there before the controller reads them, and all services before the first pod asks.
        if let Some(system) = &self.system {
            system.prepare()?;
        }
        for node in pods::node_names(&self.loaded) {
            self.ensure_node(&node)?;
        }
        if let Some(system) = &self.system {
            let spec = system.controller(&self.lab);
            self.start_daemon(spec);
        }
        self.publish();
        self.reconcile_pods();
        self.populated = true;
        self.publish();
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Loaded(loaded) => {
                self.directory_problem = None;
                for error in &loaded.errors {
                    tracing::warn!(%error, "this file's last good content stays in force");
                }
                self.loaded = loaded;
                self.reconcile_pods();
            }
            Event::Unreadable(problem) => self.directory_problem = Some(problem),
            Event::Container(news) => self.container_news(news),
            Event::Daemon(DaemonNews { label, state: Some(state) }) => {
                if let Some(daemon) = self.daemons.get_mut(&label) {
                    daemon.state = state;
                }
            }
            Event::Daemon(DaemonNews { label, state: None }) => drop(self.daemons.remove(&label)),
            Event::Finished(reply, to) => self.replies.push((reply, to)),
            Event::Request(Request::Restart { role, node }, reply) => {
                self.restart(role, node.as_deref(), reply)
            }
        }
    }

    fn node_netns(&self, name: &str) -> Result<NetNs, SupervisorError> {
        let node = self.lab.node(name).ok_or_else(|| LabError::NoNode { name: name.to_owned() })?;
        Ok(node.netns.clone())
    }

    fn node_addresses(&self, name: &str) -> Vec<IpAddr> {
        self.lab.node(name).map(|node| node.addresses.clone()).unwrap_or_default()
    }

    /// Pods first, then the programs that carry their traffic, then everything else.
    async fn shut_down(mut self, mut events: mpsc::Receiver<Event>) -> Result<(), SupervisorError> {
        // The containers' tasks saw `stop` already. What is left when time is up, the clean-up kills.
        let _ = tokio::time::timeout(FAREWELL, async {
            while self.pods.values().any(|slot| !slot.is_gone()) {
                let Some(event) = events.recv().await else { return };
                self.farewell(event);
            }
        })
        .await;
        self.stop_system.cancel();
        let _ = tokio::time::timeout(FAREWELL, async {
            while !self.daemons.is_empty() {
                let Some(event) = events.recv().await else { return };
                self.farewell(event);
            }
        })
        .await;
        self.tasks.abort_all();
        let _ = self.tasks.wait(FAREWELL).await;
        cleanup::end_processes(&self.options.state)?;
        Ok(self.lab.destroy()?)
    }

    /// News at the end: only goodbyes count.
    fn farewell(&mut self, event: Event) {
        match event {
            Event::Container(ContainerNews { pod, state: None, .. }) => {
                if let Some(slot) = self.pods.get_mut(&pod) {
                    slot.said_goodbye();
                }
            }
            Event::Daemon(DaemonNews { label, state: None }) => drop(self.daemons.remove(&label)),
            _ => {}
        }
    }
}

fn empty_report(options: &Options) -> Report {
    Report {
        supervisor: Record::own("supervisor"),
        manifests: options.manifests.clone(),
        family: options.family,
        mesh: options.programs.is_some(),
        settled: false,
        problems: Vec::new(),
        nodes: Vec::new(),
        system: Vec::new(),
        pods: Vec::new(),
        services: Vec::new(),
    }
}
