//! What the API server says of the agent's own DaemonSet: whether another agent comes after this one (C79).
//!
//! `helm uninstall` deletes the DaemonSet, then the agent's rights, then its service account, all within a second, and only then is
//! the agent told to end. It can ask nobody any more. So it watches its DaemonSet as long as it lives: what is watched already is shown
//! to the end, whatever becomes of rights.

use std::collections::BTreeMap;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use culvert_runtime::tasks::Tasks;
use futures_util::{Stream, StreamExt};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Node, NodeSelectorRequirement, NodeSelectorTerm};
use kube::api::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;

use super::KubernetesConfig;
use super::source::Again;

/// One question to the API server; an answer may take two.
pub const PATIENCE: Duration = Duration::from_secs(3);
/// What an object bears while it is deleted without what it owns.
const ORPHANS: &str = "orphan";

/// What the watch has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Watched {
    /// Nothing yet.
    #[default]
    Nothing,
    /// The DaemonSet, as one that stays.
    There,
    /// That it is gone or being deleted.
    Gone,
}

/// What the API server answers when it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The DaemonSet is there and wants a pod here.
    There,
    /// It is there, to be deleted, or its namespace is.
    Deleting,
    /// It is there, and has no place on this node.
    Elsewhere,
    /// It is not there.
    NotThere,
    /// The agent may not know.
    NoRight,
    /// The agent's token, which has not expired, is no longer taken: its service account is gone.
    NoAccount,
    /// None, or one that says nothing.
    None,
}

/// Follows the DaemonSet.
#[derive(Debug, Default)]
pub struct Presence {
    seen: Mutex<Seen>,
    /// Wakes whoever follows it.
    changed: Notify,
}

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    watched: Watched,
    /// Its pods are to outlive it.
    orphans: bool,
}

impl Presence {
    /// Begins to watch.
    pub fn watch(client: &Client, config: &KubernetesConfig, tasks: &Tasks) -> Arc<Self> {
        let presence = Arc::new(Self::default());
        let sets: Api<PartialObjectMeta<DaemonSet>> =
            Api::namespaced(client.clone(), &config.system_namespace);
        let one = watcher::Config::default().fields(&format!("metadata.name={}", config.daemonset));
        let events = watcher::watcher(sets, one).backoff(Again::default());
        tasks.spawn("watch own DaemonSet", Arc::clone(&presence).follow(events));
        presence
    }

    /// What it has shown until now.
    pub fn watched(&self) -> Watched {
        self.seen.lock().watched
    }

    /// Resolves when something was shown, and says whether the agent is about to be ended, and no other comes.
    pub async fn ending(&self) -> bool {
        self.changed.notified().await;
        let seen = *self.seen.lock();
        seen.watched == Watched::Gone && !seen.orphans
    }

    async fn follow(
        self: Arc<Self>,
        events: impl Stream<Item = watcher::Result<Event<PartialObjectMeta<DaemonSet>>>>,
    ) {
        let mut events = pin!(events);
        let mut listed = None;
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Init) => listed = None,
                Ok(Event::InitApply(set)) => listed = Some(set),
                Ok(Event::InitDone) => self.see(listed.as_ref()),
                Ok(Event::Apply(set)) => self.see(Some(&set)),
                Ok(Event::Delete(_)) => self.see(None),
                Err(error) => {
                    tracing::debug!(%error, "the agent's DaemonSet cannot be watched; what was seen holds");
                }
            }
        }
    }

    fn see(&self, set: Option<&PartialObjectMeta<DaemonSet>>) {
        let mut seen = self.seen.lock();
        match set.map(|it| &it.metadata) {
            Some(meta) if meta.deletion_timestamp.is_none() => {
                *seen = Seen { watched: Watched::There, orphans: false };
            }
            Some(meta) => {
                let orphans = meta.finalizers.iter().flatten().any(|it| it == ORPHANS);
                *seen = Seen { watched: Watched::Gone, orphans: seen.orphans || orphans };
            }
            None => seen.watched = Watched::Gone,
        }
        self.changed.notify_one();
    }
}

/// Asks once.
pub async fn ask(client: &Client, config: &KubernetesConfig, node: &str) -> Answer {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &config.system_namespace);
    match timed(sets.get(&config.daemonset)).await {
        Ok(set) if set.metadata.deletion_timestamp.is_some() => Answer::Deleting,
        Ok(set) => match labels_of(client, node).await {
            Some(labels) if !has_place(&set, node, &labels) => Answer::Elsewhere,
            _ => Answer::There,
        },
        Err(Some(404)) => Answer::NotThere,
        Err(Some(401)) if is_current(&config.account_dir.join("token"), SystemTime::now()) => {
            Answer::NoAccount
        }
        // With the namespace the rights in it may go before the DaemonSet.
        Err(Some(403)) if is_leaving(client, &config.system_namespace).await => Answer::Deleting,
        Err(Some(403)) => Answer::NoRight,
        Err(_) => Answer::None,
    }
}

/// The code of the API server's refusal; `None` if there was no answer.
async fn timed<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T, Option<u16>> {
    match tokio::time::timeout(PATIENCE, question).await {
        Ok(Ok(it)) => Ok(it),
        Ok(Err(kube::Error::Api(status))) => Err(Some(status.code)),
        Ok(Err(error)) => {
            tracing::debug!(%error, "the API server cannot be asked");
            Err(None)
        }
        Err(_) => Err(None),
    }
}

async fn labels_of(client: &Client, node: &str) -> Option<BTreeMap<String, String>> {
    let node = timed(Api::<Node>::all(client.clone()).get(node)).await.ok()?;
    Some(node.metadata.labels.unwrap_or_default())
}

async fn is_leaving(client: &Client, namespace: &str) -> bool {
    match timed(Api::<Namespace>::all(client.clone()).get(namespace)).await {
        Ok(namespace) => namespace.metadata.deletion_timestamp.is_some(),
        Err(code) => code == Some(404),
    }
}

/// Whether the DaemonSet's selector and required affinity match a node. Taints do not count: it tolerates all.
fn has_place(set: &DaemonSet, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let Some(spec) = set.spec.as_ref().and_then(|it| it.template.spec.as_ref()) else { return true };
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let required = spec.affinity.as_ref().and_then(|it| it.node_affinity.as_ref());
    let required = required.and_then(|it| it.required_during_scheduling_ignored_during_execution.as_ref());
    selected
        && required.is_none_or(|it| it.node_selector_terms.iter().any(|term| matches(term, node, labels)))
}

/// A term without any requirement matches nothing.
fn matches(term: &NodeSelectorTerm, node: &str, labels: &BTreeMap<String, String>) -> bool {
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let name = BTreeMap::from([("metadata.name".to_owned(), node.to_owned())]);
    let empty = expressions.is_empty() && fields.is_empty();
    !empty && expressions.iter().all(|it| holds(it, labels)) && fields.iter().all(|it| holds(it, &name))
}

/// An operator that is not known holds: nobody leaves for want of understanding.
fn holds(requirement: &NodeSelectorRequirement, of: &BTreeMap<String, String>) -> bool {
    let value = of.get(&requirement.key);
    let values = requirement.values.as_deref().unwrap_or_default();
    let number = |text: &String| text.parse::<i64>().ok();
    let compared = value.and_then(number).zip(values.first().and_then(number));
    match requirement.operator.as_str() {
        "In" => value.is_some_and(|it| values.contains(it)),
        "NotIn" => value.is_none_or(|it| !values.contains(it)),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compared.is_some_and(|(it, than)| it > than),
        "Lt" => compared.is_some_and(|(it, than)| it < than),
        _ => true,
    }
}

/// Whether a token is there and has not expired: an expired one that is refused says nothing about its account.
fn is_current(token: &Path, now: SystemTime) -> bool {
    let expiry = || {
        let text = std::fs::read_to_string(token).ok()?;
        let claims = URL_SAFE_NO_PAD.decode(text.trim().split('.').nth(1)?).ok()?;
        serde_json::from_slice::<Value>(&claims).ok()?["exp"].as_u64()
    };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    expiry().is_some_and(|it| it > now)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use futures_util::stream;
    use serde_json::json;

    use super::*;

    fn set(deleting: bool) -> PartialObjectMeta<DaemonSet> {
        let deleted = deleting.then_some("2026-01-01T00:00:00Z");
        serde_json::from_value(json!({"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata",
            "metadata": {"name": "culvert-agent", "namespace": "culvert-system", "deletionTimestamp": deleted}}))
        .unwrap()
    }

    async fn watched(events: Vec<watcher::Result<Event<PartialObjectMeta<DaemonSet>>>>) -> Watched {
        let presence = Arc::new(Presence::default());
        Arc::clone(&presence).follow(stream::iter(events)).await;
        presence.watched()
    }

    /// C79: what was shown holds when rights go, and a list without the DaemonSet says that it is gone.
    #[tokio::test]
    async fn what_a_watch_has_shown_outlives_the_right_to_watch() {
        let lost = || Err(watcher::Error::NoResourceVersion);
        let listed = || vec![Ok(Event::Init), Ok(Event::InitApply(set(false))), Ok(Event::InitDone)];
        let then = |more: Vec<_>| listed().into_iter().chain(more).collect::<Vec<_>>();
        assert_eq!(watched(vec![lost(), Ok(Event::Init)]).await, Watched::Nothing);
        assert_eq!(watched(listed()).await, Watched::There);
        assert_eq!(watched(then(vec![lost(), Ok(Event::Init), lost()])).await, Watched::There);
        assert_eq!(watched(then(vec![Ok(Event::Delete(set(false))), lost()])).await, Watched::Gone);
        assert_eq!(watched(then(vec![Ok(Event::Apply(set(true))), lost()])).await, Watched::Gone);
        assert_eq!(watched(then(vec![Ok(Event::Init), Ok(Event::InitDone)])).await, Watched::Gone);
        // Made again, as by `kubectl replace --force`.
        let again = then(vec![Ok(Event::Delete(set(false))), Ok(Event::Apply(set(false)))]);
        assert_eq!(watched(again).await, Watched::There);
    }

    /// C79: reports are taken away when it goes, not when its pods stay for another.
    #[tokio::test]
    async fn pods_that_outlive_their_daemonset_are_not_about_to_end() {
        let ending = async |sets: Vec<Option<PartialObjectMeta<DaemonSet>>>| {
            let presence = Presence::default();
            sets.iter().for_each(|set| presence.see(set.as_ref()));
            presence.ending().await
        };
        let mut orphaning = set(true);
        orphaning.metadata.finalizers = Some(vec![ORPHANS.to_owned()]);
        assert!(!ending(vec![Some(set(false))]).await);
        assert!(ending(vec![Some(set(false)), None]).await);
        assert!(ending(vec![Some(set(true))]).await);
        assert!(!ending(vec![Some(orphaning.clone()), Some(set(true)), None]).await);
        assert!(ending(vec![Some(orphaning), None, Some(set(false)), None]).await);
    }

    /// C79.
    #[test]
    fn a_daemonset_has_a_place_where_selector_and_affinity_match() {
        let labels: BTreeMap<String, String> = [("os", "linux"), ("zone", "a"), ("cores", "8")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into();
        let requirement = |key: &str, operator: &str, values: &[&str]| json!({"key": key, "operator": operator, "values": values});
        let place = |selector: Value, terms: Option<Vec<Value>>| {
            let affinity = terms.map(|it| json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": it}}}));
            let set: DaemonSet = serde_json::from_value(json!({"metadata": {}, "spec": {"selector": {},
                "template": {"spec": {"containers": [], "nodeSelector": selector, "affinity": affinity}}}}))
            .unwrap();
            has_place(&set, "n", &labels)
        };
        let expressions = |it: &[Value]| Some(vec![json!({"matchExpressions": it})]);
        assert!(place(json!({}), None) && place(json!({"os": "linux"}), None));
        assert!(!place(json!({"os": "linux", "mesh": "yes"}), None));
        for (key, operator, values, expected) in [
            ("zone", "In", &["a", "b"][..], true),
            ("zone", "In", &["b"], false),
            ("zone", "NotIn", &["a"], false),
            ("other", "NotIn", &["a"], true),
            ("zone", "Exists", &[], true),
            ("other", "Exists", &[], false),
            ("other", "DoesNotExist", &[], true),
            ("cores", "Gt", &["7"], true),
            ("cores", "Lt", &["8"], false),
            ("zone", "Gt", &["1"], false),
            ("zone", "Like", &["z"], true),
        ] {
            assert_eq!(
                place(json!({}), expressions(&[requirement(key, operator, values)])),
                expected,
                "{key} {operator} {values:?}"
            );
        }
        let both = [requirement("zone", "In", &["a"]), requirement("zone", "In", &["b"])];
        assert!(!place(json!({}), expressions(&both)));
        let either = both.iter().map(|it| json!({"matchExpressions": [it]})).collect();
        assert!(place(json!({}), Some(either)));
        assert!(!place(json!({}), Some(vec![json!({})])) && !place(json!({}), Some(vec![])));
        let named =
            |name: &str| Some(vec![json!({"matchFields": [requirement("metadata.name", "In", &[name])]})]);
        assert!(place(json!({}), named("n")) && !place(json!({}), named("m")));
    }

    /// C79.
    #[test]
    fn only_a_token_that_has_not_expired_says_that_its_account_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        assert!(!is_current(&path, now));
        for (claims, expected) in [
            (r#"{"exp":1001}"#, true),
            (r#"{"exp":1000}"#, false),
            (r#"{"exp":"late"}"#, false),
            ("{}", false),
            ("", false),
        ] {
            fs::write(&path, format!("e30.{}.c2ln\n", URL_SAFE_NO_PAD.encode(claims))).unwrap();
            assert_eq!(is_current(&path, now), expected, "{claims}");
        }
        fs::write(&path, "no token").unwrap();
        assert!(!is_current(&path, now));
    }
}
