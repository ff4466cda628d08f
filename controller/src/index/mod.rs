//! The one place that knows what is: written by one task, read by many as a finished value.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use culvert_k8s_api::manifest::{FileError, Manifest, Note};
use culvert_k8s_api::object::ObjectKey;
use culvert_k8s_api::status::{PodStatus, RedirectionStatus, ServiceStatus};
use culvert_proto::security::Authorization;
use culvert_proto::workload::{Address, address};

use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_xds::resources::{Resource, ResourceSet};
use imbl::OrdMap;
use prost::Message;

use crate::translate::{self, MeshSettings, Translation, version};
use changes::Changes;
use waypoints::Owns;

mod changes;
#[cfg(test)]
mod incremental_tests;
pub mod waypoints;

/// What the sources say, all of it at one moment. The maps are persistent: a source that changes what changed, and nothing
/// else, makes the next moment cost no more than that.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// The manifests in force.
    pub objects: OrdMap<ObjectKey, Arc<Manifest>>,
    /// By namespace and name.
    pub pods: OrdMap<(String, String), PodStatus>,
    /// By namespace and name.
    pub services: OrdMap<(String, String), ServiceStatus>,
    /// By node and pod uid.
    pub redirection: OrdMap<(String, String), RedirectionStatus>,
    /// What could not be read.
    pub errors: Vec<FileError>,
    /// What was left alone.
    pub notes: Vec<Note>,
}

/// A resource and its version.
#[derive(Clone, Debug, PartialEq)]
pub struct Versioned<T> {
    /// A hash of the message.
    pub version: String,
    /// The message.
    pub message: Arc<T>,
}

/// Everything that readers see, of one generation.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Rises whenever a resource changed; proxies commit workloads, services and policies of one generation together.
    pub generation: u64,
    /// Workloads and services.
    pub addresses: OrdMap<String, Versioned<Address>>,
    /// How many of them are services.
    pub services: usize,
    /// Policies.
    pub policies: OrdMap<String, Versioned<Authorization>>,
    /// The same, encoded.
    pub set: Arc<ResourceSet>,
    /// What waypoints have besides.
    pub waypoints: Owns,
    /// What they were made from.
    pub world: Arc<World>,
    /// What became of what.
    pub translation: Arc<Translation>,
}

/// The single writer.
#[derive(Debug)]
pub struct Index {
    settings: MeshSettings,
    current: Arc<Snapshot>,
    /// Names of the addresses that were made of neither a pod nor a WorkloadEntry.
    others: BTreeSet<String>,
}

/// Objects as a [`World`] holds them.
pub fn by_key(objects: impl IntoIterator<Item = Arc<Manifest>>) -> OrdMap<ObjectKey, Arc<Manifest>> {
    objects.into_iter().map(|manifest| (manifest.object.key(), manifest)).collect()
}

impl Index {
    /// An empty index. `generation` is below every one it will give: a controller that starts takes the time in
    /// milliseconds, so that generations rise over restarts too.
    pub fn new(settings: MeshSettings, generation: u64) -> Self {
        let set = Arc::new(ResourceSet { generation, ..ResourceSet::default() });
        let current = Snapshot { generation, set, ..Snapshot::default() };
        Self { settings, current: Arc::new(current), others: BTreeSet::new() }
    }

    /// What readers see now.
    pub fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current)
    }

    /// Takes in a world. The result is the new snapshot; its generation is a new one only if a resource changed. It costs what
    /// changed since the last world, if the two share the rest.
    pub fn apply(&mut self, world: World) -> Arc<Snapshot> {
        let first = self.current.set.types.is_empty();
        let mut changes = Changes::between(&self.current.world, &world, &self.settings);
        changes.all |= first;
        let mut next = (*self.current).clone();
        next.world = Arc::new(world);
        if !changes.is_empty() {
            self.translate(&changes, &mut next);
        }
        if next.set.types == self.current.set.types && next.waypoints.ptr_eq(&self.current.waypoints) {
            next.set = Arc::clone(&self.current.set);
        } else {
            next.generation += 1;
            Arc::make_mut(&mut next.set).generation = next.generation;
        }
        self.current = Arc::new(next);
        self.current()
    }

    fn translate(&mut self, changes: &Changes, next: &mut Snapshot) {
        if changes.only_routes() {
            let mut translation = Translation::clone(&next.translation);
            translation.routed = Arc::new(translate::routes::only_routes(&next.world, &self.settings));
            waypoints::put(&mut next.waypoints, translation.told());
            next.translation = Arc::new(translation);
            return;
        }
        let part =
            if changes.all { World::clone(&next.world) } else { changes.part(&next.world, &self.settings) };
        let mut made = translate::translate(&part, &next.translation.vips, &self.settings);
        let mut addresses = std::mem::take(&mut made.addresses);
        let whole = changes.all || changes.context;
        // Whatever was there before of what was translated again, and is not any more, is gone.
        let mut gone: Vec<String> = Vec::new();
        if changes.all {
            gone.extend(next.addresses.keys().cloned());
        } else {
            gone.extend(
                changes
                    .pods
                    .iter()
                    .map(|(namespace, name)| translate::pod_uid(&self.settings, namespace, name)),
            );
            gone.extend(
                changes
                    .entries
                    .iter()
                    .map(|(namespace, name)| translate::entry_uid(&self.settings, namespace, name)),
            );
        }
        let workloads: BTreeSet<String> = translate::of_workload_objects(&part, &self.settings).collect();
        if whole {
            gone.extend(std::mem::take(&mut self.others));
            next.services = addresses.values().filter(|it| is_service(it)).count();
            self.others = addresses.keys().filter(|name| !workloads.contains(*name)).cloned().collect();
        } else {
            // What is beside the workloads was translated in part only.
            addresses.retain(|name, _| workloads.contains(name));
        }
        let set = Arc::make_mut(&mut next.set);
        let served = set.types.entry(ADDRESS_TYPE_URL.to_owned()).or_default();
        put(addresses, gone, &mut next.addresses, served, version::of_address);
        if whole {
            let gone = next.policies.keys().cloned().collect();
            let served = set.types.entry(AUTHORIZATION_TYPE_URL.to_owned()).or_default();
            put(std::mem::take(&mut made.policies), gone, &mut next.policies, served, version::of_policy);
            waypoints::put(&mut next.waypoints, made.told());
            next.translation = Arc::new(made);
        }
    }
}

fn is_service(message: &Address) -> bool {
    matches!(message.r#type, Some(address::Type::Service(_)))
}

/// Replaces what differs, and removes of `gone` what was not made again. What did not change keeps its version without being
/// hashed again, and its place in the map.
fn put<T: PartialEq + Message + Clone>(
    made: BTreeMap<String, T>,
    gone: Vec<String>,
    messages: &mut OrdMap<String, Versioned<T>>,
    served: &mut Arc<culvert_xds::resources::ResourceMap>,
    version: fn(&T) -> String,
) {
    for name in gone {
        if !made.contains_key(&name) && messages.remove(&name).is_some() {
            Arc::make_mut(served).remove(name.as_str());
        }
    }
    for (name, message) in made {
        if messages.get(&name).is_some_and(|known| *known.message == message) {
            continue;
        }
        let version = version(&message);
        let resource = Resource::new(version.as_str(), message.encode_to_vec());
        Arc::make_mut(served).insert(name.as_str().into(), resource);
        messages.insert(name, Versioned { version, message: Arc::new(message) });
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};

    use super::*;
    use crate::sources::directory::{Directory, Paths};
    use crate::sources::watch::Dirty;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop}\nspec: {containers: [{name: c}]}\n";

    fn policy(port: u16) -> String {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: p, namespace: shop}}\nspec: {{action: DENY, rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]}}\n"
        )
    }

    fn open(dir: &Path) -> Directory {
        let paths = Paths {
            manifests: dir.join("manifests"),
            status: Some(dir.join("status")),
            redirection: Some(dir.join("nodes")),
            last_good: None,
        };
        Directory::open(paths).unwrap()
    }

    /// Directory, index, resources: without a socket and without waiting.
    #[test]
    fn what_is_on_disk_becomes_resources() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("manifests/pod.yaml", POD);
        write("manifests/policy.yaml", &policy(80));
        let mut directory = open(dir.path());
        let mut index = Index::new(MeshSettings::default(), 7);
        let first = index.apply(directory.world());
        assert_eq!((first.generation, first.set.generation), (8, 8));
        assert_eq!(first.set.of_type(ADDRESS_TYPE_URL).len(), 0);

        let status = r#"{"uid":"u","namespace":"shop","name":"web","nodeName":"a","podIPs":["100.64.1.2"],"phase":"Running","ready":true}"#;
        write("status/pods/shop.web.json", status);
        write("nodes/a/redirection/u.json", r#"{"redirection":"enabled"}"#);
        // A status under another pod's name, and one that is none.
        write("status/pods/shop.other.json", status);
        write("status/pods/shop.bad.json", "{");
        directory.refresh(Dirty { status: true, redirection: true, ..Dirty::default() });
        let second = index.apply(directory.world());
        assert_eq!(second.generation, 9);
        let addresses = second.set.of_type(ADDRESS_TYPE_URL);
        assert_eq!(addresses.keys().map(|name| &**name).collect::<Vec<_>>(), ["Kubernetes//Pod/shop/web"]);
        assert_eq!(second.world.errors.len(), 1);
        let shared = |one: &Snapshot, other: &Snapshot, of: &str| {
            Arc::ptr_eq(&one.set.of_type(of), &other.set.of_type(of))
        };
        assert!(
            shared(&first, &second, AUTHORIZATION_TYPE_URL),
            "a type that did not change is the same map"
        );

        // Nothing new: no new generation, the same set.
        directory.refresh(Dirty::ALL);
        let third = index.apply(directory.world());
        assert!(third.generation == 9 && Arc::ptr_eq(&second.set, &third.set));

        // A file that turns bad is an error and no change; mended it is a change of policies alone.
        write("manifests/policy.yaml", &policy(0));
        directory.refresh(Dirty::ALL);
        let fourth = index.apply(directory.world());
        assert!(fourth.generation == 9 && Arc::ptr_eq(&second.set, &fourth.set));
        assert_eq!(fourth.world.errors.len(), 2);
        write("manifests/policy.yaml", &policy(81));
        directory.refresh(Dirty { manifests: true, ..Dirty::default() });
        let fifth = index.apply(directory.world());
        assert_eq!(fifth.generation, 10);
        assert!(
            shared(&fourth, &fifth, ADDRESS_TYPE_URL) && !shared(&fourth, &fifth, AUTHORIZATION_TYPE_URL)
        );
        assert_ne!(fourth.policies["shop/p"].version, fifth.policies["shop/p"].version);

        // The directory goes away as a whole: that is reported and takes nothing back.
        fs::rename(dir.path().join("manifests"), dir.path().join("gone")).unwrap();
        directory.refresh(Dirty::ALL);
        let sixth = index.apply(directory.world());
        assert!(
            sixth.generation == 10
                && sixth.world.errors.iter().any(|error| error.reason.contains("stays as it was"))
        );
    }
}
