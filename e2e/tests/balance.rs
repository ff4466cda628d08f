//! A service with three endpoints: connections are shared by what is in progress, clients stay where the service asks for it,
//! and `culvert explain` says what would be decided.
//!
//! Needs root.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, PATIENCE, Pod, Running, World, wait_for};
use serde_json::Value;

const CLIENT: Pod = Pod("mesh", "client");
const CONNECTIONS: usize = 9;

fn service(more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: mesh}}\nspec:\n  selector: {{app: web}}\n  {more}\n  \
         ports: [{{name: command, port: 9000}}]\n"
    )
}

fn server(name: &str) -> String {
    let peer = env!("CARGO_BIN_EXE_peer");
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: mesh, labels: {{app: web}}}}\nspec:\n  nodeName: node-b\n  \
         terminationGracePeriodSeconds: 1\n  containers:\n    - {{name: main, image: peer, command: ['{peer}', serve, --extra, '0'], \
         readinessProbe: {{tcpSocket: {{port: 9000}}}}}}\n"
    )
}

/// Conversations with the service that go on while they are held.
fn open(world: &World, count: usize) -> Result<Vec<Running>> {
    let target = format!("{}:{COMMAND_PORT}", world.service_address("mesh", "web", Family::V4)?);
    let one = || {
        let mut talk = world.spawn_peer(CLIENT, &["talk", "stay", &target, "--number", "30000"])?;
        talk.line()?;
        Ok(talk)
    };
    (0..count).map(|_| one()).collect()
}

/// How many connections the client's proxy has open to each endpoint.
fn by_endpoint(world: &World) -> Result<BTreeMap<String, usize>> {
    let open = world.admin("node-a", "/connections")?;
    let mut counts = BTreeMap::new();
    for connection in open.as_array().context("not a list")? {
        let tunnel = connection["hbone"].as_str().context("not through a tunnel")?;
        *counts.entry(tunnel.to_owned()).or_default() += 1;
    }
    Ok(counts)
}

fn none_is_open(world: &World) -> Result<()> {
    wait_for("the end of all connections", PATIENCE, || Ok(by_endpoint(world)?.is_empty().then_some(())))
}

fn explained(world: &World, destination: &str) -> Result<Value> {
    let mut command = world.command();
    let output = command.args(["explain", "-n", "mesh", "client", destination, "-o", "json"]).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn explains(world: &World, checks: &mut Checks) {
    checks.check("explain says what would be decided and from what", || {
        let _open = open(world, 1)?;
        let said = explained(world, "web:9000")?;
        let endpoints = said["endpoints"].as_array().context("no endpoints")?;
        let load: u64 = endpoints.iter().filter_map(|one| one["load"].as_u64()).sum();
        ensure!(endpoints.len() == 3 && load == 1, "{said}");
        ensure!(said["decision"]["way"] == "tunnel" && said["authorization"]["allowed"] == true, "{said}");
        ensure!(explained(world, "192.0.2.1:443")?["decision"]["way"] == "passthrough", "an unknown address");
        ensure!(explained(world, "web").is_err(), "a destination without a port");
        let page = world.command().args(["explain", "-n", "mesh", "client", "web:9000"]).output()?;
        let page = String::from_utf8_lossy(&page.stdout).into_owned();
        ensure!(
            page.contains("Decision: a tunnel to the destination") && page.contains("Let in: yes"),
            "{page}"
        );
        Ok(())
    });
}

/// Z68.
#[test]
fn connections_are_shared_and_clients_stay() {
    let mut builder = World::builder("balance", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .client(CLIENT, "node-a")
        .manifest("web.yaml", &service(""));
    for name in ["web-0", "web-1", "web-2"] {
        builder = builder.manifest(&format!("{name}.yaml"), &server(name));
    }
    let world = builder.start().expect("a world");
    let mut checks = Checks::default();
    explains(&world, &mut checks);
    checks.check("open connections are shared evenly", || {
        none_is_open(&world)?;
        let _open = open(&world, CONNECTIONS)?;
        let counts = by_endpoint(&world)?;
        // Each gets three but for ties: one that has more than another is never preferred to it.
        ensure!(counts.len() == 3 && counts.values().all(|n| (1..=5).contains(n)), "{counts:?}");
        Ok(())
    });
    checks.check("with sessionAffinity a client stays with one endpoint", || {
        world.write("web.yaml", &service("sessionAffinity: ClientIP"))?;
        wait_for("the service's change", PATIENCE, || {
            let dump = world.admin("node-a", "/config_dump")?;
            let text = dump["services"].to_string();
            Ok(text.contains("\"ClientAddress\"").then_some(()))
        })?;
        none_is_open(&world)?;
        let _open = open(&world, CONNECTIONS)?;
        let counts = by_endpoint(&world)?;
        ensure!(counts.len() == 1, "{counts:?}");
        Ok(())
    });
    checks.finish();
}
