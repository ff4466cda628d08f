//! What pods there are and which of them join, from the API server; where their namespaces are, from the CNI plugin or the
//! processes that run in them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use culvert_k8s_api::enrolment::{self, Enrolment, Reason, Settings};
use culvert_k8s_api::status::Phase;

use super::cluster::{Cluster, PodEntry, PodKey};
use super::describe::describe;
use super::procfs::{self, Found};
use super::{Other, Unfound, View};

/// What the CNI plugin says of a pod whose sandbox is being made (C16).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announced {
    /// Namespace and name.
    pub key: PodKey,
    /// The pod's uid if the runtime gave it: a pod of the same name may have gone before.
    pub uid: Option<String>,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its addresses; its status has none yet (C21).
    pub ips: Vec<IpAddr>,
}

/// See the module.
#[derive(Debug)]
pub struct KubernetesSource {
    cluster: Arc<Cluster>,
    settings: Settings,
    dns_capture: bool,
    proc: PathBuf,
    /// By uid; only of pods that the API server has.
    announced: BTreeMap<String, Announced>,
    /// By uid in the cgroup, as last looked.
    found: BTreeMap<String, Found>,
}

impl KubernetesSource {
    /// `proc` is the node's proc file system.
    pub fn new(cluster: Arc<Cluster>, settings: Settings, dns_capture: bool, proc: PathBuf) -> Self {
        Self { cluster, settings, dns_capture, proc, announced: BTreeMap::new(), found: BTreeMap::new() }
    }

    /// Resolves when something may have changed.
    pub async fn changed(&mut self) {
        self.cluster.changed.notified().await;
    }

    /// Takes in what the plugin said, and gives the pod's uid; `None` while no such pod was seen. That a pod is deleted and another of
    /// its name made is seen in two events, and the plugin's may come before either.
    pub fn announce(&mut self, pod: &Announced) -> Option<String> {
        let entry = self.cluster.pod(&pod.key)?;
        let known = [&entry.status.uid, &entry.cgroup_uid];
        if pod.uid.as_ref().is_some_and(|uid| !known.contains(&uid)) {
            return None;
        }
        self.announced.insert(entry.status.uid.clone(), pod.clone());
        Some(entry.status.uid.clone())
    }

    /// What should be now.
    ///
    /// # Errors
    /// The API server has not told everything yet, or the node's processes cannot be seen.
    pub fn view(&mut self) -> anyhow::Result<View> {
        let Some((pods, namespaces)) = self.cluster.snapshot() else {
            anyhow::bail!("the API server has not listed pods and namespaces yet")
        };
        self.announced.retain(|uid, _| pods.iter().any(|pod| pod.status.uid == *uid));
        let mut view = View { complete: true, ..View::default() };
        let mut looked = false;
        for pod in &pods {
            let Some(ips) = self.runs(pod) else { continue };
            // The two watches are not in step: a pod of a new namespace may be seen first, and must not pass for one that stays outside.
            let Some(labels) = namespaces.get(&pod.status.namespace) else { continue };
            let decided = enrolment::decide(&pod.object, labels, &self.settings);
            match self.netns(pod, &mut looked)? {
                Some(netns) if decided.joins() => {
                    view.join(describe(&pod.object, &pod.status.uid, netns, self.dns_capture), &ips);
                }
                Some(netns) => {
                    let excluded = decided == Enrolment::No(Reason::ExcludedNamespace);
                    view.others.push(Other { uid: pod.status.uid.clone(), netns, excluded });
                }
                // One that is being deleted has lost its processes before it is reported ended.
                None if decided.joins() && !pod.status.deleted => view.unfound.push(Unfound {
                    uid: pod.status.uid.clone(),
                    name: format!("{}/{}", pod.status.namespace, pod.status.name),
                }),
                None => {}
            }
        }
        Ok(view)
    }

    /// The addresses of a pod that runs or is about to, in a namespace of its own (C26). After a reboot its status has those of before
    /// until kubelet has written others, and only the plugin knows the ones that it has.
    fn runs(&self, pod: &PodEntry) -> Option<Vec<IpAddr>> {
        let alive = matches!(pod.status.phase, Phase::Pending | Phase::Running);
        if !alive || pod.object.spec.host_network {
            return None;
        }
        let announced = self.announced.get(&pod.status.uid).into_iter().flat_map(|it| &it.ips);
        let ips: BTreeSet<IpAddr> = pod.status.pod_ips.iter().chain(announced).copied().collect();
        (!ips.is_empty()).then(|| ips.into_iter().collect())
    }

    /// The plugin's word first: it comes before the pod's first process. A sandbox that was made again has another namespace, and
    /// the mount of the old one is gone (C34).
    fn netns(&mut self, pod: &PodEntry, looked: &mut bool) -> std::io::Result<Option<PathBuf>> {
        if let Some(announced) = self.announced.get(&pod.status.uid) {
            let node = procfs::ns_id(&self.proc.join("1/ns/net"))?;
            if procfs::ns_id(&announced.netns).is_ok_and(|id| id != node) {
                return Ok(Some(announced.netns.clone()));
            }
        }
        if !*looked && !self.found.get(&pod.cgroup_uid).is_some_and(Found::holds) {
            self.found = procfs::pods(&self.proc)?;
            *looked = true;
        }
        Ok(self.found.get(&pod.cgroup_uid).map(|found| found.path.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use serde_json::json;

    use super::*;

    const UID: &str = "0f3a2b1c-1111-2222-3333-444455556666";

    fn pod(phase: &str, ip: Option<&str>) -> k8s_openapi::api::core::v1::Pod {
        let ips: Vec<_> = ip.iter().map(|ip| json!({"ip": ip})).collect();
        serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "shop", "uid": UID},
            "spec": {"nodeName": "n", "serviceAccountName": "sa", "containers": [{
                "name": "c", "env": [{"name": "X", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
                "ports": [{"name": "http", "containerPort": 8080}],
                "readinessProbe": {"httpGet": {"port": "http", "path": "/"}}}]},
            "status": {"phase": phase, "podIPs": ips},
        }))
        .unwrap()
    }

    fn source(cluster: &Arc<Cluster>, proc: &Path) -> KubernetesSource {
        fs::create_dir_all(proc.join("1/ns")).unwrap();
        fs::write(proc.join("1/ns/net"), "").unwrap();
        KubernetesSource::new(cluster.clone(), Settings::default(), true, proc.to_owned())
    }

    fn announced(netns: PathBuf, uid: Option<&str>) -> Announced {
        Announced {
            key: ("shop".into(), "a".into()),
            uid: uid.map(str::to_owned),
            netns,
            ips: vec!["100.64.1.2".parse().unwrap()],
        }
    }

    /// C21, C23.
    #[test]
    fn an_announced_pod_joins_with_the_addresses_of_the_announcement() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::default());
        let mut source = source(&cluster, dir.path());
        assert!(source.view().is_err());
        let netns = dir.path().join("cni-1");
        fs::write(&netns, "").unwrap();
        let said = announced(netns.clone(), Some(UID));
        assert_eq!(source.announce(&said), None);
        cluster.put(pod("Pending", None), &[("istio.io/dataplane-mode", "ambient")]);
        assert!(source.view().unwrap().desired.is_empty());
        assert_eq!(source.announce(&announced(netns.clone(), Some("another"))), None);
        assert_eq!(source.announce(&said).as_deref(), Some(UID));
        let view = source.view().unwrap();
        assert_eq!((view.desired.len(), &view.desired[0].netns), (1, &netns));
        assert_eq!(view.desired[0].service_account, "sa");
        assert_eq!(view.probed[UID], ["100.64.1.2:8080".parse().unwrap()].into());
        // Its sandbox is gone, and no process shows another.
        fs::remove_file(&netns).unwrap();
        assert!(source.view().unwrap().desired.is_empty());
        cluster.take(&said.key);
        source.view().unwrap();
        assert!(source.announced.is_empty());
    }

    /// C17.
    #[test]
    fn a_pod_of_a_namespace_that_was_not_seen_yet_is_neither_inside_nor_outside() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::default());
        let mut source = source(&cluster, dir.path());
        let netns = dir.path().join("cni-1");
        fs::write(&netns, "").unwrap();
        cluster.put(pod("Pending", None), &[]);
        source.announce(&announced(netns, None)).unwrap();
        assert_eq!(source.view().unwrap().others.len(), 1);
        cluster.take_namespace("shop");
        let view = source.view().unwrap();
        assert_eq!((view.desired.len(), view.others.len()), (0, 0));
    }

    /// C26, C34.
    #[test]
    fn a_running_pod_is_found_by_its_processes_and_leaves_when_it_ended() {
        let dir = tempfile::tempdir().unwrap();
        let cluster = Arc::new(Cluster::default());
        let mut source = source(&cluster, dir.path());
        let process = |pid: &str| {
            let of = dir.path().join(pid);
            fs::create_dir_all(of.join("ns")).unwrap();
            fs::write(of.join("ns/net"), "").unwrap();
            fs::write(of.join("cgroup"), format!("0::/kubepods/pod{UID}/c\n")).unwrap();
            fs::write(of.join("stat"), format!("{pid} (x) S {}7 0", "0 ".repeat(18))).unwrap();
        };
        process("20");
        let ambient = [("istio.io/dataplane-mode", "ambient")];
        cluster.put(pod("Running", Some("100.64.1.2")), &ambient);
        assert_eq!(source.view().unwrap().desired[0].netns, dir.path().join("20/ns/net"));
        // Another sandbox.
        fs::remove_dir_all(dir.path().join("20")).unwrap();
        process("30");
        assert_eq!(source.view().unwrap().desired[0].netns, dir.path().join("30/ns/net"));
        cluster.put(pod("Running", Some("100.64.1.2")), &[]);
        let view = source.view().unwrap();
        assert_eq!((view.desired.len(), view.others.len()), (0, 1));
        cluster.put(pod("Succeeded", Some("100.64.1.2")), &ambient);
        let view = source.view().unwrap();
        assert_eq!((view.desired.len(), view.others.len()), (0, 0));
    }
}
