//! Network namespaces: hold one, enter it for one closure, and always come back.
//!
//! A namespace belongs to a *thread*. A worker thread that stayed in a pod's namespace would open the next pod's sockets
//! there, under the wrong identity. So the only way in is [`NetNs::run`], which takes a synchronous closure (nothing can
//! be awaited inside) and returns to where the thread was, also on panic; if returning fails the process aborts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process;
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::address::Addresses;
use crate::netlink::NetlinkSocket;

/// The namespace of the calling thread. Not `/proc/self`, which is that of the process's first thread.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// Which namespace it is: two descriptors of one namespace have the same id. An id can come back after the namespace
/// is gone, so it identifies only while a [`NetNs`] of it is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetNsId {
    /// Device of the namespace file system.
    pub dev: u64,
    /// Inode in it.
    pub ino: u64,
}

impl std::fmt::Display for NetNsId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

/// A network namespace, kept alive by the descriptor held here. Share it with `Arc`.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NetNsId,
    netfilter: Mutex<Option<NetlinkSocket>>,
    pub(crate) addresses: Mutex<Option<Addresses>>,
}

impl NetNs {
    /// Opens a namespace by path, such as `/proc/1/ns/net` or a bind mount of one.
    ///
    /// # Errors
    /// Whatever opening gives; [`io::ErrorKind::InvalidInput`] if the file is not a network namespace.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::from_file(File::open(path)?)
    }

    /// Takes over a descriptor of a namespace, for example one that came over a Unix socket.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] if the descriptor is not a network namespace: it comes from another process, and
    /// entering something else must fail here, not later.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        Self::from_file(File::from(fd))
    }

    /// The namespace the calling thread is in.
    ///
    /// # Errors
    /// If `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::open(CURRENT)
    }

    /// A new, empty namespace: only a loopback interface, which is down. It lives as long as the value, a process, a
    /// socket or a bind mount in it.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or when the machine's limit of namespaces is reached.
    pub fn create() -> io::Result<Self> {
        // A thread of its own, because unshare moves the calling thread; it ends at once and takes nothing with it.
        thread::Builder::new()
            .name("netns-create".into())
            .spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET)?;
                Self::current()
            })?
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread that made a namespace panicked")))
    }

    fn from_file(file: File) -> io::Result<Self> {
        let id = id_of(&file)?;
        // Both checks: the file system says it is a namespace, the ioctl says of which kind.
        let not_netns = || io::Error::new(io::ErrorKind::InvalidInput, "not a network namespace");
        let fs = nix::sys::statfs::fstatfs(&file)?;
        if fs.filesystem_type() != nix::sys::statfs::NSFS_MAGIC {
            return Err(not_netns());
        }
        if crate::sys::namespace_kind(file.as_fd())? != libc::CLONE_NEWNET {
            return Err(not_netns());
        }
        Ok(Self { file, id, netfilter: Mutex::default(), addresses: Mutex::default() })
    }

    /// Which namespace this is.
    #[must_use]
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// A second handle on the same namespace.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            id: self.id,
            netfilter: Mutex::default(),
            addresses: Mutex::default(),
        })
    }

    /// Calls `f` with a netfilter socket of this namespace, which stays open until the value is dropped or `f` fails in a way that may
    /// leave answers behind. Closing one waits until the kernel has disposed of every rule that was removed, by whomever: some
    /// 10 to 30 ms just after a flush, which is when there is no time.
    pub(crate) fn netfilter<T>(&self, f: impl FnOnce(&mut NetlinkSocket) -> io::Result<T>) -> io::Result<T> {
        let mut kept = self.netfilter.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out: if `f` panics, so that its socket is in an unknown state, it is gone.
        let mut socket = match kept.take() {
            Some(socket) => socket,
            None => self.run(|| NetlinkSocket::open(libc::NETLINK_NETFILTER))?,
        };
        let outcome = f(&mut socket);
        // "No such table" is an answer.
        if outcome.as_ref().err().is_none_or(|e| e.raw_os_error() == Some(libc::ENOENT)) {
            *kept = Some(socket);
        }
        outcome
    }

    /// Runs `f` with the calling thread inside this namespace, then returns to the one it was in. If the thread is there
    /// already, `f` just runs. Calls nest.
    ///
    /// The closure should only make or configure sockets: a socket stays in the namespace it was made in, so it can be
    /// used from anywhere afterwards. Threads that the closure spawns would start in this namespace and stay: do not.
    ///
    /// # Errors
    /// If entering fails, or what `f` returned. If *returning* fails the process aborts: a thread left in a pod's
    /// namespace is a security hole.
    pub fn run<T>(&self, f: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.run_with(f)?
    }

    /// Like [`run`](Self::run), for a closure whose result is not an `io::Result`.
    ///
    /// # Errors
    /// If entering fails; then `f` did not run.
    pub fn run_with<T>(&self, f: impl FnOnce() -> T) -> io::Result<T> {
        let home = File::open(CURRENT)?;
        if id_of(&home)? == self.id {
            return Ok(f());
        }
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let _return = Return { home };
        Ok(f())
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn id_of(file: &File) -> io::Result<NetNsId> {
    let meta = file.metadata()?;
    Ok(NetNsId { dev: meta.dev(), ino: meta.ino() })
}

/// Takes the thread home when dropped, hence also while unwinding.
struct Return {
    home: File,
}

impl Drop for Return {
    fn drop(&mut self) {
        if let Err(error) = setns(&self.home, CloneFlags::CLONE_NEWNET) {
            eprintln!("fatal: a thread cannot leave a pod's network namespace: {error}");
            process::abort();
        }
    }
}
