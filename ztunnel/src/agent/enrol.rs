//! Carries out the plan, in the order that keeps a pod from ever being half enrolled in a way that leaks (C31, C32).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_k8s_api::status::{Redirection, RedirectionStatus};
use culvert_net::netns::NetNs;
use culvert_net::redirect;
use culvert_proto::workload::zds::WorkloadInfo;

use super::report::Reports;
use super::zds::{AddError, ZdsServer};
use super::{Action, Desired, Enrolled, plan};

/// How long peers may take to learn that a pod speaks HBONE no more; the control plane needs a fraction of it.
const LEAVING: Duration = Duration::from_secs(2);

/// What is enrolled, and the hands to change it.
#[derive(Debug)]
pub struct Enroller {
    zds: Arc<ZdsServer>,
    reports: Reports,
    enrolled: BTreeMap<String, Enrolled>,
    namespaces: BTreeMap<String, Arc<NetNs>>,
    /// Running pods that left: the proxy serves what still comes to them until then.
    leaving: Vec<(Instant, String)>,
    first: bool,
}

impl Enroller {
    /// Nothing enrolled yet.
    pub fn new(zds: Arc<ZdsServer>, reports: Reports) -> Self {
        Self {
            zds,
            reports,
            enrolled: BTreeMap::new(),
            namespaces: BTreeMap::new(),
            leaving: Vec::new(),
            first: true,
        }
    }

    /// Brings every pod to what it should be, as far as it can now; the next pass goes on where this one failed.
    pub async fn pass(&mut self, desired: &[Desired]) {
        self.forget_left().await;
        let connected = *self.zds.connected().borrow() > 0;
        let actions = plan(desired, &self.enrolled, connected, |uid| {
            self.enrolled.get(uid).is_some_and(|was| was.pod.netns.exists())
        });
        for action in actions {
            match action {
                Action::Enrol(pod) => self.enrol(pod).await,
                Action::Register(pod) => self.register(pod).await,
                Action::Verify(pod) => self.verify(&pod),
                Action::Unenrol { pod, alive } => self.unenrol(&pod, alive).await,
            }
        }
        if std::mem::take(&mut self.first) {
            self.forget_strangers(desired);
        }
    }

    /// The proxy first, then the rules: a running pod's connections must find listeners the moment they are redirected.
    /// Without a proxy the rules are written all the same, and its traffic waits for one rather than going around it (C66).
    async fn enrol(&mut self, pod: Desired) {
        self.leaving.retain(|(_, uid)| *uid != pod.uid);
        let namespace = self.namespace(&pod);
        let registered = match &namespace {
            Ok(netns) => Some(self.register_with(&pod, netns.clone()).await),
            Err(_) => None,
        };
        let installed = namespace.and_then(|netns| Ok(redirect::install(&netns, &pod.rules)?));
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

    /// Again, for a pod whose rules stand.
    async fn register(&mut self, pod: Desired) {
        let Some(netns) = self.namespaces.get(&pod.uid).cloned() else { return };
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
        };
        self.zds.add(&pod.uid, info, netns).await
    }

    fn tell(&self, pod: &Desired, registered: Result<(), AddError>) {
        match registered {
            Ok(()) => {
                tracing::info!(pod = %name(pod), uid = %pod.uid, "pod is enrolled");
                self.report(pod, Redirection::Enabled, None);
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

    fn verify(&mut self, pod: &Desired) {
        let Some(netns) = self.namespaces.get(&pod.uid) else { return };
        match redirect::verify(netns, &pod.rules) {
            Ok(redirect::Verdict::Intact) => {}
            Ok(verdict) => {
                tracing::warn!(pod = %name(pod), ?verdict, "rules are not as they were written; writing them again");
                if let Err(error) = redirect::install(netns, &pod.rules) {
                    tracing::error!(pod = %name(pod), %error, "rules cannot be mended");
                }
            }
            Err(error) => tracing::warn!(pod = %name(pod), %error, "rules cannot be read"),
        }
    }

    async fn unenrol(&mut self, pod: &Desired, alive: bool) {
        if let Err(error) = self.reports.clear(&pod.uid) {
            tracing::warn!(pod = %name(pod), error = format!("{error:#}"), "report cannot be removed");
        }
        if let (true, Some(netns)) = (alive, self.namespaces.get(&pod.uid))
            && let Err(error) = redirect::install(netns, &pod.rules.return_path_only())
        {
            tracing::warn!(pod = %name(pod), %error, "rules cannot be removed; trying again");
            return;
        }
        self.enrolled.remove(&pod.uid);
        tracing::info!(pod = %name(pod), uid = %pod.uid, "pod has left the mesh");
        if alive {
            // Peers are told by the control plane, and until then open tunnels to it.
            self.leaving.push((Instant::now() + LEAVING, pod.uid.clone()));
        } else {
            self.forget(&pod.uid).await;
        }
    }

    async fn forget_left(&mut self) {
        let now = Instant::now();
        let (due, waiting) = std::mem::take(&mut self.leaving).into_iter().partition(|(at, _)| *at <= now);
        self.leaving = waiting;
        let due: Vec<(Instant, String)> = due;
        for (_, uid) in due {
            self.forget(&uid).await;
        }
    }

    async fn forget(&mut self, uid: &str) {
        self.zds.del(uid).await;
        let Some(netns) = self.namespaces.remove(uid) else { return };
        if let Err(error) = redirect::remove(&netns) {
            // Nothing is redirected any more; a dead pod's namespace takes the rest with it.
            tracing::debug!(uid, %error, "rules that remain cannot be removed");
        }
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

    /// Reports of pods that went away while no agent ran.
    fn forget_strangers(&self, desired: &[Desired]) {
        for uid in self.reports.reported() {
            if !desired.iter().any(|pod| pod.uid == uid) {
                let _ = self.reports.clear(&uid);
            }
        }
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
