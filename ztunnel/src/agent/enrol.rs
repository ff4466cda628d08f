//! Carries out the plan, in the order that keeps a pod from ever being half enrolled in a way that leaks (C31, C32).

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_k8s_api::status::{Redirection, RedirectionStatus};
use culvert_net::netns::NetNs;
use culvert_net::redirect;
use culvert_proto::workload::zds::WorkloadInfo;

use super::report::Reports;
use super::zds::{AddError, ZdsServer};
use super::{Action, Desired, Enrolled, plan};

/// What is enrolled, and the hands to change it.
#[derive(Debug)]
pub struct Enroller {
    zds: Arc<ZdsServer>,
    reports: Reports,
    enrolled: BTreeMap<String, Enrolled>,
    namespaces: BTreeMap<String, Arc<NetNs>>,
    first: bool,
}

impl Enroller {
    /// Nothing enrolled yet.
    pub fn new(zds: Arc<ZdsServer>, reports: Reports) -> Self {
        Self { zds, reports, enrolled: BTreeMap::new(), namespaces: BTreeMap::new(), first: true }
    }

    /// Brings every pod to what it should be, as far as it can now; the next pass goes on where this one failed.
    pub async fn pass(&mut self, desired: &[Desired]) {
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

    async fn enrol(&mut self, pod: Desired) {
        let installed = self.install(&pod);
        let mut state = Enrolled { pod: pod.clone(), rules_installed: true, acknowledged: false };
        if let Err(error) = installed {
            // Unlike C28 this is tried again: a pod that should be in the mesh must not stay outside of it in silence.
            tracing::warn!(pod = %name(&pod), error = format!("{error:#}"), "rules cannot be written; trying again");
            state.rules_installed = false;
            self.enrolled.insert(pod.uid.clone(), state);
            self.report(&pod, Redirection::Pending, Some(format!("{error:#}")));
            return;
        }
        self.enrolled.insert(pod.uid.clone(), state);
        self.register(pod).await;
    }

    async fn register(&mut self, pod: Desired) {
        let Some(netns) = self.namespaces.get(&pod.uid).cloned() else { return };
        let info = WorkloadInfo {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
        };
        match self.zds.add(&pod.uid, info, netns).await {
            Ok(()) => {
                if let Some(state) = self.enrolled.get_mut(&pod.uid) {
                    state.acknowledged = true;
                }
                tracing::info!(pod = %name(&pod), uid = %pod.uid, "pod is enrolled");
                self.report(&pod, Redirection::Enabled, None);
            }
            Err(error) => {
                // The rules stay: its traffic waits for a proxy rather than going around it (C66).
                // While no proxy is connected to a fresh agent, what its predecessor reported still holds.
                let known = matches!(error, AddError::NoProxy) && self.reports.is_reported(&pod.uid);
                if !known {
                    tracing::warn!(pod = %name(&pod), %error, "the proxy does not have the pod yet; trying again");
                    self.report(&pod, Redirection::Pending, Some(error.to_string()));
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
            && let Err(error) = redirect::remove(netns)
        {
            tracing::warn!(pod = %name(pod), %error, "rules cannot be removed; trying again");
            return;
        }
        self.zds.del(&pod.uid).await;
        self.enrolled.remove(&pod.uid);
        self.namespaces.remove(&pod.uid);
        tracing::info!(pod = %name(pod), uid = %pod.uid, "pod has left the mesh");
    }

    fn install(&mut self, pod: &Desired) -> anyhow::Result<()> {
        let netns = match self.enrolled.get(&pod.uid) {
            Some(was) if was.pod.netns == pod.netns => self.namespaces.get(&pod.uid).cloned(),
            _ => None,
        };
        let netns = match netns {
            Some(netns) => netns,
            None => Arc::new(NetNs::open(&pod.netns)?),
        };
        redirect::install(&netns, &pod.rules)?;
        self.namespaces.insert(pod.uid.clone(), netns);
        Ok(())
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
