//! The mesh in a real cluster of two nodes: installed by the chart, joined by a label, watched while everything under it goes away
//! and comes back, and removed.
//!
//! Needs root and `KUBERNETES_BIN`, the directory of the programs of Kubernetes (`make kubernetes` builds it).

mod demo;
mod faults;
mod leave;
mod load;
mod rollout;
mod told;
mod waypoint;
mod world;

use culvert_e2e::checks::Checks;
use world::World;

/// Kills of the test that each change passes: everything there is once.
const KILLS: usize = 8;
/// Kills of the long test.
const MANY_KILLS: usize = 50;

/// By the checks of `waypoint.rs`, which say which: W01, W02, W14, W16, W28, W53, W54, W57, W58, W63, W72.
#[test]
fn the_mesh_in_a_real_cluster() {
    let world = World::start().expect("a cluster");
    let mut checks = Checks::default();
    demo::run(&world, &mut checks);
    rollout::run(&world, &mut checks);
    told::run(&world, &mut checks);
    waypoint::run(&world, &mut checks);
    faults::run(&world, &mut checks, KILLS);
    leave::check(&world, &mut checks);
    checks.finish();
}

#[test]
#[ignore = "ten minutes: make test-all"]
fn whatever_ends_fifty_times_comes_back() {
    let world = World::start().expect("a cluster");
    let mut checks = Checks::default();
    demo::run(&world, &mut checks);
    rollout::application(&world, &mut checks);
    faults::run(&world, &mut checks, MANY_KILLS);
    checks.finish();
}
