//! Choosing one endpoint of several (Z68-Z71).

use std::net::IpAddr;
use std::sync::Arc;

use crate::Str;
use crate::service::{Affinity, LoadBalancing, LoadBalancingMode, Scope};
use crate::snapshot::Endpoints;
use crate::workload::{Health, Locality, Workload};

mod affinity;

/// Up to so many endpoints are simply walked: that costs no more than drawing.
const SMALL: usize = 16;
/// Draws before the endpoints are walked after all. Where half of them are usable, one in 65,536 connections needs the walk.
const DRAWS: usize = 16;

/// Where a client is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its network; empty is the default one.
    pub network: Str,
    /// Region, zone, subzone.
    pub locality: Locality,
    /// Its node.
    pub node: Str,
    /// Its cluster.
    pub cluster: Str,
}

/// Who chooses.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    /// Where it is.
    pub place: &'a Place,
    /// Its address; an IPv4 address in its mapped form is that IPv4 address.
    pub address: IpAddr,
}

/// An endpoint that could be chosen: one that offers the port asked for.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// The port it listens on.
    pub target_port: u16,
}

/// What the chooser itself has seen of endpoints.
pub trait Observed {
    /// What a workload has to do now: the connections to it that are in progress.
    fn load(&self, workload: &Workload) -> u32;

    /// Whether connecting to this port of it failed so recently that others are to be preferred.
    fn cooling(&self, workload: &Workload, port: u16) -> bool;
}

/// Nothing has been seen of any endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Unobserved;

impl Observed for Unobserved {
    fn load(&self, _: &Workload) -> u32 {
        0
    }

    fn cooling(&self, _: &Workload, _: u16) -> bool {
        false
    }
}

impl Place {
    /// Where a workload is.
    pub fn of(workload: &Workload) -> Self {
        Self {
            network: workload.network.clone(),
            locality: workload.locality.clone(),
            node: workload.node.clone(),
            cluster: workload.cluster_id.clone(),
        }
    }
}

/// Chooses an endpoint: of those for which `fit` names a port, only the healthy ones unless the service says otherwise
/// (Z70), of those the best-placed group (Z69), of that two different ones at random by capacity (Z68), and of those the one
/// with less load for its capacity; of equals the first drawn, so that without load the choice is the weighted random one.
/// Where the service keeps clients, the group's endpoint for this client's address instead. An endpoint of capacity 0
/// gets nothing.
///
/// Endpoints that [are cooling](Observed::cooling) are left out as if they were not ready, unless no other is left.
///
/// `random` gives a number below its argument, which is never 0. Nothing is allocated. Without locality and affinity the
/// cost does not grow with the number of endpoints, as long as a fair part of them is usable and of usual capacity.
pub fn pick<'a>(
    endpoints: &Endpoints<'a>,
    fit: &dyn Fn(&'a Arc<Workload>) -> Option<u16>,
    balancing: &LoadBalancing,
    client: &Client<'_>,
    observed: &dyn Observed,
    random: &mut dyn FnMut(u64) -> u64,
) -> Option<Candidate<'a>> {
    let mut choice = Choice { endpoints, fit, balancing, client, observed, random, avoid: true };
    choice.made().or_else(|| {
        choice.avoid = false;
        choice.made()
    })
}

/// Whether it may get traffic at all (Z70).
pub(crate) fn usable(workload: &Workload, balancing: &LoadBalancing) -> bool {
    balancing.allow_unhealthy || workload.health == Health::Healthy
}

/// How well it is placed for a client: how many leading scopes they share (Z69); `None` where the service's rule leaves it
/// out.
pub fn rank(workload: &Workload, balancing: &LoadBalancing, client: &Place) -> Option<usize> {
    if is_flat(balancing) {
        return Some(0);
    }
    let shared = |scope: &&Scope| match scope {
        Scope::Region => workload.locality.region == client.locality.region,
        Scope::Zone => workload.locality.zone == client.locality.zone,
        Scope::Subzone => workload.locality.subzone == client.locality.subzone,
        Scope::Node => workload.node == client.node,
        Scope::Cluster => workload.cluster_id == client.cluster,
        Scope::Network => workload.network == client.network,
    };
    let rank = balancing.scopes.iter().take_while(shared).count();
    (balancing.mode == LoadBalancingMode::Failover || rank == balancing.scopes.len()).then_some(rank)
}

/// Whether every endpoint is as well placed as any other.
fn is_flat(balancing: &LoadBalancing) -> bool {
    balancing.scopes.is_empty()
        || matches!(balancing.mode, LoadBalancingMode::Any | LoadBalancingMode::Passthrough)
}

/// One choice being made.
struct Choice<'e, 'a, 'c> {
    endpoints: &'c Endpoints<'a>,
    fit: &'c dyn Fn(&'a Arc<Workload>) -> Option<u16>,
    balancing: &'c LoadBalancing,
    client: &'c Client<'c>,
    observed: &'c dyn Observed,
    random: &'e mut dyn FnMut(u64) -> u64,
    /// Endpoints that are cooling are left out.
    avoid: bool,
}

/// The best-placed endpoints.
#[derive(Clone, Copy)]
struct Group {
    rank: usize,
    /// Their capacities together.
    capacity: u64,
}

impl<'a> Choice<'_, 'a, '_> {
    fn made(&mut self) -> Option<Candidate<'a>> {
        if self.balancing.affinity == Affinity::ClientAddress {
            return self.kept();
        }
        let mut group = None;
        let first = self.one(&mut group, None)?;
        let Some(second) = self.one(&mut group, Some(first)) else { return Some(first) };
        let lighter = self.relative(second, first) < self.relative(first, second);
        Some(if lighter { second } else { first })
    }

    /// One of the group at random by capacity, and not `but`. Drawn if that succeeds soon, otherwise found by walking: both
    /// choose with the same probabilities.
    fn one(&mut self, group: &mut Option<Group>, but: Option<Candidate<'a>>) -> Option<Candidate<'a>> {
        if let Some(drawn) = self.drawn(but) {
            return Some(drawn);
        }
        let Group { rank, capacity } = *group.get_or_insert_with(|| self.group());
        let left = capacity - but.map_or(0, |but| u64::from(but.workload.capacity));
        if left == 0 {
            return None;
        }
        let point = (self.random)(left);
        let mut passed = 0;
        self.ranked().filter(|(at, it)| *at == rank && !same(*it, but)).map(|(_, it)| it).find(|it| {
            passed += u64::from(it.workload.capacity);
            point < passed
        })
    }

    /// Any endpoint, taken if it is usable and with a chance of its capacity against the largest, [`DRAWS`] times at most.
    fn drawn(&mut self, but: Option<Candidate<'a>>) -> Option<Candidate<'a>> {
        let total = self.endpoints.total();
        if total <= SMALL || !is_flat(self.balancing) {
            return None;
        }
        let largest = u64::from(self.endpoints.max_capacity());
        for _ in 0..DRAWS {
            let index = (self.random)(total as u64);
            let workload = self.endpoints.at(usize::try_from(index).ok()?)?;
            let Some(candidate) = self.candidate(workload).filter(|it| !same(*it, but)) else { continue };
            let capacity = u64::from(workload.capacity);
            if capacity == largest || (self.random)(largest) < capacity {
                return Some(candidate);
            }
        }
        None
    }

    /// The best-placed group; of no capacity where there is none.
    fn group(&self) -> Group {
        let mut best = Group { rank: 0, capacity: 0 };
        for (rank, candidate) in self.ranked() {
            if rank > best.rank {
                best = Group { rank, capacity: 0 };
            }
            if rank == best.rank {
                // 2^32 capacities of 2^32 fit; there are fewer workloads than that.
                best.capacity += u64::from(candidate.workload.capacity);
            }
        }
        best
    }

    fn ranked(&self) -> impl Iterator<Item = (usize, Candidate<'a>)> {
        let candidates = self.endpoints.clone().filter_map(|workload| self.candidate(workload));
        candidates.filter_map(|it| Some((rank(it.workload, self.balancing, self.client.place)?, it)))
    }

    /// It, if it may be chosen wherever it is.
    fn candidate(&self, workload: &'a Arc<Workload>) -> Option<Candidate<'a>> {
        if workload.capacity == 0 || !usable(workload, self.balancing) {
            return None;
        }
        let target_port = (self.fit)(workload)?;
        let left_out = self.avoid && self.observed.cooling(workload, target_port);
        (!left_out).then_some(Candidate { workload, target_port })
    }

    /// `of`'s load for its capacity, times both capacities, so that two can be compared without dividing.
    fn relative(&self, of: Candidate<'_>, other: Candidate<'_>) -> u64 {
        u64::from(self.observed.load(of.workload)) * u64::from(other.workload.capacity)
    }
}

fn same(it: Candidate<'_>, other: Option<Candidate<'_>>) -> bool {
    other.is_some_and(|other| Arc::ptr_eq(it.workload, other.workload))
}
