//! Service addresses on each node, as kube-proxy does it: a connection to a service's address is rewritten to one of its
//! ready endpoints, chosen at random when it opens.

use std::net::{IpAddr, SocketAddr};

use culvert_k8s_api::core::Protocol;
use culvert_net::nft::{Batch, Chain, HookPoint, HookType, NftError, Rule, Verdict};

use crate::cluster::{PortView, ServiceView};
use crate::lab::Node;
use crate::plan;

/// The table's name; it is replaced as a whole by one transaction.
pub const TABLE: &str = "culvert-services";

const SERVICES: &str = "services";

/// Priority of destination NAT, as everyone numbers it.
const DSTNAT: i32 = -100;
/// Priority of source NAT.
const SRCNAT: i32 = 100;

/// The rules of one node for these services. All nodes have the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Each service address and port with its endpoints of the same family.
    targets: Vec<Target>,
    /// Pods that may reach themselves through a service.
    hairpins: Vec<IpAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    address: SocketAddr,
    protocol: Protocol,
    endpoints: Vec<SocketAddr>,
}

impl Rules {
    /// The rules for `services`.
    pub fn new(services: &[ServiceView]) -> Rules {
        let targets: Vec<_> = services
            .iter()
            .flat_map(|service| service.addresses.iter().map(move |address| (service, *address)))
            .flat_map(|(service, address)| {
                service.ports.iter().filter_map(move |port| Target::new(address, port))
            })
            .collect();
        let mut hairpins: Vec<_> =
            targets.iter().flat_map(|target| target.endpoints.iter().map(SocketAddr::ip)).collect();
        hairpins.sort_unstable();
        hairpins.dedup();
        Rules { targets, hairpins }
    }

    /// Replaces the rules in a node's namespace.
    pub fn apply(&self, node: &Node) -> Result<(), NftError> {
        self.batch(&node.addresses).commit(&culvert_net::NetNs::open(node.netns.path())?)
    }

    fn batch(&self, node: &[IpAddr]) -> Batch {
        let mut batch = Batch::new();
        batch.replace_table(TABLE).add_chain(TABLE, &Chain::regular(SERVICES));
        for (index, target) in self.targets.iter().enumerate() {
            target.add(index, &mut batch);
        }
        let to_services = Rule::new("service addresses").verdict(Verdict::Jump(SERVICES.to_owned()));
        for (name, point) in [("prerouting", HookPoint::Prerouting), ("output-nat", HookPoint::Output)] {
            batch.add_chain(TABLE, &Chain::base(name, HookType::Nat, point, DSTNAT));
            batch.add_rule(TABLE, name, &to_services);
        }
        // What still goes to a service address behind NAT found no endpoint.
        for (name, point) in [("forward", HookPoint::Forward), ("output", HookPoint::Output)] {
            batch.add_chain(TABLE, &Chain::base(name, HookType::Filter, point, 0));
            for net in plan::service_networks() {
                batch.add_rule(TABLE, name, &Rule::new("no endpoint").destination(net).reject());
            }
        }
        batch.add_chain(TABLE, &Chain::base("postrouting", HookType::Nat, HookPoint::Postrouting, SRCNAT));
        for pod in &self.hairpins {
            let Some(own) = node.iter().find(|own| own.is_ipv4() == pod.is_ipv4()) else { continue };
            // A pod that reached itself would answer itself directly, past the rewriting. The address is named, not left to
            // the kernel: it might choose that of probes, which capture spares.
            let rule = Rule::new("hairpin").source(*pod).destination(*pod).snat(SocketAddr::new(*own, 0));
            batch.add_rule(TABLE, "postrouting", &rule);
        }
        batch
    }
}

impl Target {
    fn new(address: IpAddr, port: &PortView) -> Option<Target> {
        let endpoints: Vec<_> =
            port.endpoints.iter().filter(|e| e.is_ipv4() == address.is_ipv4()).copied().collect();
        let carried = matches!(port.protocol, Protocol::Tcp | Protocol::Udp) && !endpoints.is_empty();
        carried.then(|| Target {
            address: SocketAddr::new(address, port.port),
            protocol: port.protocol,
            endpoints,
        })
    }

    fn add(&self, index: usize, batch: &mut Batch) {
        let chain = format!("service-{index}");
        batch.add_chain(TABLE, &Chain::regular(&chain));
        let left = u32::try_from(self.endpoints.len()).unwrap_or(u32::MAX);
        for (endpoint, left) in self.endpoints.iter().zip((1..=left).rev()) {
            // One in three, then one in two of the rest, then the last: each gets a third.
            let rule = Rule::new("endpoint");
            let rule = if left > 1 { rule.one_in(left) } else { rule };
            let rule = if endpoint.is_ipv4() { rule.ipv4() } else { rule.ipv6() };
            batch.add_rule(TABLE, &chain, &rule.dnat(*endpoint));
        }
        let rule = Rule::new(&format!("{:?} {}", self.protocol, self.address)).destination(self.address.ip());
        let rule = if self.protocol == Protocol::Udp { rule.udp() } else { rule.tcp() };
        let rule = rule.dport(self.address.port()).verdict(Verdict::Goto(chain));
        batch.add_rule(TABLE, SERVICES, &rule);
    }
}
