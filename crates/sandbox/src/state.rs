//! The state directory: where everything lies, files that are whole or absent, and the lock that keeps two supervisors apart.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::process::Record;

/// Where `culvert up` keeps its state unless told otherwise.
pub const DEFAULT_DIR: &str = "/run/culvert";

/// A Unix socket's path has at most 107 bytes, and the longest below the state directory is `nodes/NODE/ztunnel.sock` with
/// a node name of 40: 107 - 20 - 40, rounded down.
pub const MAX_PATH: usize = 44;

/// Longest node name: see [`MAX_PATH`].
pub const MAX_NODE_NAME: usize = 40;

/// The paths below one state directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateDir {
    root: PathBuf,
}

/// Held while a supervisor owns the state directory. The kernel releases it when the process ends in whatever way.
#[derive(Debug)]
pub struct Lock {
    _file: Flock<File>,
}

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another supervisor runs there.
    #[error("{path} is in use by another `culvert up`", path = path.display())]
    InUse {
        /// The state directory.
        path: PathBuf,
    },
    /// Sockets below it would not fit.
    #[error("the state directory {path} is too long: at most {MAX_PATH} bytes", path = path.display())]
    TooLong {
        /// The state directory.
        path: PathBuf,
    },
    /// A file or directory could not be read or written.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// The action.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file holds something else than it should.
    #[error("{path} is not what was expected: {source}", path = path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl StateDir {
    /// The state directory at `root`, made absolute. Nothing is created yet.
    pub fn new(root: &Path) -> Result<StateDir, StateError> {
        let root = std::path::absolute(root).map_err(io_error("use", root))?;
        if root.as_os_str().len() > MAX_PATH {
            return Err(StateError::TooLong { path: root });
        }
        Ok(StateDir { root })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Namespace files.
    pub fn netns(&self) -> PathBuf {
        self.root.join("netns")
    }

    /// One record for each process that was started.
    pub fn processes(&self) -> PathBuf {
        self.root.join("processes")
    }

    /// What pods and services are: `pods/` and `services/` below.
    pub fn status(&self) -> PathBuf {
        self.root.join("status")
    }

    /// Status file of a pod.
    pub fn pod_status(&self, namespace: &str, name: &str) -> PathBuf {
        self.status().join("pods").join(format!("{namespace}.{name}.json"))
    }

    /// Status file of a service.
    pub fn service_status(&self, namespace: &str, name: &str) -> PathBuf {
        self.status().join("services").join(format!("{namespace}.{name}.json"))
    }

    /// A pod's own directory: logs and the files that its containers see.
    pub fn pod(&self, namespace: &str, name: &str) -> PathBuf {
        self.root.join("pods").join(format!("{namespace}.{name}"))
    }

    /// All node directories.
    pub fn nodes(&self) -> PathBuf {
        self.root.join("nodes")
    }

    /// A node's directory.
    pub fn node(&self, node: &str) -> PathBuf {
        self.nodes().join(node)
    }

    /// What the node's agent says about the pod with this uid.
    pub fn redirection(&self, node: &str, uid: &str) -> PathBuf {
        self.node(node).join("redirection").join(format!("{uid}.json"))
    }

    /// The controller's directory.
    pub fn controller(&self) -> PathBuf {
        self.root.join("controller")
    }

    /// The supervisor's account of everything: see [`crate::report`].
    pub fn report(&self) -> PathBuf {
        self.root.join("report.json")
    }

    /// Where the supervisor takes requests.
    pub fn control_socket(&self) -> PathBuf {
        self.root.join("supervisor.sock")
    }

    /// Log of a supervisor in the background.
    pub fn supervisor_log(&self) -> PathBuf {
        self.root.join("supervisor.log")
    }

    /// The name service order of pods: files, then DNS. A machine may ask its own resolver first otherwise.
    pub fn nsswitch(&self) -> PathBuf {
        self.root.join("nsswitch.conf")
    }

    fn lock_file(&self) -> PathBuf {
        self.root.join("lock")
    }

    /// Makes the directory and takes the lock, or says that another has it.
    pub fn lock(&self) -> Result<Lock, StateError> {
        fs::create_dir_all(&self.root).map_err(io_error("create", &self.root))?;
        let path = self.lock_file();
        let file = File::options().create(true).append(true).open(&path).map_err(io_error("open", &path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // For `culvert down`, which ends the holder.
                let text = serde_json::to_vec(&Record::own("supervisor"))
                    .map_err(|source| StateError::Form { path: path.clone(), source })?;
                file.set_len(0).and_then(|()| file.write_all(&text)).map_err(io_error("write", &path))?;
                Ok(Lock { _file: file })
            }
            Err((_, nix::Error::EWOULDBLOCK)) => Err(StateError::InUse { path: self.root.clone() }),
            Err((_, errno)) => Err(io_error("lock", &path)(errno.into())),
        }
    }

    /// The process that holds the lock or held it last.
    pub fn holder(&self) -> Option<Record> {
        read_json(&self.lock_file()).ok().flatten()
    }

    /// Whether a supervisor holds the lock now.
    pub fn in_use(&self) -> bool {
        // Shared, so that two who ask at once do not see each other.
        File::open(self.lock_file()).is_ok_and(|file| {
            matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, nix::Error::EWOULDBLOCK)))
        })
    }

    /// Removes everything that a run leaves here, the directory too if nothing else is in it. The namespaces must be
    /// unmounted. `keep` names entries to leave in place.
    pub fn remove(&self, keep: &[&str]) -> Result<(), StateError> {
        const FILES: [&str; 5] =
            ["report.json", "supervisor.sock", "supervisor.log", "nsswitch.conf", "lock"];
        const DIRECTORIES: [&str; 5] = ["processes", "status", "pods", "nodes", "controller"];
        for name in DIRECTORIES.iter().filter(|name| !keep.contains(name)) {
            let path = self.root.join(name);
            absent_is_fine(fs::remove_dir_all(&path)).map_err(io_error("remove", &path))?;
        }
        for name in FILES.iter().filter(|name| !keep.contains(name)) {
            let path = self.root.join(name);
            absent_is_fine(fs::remove_file(&path)).map_err(io_error("remove", &path))?;
        }
        // Somebody else's files in it are none of ours.
        let _ = fs::remove_dir(&self.root);
        Ok(())
    }
}

/// Writes a file in one step: a reader sees the old one or the new one, whole. Missing directories are made.
pub fn write_whole(path: &Path, contents: &[u8], mode: u32) -> Result<(), StateError> {
    use std::os::unix::fs::OpenOptionsExt;
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io_error("create", parent))?;
    // Readers skip names that start with a dot; one writer a file, so the name cannot clash.
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or(OsStr::new("file")));
    name.push(".tmp");
    let temporary = parent.join(name);
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temporary)
        .map_err(io_error("write", &temporary))?;
    file.write_all(contents).map_err(io_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("write", path))
}

/// [`write_whole`] of JSON, readable by all.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StateError> {
    let mut text =
        serde_json::to_vec(value).map_err(|source| StateError::Form { path: path.to_owned(), source })?;
    text.push(b'\n');
    write_whole(path, &text, 0o644)
}

/// Reads JSON; `None` if there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|source| StateError::Form { path: path.to_owned(), source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(io_error("read", path)(source)),
    }
}

/// Removes a file; one that is not there is no error.
pub fn remove_file(path: &Path) -> Result<(), StateError> {
    absent_is_fine(fs::remove_file(path)).map_err(io_error("remove", path))
}

/// 32 bytes from the kernel, as hexadecimal.
pub fn random_token() -> Result<String, StateError> {
    let path = Path::new("/dev/urandom");
    let mut bytes = [0; 32];
    File::open(path).and_then(|mut file| file.read_exact(&mut bytes)).map_err(io_error("read", path))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A fresh UUID from the kernel.
pub fn random_uuid() -> Result<String, StateError> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    Ok(fs::read_to_string(path).map_err(io_error("read", path))?.trim().to_owned())
}

pub(crate) fn io_error<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io { what, path: path.to_owned(), source }
}

fn absent_is_fine(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_supervisor_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(&dir.path().join("s")).unwrap();
        assert!(!state.in_use());
        let lock = state.lock().unwrap();
        assert!(state.in_use());
        assert!(state.holder().unwrap().runs());
        assert!(matches!(state.lock(), Err(StateError::InUse { .. })));
        drop(lock);
        assert!(!state.in_use());
        state.lock().unwrap();
    }

    #[test]
    fn removal_spares_what_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path()).unwrap();
        write_json(&state.pod_status("n", "p"), &1).unwrap();
        fs::write(dir.path().join("notes"), "mine").unwrap();
        state.remove(&[]).unwrap();
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["notes"]);
    }

    #[test]
    fn tokens_are_long_and_differ() {
        let token = random_token().unwrap();
        assert_eq!(token.len(), 64);
        assert_ne!(token, random_token().unwrap());
        assert_eq!(random_uuid().unwrap().len(), 36);
    }

    #[test]
    fn a_long_directory_is_refused_before_sockets_fail() {
        assert!(matches!(
            StateDir::new(Path::new(&format!("/{}", "x".repeat(MAX_PATH)))),
            Err(StateError::TooLong { .. })
        ));
    }
}
