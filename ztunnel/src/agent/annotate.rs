//! Reports as annotations of pods (C09): what should be said is kept here, and a task says it to the API server until it is said.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use culvert_k8s_api::labels;
use culvert_k8s_api::status::Redirection;
use futures_util::{StreamExt, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::events::{self, Trouble};
use super::source::{Cluster, PodKey};

/// One patch; the API server answers in milliseconds or is away.
const PATIENCE: Duration = Duration::from_secs(5);
/// After a patch that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// Patches under way at once: when the chart goes, what is not said within some hundredths of a second may not be said any more.
const AT_A_TIME: usize = 16;
/// What the API server has is compared with what was said this often: somebody else may have written it (C10).
const COMPARE: Duration = Duration::from_secs(5);

/// See the module. One row for each pod of the node that was ever reported, until the pod is gone.
#[derive(Debug)]
pub struct Annotations {
    cluster: Arc<Cluster>,
    rows: Mutex<BTreeMap<String, Row>>,
    due: Notify,
    /// The mesh is uninstalled, and with it the right to write: what the API server refuses counts as said.
    leaving: AtomicBool,
    /// Nothing is said of any pod, whatever is to be said.
    withdrawn: AtomicBool,
}

#[derive(Clone, Debug)]
struct Row {
    key: PodKey,
    value: Option<Redirection>,
    /// The API server has taken it.
    said: bool,
    trouble: Option<Trouble>,
}

impl Annotations {
    /// Nothing to say yet.
    pub fn new(cluster: Arc<Cluster>) -> Arc<Self> {
        Arc::new(Self {
            cluster,
            rows: Mutex::default(),
            due: Notify::new(),
            leaving: AtomicBool::new(false),
            withdrawn: AtomicBool::new(false),
        })
    }

    /// What should be said of a pod from now on; nothing for a pod that is gone.
    pub fn set(&self, uid: &str, value: Option<Redirection>) {
        self.change(uid, |row| {
            if row.value != value {
                row.value = value;
                row.said &= self.is_withdrawn();
                self.due.notify_one();
            }
        });
    }

    /// What keeps a pod from being enrolled as it should be, from now on. People are told if it lasts.
    pub fn trouble(&self, uid: &str, why: Option<&str>) {
        let now = Instant::now();
        self.change(uid, |row| match (why, &mut row.trouble) {
            (None, trouble) => *trouble = None,
            (Some(why), Some(trouble)) => trouble.goes_on(why, now),
            (Some(why), none) => *none = Some(Trouble::new(why, now)),
        });
    }

    /// Takes every report away, or says all of them again. What is to be said goes on being remembered.
    pub fn withdraw(&self, withdrawn: bool) {
        if self.withdrawn.swap(withdrawn, Ordering::Relaxed) != withdrawn {
            self.due.notify_one();
        }
    }

    fn is_withdrawn(&self) -> bool {
        self.withdrawn.load(Ordering::Relaxed)
    }

    fn change(&self, uid: &str, change: impl FnOnce(&mut Row)) {
        let Some(pod) = self.cluster.pod_by_uid(uid) else { return };
        let mut rows = self.rows.lock();
        change(rows.entry(uid.to_owned()).or_insert_with(|| Row {
            key: (pod.status.namespace.clone(), pod.status.name.clone()),
            value: pod.redirection(),
            said: true,
            trouble: None,
        }));
    }

    /// Nobody comes after this agent: what may not be written any more is left as it is.
    pub fn leaving(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.due.notify_one();
    }

    /// Takes a pod's annotation away. True once the API server has done so, or the pod is gone.
    pub fn clear(&self, uid: &str) -> bool {
        if self.cluster.pod_by_uid(uid).is_none() {
            self.rows.lock().remove(uid);
            return true;
        }
        self.set(uid, None);
        self.rows.lock().get(uid).is_none_or(|row| row.said)
    }

    /// The API server has taken what is to be said of a pod.
    pub fn is_said(&self, uid: &str) -> bool {
        self.rows.lock().get(uid).is_none_or(|row| row.said)
    }

    /// What is or will be said of a pod.
    pub fn get(&self, uid: &str) -> Option<Redirection> {
        match self.rows.lock().get(uid) {
            Some(row) => row.value,
            None => self.cluster.pod_by_uid(uid)?.redirection(),
        }
    }

    /// The pods of which anything is said.
    pub fn reported(&self) -> Vec<String> {
        self.cluster.annotated().iter().map(|pod| pod.status.uid.clone()).collect()
    }

    /// Says what is to be said, for ever.
    pub async fn run(self: Arc<Self>, client: Client) {
        loop {
            let saying = self.unsaid().into_iter().map(|(uid, row)| self.try_to_say(&client, uid, row));
            let said = stream::iter(saying).buffer_unordered(AT_A_TIME);
            let all = said.fold(true, |all, said| std::future::ready(all && said)).await;
            tokio::select! {
                () = self.due.notified() => {}
                () = tokio::time::sleep(if all { COMPARE } else { AGAIN }) => {}
            }
        }
    }

    async fn try_to_say(&self, client: &Client, uid: String, row: Row) -> bool {
        match say(client, &uid, &row).await {
            Ok(()) => self.said(&uid, &row),
            Err(error) if self.leaving.load(Ordering::Relaxed) && is_refusal(&error) => self.said(&uid, &row),
            Err(error) => {
                let (pod, namespace) = (&row.key.1, &row.key.0);
                tracing::warn!(%pod, %namespace, error = format!("{error:#}"), "annotation cannot be written; trying again");
                return false;
            }
        }
        true
    }

    /// Tells people what has lasted, for ever.
    pub async fn tell(self: Arc<Self>, client: Client, node: String) {
        let recorder = events::recorder(client, node);
        loop {
            for (uid, key, why) in self.lasting(Instant::now()) {
                events::publish(&recorder, &uid, &key, &why).await;
            }
            tokio::time::sleep(COMPARE).await;
        }
    }

    /// What has lasted so long that people should hear of it; a few, the others next time.
    fn lasting(&self, now: Instant) -> Vec<(String, PodKey, String)> {
        let mut rows = self.rows.lock();
        let due = rows.iter_mut().filter_map(|(uid, row)| {
            let why = row.trouble.as_mut()?.due(now)?.to_owned();
            Some((uid.clone(), row.key.clone(), why))
        });
        due.take(events::AT_ONCE).collect()
    }

    /// Rows that the API server does not have. Those of pods that are gone end here.
    fn unsaid(&self) -> Vec<(String, Row)> {
        let mut rows = self.rows.lock();
        rows.retain(|uid, row| {
            let Some(pod) = self.cluster.pod_by_uid(uid) else { return false };
            // It may only be late to hear of our own patch; saying it twice changes nothing.
            row.said &= pod.redirection() == self.now(row.value);
            true
        });
        let unsaid = rows.iter().filter(|(_, row)| !row.said);
        unsaid.map(|(uid, row)| (uid.clone(), Row { value: self.now(row.value), ..row.clone() })).collect()
    }

    /// What of it is said now.
    fn now(&self, value: Option<Redirection>) -> Option<Redirection> {
        value.filter(|_| !self.is_withdrawn())
    }

    fn said(&self, uid: &str, what: &Row) {
        let mut rows = self.rows.lock();
        if let Some(row) = rows.get_mut(uid).filter(|row| self.now(row.value) == what.value) {
            row.said = true;
            // Who waits for it looks again.
            self.cluster.changed.notify_one();
        }
    }
}

async fn say(client: &Client, uid: &str, row: &Row) -> anyhow::Result<()> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &row.key.0);
    let patch = Patch::Merge(body(uid, row.value));
    let params = PatchParams::default();
    let answer = pods.patch_status(&row.key.1, &params, &patch);
    match tokio::time::timeout(PATIENCE, answer).await? {
        Ok(_) => Ok(()),
        // Gone, or another of the same name: nothing is left to be said.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn is_refusal(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(kube::Error::Api(status)) if matches!(status.code, 401 | 403))
}

/// With the uid, so that the API server refuses it for another pod of the same name.
fn body(uid: &str, value: Option<Redirection>) -> Value {
    json!({"metadata": {"uid": uid, "annotations": {labels::REDIRECTION: value}}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(annotation: Option<&str>) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "a", "namespace": "n", "uid": "u", "annotations": annotation.map(|it| json!({labels::REDIRECTION: it})).unwrap_or(json!({}))},
            "spec": {"containers": []},
        }))
        .unwrap()
    }

    #[test]
    fn a_patch_names_the_pod_and_the_word() {
        let expected =
            json!({"metadata": {"uid": "u", "annotations": {"ambient.istio.io/redirection": "enabled"}}});
        assert_eq!(body("u", Some(Redirection::Enabled)), expected);
        assert!(body("u", None)["metadata"]["annotations"][labels::REDIRECTION].is_null());
    }

    /// C09, C32: it is gone when the API server took it away, not when it was asked.
    #[test]
    fn a_report_is_gone_when_it_was_said() {
        let cluster = Arc::new(Cluster::default());
        cluster.put(pod(Some("enabled")), &[]);
        let reports = Annotations::new(cluster.clone());
        assert_eq!(
            (reports.get("u"), reports.reported()),
            (Some(Redirection::Enabled), vec!["u".to_owned()])
        );
        reports.set("u", Some(Redirection::Enabled));
        assert!(reports.unsaid().is_empty());
        assert!(!reports.clear("u"));
        let unsaid = reports.unsaid();
        assert_eq!(unsaid.len(), 1);
        assert!(!reports.is_said("u"));
        reports.said("u", &unsaid[0].1);
        assert!(reports.is_said("u") && reports.clear("u"));
        assert_eq!(reports.get("u"), None);
        // Somebody writes it again.
        assert_eq!(reports.unsaid().len(), 1);
        cluster.put(pod(None), &[]);
        reports.said("u", &unsaid[0].1);
        assert!(reports.unsaid().is_empty());
        cluster.take(&("n".into(), "a".into()));
        assert!(reports.clear("u") && reports.rows.lock().is_empty());
    }

    /// C79, C09: when the chart goes, before the right to say so does; and said again if it does not go after all.
    #[test]
    fn reports_are_withdrawn_and_remembered() {
        let cluster = Arc::new(Cluster::default());
        cluster.put(pod(Some("enabled")), &[]);
        let reports = Annotations::new(cluster.clone());
        reports.set("u", Some(Redirection::Enabled));
        reports.withdraw(true);
        let unsaid = reports.unsaid();
        assert_eq!(unsaid.iter().map(|it| it.1.value).collect::<Vec<_>>(), [None]);
        reports.said("u", &unsaid[0].1);
        cluster.put(pod(None), &[]);
        assert!(reports.unsaid().is_empty());
        assert_eq!(reports.get("u"), Some(Redirection::Enabled));
        reports.withdraw(false);
        assert_eq!(reports.unsaid()[0].1.value, Some(Redirection::Enabled));
        // Taken away for good meanwhile: nothing is left to say.
        reports.withdraw(true);
        reports.unsaid();
        reports.said("u", &unsaid[0].1);
        assert!(reports.clear("u"));
    }
}
