//! Unix sockets of sequenced packets (`SOCK_SEQPACKET`): each message arrives whole, and may bring file descriptors.
//! This is what the node-agent protocol runs on (C60 to C64).

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Largest message the protocol allows (C64).
pub const MAX_MESSAGE: usize = 1024;
/// Proxies that may wait to be accepted: at most the old and the new one of a rolling update, and one retrying.
const BACKLOG: i32 = 16;
/// A path longer than this does not fit `sun_path` (108 bytes with the final NUL).
const MAX_PATH: usize = 107;

/// Waits for peers at a path. The path is removed when this is dropped, unless a
/// successor has taken it over.
#[derive(Debug)]
pub struct SeqPacketListener {
    socket: AsyncFd<Socket>,
    path: PathBuf,
    /// Device and inode of our file at `path`.
    file: (u64, u64),
}

/// One connection.
#[derive(Debug)]
pub struct SeqPacket {
    socket: AsyncFd<Socket>,
}

/// Who is at the other end, as the kernel recorded it at connect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Process, or 0 if it is not visible from here.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl SeqPacketListener {
    /// Listens at `path`, replacing a socket that a dead process left there. Only the owner can connect (mode 0600).
    /// Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `AlreadyExists` if something other than a socket is there.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        match fs::symlink_metadata(&path) {
            Ok(meta) if meta.file_type().is_socket() => fs::remove_file(&path)?,
            Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let socket = new_socket()?;
        // The mode of a socket before bind is the mode of the file that bind makes: it is never open to others.
        nix::sys::stat::fchmod(&socket, nix::sys::stat::Mode::from_bits_truncate(0o600))?;
        with_address(&path, |address| socket.bind(address))?;
        let file = file_id(&path)?;
        socket.listen(BACKLOG)?;
        Ok(Self { socket: sys::watch(socket, Interest::READABLE)?, path, file })
    }

    /// Waits for the next peer. Safe to cancel.
    ///
    /// # Errors
    /// What accept gives, such as no descriptors left.
    pub async fn accept(&self) -> io::Result<SeqPacket> {
        let socket = self.socket.async_io(Interest::READABLE, |s| s.accept().map(|(s, _)| s)).await?;
        socket.set_nonblocking(true)?;
        SeqPacket::new(socket)
    }
}

impl Drop for SeqPacketListener {
    fn drop(&mut self) {
        // A successor may have put its own socket there already.
        if file_id(&self.path).is_ok_and(|file| file == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl SeqPacket {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    /// `NotFound` or `ConnectionRefused` when nobody listens there; `WouldBlock` when its queue is full.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let socket = new_socket()?;
        // A Unix connect succeeds or fails at once.
        with_address(path.as_ref(), |address| socket.connect(address))?;
        Self::new(socket)
    }

    /// Two connected ends.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (a, b) = Socket::pair(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)?;
        Ok((Self::new(a)?, Self::new(b)?))
    }

    fn new(socket: Socket) -> io::Result<Self> {
        Ok(Self { socket: sys::watch(socket, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Sends one message, with a descriptor attached if given. Safe to cancel: a message goes whole or not at all.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] for an empty message (it would read as the end) or one above [`MAX_MESSAGE`];
    /// `BrokenPipe` when the peer is gone.
    pub async fn send(&self, data: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        if data.is_empty() || data.len() > MAX_MESSAGE {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a message is 1 to 1024 bytes"));
        }
        self.socket.async_io(Interest::WRITABLE, |s| sys::send_with_fd(s.as_fd(), data, fd).map(|_| ())).await
    }

    /// Receives one message and its descriptors (close-on-exec); `None` when the peer closed. Safe to cancel.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidData`] for a message above [`MAX_MESSAGE`] or with more than eight descriptors. What came of
    /// it is discarded and its descriptors closed; the next message is intact.
    pub async fn recv(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let mut buf = vec![0; MAX_MESSAGE];
        let received =
            self.socket.async_io(Interest::READABLE, |s| sys::recv_with_fds(s.as_fd(), &mut buf)).await?;
        if received.truncated {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("a message exceeds {MAX_MESSAGE} bytes or {} descriptors", sys::MAX_FDS),
            ));
        }
        if received.len == 0 {
            return Ok(None);
        }
        buf.truncate(received.len);
        Ok(Some((buf, received.fds)))
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// Only if the kernel does not know.
    pub fn peer(&self) -> io::Result<Peer> {
        let cred: libc::ucred =
            sys::get_option(self.socket.get_ref().as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED)?;
        Ok(Peer { pid: cred.pid, uid: cred.uid, gid: cred.gid })
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let meta = fs::symlink_metadata(path)?;
    Ok((meta.dev(), meta.ino()))
}

fn new_socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking(), None)
}

/// Calls `f` with the address of a path. One too long for an address is reached through its directory's descriptor:
/// `/proc/self/fd/N/name` is short.
fn with_address(path: &Path, f: impl FnOnce(&SockAddr) -> io::Result<()>) -> io::Result<()> {
    if path.as_os_str().len() <= MAX_PATH {
        return f(&SockAddr::unix(path)?);
    }
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = fs::OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir)?;
    let short = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    f(&SockAddr::unix(short)?)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn a_message_brings_its_descriptor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = SeqPacketListener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let client = SeqPacket::connect(&path).await.unwrap();
        let server = listener.accept().await.unwrap();
        assert_eq!(server.peer().unwrap().pid, std::process::id() as i32);

        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"through the socket").unwrap();
        file.rewind().unwrap();
        client.send(b"add", Some(file.as_fd())).await.unwrap();
        client.send(b"bare", None).await.unwrap();

        let (data, mut fds) = server.recv().await.unwrap().unwrap();
        assert_eq!((data.as_slice(), fds.len()), (&b"add"[..], 1));
        let fd = fds.remove(0);
        let flags = nix::fcntl::fcntl(&fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags & libc::FD_CLOEXEC, libc::FD_CLOEXEC);
        let mut text = String::new();
        fs::File::from(fd).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through the socket");

        let (data, fds) = server.recv().await.unwrap().unwrap();
        assert_eq!((data.as_slice(), fds.len()), (&b"bare"[..], 0));
        drop(client);
        assert!(server.recv().await.unwrap().is_none());
        assert!(server.send(b"late", None).await.is_err());
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn too_large_is_refused_and_the_next_message_is_intact() {
        let (a, b) = SeqPacket::pair().unwrap();
        assert!(a.send(&[0; MAX_MESSAGE + 1], None).await.is_err());
        assert!(a.send(&[], None).await.is_err());
        sys::send_with_fd(a.socket.get_ref().as_fd(), &[7; MAX_MESSAGE + 1], None).unwrap();
        a.send(b"next", None).await.unwrap();
        assert_eq!(b.recv().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(b.recv().await.unwrap().unwrap().0, b"next");
    }

    /// C60.
    #[tokio::test]
    async fn a_stale_socket_is_replaced_a_file_is_not_and_paths_may_be_long() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(100)).join("e".repeat(100));
        fs::create_dir_all(&deep).unwrap();
        let path = deep.join("s");
        // What a killed process leaves: the file without a listener.
        let stale = new_socket().unwrap();
        with_address(&path, |a| stale.bind(a)).unwrap();
        drop(stale);
        assert!(SeqPacket::connect(&path).await.is_err());
        let listener = SeqPacketListener::bind(&path).unwrap();
        let _client = SeqPacket::connect(&path).await.unwrap();
        listener.accept().await.unwrap();

        // The next agent takes over; the old one's end does not take its path away.
        let successor = SeqPacketListener::bind(&path).unwrap();
        drop(listener);
        let _client = SeqPacket::connect(&path).await.unwrap();
        successor.accept().await.unwrap();

        let file = dir.path().join("file");
        fs::write(&file, "precious").unwrap();
        assert_eq!(SeqPacketListener::bind(&file).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&file).unwrap(), b"precious");
    }
}
