//! What pods there are and which of them join, from a directory of manifests and the status files beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use culvert_k8s_api::core::Pod;
use culvert_k8s_api::enrolment::{self, Settings};
use culvert_k8s_api::labels;
use culvert_k8s_api::manifest::{LastGood, scan};
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::status::{Phase, PodStatus};
use culvert_net::redirect::RedirectConfig;
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::{AgentConfig, Desired};

/// A status file is a few hundred bytes.
const MAX_STATUS: u64 = 64 * 1024;

/// Watches the two directories. One notice waits at most: a pass reads everything anyway.
#[derive(Debug)]
pub struct DirectorySource {
    node: String,
    manifests: PathBuf,
    pods: PathBuf,
    settings: Settings,
    dns_capture: bool,
    last_good: LastGood,
    notices: mpsc::Receiver<()>,
    _watcher: notify::RecommendedWatcher,
}

impl DirectorySource {
    /// Begins to watch.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn open(config: &AgentConfig) -> anyhow::Result<Self> {
        let pods = config.state.join("status").join("pods");
        fs::create_dir_all(&pods).with_context(|| format!("making {}", pods.display()))?;
        let (notify, notices) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too, and would wake us for our own reads.
            if event.is_ok_and(|e| !e.kind.is_access()) {
                let _ = notify.try_send(());
            }
        })?;
        for dir in [&config.manifests, &pods] {
            watcher
                .watch(dir, RecursiveMode::Recursive)
                .with_context(|| format!("watching {}", dir.display()))?;
        }
        Ok(Self {
            node: config.node.clone(),
            manifests: config.manifests.clone(),
            pods,
            settings: Settings {
                excluded_namespaces: config.exclude_namespaces.clone(),
                ..Settings::default()
            },
            dns_capture: config.dns_capture,
            last_good: LastGood::default(),
            notices,
            _watcher: watcher,
        })
    }

    /// Resolves when something may have changed.
    pub async fn changed(&mut self) {
        if self.notices.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// The pods of this node that should be enrolled now. A manifest that cannot be read counts as it was before.
    ///
    /// # Errors
    /// A directory that cannot be listed.
    pub fn desired(&mut self) -> anyhow::Result<Vec<Desired>> {
        self.last_good.apply(scan(&self.manifests)?);
        let objects = self.last_good.loaded();
        let namespaces: BTreeMap<&str, &StringMap> =
            objects.namespaces().map(|n| (n.metadata.name.as_str(), &n.metadata.labels)).collect();
        let statuses = read_statuses(&self.pods)?;
        let none = StringMap::new();
        let mut desired = Vec::new();
        for pod in objects.pods() {
            let Some(status) = statuses.get(&(pod.metadata.namespace.clone(), pod.metadata.name.clone()))
            else {
                continue;
            };
            let Some(netns) = self.runs_here(status) else { continue };
            let namespace_labels = namespaces.get(pod.metadata.namespace.as_str()).copied().unwrap_or(&none);
            if enrolment::decide(pod, namespace_labels, &self.settings).joins() {
                desired.push(self.describe(pod, status, netns));
            }
        }
        Ok(desired)
    }

    fn runs_here(&self, status: &PodStatus) -> Option<PathBuf> {
        let alive = matches!(status.phase, Phase::Pending | Phase::Running) && !status.pod_ips.is_empty();
        if status.node_name != self.node || !alive {
            return None;
        }
        status.netns.as_ref().map(PathBuf::from).filter(|path| path.exists())
    }

    fn describe(&self, pod: &Pod, status: &PodStatus, netns: PathBuf) -> Desired {
        let annotations = &pod.metadata.annotations;
        let flag = |name: &str| annotations.get(name).map(|value| value == "true");
        let dns = flag(labels::DNS_CAPTURE).unwrap_or(self.dns_capture);
        let rules = RedirectConfig {
            dns_port: dns.then_some(crate::config::DNS_PORT),
            bypass_inbound: flag(labels::BYPASS_INBOUND_CAPTURE).unwrap_or(false),
            ..RedirectConfig::default()
        };
        Desired {
            uid: status.uid.clone(),
            name: status.name.clone(),
            namespace: status.namespace.clone(),
            service_account: pod.service_account().to_owned(),
            netns,
            rules,
        }
    }
}

fn read_statuses(dir: &Path) -> anyhow::Result<BTreeMap<(String, String), PodStatus>> {
    let mut statuses = BTreeMap::new();
    for entry in fs::read_dir(dir).with_context(|| format!("listing {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        match read_status(&path) {
            Ok(status) => {
                statuses.insert((status.namespace.clone(), status.name.clone()), status);
            }
            // Gone between the listing and the reading.
            Err(error) if is_not_found(&error) => {}
            Err(error) => {
                tracing::warn!(file = %path.display(), error = format!("{error:#}"), "pod status ignored")
            }
        }
    }
    Ok(statuses)
}

fn read_status(path: &Path) -> anyhow::Result<PodStatus> {
    let length = fs::metadata(path)?.len();
    anyhow::ensure!(length <= MAX_STATUS, "{length} bytes are more than a pod status has ({MAX_STATUS})");
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}
