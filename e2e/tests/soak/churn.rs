//! What comes and goes: pods, policies.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, PATIENCE, Pod, World, wait_for};

use crate::world::{CLIENT_A, CLIENT_B, SERVER_B};

/// Between two pushes.
const PUSH: Duration = Duration::from_millis(500);
/// Policies that are there at once.
const POLICIES: usize = 5;
/// Asked of a pod once it has answered for the first time.
const REQUESTS: &str = "20";
/// Open to a pod when it is deleted.
const CUT: usize = 2;

/// One pod, again and again: it comes, is asked, asks, goes with connections open to it and from it.
pub fn pod(world: &World, pod: Pod, stop: &AtomicBool) -> Result<String> {
    let file = format!("pod-{}-{}.yaml", pod.0, pod.1);
    let yaml = world.read(&file)?;
    let address = world.address(pod, Family::V4)?;
    let (target, port) = (SocketAddr::new(address, COMMAND_PORT).to_string(), COMMAND_PORT.to_string());
    let elsewhere = SocketAddr::new(world.address(SERVER_B, Family::V4)?, COMMAND_PORT).to_string();
    let mut times = 0;
    loop {
        let first = ["talk", "stay", &target, "--number", "0"];
        wait_for(&format!("{} to answer", pod.1), PATIENCE, || {
            Ok((world.peer(CLIENT_A, &first)?["end"] == "limit").then_some(()))
        })?;
        let host = address.to_string();
        for client in [CLIENT_A, CLIENT_B] {
            let args = ["load", "--targets", &host, "--port", &port, "--rate", REQUESTS, "--seconds", "1"];
            let outcome = world.peer(client, &args)?;
            ensure!(outcome["failed"] == 0, "{} to {} number {times}: {outcome}", client.1, pod.1);
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(format!("{} came and went {times} times", pod.1));
        }
        let mut open = Vec::new();
        for (client, target) in [(CLIENT_A, &target), (CLIENT_B, &target), (pod, &elsewhere)] {
            for _ in 0..CUT {
                let mut talk = world.spawn_peer(client, &["talk", "stay", target, "--number", "60000"])?;
                talk.line().with_context(|| format!("{} number {times}", pod.1))?;
                open.push((client, talk));
            }
        }
        world.remove(&file)?;
        wait_for("the pod's end", PATIENCE, || Ok(world.address(pod, Family::V4).is_err().then_some(())))?;
        for (client, talk) in open {
            // Those of the pod itself end with it.
            if client != pod {
                let seen = talk.finish()?;
                ensure!(seen["end"] != "limit", "a connection to {} outlived it: {seen}", pod.1);
            }
        }
        world.write(&file, &yaml)?;
        let back = wait_for("the pod's address", PATIENCE, || Ok(world.address(pod, Family::V4).ok()))?;
        ensure!(back == address, "{} has another address: {back}", pod.1);
        times += 1;
    }
}

/// Policies about a stranger that change, come and go; the whole mesh's mode changes as well. Nobody here is touched by any.
pub fn policies(world: &World, stop: &AtomicBool) -> Result<String> {
    let mut pushes: usize = 0;
    while !stop.load(Ordering::Relaxed) {
        let file = format!("deny-{}.yaml", pushes % POLICIES);
        match (pushes / POLICIES) % 3 {
            2 => world.remove(&file)?,
            _ => world.write(&file, &deny(pushes))?,
        }
        pushes += 1;
        thread::sleep(PUSH);
    }
    for number in 0..POLICIES {
        // Those of the last round may be gone already.
        let _ = world.remove(&format!("deny-{number}.yaml"));
    }
    Ok(format!("{pushes} pushes"))
}

fn deny(number: usize) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: no-stranger-{}, namespace: mesh}}\nspec:\n  action: DENY\n  rules:\n    \
         - from: [{{source: {{principals: [cluster.local/ns/mesh/sa/stranger-{number}]}}}}]\n",
        number % POLICIES
    )
}
