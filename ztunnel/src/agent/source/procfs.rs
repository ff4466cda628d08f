//! Finding the network namespace of a pod that runs by its processes (C29), and the kubelet by its name (C58).
//!
//! A container's cgroup names the pod's uid. The oldest process of a pod is its sandbox's first, which lives as long as the namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Names under which a kubelet runs, by itself or inside a distribution's one program.
const KUBELETS: [&str; 6] = ["kubelet", "kubelite", "k3s", "k3s-server", "k3s-agent", "rke2"];
/// Processes of one node that are looked at; the kernel's default `pid_max` on large machines is 4 Mi, a node of 250 pods has thousands.
const MAX_PROCESSES: usize = 1 << 20;

/// Which namespace a file stands for: device and inode.
pub type NsId = (u64, u64);

/// A pod's namespace, as a process of the pod shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `<proc>/<pid>/ns/net`.
    pub path: PathBuf,
    /// To notice that the process number is another's now.
    pub id: NsId,
    /// Clock ticks after boot.
    started: u64,
}

impl Found {
    /// The process still shows the same namespace.
    pub fn holds(&self) -> bool {
        ns_id(&self.path).is_ok_and(|id| id == self.id)
    }
}

/// The namespace that a path stands for.
///
/// # Errors
/// Whatever looking at the file gives.
pub fn ns_id(path: &Path) -> io::Result<NsId> {
    fs::metadata(path).map(|it| (it.dev(), it.ino()))
}

/// Each pod that has a process, by the uid in its cgroup. Processes in the namespace of the node's first process are left out: they
/// belong to pods with `hostNetwork`.
///
/// # Errors
/// `proc` is no proc file system.
pub fn pods(proc: &Path) -> io::Result<BTreeMap<String, Found>> {
    let host = ns_id(&proc.join("1/ns/net"))?;
    let mut found: BTreeMap<String, Found> = BTreeMap::new();
    for dir in processes(proc)? {
        // Whatever of it is gone by now: the process ended.
        let Some((uid, it)) = pod_of(&dir) else { continue };
        if it.id != host && found.get(&uid).is_none_or(|other| it.started < other.started) {
            found.insert(uid, it);
        }
    }
    Ok(found)
}

/// Each network namespace that a process of the node is in, once, but for the node's own.
///
/// # Errors
/// `proc` is no proc file system.
pub fn namespaces(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let mut seen = BTreeSet::from([ns_id(&proc.join("1/ns/net"))?]);
    let paths = processes(proc)?.map(|dir| dir.join("ns/net"));
    Ok(paths.filter(|path| ns_id(path).is_ok_and(|id| seen.insert(id))).collect())
}

/// The user whose process is the node's kubelet; `None` if none is found.
pub fn kubelet_uid(proc: &Path) -> Option<u32> {
    let named = |dir: &PathBuf| {
        fs::read_to_string(dir.join("comm")).is_ok_and(|name| KUBELETS.contains(&name.trim()))
    };
    let dir = processes(proc).ok()?.find(named)?;
    fs::metadata(dir).ok().map(|it| it.uid())
}

fn processes(proc: &Path) -> io::Result<impl Iterator<Item = PathBuf>> {
    let is_pid = |name: &str| name.bytes().all(|b| b.is_ascii_digit());
    Ok(fs::read_dir(proc)?
        .flatten()
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_pid))
        .map(|entry| entry.path())
        .take(MAX_PROCESSES))
}

fn pod_of(dir: &Path) -> Option<(String, Found)> {
    let cgroup = fs::read_to_string(dir.join("cgroup")).ok()?;
    let uid = cgroup.lines().find_map(uid_in)?;
    let path = dir.join("ns/net");
    let id = ns_id(&path).ok()?;
    let started = started(&fs::read_to_string(dir.join("stat")).ok()?)?;
    Some((uid, Found { path, id, started }))
}

/// Of a line of /proc/PID/cgroup. The cgroupfs driver makes `pod<uid>`, the systemd driver `...-pod<uid with _>.slice`.
fn uid_in(line: &str) -> Option<String> {
    line.rsplit('/').find_map(|part| {
        let (_, uid) = part.strip_suffix(".slice").unwrap_or(part).rsplit_once("pod")?;
        let uid = uid.replace('_', "-");
        let hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
        // A pod from a file has a hash of 32 digits.
        (matches!(uid.len(), 32 | 36) && hex(&uid)).then_some(uid)
    })
}

/// Field 22 of /proc/PID/stat. The second is the name in brackets, which may hold anything.
fn started(stat: &str) -> Option<u64> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0f3a2b1c-1111-2222-3333-444455556666";

    fn process(proc: &Path, pid: u32, cgroup: &str, ns: &str, started: u64, name: &str) {
        let dir = proc.join(pid.to_string());
        fs::create_dir_all(dir.join("ns")).unwrap();
        fs::write(dir.join("cgroup"), cgroup).unwrap();
        fs::write(dir.join("comm"), format!("{name}\n")).unwrap();
        let zeros = "0 ".repeat(18);
        fs::write(dir.join("stat"), format!("{pid} ({name}) S {zeros}{started} 0")).unwrap();
        let target = proc.join(format!("ns-{ns}"));
        fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(target, dir.join("ns/net")).unwrap();
    }

    /// C29: as cgroupfs and systemd, containerd and CRI-O write it, in either version of cgroups.
    #[test]
    fn a_cgroup_names_the_pod() {
        let systemd = UID.replace('-', "_");
        for line in [
            format!("0::/kubepods/burstable/pod{UID}/abc"),
            format!("5:cpu:/x/kubepods/pod{UID}"),
            format!("11:memory:/kubelet/kubepods/besteffort/pod{UID}/0123abcd"),
            format!("0::/kubepods.slice/kubepods-pod{systemd}.slice/crio-0123abcd.scope/init"),
            // As a container with a cgroup namespace of its own sees another's.
            format!("0::/../../kubepods-burstable-pod{systemd}.slice/cri-containerd-1.scope"),
            format!(
                "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice/cri-containerd-1.scope"
            ),
        ] {
            assert_eq!(uid_in(&line).as_deref(), Some(UID), "{line}");
        }
        assert_eq!(uid_in("0::/kubepods/podabc/x"), None);
        assert_eq!(uid_in("0::/system.slice/kubelet.service"), None);
        assert_eq!(uid_in(&format!("0::/machine.slice/libpod-{}.scope", "a".repeat(64))), None);
        assert_eq!(uid_in(&format!("0::/pod{}/x", "a".repeat(32))), Some("a".repeat(32)));
    }

    /// C29.
    #[test]
    fn the_oldest_process_outside_the_nodes_namespace_shows_the_pods() {
        let dir = tempfile::tempdir().unwrap();
        let proc = dir.path();
        let cgroup = format!("0::/kubepods/pod{UID}/c");
        process(proc, 1, "0::/init.scope", "host", 1, "init");
        process(proc, 30, &cgroup, "host", 5, "hostnet");
        process(proc, 40, &cgroup, "other", 90, "a) b (c");
        process(proc, 50, &cgroup, "pod", 20, "pause");
        fs::create_dir(proc.join("60")).unwrap();
        let found = pods(proc).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(namespaces(proc).unwrap().len(), 2);
        assert_eq!(found[UID].path, proc.join("50/ns/net"));
        assert!(found[UID].holds());
        fs::remove_dir_all(proc.join("50")).unwrap();
        assert!(!found[UID].holds());
        assert_eq!(pods(proc).unwrap()[UID].path, proc.join("40/ns/net"));
    }

    /// C58.
    #[test]
    fn the_kubelet_is_known_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        process(dir.path(), 1, "", "host", 1, "init");
        assert_eq!(kubelet_uid(dir.path()), None);
        process(dir.path(), 7, "", "host", 1, "kubelet");
        assert_eq!(kubelet_uid(dir.path()), Some(fs::metadata(dir.path()).unwrap().uid()));
    }
}
