//! Manifests are edited while connections are open: what is enforced follows within a second.
//!
//! Needs root.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::COMMAND_PORT;
use culvert_e2e::world::{Family, PATIENCE, Pod, Running, World, build, wait_for};
use serde_json::Value;

const CLIENT: Pod = Pod("mesh", "client");
const SERVER: Pod = Pod("mesh", "server");
const OUTSIDER: Pod = Pod("outside", "outsider");
/// From the edit on disk to the end of a connection that it forbids.
const ENFORCED_MS: u64 = 1000;

const DENY: &str = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-client, namespace: mesh}
spec:
  selector: {matchLabels: {app: server}}
  action: DENY
  rules:
    - from: [{source: {principals: [cluster.local/ns/mesh/sa/client]}}]
";

fn mtls(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default, namespace: mesh}}\n\
         spec: {{mtls: {{mode: {mode}}}}}\n"
    )
}

/// A conversation that goes on until it is cut; open when this returns.
fn open(world: &World, pod: Pod) -> Result<Running> {
    let target = target(world)?.to_string();
    let mut talk = world.spawn_peer(pod, &["talk", "stay", &target, "--number", "30000"])?;
    talk.line()?;
    Ok(talk)
}

fn target(world: &World) -> Result<SocketAddr> {
    Ok(SocketAddr::new(world.address(SERVER, Family::V4)?, COMMAND_PORT))
}

fn reaches(world: &World, pod: Pod) -> Result<bool> {
    let target = target(world)?.to_string();
    Ok(world.peer(pod, &["talk", "stay", &target, "--number", "0"])?["end"] == "limit")
}

fn becomes(world: &World, pod: Pod, reachable: bool) -> Result<()> {
    let what = if reachable { "a connection" } else { "a refusal" };
    wait_for(what, PATIENCE, || Ok((reaches(world, pod)? == reachable).then_some(())))
}

/// An edit cuts an open conversation, in time and by a reset.
fn cut_by(world: &World, pod: Pod, edit: impl FnOnce() -> Result<()>) -> Result<()> {
    let talk = open(world, pod)?;
    edit()?;
    let edited = u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
    let seen = talk.finish()?;
    ensure!(seen["end"] == "ECONNRESET", "it ended otherwise: {seen}");
    let took = seen["at"].as_u64().context("at")?.saturating_sub(edited);
    println!("          cut after {took} ms");
    ensure!(took <= ENFORCED_MS, "it was cut after {took} ms");
    Ok(())
}

fn logged(world: &World, reason: &str, word: &str) -> Result<()> {
    let said = |line: &Value, key: &str| line[key].as_str().is_some_and(|text| text.contains(word));
    world.wait_for_access("node-b", |line| {
        line["reason"] == reason && (said(line, "error") || said(line, "policy"))
    })?;
    Ok(())
}

fn authorization(world: &World, checks: &mut Checks) {
    // asserts TRAP8, Z67, Z108
    checks.check(
        "a DENY written to disk cuts a live connection within a second, with the reason in the log",
        || {
            cut_by(world, CLIENT, || world.write("deny.yaml", DENY))?;
            logged(world, "authorization_policy_late", "no-client")
        },
    );
    checks.check("new connections are refused, with the reason in the log", || {
        ensure!(!reaches(world, CLIENT)?, "it was let in");
        logged(world, "authorization_policy", "no-client")
    });
    checks.check(
        "a bad edit is refused with file, line and reason, and what was good stays in force",
        || {
            world.write("deny.yaml", &DENY.replace("action: DENY", "action: DENI"))?;
            let log = world.state_dir().join("controller/controller.log");
            wait_for("the controller's word", PATIENCE, || {
                let text = std::fs::read_to_string(&log)?;
                let told = text.lines().any(|line| line.contains("deny.yaml") && line.contains("DENI"));
                Ok(told.then_some(()))
            })?;
            ensure!(!reaches(world, CLIENT)?, "the policy that was good is gone");
            Ok(())
        },
    );
    checks.check("removing the policy lets connections in again", || {
        world.remove("deny.yaml")?;
        becomes(world, CLIENT, true)
    });
}

fn mutual_tls(world: &World, checks: &mut Checks) {
    checks.check("STRICT cuts a live plaintext connection within a second", || {
        cut_by(world, OUTSIDER, || world.write("mtls.yaml", &mtls("STRICT")))
    });
    // asserts Z55
    checks.check("STRICT refuses new plaintext and still serves the mesh", || {
        ensure!(!reaches(world, OUTSIDER)?, "plaintext was let in");
        ensure!(reaches(world, CLIENT)?, "the mesh was refused");
        Ok(())
    });
    // asserts Z56
    checks.check("PERMISSIVE lets plaintext in again", || {
        world.write("mtls.yaml", &mtls("PERMISSIVE"))?;
        becomes(world, OUTSIDER, true)
    });
}

/// Whether the pod is captured: its port 15008 answers.
fn hbone(world: &World) -> Result<bool> {
    let to = SocketAddr::new(world.address(SERVER, Family::V4)?, 15008);
    let dialled =
        world.pod_netns(OUTSIDER)?.run_with(|| TcpStream::connect_timeout(&to, Duration::from_secs(2)))?;
    Ok(dialled.is_ok())
}

/// How often the proxies of both nodes list a connection to the server as open: none, one, or at both ends of a tunnel.
fn carried(world: &World) -> Result<usize> {
    let target = target(world)?.to_string();
    let mut carried = 0;
    for node in ["node-a", "node-b"] {
        let open = world.admin(node, "/connections")?;
        let open = open.as_array().context("not a list")?;
        carried += open.iter().filter(|connection| connection["destination"] == target).count();
    }
    Ok(carried)
}

fn enrolment(world: &World, checks: &mut Checks) {
    checks.check("without the label traffic is plain, and nothing of the mesh is left in the pods", || {
        world.write("ns-mesh.yaml", &build::namespace("mesh", false))?;
        wait_for("the end of port 15008", PATIENCE, || Ok((!hbone(world)?).then_some(())))?;
        becomes(world, CLIENT, true)?;
        let _open = open(world, CLIENT)?;
        ensure!(carried(world)? == 0, "the proxies still carry it");
        Ok(())
    });
    checks.check("with the label again traffic is tunnelled again", || {
        world.write("ns-mesh.yaml", &build::namespace("mesh", true))?;
        wait_for("port 15008", PATIENCE, || Ok(hbone(world)?.then_some(())))?;
        wait_for("a tunnel", PATIENCE, || {
            let _open = open(world, CLIENT)?;
            Ok((carried(world)? == 2).then_some(()))
        })?;
        let by_client = |line: &Value| line["src.workload"] == "client" && line["security"] == "mutual_tls";
        world.wait_for_access("node-b", by_client).map(drop)
    });
}

/// TRAP8.
#[test]
fn edits_are_enforced_within_a_second() {
    let world = World::builder("edits", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .namespace("outside", false)
        .client(CLIENT, "node-a")
        .client(OUTSIDER, "node-a")
        .server(SERVER, "node-b", 0)
        .manifest("mtls.yaml", &mtls("PERMISSIVE"))
        .start()
        .expect("a world");
    let mut checks = Checks::default();
    authorization(&world, &mut checks);
    mutual_tls(&world, &mut checks);
    enrolment(&world, &mut checks);
    checks.finish();
}
