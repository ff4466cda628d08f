//! Certificates that live for 20 seconds under load, and everything that must not pass for one. One world serves both: the
//! attacks happen while the load runs.
//!
//! Needs root. Takes a little over two minutes.

mod attack;
mod authority;
mod issue;
mod load;

use culvert_e2e::checks::Checks;
use culvert_e2e::world::{Pod, World};

/// In the mesh, on `node-a`.
const CLIENT: Pod = Pod("mesh", "client");
/// In the mesh, on `node-b`.
const SERVERS: [Pod; 2] = [Pod("mesh", "server"), Pod("mesh", "other")];
/// Outside of the mesh, on `node-a`.
const ATTACKER: Pod = Pod("outside", "attacker");
/// Lifetime of every certificate in this world, seconds.
const LIFETIME: u64 = 20;
/// More than the load is long, in seconds: another port comes into use every second.
const PORTS: u16 = 150;

#[test]
fn short_lived_certificates_under_load_and_attack() {
    let mut builder = World::builder("certs", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .namespace("outside", false)
        .client(CLIENT, "node-a")
        .client(ATTACKER, "node-a")
        .argument("--controller-arg=--cert-ttl")
        .argument(&format!("--controller-arg={LIFETIME}s"));
    for server in SERVERS {
        builder = builder.server(server, "node-b", PORTS);
    }
    let world = builder.start().expect("a world");
    let mut checks = Checks::default();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| load::run(&world));
        attack::run(&world, &mut checks);
        authority::run(&world, &mut checks);
        let load = load.join().expect("the load does not panic");
        load::judge(&world, load, &mut checks);
    });
    checks.finish();
}
