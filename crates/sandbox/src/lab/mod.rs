//! Nodes and pods as network namespaces, joined by a bridge and cut off from the machine.
//!
//! ```text
//!  namespace node.a                 namespace fabric            namespace node.b
//!  eth0 198.18.0.11 ───────────── n1  fabric0  n2 ───────────── eth0 198.18.0.12
//!  veth… (fe80::1)                     │ ctl                    veth…
//!    │ 100.64.1.x/32                   │                          │
//!  eth0 in pod.ns.name        eth0 198.18.0.2, .3 in           eth0 in pod.ns.name
//!  default via the node            controller
//! ```
//!
//! No interface of these namespaces reaches the machine's own, and nothing here opens a netlink socket outside them. Pods
//! are routed, never bridged, so that traffic between two pods of one node passes the node's routing (and its rules)
//! as it does under most CNIs.

mod link;
mod netns;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::{fs, io};

use ipnet::IpNet;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::plan::{self, Family};

pub use netns::{NetNs, NetNsError, NetNsId};

use link::End;

/// The bridge that joins the nodes; it is in the namespace `fabric`.
pub const BRIDGE: &str = "fabric0";

/// The gateway of pods for IPv6: every node end of a pod's link has it.
const GATEWAY_V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1));

/// Settings of each namespace. All are written, since a new namespace may inherit the machine's own values.
const COMMON: &[(&str, &str)] = &[
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/arp_ignore", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
];
const FORWARDING: [(&str, &str); 2] = [("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];
const NO_FORWARDING: [(&str, &str); 2] = [("ipv4/ip_forward", "0"), ("ipv6/conf/all/forwarding", "0")];

/// The namespaces of one sandbox. Dropping it removes them (errors are logged); [`Lab::destroy`] tells.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    family: Family,
    fabric: NetNs,
    controller: NetNs,
    nodes: BTreeMap<String, Node>,
    destroyed: bool,
}

/// A node: a namespace that routes.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its namespace.
    pub netns: NetNs,
    /// Its number, from 1; the address plan follows from it.
    pub number: u16,
    /// Its addresses on the fabric, in the families in use.
    pub addresses: Vec<IpAddr>,
}

/// Why the namespaces could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A namespace could not be made, entered or removed.
    #[error(transparent)]
    NetNs(#[from] NetNsError),
    /// The directory that holds the namespaces could not be prepared.
    #[error("cannot prepare {path}: {source}", path = path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No netlink socket could be opened in a namespace.
    #[error("cannot talk to the kernel inside {path}: {source}", path = path.display())]
    Socket {
        /// The namespace.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A link, address or route was refused.
    #[error("cannot {what} {name}: {source}")]
    Netlink {
        /// The action.
        what: &'static str,
        /// The link.
        name: String,
        /// What the kernel said.
        source: Box<rtnetlink::Error>,
    },
    /// A link is missing.
    #[error("no link named {name}")]
    NoLink {
        /// The link.
        name: String,
    },
    /// A setting was refused.
    #[error("cannot set net/{key}: {source}")]
    Sysctl {
        /// The setting below /proc/sys/net.
        key: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// More nodes than the address plan has room for.
    #[error("node {name} is number {number}, and the address plan ends at {max}", max = plan::MAX_NODES)]
    TooManyNodes {
        /// The node.
        name: String,
        /// Its number.
        number: usize,
    },
    /// A node is not known.
    #[error("no node named {name}")]
    NoNode {
        /// The node.
        name: String,
    },
}

impl Lab {
    /// Makes the fabric and the controller's namespace. The namespaces' files are made in `dir`, which must not be in use.
    pub fn create(dir: &Path, family: Family) -> Result<Lab, LabError> {
        let directory = |source| LabError::Directory { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(directory)?;
        // Shared with itself, as `ip netns` does it: a process that left for a mount namespace of its own (any service
        // manager does that) then lets go of our namespaces when we unmount them.
        mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .and_then(|()| mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED, None::<&str>))
            .map_err(|errno| directory(errno.into()))?;
        let mut lab = Lab {
            dir: dir.to_owned(),
            family,
            fabric: NetNs::at(dir.join("fabric")),
            controller: NetNs::at(dir.join("controller")),
            nodes: BTreeMap::new(),
            destroyed: false,
        };
        lab.prepare()?;
        Ok(lab)
    }

    fn prepare(&mut self) -> Result<(), LabError> {
        self.fabric = self.namespace("fabric", &NO_FORWARDING)?;
        link::within(&self.fabric, async |link| link.bridge(BRIDGE).await)?;
        self.controller = self.namespace("controller", &NO_FORWARDING)?;
        let mut addresses = self.family.keep(plan::controller_addresses());
        addresses.extend(self.family.keep(plan::dns_addresses()));
        self.attach(&self.controller, "ctl", &addresses)
    }

    /// The address families in use.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The namespace of the bridge: a capture on [`BRIDGE`] there sees all traffic between nodes.
    pub fn fabric(&self) -> &NetNs {
        &self.fabric
    }

    /// The namespace of the controller and of the cluster DNS.
    pub fn controller(&self) -> &NetNs {
        &self.controller
    }

    /// A node by its name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// All nodes by name.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(name, node)| (name.as_str(), node))
    }

    /// Makes a node, joins it to the fabric and makes the routes between it, the other nodes and the controller.
    pub fn add_node(&mut self, name: &str) -> Result<&Node, LabError> {
        let number = self.nodes.len() + 1;
        let number = u16::try_from(number)
            .ok()
            .filter(|number| *number <= plan::MAX_NODES)
            .ok_or_else(|| LabError::TooManyNodes { name: name.to_owned(), number })?;
        let netns = self.namespace(&format!("node.{name}"), &FORWARDING)?;
        let addresses = self.family.keep(plan::node_addresses(number));
        self.attach(&netns, &format!("n{number}"), &addresses)?;
        // A route must exist for the node's own connections to a service before the rules can rewrite them.
        let services = self.nets(plan::service_networks());
        let others: Vec<u16> = self.nodes.values().map(|node| node.number).collect();
        link::within(&netns, async |link| {
            for (net, source) in services.iter().zip(&addresses) {
                link.on_link("eth0", *net, Some(*source)).await?;
            }
            for other in others {
                self.pod_routes(link, other).await?;
            }
            Ok(())
        })?;
        for peer in self.nodes.values().map(|node| &node.netns).chain([&self.controller]) {
            link::within(peer, async |link| self.pod_routes(link, number).await)?;
        }
        let node = Node { netns, number, addresses };
        Ok(self.nodes.entry(name.to_owned()).or_insert(node))
    }

    /// Makes a pod's namespace on `node` with `addresses` (at most one a family) and returns it. `key` names it, as in
    /// `default.client`: letters, digits, `-` and `.` only.
    pub fn add_pod(&self, node: &str, key: &str, addresses: &[IpAddr]) -> Result<NetNs, LabError> {
        let node = self.node(node).ok_or_else(|| LabError::NoNode { name: node.to_owned() })?;
        let netns = self.namespace(&pod_name(key), &NO_FORWARDING)?;
        let near = pod_link(key);
        link::within(&node.netns, async |link| {
            link.veth(&near, End { ns: &netns, name: "eth0" }).await?;
            if self.family.v6() {
                link.address(&near, GATEWAY_V6, 64).await?;
            }
            for address in addresses {
                let source = node.addresses.iter().find(|a| a.is_ipv4() == address.is_ipv4()).copied();
                link.on_link(&near, IpNet::from(*address), source).await?;
            }
            Ok(())
        })?;
        link::within(&netns, async |link| {
            link.up("eth0").await?;
            for address in addresses {
                let prefix = IpNet::from(*address).prefix_len();
                link.address("eth0", *address, prefix).await?;
                let default = IpNet::new_assert(unspecified(*address), 0);
                // IPv4: the node answers ARP for any of its own addresses on any link, so its fabric address serves.
                let gateway = match address {
                    IpAddr::V4(_) => plan::node_addresses(node.number)[0],
                    IpAddr::V6(_) => GATEWAY_V6,
                };
                link.via("eth0", default, gateway).await?;
            }
            Ok(())
        })?;
        Ok(netns)
    }

    /// Removes a pod's link and namespace. One that is not there is no error.
    pub fn remove_pod(&self, node: &str, key: &str) -> Result<(), LabError> {
        if let Some(node) = self.node(node) {
            // The link first: a process that holds the namespace open would otherwise keep the address alive.
            link::within(&node.netns, async |link| link.delete(&pod_link(key)).await)?;
        }
        Ok(NetNs::at(self.dir.join(pod_name(key))).remove()?)
    }

    /// Removes all namespaces. Processes inside must be ended before: see [`crate::cleanup`].
    pub fn destroy(mut self) -> Result<(), LabError> {
        self.destroyed = true;
        unmount(&self.dir)
    }

    fn namespace(&self, name: &str, forwarding: &[(&str, &str); 2]) -> Result<NetNs, LabError> {
        let netns = NetNs::create(&self.dir.join(name))?;
        link::sysctl(&netns, &[COMMON, forwarding].concat())?;
        link::within(&netns, async |link| link.up("lo").await)?;
        Ok(netns)
    }

    /// Joins `netns` to the bridge as `eth0`.
    fn attach(&self, netns: &NetNs, near: &str, addresses: &[IpAddr]) -> Result<(), LabError> {
        link::within(&self.fabric, async |link| {
            link.veth(near, End { ns: netns, name: "eth0" }).await?;
            link.enslave(near, BRIDGE).await
        })?;
        link::within(netns, async |link| {
            link.up("eth0").await?;
            for address in addresses {
                link.address("eth0", *address, plan::fabric_prefix(*address)).await?;
            }
            Ok(())
        })
    }

    async fn pod_routes(&self, link: &link::Link, number: u16) -> Result<(), LabError> {
        let gateways = self.family.keep(plan::node_addresses(number));
        for (net, gateway) in self.nets(plan::pod_networks(number)).into_iter().zip(gateways) {
            link.via("eth0", net, gateway).await?;
        }
        Ok(())
    }

    fn nets(&self, nets: [IpNet; 2]) -> Vec<IpNet> {
        nets.into_iter()
            .filter(|net| if net.addr().is_ipv4() { self.family.v4() } else { self.family.v6() })
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.destroyed
            && let Err(error) = unmount(&self.dir)
        {
            tracing::warn!(%error, "namespaces were left behind");
        }
    }
}

/// Unmounts every namespace below `dir`, and `dir` itself, and removes the files. What is not there is no error, so this
/// also cleans up after a crash.
pub fn unmount(dir: &Path) -> Result<(), LabError> {
    let directory = |source| LabError::Directory { path: dir.to_owned(), source };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(directory(error)),
    };
    for entry in entries {
        NetNs::at(entry.map_err(directory)?.path()).remove()?;
    }
    // More than once if a crash fell between a failed and a repeated start; 16 is far above that.
    for _ in 0..16 {
        match umount2(dir, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(errno) => return Err(directory(errno.into())),
        }
    }
    fs::remove_dir(dir).map_err(directory)
}

/// The file name of a pod's namespace.
fn pod_name(key: &str) -> String {
    format!("pod.{key}")
}

/// The node end of a pod's link: at most 15 bytes are allowed, so a hash.
fn pod_link(key: &str) -> String {
    format!("veth{:08x}", plan::fnv1a(key.as_bytes()))
}

fn unspecified(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}
