//! What the waypoint knows now: one value that every decision reads whole.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use culvert_model::Str;
use culvert_model::address::NamespacedHostname;
use culvert_model::balance::Place;
use culvert_model::request::{PolicySet, RequestPolicy, Targets};
use culvert_model::route::Routes;
use culvert_model::snapshot::Snapshot;

/// Everything that changes together (design.md, "Generations").
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Workloads and services.
    pub snapshot: Snapshot,
    /// Routes.
    pub routes: Routes,
    /// Policies for requests.
    pub policies: Arc<Policies>,
    /// Where the waypoint itself is, once its own pod is known.
    pub place: Option<Place>,
}

/// All policies, sorted by whom they are for.
#[derive(Clone, Debug, Default)]
pub struct Policies {
    by_name: BTreeMap<Str, Arc<RequestPolicy>>,
    /// Of the services that a policy names.
    named: HashMap<NamespacedHostname, Arc<PolicySet>>,
    /// Of everything else.
    general: Arc<PolicySet>,
}

/// The world of this moment. Readers take no lock; there is one writer, [`crate::control`].
#[derive(Debug, Default)]
pub struct State {
    world: ArcSwap<World>,
}

impl Policies {
    /// These policies without those named `removed`, and with `added` in the place of what has their names.
    #[must_use]
    pub fn with(&self, removed: &[Str], added: Vec<(Str, RequestPolicy)>) -> Self {
        let mut by_name = self.by_name.clone();
        for name in removed {
            by_name.remove(name);
        }
        by_name.extend(added.into_iter().map(|(name, policy)| (name, Arc::new(policy))));
        let mut named = HashMap::new();
        for policy in by_name.values() {
            let Targets::Services(services) = &policy.targets else { continue };
            for service in services {
                named
                    .entry(service.clone())
                    .or_insert_with(|| Arc::new(PolicySet::new(by_name.values(), Some(service))));
            }
        }
        let general = Arc::new(PolicySet::new(by_name.values(), None));
        Self { by_name, named, general }
    }

    /// Those for a service; `None` for traffic that is addressed to a workload.
    pub fn of(&self, service: Option<&NamespacedHostname>) -> &Arc<PolicySet> {
        service.and_then(|service| self.named.get(service)).unwrap_or(&self.general)
    }

    /// All.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<RequestPolicy>> {
        self.by_name.values()
    }
}

impl State {
    /// For one decision.
    pub fn load(&self) -> Guard<Arc<World>> {
        self.world.load()
    }

    /// To keep, for as long as a request takes to decide on.
    pub fn load_full(&self) -> Arc<World> {
        self.world.load_full()
    }

    /// Puts another in force. Returns the one that was.
    pub fn commit(&self, world: Arc<World>) -> Arc<World> {
        self.world.swap(world)
    }
}
