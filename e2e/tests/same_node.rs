//! Between two pods of one node: what is handed over in the proxy, what crosses the network instead, and that policy is the same
//! on one node as across two.
//!
//! Needs root.

use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, PATIENCE, Pod, Running, World, wait_for};
use serde_json::Value;

const CLIENT: Pod = Pod("mesh", "client");
/// On the client's node.
const NEAR: Pod = Pod("mesh", "near");
/// On the other one.
const FAR: Pod = Pod("mesh", "far");
/// From the edit on disk to the end of a connection that it forbids.
const ENFORCED_MS: u64 = 1000;

const DENY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: mesh}
spec:
  action: DENY
  rules:
    - from: [{source: {principals: [cluster.local/ns/mesh/sa/client]}}]
";

fn network_policy(api: &str, kind: &str, selector: &str) -> String {
    format!(
        "apiVersion: {api}\nkind: {kind}\nmetadata: {{name: some, namespace: mesh}}\nspec: {{podSelector: {selector}}}\n"
    )
}

fn target(world: &World, pod: Pod) -> Result<SocketAddr> {
    Ok(SocketAddr::new(world.address(pod, Family::V4)?, COMMAND_PORT))
}

/// A conversation that goes on until it is cut; open when this returns.
fn open(world: &World, to: Pod) -> Result<Running> {
    let target = target(world, to)?.to_string();
    let mut talk = world.spawn_peer(CLIENT, &["talk", "stay", &target, "--number", "30000"])?;
    talk.line()?;
    Ok(talk)
}

/// What a short conversation comes to.
fn talk(world: &World, to: Pod) -> Result<Value> {
    let target = target(world, to)?.to_string();
    Ok(world.peer(CLIENT, &["talk", "stay", &target, "--number", "0"])?["end"].clone())
}

/// Lines of the client's node about connections to `to`.
fn lines(world: &World, to: Pod) -> Result<Vec<Value>> {
    let mut lines = world.access_log("node-a")?;
    lines.retain(|line| line["dst.workload"] == to.1);
    Ok(lines)
}

/// A new conversation with `to` leaves these two words in both records.
fn goes(world: &World, to: Pod, security: &str) -> Result<()> {
    wait_for(&format!("{security} to {}", to.1), PATIENCE, || {
        let before = lines(world, to)?.len();
        ensure!(talk(world, to)? == "limit", "it was cut");
        let all = wait_for("both records", PATIENCE, || {
            let all = lines(world, to)?;
            Ok((all.len() >= before + 2).then_some(all))
        })?;
        let new: Vec<&Value> = all[before..].iter().collect();
        let both = ["inbound", "outbound"].iter().all(|direction| {
            new.iter().any(|line| {
                line["direction"] == *direction
                    && line["security"] == security
                    && line["src.identity"] == "spiffe://cluster.local/ns/mesh/sa/client"
                    && line["dst.identity"] == format!("spiffe://cluster.local/ns/mesh/sa/{}", to.1)
                    && line["dst.hbone_addr"].is_null() == (security == "same_node")
            })
        });
        Ok(both.then_some(()))
    })
}

/// An edit cuts an open conversation with `to`, in time and by a reset, for this reason.
fn cut_by(world: &World, to: Pod, reason: &str, edit: impl FnOnce() -> Result<()>) -> Result<()> {
    let talk = open(world, to)?;
    edit()?;
    let edited = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let seen = talk.finish()?;
    ensure!(seen["end"] == "ECONNRESET", "it ended otherwise: {seen}");
    let took = seen["at"].as_u64().context("at")?.saturating_sub(edited);
    println!("          cut after {took} ms");
    ensure!(took <= ENFORCED_MS, "it was cut after {took} ms");
    let node = if to == FAR { "node-b" } else { "node-a" };
    let wanted = |line: &Value| line["reason"] == reason && line["direction"] == "inbound";
    world.wait_for_access(node, wanted).map(drop)
}

fn policy(world: &World, checks: &mut Checks) {
    // asserts Z28, Z67
    for to in [NEAR, FAR] {
        checks.check(&format!("a DENY cuts a live connection to {}", to.1), || {
            cut_by(world, to, "authorization_policy_late", || world.write("deny.yaml", DENY))?;
            world.remove("deny.yaml")?;
            wait_for("a connection", PATIENCE, || Ok((talk(world, to)? == "limit").then_some(())))
        });
    }
    // asserts Z50
    checks.check("new connections are refused on one node exactly as across", || {
        world.write("deny.yaml", DENY)?;
        let mut seen = Vec::new();
        for (to, node) in [(NEAR, "node-a"), (FAR, "node-b")] {
            wait_for("a refusal", PATIENCE, || Ok((talk(world, to)? != "limit").then_some(())))?;
            let there = world.wait_for_access(node, |line| {
                line["dst.workload"] == to.1
                    && line["direction"] == "inbound"
                    && line["reason"] == "authorization_policy"
            })?;
            let here = world.wait_for_access("node-a", |line| {
                line["dst.workload"] == to.1
                    && line["direction"] == "outbound"
                    && line["reason"] == "authorization_policy"
            })?;
            seen.push((
                talk(world, to)?,
                there["policy"].clone(),
                there["blame"].clone(),
                here["blame"].clone(),
            ));
        }
        ensure!(seen[0] == seen[1], "{seen:?}");
        ensure!(seen[0].1 == "mesh/no-client", "{seen:?}");
        world.remove("deny.yaml")?;
        wait_for("a connection", PATIENCE, || Ok((talk(world, NEAR)? == "limit").then_some(())))
    });
}

fn network_policies(world: &World, checks: &mut Checks) {
    // asserts Z28
    let selects_near = network_policy("networking.k8s.io/v1", "NetworkPolicy", "{matchLabels: {app: near}}");
    checks.check("a NetworkPolicy that selects either pod ends what was handed over", || {
        cut_by(world, NEAR, "network_policy", || world.write("net.yaml", &selects_near))
    });
    checks.check("and the next connection takes a tunnel", || goes(world, NEAR, "mutual_tls"));
    checks.check("one that selects neither does not matter", || {
        let other = network_policy("networking.k8s.io/v1", "NetworkPolicy", "{matchLabels: {app: far}}");
        world.write("net.yaml", &other)?;
        goes(world, NEAR, "same_node")
    });
    checks.check("one of a kind that cannot be read stands for all", || {
        world.write("net.yaml", &network_policy("cilium.io/v2", "CiliumNetworkPolicy", "{}"))?;
        goes(world, NEAR, "mutual_tls")
    });
    checks.check("without any it is handed over again", || {
        world.remove("net.yaml")?;
        goes(world, NEAR, "same_node")
    });
}

/// Z28 differs: handed over where nothing forbids it, with the same policy as across nodes.
#[test]
fn between_two_pods_of_a_node() {
    let world = World::builder("samenode", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .client(CLIENT, "node-a")
        .server(NEAR, "node-a", 0)
        .server(FAR, "node-b", 0)
        .start()
        .expect("a world");
    let mut checks = Checks::default();
    checks.check("on one node it is handed over", || goes(&world, NEAR, "same_node"));
    checks.check("to another node it goes through a tunnel", || {
        ensure!(talk(&world, FAR)? == "limit", "it was cut");
        let far = |line: &Value| line["dst.workload"] == "far" && line["security"] == "mutual_tls";
        world.wait_for_access("node-b", far).map(drop)
    });
    policy(&world, &mut checks);
    network_policies(&world, &mut checks);
    checks.finish();
}
