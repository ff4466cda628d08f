//! Pods: made, run, and removed, with their status files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;

use culvert_k8s_api::core::{Pod, PodSpec};
use culvert_k8s_api::enrolment;
use culvert_k8s_api::manifest::Loaded;
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::status::{Phase, PodStatus};
use tokio_util::sync::CancellationToken;

use super::podspec::Given;
use super::{Supervisor, SupervisorError};
use crate::cluster::Key;
use crate::container::{self, ContainerNews, ContainerState};
use crate::lab::NetNs;
use crate::plan::{self, Pool};
use crate::report::{ContainerReport, PodReport};
use crate::state;

/// A pod that exists.
#[derive(Debug)]
pub(super) struct Slot {
    pub given: Given,
    pub pod: Pod,
    pub enrolled: bool,
    pub containers: BTreeMap<String, Status>,
    /// Container tasks that have not said goodbye.
    live: usize,
    stop: CancellationToken,
    pub terminating: bool,
    written: Option<PodStatus>,
}

/// What a container is doing and did.
#[derive(Clone, Debug)]
pub(super) struct Status {
    pub state: ContainerState,
    pub restarts: u32,
    /// It ran at least once.
    ran: bool,
    log: PathBuf,
}

impl Slot {
    pub(super) fn ready(&self) -> bool {
        !self.terminating
            && self
                .containers
                .values()
                .all(|status| matches!(status.state, ContainerState::Running { ready: true, .. }))
    }

    pub(super) fn phase(&self) -> Phase {
        let mut codes = self.containers.values().map(|status| match status.state {
            ContainerState::Exited { code } => Some(code),
            _ => None,
        });
        if codes.clone().all(|code| code.is_some()) {
            return if codes.all(|code| code == Some(0)) { Phase::Succeeded } else { Phase::Failed };
        }
        if self.containers.values().any(|status| status.ran) { Phase::Running } else { Phase::Pending }
    }

    /// Nothing more is expected of its start: it takes traffic, or has ended.
    pub(super) fn settled(&self) -> bool {
        self.terminating || self.ready() || matches!(self.phase(), Phase::Succeeded | Phase::Failed)
    }

    /// Whether this is the pod with `spec`. Labels and annotations may differ: they do not change what runs.
    fn runs(&self, spec: &PodSpec) -> bool {
        !self.terminating && self.pod.spec == *spec
    }

    /// One of its containers is gone.
    pub(super) fn said_goodbye(&mut self) {
        self.live = self.live.saturating_sub(1);
    }

    /// All of its containers are gone.
    pub(super) fn is_gone(&self) -> bool {
        self.live == 0
    }

    /// What is wrong with it, for people.
    pub(super) fn problem(&self) -> Option<String> {
        if self.terminating || self.ready() || self.phase() == Phase::Succeeded {
            return None;
        }
        let key = &self.given.key;
        let (name, status) = self.containers.iter().find(|(_, status)| {
            !matches!(
                status.state,
                ContainerState::Running { ready: true, .. } | ContainerState::Exited { code: 0 }
            )
        })?;
        let what = match &status.state {
            ContainerState::Waiting { reason } => reason.clone(),
            ContainerState::Running { .. } => "runs and is not ready".to_owned(),
            ContainerState::Exited { code } => format!("ended with code {code}"),
        };
        Some(format!("pod {key}: container {name} {what}"))
    }

    fn status(&self) -> PodStatus {
        let hosted = self.pod.spec.host_network;
        PodStatus {
            uid: self.given.uid.clone(),
            namespace: self.given.key.namespace.clone(),
            name: self.given.key.name.clone(),
            node_name: self.given.node.clone(),
            pod_ips: self.given.addresses.clone(),
            phase: self.phase(),
            ready: self.ready(),
            netns: (!hosted).then(|| self.given.netns.path().to_string_lossy().into_owned()),
            deleted: self.terminating,
        }
    }

    pub(super) fn report(&self) -> PodReport {
        let containers = self
            .containers
            .iter()
            .map(|(name, status)| ContainerReport {
                name: name.clone(),
                state: status.state.clone(),
                restarts: status.restarts,
                log: status.log.clone(),
            })
            .collect();
        PodReport {
            key: self.given.key.clone(),
            uid: self.given.uid.clone(),
            node: self.given.node.clone(),
            addresses: self.given.addresses.clone(),
            netns: self.given.netns.path().to_owned(),
            phase: self.phase(),
            ready: self.ready(),
            enrolled: self.enrolled,
            deleted: self.terminating,
            containers,
        }
    }
}

impl Supervisor {
    /// Brings the pods that exist towards those that are wanted: one whose spec changed is removed first and made again
    /// when it is gone, one whose labels changed keeps running.
    pub(super) fn reconcile_pods(&mut self) {
        let wanted: BTreeMap<Key, Pod> = self.loaded.pods().map(|pod| (key_of(pod), pod.clone())).collect();
        let mut stale = Vec::new();
        for (key, slot) in &mut self.pods {
            match wanted.get(key) {
                Some(pod) if slot.runs(&pod.spec) => slot.pod = pod.clone(),
                _ => stale.push(key.clone()),
            }
        }
        for key in stale {
            self.terminate(&key);
        }
        self.failures.clear();
        let missing: Vec<_> = wanted.into_iter().filter(|(key, _)| !self.pods.contains_key(key)).collect();
        for (key, pod) in missing {
            if let Err(error) = self.make_pod(&key, pod) {
                tracing::warn!(pod = %key, %error, "cannot make the pod");
                self.failures.insert(key, error.to_string());
            }
        }
        self.update_enrolment();
    }

    fn make_pod(&mut self, key: &Key, pod: Pod) -> Result<(), SupervisorError> {
        let node = self.place(&pod);
        self.ensure_node(&node)?;
        let uid = state::random_uuid()?;
        let (addresses, netns) = self.connect(key, &node, &pod.spec)?;
        let node_netns = self.node_netns(&node)?;
        let enrolled = self.enrols(&pod);
        let given = Given {
            key: key.clone(),
            uid: uid.clone(),
            node_addresses: self.node_addresses(&node),
            addresses,
            netns,
            probe_from: node_netns,
            state: self.options.state.clone(),
            gate: (enrolled && self.system.is_some()).then(|| self.options.state.redirection(&node, &uid)),
            node,
        };
        self.write_files(&given)?;
        let mut slot = Slot {
            given,
            pod,
            enrolled,
            containers: BTreeMap::new(),
            live: 0,
            stop: self.stop.child_token(),
            terminating: false,
            written: None,
        };
        self.start_containers(&mut slot);
        tracing::info!(pod = %key, node = slot.given.node, addresses = ?slot.given.addresses, "made");
        self.pods.insert(key.clone(), slot);
        self.publish_pod(key);
        Ok(())
    }

    fn start_containers(&self, slot: &mut Slot) {
        for container in &slot.pod.spec.containers {
            let log = slot.given.log(&slot.pod, container);
            let reason = match slot.given.container(&slot.pod, container) {
                Some(spec) => {
                    slot.live += 1;
                    let run =
                        container::run(spec, self.launcher.clone(), slot.stop.clone(), self.sender.clone());
                    self.tasks.spawn("container", run);
                    "starts".to_owned()
                }
                None => "names no command, and there are no images here".to_owned(),
            };
            let status = Status { state: ContainerState::Waiting { reason }, restarts: 0, ran: false, log };
            slot.containers.insert(container.name.clone(), status);
        }
    }

    /// Addresses and namespace of a new pod.
    fn connect(
        &mut self,
        key: &Key,
        node: &str,
        spec: &PodSpec,
    ) -> Result<(Vec<IpAddr>, NetNs), SupervisorError> {
        if spec.host_network {
            return Ok((self.node_addresses(node), self.node_netns(node)?));
        }
        self.new_address(&key.dotted(), node)
    }

    /// A namespace with addresses of `node`'s pods.
    pub(super) fn new_address(
        &mut self,
        key: &str,
        node: &str,
    ) -> Result<(Vec<IpAddr>, NetNs), SupervisorError> {
        let number = self.lab.node(node).map_or(1, |node| node.number);
        let pool = self.pod_pools.entry(node.to_owned()).or_insert_with(|| Pool::new(plan::POD_HOSTS));
        let host = pool.take(key).ok_or_else(|| SupervisorError::NodeFull { node: node.to_owned() })?;
        let addresses = self.options.family.keep(plan::pod_addresses(number, host));
        match self.lab.add_pod(node, key, &addresses) {
            Ok(netns) => Ok((addresses, netns)),
            Err(error) => {
                pool.release(key);
                let _ = self.lab.remove_pod(node, key);
                Err(error.into())
            }
        }
    }

    fn write_files(&self, given: &Given) -> Result<(), SupervisorError> {
        // An earlier pod of this name may have left logs.
        let _ = fs::remove_dir_all(given.dir());
        let nameservers = self.options.family.keep(plan::dns_addresses());
        let resolv_conf = given.resolv_conf(&nameservers[..1]);
        state::write_whole(&given.dir().join("resolv.conf"), resolv_conf.as_bytes(), 0o644)?;
        Ok(state::write_whole(&given.dir().join("hosts"), given.hosts().as_bytes(), 0o644)?)
    }

    /// Begins a pod's removal: out of all services first, then its containers end, then it is gone.
    fn terminate(&mut self, key: &Key) {
        let Some(slot) = self.pods.get_mut(key) else { return };
        if !slot.terminating {
            slot.terminating = true;
            slot.stop.cancel();
            tracing::info!(pod = %key, "removing");
        }
        if slot.live == 0 {
            self.finish(key);
        } else {
            self.publish_pod(key);
        }
    }

    /// Removes what is left of a pod whose containers have ended.
    fn finish(&mut self, key: &Key) {
        let Some(slot) = self.pods.remove(key) else { return };
        let given = slot.given;
        if !slot.pod.spec.host_network {
            if let Ok(id) = given.netns.id() {
                let strays = crate::process::end_all(
                    || crate::process::inside(&BTreeSet::from([id])),
                    std::time::Duration::ZERO,
                );
                for stray in strays {
                    tracing::warn!(pod = %key, pid = stray.pid, "a process does not end");
                }
            }
            if let Err(error) = self.lab.remove_pod(&given.node, &key.dotted()) {
                tracing::warn!(pod = %key, %error, "cannot remove its namespace");
            }
            if let Some(pool) = self.pod_pools.get_mut(&given.node) {
                pool.release(&key.dotted());
            }
        }
        if let Err(error) = state::remove_file(&self.options.state.pod_status(&key.namespace, &key.name)) {
            tracing::warn!(pod = %key, %error, "cannot remove its status");
        }
        let _ = fs::remove_dir_all(given.dir());
    }

    /// Takes in what a container's task said.
    pub(super) fn container_news(&mut self, news: ContainerNews) {
        let Some(slot) = self.pods.get_mut(&news.pod).filter(|slot| slot.given.uid == news.uid) else {
            return;
        };
        let Some(state) = news.state else {
            slot.live = slot.live.saturating_sub(1);
            if slot.live == 0 && slot.terminating {
                self.finish(&news.pod);
                // One with this name may be wanted again.
                self.reconcile_pods();
            }
            return;
        };
        if let Some(status) = slot.containers.get_mut(&news.name) {
            status.ran |= matches!(state, ContainerState::Running { .. });
            status.restarts = news.restarts;
            status.state = state;
        }
        self.publish_pod(&news.pod);
    }

    /// Writes a pod's status file if it changed.
    fn publish_pod(&mut self, key: &Key) {
        let Some(slot) = self.pods.get_mut(key) else { return };
        let status = slot.status();
        if slot.written.as_ref() == Some(&status) {
            return;
        }
        match state::write_json(&self.options.state.pod_status(&key.namespace, &key.name), &status) {
            Ok(()) => slot.written = Some(status),
            Err(error) => tracing::warn!(pod = %key, %error, "cannot write its status"),
        }
    }

    /// The node of a pod: the one it names, or one by its name's hash.
    fn place(&self, pod: &Pod) -> String {
        if let Some(node) = pod.spec.node_name.clone().filter(|name| !name.is_empty()) {
            return node;
        }
        let nodes = node_names(&self.loaded);
        let hash = plan::fnv1a(key_of(pod).to_string().as_bytes()) as usize;
        nodes.get(hash % nodes.len().max(1)).cloned().unwrap_or_else(|| "node-1".to_owned())
    }

    fn update_enrolment(&mut self) {
        let enrolled: Vec<bool> = self.pods.values().map(|slot| self.enrols(&slot.pod)).collect();
        for (slot, enrolled) in self.pods.values_mut().zip(enrolled) {
            slot.enrolled = enrolled;
        }
    }

    fn enrols(&self, pod: &Pod) -> bool {
        let labels = self
            .loaded
            .namespaces()
            .find(|namespace| namespace.metadata.name == pod.metadata.namespace)
            .map_or_else(StringMap::new, |namespace| namespace.metadata.labels.clone());
        enrolment::decide(pod, &labels, &enrolment::Settings::default()).joins()
    }
}

/// The nodes that manifests name, sorted.
pub(super) fn node_names(loaded: &Loaded) -> Vec<String> {
    let named = loaded.pods().filter_map(|pod| pod.spec.node_name.clone()).filter(|name| !name.is_empty());
    let nodes: BTreeSet<String> =
        named.chain(loaded.nodes().map(|node| node.metadata.name.clone())).collect();
    nodes.into_iter().collect()
}

fn key_of(pod: &Pod) -> Key {
    Key { namespace: pod.metadata.namespace.clone(), name: pod.metadata.name.clone() }
}
