//! The allocator: sampling of what is allocated where, and giving memory back. It is here because calling the allocator
//! needs `unsafe`.
//!
//! Programs whose allocator is jemalloc have sampling built in and off: off, an allocation costs the countdown that the
//! allocator keeps in any case. On, about one of each 512 KiB allocated has its stack noted. What was allocated before it
//! was switched on is not seen.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::sys;

/// Longest dump read: an entry has about 300 bytes, and there is one for each distinct stack.
const MAX_DUMP: u64 = 64 << 20;

/// Whether this process can sample at all.
#[must_use]
pub fn available() -> bool {
    // Names the settings, so that the linker keeps them.
    !sys::ALLOCATOR_SETTINGS.is_empty() && sys::allocator_flag(c"opt.prof").unwrap_or(false)
}

/// Whether it samples now.
#[must_use]
pub fn active() -> bool {
    sys::allocator_flag(c"prof.active").unwrap_or(false)
}

/// Switches sampling on or off for all threads.
///
/// # Errors
/// The allocator cannot sample.
pub fn set_active(active: bool) -> io::Result<()> {
    sys::set_allocator_flag(c"prof.active", active)
}

/// Gives back to the system all pages that are free and kept for reuse, of all threads. Without it pages stay until their
/// thread allocates again some ten seconds later; a thread that sleeps keeps them.
///
/// # Errors
/// The allocator refused.
pub fn give_back() -> io::Result<()> {
    sys::allocator_purge()
}

/// What is held by samples so far and not freed yet, in jemalloc's text form (`heap_v2`).
///
/// # Errors
/// The allocator cannot sample, or there is no memory for the text.
pub fn dump() -> io::Result<String> {
    let file = File::from(memfd_create(c"heap", MFdFlags::MFD_CLOEXEC)?);
    // The allocator wants a name to open; this one is the file in memory.
    let path = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no byte is zero");
    sys::allocator_dump(&path)?;
    let mut text = String::new();
    file.take(MAX_DUMP).read_to_string(&mut text)?;
    Ok(text)
}
