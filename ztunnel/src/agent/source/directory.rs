//! What pods there are and which of them join, from a directory of manifests and the status files beside it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use culvert_k8s_api::core::Pod;
use culvert_k8s_api::enrolment::{self, Enrolment, Reason, Settings};
use culvert_k8s_api::manifest::{LastGood, Mirror, Scan, scan};
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::status::{Phase, PodStatus};
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;

use super::describe::describe;
use super::{Other, View};
use crate::agent::AgentConfig;

/// A status file is a few hundred bytes.
const MAX_STATUS: u64 = 64 * 1024;

type PodKey = (String, String);

/// Watches the two directories. One notice waits at most: a pass reads everything anyway.
#[derive(Debug)]
pub struct DirectorySource {
    node: String,
    manifests: PathBuf,
    pods: PathBuf,
    settings: Settings,
    dns_capture: bool,
    last_good: LastGood,
    mirror: Option<Mirror>,
    /// By file, as last read.
    statuses: BTreeMap<PathBuf, PodStatus>,
    notices: mpsc::Receiver<()>,
    _watcher: notify::RecommendedWatcher,
}

impl DirectorySource {
    /// Begins to watch.
    ///
    /// # Errors
    /// A directory that cannot be read.
    pub fn open(config: &AgentConfig) -> anyhow::Result<Self> {
        let (manifests, state) = config.directories()?;
        let pods = state.join("status").join("pods");
        fs::create_dir_all(&pods).with_context(|| format!("making {}", pods.display()))?;
        let (notify, notices) = mpsc::channel(1);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too, and would wake us for our own reads.
            if event.is_ok_and(|e| !e.kind.is_access()) {
                let _ = notify.try_send(());
            }
        })?;
        for dir in [manifests, &pods] {
            watcher
                .watch(dir, RecursiveMode::Recursive)
                .with_context(|| format!("watching {}", dir.display()))?;
        }
        let mut last_good = LastGood::default();
        let mirror = open_mirror(&config.last_good()?, manifests, &mut last_good);
        Ok(Self {
            node: config.node.clone(),
            manifests: manifests.to_owned(),
            pods,
            settings: config.settings(),
            dns_capture: config.dns_capture,
            last_good,
            mirror,
            statuses: BTreeMap::new(),
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

    /// What should be now. A file that cannot be read counts as it was before, also before a restart.
    ///
    /// # Errors
    /// A directory that cannot be listed.
    pub fn view(&mut self) -> anyhow::Result<View> {
        let found = scan(&self.manifests)?;
        self.last_good.apply(&found);
        self.remember(&found);
        let statuses_known = self.read_statuses()?;
        let objects = self.last_good.loaded();
        let namespaces: BTreeMap<&str, &StringMap> =
            objects.namespaces().map(|n| (n.metadata.name.as_str(), &n.metadata.labels)).collect();
        let pods: BTreeMap<PodKey, &Pod> = objects
            .pods()
            .map(|pod| ((pod.metadata.namespace.clone(), pod.metadata.name.clone()), pod))
            .collect();
        let none = StringMap::new();
        let mut view = View { complete: statuses_known && self.manifests_known(), ..View::default() };
        for status in self.statuses.values() {
            let Some(netns) = self.runs_here(status) else { continue };
            let pod = pods.get(&(status.namespace.clone(), status.name.clone()));
            let labels = namespaces.get(status.namespace.as_str()).copied().unwrap_or(&none);
            match pod.map(|pod| (pod, enrolment::decide(pod, labels, &self.settings))) {
                Some((pod, decided)) if decided.joins() => {
                    view.join(describe(pod, &status.uid, netns, self.dns_capture), &status.pod_ips);
                }
                Some((_, decided)) => {
                    let excluded = decided == Enrolment::No(Reason::ExcludedNamespace);
                    view.others.push(Other { uid: status.uid.clone(), netns, excluded });
                }
                // It is about to be ended.
                None => {}
            }
        }
        Ok(view)
    }

    /// No file is bad without a good former content.
    fn manifests_known(&self) -> bool {
        self.last_good.files().values().all(|file| file.errors.is_empty() || !file.objects.is_empty())
    }

    fn remember(&mut self, found: &Scan) {
        if let Some(mirror) = &mut self.mirror
            && let Err(error) = mirror.keep(found, &self.last_good)
        {
            tracing::warn!(%error, "cannot keep the last good manifests over a restart");
        }
    }

    /// False if a status is unknown: unreadable, and never read before.
    fn read_statuses(&mut self) -> anyhow::Result<bool> {
        let mut before = std::mem::take(&mut self.statuses);
        let mut known = true;
        let listing = fs::read_dir(&self.pods).with_context(|| format!("listing {}", self.pods.display()))?;
        for entry in listing {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            let status = match read_status(&path) {
                Ok(status) => Some(status),
                // Gone between the listing and the reading.
                Err(error) if is_not_found(&error) => continue,
                Err(error) => {
                    tracing::warn!(file = %path.display(), error = format!("{error:#}"), "pod status counts as it was");
                    before.remove(&path)
                }
            };
            known &= status.is_some();
            self.statuses.extend(status.map(|status| (path, status)));
        }
        Ok(known)
    }

    fn runs_here(&self, status: &PodStatus) -> Option<PathBuf> {
        let alive = matches!(status.phase, Phase::Pending | Phase::Running) && !status.pod_ips.is_empty();
        if status.node_name != self.node || !alive {
            return None;
        }
        status.netns.as_ref().map(PathBuf::from).filter(|path| path.exists())
    }
}

/// Without it a restart forgets what bad files said when they were good; that is no reason not to serve.
fn open_mirror(dir: &Path, source: &Path, manifests: &mut LastGood) -> Option<Mirror> {
    match Mirror::open(dir, source) {
        Ok((mirror, before)) => {
            manifests.apply(before);
            Some(mirror)
        }
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "cannot keep the last good manifests over a restart");
            None
        }
    }
}

fn read_status(path: &Path) -> anyhow::Result<PodStatus> {
    let length = fs::metadata(path)?.len();
    anyhow::ensure!(length <= MAX_STATUS, "{length} bytes are more than a pod status has ({MAX_STATUS})");
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn is_not_found(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::NotFound)
}
