//! The one place that knows what is: written by one task, read by many as a finished value.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_k8s_api::manifest::{FileError, Manifest, Note};
use culvert_k8s_api::status::{PodStatus, RedirectionStatus, ServiceStatus};
use culvert_proto::security::Authorization;
use culvert_proto::workload::Address;

use culvert_xds::resources::ResourceSet;

use crate::translate::{self, MeshSettings, Translation, version};

mod resources;

/// What the sources say, all of it at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// The manifests in force.
    pub objects: Vec<Arc<Manifest>>,
    /// By namespace and name.
    pub pods: BTreeMap<(String, String), PodStatus>,
    /// By namespace and name.
    pub services: BTreeMap<(String, String), ServiceStatus>,
    /// By node and pod uid.
    pub redirection: BTreeMap<(String, String), RedirectionStatus>,
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
    pub addresses: BTreeMap<String, Versioned<Address>>,
    /// Policies.
    pub policies: BTreeMap<String, Versioned<Authorization>>,
    /// The same, encoded.
    pub set: Arc<ResourceSet>,
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
}

impl Index {
    /// An empty index. `generation` is below every one it will give: a controller that starts takes the time in
    /// milliseconds, so that generations rise over restarts too.
    pub fn new(settings: MeshSettings, generation: u64) -> Self {
        let set = Arc::new(ResourceSet { generation, ..ResourceSet::default() });
        let current = Snapshot { generation, set, ..Snapshot::default() };
        Self { settings, current: Arc::new(current) }
    }

    /// What readers see now.
    pub fn current(&self) -> Arc<Snapshot> {
        Arc::clone(&self.current)
    }

    /// Takes in a world. The result is the new snapshot; its generation is a new one only if a resource changed.
    pub fn apply(&mut self, world: World) -> Arc<Snapshot> {
        let before = &self.current;
        let mut translation = translate::translate(&world, &before.translation.vips, &self.settings);
        let addresses =
            keep(std::mem::take(&mut translation.addresses), &before.addresses, version::of_address);
        let policies = keep(std::mem::take(&mut translation.policies), &before.policies, version::of_policy);
        let same = addresses == before.addresses && policies == before.policies;
        let mut next = Snapshot {
            generation: if same { before.generation } else { before.generation + 1 },
            addresses,
            policies,
            set: Arc::clone(&before.set),
            world: Arc::new(world),
            translation: Arc::new(translation),
        };
        if !same {
            next.set = Arc::new(resources::set(&next, &before.set));
        }
        self.current = Arc::new(next);
        self.current()
    }
}

/// Puts versions to messages; what did not change keeps its version without being hashed again.
fn keep<T: PartialEq>(
    messages: BTreeMap<String, T>,
    before: &BTreeMap<String, Versioned<T>>,
    version: fn(&T) -> String,
) -> BTreeMap<String, Versioned<T>> {
    let one = |(name, message): (String, T)| {
        let versioned = match before.get(&name) {
            Some(known) if *known.message == message => {
                Versioned { version: known.version.clone(), message: Arc::clone(&known.message) }
            }
            _ => Versioned { version: version(&message), message: Arc::new(message) },
        };
        (name, versioned)
    };
    messages.into_iter().map(one).collect()
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
