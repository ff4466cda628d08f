//! A network namespace that is kept by a bind mount, so that other processes can open it by its path.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io, thread};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

/// What the kernel identifies a namespace by: device and inode of its file. Numbers are reused once it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetNsId {
    device: u64,
    inode: u64,
}

/// A network namespace, named by the path of its bind mount. Dropping this does not remove it: see [`NetNs::remove`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetNs {
    path: PathBuf,
}

/// Why a namespace could not be made, entered or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetNsError {
    /// The namespace could not be made.
    #[error("cannot create network namespace {path}: {source} (root is needed)", path = path.display())]
    Create {
        /// Where it was to be.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace could not be entered.
    #[error("cannot enter network namespace {path}: {source}", path = path.display())]
    Enter {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The namespace's mount could not be removed.
    #[error("cannot remove network namespace {path}: {source}", path = path.display())]
    Remove {
        /// Its file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl NetNs {
    /// Makes a new, empty namespace and mounts it at `path` (the parent must exist).
    pub fn create(path: &Path) -> Result<NetNs, NetNsError> {
        let failed = |source| NetNsError::Create { path: path.to_owned(), source };
        File::options().write(true).create_new(true).open(path).map_err(failed)?;
        // A thread of its own: unshare changes the calling thread for good.
        let made = thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET)?;
                    let own = "/proc/thread-self/ns/net";
                    mount(Some(own), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                })
                .join()
                .expect("the thread has nothing that panics")
        });
        if let Err(errno) = made {
            let _ = fs::remove_file(path);
            return Err(failed(errno.into()));
        }
        Ok(NetNs { path: path.to_owned() })
    }

    /// Names a namespace that exists already (mounted, or a `/proc/PID/ns/net`).
    pub fn at(path: impl Into<PathBuf>) -> NetNs {
        NetNs { path: path.into() }
    }

    /// The file that other processes open.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel's identity of the namespace.
    pub fn id(&self) -> io::Result<NetNsId> {
        NetNsId::of(&self.path)
    }

    /// Runs `work` on a new thread inside the namespace and waits for it. Sockets made there stay in the namespace, so this
    /// is also how an asynchronous program gets one. `work` should be short: the caller's thread waits.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetNsError> {
        let failed = |source| NetNsError::Enter { path: self.path.clone(), source };
        let file = File::open(&self.path).map_err(failed)?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                setns(file, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            match inside.join() {
                Ok(outcome) => outcome.map_err(|errno: nix::Error| failed(errno.into())),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// Unmounts the namespace and removes its file. The kernel frees it when the last process and socket have left.
    pub fn remove(&self) -> Result<(), NetNsError> {
        let failed = |source| NetNsError::Remove { path: self.path.clone(), source };
        match umount2(&self.path, MntFlags::MNT_DETACH) {
            // EINVAL: not a mount point (a crash between making the file and mounting).
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }
}

impl NetNsId {
    /// The identity behind a namespace file such as `/proc/PID/ns/net`.
    pub fn of(path: &Path) -> io::Result<NetNsId> {
        fs::metadata(path).map(|meta| NetNsId { device: meta.dev(), inode: meta.ino() })
    }
}
