//! What waypoints are told: routes to `culvert.waypoint.v1.Route`, policies with targets to `culvert.waypoint.v1.Policy`, and which
//! Gateway's waypoint is told of which.
//!
//! A route is for a service (GEP-1294): a *producer* route, in the service's namespace, for all its clients; a *consumer* route, in
//! another, for the clients of that namespace alone. Both go to the waypoints that serve the service. Host names mean nothing there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use culvert_k8s_api::Kind;
use culvert_k8s_api::routes::{ParentRef, RouteType};
use culvert_proto::waypoint as proto;

use super::view::View;
use super::{MeshSettings, Translation};
use crate::index::World;

mod backends;
mod convert;
mod parents;
mod patterns;
mod policies;
mod rules;

pub use policies::Targeted;

/// Kinds that routes are translated by, beside the routes themselves. No pods: a change of a route costs nothing that grows with them.
const KINDS: [Kind; 10] = [
    Kind::Namespace,
    Kind::Service,
    Kind::ServiceEntry,
    Kind::Gateway,
    Kind::GatewayClass,
    Kind::HTTPRoute,
    Kind::GRPCRoute,
    Kind::TCPRoute,
    Kind::TLSRoute,
    Kind::ReferenceGrant,
];

/// What the waypoint of one Gateway is told, by resource name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Told {
    /// `Kind/namespace/name/parent-namespace/parent-hostname/port`.
    pub routes: BTreeMap<String, Arc<proto::Route>>,
    /// `namespace/name`.
    pub policies: BTreeMap<String, Arc<proto::Policy>>,
}

/// What became of a route at one of its parents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParentStatus {
    /// The parent, as the route has it.
    pub parent: ParentRef,
    /// Condition `Accepted`.
    pub accepted: Verdict,
    /// Condition `ResolvedRefs`.
    pub resolved: Verdict,
    /// Message of condition `PartiallyInvalid`, if some of its rules are.
    pub partly: Option<String>,
}

/// A condition in the words of the Gateway API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it is so.
    pub is: bool,
    /// One word.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// A route by its kind, namespace and name.
pub type RouteName = (RouteType, String, String);

/// Everything about routes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routed {
    /// Gateway (`namespace/name`) to routes by resource name.
    pub told: BTreeMap<String, BTreeMap<String, Arc<proto::Route>>>,
    /// What became of each route at the parents that are ours to judge.
    pub status: BTreeMap<RouteName, Vec<ParentStatus>>,
}

impl Verdict {
    fn yes(reason: &'static str, message: String) -> Self {
        Self { is: true, reason, message }
    }

    fn no(reason: &'static str, message: String) -> Self {
        Self { is: false, reason, message }
    }
}

/// Translates routes and policies with targets; the rest is done.
pub(super) fn convert_all(view: &View<'_>, out: &mut Translation) {
    out.routed = Arc::new(parents::route_all(view));
    out.targeted = policies::convert_all(view, &mut out.policy_status);
}

/// Translates routes alone, of a whole world.
pub fn only_routes(world: &World, settings: &MeshSettings) -> Routed {
    parents::route_all(&View::of(world, settings, &KINDS))
}

impl Translation {
    /// What each Gateway's waypoint is told; one of which nothing is said is told nothing.
    pub fn told(&self) -> BTreeMap<String, Told> {
        let gateways: BTreeSet<&String> = self.routed.told.keys().chain(self.targeted.keys()).collect();
        let one = |gateway: &String| Told {
            routes: self.routed.told.get(gateway).cloned().unwrap_or_default(),
            policies: self.targeted.get(gateway).cloned().unwrap_or_default(),
        };
        gateways.into_iter().map(|gateway| (gateway.clone(), one(gateway))).collect()
    }
}
