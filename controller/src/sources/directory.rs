//! The world from directories: manifests, and the statuses that the sandbox and the agents write.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use culvert_k8s_api::ObjectKey;
use culvert_k8s_api::manifest::{DirError, FileError, LastGood, Manifest, Mirror, Scan, scan};
use culvert_k8s_api::status::{PodStatus, RedirectionStatus, ServiceStatus, parse_file_name};

use imbl::OrdMap;

use super::json_dir::JsonDir;
use super::watch::Dirty;
use crate::index::World;

/// Where things are.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Manifests.
    pub manifests: PathBuf,
    /// Holds `pods/` and `services/`.
    pub status: Option<PathBuf>,
    /// Holds `<node>/redirection/`.
    pub redirection: Option<PathBuf>,
    /// Where the last good content of each manifest is kept over a restart.
    pub last_good: Option<PathBuf>,
}

/// What was read, and what stays in force of what could not be.
#[derive(Debug)]
pub struct Directory {
    paths: Paths,
    manifests: LastGood,
    manifests_error: Option<FileError>,
    mirror: Option<Mirror>,
    pods: JsonDir<PodStatus>,
    services: JsonDir<ServiceStatus>,
    redirection: BTreeMap<String, JsonDir<RedirectionStatus>>,
    /// As of the last [`Directory::world`].
    world: World,
    /// The manifests in force, or what is wrong with them, may be others than in `world`.
    manifests_changed: bool,
}

/// Nodes whose redirection is read: as many as one machine could ever hold as namespaces.
const MAX_NODES: usize = 1_000;

impl Directory {
    /// Reads everything for the first time.
    ///
    /// # Errors
    /// If the directory of manifests cannot be read: a controller that starts so would take back every policy. (A single
    /// bad file is no such error.)
    pub fn open(paths: Paths) -> Result<Self, DirError> {
        let found = scan(&paths.manifests)?;
        let mut manifests = LastGood::default();
        let mirror =
            paths.last_good.as_deref().and_then(|dir| open_mirror(dir, &paths.manifests, &mut manifests));
        let mut directory = Self {
            paths,
            manifests,
            manifests_error: None,
            mirror,
            pods: JsonDir::default(),
            services: JsonDir::default(),
            redirection: BTreeMap::new(),
            world: World::default(),
            manifests_changed: true,
        };
        directory.take_in(&found);
        directory.refresh(Dirty { manifests: false, ..Dirty::ALL });
        Ok(directory)
    }

    /// Where it reads.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Reads again what may have changed. What cannot be read stays as it was and is reported.
    pub fn refresh(&mut self, dirty: Dirty) {
        if dirty.manifests {
            self.manifests_error = match scan(&self.paths.manifests) {
                Ok(found) => {
                    self.take_in(&found);
                    None
                }
                Err(error) => Some(FileError {
                    file: self.paths.manifests.display().to_string(),
                    line: 0,
                    field: String::new(),
                    value: String::new(),
                    reason: format!("{error}; everything stays as it was"),
                    expected: String::new(),
                }),
            };
        }
        if dirty.status
            && let Some(status) = &self.paths.status
        {
            self.pods.refresh(&status.join("pods"));
            self.services.refresh(&status.join("services"));
        }
        if dirty.redirection {
            self.refresh_redirection();
        }
    }

    /// Everything, as it stands. It shares with the last one what has not changed since.
    pub fn world(&mut self) -> World {
        if std::mem::take(&mut self.manifests_changed) {
            let loaded = self.manifests.loaded();
            replace_objects(&mut self.world.objects, loaded.objects);
            self.world.notes = loaded.notes;
        }
        for (file, status) in self.pods.take_changed() {
            let Some((namespace, name)) = parse_file_name(&file) else { continue };
            let key = (namespace.to_owned(), name.to_owned());
            // The file's name is what the writer meant; a status that says otherwise is no status of that pod.
            match status
                .filter(|status| (status.namespace.as_str(), status.name.as_str()) == (namespace, name))
            {
                Some(status) => drop(self.world.pods.insert(key, status.clone())),
                None => drop(self.world.pods.remove(&key)),
            }
        }
        for (file, status) in self.services.take_changed() {
            let Some((namespace, name)) = parse_file_name(&file) else { continue };
            let key = (namespace.to_owned(), name.to_owned());
            match status {
                Some(status) => drop(self.world.services.insert(key, status.clone())),
                None => drop(self.world.services.remove(&key)),
            }
        }
        for (node, files) in &mut self.redirection {
            for (file, status) in files.take_changed() {
                let Some(uid) = file.strip_suffix(".json") else { continue };
                let key = (node.clone(), uid.to_owned());
                match status {
                    Some(status) => drop(self.world.redirection.insert(key, status.clone())),
                    None => drop(self.world.redirection.remove(&key)),
                }
            }
        }
        self.world.errors = self.errors().cloned().collect();
        self.world.clone()
    }

    fn errors(&self) -> impl Iterator<Item = &FileError> {
        let statuses = self.pods.errors().chain(self.services.errors());
        let redirection = self.redirection.values().flat_map(JsonDir::errors);
        self.manifests.errors().chain(&self.manifests_error).chain(statuses).chain(redirection)
    }

    fn take_in(&mut self, found: &Scan) {
        self.manifests_changed |= self.manifests.apply(found);
        if let Some(mirror) = &mut self.mirror
            && let Err(error) = mirror.keep(found, &self.manifests)
        {
            tracing::warn!(%error, "cannot keep the last good manifests over a restart");
        }
    }

    fn refresh_redirection(&mut self) {
        let Some(root) = &self.paths.redirection else { return };
        let nodes = nodes(root);
        self.redirection.retain(|node, _| nodes.contains(node));
        let gone = self.world.redirection.keys().filter(|(node, _)| !nodes.contains(node));
        for key in gone.cloned().collect::<Vec<_>>() {
            self.world.redirection.remove(&key);
        }
        for node in nodes {
            let dir = redirection_dir(root, &node);
            self.redirection.entry(node).or_default().refresh(&dir);
        }
    }
}

/// Takes in the objects in force; those that are still the same keep their place.
fn replace_objects(known: &mut OrdMap<ObjectKey, Arc<Manifest>>, now: Vec<Arc<Manifest>>) {
    let mut seen = HashSet::with_capacity(now.len());
    for manifest in now {
        let key = manifest.object.key();
        if !known.get(&key).is_some_and(|known| Arc::ptr_eq(known, &manifest)) {
            known.insert(key.clone(), manifest);
        }
        seen.insert(key);
    }
    if seen.len() < known.len() {
        let gone: Vec<_> = known.keys().filter(|key| !seen.contains(*key)).cloned().collect();
        gone.iter().for_each(|key| drop(known.remove(key)));
    }
}

/// Without it a restart forgets what bad files said when they were good; that is no reason not to serve.
fn open_mirror(dir: &Path, source: &Path, manifests: &mut LastGood) -> Option<Mirror> {
    match Mirror::open(dir, source) {
        Ok((mirror, before)) => {
            manifests.apply(before);
            Some(mirror)
        }
        Err(error) => {
            tracing::warn!(dir = %dir.display(), %error, "cannot keep the last good manifests over a restart");
            None
        }
    }
}

/// The names of the nodes that have a directory.
pub(super) fn nodes(root: &Path) -> Vec<String> {
    let Ok(listing) = fs::read_dir(root) else { return Vec::new() };
    let names = listing.filter_map(|entry| {
        let entry = entry.ok()?;
        entry.file_type().ok()?.is_dir().then(|| entry.file_name().into_string().ok())?
    });
    names.take(MAX_NODES).collect()
}

pub(super) fn redirection_dir(root: &Path, node: &str) -> PathBuf {
    root.join(node).join("redirection")
}
