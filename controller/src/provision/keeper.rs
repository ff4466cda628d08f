//! What is to be made, changed and deleted, one thing after another: pure, from what is wanted and what is there.
//!
//! What is wanted is rendered from Gateways and ConfigMaps. Something is written if it is not there, if something else is wanted than
//! was written last, or if it changed since (somebody edited it); once after each of these, since most changes are not about
//! fields of ours. Nothing is touched that does not have our label, and nothing is deleted whose Gateway is not known.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use culvert_k8s_api::gateway::{Gateway, ParametersRef};
use culvert_k8s_api::labels;
use serde_json::{Map, Value};
use tokio::time::Instant;

use super::observed::{ObjectRef, Observed, hash};
use super::overlay::{Overlays, PARTS, Part};
use super::render::{Invalid, Settings, render};
use crate::gateways::{self, Owner};

/// `(namespace, name)`.
pub type Name = (String, String);

/// After a write that failed, doubled with each further one.
const RETRY: Duration = Duration::from_secs(2);
/// At most. Also after something was found that is not ours.
const LONGEST: Duration = Duration::from_secs(60);
/// ConfigMaps that are watched at once, one stream each.
pub const MAX_MAPS: usize = 256;

/// How far a Gateway is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something is not known yet, or is being written.
    Pending,
    /// The Gateway or a ConfigMap asks for what cannot be; what was there stays.
    Invalid(Invalid),
    /// The API server refuses, or something that is not ours is in the way.
    Failed(String),
    /// Everything is there.
    Done,
}

/// What is there for a Gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provisioned {
    /// How far it is.
    pub progress: Progress,
    /// DNS name of its Service, if there is one.
    pub hostname: Option<String>,
    /// Addresses of its Service.
    pub addresses: Vec<IpAddr>,
    /// Instances that are ready.
    pub available: u64,
    /// What Kubernetes says of its Deployment, if none is.
    pub problem: String,
}

/// The next thing to do.
#[derive(Clone, Debug, PartialEq)]
pub enum Todo {
    /// Write it. With `unseen`, it must first be looked whether something else has its name.
    Apply {
        /// For which Gateway.
        gateway: Name,
        /// Which.
        object: ObjectRef,
        /// All of it that is ours.
        body: Map<String, Value>,
        /// It is not among what is known.
        unseen: bool,
    },
    /// Delete it, if it is still this one.
    Delete {
        /// For which Gateway.
        gateway: Name,
        /// Which.
        object: ObjectRef,
        /// Its uid.
        uid: String,
    },
}

/// Gateways with their class.
pub type Wished<'a> = Vec<(&'a Gateway, Owner)>;

/// The state.
#[derive(Debug)]
pub struct Keeper {
    settings: Settings,
    gateways: BTreeMap<Name, Want>,
    /// Lists that are whole.
    listed: BTreeSet<Part>,
    known: BTreeMap<ObjectRef, Observed>,
    applied: BTreeMap<ObjectRef, Applied>,
    failed: BTreeMap<Name, Failure>,
    maps: BTreeMap<Name, Option<Result<Overlays, String>>>,
    /// By class; `None` before they were listed.
    defaults: Option<BTreeMap<String, Result<Overlays, String>>>,
}

#[derive(Debug)]
struct Want {
    uid: String,
    class: String,
    owner: Owner,
    unmanaged: bool,
    objects: Objects,
}

#[derive(Debug)]
enum Objects {
    Pending,
    Invalid(Invalid),
    Rendered(Vec<(ObjectRef, Map<String, Value>, u64)>),
}

#[derive(Debug, PartialEq, Eq)]
struct Applied {
    wanted: u64,
    uid: String,
    seen: u64,
}

#[derive(Debug)]
struct Failure {
    message: String,
    after: Duration,
    again: Instant,
}

impl Keeper {
    /// Knows nothing yet.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            gateways: BTreeMap::new(),
            listed: BTreeSet::new(),
            known: BTreeMap::new(),
            applied: BTreeMap::new(),
            failed: BTreeMap::new(),
            maps: BTreeMap::new(),
            defaults: None,
        }
    }

    /// The ConfigMaps that these Gateways refer to, at most [`MAX_MAPS`].
    pub fn referred<'a>(wished: &Wished<'a>) -> BTreeSet<(&'a str, &'a str)> {
        let ours = wished.iter().filter(|(gateway, owner)| managed(gateway, *owner));
        let maps = ours.filter_map(|(gateway, _)| {
            let reference = parameters(gateway)?;
            is_map(reference).then_some((gateway.metadata.namespace.as_str(), reference.name.as_str()))
        });
        let all: BTreeSet<_> = maps.collect();
        all.into_iter().take(MAX_MAPS).collect()
    }

    /// All Gateways there are. ConfigMaps that none of them refers to are forgotten.
    pub fn wish(&mut self, wished: &Wished<'_>) {
        let referred = Self::referred(wished);
        self.maps.retain(|(namespace, name), _| referred.contains(&(namespace.as_str(), name.as_str())));
        let name = |gateway: &Gateway| (gateway.metadata.namespace.clone(), gateway.metadata.name.clone());
        self.gateways = wished
            .iter()
            .map(|(gateway, owner)| {
                let want = Want {
                    uid: gateway.metadata.uid.clone(),
                    class: gateway.spec.gateway_class_name.clone(),
                    owner: *owner,
                    unmanaged: gateways::has_own_addresses(gateway),
                    objects: self.objects_of(gateway, *owner, &referred),
                };
                (name(gateway), want)
            })
            .collect();
        let gateways = &self.gateways;
        self.failed.retain(|name, _| gateways.contains_key(name));
    }

    fn objects_of(&self, gateway: &Gateway, owner: Owner, referred: &BTreeSet<(&str, &str)>) -> Objects {
        if !managed(gateway, owner) {
            return Objects::Rendered(Vec::new());
        }
        let Some((_, port)) = gateways::hbone(gateway) else {
            return Objects::Invalid(Invalid {
                reason: "ListenersNotValid",
                message: "no listener has protocol HBONE, which a waypoint takes connections by".to_owned(),
            });
        };
        let mut overlays: Vec<&Overlays> = Vec::new();
        let Some(defaults) = &self.defaults else { return Objects::Pending };
        match defaults.get(&gateway.spec.gateway_class_name) {
            Some(Ok(of_class)) => overlays.push(of_class),
            Some(Err(error)) => {
                return Objects::Invalid(Invalid::parameters(format!("the overlays of the class: {error}")));
            }
            None => {}
        }
        if let Some(reference) = parameters(gateway) {
            if !is_map(reference) {
                let message = format!(
                    "infrastructure.parametersRef: {} {:?} is no ConfigMap",
                    reference.kind, reference.group
                );
                return Objects::Invalid(Invalid::parameters(message));
            }
            let namespace = gateway.metadata.namespace.as_str();
            if !referred.contains(&(namespace, reference.name.as_str())) {
                let message = format!("more than {MAX_MAPS} ConfigMaps are referred to");
                return Objects::Invalid(Invalid::parameters(message));
            }
            let invalid = |what: &str| {
                let message = format!("infrastructure.parametersRef: ConfigMap {}{what}", reference.name);
                Objects::Invalid(Invalid::parameters(message))
            };
            match self.maps.get(&(namespace.to_owned(), reference.name.clone())) {
                None => return Objects::Pending,
                Some(None) => return invalid(" does not exist"),
                Some(Some(Err(error))) => return invalid(&format!(": {error}")),
                Some(Some(Ok(own))) => overlays.push(own),
            }
        }
        match render(gateway, port, &overlays, &self.settings) {
            Err(error) => Objects::Invalid(error),
            Ok(rendered) => {
                let of = |it: super::render::Rendered| {
                    let text =
                        |field: &str| it.object["metadata"][field].as_str().unwrap_or_default().to_owned();
                    let object =
                        ObjectRef { part: it.part, namespace: text("namespace"), name: text("name") };
                    let hash = hash(&Value::Object(it.object.clone()));
                    (object, it.object, hash)
                };
                Objects::Rendered(rendered.into_iter().map(of).collect())
            }
        }
    }

    /// A list of a kind of object begins: nothing is done before it is whole.
    pub fn listing(&mut self, part: Part) {
        self.listed.remove(&part);
    }

    /// The list is whole, and this is it.
    pub fn listed(&mut self, part: Part, objects: BTreeMap<ObjectRef, Observed>) {
        self.known.retain(|object, _| object.part != part);
        self.known.extend(objects);
        self.listed.insert(part);
    }

    /// An object with our label is there, or is not any more.
    pub fn seen(&mut self, object: ObjectRef, observed: Option<Observed>) {
        match observed {
            Some(observed) => drop(self.known.insert(object, observed)),
            None => drop(self.known.remove(&object)),
        }
    }

    /// What a ConfigMap that is referred to holds. [`Keeper::wish`] is to be called after this.
    pub fn map(&mut self, name: Name, overlays: Option<Result<Overlays, String>>) {
        self.maps.insert(name, overlays);
    }

    /// The overlays by class. [`Keeper::wish`] is to be called after this.
    pub fn defaults(&mut self, defaults: BTreeMap<String, Result<Overlays, String>>) {
        self.defaults = Some(defaults);
    }

    /// The next thing to do now.
    pub fn todo(&self, now: Instant) -> Option<Todo> {
        if self.listed.len() < PARTS.len() {
            return None;
        }
        let waits = |name: &Name| self.failed.get(name).is_some_and(|it| it.again > now);
        for (gateway, want) in self.gateways.iter().filter(|(name, _)| !waits(name)) {
            let Objects::Rendered(objects) = &want.objects else { continue };
            let next = objects.iter().find(|(object, _, hash)| self.differs(object, *hash));
            if let Some((object, body, _)) = next {
                return Some(Todo::Apply {
                    gateway: gateway.clone(),
                    object: object.clone(),
                    body: body.clone(),
                    unseen: !self.known.contains_key(object),
                });
            }
        }
        for (object, observed) in self.known.iter().filter(|(_, it)| !it.deleting) {
            let Some((gateway, want)) = self.gateways.iter().find(|(_, it)| it.uid == observed.owner) else {
                // The API server deletes what has no owner any more.
                continue;
            };
            if want.gives_up(object, observed) && !waits(gateway) {
                let uid = observed.uid.clone();
                return Some(Todo::Delete { gateway: gateway.clone(), object: object.clone(), uid });
            }
        }
        None
    }

    fn differs(&self, object: &ObjectRef, hash: u64) -> bool {
        let (Some(known), Some(applied)) = (self.known.get(object), self.applied.get(object)) else {
            return true;
        };
        known.deleting
            || *applied != Applied { wanted: hash, uid: known.uid.clone(), seen: known.fingerprint }
    }

    /// Something that has the name of what is to be written, and whose it is: why it is left alone, if it is.
    pub fn in_the_way(&self, gateway: &Name, object: &ObjectRef, there: &Found) -> Option<String> {
        let what = format!("{} {}/{}", object.part.kind(), object.namespace, object.name);
        if !there.labelled {
            let label = labels::GATEWAY_MANAGED;
            return Some(format!(
                "{what} exists without label {label}={}: it is left alone",
                gateways::MANAGED
            ));
        }
        if there.observed.deleting {
            return Some(format!("{what} is being deleted: it is made again after that"));
        }
        let other =
            self.gateways.iter().find(|(name, it)| *name != gateway && it.uid == there.observed.owner);
        other.map(|((namespace, name), _)| format!("{what} belongs to Gateway {namespace}/{name}"))
    }

    /// What is known of an object, as [`Keeper::in_the_way`] takes it.
    pub fn found(&self, object: &ObjectRef) -> Option<Found> {
        let observed = self.known.get(object)?.clone();
        Some(Found { labelled: true, observed })
    }

    /// It was written, and is now this.
    pub fn applied(&mut self, gateway: &Name, object: ObjectRef, body: &Map<String, Value>, is: Observed) {
        let wanted = hash(&Value::Object(body.clone()));
        self.applied.insert(object.clone(), Applied { wanted, uid: is.uid.clone(), seen: is.fingerprint });
        self.known.insert(object, is);
        self.failed.remove(gateway);
    }

    /// It is not there any more, or not this one.
    pub fn deleted(&mut self, gateway: &Name, object: &ObjectRef) {
        self.applied.remove(object);
        self.known.remove(object);
        self.failed.remove(gateway);
    }

    /// It could not be done.
    pub fn failed(&mut self, gateway: Name, message: String, for_long: bool, now: Instant) {
        let after = match self.failed.get(&gateway) {
            _ if for_long => LONGEST,
            Some(before) => (before.after * 2).min(LONGEST),
            None => RETRY,
        };
        self.failed.insert(gateway, Failure { message, after, again: now + after });
    }

    /// When something that failed is to be tried again.
    pub fn next(&self, now: Instant) -> Option<Instant> {
        self.failed.values().map(|it| it.again).filter(|again| *again > now).min()
    }

    /// How far each Gateway of ours is.
    pub fn progress(&self) -> BTreeMap<Name, Provisioned> {
        let ours = self.gateways.iter().filter(|(_, want)| want.owner == Owner::Us && !want.unmanaged);
        ours.map(|(name, want)| (name.clone(), self.progress_of(name, want))).collect()
    }

    fn progress_of(&self, name: &Name, want: &Want) -> Provisioned {
        let mine = |part| {
            let of =
                move |(object, it): &(&ObjectRef, &Observed)| object.part == part && it.owner == want.uid;
            let wanted = |object: &ObjectRef| match &want.objects {
                Objects::Rendered(all) => all.iter().any(|(other, ..)| other == object),
                _ => true,
            };
            self.known.iter().filter(of).find(|(object, _)| wanted(object))
        };
        let (service, deployment) = (mine(Part::Service), mine(Part::Deployment));
        let progress = match (&want.objects, self.failed.get(name)) {
            (Objects::Invalid(invalid), _) => Progress::Invalid(invalid.clone()),
            (_, Some(failure)) => Progress::Failed(failure.message.clone()),
            (Objects::Rendered(all), None)
                if all.iter().all(|(object, _, hash)| !self.differs(object, *hash)) =>
            {
                Progress::Done
            }
            (Objects::Pending | Objects::Rendered(_), None) => Progress::Pending,
        };
        let host = |(object, _): (&ObjectRef, &Observed)| {
            format!("{}.{}.svc.{}", object.name, object.namespace, self.settings.cluster_domain)
        };
        Provisioned {
            progress,
            hostname: service.map(host),
            addresses: service.map(|(_, it)| it.addresses.clone()).unwrap_or_default(),
            available: deployment.map_or(0, |(_, it)| it.available),
            problem: deployment.map(|(_, it)| it.problem.clone()).unwrap_or_default(),
        }
    }
}

/// An object that has a name that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// It has our label.
    pub labelled: bool,
    /// What it is.
    pub observed: Observed,
}

impl Want {
    /// An object of this Gateway that is not to be there any more (D65).
    fn gives_up(&self, object: &ObjectRef, observed: &Observed) -> bool {
        match (&self.owner, &self.objects) {
            // Whoever wrote addresses down may have written down those of our Service.
            (Owner::Us, _) if self.unmanaged => false,
            (Owner::Us, Objects::Rendered(all)) => !all.iter().any(|(wanted, ..)| wanted == object),
            (Owner::Us, _) => false,
            (Owner::Other, _) => true,
            // A class that is gone may come back; another one that nobody knows was asked for on purpose.
            (Owner::Unknown, _) => observed.class != self.class,
        }
    }
}

fn managed(gateway: &Gateway, owner: Owner) -> bool {
    owner == Owner::Us && !gateways::has_own_addresses(gateway)
}

fn parameters(gateway: &Gateway) -> Option<&ParametersRef> {
    gateway.spec.infrastructure.as_ref()?.parameters_ref.as_ref()
}

fn is_map(reference: &ParametersRef) -> bool {
    reference.group.is_empty() && reference.kind == "ConfigMap"
}

#[cfg(test)]
#[path = "keeper_tests.rs"]
mod tests;
