//! Notices that something changed on disk. What changed is found out by reading again, so a lost or doubled event does no
//! harm, and a slow rescan finds what no event told.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::directory::{Paths, nodes, redirection_dir};

/// Nothing new for this long: whoever writes has finished.
pub const QUIET: Duration = Duration::from_millis(50);
/// Read after this long even if writing goes on.
pub const LONGEST: Duration = Duration::from_millis(500);
/// Read everything this often, whatever the events say.
pub const RESCAN: Duration = Duration::from_secs(5);

/// What may have changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dirty {
    /// The manifests.
    pub manifests: bool,
    /// Pod or service status.
    pub status: bool,
    /// Redirection status of any node.
    pub redirection: bool,
    /// The file of node tokens.
    pub tokens: bool,
}

/// Watches the directories. Directories that appear later are watched from the next [`Watch::changed`] on.
#[derive(Debug)]
pub struct Watch {
    places: Places,
    marks: Arc<Marks>,
    /// `None` if the system gives no watch: the rescan alone then finds changes.
    watcher: Option<RecommendedWatcher>,
    /// Path and inode: one that was removed and made again is another.
    watched: BTreeSet<(PathBuf, u64)>,
    rescan: Instant,
}

#[derive(Clone, Debug)]
struct Places {
    manifests: PathBuf,
    status: Option<PathBuf>,
    redirection: Option<PathBuf>,
    tokens: Option<PathBuf>,
}

/// What changed since it was last asked. Bits and one wake-up instead of a queue: however fast files change, this takes
/// no more memory.
#[derive(Debug, Default)]
struct Marks {
    bits: AtomicU8,
    changed: Notify,
}

impl Dirty {
    /// Everything.
    pub const ALL: Self = Self { manifests: true, status: true, redirection: true, tokens: true };

    fn bits(self) -> u8 {
        u8::from(self.manifests)
            | u8::from(self.status) << 1
            | u8::from(self.redirection) << 2
            | u8::from(self.tokens) << 3
    }

    fn from_bits(bits: u8) -> Self {
        let at = |place: u8| bits >> place & 1 == 1;
        Self { manifests: at(0), status: at(1), redirection: at(2), tokens: at(3) }
    }
}

impl Watch {
    /// Begins to watch. Changes from here on are told; read once after this.
    pub fn new(paths: &Paths, tokens: Option<&Path>) -> Self {
        let places = Places {
            manifests: absolute(&paths.manifests),
            status: paths.status.as_deref().map(absolute),
            redirection: paths.redirection.as_deref().map(absolute),
            tokens: tokens.map(absolute),
        };
        let marks = Arc::new(Marks::default());
        let (shared, judged) = (marks.clone(), places.clone());
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let dirty = event.map_or(Dirty::ALL, |event| judged.judge(&event));
            if dirty != Dirty::default() {
                shared.bits.fetch_or(dirty.bits(), Ordering::AcqRel);
                shared.changed.notify_one();
            }
        })
        .inspect_err(
            |error| tracing::warn!(%error, "no watch on files; changes are found by looking every 5 s"),
        )
        .ok();
        let mut watch =
            Self { places, marks, watcher, watched: BTreeSet::new(), rescan: Instant::now() + RESCAN };
        watch.cover();
        watch
    }

    /// Waits until something may have changed and writing has paused. Cancel safe: what changed is told next time.
    pub async fn changed(&mut self) -> Dirty {
        self.cover();
        let rescan = self.rescan;
        tokio::select! {
            () = self.marks.changed.notified() => {}
            () = sleep_until(rescan) => {
                self.rescan = Instant::now() + RESCAN;
                self.marks.bits.store(0, Ordering::Release);
                return Dirty::ALL;
            }
        }
        let latest = Instant::now() + LONGEST;
        loop {
            let quiet = (Instant::now() + QUIET).min(latest);
            tokio::select! {
                () = self.marks.changed.notified() => {}
                () = sleep_until(quiet) => break,
            }
        }
        Dirty::from_bits(self.marks.bits.swap(0, Ordering::AcqRel))
    }

    /// Watches every directory that is there by now. Not below them: logs lie beside some.
    fn cover(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        let wanted = self.places.directories();
        for (gone, _) in self.watched.difference(&wanted) {
            // It fails for a directory that is gone, which is what was wanted.
            let _ = watcher.unwatch(gone);
        }
        let mut watched: BTreeSet<(PathBuf, u64)> = self.watched.intersection(&wanted).cloned().collect();
        for (new, inode) in wanted.difference(&self.watched) {
            match watcher.watch(new, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    watched.insert((new.clone(), *inode));
                    // What came between its making and now was seen by nobody.
                    self.marks.bits.fetch_or(self.places.of(&new.join("x")).bits(), Ordering::AcqRel);
                    self.marks.changed.notify_one();
                }
                Err(error) => tracing::debug!(dir = %new.display(), %error, "cannot be watched"),
            }
        }
        self.watched = watched;
    }
}

impl Places {
    /// The directories to watch that exist. At most 16 levels and 10,000 below the manifests, as they are read.
    fn directories(&self) -> BTreeSet<(PathBuf, u64)> {
        let mut found = BTreeSet::new();
        below(&self.manifests, 0, &mut found);
        if let Some(status) = &self.status {
            found.extend([status.clone(), status.join("pods"), status.join("services")]);
        }
        if let Some(root) = &self.redirection {
            found.insert(root.clone());
            for node in nodes(root) {
                found.extend([root.join(&node), redirection_dir(root, &node)]);
            }
        }
        found.extend(self.tokens.as_deref().and_then(Path::parent).map(Path::to_owned));
        let inode = |dir: PathBuf| {
            let metadata = std::fs::metadata(&dir).ok().filter(std::fs::Metadata::is_dir)?;
            Some((dir, metadata.ino()))
        };
        found.into_iter().filter_map(inode).collect()
    }

    fn judge(&self, event: &notify::Event) -> Dirty {
        match event.kind {
            // Closing after writing is where a file is whole.
            EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write) => {
                return Dirty::default();
            }
            _ if event.need_rescan() => return Dirty::ALL,
            _ => {}
        }
        event
            .paths
            .iter()
            .map(|path| self.of(path))
            .fold(Dirty::default(), |all, one| Dirty::from_bits(all.bits() | one.bits()))
    }

    fn of(&self, path: &Path) -> Dirty {
        let under = |root: &Option<PathBuf>| root.as_deref().is_some_and(|root| path.starts_with(root));
        let in_redirection = |root: &Path| match path.strip_prefix(root) {
            // A node, its directory, or a file in that: not the socket, token or logs beside it.
            Ok(rest) => {
                let mut parts = rest.components().skip(1);
                parts.next().is_none_or(|part| part.as_os_str() == "redirection")
            }
            Err(_) => false,
        };
        Dirty {
            manifests: path.starts_with(&self.manifests),
            status: under(&self.status),
            redirection: self.redirection.as_deref().is_some_and(in_redirection),
            tokens: self.tokens.as_deref().is_some_and(|tokens| path == tokens),
        }
    }
}

fn below(dir: &Path, depth: usize, found: &mut BTreeSet<PathBuf>) {
    if depth > 16 || found.len() >= 10_000 {
        return;
    }
    found.insert(dir.to_owned());
    let Ok(listing) = std::fs::read_dir(dir) else { return };
    for entry in listing.flatten() {
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        if !hidden && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below(&entry.path(), depth + 1, found);
        }
    }
}

/// Events name files by the path that was watched.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
