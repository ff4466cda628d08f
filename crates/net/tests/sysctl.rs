//! Settings of a namespace where `/proc/sys` is read-only, as it is in a container. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

use std::fs;

use culvert_net::NetNs;
use culvert_net::redirect::{Established, set_established};
use culvert_net::sysctl;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

const NONE: Option<&str> = None;

/// U12: an agent in a container keeps the connections of a running pod, through another mount of the settings.
#[test]
fn settings_are_written_by_their_other_mount_where_the_usual_one_is_read_only() {
    // This thread alone sees the mounts below.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).unwrap();
    let other = tempfile::tempdir().unwrap();
    mount(Some("/proc/sys/net"), other.path(), NONE, MsFlags::MS_BIND, NONE).unwrap();
    mount(Some("/proc/sys"), "/proc/sys", NONE, MsFlags::MS_BIND, NONE).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(NONE, "/proc/sys", NONE, read_only, NONE).unwrap();

    let pod = NetNs::create().unwrap();
    let loose = || fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_loose");
    let before = pod.run(loose).unwrap();
    // What cannot be written is no error, and changes nothing.
    set_established(&pod, Established::Keep).unwrap();
    assert_eq!(pod.run(loose).unwrap(), before);
    sysctl::writable_at(other.path().to_owned());
    set_established(&pod, Established::Keep).unwrap();
    assert_eq!(pod.run(loose).unwrap().trim(), "0");
    set_established(&pod, Established::Cut).unwrap();
    assert_eq!(pod.run(loose).unwrap().trim(), "1");
}
