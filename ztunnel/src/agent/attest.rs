//! Keeping rules in force: writes them, hears of every change to them in the kernel, and heals what somebody altered, while the
//! pod's traffic is held on the node's side.
//!
//! Meanwhile a guard in the pod, which nobody else can change, stops and counts what would get around the proxy. Where the kernel has no
//! tables with an owner (before 5.12) packets may leave in plaintext for the moment between a change and the kernel's notice of it
//! being handled. A program in the pod with `CAP_NET_ADMIN` can still get around the mesh by other means: it can give its packets the
//! proxy's mark.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use culvert_net::netns::NetNs;
use culvert_net::nft::Monitor;
use culvert_net::probes::{self, Cgroup, Kubelet};
use culvert_net::redirect::{self, Established, Guard, RedirectConfig, RedirectError, Verdict};
use culvert_net::{hold, link};
use culvert_runtime::tasks::{Task, Tasks};
use culvert_runtime::workers::Workers;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::metrics::AgentMetrics;

/// Between two looks at one pod: who changes rules in a loop costs one look (under 1 ms) in so much time.
const PAUSE: Duration = Duration::from_millis(5);

/// What a look at a pod's rules found.
#[derive(Debug)]
pub enum Found {
    /// Exactly what should be.
    Intact,
    /// Something else, which has been mended.
    Healed,
    /// Something else, or nothing that could be read; the pod's traffic is held where that is possible.
    Broken(RedirectError),
}

/// What the enroller needs of rules; a fake in memory stands for the kernel in tests.
pub trait Rules: Send + Sync {
    /// What is there now, compared with what should be.
    ///
    /// # Errors
    /// The kernel cannot be asked.
    fn verify(&self, netns: &NetNs, rules: &RedirectConfig) -> Result<Verdict, RedirectError>;

    /// Puts a pod's rules in force and keeps them so. `established` is said when the pod had none.
    ///
    /// # Errors
    /// The rules are what they were.
    fn install(
        &self,
        uid: &str,
        netns: &Arc<NetNs>,
        rules: &RedirectConfig,
        established: Option<Established>,
    ) -> Result<(), RedirectError>;

    /// Looks at a pod's rules and mends them; unless `thorough`, only where changes would not be noticed as they happen.
    fn check(&self, uid: &str, thorough: bool) -> Found;

    /// Lets go of a pod. Its rules stay as they are.
    fn release(&self, uid: &str);

    /// Takes rules away, of a pod that is not guarded.
    ///
    /// # Errors
    /// Something of them is still there.
    fn remove(&self, netns: &NetNs) -> Result<(), RedirectError>;

    /// Lets the kubelet probe exactly these; unless `thorough`, without looking whether somebody altered what was said before.
    ///
    /// # Errors
    /// What was allowed before still is, and no more.
    fn allow_probes(&self, targets: &BTreeSet<SocketAddr>, thorough: bool) -> anyhow::Result<()>;

    /// What it may probe now, by whoever said so.
    fn probed(&self) -> BTreeSet<SocketAddr>;
}

/// How the node's kubelet is known.
#[derive(Clone, Debug, Default)]
pub struct KubeletConfig {
    /// Its user.
    pub uid: u32,
    /// Its cgroup, if that is to count.
    pub cgroup: Option<PathBuf>,
}

/// The kernel's rules, guarded.
#[derive(Clone, Debug)]
pub struct Sentry {
    shared: Arc<Shared>,
    tasks: Tasks,
    /// A thread of its own, so that nothing else the agent does (reading a thousand manifests) keeps a pod unguarded.
    thread: Handle,
    /// Ends with the last of us.
    _worker: Arc<Mutex<Workers>>,
}

#[derive(Debug)]
struct Shared {
    /// Where the pods' interfaces have their other ends.
    node: NetNs,
    /// One for each enrolled pod, with one task and one descriptor each.
    guarded: Mutex<BTreeMap<String, Guarded>>,
    held: Mutex<BTreeSet<String>>,
    kubelet: KubeletConfig,
    /// Who may probe what, as last written.
    probes: Mutex<Option<(Kubelet, BTreeSet<SocketAddr>)>>,
    metrics: AgentMetrics,
    alarm: Arc<Notify>,
}

#[derive(Debug)]
struct Guarded {
    netns: Arc<NetNs>,
    rules: RedirectConfig,
    /// On the node's side.
    interfaces: Vec<String>,
    watch: Option<Task>,
    guard: Option<Guard>,
    /// Packets that the guard had stopped when it was last asked.
    stopped: u64,
}

impl Sentry {
    /// Guards nobody yet. What a predecessor held stays held until [`release_strangers`](Self::release_strangers).
    ///
    /// # Errors
    /// If the thread cannot be made.
    pub fn new(
        node: NetNs,
        kubelet: KubeletConfig,
        metrics: AgentMetrics,
        tasks: Tasks,
    ) -> std::io::Result<Self> {
        let shared = Shared {
            node,
            kubelet,
            probes: Mutex::default(),
            metrics,
            guarded: Mutex::default(),
            held: Mutex::default(),
            alarm: Arc::new(Notify::new()),
        };
        let worker = Workers::start(1, "attest")?;
        let thread = worker.handle(0).clone();
        tasks.spawn_on(&thread, "attest", async {
            if let Err(error) = culvert_net::hurry_thread() {
                tracing::info!(%error, "altered rules may be noticed late on a busy node");
            }
        });
        Ok(Self { shared: Arc::new(shared), tasks, thread, _worker: Arc::new(Mutex::new(worker)) })
    }

    /// Wakes when rules could not be mended.
    pub fn alarm(&self) -> Arc<Notify> {
        self.shared.alarm.clone()
    }

    /// Ends every hold but those of this process: a predecessor may have ended in the middle of one.
    pub fn release_strangers(&self) {
        self.shared.apply_holds();
    }

    fn watch(&self, uid: &str, netns: &NetNs) -> Option<Task> {
        // The monitor belongs to the thread that waits for it.
        let _inside = self.thread.enter();
        match Monitor::open(netns) {
            Ok(monitor) => {
                let (shared, uid) = (self.shared.clone(), uid.to_owned());
                Some(self.tasks.spawn_on(&self.thread, "attest", shared.watch(uid, monitor)))
            }
            Err(error) => {
                tracing::warn!(uid, %error, "changes to a pod's rules are noticed late: no notifications");
                None
            }
        }
    }
}

impl Rules for Sentry {
    fn verify(&self, netns: &NetNs, rules: &RedirectConfig) -> Result<Verdict, RedirectError> {
        redirect::verify(netns, rules)
    }

    fn install(
        &self,
        uid: &str,
        netns: &Arc<NetNs>,
        rules: &RedirectConfig,
        established: Option<Established>,
    ) -> Result<(), RedirectError> {
        let mut guarded = self.shared.guarded.lock();
        if let Some(known) =
            guarded.get_mut(uid).filter(|it| it.netns.id() == netns.id() && it.watch.is_some())
        {
            self.shared.rewrite(known, rules, established)?;
            self.shared.release(&known.interfaces);
            return Ok(());
        }
        // Opened before the rules are written: no change after them is missed.
        let mut new = Guarded {
            netns: netns.clone(),
            rules: rules.clone(),
            interfaces: interfaces(uid, netns, &self.shared.node),
            watch: self.watch(uid, netns),
            guard: None,
            stopped: 0,
        };
        if let Err(error) = write(netns, rules, established) {
            // Who was guarded before still is.
            new.stop();
            return Err(error);
        }
        new.guard = guard(uid, netns);
        new.raise();
        self.shared.release(&new.interfaces);
        if let Some(old) = guarded.insert(uid.to_owned(), new) {
            old.stop();
            self.shared.release(&old.interfaces);
        }
        Ok(())
    }

    fn check(&self, uid: &str, thorough: bool) -> Found {
        let watched = || self.shared.guarded.lock().get(uid).is_some_and(|pod| pod.watch.is_some());
        if !thorough && watched() { Found::Intact } else { self.shared.check(uid) }
    }

    fn release(&self, uid: &str) {
        let released = self.shared.guarded.lock().remove(uid);
        if let Some(mut guarded) = released {
            self.shared.count(&mut guarded);
            guarded.stop();
            self.shared.release(&guarded.interfaces);
        }
    }

    fn remove(&self, netns: &NetNs) -> Result<(), RedirectError> {
        redirect::remove(netns)
    }

    fn allow_probes(&self, targets: &BTreeSet<SocketAddr>, thorough: bool) -> anyhow::Result<()> {
        let (node, known) = (&self.shared.node, &self.shared.kubelet);
        let mut applied = self.shared.probes.lock();
        if targets.is_empty() && applied.as_ref().is_some_and(|(_, before)| before.is_empty()) {
            return Ok(());
        }
        // One that was made again has another number. Without it there is no kubelet, and nobody is let through.
        let cgroup = known.cgroup.as_ref().map(|path| {
            Cgroup::open(path).with_context(|| format!("the kubelet's cgroup {}", path.display()))
        });
        let kubelet = Kubelet { uid: known.uid, cgroup: cgroup.transpose()? };
        let same = applied.as_ref().is_some_and(|(by, before)| *by == kubelet && before == targets);
        if same && (!thorough || probes::holds(node, kubelet, targets)?) {
            return Ok(());
        }
        if same {
            tracing::warn!("the node's rules for probes were altered, and are written again");
        }
        probes::set(node, kubelet, targets)?;
        *applied = Some((kubelet, targets.clone()));
        Ok(())
    }

    fn probed(&self) -> BTreeSet<SocketAddr> {
        probes::targets(&self.shared.node)
    }
}

impl Guarded {
    /// The guard stops what the pod's rules redirect, as far as it can be had.
    fn raise(&mut self) {
        self.stopped = 0;
        let Some(guard) = &self.guard else { return };
        if let Err(error) = guard.guard(&self.rules) {
            tracing::info!(%error, "a pod is not guarded: packets may leave while its rules are altered");
            self.guard = None;
        }
    }

    fn stop(&self) {
        if let Some(watch) = &self.watch {
            watch.abort();
        }
    }
}

impl Shared {
    /// One task a pod. Our own transactions wake it too: a look costs less than telling them apart by process number, which
    /// another process may have in another number space.
    async fn watch(self: Arc<Self>, uid: String, mut monitor: Monitor) {
        loop {
            if let Err(error) = monitor.next().await {
                tracing::warn!(uid, %error, "changes to a pod's rules are noticed late: notifications ended");
                if let Some(guarded) = self.guarded.lock().get_mut(&uid) {
                    guarded.watch = None;
                }
                return;
            }
            if let Found::Broken(error) = self.check(&uid) {
                tracing::error!(uid, %error, "a pod's rules cannot be mended");
                self.alarm.notify_one();
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn check(&self, uid: &str) -> Found {
        let mut guarded = self.guarded.lock();
        let Some(pod) = guarded.get_mut(uid) else { return Found::Intact };
        let noticed = Instant::now();
        let verdict = match redirect::verify(&pod.netns, &pod.rules) {
            Ok(Verdict::Intact) => {
                self.count(pod);
                self.release(&pod.interfaces);
                return Found::Intact;
            }
            Ok(verdict) => verdict,
            Err(error) => {
                self.hold(&pod.interfaces);
                return Found::Broken(error);
            }
        };
        self.hold(&pod.interfaces);
        let held = noticed.elapsed();
        // What opened while the rules were away went around the mesh, unless a guard stopped it; then connections through the proxy
        // go on where they were.
        let established = pod.guard.is_none().then_some(Established::Cut);
        match write(&pod.netns, &pod.rules, established) {
            Ok(()) => {
                self.count(pod);
                self.metrics.healed.inc();
                self.release(&pod.interfaces);
                let healed = noticed.elapsed();
                tracing::warn!(uid, ?verdict, ?held, ?healed, "rules were altered, and are in force again");
                Found::Healed
            }
            Err(error) => Found::Broken(error),
        }
    }

    /// Other rules: what they let pass must not be stopped, so the guard is away in between.
    fn rewrite(
        &self,
        pod: &mut Guarded,
        rules: &RedirectConfig,
        established: Option<Established>,
    ) -> Result<(), RedirectError> {
        self.count(pod);
        if pod.rules == *rules {
            return write(&pod.netns, rules, established);
        }
        if let Some(Err(error)) = pod.guard.as_ref().map(Guard::lift) {
            tracing::warn!(%error, "a pod's guard cannot be lifted");
        }
        let written = write(&pod.netns, rules, established);
        if written.is_ok() {
            pod.rules = rules.clone();
        }
        pod.raise();
        written
    }

    /// What the guard has stopped since it was last asked.
    fn count(&self, pod: &mut Guarded) {
        let Some(now) = pod.guard.as_ref().and_then(|_| redirect::stopped(&pod.netns)) else { return };
        self.metrics.stopped_packets.inc_by(now.saturating_sub(pod.stopped));
        pod.stopped = now;
    }

    fn hold(&self, interfaces: &[String]) {
        let added = {
            let mut held = self.held.lock();
            interfaces.iter().filter(|name| held.insert((*name).clone())).count()
        };
        if added > 0 {
            self.apply_holds();
        }
    }

    fn release(&self, interfaces: &[String]) {
        let removed = {
            let mut held = self.held.lock();
            interfaces.iter().filter(|name| held.remove(*name)).count()
        };
        if removed > 0 {
            self.apply_holds();
        }
    }

    fn apply_holds(&self) {
        let held = self.held.lock();
        self.metrics.held.set(held.len() as i64);
        if let Err(error) = hold::set(&self.node, &held) {
            tracing::warn!(%error, "pods' traffic cannot be held or released on the node");
        }
    }
}

fn write(
    netns: &NetNs,
    rules: &RedirectConfig,
    established: Option<Established>,
) -> Result<(), RedirectError> {
    if let Some(established) = established {
        redirect::set_established(netns, established).map_err(RedirectError::Routes)?;
    }
    match established {
        Some(Established::Cut) => redirect::install_closed(netns, rules),
        _ => redirect::install(netns, rules),
    }
}

fn guard(uid: &str, netns: &NetNs) -> Option<Guard> {
    Guard::open(netns).inspect_err(|error| tracing::warn!(uid, %error, "a pod is not guarded")).ok()
}

/// None is no error: such a pod is healed without being held.
fn interfaces(uid: &str, pod: &NetNs, node: &NetNs) -> Vec<String> {
    link::node_side(pod, node).unwrap_or_else(|error| {
        tracing::warn!(uid, %error, "a pod's interface on the node cannot be found");
        Vec::new()
    })
}
