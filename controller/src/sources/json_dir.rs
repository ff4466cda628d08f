//! A directory of small JSON files, each about one thing, written by another program.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use culvert_k8s_api::manifest::FileError;
use serde::de::DeserializeOwned;

/// One status is a few hundred bytes.
const MAX_FILE_BYTES: u64 = 64 * 1024;
/// Pods of one machine, many times over.
const MAX_FILES: usize = 20_000;

/// Files by name, each with what it said last that could be read.
#[derive(Clone, Debug)]
pub(super) struct JsonDir<T> {
    files: BTreeMap<String, Entry<T>>,
    /// About the directory as a whole.
    error: Option<FileError>,
    /// Files whose word is another since it was last asked.
    changed: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Entry<T> {
    text: Vec<u8>,
    good: Option<T>,
    error: Option<FileError>,
}

impl<T> Default for JsonDir<T> {
    fn default() -> Self {
        Self { files: BTreeMap::new(), error: None, changed: BTreeSet::new() }
    }
}

impl<T: DeserializeOwned> JsonDir<T> {
    /// Reads the directory again. One that does not exist (yet) is empty; one that cannot be listed changes nothing. A file
    /// that cannot be read as `T` keeps what it said before.
    pub fn refresh(&mut self, dir: &Path) {
        let mut before = std::mem::take(&mut self.files);
        let read = self.read(dir, &mut before);
        self.error = None;
        match read {
            // What is left of the old ones is gone.
            Ok(()) => self.changed.extend(before.into_keys()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.changed.extend(std::mem::take(&mut self.files).into_keys());
                self.changed.extend(before.into_keys());
            }
            Err(error) => {
                self.files.extend(before);
                self.error = Some(bad(dir, 0, &error.to_string()));
            }
        }
    }

    /// The files whose word is another than when this was last asked, with what each says now; `None` where it says nothing
    /// any more.
    pub fn take_changed(&mut self) -> Vec<(String, Option<&T>)> {
        let changed = std::mem::take(&mut self.changed);
        changed
            .into_iter()
            .map(|name| {
                let says = self.files.get(&name).and_then(|entry| entry.good.as_ref());
                (name, says)
            })
            .collect()
    }

    /// What each file says, by its name.
    #[cfg(test)]
    pub fn values(&self) -> impl Iterator<Item = (&str, &T)> {
        self.files.iter().filter_map(|(name, entry)| Some((name.as_str(), entry.good.as_ref()?)))
    }

    /// What is wrong.
    pub fn errors(&self) -> impl Iterator<Item = &FileError> {
        self.files.values().filter_map(|entry| entry.error.as_ref()).chain(&self.error)
    }

    /// Moves what is there from `all` to its own files, read again.
    fn read(&mut self, dir: &Path, all: &mut BTreeMap<String, Entry<T>>) -> io::Result<()> {
        for found in fs::read_dir(dir)? {
            let found = found?;
            let Ok(name) = found.file_name().into_string() else { continue };
            if name.starts_with('.')
                || !name.ends_with(".json")
                || !found.file_type().is_ok_and(|kind| kind.is_file())
            {
                continue;
            }
            if self.files.len() == MAX_FILES {
                return Err(io::Error::other(format!("more than {MAX_FILES} files")));
            }
            let path = found.path();
            let before = all.remove(&name);
            if before.is_none() {
                self.changed.insert(name.clone());
            }
            let mut text = Vec::new();
            match File::open(&path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)) {
                Ok(_) => {}
                // Replaced or removed since it was listed; the watch says so again.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    self.changed.insert(name);
                    continue;
                }
                Err(error) => {
                    let error = Some(bad(&path, 0, &error.to_string()));
                    let good = before.and_then(|before| before.good);
                    self.files.insert(name, Entry { text: Vec::new(), good, error });
                    continue;
                }
            }
            if before.as_ref().is_none_or(|before| before.text != text) {
                self.changed.insert(name.clone());
            }
            self.files.insert(name, entry(&path, text, before));
        }
        Ok(())
    }
}

fn entry<T: DeserializeOwned>(path: &Path, text: Vec<u8>, before: Option<Entry<T>>) -> Entry<T> {
    if let Some(before) = before {
        if before.text == text {
            return before;
        }
        return entry_anew(path, text, before.good);
    }
    entry_anew(path, text, None)
}

fn entry_anew<T: DeserializeOwned>(path: &Path, text: Vec<u8>, last: Option<T>) -> Entry<T> {
    if text.len() as u64 > MAX_FILE_BYTES {
        let error = Some(bad(path, 0, &format!("is larger than {MAX_FILE_BYTES} bytes")));
        return Entry { text, good: last, error };
    }
    match serde_json::from_slice(&text) {
        Ok(good) => Entry { text, good: Some(good), error: None },
        Err(error) => {
            let line = u32::try_from(error.line()).unwrap_or(u32::MAX);
            Entry { text, good: last, error: Some(bad(path, line, &error.to_string())) }
        }
    }
}

fn bad(path: &Path, line: u32, reason: &str) -> FileError {
    FileError {
        file: path.display().to_string(),
        line,
        field: String::new(),
        value: String::new(),
        reason: reason.to_owned(),
        expected: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut read = JsonDir::<u16>::default();
        let mut told = || {
            read.refresh(dir.path());
            let changed = read.take_changed();
            changed.into_iter().map(|(name, says)| (name, says.copied())).collect::<Vec<_>>()
        };
        fs::write(at("a.json"), "1").unwrap();
        fs::write(at("b.json"), "2").unwrap();
        assert_eq!(told(), [("a.json".to_owned(), Some(1)), ("b.json".to_owned(), Some(2))]);
        assert_eq!(told(), []);
        fs::write(at("b.json"), "3").unwrap();
        fs::remove_file(at("a.json")).unwrap();
        assert_eq!(told(), [("a.json".to_owned(), None), ("b.json".to_owned(), Some(3))]);
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(told(), [("b.json".to_owned(), None)]);
    }

    #[test]
    fn a_file_that_turns_bad_keeps_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut read = JsonDir::<u16>::default();
        read.refresh(&at("not yet"));
        assert_eq!((read.values().count(), read.errors().count()), (0, 0));
        fs::write(at("a.json"), "1").unwrap();
        fs::write(at("b.json"), "x").unwrap();
        fs::write(at(".c.json"), "3").unwrap();
        fs::write(at("d.json.tmp"), "4").unwrap();
        read.refresh(dir.path());
        assert_eq!(read.values().collect::<Vec<_>>(), [("a.json", &1)]);
        assert_eq!(read.errors().count(), 1);
        fs::write(at("a.json"), "70000").unwrap();
        fs::write(at("b.json"), "2").unwrap();
        read.refresh(dir.path());
        assert_eq!(read.values().collect::<Vec<_>>(), [("a.json", &1), ("b.json", &2)]);
        assert_eq!(read.errors().next().unwrap().line, 1);
        fs::remove_file(at("a.json")).unwrap();
        read.refresh(dir.path());
        assert_eq!(read.values().collect::<Vec<_>>(), [("b.json", &2)]);
    }
}
