//! The kubelet's probes, on the node's side: which connections of the node may bear the address that pods let pass in plaintext.
//!
//! ```text
//!  kubelet ── output: its user, its cgroup, a probed port ── connection mark ──► postrouting: source = probe address ──► pod
//!  anybody who bears that address without this ──► dropped, from the node itself and from outside
//! ```
//!
//! Where ambient translates whatever a process of the node sends to an enrolled pod (C50), this asks who sends, and to which port.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ipnet::IpNet;

use crate::NetNs;
use crate::nft::{Batch, Chain, Cmp, HookPoint, HookType, NftError, Rule, Set, SetKey, Verdict, read_table};
use crate::redirect::RedirectConfig;

/// Name of the table of family inet in the node's namespace.
pub const TABLE: &str = "culvert_probes";
/// Pairs of pod address and port. At 44 bytes an element the transaction stays under 1 MB.
pub const MAX_TARGETS: usize = 16 * 1024;

const SETS: [&str; 2] = ["probed_v4", "probed_v6"];
/// Says, on the node, that a connection is a probe; within the twelve bits that the mesh uses of every mark.
const PROBE_MARK: u32 = 0x127;
const MASK: u32 = 0xfff;
/// Before connection tracking.
const RAW: i32 = -300;
/// After the destination is settled.
const FILTER: i32 = 0;
/// Just before everybody else's source NAT: what comes first holds.
const SOURCE_NAT: i32 = 99;

/// Who the kubelet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kubelet {
    /// Its user.
    pub uid: u32,
    /// Where it runs, if that is to count.
    pub cgroup: Option<Cgroup>,
}

/// A cgroup of version 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Steps below the root.
    pub level: u32,
    /// The kernel's number.
    pub id: u64,
}

impl Cgroup {
    /// The cgroup of a directory such as `/sys/fs/cgroup/system.slice/kubelet.service`. One that is removed and made again is another.
    ///
    /// # Errors
    /// If it is not there, or not of version 2.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let of_cgroups = |path: &Path| {
            Ok(nix::sys::statfs::statfs(path)?.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
        };
        if !of_cgroups(&path)? {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a cgroup of version 2"));
        }
        let mut level = 0;
        for above in path.ancestors().skip(1) {
            let inside: io::Result<bool> = of_cgroups(above);
            if !inside? {
                break;
            }
            level += 1;
        }
        Ok(Self { level, id: fs::metadata(&path)?.ino() })
    }
}

/// Lets the kubelet probe exactly these addresses and ports, replacing what was there; without any, takes everything away.
///
/// # Errors
/// See [`NftError`]: then what was in force still is. Before kernel 5.13 a cgroup is refused.
pub fn set(node: &NetNs, kubelet: Kubelet, targets: &BTreeSet<SocketAddr>) -> Result<(), NftError> {
    if targets.len() > MAX_TARGETS {
        return Err(NftError::TooLarge(targets.len()));
    }
    let mut batch = Batch::new();
    if targets.is_empty() {
        return batch.delete_table(TABLE).commit(node);
    }
    batch.replace_table(TABLE);
    for set in sets(targets) {
        batch.add_set(TABLE, &set);
    }
    let chains = chains(kubelet);
    for (chain, rules) in &chains {
        batch.add_chain(TABLE, chain);
        for rule in rules {
            batch.add_rule(TABLE, &chain.name, rule);
        }
    }
    batch.commit(node)
}

/// Whether [`set`] with the same arguments would change nothing.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn holds(node: &NetNs, kubelet: Kubelet, targets: &BTreeSet<SocketAddr>) -> io::Result<bool> {
    let installed = match read_table(node, TABLE, &SETS) {
        Ok(installed) => installed,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            // A table without its sets is there all the same.
            let gone = read_table(node, TABLE, &[]).is_err();
            return Ok(gone && targets.is_empty());
        }
        Err(error) => return Err(error),
    };
    let chains = chains(kubelet);
    let bare: Vec<Chain> = chains.iter().map(|(chain, _)| chain.clone()).collect();
    Ok(!targets.is_empty()
        && installed.has_chains(&bare)
        && chains.iter().all(|(chain, rules)| installed.has_rules(&chain.name, rules))
        && sets(targets).iter().enumerate().all(|(index, set)| installed.has_set(index, set)))
}

/// What may be probed now, by whoever said so.
#[must_use]
pub fn targets(node: &NetNs) -> BTreeSet<SocketAddr> {
    let Ok(table) = read_table(node, TABLE, &SETS) else { return BTreeSet::new() };
    SETS.iter().enumerate().flat_map(|(index, _)| table.pairs(index)).collect()
}

fn sets(targets: &BTreeSet<SocketAddr>) -> [Set; 2] {
    let [v4, v6] = SETS.map(str::to_owned);
    [
        Set { name: v4, key: SetKey::Ipv4Port(targets.clone()) },
        Set { name: v6, key: SetKey::Ipv6Port(targets.clone()) },
    ]
}

fn chains(kubelet: Kubelet) -> Vec<(Chain, Vec<Rule>)> {
    let sources = sources();
    let bears =
        |source: &IpAddr| Rule::new("only translation gives this address").source(IpNet::from(*source));
    let arriving = sources
        .iter()
        .map(|source| bears(source).iifname(Cmp::Ne, "lo").counter().verdict(Verdict::Drop))
        .collect();
    let mut output: Vec<Rule> =
        sources.iter().map(|source| bears(source).counter().verdict(Verdict::Drop)).collect();
    for (set, v6) in SETS.into_iter().zip([false, true]) {
        let probe =
            Rule::new("the kubelet's probes").tcp().destination_and_port_in(set, v6).skuid(kubelet.uid);
        let probe = match kubelet.cgroup {
            Some(cgroup) => probe.cgroup(cgroup.level, cgroup.id),
            None => probe,
        };
        output.push(probe.set_ct_mark(PROBE_MARK, MASK));
    }
    let translate = |source: &IpAddr| {
        let probe = Rule::new("probes bear the probe address").tcp().ct_mark(Cmp::Eq, PROBE_MARK, MASK);
        let family = if source.is_ipv4() { probe.ipv4() } else { probe.ipv6() };
        family.snat(SocketAddr::new(*source, 0))
    };
    let postrouting = sources.iter().map(translate).collect();
    let base = Chain::base;
    vec![
        (base("prerouting", HookType::Filter, HookPoint::Prerouting, RAW), arriving),
        (base("output", HookType::Filter, HookPoint::Output, FILTER), output),
        (base("postrouting", HookType::Nat, HookPoint::Postrouting, SOURCE_NAT), postrouting),
    ]
}

/// The addresses that pods let pass.
fn sources() -> Vec<IpAddr> {
    let pods = RedirectConfig::default();
    pods.probe_source.map(IpAddr::from).into_iter().chain(pods.probe_source_v6.map(IpAddr::from)).collect()
}
