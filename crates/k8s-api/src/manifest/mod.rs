//! A directory of manifests: read within bounds, every error with its file, line and field, and the last good content
//! of each file kept in force.
//!
//! [`load_dir`] is for whoever reads once. Who keeps watching holds a [`LastGood`] and applies a [`scan()`] to it whenever
//! something may have changed.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

pub(crate) mod de;
mod last_good;
mod mirror;
mod parse;
mod scan;
pub(crate) mod tree;

pub use last_good::{FileState, LastGood};
pub use mirror::Mirror;
pub use parse::{ParsedFile, judge_value, parse_file, parse_value};
pub use scan::{DirError, Scan, ScannedFile, scan};

use crate::core::{Namespace, Node, Pod, Service, ServiceAccount};
use crate::networking::{ServiceEntry, WorkloadEntry};
use crate::object::{Object, ObjectKey};
use crate::security::{AuthorizationPolicy, PeerAuthentication};

/// An object and where it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Relative to the directory, parts joined by `/`.
    pub file: Arc<str>,
    /// The document's first line, from 1.
    pub line: u32,
    /// What was written.
    pub object: Object,
}

/// What is wrong with a file, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, thiserror::Error)]
pub struct FileError {
    /// Relative to the directory.
    pub file: String,
    /// From 1; 0 if it is about the file as a whole.
    pub line: u32,
    /// Such as `spec.rules[0].from[0].source.ipBlocks[1]`; empty if it is about the document or the file.
    pub field: String,
    /// What was there, if a scalar was.
    pub value: String,
    /// What is wrong with it.
    pub reason: String,
    /// What would be right; may be empty.
    pub expected: String,
}

/// A document that was read and left alone: the mesh has no use for its kind, or for a part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Relative to the directory.
    pub file: String,
    /// From 1.
    pub line: u32,
    /// Why.
    pub text: String,
}

/// Everything a directory holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Loaded {
    /// Each object once.
    pub objects: Vec<Arc<Manifest>>,
    /// What could not be read. A file with an error gives no objects at all.
    pub errors: Vec<FileError>,
    /// What was left alone.
    pub notes: Vec<Note>,
}

/// Reads a directory once.
///
/// # Errors
/// If the directory cannot be read, or holds more than the bounds of [`scan()`]. A bad file is no such error: see
/// [`Loaded::errors`].
pub fn load_dir(dir: &Path) -> Result<Loaded, DirError> {
    let mut state = LastGood::default();
    state.apply(scan(dir)?);
    Ok(state.loaded())
}

/// Reads text that stands in another object, within the bounds of a manifest: one YAML document that is a map, or nothing.
///
/// # Errors
/// In words, with the line.
pub fn yaml_map(text: &str) -> Result<serde_json::Map<String, serde_json::Value>, String> {
    let documents = tree::parse(text).map_err(|error| format!("line {}: {}", error.line, error.reason))?;
    match documents.as_slice() {
        [] => Ok(serde_json::Map::new()),
        [one] => match one.to_json() {
            serde_json::Value::Object(map) => Ok(map),
            _ => Err("is no map".to_owned()),
        },
        _ => Err("holds more than one document".to_owned()),
    }
}

macro_rules! iterate {
    ($($(#[$doc:meta])* $name:ident: $kind:ident;)*) => {
        impl Loaded {
            $($(#[$doc])* pub fn $name(&self) -> impl Iterator<Item = &$kind> {
                self.objects.iter().filter_map(|manifest| match &manifest.object {
                    #[allow(clippy::explicit_auto_deref, clippy::borrow_deref_ref, reason = "some kinds are boxed")]
                    Object::$kind(it) => Some(&*it as &$kind),
                    _ => None,
                })
            })*
        }
    };
}

iterate! {
    /// In the order of files and documents, as all of these.
    namespaces: Namespace;
    /// Service accounts.
    service_accounts: ServiceAccount;
    /// Nodes.
    nodes: Node;
    /// Pods.
    pods: Pod;
    /// Services.
    services: Service;
    /// Authorization policies.
    authorization_policies: AuthorizationPolicy;
    /// Peer authentications.
    peer_authentications: PeerAuthentication;
    /// Service entries.
    service_entries: ServiceEntry;
    /// Workload entries.
    workload_entries: WorkloadEntry;
}

impl Loaded {
    /// The objects by key.
    pub fn by_key(&self) -> HashMap<ObjectKey, Arc<Manifest>> {
        self.objects.iter().map(|manifest| (manifest.object.key(), Arc::clone(manifest))).collect()
    }
}

impl FileError {
    /// Everything but where: the field, what is wrong with it, what it was and what would be right.
    pub fn detail(&self) -> String {
        let field = if self.field.is_empty() { String::new() } else { format!("{}: ", self.field) };
        let more = match (self.value.is_empty(), self.expected.is_empty()) {
            (true, true) => String::new(),
            (false, true) => format!(" (got {:?})", self.value),
            (true, false) => format!(" (expected {})", self.expected),
            (false, false) => format!(" (got {:?}, expected {})", self.value, self.expected),
        };
        format!("{field}{}{more}", self.reason)
    }
}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.file)?;
        if self.line > 0 {
            write!(f, ":{}", self.line)?;
        }
        write!(f, ": {}", self.detail())
    }
}

#[cfg(test)]
mod tests;
