//! What makes a pod part of the mesh: rules that send its TCP to the proxy, and the routes that bring replies back.
//!
//! ```text
//!  application ── connect ──► output nat ──► 15001 proxy ── mark 0x539 ──► wire
//!  wire ──► prerouting nat ──► 15006 proxy ── mark 0x539, client's address ──► lo ──► application
//!  application ── reply to the client's address ──► output mangle: mark 0x111 ──► table 100 ──► lo ──► proxy
//! ```
//!
//! The last line is the part that is easy to get wrong: the application answers to an address that is not here. Four
//! things bring that answer back to the proxy, and each is needed: the proxy's socket has mark 0x539; prerouting turns it
//! into connection mark 0x111; output restores that into the packet's mark; the routing rule sends marked packets to
//! table 100, where every address is local.
//!
//! Everything is in one inet table and one transaction, so there is no moment in which half of it is in force. The rules
//! are those of ambient (rows C35 to C46), with conntrack redirection and not tproxy (C41).

mod guard;
mod rules;

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::NetNs;
use crate::netlink::Message;
use crate::nft::{Batch, NftError, read_table};
use crate::route::{Family, MarkRule, Routing, ipv6_enabled};

pub use guard::{Guard, stopped};

/// Name of the table of family inet that holds all of it.
pub const TABLE: &str = "culvert";
/// Name of the table that closes a pod while its rules are written again.
const GATE: &str = "culvert_gate";
/// Routing table in which every address is local (C39).
pub const ROUTE_TABLE: u8 = 100;
/// Preference of the routing rule (C39).
pub const RULE_PREFERENCE: u32 = 32764;
/// Exclusions of one pod, addresses, ports and interfaces together, and its probes' ports. Bounds the transaction and what a pod's annotation can cost.
pub const MAX_EXCLUSIONS: usize = 1024;

/// Whether connections may be tracked from the middle; a namespace is made with 1.
const TCP_LOOSE: &str = "netfilter/nf_conntrack_tcp_loose";

/// A value under a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The bits that must be set so.
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

/// What to redirect, and where to. The default is ambient's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedirectConfig {
    /// Where connections of the pod's programs go.
    pub outbound_port: u16,
    /// Where plaintext connections to the pod go.
    pub inbound_port: u16,
    /// The tunnel's own port: never redirected.
    pub hbone_port: u16,
    /// Where DNS queries go, UDP and TCP; without it DNS is like any other traffic.
    pub dns_port: Option<u16>,
    /// Whether IPv6 is redirected too. If not, IPv6 passes untouched.
    pub ipv6: bool,
    /// Mark of the proxy's own packets (C40).
    pub proxy_mark: Mark,
    /// Mark of connections that the proxy opened to the application, and of the replies (C40).
    pub return_mark: Mark,
    /// Address from which the kubelet's probes appear to come: plaintext, at [`probe_ports`](Self::probe_ports) never redirected (C42).
    pub probe_source: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub probe_source_v6: Option<Ipv6Addr>,
    /// The ports that the pod's probes declare. Unlike C42, probes pass at no other.
    pub probe_ports: BTreeSet<u16>,
    /// Interfaces behind which other machines or containers are: TCP that arrives there is the pod's own outbound traffic (C13).
    pub virtual_interfaces: BTreeSet<String>,
    /// Destinations that the pod reaches without the mesh. TCP only, and DNS capture comes first.
    pub exclude_outbound: Vec<IpNet>,
    /// Destination ports that the pod reaches without the mesh. TCP only, and DNS capture comes first.
    pub exclude_outbound_ports: BTreeSet<u16>,
    /// Ports of the pod that the mesh leaves alone.
    pub exclude_inbound_ports: BTreeSet<u16>,
    /// Redirect nothing that arrives, and exempt no probes (C12): for a gateway that takes its traffic itself.
    pub bypass_inbound: bool,
}

impl Default for RedirectConfig {
    fn default() -> Self {
        Self {
            outbound_port: 15001,
            inbound_port: 15006,
            hbone_port: 15008,
            dns_port: Some(15053),
            ipv6: true,
            proxy_mark: Mark { value: 0x539, mask: 0xfff },
            return_mark: Mark { value: 0x111, mask: 0xfff },
            probe_source: Some(Ipv4Addr::new(169, 254, 7, 127)),
            probe_source_v6: Some(Ipv6Addr::new(
                0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff,
            )),
            probe_ports: BTreeSet::new(),
            virtual_interfaces: BTreeSet::new(),
            exclude_outbound: Vec::new(),
            exclude_outbound_ports: BTreeSet::new(),
            exclude_inbound_ports: BTreeSet::new(),
            bypass_inbound: false,
        }
    }
}

impl RedirectConfig {
    /// The same without redirecting anything: for a running pod that leaves the mesh, whose proxy still delivers what peers
    /// send until they have heard of it, and needs the way back for it.
    #[must_use]
    pub fn return_path_only(&self) -> Self {
        let everywhere = [Ipv4Net::default().into(), Ipv6Net::default().into()];
        Self {
            dns_port: None,
            bypass_inbound: true,
            virtual_interfaces: BTreeSet::new(),
            exclude_outbound: everywhere.to_vec(),
            ..self.clone()
        }
    }
}

/// Why redirection could not be changed or read.
#[derive(Debug, thiserror::Error)]
pub enum RedirectError {
    /// The rules' transaction failed, and so changed nothing.
    #[error(transparent)]
    Rules(#[from] NftError),
    /// The routing rule or route failed.
    #[error("policy routing: {0}")]
    Routes(#[source] io::Error),
    /// The rules could not be read.
    #[error("reading the rules: {0}")]
    Read(#[source] io::Error),
    /// More than [`MAX_EXCLUSIONS`].
    #[error("{0} exclusions exceed {MAX_EXCLUSIONS}")]
    TooManyExclusions(usize),
}

/// What becomes of connections that are older than a pod's redirection.
///
/// Connection tracking starts with the rules. By default it would take the next packet of an old connection for the start of a new
/// one and redirect it: the connection breaks (U12). Told not to pick up connections half-way (`nf_conntrack_tcp_loose` of the
/// pod's namespace), it leaves such packets untracked, and what is not tracked is not redirected.
///
/// The rules themselves redirect any first packet, not only a SYN. A rule for SYN alone would open a hole: a stray ACK would make
/// a tracked connection that is not redirected, and a SYN with the same ports would then follow it past the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Established {
    /// They go on as they are until they end, in plaintext and judged by no policy, also under STRICT. For a running pod that
    /// joins.
    Keep,
    /// They break at their next packet. For a pod whose redirection was in force and was lost: what opened meanwhile went around the
    /// mesh.
    Cut,
}

/// Whether redirection holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Exactly what the configuration asks for.
    Intact,
    /// Nothing of it is there.
    Missing,
    /// Something differs, said in words.
    Altered(String),
}

/// Says what becomes of connections older than the rules; call it before [`install`]. Nothing else depends on it, so where the
/// setting cannot be written (connection tracking is not loaded yet, `/proc/sys` is read-only) they are cut.
///
/// # Errors
/// If the namespace cannot be entered, or an unexpected error of the write.
pub fn set_established(ns: &NetNs, established: Established) -> io::Result<()> {
    use io::ErrorKind::{NotFound, PermissionDenied, ReadOnlyFilesystem};
    let value = match established {
        Established::Keep => "0",
        Established::Cut => "1",
    };
    match ns.run(|| crate::sysctl::write(TCP_LOOSE, value)) {
        Err(error) if !matches!(error.kind(), NotFound | PermissionDenied | ReadOnlyFilesystem) => Err(error),
        _ => Ok(()),
    }
}

/// Puts a pod's redirection in force, replacing what was there. Doing it again changes nothing.
///
/// Routes come first: alone they affect no packet, as nothing else sets the mark. `lo` must be up.
///
/// # Errors
/// See [`RedirectError`]. After an error the rules are the old ones.
pub fn install(ns: &NetNs, config: &RedirectConfig) -> Result<(), RedirectError> {
    let exclusions = config.exclude_outbound.len()
        + config.exclude_outbound_ports.len()
        + config.exclude_inbound_ports.len()
        + config.probe_ports.len()
        + config.virtual_interfaces.len();
    if exclusions > MAX_EXCLUSIONS {
        return Err(RedirectError::TooManyExclusions(exclusions));
    }
    // Best effort: without it a proxy that is replaced resets what had connected and was not accepted yet.
    let _ = ns.run(crate::socket::migrate_when_closed);
    let (mut routing, families) = routing(ns, config)?;
    for family in families {
        routing
            .add_local_default(family, ROUTE_TABLE)
            .and_then(|()| routing.add_rule(family, mark_rule(config)))
            .map_err(RedirectError::Routes)?;
    }
    let program = rules::program(config);
    let mut batch = Batch::new();
    batch.replace_table(TABLE);
    program.put(&mut batch, TABLE);
    Ok(batch.commit(ns)?)
}

/// Like [`install`], for a pod whose rules were lost, and which must not get around them: nothing enters or leaves meanwhile, and
/// what was tracked is forgotten.
///
/// Tracking outlives the rules by some milliseconds, and precedes them by as many when they are written. Connections of that time
/// are tracked and not redirected, and later ones from the same port would follow them around the proxy for days. Connections
/// through the proxy may break as well.
///
/// # Errors
/// See [`RedirectError`]. After an error nothing may enter or leave until a later call succeeds.
pub fn install_closed(ns: &NetNs, config: &RedirectConfig) -> Result<(), RedirectError> {
    rules::gate(GATE).commit(ns)?;
    install(ns, config)?;
    forget_connections(ns).map_err(RedirectError::Read)?;
    let mut open = Batch::new();
    Ok(open.delete_table(GATE).commit(ns)?)
}

/// Empties the connection tracking table of a namespace. A kernel without ctnetlink cannot, and keeps them.
fn forget_connections(ns: &NetNs) -> io::Result<()> {
    // Subsystem 1, delete; without a filter it means all. The header is of any family.
    let message = Message::new(1 << 8 | 2, 0, &[0; 4]);
    match ns.netfilter(|socket| socket.request(message)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(()),
        outcome => outcome,
    }
}

/// Takes a pod's redirection away; what is missing is ignored (C49).
///
/// # Errors
/// See [`RedirectError`].
pub fn remove(ns: &NetNs) -> Result<(), RedirectError> {
    let mut batch = Batch::new();
    batch.delete_table(TABLE).delete_table(GATE).commit(ns)?;
    // Both families, whatever was configured: IPv6 may have been switched off since.
    let mut routing = ns.run(Routing::open).map_err(RedirectError::Routes)?;
    for family in [Family::V4, Family::V6] {
        routing
            .delete_rules(family, RULE_PREFERENCE, ROUTE_TABLE)
            .and_then(|()| routing.delete_local_default(family, ROUTE_TABLE))
            .map_err(RedirectError::Routes)?;
    }
    set_established(ns, Established::Cut).map_err(RedirectError::Routes)
}

/// Whether a pod has rules of ours at all, whatever they say.
///
/// # Errors
/// When the kernel cannot be asked.
pub fn is_installed(ns: &NetNs) -> Result<bool, RedirectError> {
    match read_table(ns, TABLE, &[]) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(RedirectError::Read(error)),
    }
}

/// Compares what is in force with what should be, down to each expression of each rule.
///
/// # Errors
/// When the kernel cannot be asked. That says nothing about the rules: ask again.
pub fn verify(ns: &NetNs, config: &RedirectConfig) -> Result<Verdict, RedirectError> {
    let program = rules::program(config);
    let names: Vec<&str> = program.sets.iter().map(|s| s.name.as_str()).collect();
    let installed = match read_table(ns, TABLE, &names) {
        Ok(installed) => installed,
        // A missing set looks the same as a missing table; only the latter has no chains either.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
            return match read_table(ns, TABLE, &[]) {
                Ok(_) => Ok(Verdict::Altered("a set is missing".into())),
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Verdict::Missing),
                Err(error) => Err(RedirectError::Read(error)),
            };
        }
        Err(error) => return Err(RedirectError::Read(error)),
    };
    let chains: Vec<_> = program.chains.iter().map(|(chain, _)| chain.clone()).collect();
    if !installed.has_chains(&chains) {
        return Ok(Verdict::Altered("the chains differ".into()));
    }
    for (chain, rules) in &program.chains {
        if !installed.has_rules(&chain.name, rules) {
            return Ok(Verdict::Altered(format!("the rules of chain {} differ", chain.name)));
        }
    }
    for (index, set) in program.sets.iter().enumerate() {
        if !installed.has_set(index, set) {
            return Ok(Verdict::Altered(format!("the contents of set {} differ", set.name)));
        }
    }
    verify_routes(ns, config)
}

fn verify_routes(ns: &NetNs, config: &RedirectConfig) -> Result<Verdict, RedirectError> {
    let (mut routing, families) = routing(ns, config)?;
    for family in families {
        if !routing.has_rule(family, mark_rule(config)).map_err(RedirectError::Read)? {
            return Ok(Verdict::Altered(format!("the {family:?} routing rule is missing")));
        }
        if !routing.has_local_default(family, ROUTE_TABLE).map_err(RedirectError::Read)? {
            return Ok(Verdict::Altered(format!("the {family:?} route of table {ROUTE_TABLE} is missing")));
        }
    }
    Ok(Verdict::Intact)
}

/// A routing socket of the namespace, and the families that need routes there: IPv6 only where it works (C46).
fn routing(ns: &NetNs, config: &RedirectConfig) -> Result<(Routing, Vec<Family>), RedirectError> {
    ns.run(|| {
        let mut families = vec![Family::V4];
        if config.ipv6 && ipv6_enabled() {
            families.push(Family::V6);
        }
        Ok((Routing::open()?, families))
    })
    .map_err(RedirectError::Routes)
}

fn mark_rule(config: &RedirectConfig) -> MarkRule {
    MarkRule {
        preference: RULE_PREFERENCE,
        mark: config.return_mark.value,
        mask: config.return_mark.mask,
        table: ROUTE_TABLE,
    }
}
