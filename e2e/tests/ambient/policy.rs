//! Policies of one proxy as the client of the other feels them.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, World};
use serde_json::Value;

use crate::world::{Direction, OURS, OUTSIDER, ambient_says, becomes, reaches};

/// From the edit on disk to the end of a connection that it forbids.
const ENFORCED_MS: u64 = 1000;

pub fn all(world: &World, direction: Direction, checks: &mut Checks) {
    denied(world, direction, checks);
    strict(world, direction, checks);
}

fn denied(world: &World, direction: Direction, checks: &mut Checks) {
    let name = direction.name;
    checks.check(&format!("{name}: a DENY written to disk cuts a live connection"), || {
        becomes(world, direction.client, direction.server, true)?;
        let talk = direction.open(world, 20_000)?;
        world.write("deny.yaml", &deny(direction))?;
        let edited = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let seen = talk.finish()?;
        ensure!(ended(&seen["end"]), "it ended otherwise: {seen}");
        let took = seen["at"].as_u64().context("at")?.saturating_sub(edited);
        println!("          cut after {took} ms");
        ensure!(took <= ENFORCED_MS, "it was cut after {took} ms");
        Ok(())
    });
    checks.check(&format!("{name}: new connections are refused"), || {
        let target = direction.target(world, Family::V4, COMMAND_PORT)?;
        let seen = direction.talk(world, target, "first-byte", "-", 0)?;
        // Our client's proxy makes a reset of the status 401, the other one an end.
        let ours = direction.server_node != OURS;
        ensure!(if ours { seen["first"] == "ECONNRESET" } else { ended(&seen["first"]) }, "{seen}");
        logged(world, direction)
    });
    checks.check(&format!("{name}: removing it lets connections in again"), || {
        world.remove("deny.yaml")?;
        becomes(world, direction.client, direction.server, true)
    });
}

/// Both proxies tell the refusal: who refused by the policy's name, who was refused by the answer.
fn logged(world: &World, direction: Direction) -> Result<()> {
    if direction.server_node == OURS {
        world.wait_for_access(OURS, |line| {
            line["reason"] == "authorization_policy"
                && line["policy"].as_str().is_some_and(|policy| policy.contains("no-client"))
        })?;
        ambient_says(world, "a refusal with status 401", |line| {
            line["direction"] == "outbound" && line["error"].as_str().is_some_and(|text| text.contains("401"))
        })?;
    } else {
        world.wait_for_access(OURS, |line| {
            line["blame"] == "policy" && line["error"].as_str().is_some_and(|text| text.contains("401"))
        })?;
    }
    Ok(())
}

/// The other proxy takes a reset for an end.
fn ended(end: &Value) -> bool {
    end == "ECONNRESET" || end == "eof"
}

fn strict(world: &World, direction: Direction, checks: &mut Checks) {
    checks.check(&format!("{}: STRICT refuses plaintext and serves the mesh", direction.name), || {
        ensure!(reaches(world, OUTSIDER, direction.server)?, "plaintext is refused before there is a policy");
        world.write("mtls.yaml", &mtls("STRICT"))?;
        becomes(world, OUTSIDER, direction.server, false)?;
        ensure!(direction.reaches(world)?, "the mesh is refused");
        world.write("mtls.yaml", &mtls("PERMISSIVE"))?;
        becomes(world, OUTSIDER, direction.server, true)
    });
}

/// For the server alone where ours enforces it. The other proxy judges live connections by the policies that the workload named
/// when they began and by those of its namespace, so for it the policy is the namespace's.
fn deny(direction: Direction) -> String {
    let (client, server) = (direction.client.1, direction.server.1);
    let selector = if direction.server_node == OURS {
        format!("selector: {{matchLabels: {{app: {server}}}}}\n  ")
    } else {
        String::new()
    };
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-client, namespace: mesh}}\nspec:\n  \
         {selector}action: DENY\n  rules:\n    \
         - from: [{{source: {{principals: [cluster.local/ns/mesh/sa/{client}]}}}}]\n"
    )
}

fn mtls(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: mesh}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}
