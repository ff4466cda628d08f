//! The keeper beside the API server: what it is told of, and what it does there. While this replica leads.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::gateway::{Gateway, GatewayClass};
use culvert_k8s_api::labels;
use culvert_k8s_api::manifest::Manifest;
use culvert_k8s_api::{Kind, Object, ObjectKey};
use culvert_runtime::drain::DrainWatcher;
use imbl::OrdMap;
use kube::Client;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_stream::{Stream, StreamExt, StreamMap};

use super::keeper::{Found, Keeper, Name, Provisioned, Todo, Wished};
use super::observed::{ObjectRef, Observed};
use super::overlay::{self, Overlays, PARTS, Part};
use super::render::Settings;
use crate::gateways::{self, Owner};
use crate::index::Snapshot;

/// Field manager of everything that is made. For ever: another would not take away what this one wrote.
const MANAGER: &str = "culvert-provision";
/// One request.
const PATIENCE: Duration = Duration::from_secs(5);
/// Objects in a page of a list.
const PAGE: u32 = 200;

/// What is provisioned, beside what it was made for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// By Gateway.
    pub gateways: BTreeMap<Name, Provisioned>,
}

/// What provisioning runs with.
pub struct Provisioner {
    /// The API server.
    pub client: Client,
    /// Whose ConfigMaps are for a whole class.
    pub namespace: String,
    /// Istio's class is ours too.
    pub compat: bool,
    /// What waypoints are told.
    pub settings: Settings,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Watched {
    Part(Part),
    Defaults,
    Map(Name),
}

type Events = Pin<Box<dyn Stream<Item = watcher::Result<Event<DynamicObject>>> + Send>>;

/// Provisions whenever this replica leads, until `drain` starts. What is there is said to `state`.
pub async fn run(
    provisioner: Provisioner,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut leading: watch::Receiver<bool>,
    state: watch::Sender<State>,
    drain: DrainWatcher,
) {
    loop {
        tokio::select! {
            _ = drain.started() => return,
            leads = becomes(&mut leading, true) => if !leads { return },
        }
        let term = Term::new(&provisioner);
        tokio::select! {
            _ = drain.started() => return,
            () = term.lead(&mut snapshots, leading.clone(), &state) => {}
        }
    }
}

/// Waits; false if nobody decides that any more.
async fn becomes(leading: &mut watch::Receiver<bool>, wanted: bool) -> bool {
    leading.wait_for(|leads| *leads == wanted).await.is_ok()
}

/// One time of leading: nothing of it is known in the next.
struct Term<'a> {
    provisioner: &'a Provisioner,
    keeper: Keeper,
    streams: StreamMap<Watched, Events>,
    /// Lists that are not whole yet.
    lists: BTreeMap<Watched, Vec<DynamicObject>>,
    /// By name of the ConfigMap: its class and what it holds.
    defaults: BTreeMap<String, (String, Result<Overlays, String>)>,
    /// Of what the keeper was told last: it is told again when this differs.
    gateways: Vec<Arc<Manifest>>,
    stale: bool,
}

impl<'a> Term<'a> {
    fn new(provisioner: &'a Provisioner) -> Self {
        let mut streams = StreamMap::new();
        let mine = format!("{}={}", labels::GATEWAY_MANAGED, gateways::MANAGED);
        for part in PARTS {
            let api = Api::all_with(provisioner.client.clone(), &resource(part));
            streams.insert(Watched::Part(part), events(api, watcher::Config::default().labels(&mine)));
        }
        let api = Api::namespaced_with(provisioner.client.clone(), &provisioner.namespace, &maps());
        let of_classes = watcher::Config::default().labels(labels::DEFAULTS_FOR_CLASS);
        streams.insert(Watched::Defaults, events(api, of_classes));
        Self {
            provisioner,
            keeper: Keeper::new(provisioner.settings.clone()),
            streams,
            lists: BTreeMap::new(),
            defaults: BTreeMap::new(),
            gateways: Vec::new(),
            stale: true,
        }
    }

    async fn lead(
        mut self,
        snapshots: &mut watch::Receiver<Arc<Snapshot>>,
        mut leading: watch::Receiver<bool>,
        state: &watch::Sender<State>,
    ) {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            self.look(&snapshot.world.objects);
            let now = Instant::now();
            let todo = self.keeper.todo(now);
            let next = State { gateways: self.keeper.progress() };
            state.send_if_modified(|state| {
                let differs = *state != next;
                *state = next;
                differs
            });
            let again = self.keeper.next(now);
            tokio::select! {
                biased;
                // The right to write goes first.
                _ = becomes(&mut leading, false) => return,
                // Everything that is known already comes before a write.
                Some((watched, event)) = self.streams.next() => self.take(watched, event),
                Ok(()) = snapshots.changed() => {}
                () = std::future::ready(()), if todo.is_some() => if let Some(todo) = todo { self.perform(todo).await },
                () = sleep_until(again.unwrap_or(now)), if again.is_some() => {}
                else => return,
            }
        }
    }

    /// Tells the keeper of Gateways and classes, if they are others than before or a ConfigMap is.
    fn look(&mut self, objects: &OrdMap<ObjectKey, Arc<Manifest>>) {
        let now: Vec<Arc<Manifest>> = [Kind::Gateway, Kind::GatewayClass]
            .into_iter()
            .flat_map(|kind| of_kind(objects, kind).cloned())
            .collect();
        let same = now.len() == self.gateways.len()
            && now.iter().zip(&self.gateways).all(|(a, b)| Arc::ptr_eq(a, b));
        if same && !self.stale {
            return;
        }
        self.gateways = now;
        self.stale = false;
        let manifests = self.gateways.clone();
        let wished = wished(&manifests, self.provisioner.compat);
        let referred = Keeper::referred(&wished);
        let gone: Vec<Watched> = self
            .streams
            .keys()
            .filter(|it| matches!(it, Watched::Map((namespace, name)) if !referred.contains(&(namespace.as_str(), name.as_str()))))
            .cloned()
            .collect();
        for watched in gone {
            self.streams.remove(&watched);
            self.lists.remove(&watched);
        }
        for (namespace, name) in referred {
            let watched = Watched::Map((namespace.to_owned(), name.to_owned()));
            if !self.streams.contains_key(&watched) {
                let api = Api::namespaced_with(self.provisioner.client.clone(), namespace, &maps());
                let one = watcher::Config::default().fields(&format!("metadata.name={name}"));
                self.streams.insert(watched, events(api, one));
            }
        }
        self.keeper.wish(&wished);
    }

    fn take(&mut self, watched: Watched, event: watcher::Result<Event<DynamicObject>>) {
        match event {
            Err(error) => tracing::warn!(?watched, %error, "watching is interrupted; what is known stays"),
            Ok(Event::Init) => drop(self.lists.insert(watched, Vec::new())),
            Ok(Event::InitApply(object)) => self.lists.entry(watched).or_default().push(object),
            Ok(Event::InitDone) => {
                let list = self.lists.remove(&watched).unwrap_or_default();
                self.whole(watched, list);
            }
            Ok(Event::Apply(object)) => self.one(watched, object, true),
            Ok(Event::Delete(object)) => self.one(watched, object, false),
        }
    }

    fn whole(&mut self, watched: Watched, list: Vec<DynamicObject>) {
        match watched {
            Watched::Part(part) => {
                let all = list.into_iter().map(|object| (reference(part, &object), observed(object)));
                self.keeper.listed(part, all.collect());
            }
            Watched::Map(name) => {
                self.keeper.map(name, list.first().map(overlays));
                self.stale = true;
            }
            Watched::Defaults => {
                self.defaults = list.iter().map(|map| (name_of(map), of_class(map))).collect();
                self.of_classes();
            }
        }
    }

    fn one(&mut self, watched: Watched, object: DynamicObject, there: bool) {
        match watched {
            Watched::Part(part) => {
                self.keeper.seen(reference(part, &object), there.then(|| observed(object)));
            }
            Watched::Map(name) => {
                self.keeper.map(name, there.then(|| overlays(&object)));
                self.stale = true;
            }
            Watched::Defaults => {
                self.defaults.remove(&name_of(&object));
                if there {
                    self.defaults.insert(name_of(&object), of_class(&object));
                }
                self.of_classes();
            }
        }
    }

    fn of_classes(&mut self) {
        let mut by_class: BTreeMap<String, Result<Overlays, String>> = BTreeMap::new();
        for (name, (class, overlays)) in &self.defaults {
            let overlays = overlays.clone().map_err(|error| format!("ConfigMap {name}: {error}"));
            let entry = by_class.entry(class.clone());
            entry
                .and_modify(|it| *it = Err(format!("ConfigMap {name} is not the only one for class {class}")))
                .or_insert(overlays);
        }
        self.keeper.defaults(by_class);
        self.stale = true;
    }

    async fn perform(&mut self, todo: Todo) {
        let client = &self.provisioner.client;
        match todo {
            Todo::Apply { gateway, object, body, unseen } => {
                let found = if unseen { get(client, &object).await } else { Ok(self.keeper.found(&object)) };
                let found = match found {
                    Ok(found) => found,
                    Err(error) => return self.fail(gateway, &object, error, false),
                };
                let way = found.and_then(|it| self.keeper.in_the_way(&gateway, &object, &it));
                if let Some(way) = way {
                    return self.fail(gateway, &object, way, true);
                }
                match apply(client, &object, &body).await {
                    Ok(is) => {
                        tracing::info!(gateway = shown(&gateway), object = object.part.kind(), "written");
                        self.keeper.applied(&gateway, object, &body, is);
                    }
                    Err(error) => self.fail(gateway, &object, error, false),
                }
            }
            Todo::Delete { gateway, object, uid } => match delete(client, &object, uid).await {
                Ok(()) => {
                    tracing::info!(gateway = shown(&gateway), object = object.part.kind(), "deleted");
                    self.keeper.deleted(&gateway, &object);
                }
                Err(error) => self.fail(gateway, &object, error, false),
            },
        }
    }

    fn fail(&mut self, gateway: Name, object: &ObjectRef, error: String, for_long: bool) {
        tracing::warn!(
            gateway = shown(&gateway),
            object = object.part.kind(),
            error,
            "cannot be provisioned"
        );
        self.keeper.failed(gateway, error, for_long, Instant::now());
    }
}

fn api(client: &Client, object: &ObjectRef) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), &object.namespace, &resource(object.part))
}

async fn get(client: &Client, object: &ObjectRef) -> Result<Option<Found>, String> {
    let there = within(api(client, object).get_opt(&object.name)).await?;
    Ok(there.map(|it| {
        let managed = it.metadata.labels.as_ref().and_then(|labels| labels.get(labels::GATEWAY_MANAGED));
        let labelled = managed.is_some_and(|it| it == gateways::MANAGED);
        Found { labelled, observed: observed(it) }
    }))
}

async fn apply(client: &Client, object: &ObjectRef, body: &Map<String, Value>) -> Result<Observed, String> {
    let params = PatchParams::apply(MANAGER).force();
    let api = api(client, object);
    let is = within(api.patch(&object.name, &params, &Patch::Apply(body))).await;
    Ok(observed(is.map_err(|error| format!("{}: {error}", object.part.kind()))?))
}

async fn delete(client: &Client, object: &ObjectRef, uid: String) -> Result<(), String> {
    let preconditions = Some(Preconditions { uid: Some(uid), resource_version: None });
    let params = DeleteParams { preconditions, ..DeleteParams::background() };
    match timeout(PATIENCE, api(client, object).delete(&object.name, &params)).await {
        Ok(Ok(_)) => Ok(()),
        // Gone, or another one of the name by now.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

async fn within<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match timeout(PATIENCE, request).await {
        Ok(Ok(it)) => Ok(it),
        Ok(Err(kube::Error::Api(status))) => Err(status.message.clone()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("no answer in time".to_owned()),
    }
}

/// The Gateways among manifests, each with whose its class is.
pub fn wished(manifests: &[Arc<Manifest>], compat: bool) -> Wished<'_> {
    let mut classes: BTreeMap<&str, &GatewayClass> = BTreeMap::new();
    let mut gateways: Vec<&Gateway> = Vec::new();
    for manifest in manifests {
        match &manifest.object {
            Object::Gateway(gateway) => gateways.push(gateway),
            Object::GatewayClass(class) => drop(classes.insert(&class.metadata.name, class)),
            _ => {}
        }
    }
    let owner = |gateway: &Gateway| -> Owner {
        let name = gateway.spec.gateway_class_name.as_str();
        gateways::owner(name, classes.get(name).copied(), compat)
    };
    gateways.into_iter().map(|gateway| (gateway, owner(gateway))).collect()
}

/// The objects of a kind.
pub fn of_kind(
    objects: &OrdMap<ObjectKey, Arc<Manifest>>,
    kind: Kind,
) -> impl Iterator<Item = &Arc<Manifest>> {
    let first = ObjectKey { kind, namespace: String::new(), name: String::new() };
    objects.range(first..).take_while(move |(key, _)| key.kind == kind).map(|(_, manifest)| manifest)
}

fn events(api: Api<DynamicObject>, config: watcher::Config) -> Events {
    Box::pin(watcher(api, config.page_size(PAGE)).default_backoff())
}

fn resource(part: Part) -> ApiResource {
    let (group, version) = part.api_version().split_once('/').unwrap_or(("", part.api_version()));
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, part.kind()), part.plural())
}

fn maps() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", "ConfigMap"), "configmaps")
}

fn name_of(object: &DynamicObject) -> String {
    object.metadata.name.clone().unwrap_or_default()
}

fn reference(part: Part, object: &DynamicObject) -> ObjectRef {
    let namespace = object.metadata.namespace.clone().unwrap_or_default();
    ObjectRef { part, namespace, name: name_of(object) }
}

/// Without kind and version, which objects in a list do not have.
fn observed(object: DynamicObject) -> Observed {
    let mut all = object.data;
    all["metadata"] = serde_json::to_value(&object.metadata).unwrap_or_default();
    Observed::of(&all)
}

fn overlays(map: &DynamicObject) -> Result<Overlays, String> {
    if map.data["binaryData"].as_object().is_some_and(|it| !it.is_empty()) {
        return Err("has binaryData, which is not read".to_owned());
    }
    let data: BTreeMap<String, String> = serde_json::from_value(map.data["data"].clone()).unwrap_or_default();
    overlay::read(&data)
}

fn of_class(map: &DynamicObject) -> (String, Result<Overlays, String>) {
    let class = map.metadata.labels.as_ref().and_then(|labels| labels.get(labels::DEFAULTS_FOR_CLASS));
    (class.cloned().unwrap_or_default(), overlays(map))
}

fn shown((namespace, name): &Name) -> String {
    format!("{namespace}/{name}")
}
