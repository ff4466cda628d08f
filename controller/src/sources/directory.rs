//! The world from directories: manifests, and the statuses that the sandbox and the agents write.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use culvert_k8s_api::manifest::{DirError, FileError, LastGood, Mirror, Scan, scan};
use culvert_k8s_api::status::{PodStatus, RedirectionStatus, ServiceStatus, parse_file_name};

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

    /// Everything, as it stands.
    pub fn world(&self) -> World {
        let loaded = self.manifests.loaded();
        let mut errors = loaded.errors;
        errors.extend(self.manifests_error.clone());
        errors.extend(self.pods.errors().chain(self.services.errors()).cloned());
        errors.extend(self.redirection.values().flat_map(JsonDir::errors).cloned());
        let pods = self.pods.values().filter_map(|(file, status)| {
            // The file's name is what the writer meant; a status that says otherwise is no status of that pod.
            let named = parse_file_name(file)? == (status.namespace.as_str(), status.name.as_str());
            named.then(|| ((status.namespace.clone(), status.name.clone()), status.clone()))
        });
        let services = self.services.values().filter_map(|(file, status)| {
            let (namespace, name) = parse_file_name(file)?;
            Some(((namespace.to_owned(), name.to_owned()), status.clone()))
        });
        let redirection = self.redirection.iter().flat_map(|(node, files)| {
            files.values().filter_map(move |(file, status)| {
                Some(((node.clone(), file.strip_suffix(".json")?.to_owned()), status.clone()))
            })
        });
        World {
            objects: loaded.objects,
            pods: pods.collect(),
            services: services.collect(),
            redirection: redirection.collect(),
            errors,
            notes: loaded.notes,
        }
    }

    fn take_in(&mut self, found: &Scan) {
        self.manifests.apply(found);
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
        for node in nodes {
            let dir = redirection_dir(root, &node);
            self.redirection.entry(node).or_default().refresh(&dir);
        }
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
