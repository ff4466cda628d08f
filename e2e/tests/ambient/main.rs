//! Our proxy on one node, an ambient node tunnel of another project on the other, both under our agent and our controller: pods
//! of both talk to each other both ways.
//!
//! Needs root, and `ZTUNNEL`, the path of that program: `make interop ZTUNNEL=path`. Without it these tests fail; no other command
//! runs them. What is asserted of the other program is only what ours depends on, or what it is known to do otherwise.

mod agent;
mod certificates;
mod policy;
mod tcp;
mod world;

use culvert_e2e::checks::Checks;
use world::{Direction, start};

#[test]
fn an_ambient_ztunnel_and_ours_carry_each_others_traffic() {
    let world = start("ambient", &[]);
    let mut checks = Checks::default();
    for direction in [Direction::TO_AMBIENT, Direction::FROM_AMBIENT] {
        tcp::all(&world, direction, &mut checks);
    }
    tcp::names(&world, &mut checks);
    checks.check("all of it went through the tunnel", || tcp::tunnelled(&world));
    for direction in [Direction::TO_AMBIENT, Direction::FROM_AMBIENT] {
        policy::all(&world, direction, &mut checks);
    }
    agent::all(&world, &mut checks);
    checks.finish();
}

#[test]
fn certificates_of_both_are_renewed_while_connections_go_on() {
    let world = start("ambient-ttl", &["--controller-arg=--cert-ttl", "--controller-arg=12s"]);
    let mut checks = Checks::default();
    certificates::all(&world, &mut checks);
    checks.finish();
}
