//! What exists, to what is sent: pure, whole and deterministic. One [`World`] always gives the same [`Translation`].

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use culvert_proto::security::Authorization;
use culvert_proto::workload::{Address, address};
use serde::Serialize;

use crate::index::World;
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::object::Kind;

mod endpoints;
mod entries;
mod network_policy;
mod peer;
mod pods;
mod policy;
pub mod render;
pub mod routes;
mod services;
mod slices;
pub mod version;
mod view;
mod vip;
pub mod waypoints;

use network_policy::NetworkPolicies;
use routes::{Routed, Targeted};
use view::View;

/// What translation depends on besides the world.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    /// Of every identity issued here.
    pub trust_domain: String,
    /// First part of every workload's uid (D08).
    pub cluster_id: String,
    /// Network of every pod; empty is the default one.
    pub network: String,
    /// Where a policy without a selector is for the whole mesh (D31, D39).
    pub root_namespace: String,
    /// What service names end with.
    pub cluster_domain: String,
    /// The NetworkPolicies among the objects are all that the network enforces; otherwise nothing is known of a pod that none of
    /// them selects.
    pub network_policies: bool,
    /// Istio's class of waypoints is ours too.
    pub compat: bool,
}

/// Everything that is sent, and what became of each policy.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Translation {
    /// By resource name: a workload's uid, or `namespace/hostname` of a service (D01).
    pub addresses: BTreeMap<String, Address>,
    /// By resource name, `namespace/name`.
    pub policies: BTreeMap<String, Authorization>,
    /// Routes, for the waypoints of the Gateways that serve what they are for.
    pub routed: Arc<Routed>,
    /// Policies for requests, by Gateway.
    pub targeted: Targeted,
    /// One for each AuthorizationPolicy and PeerAuthentication, in the order of their names.
    pub policy_status: Vec<PolicyStatus>,
    /// What could not be sent as it was written, and why.
    pub notes: Vec<String>,
    /// The address that was allocated to each name without one; goes into the next translation so that it stays.
    pub vips: BTreeMap<String, Ipv4Addr>,
}

/// What became of a policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct PolicyStatus {
    /// `AuthorizationPolicy` or `PeerAuthentication`.
    pub kind: &'static str,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// It is enforced by the node tunnels, or by the waypoints that it is for.
    pub accepted: bool,
    /// One word: `Accepted`, `Narrowed`, `Widened`, `UnsupportedValue`, `Shadowed`, `Invalid`; of one with targets also
    /// `TargetNotFound` or `AncestorNotBound`.
    pub reason: &'static str,
    /// For a person: what is not as written, and where.
    pub message: String,
    /// The resource that carries it, if one does.
    pub resource: Option<String>,
    /// Of one with targets: that it has them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub targeted: bool,
    /// The Gateways whose waypoints enforce it, as `namespace/name`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub waypoints: Vec<String>,
}

impl Default for MeshSettings {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".to_owned(),
            cluster_id: "Kubernetes".to_owned(),
            network: String::new(),
            root_namespace: "istio-system".to_owned(),
            cluster_domain: "cluster.local".to_owned(),
            network_policies: true,
            compat: false,
        }
    }
}

/// Translates. `vips` is what the translation before allocated, so that a name keeps its address while it exists.
pub fn translate(world: &World, vips: &BTreeMap<String, Ipv4Addr>, settings: &MeshSettings) -> Translation {
    let view = View::new(world, settings);
    let mut out = Translation::default();
    let policies = policy::convert_all(&view, &mut out);
    let peers = peer::convert_all(&view, &mut out);
    routes::convert_all(&view, &mut out);
    out.policy_status.sort();
    let names = Names { policies, peers };
    let entries = entries::hosts(&view, vips, &mut out);
    let targets = services::targets(&view, &entries);
    services::convert_all(&view, &mut out);
    let restricted = NetworkPolicies::new(&view, &mut out);
    let slices = slices::Slices::new(&view, &mut out);
    pods::convert_all(&view, &targets, &slices, &names, &restricted, &mut out);
    slices.convert_others(&view, &mut out);
    entries::convert_all(&view, &entries, &targets, &names, &mut out);
    out
}

/// The resource name of a pod.
pub fn pod_uid(settings: &MeshSettings, namespace: &str, name: &str) -> String {
    format!("{}//Pod/{namespace}/{name}", settings.cluster_id)
}

/// The resource name of a WorkloadEntry.
pub fn entry_uid(settings: &MeshSettings, namespace: &str, name: &str) -> String {
    format!("{}/networking.istio.io/WorkloadEntry/{namespace}/{name}", settings.cluster_id)
}

/// The resource names of the pods and WorkloadEntries of a world: each is translated by itself.
pub fn of_workload_objects(world: &World, settings: &MeshSettings) -> impl Iterator<Item = String> {
    world.objects.keys().filter_map(|key| match key.kind {
        Kind::Pod => Some(pod_uid(settings, &key.namespace, &key.name)),
        Kind::WorkloadEntry => Some(entry_uid(settings, &key.namespace, &key.name)),
        _ => None,
    })
}

/// Which policies a workload is selected by.
struct Names {
    policies: policy::Selectors,
    peers: peer::Levels,
}

impl Names {
    /// Resource names, sorted, so that the same world gives the same bytes.
    fn of(&self, namespace: &str, labels: &StringMap) -> Vec<String> {
        let mut names = self.policies.selecting(namespace, labels);
        names.extend(self.peers.policy_for(namespace, labels));
        names.sort();
        names
    }
}

impl Translation {
    fn insert(&mut self, name: String, what: address::Type) {
        self.addresses.insert(name, Address { r#type: Some(what) });
    }
}

#[cfg(test)]
mod tests;
