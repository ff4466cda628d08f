//! What the API server says of this node's pods and of all namespaces, kept by two watches (C08, C23).

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::core::Pod;
use culvert_k8s_api::labels;
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::status::{Phase, PodStatus, Redirection};
use culvert_runtime::tasks::Tasks;
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::core::v1::{Namespace, Pod as ApiPod};
use kube::api::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The annotation by which a pod that the kubelet made from a file names itself in its cgroup.
const CONFIG_HASH: &str = "kubernetes.io/config.hash";

/// Between two tries to list or watch. An agent that is back 5 s after its API server is soon enough (30 s, the library's own bound, is not), and with three
/// watches a node a thousand nodes ask 600 times a second meanwhile.
const AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];

/// How a watch is tried again: twice as long each time, spread out.
#[derive(Debug)]
pub struct Again(Duration);

impl Default for Again {
    fn default() -> Self {
        Self(AGAIN[0])
    }
}

impl Iterator for Again {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let wait = self.0;
        self.0 = (wait * 2).min(AGAIN[1]);
        Some(wait.mul_f64(0.5 + fastrand::f64() / 2.0))
    }
}

impl Backoff for Again {
    fn reset(&mut self) {
        *self = Self::default();
    }
}

/// Namespace and name.
pub type PodKey = (String, String);

/// A pod as last seen.
#[derive(Clone, Debug)]
pub struct PodEntry {
    /// What it should be.
    pub object: Pod,
    /// What it is; without a namespace path.
    pub status: PodStatus,
    /// The uid in the cgroups of its processes.
    pub cgroup_uid: String,
}

impl PodEntry {
    /// What its annotation says (C09); anything but the two words says nothing.
    pub fn redirection(&self) -> Option<Redirection> {
        match self.object.metadata.annotations.get(labels::REDIRECTION).map(String::as_str) {
            Some("enabled") => Some(Redirection::Enabled),
            Some("pending") => Some(Redirection::Pending),
            _ => None,
        }
    }
}

/// Pods, and labels of namespaces by name.
pub type Snapshot = (Vec<Arc<PodEntry>>, BTreeMap<String, Arc<StringMap>>);

/// One kind, whole once it was listed. Bounded by what the API server holds: the pods of one node, or the namespaces.
#[derive(Debug)]
struct Table<V> {
    rows: BTreeMap<PodKey, Arc<V>>,
    listed: bool,
}

impl<V> Default for Table<V> {
    fn default() -> Self {
        Self { rows: BTreeMap::new(), listed: false }
    }
}

#[derive(Debug, Default)]
struct Tables {
    pods: Table<PodEntry>,
    namespaces: Table<StringMap>,
}

/// Shared by the source and the reports.
#[derive(Debug, Default)]
pub struct Cluster {
    tables: Mutex<Tables>,
    /// Wakes whoever looks at the tables.
    pub changed: Notify,
}

impl Cluster {
    /// Begins to watch.
    pub fn watch(client: &Client, node: &str, tasks: &Tasks) -> Arc<Self> {
        let cluster = Arc::new(Self::default());
        let of_node = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
        let pods = watcher::watcher(Api::<ApiPod>::all(client.clone()), of_node).backoff(Again::default());
        tasks.spawn("watch pods", follow(pods, cluster.clone(), read_pod, |tables| &mut tables.pods));
        let all = watcher::watcher(
            Api::<PartialObjectMeta<Namespace>>::all(client.clone()),
            watcher::Config::default(),
        );
        let shared = cluster.clone();
        tasks.spawn(
            "watch namespaces",
            follow(all.backoff(Again::default()), shared, read_namespace, |tables| &mut tables.namespaces),
        );
        cluster
    }

    /// Pods and labels of namespaces, once both are known.
    pub fn snapshot(&self) -> Option<Snapshot> {
        let tables = self.tables.lock();
        if !tables.pods.listed || !tables.namespaces.listed {
            return None;
        }
        let namespaces = &tables.namespaces.rows;
        let labels = namespaces.iter().map(|((_, name), labels)| (name.clone(), labels.clone())).collect();
        Some((tables.pods.rows.values().cloned().collect(), labels))
    }

    /// The pod of that name now.
    pub fn pod(&self, key: &PodKey) -> Option<Arc<PodEntry>> {
        self.tables.lock().pods.rows.get(key).cloned()
    }

    /// The pod with that uid. Looks through the node's pods, a few hundred at most.
    pub fn pod_by_uid(&self, uid: &str) -> Option<Arc<PodEntry>> {
        self.tables.lock().pods.rows.values().find(|pod| pod.status.uid == uid).cloned()
    }

    /// The pods whose annotation says anything.
    pub fn annotated(&self) -> Vec<Arc<PodEntry>> {
        let tables = self.tables.lock();
        tables.pods.rows.values().filter(|pod| pod.redirection().is_some()).cloned().collect()
    }

    /// Puts a pod in, as a watch would.
    #[cfg(test)]
    pub fn put(&self, pod: ApiPod, namespace: &[(&str, &str)]) {
        let mut tables = self.tables.lock();
        let (key, entry) = read_pod(pod).unwrap();
        let labels = namespace.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        tables.namespaces.rows.insert((String::new(), key.0.clone()), Arc::new(labels));
        tables.pods.rows.insert(key, Arc::new(entry));
        tables.pods.listed = true;
        tables.namespaces.listed = true;
    }

    /// Takes a pod out.
    #[cfg(test)]
    pub fn take(&self, key: &PodKey) {
        self.tables.lock().pods.rows.remove(key);
    }

    /// Takes a namespace out.
    #[cfg(test)]
    pub fn take_namespace(&self, name: &str) {
        self.tables.lock().namespaces.rows.remove(&(String::new(), name.to_owned()));
    }
}

/// A list that is under way replaces the rows only when it is whole: a relist removes nobody for a moment.
async fn follow<K: Debug, V>(
    events: impl Stream<Item = watcher::Result<Event<K>>>,
    cluster: Arc<Cluster>,
    read: fn(K) -> Option<(PodKey, V)>,
    table: fn(&mut Tables) -> &mut Table<V>,
) {
    let mut events = pin!(events);
    let mut listing = BTreeMap::new();
    while let Some(event) = events.next().await {
        match event {
            Err(error) => {
                tracing::warn!(%error, "the API server cannot be watched; what was known holds");
                continue;
            }
            Ok(Event::Init) => {
                listing.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                listing.extend(read(object).map(|(key, value)| (key, Arc::new(value))));
                continue;
            }
            Ok(Event::InitDone) => {
                let whole = std::mem::take(&mut listing);
                *table(&mut cluster.tables.lock()) = Table { rows: whole, listed: true };
            }
            Ok(Event::Apply(object)) => {
                if let Some((key, value)) = read(object) {
                    table(&mut cluster.tables.lock()).rows.insert(key, Arc::new(value));
                }
            }
            Ok(Event::Delete(object)) => {
                if let Some((key, _)) = read(object) {
                    table(&mut cluster.tables.lock()).rows.remove(&key);
                }
            }
        }
        cluster.changed.notify_one();
    }
}

fn read_namespace(object: PartialObjectMeta<Namespace>) -> Option<(PodKey, StringMap)> {
    let meta = object.metadata;
    Some(((String::new(), meta.name?), meta.labels.unwrap_or_default()))
}

fn read_pod(pod: ApiPod) -> Option<(PodKey, PodEntry)> {
    let meta = pod.meta();
    let key = (meta.namespace.clone()?, meta.name.clone()?);
    let uid = meta.uid.clone()?;
    let hash = meta.annotations.as_ref().and_then(|it| it.get(CONFIG_HASH));
    let cgroup_uid = hash.unwrap_or(&uid).clone();
    let status = pod.status.as_ref();
    let phase = match status.and_then(|it| it.phase.as_deref()) {
        Some("Running") => Phase::Running,
        Some("Succeeded") => Phase::Succeeded,
        Some("Failed") => Phase::Failed,
        _ => Phase::Pending,
    };
    let pod_ips = status.and_then(|it| it.pod_ips.as_ref()).into_iter().flatten();
    let status = PodStatus {
        uid,
        namespace: key.0.clone(),
        name: key.1.clone(),
        node_name: pod.spec.as_ref().and_then(|it| it.node_name.clone()).unwrap_or_default(),
        pod_ips: pod_ips.filter_map(|it| it.ip.parse().ok()).collect(),
        phase,
        ready: false,
        netns: None,
        deleted: meta.deletion_timestamp.is_some(),
    };
    Some((key, PodEntry { object: typed(pod), status, cgroup_uid }))
}

/// The fields that the mesh reads. A container that cannot be read costs the pod its probes' exemption, not its place in the mesh.
fn typed(pod: ApiPod) -> Pod {
    let mut value = serde_json::to_value(&pod).unwrap_or_default();
    match serde_json::from_value(value.clone()) {
        Ok(pod) => pod,
        Err(error) => {
            let name = pod.metadata.name.as_deref().unwrap_or_default();
            tracing::warn!(pod = name, %error, "a pod's containers cannot be read: its probes go through the mesh");
            value["spec"] = serde_json::json!({
                "containers": [],
                "hostNetwork": pod.spec.as_ref().and_then(|it| it.host_network).unwrap_or_default(),
                "serviceAccountName": pod.spec.as_ref().and_then(|it| it.service_account_name.clone()),
            });
            serde_json::from_value(value).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_tried_again_within_five_seconds_for_ever() {
        let mut again = Again::default();
        let waits: Vec<Duration> = again.by_ref().take(100).collect();
        assert!(waits[0] <= AGAIN[0] && waits.iter().all(|it| *it <= AGAIN[1]));
        assert!(waits[10..].iter().all(|it| *it >= AGAIN[1] / 2));
        again.reset();
        assert!(again.next().is_some_and(|it| it <= AGAIN[0]));
    }
}
