//! Both proxies renew from our certificate authority, again and again.

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, Running, World};
use serde_json::Value;

use crate::world::{AMBIENT, Direction};

/// Four lifetimes: each proxy renews at half of one, so about eight times.
const SECONDS: u64 = 48;

pub fn all(world: &World, checks: &mut Checks) {
    checks.check("connections stay and new ones succeed while certificates of 12 s are renewed", || {
        let before = expirations(world)?;
        let directions = [Direction::TO_AMBIENT, Direction::FROM_AMBIENT];
        let stay: Vec<Running> =
            directions.iter().map(|way| way.open(world, SECONDS * 1000)).collect::<Result<_>>()?;
        let loads: Vec<Running> = directions.iter().map(|way| load(world, way)).collect::<Result<_>>()?;
        for load in loads {
            let outcome = load.finish()?;
            println!("          {outcome}");
            ensure!(outcome["failed"] == 0 && outcome["total"].as_u64() > Some(0), "{outcome}");
        }
        for stay in stay {
            let seen = stay.finish()?;
            ensure!(seen["end"] == "limit", "a connection that was open all the time: {seen}");
        }
        let after = expirations(world)?;
        ensure!(
            !before.is_empty() && before.iter().all(|it| !after.contains(it)),
            "{before:?} then {after:?}"
        );
        Ok(())
    });
}

fn load(world: &World, way: &Direction) -> Result<Running> {
    let targets: Vec<String> = [Family::V4, Family::V6]
        .iter()
        .map(|family| Ok(way.target(world, *family, COMMAND_PORT)?.ip().to_string()))
        .collect::<Result<_>>()?;
    let (targets, port, seconds) = (targets.join(","), COMMAND_PORT.to_string(), SECONDS.to_string());
    let args = ["load", "--targets", &targets, "--port", &port, "--rate", "10", "--seconds", &seconds];
    let mut load = world.spawn_peer(way.client, &args)?;
    load.line()?;
    Ok(load)
}

/// When each certificate that the ambient proxy holds ends.
fn expirations(world: &World) -> Result<Vec<String>> {
    let dump = world.admin(AMBIENT, "/config_dump")?;
    let held = dump["certificates"].as_array().context("the dump has no certificates")?;
    let ends = held.iter().flat_map(|entry| entry["certChain"].as_array().into_iter().flatten());
    Ok(ends.filter_map(|chain: &Value| chain["expirationTime"].as_str().map(str::to_owned)).collect())
}
