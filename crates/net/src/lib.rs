//! Sockets, network namespaces and redirect rules: everything culvert asks of the Linux kernel.
//!
//! This is the only crate of the workspace with `unsafe`, and inside it only the module `sys` has any: a handful of system calls
//! that no safe wrapper offers. Everything above it is safe code with typed values.
//!
//! | module | what it does |
//! |---|---|
//! | [`netns`] | enter a namespace for one synchronous closure, and always come back |
//! | [`socket`] | listeners, transparent dials, original destination, TCP options |
//! | [`nft`] | nf_tables transactions over netlink |
//! | [`redirect`] | the rules and routes of an enrolled pod |
//! | [`NetNs::has_address`] | whether an interface of a namespace has an address |
//! | [`link`], [`hold`] | a pod's interface on the node's side, and stopping its traffic there |
//! | [`capture`] | counting packets on an interface, for proofs about the wire |
//! | [`heap`] | the allocator's sampling, for heap profiles |
//! | [`seqpacket`] | Unix sequenced packets that carry file descriptors |
//! | [`sysctl`] | settings of a namespace |

mod address;
mod background;
pub mod capture;
pub mod heap;
pub mod hold;
pub mod link;
mod netlink;
pub mod netns;
pub mod nft;
pub mod probes;
pub mod redirect;
mod route;
pub mod seqpacket;
pub mod socket;
mod sys;
pub mod sysctl;

pub use background::{Background, Stay};
pub use netns::{NetNs, NetNsId};

/// Lets the calling thread run before nearly all others of the machine: for one that must react within milliseconds on a node
/// whose processors are busy, and has little to do.
///
/// # Errors
/// Without `CAP_SYS_NICE`.
pub fn hurry_thread() -> std::io::Result<()> {
    sys::set_thread_nice(-19)
}

/// Lets the calling thread run as soon as there is something for it to do, in short pieces: for one that carries traffic, and
/// waits most of the time. It gets no more of a processor than before. The kernel's default piece is about 3 ms, and who wakes
/// waits for the end of another's; with a shorter piece it does not (Linux 6.12, without effect before).
///
/// # Errors
/// The system refuses: a seccomp profile, or a real-time policy set from outside.
pub fn prompt_thread() -> std::io::Result<()> {
    sys::set_thread_slice(100_000)
}

/// Lets the calling thread give way to the others of its process where processors are busy: for work in large pieces that
/// traffic must not wait for. It still gets a ninth of what each of them gets, so it never starves.
///
/// # Errors
/// The system refuses, which it has no reason to: everyone may give way.
pub fn defer_thread() -> std::io::Result<()> {
    sys::set_thread_nice(10)
}
