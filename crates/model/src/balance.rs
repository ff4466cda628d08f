//! Choosing one endpoint of several (Z68-Z71).

use std::sync::Arc;

use crate::Str;
use crate::service::{LoadBalancing, LoadBalancingMode, Scope};
use crate::workload::{Health, Locality, Workload};

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

/// An endpoint that could be chosen: one that offers the port asked for.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// The workload.
    pub workload: &'a Arc<Workload>,
    /// The port it listens on.
    pub target_port: u16,
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

/// Chooses an endpoint: only the healthy ones unless the service says otherwise (Z70), of those the best-placed group (Z69),
/// of that two at random by capacity (Z68), and of those the one with less load for its capacity. An endpoint of capacity 0
/// gets nothing.
///
/// `load` is what a workload has now, such as its open connections; with equal load the choice is the weighted random one.
/// `random` gives a number below its argument, which is never 0. The candidates are walked twice and nothing is allocated.
pub fn pick<'a>(
    endpoints: impl Iterator<Item = Candidate<'a>> + Clone,
    balancing: &LoadBalancing,
    client: &Place,
    load: &dyn Fn(&Workload) -> u32,
    random: &mut dyn FnMut(u64) -> u64,
) -> Option<Candidate<'a>> {
    let usable = endpoints
        .filter(|c| c.workload.capacity > 0 && usable(c.workload, balancing))
        .map(|c| (rank(c.workload, balancing, client), c))
        .filter(|(rank, _)| balancing.mode != LoadBalancingMode::Strict || *rank == balancing.scopes.len());
    let (mut best, mut total) = (0, 0_u64);
    for (rank, candidate) in usable.clone() {
        if rank > best {
            (best, total) = (rank, 0);
        }
        if rank == best {
            // 2^32 capacities of 2^32 fit; there are fewer workloads than that.
            total += u64::from(candidate.workload.capacity);
        }
    }
    if total == 0 {
        return None;
    }
    let group = usable.filter(|(rank, _)| *rank == best).map(|(_, candidate)| candidate);
    let (first, second) = (random(total), random(total));
    let first = at(group.clone(), first)?;
    let second = at(group, second)?;
    Some(if relative(load, second, first) < relative(load, first, second) { second } else { first })
}

/// Whether it may get traffic at all (Z70).
pub(crate) fn usable(workload: &Workload, balancing: &LoadBalancing) -> bool {
    balancing.allow_unhealthy || workload.health == Health::Healthy
}

/// The candidate that covers `point` when all stand in line, each as wide as its capacity.
fn at<'a>(group: impl Iterator<Item = Candidate<'a>>, point: u64) -> Option<Candidate<'a>> {
    let mut passed = 0;
    group.into_iter().find(|candidate| {
        passed += u64::from(candidate.workload.capacity);
        point < passed
    })
}

/// `of`'s load for its capacity, times both capacities, so that two can be compared without dividing.
fn relative(load: &dyn Fn(&Workload) -> u32, of: Candidate<'_>, other: Candidate<'_>) -> u64 {
    u64::from(load(of.workload)) * u64::from(other.workload.capacity)
}

/// How many leading scopes it shares with the client.
fn rank(workload: &Workload, balancing: &LoadBalancing, client: &Place) -> usize {
    if matches!(balancing.mode, LoadBalancingMode::Any | LoadBalancingMode::Passthrough) {
        return 0;
    }
    let shared = |scope: &&Scope| match scope {
        Scope::Region => workload.locality.region == client.locality.region,
        Scope::Zone => workload.locality.zone == client.locality.zone,
        Scope::Subzone => workload.locality.subzone == client.locality.subzone,
        Scope::Node => workload.node == client.node,
        Scope::Cluster => workload.cluster_id == client.cluster,
        Scope::Network => workload.network == client.network,
    };
    balancing.scopes.iter().take_while(shared).count()
}
