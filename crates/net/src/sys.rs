//! The system calls that need `unsafe`, each wrapped once in a safe function.
#![allow(unsafe_code, reason = "socket options and ancillary data have no safe interface for what we need")]

use std::ffi::CStr;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A C value for which every bit pattern, zero included, is valid, so that the kernel may fill it.
///
/// # Safety
/// Implementors must be plain old data: no references, no niches, no padding that is read.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers and C structs of integers only.
unsafe impl Plain for libc::c_int {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for libc::linger {}
// SAFETY: as above.
unsafe impl Plain for libc::sockaddr_in {}
// SAFETY: as above.
unsafe impl Plain for libc::sockaddr_in6 {}
// SAFETY: as above.
unsafe impl Plain for libc::tcp_info {}
// SAFETY: as above.
unsafe impl Plain for libc::packet_mreq {}
// SAFETY: as above.
unsafe impl Plain for libc::tpacket_stats {}
// SAFETY: as above.
unsafe impl Plain for libc::ucred {}

/// Sets one socket option.
pub(crate) fn set_option<T: Plain>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `value`, which outlives the call.
    let rc = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sets an integer option to 1.
pub(crate) fn enable(fd: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    set_option(fd, level, name, &1_i32)
}

/// Reads one socket option. A kernel that knows a shorter struct leaves the rest zero.
pub(crate) fn get_option<T: Plain>(
    fd: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `value`; the kernel writes at most `len` bytes.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &mut len) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `T: Plain` is valid for any bits, and all of them are initialised (zeroed above).
    Ok(unsafe { value.assume_init() })
}

/// The index of an interface of the current namespace.
pub(crate) fn interface_index(name: &str) -> io::Result<i32> {
    let name = std::ffi::CString::new(name).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    if index == 0 { Err(io::Error::last_os_error()) } else { Ok(index as i32) }
}

/// Binds a packet socket to one interface and to all protocols.
pub(crate) fn bind_packet(fd: BorrowedFd<'_>, ifindex: i32) -> io::Result<()> {
    // SAFETY: sockaddr_ll is plain old data; zero is a valid value of each field.
    let mut addr: libc::sockaddr_ll = unsafe { MaybeUninit::zeroed().assume_init() };
    addr.sll_family = libc::AF_PACKET as u16;
    addr.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    addr.sll_ifindex = ifindex;
    let len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `addr`, which outlives the call.
    let rc = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&addr).cast(), len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives a netlink socket its port number, which the kernel chooses.
pub(crate) fn bind_netlink(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: sockaddr_nl is plain old data; zero is a valid value of each field.
    let mut addr: libc::sockaddr_nl = unsafe { MaybeUninit::zeroed().assume_init() };
    addr.nl_family = libc::AF_NETLINK as u16;
    let len = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `addr`, which outlives the call.
    let rc = unsafe { libc::bind(fd.as_raw_fd(), std::ptr::from_ref(&addr).cast(), len) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Receives one datagram; returns its real length, which may exceed the buffer's.
pub(crate) fn recv_trunc(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length describe `buf`; the kernel writes at most that many bytes.
    let n = unsafe { libc::recv(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), libc::MSG_TRUNC) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Whether `needle` occurs in `haystack`. An empty needle never does.
pub(crate) fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    if needle.is_empty() || needle.len() > haystack.len() {
        return false;
    }
    // SAFETY: both pointers come with the lengths of their own slices.
    let found = unsafe {
        libc::memmem(haystack.as_ptr().cast(), haystack.len(), needle.as_ptr().cast(), needle.len())
    };
    !found.is_null()
}

/// Most file descriptors that one message may bring: the namespace and, in our extension, its listening sockets.
pub(crate) const MAX_FDS: usize = 8;

// Room for one header and `MAX_FDS` descriptors: CMSG_SPACE(8 * 4) is 48 on 64-bit; 16 words of 8 bytes are 128.
type ControlBuffer = [u64; 16];

/// What [`recv_with_fds`] received.
pub(crate) struct Received {
    pub len: usize,
    pub fds: Vec<OwnedFd>,
    /// The data or the descriptors did not fit and part of them is lost.
    pub truncated: bool,
}

/// Sends one packet, with a file descriptor attached if one is given. Returns the bytes sent.
pub(crate) fn send_with_fd(
    fd: BorrowedFd<'_>,
    data: &[u8],
    attach: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let mut control: ControlBuffer = [0; 16];
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: msghdr is plain old data; zero is valid.
    let mut msg: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if let Some(attach) = attach {
        msg.msg_control = control.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute sizes; the first header lies in `control`, which is larger
        // than CMSG_SPACE(4) and aligned for cmsghdr, and its data holds one descriptor.
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as usize;
            std::ptr::write_unaligned(libc::CMSG_DATA(header).cast::<RawFd>(), attach.as_raw_fd());
        }
    }
    // SAFETY: every pointer in `msg` refers to a local that outlives the call.
    let n = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const msg, libc::MSG_NOSIGNAL) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Receives one packet and the descriptors that came with it, each close-on-exec and owned at once, so that none leaks
/// even if the caller refuses the packet.
pub(crate) fn recv_with_fds(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Received> {
    let mut control: ControlBuffer = [0; 16];
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: msghdr is plain old data; zero is valid.
    let mut msg: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a size only.
    msg.msg_controllen = unsafe { libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) } as usize;
    // SAFETY: every pointer in `msg` refers to a local that outlives the call.
    let n = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut msg, libc::MSG_CMSG_CLOEXEC) };
    let len = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;

    let mut fds = Vec::new();
    // SAFETY: the kernel filled `control` with well-formed headers and set msg_controllen; the CMSG functions stay in
    // it. Each SCM_RIGHTS word is a new descriptor of this process that nobody else owns.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const msg);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len - libc::CMSG_LEN(0) as usize;
                for i in 0..bytes / size_of::<RawFd>() {
                    let at = libc::CMSG_DATA(header).cast::<RawFd>().add(i);
                    fds.push(OwnedFd::from_raw_fd(std::ptr::read_unaligned(at)));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const msg, header);
        }
    }
    Ok(Received { len, fds, truncated: msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 })
}

/// The `CLONE_NEW*` flag of a namespace descriptor; `ENOTTY` for anything else.
pub(crate) fn namespace_kind(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    // _IO(0xb7, 3), see ioctl_ns(2).
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    // SAFETY: this request takes no argument and returns an integer.
    let kind = unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) };
    if kind < 0 { Err(io::Error::last_os_error()) } else { Ok(kind) }
}

/// Registers a nonblocking socket with the runtime.
pub(crate) fn watch(socket: socket2::Socket, interest: Interest) -> io::Result<AsyncFd<socket2::Socket>> {
    // SAFETY: a `Socket` owns its descriptor, always returns the same one, and `AsyncFd` gives out only shared
    // references in this crate, so it stays open until it is deregistered.
    Ok(unsafe { AsyncFd::register_with_interest(socket, interest) }?)
}

/// Makes the calling thread run before others of the machine that are not as urgent, -20 being the most (see setpriority(2); with
/// 0 for "who", Linux takes the thread, not the process).
pub(crate) fn set_thread_nice(nice: i32) -> io::Result<()> {
    // SAFETY: takes three numbers and touches no memory of ours.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the calling thread a share of a processor's time that is as large as before, in pieces of this length: see
/// sched_setattr(2). Its policy and nice value stay the ordinary ones.
pub(crate) fn set_thread_slice(nanoseconds: u64) -> io::Result<()> {
    // SAFETY: takes three numbers; 0 for "who" is the calling thread.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_OTHER as u32,
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: nanoseconds,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: reads `size` bytes of `attributes`, which lives until the call returns; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The calling thread's number, as the scheduler's calls take it.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::gettid() }
}

/// Lets a thread (0 is the calling one) run only where nothing else would, or as others do again; its nice value stays.
pub(crate) fn set_thread_idle(thread: i32, idle: bool) -> io::Result<()> {
    let policy = if idle { libc::SCHED_IDLE } else { libc::SCHED_OTHER };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: reads `parameters`, which lives until the call returns. The C library's function of that name takes a thread too.
    match unsafe { libc::syscall(libc::SYS_sched_setscheduler, thread, policy, &raw const parameters) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether a thread is one that [`set_thread_idle`] made so.
#[cfg(test)]
pub(crate) fn is_thread_idle(thread: i32) -> io::Result<bool> {
    // SAFETY: takes a number.
    match unsafe { libc::syscall(libc::SYS_sched_getscheduler, thread) } {
        policy if policy >= 0 => Ok(policy == i64::from(libc::SCHED_IDLE)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The allocator's settings, which it reads before the first allocation of the process; see [`crate::heap`].
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static ALLOCATOR_SETTINGS: &[u8; 46] = b"prof:true,prof_active:false,lg_prof_sample:19\0";

/// Reads a truth value of the allocator.
pub(crate) fn allocator_flag(name: &CStr) -> io::Result<bool> {
    let (mut value, mut length) = (0u8, 1);
    // SAFETY: writes at most `length` bytes, which is what `value` has; all of it lives until the call returns.
    let code = unsafe {
        tikv_jemalloc_sys::mallctl(
            name.as_ptr(),
            (&raw mut value).cast(),
            &raw mut length,
            std::ptr::null_mut(),
            0,
        )
    };
    allocator_result(code).map(|()| value != 0)
}

/// Sets a truth value of the allocator.
pub(crate) fn set_allocator_flag(name: &CStr, mut value: bool) -> io::Result<()> {
    // SAFETY: reads one byte, a bool, which lives until the call returns.
    let code = unsafe {
        let null = std::ptr::null_mut();
        tikv_jemalloc_sys::mallctl(
            name.as_ptr(),
            null,
            null.cast(),
            (&raw mut value).cast(),
            size_of::<bool>(),
        )
    };
    allocator_result(code)
}

/// Has the allocator write its samples to a file of this name.
pub(crate) fn allocator_dump(path: &CStr) -> io::Result<()> {
    let mut name = path.as_ptr();
    // SAFETY: reads one pointer to a string that ends in zero; both live until the call returns.
    let code = unsafe {
        let null = std::ptr::null_mut();
        tikv_jemalloc_sys::mallctl(
            c"prof.dump".as_ptr(),
            null,
            null.cast(),
            (&raw mut name).cast(),
            size_of::<*const libc::c_char>(),
        )
    };
    allocator_result(code)
}

/// Has the allocator return the free pages of all arenas to the system.
pub(crate) fn allocator_purge() -> io::Result<()> {
    // 4096 is MALLCTL_ARENAS_ALL of its header.
    let name = c"arena.4096.purge";
    // SAFETY: this control reads and writes nothing of ours; the name lives until the call returns.
    let code = unsafe {
        let null = std::ptr::null_mut();
        tikv_jemalloc_sys::mallctl(name.as_ptr(), null, null.cast(), null, 0)
    };
    allocator_result(code)
}

fn allocator_result(code: libc::c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}
