//! Our agent tells the other proxy of pods that come and go, and of a proxy that comes and goes.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, PATIENCE, World, build, wait_for};

use crate::world::{AMBIENT, AMBIENT_CLIENT, AMBIENT_SERVER, Direction, OUR_CLIENT, becomes};

pub fn all(world: &World, checks: &mut Checks) {
    checks.check("a pod on ambient's node goes and comes again with the same address", || {
        let file = "pod-mesh-server-b.yaml";
        let before = world.address(AMBIENT_SERVER, Family::V4)?;
        let yaml = world.read(file)?;
        for _ in 0..3 {
            world.remove(file)?;
            let gone = || Ok(world.address(AMBIENT_SERVER, Family::V4).is_err().then_some(()));
            wait_for("the pod's end", PATIENCE, gone)?;
            world.write(file, &yaml)?;
            let back = || Ok(world.address(AMBIENT_SERVER, Family::V4).ok());
            ensure!(wait_for("the pod", PATIENCE, back)? == before, "it has another address");
            becomes(world, OUR_CLIENT, AMBIENT_SERVER, true)?;
        }
        Ok(())
    });
    checks.check("pods leave the mesh and join it again", || {
        world.write("ns-mesh.yaml", &build::namespace("mesh", false))?;
        wait_for("the end of ambient's listeners", PATIENCE, || Ok((!captured(world)?).then_some(())))?;
        becomes(world, AMBIENT_CLIENT, AMBIENT_SERVER, true)?;
        world.write("ns-mesh.yaml", &build::namespace("mesh", true))?;
        wait_for("ambient's listeners", PATIENCE, || Ok(captured(world)?.then_some(())))?;
        for direction in [Direction::TO_AMBIENT, Direction::FROM_AMBIENT] {
            becomes(world, direction.client, direction.server, true)?;
        }
        Ok(())
    });
    checks.check("ambient's proxy is replaced under load from our node: 0 failed", || {
        let old = world.pid("proxy", Some(AMBIENT))?;
        let target = world.address(AMBIENT_SERVER, Family::V4)?.to_string();
        let port = COMMAND_PORT.to_string();
        let args = ["load", "--targets", &target, "--port", &port, "--rate", "50", "--seconds", "12"];
        let mut load = world.spawn_peer(OUR_CLIENT, &args)?;
        load.line()?;
        world.restart("proxy", Some(AMBIENT))?;
        let outcome = load.finish()?;
        println!("          {outcome}");
        ensure!(outcome["failed"] == 0, "{outcome}");
        ensure!(world.pid("proxy", Some(AMBIENT))? != old, "it is the same process");
        wait_for("the end of the old one", PATIENCE, || {
            Ok((!Path::new(&format!("/proc/{old}")).exists()).then_some(()))
        })
    });
}

/// Whether somebody listens for tunnels in the pod.
fn captured(world: &World) -> Result<bool> {
    let listening = world.pod_netns(AMBIENT_SERVER)?.run_with(|| {
        ["tcp", "tcp6"].map(|table| std::fs::read_to_string(format!("/proc/thread-self/net/{table}")))
    })?;
    let text = listening.into_iter().collect::<std::io::Result<String>>().context("the socket table")?;
    // Port 15008, state LISTEN.
    Ok(text.lines().any(|line| line.contains(":3AA0 ") && line.contains(" 0A ")))
}
