//! What is there: a watch of each kind, from the moment this replica leads.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use culvert_runtime::tasks::{Task, Tasks};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::FieldsV1;
use kube::Client;
use kube::api::{Api, DynamicObject};
use kube::core::{ApiResource, GroupVersionKind, ObjectMeta};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::{Map, Value};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::StreamExt;

use super::StatusKind;
use super::engine::{Name, Object, Said};

/// How often it is looked whether a kind is defined that was not, or cannot be asked for.
const DISCOVER: Duration = Duration::from_secs(20);
/// Messages between watches and writer: at about 2 KB each, 512 KB. A watch waits while it is full.
const MESSAGES: usize = 256;
/// Objects in a page of a list: with 10 KB of JSON each, 2 MB for each kind.
const PAGE: u32 = 200;

/// What watches say.
pub(super) type Message = (StatusKind, Said);

/// Where watches come from.
pub(super) trait Watches: Send + Sync {
    /// Watches these kinds of these managers' fields until the result is dropped.
    fn begin(&self, kinds: &BTreeSet<StatusKind>, managers: &[&'static str]) -> Watching;
}

/// Running watches; dropped, they end.
pub(super) struct Watching {
    pub messages: mpsc::Receiver<Message>,
    pub tasks: Vec<Task>,
}

/// Of the API server.
pub(super) struct Follow {
    pub client: Client,
    pub tasks: Tasks,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.tasks.iter().for_each(Task::abort);
    }
}

impl Watches for Follow {
    fn begin(&self, kinds: &BTreeSet<StatusKind>, managers: &[&'static str]) -> Watching {
        let (sender, messages) = mpsc::channel(MESSAGES);
        let watch = |kind: &StatusKind| {
            let watch = follow(self.client.clone(), *kind, managers.to_vec(), sender.clone());
            self.tasks.spawn("status watch", watch)
        };
        let tasks = kinds.iter().map(watch).collect();
        Watching { messages, tasks }
    }
}

/// Watches one kind, as long as it is defined, and again once it is.
async fn follow(
    client: Client,
    kind: StatusKind,
    managers: Vec<&'static str>,
    sender: mpsc::Sender<Message>,
) {
    loop {
        match served(&client, &kind).await {
            Ok(Some(version)) => {
                if sender.send((kind, Said::Served(version))).await.is_err() {
                    return;
                }
                if watch(&client, &kind, version, &managers, &sender).await.is_err()
                    || sender.send((kind, Said::Gone)).await.is_err()
                {
                    return;
                }
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(kind = kind.plural, %error, "cannot ask whether it has a status"),
        }
        sleep(DISCOVER).await;
    }
}

/// The version in which the kind has a status.
async fn served(client: &Client, kind: &StatusKind) -> Result<Option<&'static str>, kube::Error> {
    if kind.group.is_empty() {
        return Ok(kind.versions.first().copied());
    }
    let groups = client.list_api_groups().await?.groups;
    let Some(group) = groups.iter().find(|group| group.name == kind.group) else { return Ok(None) };
    let status = format!("{}/status", kind.plural);
    for version in kind.versions {
        if group.versions.iter().any(|it| it.version == *version) {
            let name = format!("{}/{version}", kind.group);
            let resources = client.list_api_group_resources(&name).await?.resources;
            if resources.iter().any(|it| it.name == status) {
                return Ok(Some(version));
            }
        }
    }
    Ok(None)
}

/// Ends well when the kind is not defined any more, and with an error when nobody listens.
async fn watch(
    client: &Client,
    kind: &StatusKind,
    version: &str,
    managers: &[&'static str],
    sender: &mpsc::Sender<Message>,
) -> Result<(), mpsc::error::SendError<Message>> {
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource(kind, version));
    let config = watcher::Config::default().page_size(PAGE);
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    while let Some(event) = events.next().await {
        let said = match event {
            Ok(Event::Init) => Said::Init,
            Ok(Event::InitDone) => Said::Done,
            Ok(Event::InitApply(it)) => Said::Listed(name(&it.metadata), Box::new(seen(it, managers))),
            Ok(Event::Apply(it)) => Said::Applied(name(&it.metadata), Box::new(seen(it, managers))),
            Ok(Event::Delete(it)) => Said::Deleted(name(&it.metadata)),
            Err(error) => {
                if undefined(&error) {
                    return Ok(());
                }
                tracing::warn!(kind = kind.plural, %error, "its status cannot be watched; nothing is written meanwhile");
                continue;
            }
        };
        sender.send((*kind, said)).await?;
    }
    Ok(())
}

fn undefined(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => status.code == 404,
        _ => false,
    }
}

/// For the client.
pub(super) fn resource(kind: &StatusKind, version: &str) -> ApiResource {
    let it = GroupVersionKind::gvk(kind.group, version, kind.kind);
    ApiResource::from_gvk_with_plural(&it, kind.plural)
}

fn name(meta: &ObjectMeta) -> Name {
    (meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

/// What is kept of an object.
pub(super) fn seen(mut object: DynamicObject, managers: &[&'static str]) -> Object {
    let (mut owned, mut whole) = (BTreeMap::new(), false);
    for entry in object.metadata.managed_fields.into_iter().flatten() {
        if let Some(FieldsV1(fields)) = &entry.fields_v1 {
            whole |= fields["f:status"]["f:conditions"].as_object().is_some_and(Map::is_empty);
        }
        let manager = managers.iter().find(|it| entry.manager.as_deref() == Some(**it));
        if let (Some(manager), Some("Apply"), Some("status"), Some(fields)) =
            (manager, entry.operation.as_deref(), entry.subresource.as_deref(), entry.fields_v1)
        {
            owned.insert(*manager, fields.0.get("f:status").cloned().unwrap_or_default());
        }
    }
    Object {
        uid: object.metadata.uid.unwrap_or_default(),
        generation: object.metadata.generation,
        version: object.metadata.resource_version.unwrap_or_default(),
        status: object.data.get_mut("status").map(Value::take).unwrap_or_default(),
        owned,
        whole,
    }
}
