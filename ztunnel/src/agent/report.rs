//! What was done for each pod, where the control plane reads it: it takes a pod for one that speaks HBONE only when it is
//! reported enabled (C09, C10), so the report comes last when joining and goes first when leaving.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use culvert_k8s_api::status::RedirectionStatus;

use super::annotate::Annotations;

/// Where reports go.
#[derive(Debug)]
pub enum Reports {
    /// One file a pod.
    Files(Files),
    /// An annotation of each pod.
    Annotations(Arc<Annotations>),
}

/// One file a pod, `<node>/redirection/<uid>.json`.
#[derive(Debug)]
pub struct Files {
    dir: PathBuf,
}

impl Reports {
    /// Reports in files under the node's directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(node_dir: &Path) -> anyhow::Result<Self> {
        Files::open(node_dir).map(Self::Files)
    }

    /// Says how far a pod is, or begins to.
    ///
    /// # Errors
    /// It cannot be said.
    pub fn set(&self, uid: &str, status: &RedirectionStatus) -> anyhow::Result<()> {
        match self {
            Self::Files(files) => files.set(uid, status),
            Self::Annotations(annotations) => {
                annotations.set(uid, Some(status.redirection));
                annotations.trouble(uid, status.error.as_deref());
                Ok(())
            }
        }
    }

    /// What keeps a pod from being reported at all; `None` when that is over.
    pub fn trouble(&self, uid: &str, why: Option<&str>) {
        match self {
            Self::Files(_) => {}
            Self::Annotations(annotations) => annotations.trouble(uid, why),
        }
    }

    /// Nobody comes after this agent: what may not be written any more is left as it is.
    pub fn leaving(&self) {
        match self {
            Self::Files(_) => {}
            Self::Annotations(annotations) => annotations.leaving(),
        }
    }

    /// Takes a pod's report away; none is as good. False while that is under way: it is to be asked again.
    ///
    /// # Errors
    /// It cannot be taken away.
    pub fn clear(&self, uid: &str) -> anyhow::Result<bool> {
        match self {
            Self::Files(files) => files.clear(uid).map(|()| true),
            Self::Annotations(annotations) => Ok(annotations.clear(uid)),
        }
    }

    /// Nothing is waiting to be said of this pod.
    pub fn is_said(&self, uid: &str) -> bool {
        match self {
            Self::Files(_) => true,
            Self::Annotations(annotations) => annotations.is_said(uid),
        }
    }

    /// Whether this pod is reported, by whoever did.
    pub fn is_reported(&self, uid: &str) -> bool {
        match self {
            Self::Files(files) => files.get(uid).is_some(),
            Self::Annotations(annotations) => annotations.get(uid).is_some(),
        }
    }

    /// The pods reported by whoever ran here before.
    pub fn reported(&self) -> Vec<String> {
        match self {
            Self::Files(files) => files.reported(),
            Self::Annotations(annotations) => annotations.reported(),
        }
    }
}

impl Files {
    /// Makes the directory.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(node_dir: &Path) -> anyhow::Result<Self> {
        let dir = node_dir.join("redirection");
        fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
        Ok(Self { dir })
    }

    /// Writes a pod's report, whole or not at all.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn set(&self, uid: &str, status: &RedirectionStatus) -> anyhow::Result<()> {
        let path = self.path(uid)?;
        let bytes = serde_json::to_vec(status)?;
        if fs::read(&path).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        let temporary = path.with_extension("tmp");
        fs::write(&temporary, &bytes).with_context(|| format!("writing {}", temporary.display()))?;
        fs::rename(&temporary, &path).with_context(|| format!("renaming to {}", path.display()))
    }

    /// Takes a pod's report away; none is as good.
    ///
    /// # Errors
    /// The file is there and cannot be removed.
    pub fn clear(&self, uid: &str) -> anyhow::Result<()> {
        let path = self.path(uid)?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// The report of this pod, by whoever wrote it; one that cannot be read says nothing.
    pub fn get(&self, uid: &str) -> Option<RedirectionStatus> {
        serde_json::from_slice(&fs::read(self.path(uid).ok()?).ok()?).ok()
    }

    /// The pods reported by whoever ran here before.
    pub fn reported(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".json").map(str::to_owned))
            .collect()
    }

    fn path(&self, uid: &str) -> anyhow::Result<PathBuf> {
        let plain = !uid.is_empty()
            && uid.len() <= 128
            && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        anyhow::ensure!(plain, "pod uid {uid:?} must be 1 to 128 letters, digits and '-'");
        Ok(self.dir.join(format!("{uid}.json")))
    }
}
