//! The last good content of every file, kept on disk: what was in force before a restart is in force after it, also if
//! the file has turned bad since. Otherwise a policy that is being mistyped would vanish when its reader restarts.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{LastGood, Scan, ScannedFile, scan};

/// Says of which directory this is the copy. Names that begin with a dot are no manifests.
const SOURCE: &str = ".source";

/// A copy of the good files of a directory, in a directory of the reader's own.
#[derive(Debug)]
pub struct Mirror {
    dir: PathBuf,
    held: BTreeMap<String, String>,
}

impl Mirror {
    /// Opens the copy of `source` in `dir`, which is made if it is not there, and emptied if it is a copy of another
    /// directory: files of one name are not one file. The scan is what it holds: apply it to a new [`LastGood`] before
    /// the directory itself.
    ///
    /// # Errors
    /// If the directory cannot be made or read, or holds anything else.
    pub fn open(dir: &Path, source: &Path) -> io::Result<(Self, Scan)> {
        let of = source.canonicalize()?.into_os_string().into_encoded_bytes();
        let label = dir.join(SOURCE);
        fs::create_dir_all(dir)?;
        match fs::read(&label) {
            Ok(before) if before == of => {}
            Ok(_) => {
                fs::remove_dir_all(dir)?;
                fs::create_dir_all(dir)?;
                fs::write(&label, of)?;
            }
            Err(_) if fs::read_dir(dir)?.next().is_none() => fs::write(&label, of)?,
            // Somebody's files: nothing here may be removed.
            Err(_) => return Err(io::Error::other("is neither empty nor a copy of manifests")),
        }
        let found = scan(dir).map_err(io::Error::other)?;
        let text = |(name, file): (&String, &ScannedFile)| match file {
            ScannedFile::Text(text) => Some((name.clone(), text.clone())),
            ScannedFile::Bad(_) => None,
        };
        let held = found.files.iter().filter_map(text).collect();
        Ok((Self { dir: dir.to_owned(), held }, found))
    }

    /// Copies what is good and new in `found`, and forgets what is gone. `state` is what came of applying `found`.
    ///
    /// # Errors
    /// The first file that could not be written or removed; the next call tries again.
    pub fn keep(&mut self, found: &Scan, state: &LastGood) -> io::Result<()> {
        let gone: Vec<String> =
            self.held.keys().filter(|name| !found.files.contains_key(*name)).cloned().collect();
        for name in gone {
            match fs::remove_file(self.dir.join(&name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.held.remove(&name),
            };
        }
        for (name, file) in &found.files {
            let good = state.files().get(name).is_some_and(|state| state.errors.is_empty());
            let ScannedFile::Text(text) = file else { continue };
            if good && self.held.get(name) != Some(text) {
                self.write(name, text)?;
                self.held.insert(name.clone(), text.clone());
            }
        }
        Ok(())
    }

    fn write(&self, name: &str, text: &str) -> io::Result<()> {
        let path = self.dir.join(name);
        // A directory that has become a file, or the other way round.
        if path.is_dir() {
            fs::remove_dir_all(&path)?;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        // Names that begin with a dot are not read back.
        let beside = path.with_file_name(".new");
        fs::write(&beside, text)?;
        fs::rename(&beside, &path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n";

    fn found(files: &[(&str, &str)]) -> Scan {
        let files =
            files.iter().map(|(name, text)| ((*name).to_owned(), ScannedFile::Text((*text).to_owned())));
        Scan { files: files.collect() }
    }

    /// One run of a reader: what it has in force at its end.
    fn run(dir: &Path, looks: &[Scan]) -> Vec<String> {
        run_of(dir, dir.parent().unwrap(), looks)
    }

    fn run_of(dir: &Path, source: &Path, looks: &[Scan]) -> Vec<String> {
        let (mut mirror, before) = Mirror::open(dir, source).unwrap();
        let mut state = LastGood::default();
        state.apply(before);
        for look in looks {
            state.apply(look);
            mirror.keep(look, &state).unwrap();
        }
        state.loaded().objects.iter().map(|it| it.object.key().to_string()).collect()
    }

    #[test]
    fn somebody_elses_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("mine.txt"), "x").unwrap();
        assert!(Mirror::open(dir.path(), Path::new("/")).is_err());
        assert!(dir.path().join("mine.txt").exists());
    }

    #[test]
    fn what_was_good_before_a_restart_is_in_force_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("copy");
        let other = GOOD.replace("name: a", "name: b");
        let both = found(&[("sub/a.yaml", GOOD), ("b.yaml", &other)]);
        assert_eq!(run(&at, &[both]), ["Namespace b", "Namespace a"]);
        // It turned bad while nobody looked.
        let bad = found(&[("sub/a.yaml", "{"), ("b.yaml", &other)]);
        assert_eq!(run(&at, std::slice::from_ref(&bad)), ["Namespace b", "Namespace a"]);
        assert_eq!(run(&at, &[bad]), ["Namespace b", "Namespace a"]);
        // One is gone: not brought back.
        assert_eq!(run(&at, &[found(&[("sub/a.yaml", "{")])]), ["Namespace a"]);
        assert_eq!(run(&at, &[found(&[])]), [""; 0]);
        assert_eq!(run(&at, &[found(&[("sub/a.yaml", "{")])]), [""; 0]);
        // Another directory's files of the same name are others.
        assert_eq!(run(&at, &[found(&[("a.yaml", GOOD)])]), ["Namespace a"]);
        assert_eq!(run_of(&at, Path::new("/"), &[found(&[("a.yaml", "{")])]), [""; 0]);
        // A directory's name becomes a file's.
        assert_eq!(run(&at, &[found(&[("x.yaml/a.yaml", GOOD)])]), ["Namespace a"]);
        assert_eq!(run(&at, &[found(&[("x.yaml", GOOD)])]), ["Namespace a"]);
    }
}
