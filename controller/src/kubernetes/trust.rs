//! The mesh's roots handed out: ConfigMap `istio-ca-root-cert` in every namespace (D54), and the webhook's configuration.
//!
//! Every replica watches; the leader writes what is not as it should be, whoever changed it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use culvert_runtime::drain::DrainWatcher;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use kube::ResourceExt;
use kube::api::{Api, PartialObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::{Stream, StreamExt};

use crate::ca::Authority;

/// The ConfigMap's name.
pub const NAME: &str = "istio-ca-root-cert";
/// Its key.
pub const KEY: &str = "root-cert.pem";
/// The webhook's configuration, of which `caBundle` and `failurePolicy` are kept.
pub const WEBHOOK: &str = "culvert-validator";
/// After a write that failed.
const RETRY: Duration = Duration::from_secs(5);
/// One write.
const PATIENCE: Duration = Duration::from_secs(5);

/// What of it is to be watched and written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// All namespaces that are not being deleted; what was known before is forgotten.
    Namespaces(BTreeSet<String>),
    /// One namespace is there, or not any more.
    Namespace(String, bool),
    /// All ConfigMaps of the name, by namespace; what was known before is forgotten.
    Maps(BTreeMap<String, String>),
    /// What one holds, if it exists.
    Map(String, Option<String>),
}

/// Which namespaces have what.
#[derive(Debug, Default)]
pub struct Bundles {
    namespaces: Option<BTreeSet<String>>,
    /// The text of each, shared where it is the same: one pointer a namespace.
    maps: Option<BTreeMap<String, Arc<str>>>,
}

impl Bundles {
    /// Takes in what was seen.
    pub fn seen(&mut self, seen: Seen) {
        match seen {
            Seen::Namespaces(all) => self.namespaces = Some(all),
            Seen::Namespace(name, true) => drop(self.namespaces.get_or_insert_default().insert(name)),
            Seen::Namespace(name, false) => drop(self.namespaces.get_or_insert_default().remove(&name)),
            Seen::Maps(all) => {
                self.maps = Some(BTreeMap::new());
                for (namespace, text) in all {
                    self.holds(namespace, Some(&text));
                }
            }
            Seen::Map(namespace, text) => self.holds(namespace, text.as_deref()),
        }
    }

    /// Namespaces whose ConfigMap does not hold `pem`. None before everything was listed once.
    pub fn wrong(&self, pem: &str) -> Vec<String> {
        let (Some(namespaces), Some(maps)) = (&self.namespaces, &self.maps) else { return Vec::new() };
        namespaces.iter().filter(|name| maps.get(*name).is_none_or(|text| **text != *pem)).cloned().collect()
    }

    fn holds(&mut self, namespace: String, text: Option<&str>) {
        let maps = self.maps.get_or_insert_default();
        match text {
            None => drop(maps.remove(&namespace)),
            Some(text) => {
                let same = maps.values().next().filter(|other| ***other == *text).cloned();
                maps.insert(namespace, same.unwrap_or_else(|| Arc::from(text)));
            }
        }
    }
}

/// Keeps the ConfigMaps, until `drain` starts.
pub async fn keep_bundles(
    client: kube::Client,
    authority: Arc<Authority>,
    mut leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let mut events = std::pin::pin!(namespaces(client.clone()).merge(maps(client.clone())));
    let (mut bundles, mut generation) = (Bundles::default(), authority.generation());
    let mut next = Instant::now();
    loop {
        let leads = *leading.borrow_and_update();
        generation.borrow_and_update();
        let pem = authority.root_pem();
        let wrong = if leads { bundles.wrong(&pem) } else { Vec::new() };
        tokio::select! {
            biased;
            _ = drain.started() => return,
            // Everything that is known already comes before a write.
            Some(seen) = events.next() => bundles.seen(seen),
            Ok(()) = leading.changed() => {}
            Ok(()) = generation.changed() => {}
            () = sleep_until(next), if !wrong.is_empty() => {
                let mut failed = 0;
                for namespace in wrong {
                    if !*leading.borrow() {
                        break;
                    }
                    match write(&client, &namespace, &pem).await {
                        Ok(()) => bundles.seen(Seen::Map(namespace, Some(pem.clone()))),
                        Err(error) => {
                            failed += 1;
                            tracing::warn!(namespace, error, "cannot write ConfigMap {NAME}");
                        }
                    }
                }
                next = Instant::now() + if failed > 0 { RETRY } else { Duration::ZERO };
            }
        }
    }
}

async fn write(client: &kube::Client, namespace: &str, pem: &str) -> Result<(), String> {
    let api: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let wanted = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": NAME, "labels": { "app.kubernetes.io/part-of": "culvert" } },
        "data": { KEY: pem },
    });
    let params = PatchParams::apply("culvert").force();
    let patch = Patch::Apply(&wanted);
    match timeout(PATIENCE, api.patch(NAME, &params, &patch)).await {
        Ok(Ok(_)) => Ok(()),
        // The namespace goes: nobody needs it there.
        Ok(Err(kube::Error::Api(status)))
            if status.code == 404 || status.message.contains("being terminated") =>
        {
            Ok(())
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

fn namespaces(client: kube::Client) -> impl Stream<Item = Seen> + Send {
    let events = watcher(Api::<PartialObjectMeta<Namespace>>::all(client), watcher::Config::default())
        .default_backoff();
    let mut listed = BTreeSet::new();
    events.filter_map(move |event| match event {
        Ok(Event::Init) => {
            listed.clear();
            None
        }
        Ok(Event::InitApply(it)) => {
            if it.metadata.deletion_timestamp.is_none() {
                listed.insert(it.name_any());
            }
            None
        }
        Ok(Event::InitDone) => Some(Seen::Namespaces(std::mem::take(&mut listed))),
        Ok(Event::Apply(it)) => {
            let there = it.metadata.deletion_timestamp.is_none();
            Some(Seen::Namespace(it.name_any(), there))
        }
        Ok(Event::Delete(it)) => Some(Seen::Namespace(it.name_any(), false)),
        Err(error) => {
            tracing::warn!(%error, "namespaces cannot be watched");
            None
        }
    })
}

fn maps(client: kube::Client) -> impl Stream<Item = Seen> + Send {
    let one = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
    let events = watcher(Api::<ConfigMap>::all(client), one).default_backoff();
    let text =
        |map: &ConfigMap| map.data.as_ref().and_then(|data| data.get(KEY)).cloned().unwrap_or_default();
    let mut listed = BTreeMap::new();
    events.filter_map(move |event| match event {
        Ok(Event::Init) => {
            listed.clear();
            None
        }
        Ok(Event::InitApply(it)) => {
            listed.insert(it.namespace().unwrap_or_default(), text(&it));
            None
        }
        Ok(Event::InitDone) => Some(Seen::Maps(std::mem::take(&mut listed))),
        Ok(Event::Apply(it)) => Some(Seen::Map(it.namespace().unwrap_or_default(), Some(text(&it)))),
        Ok(Event::Delete(it)) => Some(Seen::Map(it.namespace().unwrap_or_default(), None)),
        Err(error) => {
            tracing::warn!(%error, "ConfigMaps {NAME} cannot be watched");
            None
        }
    })
}

/// Keeps the roots in the webhook's configuration, if there is one, until `drain` starts, and once the API server was `heard` by
/// the webhook, makes it demand an answer (D66).
pub async fn keep_webhook(
    client: kube::Client,
    authority: Arc<Authority>,
    mut heard: watch::Receiver<bool>,
    mut leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let api: Api<ValidatingWebhookConfiguration> = Api::all(client);
    let one = watcher::Config::default().fields(&format!("metadata.name={WEBHOOK}"));
    let mut events = std::pin::pin!(watcher(api.clone(), one).default_backoff());
    let (mut generation, mut current) = (authority.generation(), None);
    let mut next = Instant::now();
    loop {
        let leads = *leading.borrow_and_update();
        generation.borrow_and_update();
        let pem = authority.root_pem();
        let demand = *heard.borrow_and_update();
        let wanted = current.as_ref().and_then(|it| corrected(it, &pem, demand)).filter(|_| leads);
        tokio::select! {
            biased;
            _ = drain.started() => return,
            Some(event) = events.next() => match event {
                Ok(Event::Apply(it) | Event::InitApply(it)) => current = Some(it),
                Ok(Event::Delete(_) | Event::Init) => current = None,
                Ok(Event::InitDone) => {}
                Err(error) => tracing::warn!(%error, "the webhook's configuration cannot be watched"),
            },
            Ok(()) = leading.changed() => {}
            Ok(()) = generation.changed() => {}
            Ok(()) = heard.changed() => {}
            () = sleep_until(next), if wanted.is_some() => {
                next = Instant::now() + RETRY;
                if let Some(wanted) = wanted {
                    let params = PostParams { field_manager: Some("culvert".into()), ..PostParams::default() };
                    match timeout(PATIENCE, api.replace(WEBHOOK, &params, &wanted)).await {
                        Ok(Ok(written)) => current = Some(written),
                        Ok(Err(error)) => tracing::warn!(%error, "cannot write the webhook's configuration"),
                        Err(_) => tracing::warn!("cannot write the webhook's configuration: no answer in time"),
                    }
                }
            }
        }
    }
}

/// The configuration with our roots in every webhook, and the answer demanded if `demand`; none if it is so. What was demanded once
/// stays: a new leader that has not heard the API server yet says nothing against the one before.
fn corrected(
    current: &ValidatingWebhookConfiguration,
    pem: &str,
    demand: bool,
) -> Option<ValidatingWebhookConfiguration> {
    let bundle = ByteString(pem.as_bytes().to_vec());
    let mut wanted = current.clone();
    for webhook in wanted.webhooks.iter_mut().flatten() {
        webhook.client_config.ca_bundle = Some(bundle.clone());
        if demand {
            webhook.failure_policy = Some("Fail".to_owned());
        }
    }
    (wanted != *current).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::admissionregistration::v1::ValidatingWebhook;

    use super::*;

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// D54.
    #[test]
    fn every_namespace_that_lacks_the_roots_is_to_be_written() {
        let mut bundles = Bundles::default();
        bundles.seen(Seen::Namespaces(names(&["a", "b", "c"])));
        assert!(bundles.wrong("pem").is_empty(), "nothing is written before what is there was listed");
        let maps = [("a", "pem"), ("b", "edited"), ("gone", "pem")];
        let maps = maps.map(|(name, text)| (name.to_owned(), text.to_owned()));
        bundles.seen(Seen::Maps(maps.into()));
        assert_eq!(bundles.wrong("pem"), ["b", "c"]);
        for namespace in ["b", "c"] {
            bundles.seen(Seen::Map(namespace.to_owned(), Some("pem".to_owned())));
        }
        assert!(bundles.wrong("pem").is_empty());
        // Deleted by hand; a new namespace; one that goes; a new root; a list after a gap in the watch.
        bundles.seen(Seen::Map("a".to_owned(), None));
        assert_eq!(bundles.wrong("pem"), ["a"]);
        bundles.seen(Seen::Namespace("d".to_owned(), true));
        bundles.seen(Seen::Namespace("a".to_owned(), false));
        assert_eq!(bundles.wrong("pem"), ["d"]);
        assert_eq!(bundles.wrong("other"), ["b", "c", "d"]);
        bundles.seen(Seen::Namespaces(names(&["d"])));
        bundles.seen(Seen::Maps(BTreeMap::new()));
        assert_eq!(bundles.wrong("pem"), ["d"]);
    }

    #[test]
    fn a_webhook_has_the_roots_of_now() {
        let webhook = ValidatingWebhook { name: "x".to_owned(), ..ValidatingWebhook::default() };
        let mut configuration = ValidatingWebhookConfiguration::default();
        assert!(corrected(&configuration, "pem", true).is_none());
        configuration.webhooks = Some(vec![webhook.clone(), webhook]);
        let written = corrected(&configuration, "pem", false).unwrap();
        assert!(corrected(&written, "pem", false).is_none());
        assert!(corrected(&written, "other", false).is_some());
    }

    /// D66: at first an answer is not demanded; it is once the API server was heard, and stays so.
    #[test]
    fn an_answer_is_demanded_once_the_api_server_was_heard() {
        let webhook = ValidatingWebhook {
            name: "x".to_owned(),
            failure_policy: Some("Ignore".to_owned()),
            ..ValidatingWebhook::default()
        };
        let configuration =
            ValidatingWebhookConfiguration { webhooks: Some(vec![webhook]), ..Default::default() };
        let policy =
            |it: &ValidatingWebhookConfiguration| it.webhooks.as_ref().unwrap()[0].failure_policy.clone();
        let unheard = corrected(&configuration, "pem", false).unwrap();
        assert_eq!(policy(&unheard).as_deref(), Some("Ignore"));
        let heard = corrected(&unheard, "pem", true).unwrap();
        assert_eq!(policy(&heard).as_deref(), Some("Fail"));
        assert!(corrected(&heard, "pem", true).is_none() && corrected(&heard, "pem", false).is_none());
    }
}
