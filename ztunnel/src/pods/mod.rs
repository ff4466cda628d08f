//! The pods of this node: told by the agent over ZDS, each served by listeners inside its own namespace.

mod listen;
mod local;
mod places;
mod pod;
mod registry;
mod zds;
#[cfg(test)]
mod zds_tests;

pub use listen::adopt;
pub use local::{LocalPods, Served};
pub use places::{Full, Place, Places, PodPlaces};
pub use pod::{Pod, PodInfo, Shared};
pub use registry::Pods;
pub use zds::{ZdsError, run as run_zds};
