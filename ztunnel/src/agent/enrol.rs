//! Carries out the plan, in the order that keeps a pod from ever being half enrolled in a way that leaks (C31, C32).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_k8s_api::status::{Redirection, RedirectionStatus};
use culvert_net::netns::NetNs;
use culvert_net::redirect::{self, Established, Verdict};
use culvert_proto::workload::zds::WorkloadInfo;

use super::attest::{Found, Rules};
use super::metrics::{AgentMetrics, Event};
use super::report::Reports;
use super::source::{Other, View};
use super::zds::{AddError, ZdsServer};
use super::{Action, Desired, Enrolled, plan};

/// How long peers may take to learn that a pod speaks HBONE no more; the control plane needs a fraction of it.
const LEAVING: Duration = Duration::from_secs(2);

/// What no notification tells of (the routing rule, the route) is looked at this often. Until then answers that have lost their
/// way are dropped in the pod.
const LOOK: Duration = Duration::from_secs(5);

/// What is enrolled, and the hands to change it.
#[derive(Debug)]
pub struct Enroller<R> {
    rules: R,
    zds: Arc<ZdsServer>,
    reports: Reports,
    metrics: AgentMetrics,
    /// What the kubelet may probe, by pod: two pods may have had one address, and the one that goes takes nothing from the other (C52).
    probed: BTreeMap<String, BTreeSet<SocketAddr>>,
    /// What a predecessor let it probe, until it is known which pods there are (C53).
    probed_before: BTreeSet<SocketAddr>,
    enrolled: BTreeMap<String, Enrolled>,
    namespaces: BTreeMap<String, Arc<NetNs>>,
    /// Pods of which nothing was known any more, and their namespaces: they kept their rules, which go if they turn out to be outside.
    unknown: BTreeMap<String, PathBuf>,
    /// Running pods that left: the proxy serves what still comes to them until then.
    leaving: Vec<(Instant, String)>,
    /// Pods that should be enrolled and whose namespace is not found.
    missing: BTreeSet<String>,
    /// What a predecessor left behind is settled.
    settled: bool,
    looked: Option<Instant>,
    /// The proxy's session in which acknowledgements were given.
    session: u64,
}

impl<R: Rules> Enroller<R> {
    /// Nothing enrolled yet.
    pub fn new(rules: R, zds: Arc<ZdsServer>, reports: Reports, metrics: AgentMetrics) -> Self {
        Self {
            probed_before: rules.probed(),
            rules,
            zds,
            reports,
            metrics,
            probed: BTreeMap::new(),
            enrolled: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            unknown: BTreeMap::new(),
            leaving: Vec::new(),
            missing: BTreeSet::new(),
            settled: false,
            looked: None,
            session: 0,
        }
    }

    /// Brings every pod to what it should be, as far as it can now; the next pass goes on where this one failed.
    pub async fn pass(&mut self, view: &View) {
        self.forget_left().await;
        let sessions = *self.zds.sessions().borrow();
        if self.session != sessions.begun {
            // A new proxy: it was told of all in its snapshot, and may have refused some.
            self.session = sessions.begun;
            self.enrolled.values_mut().for_each(|it| it.acknowledged = false);
        }
        let stays: BTreeSet<&str> = view.others.iter().map(|other| other.uid.as_str()).collect();
        let actions = plan(&view.desired, &self.enrolled, sessions.connected > 0, |uid| stays.contains(uid));
        let thorough = self.looked.is_none_or(|at| at.elapsed() >= LOOK);
        if thorough {
            self.looked = Some(Instant::now());
        }
        // Before rules are written, so that no probe finds them without being let through; what ended goes last.
        self.probed.extend(view.probed.clone());
        self.allow_probes(thorough);
        for action in actions {
            match action {
                Action::Enrol(pod) => self.enrol(pod).await,
                Action::Register(pod) => {
                    if self.holds(&pod, thorough).await {
                        self.register(pod).await;
                    }
                }
                Action::Verify(pod) => drop(self.holds(&pod, thorough).await),
                Action::Unenrol { pod, stays } => self.unenrol(&pod, stays).await,
            }
            // Between two pods, proxies are answered.
            tokio::task::yield_now().await;
        }
        if !self.settled {
            self.settled = self.settle(view);
        }
        self.find_again(view);
        self.miss(view);
        if self.settled {
            self.probed_before.clear();
        }
        self.probed.retain(|uid, _| self.enrolled.contains_key(uid));
        self.allow_probes(false);
        self.count();
    }

    fn allow_probes(&self, thorough: bool) {
        let targets = self.probed.values().flatten().chain(&self.probed_before).copied().collect();
        let failed = self.rules.allow_probes(&targets, thorough);
        if let Err(error) = &failed {
            tracing::warn!(error = format!("{error:#}"), "probes may be taken for traffic; trying again");
        }
        self.metrics.probes_failed.set(failed.is_err().into());
    }

    fn count(&self) {
        let done = self.enrolled.values().filter(|it| it.rules_installed && it.acknowledged).count();
        self.metrics.pods(done, self.enrolled.len() - done + self.missing.len());
        let wrong = self.enrolled.values().filter(|it| it.pod.problem.is_some()).count();
        self.metrics.wrong_annotations.set(wrong as i64);
        self.metrics.beat();
    }

    /// The proxy first, then the rules: a running pod's connections must find listeners the moment they are redirected.
    /// Without a proxy the rules are written all the same, and its traffic waits for one rather than going around it (C66).
    async fn enrol(&mut self, pod: Desired) {
        let known = self.enrolled.contains_key(&pod.uid);
        self.metrics.reconciled(if known { Event::update } else { Event::add });
        self.leaving.retain(|(_, uid)| *uid != pod.uid);
        self.unknown.remove(&pod.uid);
        let namespace = self.namespace(&pod);
        let established = namespace.as_ref().ok().and_then(|netns| self.history(&pod, netns));
        let registered = match &namespace {
            Ok(netns) => Some(self.register_with(&pod, netns.clone()).await),
            Err(_) => None,
        };
        let installed =
            namespace.and_then(|netns| Ok(self.rules.install(&pod.uid, &netns, &pod.rules, established)?));
        let state = Enrolled {
            pod: pod.clone(),
            rules_installed: installed.is_ok(),
            acknowledged: matches!(registered, Some(Ok(()))),
        };
        self.enrolled.insert(pod.uid.clone(), state);
        match (installed, registered) {
            (Ok(()), Some(registered)) => self.tell(&pod, registered),
            (Ok(()), None) => {}
            // Unlike C28 this is tried again: a pod that should be in the mesh must not stay outside of it in silence.
            (Err(error), _) => {
                tracing::warn!(pod = %name(&pod), error = format!("{error:#}"), "rules cannot be written; trying again");
                self.report(&pod, Redirection::Pending, Some(format!("{error:#}")));
            }
        }
    }

    /// What becomes of the connections that a pod has open; nothing is said for one whose rules are there in some form.
    ///
    /// A pod that is reported and has no rules lost them, most likely with its namespace: a reboot, a new sandbox (C34). The report
    /// stops saying that it is enabled before anything else happens (trap 5): the proxy may not have this namespace.
    fn history(&self, pod: &Desired, netns: &NetNs) -> Option<Established> {
        if !matches!(self.rules.verify(netns, &pod.rules), Ok(Verdict::Missing)) {
            return None;
        }
        if !self.reports.is_reported(&pod.uid) {
            return Some(Established::Keep);
        }
        tracing::warn!(pod = %name(pod), uid = %pod.uid, "reported, but without rules; enrolling it again");
        self.report(
            pod,
            Redirection::Pending,
            Some("the pod's rules were gone; writing them again".to_owned()),
        );
        Some(Established::Cut)
    }

    /// Again, for a pod whose rules stand.
    async fn register(&mut self, pod: Desired) {
        let Some(netns) = self.namespaces.get(&pod.uid).cloned() else { return };
        self.metrics.reconciled(Event::update);
        let registered = self.register_with(&pod, netns).await;
        if let (Ok(()), Some(state)) = (&registered, self.enrolled.get_mut(&pod.uid)) {
            state.acknowledged = true;
        }
        self.tell(&pod, registered);
    }

    async fn register_with(&self, pod: &Desired, netns: Arc<NetNs>) -> Result<(), AddError> {
        let info = WorkloadInfo {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
            native_tunnel: pod.native_tunnel,
        };
        self.zds.add(&pod.uid, info, netns).await
    }

    fn tell(&self, pod: &Desired, registered: Result<(), AddError>) {
        match registered {
            Ok(()) => {
                tracing::info!(pod = %name(pod), uid = %pod.uid, "pod is enrolled");
                self.report(pod, Redirection::Enabled, pod.problem.clone());
            }
            Err(error) => {
                // While no proxy is connected to a fresh agent, what its predecessor reported still holds.
                let known = matches!(error, AddError::NoProxy) && self.reports.is_reported(&pod.uid);
                if !known {
                    tracing::warn!(pod = %name(pod), %error, "the proxy does not have the pod yet; trying again");
                    self.report(pod, Redirection::Pending, Some(error.to_string()));
                }
            }
        }
    }

    /// Whether the pod's rules are in force, in the namespace it has now; makes it so if it can.
    async fn holds(&mut self, pod: &Desired, thorough: bool) -> bool {
        let known = self.namespaces.get(&pod.uid).map(|netns| netns.id());
        match NetNs::open(&pod.netns) {
            Ok(now) if Some(now.id()) == known => {}
            Ok(_) => {
                tracing::warn!(pod = %name(pod), uid = %pod.uid, "the pod has another namespace; enrolling it again");
                self.enrol(pod.clone()).await;
                return false;
            }
            // On its way out: its status will say so.
            Err(error) => {
                tracing::debug!(pod = %name(pod), %error, "the pod's namespace cannot be opened");
                return false;
            }
        }
        let Found::Broken(error) = self.rules.check(&pod.uid, thorough) else { return true };
        tracing::error!(pod = %name(pod), %error, "rules cannot be mended; trying again");
        if let Some(state) = self.enrolled.get_mut(&pod.uid) {
            state.rules_installed = false;
        }
        self.report(pod, Redirection::Pending, Some(format!("the pod's rules were altered: {error}")));
        false
    }

    async fn unenrol(&mut self, pod: &Desired, stays: bool) {
        // While it is reported enabled its rules stay: peers send to its proxy.
        match self.reports.clear(&pod.uid) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(pod = %name(pod), error = format!("{error:#}"), "report cannot be removed; trying again");
                return;
            }
        }
        if let (true, Some(netns)) = (stays, self.namespaces.get(&pod.uid))
            && let Err(error) = self.rules.install(&pod.uid, netns, &pod.rules.return_path_only(), None)
        {
            tracing::warn!(pod = %name(pod), %error, "rules cannot be removed; trying again");
            return;
        }
        self.enrolled.remove(&pod.uid);
        self.metrics.reconciled(Event::delete);
        tracing::info!(pod = %name(pod), uid = %pod.uid, "pod has left the mesh");
        if stays {
            // Peers are told by the control plane, and until then open tunnels to it.
            self.leaving.push((Instant::now() + LEAVING, pod.uid.clone()));
        } else {
            // Its rules die with its namespace. Its processes may go on until then, as those of a pod that was deleted by force: what
            // they say now reaches nobody, rather than going around the mesh.
            self.unknown.insert(pod.uid.clone(), pod.netns.clone());
            self.forget(&pod.uid).await;
        }
    }

    /// What is known again of pods that kept their rules.
    fn find_again(&mut self, view: &View) {
        let mut unknown = std::mem::take(&mut self.unknown);
        unknown.retain(|_, netns| netns.exists());
        for other in &view.others {
            if unknown.contains_key(&other.uid) && self.release(other) {
                unknown.remove(&other.uid);
            }
        }
        self.unknown = unknown;
    }

    async fn forget_left(&mut self) {
        let now = Instant::now();
        let (due, waiting) = std::mem::take(&mut self.leaving).into_iter().partition(|(at, _)| *at <= now);
        self.leaving = waiting;
        let due: Vec<(Instant, String)> = due;
        for (_, uid) in due {
            let Some(netns) = self.forget(&uid).await else { continue };
            if let Err(error) = self.rules.remove(&netns) {
                // Nothing is redirected any more; a dead pod's namespace takes the rest with it.
                tracing::debug!(uid, %error, "rules that remain cannot be removed");
            }
        }
    }

    async fn forget(&mut self, uid: &str) -> Option<Arc<NetNs>> {
        self.zds.del(uid).await;
        self.rules.release(uid);
        self.namespaces.remove(uid)
    }

    fn namespace(&mut self, pod: &Desired) -> anyhow::Result<Arc<NetNs>> {
        let opened = NetNs::open(&pod.netns)?;
        match self.namespaces.get(&pod.uid) {
            Some(known) if known.id() == opened.id() => Ok(known.clone()),
            _ => {
                let opened = Arc::new(opened);
                self.namespaces.insert(pod.uid.clone(), opened.clone());
                Ok(opened)
            }
        }
    }

    /// A pod of which no namespace is found would stay outside in silence.
    fn miss(&mut self, view: &View) {
        let missing: BTreeSet<String> = view.unfound.iter().map(|pod| pod.uid.clone()).collect();
        for pod in &view.unfound {
            tracing::debug!(pod = pod.name, uid = pod.uid, "a pod's network namespace is not found");
            self.reports.trouble(&pod.uid, Some("its network namespace is not found on the node"));
        }
        for found in self.missing.difference(&missing) {
            self.reports.trouble(found, None);
        }
        self.missing = missing;
    }

    /// What a predecessor left of pods that should not be enrolled: first its report goes, then the rules (C32). The proxy drops
    /// the pod because the snapshot does not name it (C67). Nothing is touched while it is not known which pods should be.
    fn settle(&self, view: &View) -> bool {
        if !view.complete {
            tracing::warn!(
                "some files cannot be read and never were: pods that may be enrolled by them stay as they are"
            );
            return false;
        }
        for uid in self.reports.reported() {
            if !view.desired.iter().any(|pod| pod.uid == uid) {
                if view.others.iter().any(|other| other.uid == uid && other.excluded) {
                    tracing::warn!(uid, "the pod's namespace is excluded now: it leaves the mesh");
                } else {
                    tracing::info!(uid, "report of a pod that should not be enrolled, or is gone");
                }
                match self.reports.clear(&uid) {
                    Ok(true) => {}
                    Ok(false) => return false,
                    Err(error) => {
                        let error = format!("{error:#}");
                        tracing::warn!(uid, error, "report cannot be removed; trying again");
                        return false;
                    }
                }
            }
        }
        let strangers = view.others.iter().filter(|it| !self.namespaces.contains_key(&it.uid));
        strangers.filter(|other| !self.release(other)).count() == 0
    }

    fn release(&self, other: &Other) -> bool {
        let removed = NetNs::open(&other.netns).map_err(anyhow::Error::from).and_then(|netns| {
            let stale = redirect::is_installed(&netns)?;
            if stale {
                tracing::info!(uid = other.uid, "rules of a pod that should not be enrolled are removed");
                self.rules.remove(&netns)?;
            }
            Ok(())
        });
        if let Err(error) = &removed {
            tracing::warn!(
                uid = other.uid,
                error = format!("{error:#}"),
                "rules cannot be removed; trying again"
            );
        }
        // One whose namespace is gone is not tried again.
        removed.is_ok() || !other.netns.exists()
    }

    /// How far this pod is; `None` if it is not to be enrolled, as far as is known.
    pub fn progress(&self, uid: &str) -> Option<&Enrolled> {
        self.enrolled.get(uid)
    }

    /// Nobody is enrolled, and nobody is leaving.
    pub fn is_empty(&self) -> bool {
        self.enrolled.is_empty() && self.leaving.is_empty()
    }

    /// Takes every rule away at once, whatever is reported: nobody will come back to do it. Proxies are told for so long.
    pub async fn abandon(&mut self, patience: Duration) {
        let left = std::mem::take(&mut self.namespaces);
        for (uid, netns) in &left {
            self.rules.release(uid);
            if let Err(error) = self.rules.remove(netns) {
                tracing::warn!(uid, %error, "rules cannot be removed");
            }
        }
        self.enrolled.clear();
        self.leaving.clear();
        self.unknown.clear();
        self.probed.clear();
        self.probed_before.clear();
        self.allow_probes(true);
        let told = async {
            for uid in left.keys() {
                self.zds.del(uid).await;
            }
        };
        if tokio::time::timeout(patience, told).await.is_err() {
            tracing::warn!("a proxy has not taken in that every pod left");
        }
    }

    /// Where it reports to.
    pub fn reports(&self) -> &Reports {
        &self.reports
    }

    /// Entries of each table: enrolled, namespaces, leaving, probed.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> [usize; 4] {
        [self.enrolled.len(), self.namespaces.len(), self.leaving.len(), self.probed.len()]
    }

    fn report(&self, pod: &Desired, redirection: Redirection, error: Option<String>) {
        let status = RedirectionStatus { redirection, error };
        if let Err(error) = self.reports.set(&pod.uid, &status) {
            tracing::warn!(pod = %name(pod), error = format!("{error:#}"), "report cannot be written");
        }
    }
}

fn name(pod: &Desired) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}
