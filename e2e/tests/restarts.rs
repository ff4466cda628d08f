//! Programs of the mesh go away and come back under load: the controller, politely and not; a proxy, replaced by a
//! successor; a proxy that is killed.
//!
//! Needs root. Load is open-loop: connections begin on time whatever happens, so nothing hides in a pause.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::peer::{COMMAND_PORT, FIRST_EXTRA_PORT};
use culvert_e2e::world::{Family, PATIENCE, Pod, Running, World, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const CLIENT: Pod = Pod("mesh", "client");
const STRANGER: Pod = Pod("mesh", "stranger");
const SERVER: Pod = Pod("mesh", "server");
/// How long the proxies' open connections may go on after SIGTERM.
const DRAIN: Duration = Duration::from_secs(8);
/// Another port, thus another tunnel, comes into use every second of a load.
const PORTS: u16 = 40;

fn world() -> Result<World> {
    World::builder("restarts", env!("CARGO_BIN_EXE_peer"))
        .namespace("mesh", true)
        .client(CLIENT, "node-a")
        .client(STRANGER, "node-a")
        .server(SERVER, "node-b", PORTS)
        .service("mesh", "server", "server")
        .argument("--proxy-arg=--drain-deadline")
        .argument(&format!("--proxy-arg={}s", DRAIN.as_secs()))
        .start()
}

/// Load from the client to the server over both families; it has begun when this returns.
fn load(world: &World, rate: u32, seconds: u64) -> Result<Running> {
    let targets =
        [world.address(SERVER, Family::V4)?.to_string(), world.address(SERVER, Family::V6)?.to_string()];
    let (port, ports) = (FIRST_EXTRA_PORT.to_string(), PORTS.to_string());
    let (rate, seconds) = (rate.to_string(), seconds.to_string());
    let args = ["load", "--targets", &targets.join(","), "--port", &port, "--ports", &ports];
    let mut load =
        world.spawn_peer(CLIENT, &[&args[..], &["--rate", &rate, "--seconds", &seconds]].concat())?;
    load.line()?;
    Ok(load)
}

/// A conversation that is open when this returns.
fn open(world: &World, verb: &str, number: u64) -> Result<Running> {
    let target = SocketAddr::new(world.address(SERVER, Family::V4)?, COMMAND_PORT).to_string();
    let mut talk = world.spawn_peer(CLIENT, &["talk", verb, &target, "--number", &number.to_string()])?;
    talk.line()?;
    Ok(talk)
}

fn none_failed(load: Running) -> Result<()> {
    let outcome = load.finish()?;
    println!("          {outcome}");
    ensure!(outcome["failed"] == 0 && outcome["total"].as_u64() > Some(0), "{outcome}");
    Ok(())
}

/// Whether a new connection from the pod gets an answer.
fn reaches(world: &World, pod: Pod) -> Result<bool> {
    let target = SocketAddr::new(world.address(SERVER, Family::V4)?, COMMAND_PORT).to_string();
    let seen = world.peer(pod, &["talk", "stay", &target, "--number", "0"])?;
    Ok(seen["end"] == "limit")
}

/// Ends a program without warning; gone when this returns.
fn kill_now(world: &World, role: &str, node: Option<&str>) -> Result<i32> {
    let pid = world.pid(role, node)?;
    kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    wait_for("its end", PATIENCE, || Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(())))?;
    Ok(pid)
}

/// Waits for a new process of a program.
fn back(world: &World, role: &str, node: Option<&str>, old: i32) -> Result<()> {
    wait_for(&format!("another {role}"), PATIENCE, || {
        Ok((world.pid(role, node)? != old && world.ready(role, node)?).then_some(()))
    })
}

fn deny(name: &str, who: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: mesh}}\n\
         spec:\n  selector: {{matchLabels: {{app: server}}}}\n  action: DENY\n  rules:\n    \
         - from: [{{source: {{principals: [cluster.local/ns/mesh/sa/{who}]}}}}]\n"
    )
}

fn controller(world: &World, checks: &mut Checks) {
    checks.check("controller restarted and killed under load: 0 failed", || {
        let stay = open(world, "stay", 18_000)?;
        let load = load(world, 50, 20)?;
        world.restart("controller", None)?;
        for _ in 0..3 {
            let old = kill_now(world, "controller", None)?;
            back(world, "controller", None, old)?;
        }
        none_failed(load)?;
        let stayed = stay.finish()?;
        ensure!(stayed["end"] == "limit", "the connection that was open all the time: {stayed}");
        Ok(())
    });
    // asserts Z98
    checks.check(
        "policy stays in force while the controller is down, and an edit counts when it is back",
        || {
            ensure!(reaches(world, STRANGER)?, "the stranger is refused before there is a policy");
            world.write("deny-client.yaml", &deny("no-client", "client"))?;
            wait_for("the first policy", PATIENCE, || Ok((!reaches(world, CLIENT)?).then_some(())))?;
            // The supervisor's pause before a restart doubles each time: 2 s after the third, which is time to look around.
            for _ in 0..2 {
                let old = kill_now(world, "controller", None)?;
                back(world, "controller", None, old)?;
            }
            let old = kill_now(world, "controller", None)?;
            world.write("deny-stranger.yaml", &deny("no-stranger", "stranger"))?;
            world.remove("deny-client.yaml")?;
            let refused = !reaches(world, CLIENT)?;
            let still_down = !world.ready("controller", None)?;
            ensure!(still_down, "the controller was back too soon to tell");
            ensure!(refused, "the policy was forgotten while the controller was down");
            back(world, "controller", None, old)?;
            wait_for("the second policy", PATIENCE, || Ok((!reaches(world, STRANGER)?).then_some(())))?;
            wait_for("the end of the first", PATIENCE, || Ok(reaches(world, CLIENT)?.then_some(())))?;
            let refusal = |l: &Value| l["policy"].as_str().is_some_and(|p| p.contains("no-stranger"));
            world.wait_for_access("node-b", refusal)?;
            world.remove("deny-stranger.yaml")?;
            wait_for("the end of the second", PATIENCE, || Ok(reaches(world, STRANGER)?.then_some(())))
        },
    );
}

/// A successor starts, the predecessor drains: nobody who comes is refused, and nobody who finishes in time is cut.
fn proxy_is_replaced(world: &World, node: &str, checks: &mut Checks) {
    // asserts TRAP7, Z08, Z10, Z11
    checks.check(
        &format!("proxy of {node} replaced under load: old connections drain, new ones are served"),
        || {
            let old = world.pid("proxy", Some(node))?;
            // Five seconds of answer, so over before the deadline, but not before the SIGTERM.
            let long = open(world, "trickle", 50)?;
            let endless = open(world, "stay", 60_000)?;
            let load = load(world, 200, 14)?;
            let asked = Instant::now();
            world.restart("proxy", Some(node))?;
            println!("          the successor was ready after {:.1} s", asked.elapsed().as_secs_f64());
            ensure!(world.pid("proxy", Some(node))? != old, "it is the same process");
            ensure!(
                Path::new(&format!("/proc/{old}")).exists(),
                "the old proxy did not wait for its connections"
            );

            let drained = long.finish().context("the long answer")?;
            // The first of fifty lines of "N\n" is read before the rest is counted.
            ensure!(
                drained["end"] == "eof" && drained["received"]["bytes"] == 138,
                "the long answer: {drained}"
            );
            let cut = endless.finish().context("the endless conversation")?;
            ensure!(cut["end"] == "ECONNRESET", "the endless conversation: {cut}");
            let lasted = asked.elapsed();
            ensure!(lasted < DRAIN + Duration::from_secs(4), "it lasted {lasted:?}");
            none_failed(load)?;
            gone(old)
        },
    );
}

fn gone(pid: i32) -> Result<()> {
    let what = "the end of the old proxy";
    wait_for(what, PATIENCE, || Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(())))
}

/// A crash is not a restart: what was open is lost. But nothing goes around the mesh meanwhile, and service resumes.
fn proxy_is_killed(world: &World, node: &str, checks: &mut Checks) {
    checks.check(&format!("proxy of {node} killed: nothing goes around it, and service resumes"), || {
        let before = world.access_log("node-b")?.len();
        let old = kill_now(world, "proxy", Some(node))?;
        let around = reaches(world, CLIENT)?;
        ensure!(!around || world.ready("proxy", Some(node))?, "a connection went around the mesh");
        back(world, "proxy", Some(node), old)?;
        wait_for("service", PATIENCE, || Ok(reaches(world, CLIENT)?.then_some(())))?;
        for line in &world.access_log("node-b")?[before..] {
            let inbound = line["direction"] == "inbound" && line["reason"].is_null();
            ensure!(!inbound || line["security"] == "mutual_tls", "plaintext: {line}");
        }
        let load = load(world, 50, 3)?;
        none_failed(load)
    });
}

/// TRAP7.
#[test]
fn programs_come_and_go_under_load() {
    let world = world().expect("a world");
    let mut checks = Checks::default();
    controller(&world, &mut checks);
    for node in ["node-b", "node-a"] {
        proxy_is_replaced(&world, node, &mut checks);
    }
    for node in ["node-b", "node-a"] {
        proxy_is_killed(&world, node, &mut checks);
    }
    checks.check("all of it went through the tunnel", || {
        let log = world.access_log("node-b")?;
        let inbound = |line: &&Value| line["src.workload"] == "client" && line["security"] == "mutual_tls";
        let tunnelled = log.iter().filter(inbound).count();
        println!("          {tunnelled} connections");
        // A load of 20 s at 50 a second, and two of 14 s at 200.
        ensure!(tunnelled >= 50 * 20 + 200 * (14 + 14), "only {tunnelled} connections in the log of node-b");
        Ok(())
    });
    checks.finish();
}
