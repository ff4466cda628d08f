//! From one snapshot to the next.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use smallvec::SmallVec;

use super::Snapshot;
use crate::Str;
use crate::address::{GatewayAddress, GatewayDestination, NamespacedHostname, NetworkAddress};
use crate::policy::{Policy, PolicyKey, PolicyScope};
use crate::service::Service;
use crate::wire::AddressResource;
use crate::workload::{Health, NetworkMode, Workload};

/// What changes together. Removals are carried out before the rest, so a name in both ends up present.
#[derive(Clone, Debug, Default)]
pub struct Update {
    /// The generation that the snapshot then has.
    pub generation: u64,
    /// Workloads and services to add or replace.
    pub addresses: Vec<AddressResource>,
    /// Names of workloads (uid) and services (`namespace/hostname`) to remove; unknown ones are ignored.
    pub removed_addresses: Vec<Str>,
    /// Policies to add or replace.
    pub policies: Vec<Policy>,
    /// Names (`namespace/name`) of policies to remove; unknown ones are ignored.
    pub removed_policies: Vec<Str>,
}

/// The next snapshot and how it differs.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The next snapshot.
    pub snapshot: Snapshot,
    /// What differs from the one before.
    pub changed: Changed,
}

/// What an update changed. What was sent again as it was is not listed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Workloads by uid: their pooled connections may lead nowhere now.
    pub workloads: Vec<(Str, Change)>,
    /// Services by name.
    pub services: Vec<(NamespacedHostname, Change)>,
    /// Policies by name: live connections are judged again (Z67).
    pub policies: Vec<(PolicyKey, Change)>,
}

/// How something changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It was not there before.
    Added,
    /// It is another than before.
    Updated,
    /// It is gone.
    Removed,
}

/// Makes each snapshot from the one before. There is one, in the task that hears the control plane.
#[derive(Debug, Default)]
pub struct SnapshotWriter {
    current: Snapshot,
    names: Names,
}

impl Changed {
    /// Nothing differs.
    pub fn is_empty(&self) -> bool {
        self.workloads.is_empty() && self.services.is_empty() && self.policies.is_empty()
    }
}

impl SnapshotWriter {
    /// Begins with an empty snapshot of generation 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// The snapshot as of the last update.
    pub fn snapshot(&self) -> &Snapshot {
        &self.current
    }

    /// Lets the names in a resource that is to be applied later be the ones that are kept already. What waits for the rest of
    /// a large push then holds little that is thrown away when it is applied.
    pub fn share(&mut self, resource: &mut AddressResource) {
        match resource {
            AddressResource::Workload(workload) => self.names.share_workload(workload),
            AddressResource::Service(service) => self.names.share_key(&mut service.key),
        }
    }

    /// Applies one update whole, in O(log n) for each resource that differs.
    pub fn apply(&mut self, update: Update) -> Applied {
        let mut changed = Changed::default();
        for name in &update.removed_addresses {
            self.remove_address(name, &mut changed);
        }
        for name in &update.removed_policies {
            self.remove_policy(name, &mut changed);
        }
        // Of two that claim an address in one update the healthy one comes last and so has it: the other is ending.
        let mut later = VecDeque::new();
        for resource in update.addresses {
            match resource {
                AddressResource::Service(service) => self.put_service(service, &mut changed),
                AddressResource::Workload(workload) if workload.health == Health::Healthy => {
                    later.push_back(workload);
                }
                AddressResource::Workload(workload) => self.put_workload(workload, &mut changed),
            }
        }
        // One by one, so that each is dropped in its old form as soon as it is stored in its new.
        while let Some(workload) = later.pop_front() {
            self.put_workload(workload, &mut changed);
        }
        for policy in update.policies {
            self.put_policy(policy, &mut changed);
        }
        self.names.sweep();
        self.current.generation = update.generation;
        Applied { snapshot: self.current.clone(), changed }
    }

    fn remove_address(&mut self, name: &str, changed: &mut Changed) {
        if let Some(old) = self.current.workloads.remove(name) {
            self.current.unlink_workload(&old, None);
            changed.workloads.push((old.uid.clone(), Change::Removed));
        } else if let Ok(key) = crate::wire::namespaced("name", name)
            && let Some(old) = self.current.services.remove(&key)
        {
            self.current.unlink_service(&old);
            changed.services.push((key, Change::Removed));
        }
    }

    fn put_workload(&mut self, mut workload: Workload, changed: &mut Changed) {
        let old = self.current.workloads.get(&*workload.uid).cloned();
        if old.as_deref() == Some(&workload) {
            return;
        }
        self.names.share_workload(&mut workload);
        if let Some(old) = &old {
            workload.uid = old.uid.clone();
        }
        let workload = Arc::new(workload);
        if let Some(old) = &old {
            self.current.unlink_workload(old, Some(&workload));
        }
        self.current.link_workload(&workload);
        changed.workloads.push((workload.uid.clone(), change(old.is_some())));
        self.current.workloads.insert(workload.uid.clone(), workload);
    }

    fn put_service(&mut self, mut service: Service, changed: &mut Changed) {
        let old = self.current.services.get(&service.key).cloned();
        if old.as_deref() == Some(&service) {
            return;
        }
        self.names.share_key(&mut service.key);
        let service = Arc::new(service);
        if let Some(old) = &old {
            self.current.unlink_service(old);
        }
        self.current.link_service(&service);
        changed.services.push((service.key.clone(), change(old.is_some())));
        self.current.services.insert(service.key.clone(), service);
    }

    fn put_policy(&mut self, policy: Policy, changed: &mut Changed) {
        let name = Str::from(policy.key.to_string());
        let old = self.current.policies.get(&*name).cloned();
        if old.as_deref() == Some(&policy) {
            return;
        }
        let policy = Arc::new(policy);
        if let Some(old) = &old {
            self.current.unlink_policy(&name, old);
        }
        match policy.scope {
            PolicyScope::Global => {
                self.current.global_policies.insert(name.clone(), policy.clone());
            }
            PolicyScope::Namespace => {
                let of = self.current.namespace_policies.entry(policy.key.namespace.clone()).or_default();
                of.insert(name.clone(), policy.clone());
            }
            PolicyScope::WorkloadSelector => {}
        }
        changed.policies.push((policy.key.clone(), change(old.is_some())));
        self.current.policies.insert(name, policy);
    }

    fn remove_policy(&mut self, name: &Str, changed: &mut Changed) {
        if let Some(old) = self.current.policies.remove(&**name) {
            self.current.unlink_policy(name, &old);
            changed.policies.push((old.key.clone(), Change::Removed));
        }
    }
}

impl Snapshot {
    /// Adds to the indices, or replaces there what has the same uid: a claim keeps its age.
    fn link_workload(&mut self, workload: &Arc<Workload>) {
        for address in addresses(workload) {
            let claims = self.by_address.entry(address).or_default();
            match claims.iter_mut().find(|claim| claim.uid == workload.uid) {
                Some(claim) => *claim = workload.clone(),
                None => claims.push(workload.clone()),
            }
        }
        for service in workload.services.keys() {
            self.endpoints.entry(service.clone()).or_default().insert(workload.clone());
        }
    }

    /// Takes from the indices what the next form does not have; nothing that belongs to another uid.
    fn unlink_workload(&mut self, old: &Workload, next: Option<&Workload>) {
        for address in addresses(old) {
            if next.is_some_and(|next| addresses(next).any(|kept| kept == address)) {
                continue;
            }
            if let Some(claims) = self.by_address.get_mut(&address) {
                claims.retain(|claim| claim.uid != old.uid);
                if claims.is_empty() {
                    self.by_address.remove(&address);
                }
            }
        }
        for service in old.services.keys() {
            if next.is_some_and(|next| next.services.contains_key(service)) {
                continue;
            }
            if let Some(of) = self.endpoints.get_mut(service) {
                of.remove(&old.uid);
                if of.is_empty() {
                    self.endpoints.remove(service);
                }
            }
        }
    }

    fn link_service(&mut self, service: &Arc<Service>) {
        insert(self.by_hostname.entry(service.key.hostname.clone()).or_default(), service);
        for prefix in &service.addresses {
            let list = self.by_prefix.entry(prefix.clone()).or_default();
            if list.is_empty() {
                let length = (prefix.prefix.addr().is_ipv6(), prefix.prefix.prefix_len());
                *self.prefix_lengths.entry(length).or_default() += 1;
            }
            insert(list, service);
        }
    }

    fn unlink_service(&mut self, old: &Service) {
        if let Some(list) = self.by_hostname.get_mut(&*old.key.hostname) {
            list.retain(|service| service.key != old.key);
            if list.is_empty() {
                self.by_hostname.remove(&*old.key.hostname);
            }
        }
        for prefix in &old.addresses {
            let Some(list) = self.by_prefix.get_mut(prefix) else { continue };
            list.retain(|service| service.key != old.key);
            if list.is_empty() {
                self.by_prefix.remove(prefix);
                self.drop_prefix_length((prefix.prefix.addr().is_ipv6(), prefix.prefix.prefix_len()));
            }
        }
    }

    fn drop_prefix_length(&mut self, length: (bool, u8)) {
        if let Some(count) = self.prefix_lengths.get_mut(&length) {
            *count -= 1;
            if *count == 0 {
                self.prefix_lengths.remove(&length);
            }
        }
    }

    fn unlink_policy(&mut self, name: &Str, old: &Policy) {
        self.global_policies.remove(name);
        if let Some(of) = self.namespace_policies.get_mut(&*old.key.namespace) {
            of.remove(name);
            if of.is_empty() {
                self.namespace_policies.remove(&*old.key.namespace);
            }
        }
    }
}

fn change(existed: bool) -> Change {
    if existed { Change::Updated } else { Change::Added }
}

/// The addresses by which it is found (D21).
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    let own = workload.network_mode == NetworkMode::Standard;
    let addresses = if own { &workload.addresses[..] } else { &[] };
    addresses.iter().map(|address| NetworkAddress { network: workload.network.clone(), address: *address })
}

/// Keeps the list in order of keys and each key once, however often a service names an address.
fn insert(list: &mut SmallVec<[Arc<Service>; 1]>, service: &Arc<Service>) {
    match list.binary_search_by(|s| s.key.cmp(&service.key)) {
        Ok(at) => list[at] = service.clone(),
        Err(at) => list.insert(at, service.clone()),
    }
}

/// Names that many workloads share, each kept once: namespaces, nodes, accounts, services, policies.
#[derive(Debug, Default)]
struct Names {
    known: HashSet<Str>,
    /// The size at which the next sweep happens.
    sweep_at: usize,
}

impl Names {
    /// Sweeping a set that doubled costs O(1) for each name that was added; below this it is not worth a look.
    const SMALLEST_SWEEP: usize = 4096;

    fn share(&mut self, name: &mut Str) {
        match self.known.get(name) {
            Some(known) => *name = known.clone(),
            None => {
                self.known.insert(name.clone());
            }
        }
    }

    fn share_key(&mut self, key: &mut NamespacedHostname) {
        self.share(&mut key.namespace);
        self.share(&mut key.hostname);
    }

    fn share_gateway(&mut self, gateway: &mut GatewayAddress) {
        match &mut gateway.destination {
            GatewayDestination::Hostname(name) => self.share_key(name),
            GatewayDestination::Address(address) => self.share(&mut address.network),
        }
    }

    fn share_workload(&mut self, workload: &mut Workload) {
        for name in [
            &mut workload.namespace,
            &mut workload.hostname,
            &mut workload.network,
            &mut workload.node,
            &mut workload.canonical_name,
            &mut workload.canonical_revision,
            &mut workload.workload_name,
            &mut workload.cluster_id,
            &mut workload.locality.region.0,
            &mut workload.locality.zone.0,
            &mut workload.locality.subzone.0,
        ] {
            self.share(name);
        }
        workload.identity.for_each_part(|part| self.share(part));
        workload.authorization_policies.iter_mut().for_each(|name| self.share(name));
        workload.waypoint.iter_mut().for_each(|gateway| self.share_gateway(gateway));
        workload.network_gateway.iter_mut().for_each(|gateway| self.share_gateway(gateway));
        let services = std::mem::take(&mut workload.services);
        let shared = services.into_iter().map(|(mut key, ports)| {
            self.share_key(&mut key);
            (key, ports)
        });
        workload.services = shared.collect();
    }

    /// Forgets names that nobody uses any more, now and then.
    fn sweep(&mut self) {
        if self.known.len() >= self.sweep_at.max(Self::SMALLEST_SWEEP) {
            self.known.retain(|name| Arc::strong_count(name) > 1);
            self.sweep_at = self.known.len() * 2;
        }
    }
}
