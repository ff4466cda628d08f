//! What pods that stay do all the time.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, Pod, Running, World};

use crate::world::{CLIENT_A, CLIENT_B, OUTSIDER, SERVER_A, SERVER_B};

/// New connections of one pod to another at a steady rate.
#[derive(Clone, Copy, Debug)]
pub struct Steady {
    client: Pod,
    server: Pod,
    /// By the Service's address, not the pod's.
    service: bool,
    /// Connections a second.
    rate: u32,
}

/// Across the nodes both ways, by address and by Service; within a node; from outside of the mesh. 100 a second in all.
pub const STEADY: [Steady; 5] = [
    Steady { client: CLIENT_A, server: SERVER_B, service: false, rate: 30 },
    Steady { client: CLIENT_A, server: SERVER_B, service: true, rate: 20 },
    Steady { client: CLIENT_B, server: SERVER_A, service: false, rate: 30 },
    Steady { client: CLIENT_A, server: SERVER_A, service: false, rate: 10 },
    Steady { client: OUTSIDER, server: SERVER_B, service: false, rate: 10 },
];
/// Who has conversations of every kind with whom.
pub const TALKERS: [(Pod, Pod); 3] = [(CLIENT_A, SERVER_B), (CLIENT_B, SERVER_A), (CLIENT_A, SERVER_A)];
/// Every way to end a connection, and a hundred that say nothing for seconds.
const VERBS: [(&str, u64); 12] = [
    ("idle", 100),
    ("half-close-client", 0),
    ("reset-by-client", 0),
    ("reset-by-server", 0),
    ("leave", 0),
    ("half-close-server", 0),
    ("reset-by-client-upload", 0),
    ("reset-by-server-download", 0),
    ("fin-then-reset", 0),
    ("reset-after-fin", 0),
    ("reset-by-client-download", 0),
    ("bulk", 8 << 20),
];

pub fn steady(world: &World, steady: &Steady, length: Duration) -> Result<String> {
    let name = format!("{} to {}", steady.client.1, steady.server.1);
    let outcome = load(world, steady, length)?.finish().with_context(|| name.clone())?;
    ensure!(outcome["failed"] == 0, "{name}: {outcome}");
    Ok(format!("{name}: {outcome}"))
}

/// Connections begin at that rate; they have begun when this returns.
fn load(world: &World, steady: &Steady, length: Duration) -> Result<Running> {
    let (rate, seconds) = (steady.rate.to_string(), length.as_secs().to_string());
    let targets = [Family::V4, Family::V6].map(|family| {
        if steady.service {
            service(world, steady.server, family)
        } else {
            world.address(steady.server, family)
        }
    });
    let targets = targets.into_iter().map(|it| Ok(it?.to_string())).collect::<Result<Vec<_>>>()?.join(",");
    let port = COMMAND_PORT.to_string();
    let args = ["load", "--targets", &targets, "--port", &port, "--rate", &rate, "--seconds", &seconds];
    let mut load = world.spawn_peer(steady.client, &args)?;
    load.line()?;
    Ok(load)
}

fn service(world: &World, server: Pod, family: Family) -> Result<IpAddr> {
    world.service_address(server.0, server.1, family)
}

/// One conversation after another, by turns over both families.
pub fn talk(world: &World, client: Pod, server: Pod, stop: &AtomicBool) -> Result<String> {
    let targets = [Family::V4, Family::V6]
        .map(|family| Ok(SocketAddr::new(world.address(server, family)?, COMMAND_PORT).to_string()));
    let targets = targets.into_iter().collect::<Result<Vec<_>>>()?;
    let mut count: usize = 0;
    while !stop.load(Ordering::Relaxed) {
        let (verb, number) = VERBS[count % VERBS.len()];
        let target = &targets[(count / VERBS.len()) % targets.len()];
        let seen = world.peer(client, &["talk", verb, target, "--number", &number.to_string()])?;
        ensure!(seen["failed"].is_null(), "{verb} to {target}: {seen}");
        if verb == "idle" {
            ensure!(seen["alive"] == number, "{seen}");
        }
        count += 1;
    }
    Ok(format!("{} with {}: {count} conversations", client.1, server.1))
}

/// One connection that is open all the time, over every renewal and push.
pub fn stay(world: &World, length: Duration) -> Result<String> {
    let target = SocketAddr::new(world.address(SERVER_B, Family::V4)?, COMMAND_PORT).to_string();
    let milliseconds = length.as_millis().to_string();
    let seen = world.peer(CLIENT_A, &["talk", "stay", &target, "--number", &milliseconds])?;
    ensure!(seen["end"] == "limit", "the connection that stays was cut: {seen}");
    Ok(format!("a connection that stayed asked {} questions", seen["asked"]))
}

/// A little of everything: what is made once for good is made before the first count.
pub fn touch_everything(world: &World) -> Result<()> {
    for one in STEADY {
        let outcome = load(world, &Steady { rate: 20, ..one }, Duration::from_secs(1))?.finish()?;
        ensure!(outcome["failed"] == 0, "{outcome}");
    }
    Ok(())
}
