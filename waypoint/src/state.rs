//! What the waypoint knows now: one value that every decision reads whole.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use culvert_model::route::Routes;
use culvert_model::snapshot::Snapshot;

/// Everything that changes together (design.md, "Generations").
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Workloads and services.
    pub snapshot: Snapshot,
    /// Routes.
    pub routes: Routes,
}

/// The world of this moment. Readers take no lock; there is one writer, [`crate::control`].
#[derive(Debug, Default)]
pub struct State {
    world: ArcSwap<World>,
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
