//! Everything that a proxy knows at one moment, and the ways of finding it.
//!
//! A [`Snapshot`] never changes; [`SnapshotWriter`] makes the next one from it and an [`Update`]. The maps are persistent:
//! a snapshot that someone still reads shares all but the changed branches with the next, so an update costs O(log n)
//! and a clone costs a dozen reference counts.

use std::net::IpAddr;
use std::sync::Arc;

use imbl::{HashMap, OrdMap};
use ipnet::IpNet;
use smallvec::SmallVec;

mod endpoints;
mod write;

use crate::Str;
use crate::address::{NamespacedHostname, NetworkAddress, NetworkPrefix};
use crate::policy::{Policy, PolicyKey};
use crate::service::Service;
use crate::workload::Workload;

pub use endpoints::Endpoints;
pub use write::{Applied, Change, Changed, SnapshotWriter, Update};

/// One moment's knowledge.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    generation: u64,
    /// The two maps that grow with the pods are trees: their nodes of 16 are more than half full, those of a hash trie of this
    /// size hold three of 16, some 400 bytes a workload more.
    workloads: OrdMap<Str, Arc<Workload>>,
    /// Who claims an address, oldest claim first. A list, so that the end of one pod never hides the next pod that got
    /// its address, whichever event comes first.
    by_address: OrdMap<NetworkAddress, SmallVec<[Arc<Workload>; 1]>>,
    /// Ordered by uid so that a decision depends on nothing but the snapshot. An entry may come before its service (Z101).
    endpoints: HashMap<NamespacedHostname, endpoints::EndpointIndex>,
    services: HashMap<NamespacedHostname, Arc<Service>>,
    /// Each list is ordered by key.
    by_hostname: HashMap<Str, SmallVec<[Arc<Service>; 1]>>,
    /// Single addresses are blocks of full length. Each list is ordered by key.
    by_prefix: HashMap<NetworkPrefix, SmallVec<[Arc<Service>; 1]>>,
    /// How many blocks there are of each family (`true` = IPv6) and length: a lookup tries only these.
    prefix_lengths: OrdMap<(bool, u8), usize>,
    /// By `namespace/name`, as workloads name them.
    policies: HashMap<Str, Arc<Policy>>,
    global_policies: OrdMap<Str, Arc<Policy>>,
    namespace_policies: HashMap<Str, OrdMap<Str, Arc<Policy>>>,
}

/// A policy that a workload is judged by.
#[derive(Clone, Copy, Debug)]
pub enum Applicable<'a> {
    /// This one.
    Policy(&'a Arc<Policy>),
    /// The workload names one that is not known: nobody can say what it would refuse.
    Missing(&'a Str),
}

/// What is at an address, as one client sees it.
#[derive(Clone, Debug)]
pub enum Destination<'a> {
    /// A service has the address or a block around it.
    Service(&'a Arc<Service>),
    /// A workload has it.
    Workload(&'a Arc<Workload>),
    /// Nobody that is known.
    Unknown,
}

impl Snapshot {
    /// The generation of the last update (design.md, Generations).
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many workloads, services and policies there are.
    pub fn sizes(&self) -> (usize, usize, usize) {
        (self.workloads.len(), self.services.len(), self.policies.len())
    }

    /// The workload of this uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload that has this address. Host-network workloads are not found: the address is their node's (D21). Where
    /// two claim it, because an address was given to a new pod before the old one's end was told, it is the newer.
    pub fn workload_by_address(&self, address: &NetworkAddress) -> Option<&Arc<Workload>> {
        self.by_address.get(address)?.last()
    }

    /// Every workload, ordered by uid.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> + Clone {
        self.workloads.iter().map(|(_, workload)| workload)
    }

    /// The service of this name, whoever asks.
    pub fn service_by_key(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> + Clone {
        self.services.iter().map(|(_, service)| service)
    }

    /// The service that a client in `namespace` means by a host name (lower case, no trailing dot): its own
    /// namespace's, else the canonical one, else the first by name (Z74). Those hidden from it do not count (Z75).
    pub fn service_by_hostname(&self, hostname: &str, namespace: &str) -> Option<&Arc<Service>> {
        best(self.services_named(hostname), namespace)
    }

    /// Every service of this host name, ordered by namespace.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.by_hostname.get(hostname).map_or(&[], |list| list)
    }

    /// The service that a client in `namespace` reaches at an address: the longest block around it that holds a visible
    /// service, ranked as by host name (Z74, R29).
    pub fn service_by_address(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<Service>> {
        self.service_by_exact_address(address, namespace)
            .or_else(|| self.service_by_block(address, namespace))
    }

    /// What a client in `namespace` means by an address: a service at exactly this address, then a workload that has it,
    /// then a service whose block is around it. A pod inside a block that someone claimed stays a pod, so that its
    /// traffic is never treated as if it left the mesh.
    pub fn destination(&self, address: &NetworkAddress, namespace: &str) -> Destination<'_> {
        if let Some(service) = self.service_by_exact_address(address, namespace) {
            return Destination::Service(service);
        }
        if let Some(workload) = self.workload_by_address(address) {
            return Destination::Workload(workload);
        }
        self.service_by_block(address, namespace).map_or(Destination::Unknown, Destination::Service)
    }

    /// The workloads that are endpoints of a service, healthy or not, ordered by uid; the service itself need not be
    /// known (yet).
    pub fn endpoints(&self, service: &NamespacedHostname) -> Endpoints<'_> {
        self.endpoints.get(service).map_or_else(|| Endpoints::from(&[][..]), |of| of.endpoints())
    }

    /// The policy of this name.
    pub fn policy(&self, key: &PolicyKey) -> Option<&Arc<Policy>> {
        self.policies.get(key.to_string().as_str())
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> + Clone {
        self.policies.iter().map(|(_, policy)| policy)
    }

    /// The policies that judge connections to a workload: global ones, its namespace's, and those it names (Z64), the
    /// names that are not known included. A policy may come twice.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Applicable<'a>> + Clone {
        let global = self.global_policies.iter();
        let namespace =
            self.namespace_policies.get(&*workload.namespace).into_iter().flat_map(|of| of.iter());
        let named = workload
            .authorization_policies
            .iter()
            .map(|name| self.policies.get(&**name).map_or(Applicable::Missing(name), Applicable::Policy));
        global.chain(namespace).map(|(_, policy)| Applicable::Policy(policy)).chain(named)
    }

    fn service_by_exact_address(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<Service>> {
        self.service_by_length(address, full_length(address.address), namespace)
    }

    fn service_by_block(&self, address: &NetworkAddress, namespace: &str) -> Option<&Arc<Service>> {
        let v6 = address.address.is_ipv6();
        let shorter = (v6, 0)..(v6, full_length(address.address));
        self.prefix_lengths
            .range(shorter)
            .rev()
            .find_map(|((_, length), _)| self.service_by_length(address, *length, namespace))
    }

    fn service_by_length(
        &self,
        address: &NetworkAddress,
        length: u8,
        namespace: &str,
    ) -> Option<&Arc<Service>> {
        let prefix = IpNet::new(address.address, length).ok()?.trunc();
        let key = NetworkPrefix { network: address.network.clone(), prefix };
        best(self.by_prefix.get(&key)?, namespace)
    }
}

impl Service {
    /// Whether a client in `namespace` may see it (Z75).
    pub fn visible_from(&self, namespace: &str) -> bool {
        !self.namespace_only || *self.key.namespace == *namespace
    }
}

/// The one that a client in `namespace` means (Z74, Z75). The list is in order, so the first of equals is taken.
pub(crate) fn best<'a>(services: &'a [Arc<Service>], namespace: &str) -> Option<&'a Arc<Service>> {
    services.iter().filter(|s| s.visible_from(namespace)).min_by_key(|s| rank(s, namespace))
}

fn rank(service: &Service, namespace: &str) -> u8 {
    if *service.key.namespace == *namespace {
        0
    } else if service.canonical {
        1
    } else {
        2
    }
}

fn full_length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}
