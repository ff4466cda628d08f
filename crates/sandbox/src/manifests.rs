//! Watches the directory of manifests: what is in force goes out whole whenever it changes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_k8s_api::manifest::{DirError, LastGood, Loaded, scan};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;

/// A burst of changes (an editor, `git checkout`) is one change; well below the second within which one must be in force.
const SETTLE: Duration = Duration::from_millis(50);
/// A look without any event, for what inotify cannot see (network file systems, targets of symlinks).
const RESCAN: Duration = Duration::from_secs(5);

/// The watched directory.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    state: LastGood,
    events: mpsc::Receiver<()>,
    /// The last look failed: the next that succeeds is news even if nothing else changed.
    failed: bool,
    _watcher: Option<RecommendedWatcher>,
}

impl Manifests {
    /// Reads the directory for the first time and watches it from then on. Without inotify it is looked at every five
    /// seconds.
    pub fn open(dir: &Path) -> Result<(Manifests, Loaded), DirError> {
        // One is enough: it only says "look again".
        let (sender, events) = mpsc::channel(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            if !event.is_ok_and(|event| event.kind.is_access()) {
                let _ = sender.try_send(());
            }
        })
        .and_then(|mut watcher: RecommendedWatcher| {
            watcher.watch(dir, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        let watcher = watcher
            .inspect_err(|error| tracing::warn!(%error, "no change events: looking every {RESCAN:?}"))
            .ok();
        let mut state = LastGood::default();
        state.apply(scan(dir)?);
        let loaded = state.loaded();
        Ok((Manifests { dir: dir.to_owned(), state, events, failed: false, _watcher: watcher }, loaded))
    }

    /// Waits for the next change of what is in force. Cancel safe: a change that was not returned is found again.
    pub async fn changed(&mut self) -> Result<Loaded, DirError> {
        loop {
            let event = tokio::time::timeout(RESCAN, self.events.recv()).await;
            match event {
                Ok(Some(())) => tokio::time::sleep(SETTLE).await,
                Ok(None) => tokio::time::sleep(RESCAN).await,
                Err(_) => {}
            }
            while self.events.try_recv().is_ok() {}
            let found = scan(&self.dir).inspect_err(|_| self.failed = true)?;
            if self.state.apply(found) | std::mem::take(&mut self.failed) {
                return Ok(self.state.loaded());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[tokio::test]
    async fn a_directory_that_comes_back_is_news() {
        let dir = tempfile::tempdir().unwrap();
        let (path, away) = (dir.path().join("m"), dir.path().join("away"));
        fs::create_dir(&path).unwrap();
        fs::write(path.join("ns.yaml"), "apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n").unwrap();
        let (mut manifests, loaded) = Manifests::open(&path).unwrap();
        assert_eq!(loaded.namespaces().count(), 1);
        fs::rename(&path, &away).unwrap();
        manifests.changed().await.unwrap_err();
        fs::rename(&away, &path).unwrap();
        assert_eq!(manifests.changed().await.unwrap(), loaded);
    }
}
