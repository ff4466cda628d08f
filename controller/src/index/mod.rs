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
