//! Reading a directory's files, bounded. Nothing is parsed here.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Largest file.
pub const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;
/// Files in a directory and those below it.
pub const MAX_FILES: usize = 10_000;
/// Text in all of them: what a reader holds at once.
pub const MAX_TOTAL_BYTES: u64 = 64 * 1024 * 1024;
/// Directories within directories.
const MAX_DEPTH: usize = 16;
/// Directory entries looked at, manifests or not.
const MAX_ENTRIES: usize = 100_000;

/// The directory as a whole cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// It, or a directory in it, cannot be listed.
    #[error("{}: cannot read directory: {reason}", path.display())]
    Unreadable {
        /// Which.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// More than [`MAX_FILES`] manifests or 100,000 entries.
    #[error("{}: more than {limit} files", path.display())]
    TooManyFiles {
        /// The directory.
        path: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// More than [`MAX_TOTAL_BYTES`].
    #[error("{}: more than {limit} bytes of manifests", path.display())]
    TooMuchText {
        /// The directory.
        path: PathBuf,
        /// The bound.
        limit: u64,
    },
    /// Directories too deep.
    #[error("{}: more than {MAX_DEPTH} directories deep", path.display())]
    TooDeep {
        /// Where.
        path: PathBuf,
    },
}

/// What one look at a directory found, by the file's path in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scan {
    /// In the order in which objects take precedence.
    pub files: BTreeMap<String, ScannedFile>,
}

/// A manifest file as it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScannedFile {
    /// Its content.
    Text(String),
    /// It is there and cannot be used.
    Bad(String),
}

/// Reads every `*.yaml`, `*.yml` and `*.json` below `dir`. Names that begin with a dot are skipped. A symlink to a file
/// is followed if it ends inside `dir` (a mounted ConfigMap is made of them), a symlink to a directory is not.
///
/// # Errors
/// If a directory cannot be listed or a bound is crossed. A file that cannot be read is a [`ScannedFile::Bad`].
pub fn scan(dir: &Path) -> Result<Scan, DirError> {
    let unreadable = |reason| DirError::Unreadable { path: dir.to_owned(), reason };
    let root = dir.canonicalize().map_err(unreadable)?;
    let mut walk = Walk { root, entries: 0, bytes: 0, found: Scan::default() };
    walk.directory(dir, "", 0)?;
    Ok(walk.found)
}

struct Walk {
    root: PathBuf,
    entries: usize,
    bytes: u64,
    found: Scan,
}

impl Walk {
    fn directory(&mut self, path: &Path, prefix: &str, depth: usize) -> Result<(), DirError> {
        if depth > MAX_DEPTH {
            return Err(DirError::TooDeep { path: path.to_owned() });
        }
        let unreadable = |reason| DirError::Unreadable { path: path.to_owned(), reason };
        let listing = match fs::read_dir(path) {
            Ok(listing) => listing,
            // Removed since its parent was listed.
            Err(error) if depth > 0 && error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(unreadable(error)),
        };
        for entry in listing {
            let entry = entry.map_err(unreadable)?;
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                return Err(DirError::TooManyFiles { path: path.to_owned(), limit: MAX_ENTRIES });
            }
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
            let relative = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.directory(&entry.path(), &relative, depth + 1)?,
                Ok(_) if is_manifest(name) => self.file(&entry.path(), relative)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, relative: String) -> Result<(), DirError> {
        let scanned = match self.read(path) {
            Ok(Some(text)) => ScannedFile::Text(text),
            Ok(None) => return Ok(()),
            Err(reason) => ScannedFile::Bad(reason),
        };
        if let ScannedFile::Text(text) = &scanned {
            self.bytes += text.len() as u64;
        }
        if self.bytes > MAX_TOTAL_BYTES {
            return Err(DirError::TooMuchText { path: path.to_owned(), limit: MAX_TOTAL_BYTES });
        }
        self.found.files.insert(relative, scanned);
        if self.found.files.len() > MAX_FILES {
            return Err(DirError::TooManyFiles { path: path.to_owned(), limit: MAX_FILES });
        }
        Ok(())
    }

    /// `None` if it is gone by now or is no file.
    fn read(&self, path: &Path) -> Result<Option<String>, String> {
        let gone = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Ok(None),
            _ => Err(format!("cannot be read: {error}")),
        };
        let target = match path.canonicalize() {
            Ok(target) => target,
            Err(error) => return gone(error),
        };
        if !target.starts_with(&self.root) {
            return Err("is a link to a file outside the directory".to_owned());
        }
        match fs::metadata(&target) {
            // Opening a pipe would wait for its writer.
            Ok(metadata) if !metadata.is_file() => return Ok(None),
            Ok(_) => {}
            Err(error) => return gone(error),
        }
        let mut bytes = Vec::new();
        match File::open(&target).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)) {
            Ok(_) if bytes.len() as u64 > MAX_FILE_BYTES => {
                Err(format!("is larger than {MAX_FILE_BYTES} bytes"))
            }
            Ok(_) => String::from_utf8(bytes).map(Some).map_err(|_| "is not UTF-8 text".to_owned()),
            Err(error) => gone(error),
        }
    }
}

fn is_manifest(name: &str) -> bool {
    [".yaml", ".yml", ".json"].iter().any(|suffix| name.ends_with(suffix))
}
