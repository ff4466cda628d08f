//! The last good content of every file. Pure: what was found goes in, what is in force comes out.

use std::borrow::Borrow;
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::parse::parse_file;
use super::{FileError, Loaded, Manifest, Note, Scan, ScannedFile};
use crate::object::ObjectKey;

/// What is in force, file by file.
///
/// - A good file's objects are in force.
/// - A file that turns bad keeps the objects of its last good content, and its errors are reported.
/// - A file that is gone takes its objects with it.
/// - An object that two files claim stays with the file that had it, or is the first by name; the other claim is an error.
///   A copy dropped beside a policy cannot replace it.
#[derive(Clone, Debug, Default)]
pub struct LastGood {
    files: BTreeMap<String, FileState>,
    owners: HashMap<ObjectKey, String>,
    duplicates: Vec<FileError>,
}

/// One file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileState {
    /// Of the content last seen, good or bad, so that an unchanged file is not parsed again.
    digest: u64,
    /// From its last good content.
    pub objects: Vec<Arc<Manifest>>,
    /// Of its present content.
    pub errors: Vec<FileError>,
    /// Of its last good content.
    pub notes: Vec<Note>,
}

impl LastGood {
    /// Takes in what a look at the directory found. True if what is in force, or the errors, changed.
    pub fn apply(&mut self, scan: impl Borrow<Scan>) -> bool {
        let scan = scan.borrow();
        let before = (self.files.len(), self.duplicates.clone());
        let mut changed = false;
        self.files.retain(|name, _| scan.files.contains_key(name));
        changed |= self.files.len() != before.0;
        for (name, found) in &scan.files {
            changed |= self.file(name, found);
        }
        if changed {
            self.settle();
        }
        changed
    }

    /// What is in force, and what is wrong.
    pub fn loaded(&self) -> Loaded {
        let owned = |manifest: &&Arc<Manifest>| {
            self.owners.get(&manifest.object.key()).is_some_and(|owner| **owner == *manifest.file)
        };
        Loaded {
            objects: self.files.values().flat_map(|file| &file.objects).filter(owned).cloned().collect(),
            errors: self.errors().cloned().collect(),
            notes: self.files.values().flat_map(|file| &file.notes).cloned().collect(),
        }
    }

    /// What is wrong now.
    pub fn errors(&self) -> impl Iterator<Item = &FileError> {
        self.files.values().flat_map(|file| &file.errors).chain(&self.duplicates)
    }

    /// The files, by name.
    pub fn files(&self) -> &BTreeMap<String, FileState> {
        &self.files
    }

    fn file(&mut self, name: &str, found: &ScannedFile) -> bool {
        let digest = digest(found);
        if self.files.get(name).is_some_and(|state| state.digest == digest) {
            return false;
        }
        let errors = match found {
            ScannedFile::Text(text) => {
                let parsed = parse_file(name, text);
                if parsed.errors.is_empty() {
                    let state = FileState {
                        digest,
                        objects: parsed.objects,
                        errors: Vec::new(),
                        notes: parsed.notes,
                    };
                    self.files.insert(name.to_owned(), state);
                    return true;
                }
                parsed.errors
            }
            ScannedFile::Bad(reason) => vec![FileError {
                file: name.to_owned(),
                line: 0,
                field: String::new(),
                value: String::new(),
                reason: reason.clone(),
                expected: String::new(),
            }],
        };
        let state = self.files.entry(name.to_owned()).or_default();
        state.digest = digest;
        state.errors = errors;
        true
    }

    /// Decides whose each object is.
    fn settle(&mut self) {
        let mut claims: BTreeMap<ObjectKey, Vec<&Arc<Manifest>>> = BTreeMap::new();
        for manifest in self.files.values().flat_map(|file| &file.objects) {
            claims.entry(manifest.object.key()).or_default().push(manifest);
        }
        let mut owners = HashMap::with_capacity(claims.len());
        let mut duplicates = Vec::new();
        for (key, claimants) in claims {
            let incumbent = self.owners.get(&key);
            let owner = claimants
                .iter()
                .find(|manifest| incumbent.is_some_and(|name| **name == *manifest.file))
                .unwrap_or(&claimants[0]);
            for other in claimants.iter().filter(|other| other.file != owner.file) {
                duplicates.push(FileError {
                    file: other.file.to_string(),
                    line: other.line,
                    field: "metadata.name".to_owned(),
                    value: key.name.clone(),
                    reason: format!(
                        "{key} is already in {}:{}, which stays in force",
                        owner.file, owner.line
                    ),
                    expected: String::new(),
                });
            }
            owners.insert(key, owner.file.to_string());
        }
        self.owners = owners;
        self.duplicates = duplicates;
    }
}

fn digest(found: &ScannedFile) -> u64 {
    let mut hasher = DefaultHasher::new();
    match found {
        ScannedFile::Text(text) => (0_u8, text).hash(&mut hasher),
        ScannedFile::Bad(reason) => (1_u8, reason).hash(&mut hasher),
    }
    // 0 is what a file has that was never seen.
    hasher.finish().max(1)
}
