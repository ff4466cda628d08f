//! What `culvert status` says of a cluster while something is wrong with it, and when all is well.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_cluster::Node;
use culvert_e2e::checks::Checks;
use culvert_e2e::programs;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::world::{PATIENCE, World};

/// A probe that has to fail three times, or the API server's patience with a kubelet.
const NOTICED: Duration = Duration::from_secs(40);
/// What a terminal of the usual size shows.
const SCREEN: (usize, usize) = (24, 80);

/// What is broken, and what has to be said of it: one of the reasons, of a thing with this in its name or on this node.
struct Fault {
    name: &'static str,
    reasons: &'static [&'static str],
    about: &'static str,
}

pub fn run(world: &World, checks: &mut Checks) {
    checks.check("culvert status says nothing is wrong, on one screen", || well(world));
    let faults = [
        Fault { name: "proxy", reasons: &["ProxyNotReady", "ProxyUnreachable"], about: "node-b" },
        Fault { name: "agent", reasons: &["AgentNotReady", "AgentUnreachable"], about: "node-a" },
        Fault {
            name: "controller",
            reasons: &["ControllerNotReady", "ControllerUnreachable"],
            about: "culvert-controller",
        },
        Fault { name: "kubelet", reasons: &["NodeNotReady", "KubeletUnreachable"], about: "node-b" },
        Fault { name: "kube-apiserver", reasons: &["ApiServerUnreachable"], about: "" },
    ];
    for fault in faults {
        checks.check(
            &format!("culvert status names a {} that does not answer, until it does", fault.name),
            || told(world, &fault),
        );
    }
}

/// `culvert status`, as a person or a script would call it; what it printed, and its exit code.
fn status(world: &World, args: &[&str]) -> Result<(String, Option<i32>)> {
    let program = programs::program("culvert")?;
    let mut command = world.api.command(&program.to_string_lossy());
    command.args(["status", "--mesh", "cluster"]).args(args).env_remove("CULVERT_STATE");
    let output = command.output().context("culvert")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(!said.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok((said, output.status.code()))
}

/// The problems that it lists; its exit code agrees with them.
fn problems(world: &World) -> Result<Vec<Value>> {
    let (said, code) = status(world, &["-o", "json"])?;
    let status: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
    let problems = status["problems"].as_array().context("no problems in it")?.clone();
    ensure!(code == Some(i32::from(!problems.is_empty())), "exit code {code:?} with {problems:?}");
    Ok(problems)
}

fn none(world: &World) -> Result<()> {
    world.api.wait("a status without problems", PATIENCE, |_| {
        let found = problems(world)?;
        ensure!(found.is_empty(), "{found:?}");
        Ok(Some(()))
    })
}

fn well(world: &World) -> Result<()> {
    none(world)?;
    let (page, code) = status(world, &[])?;
    ensure!(code == Some(0) && page.contains("All is well."), "{code:?}: {page}");
    let widest = page.lines().map(|line| line.chars().count()).max().unwrap_or_default();
    ensure!(
        page.lines().count() <= SCREEN.0 && widest <= SCREEN.1,
        "{} lines of {widest}: {page}",
        page.lines().count()
    );
    println!("{page}");
    Ok(())
}

fn told(world: &World, fault: &Fault) -> Result<()> {
    let hit = |problem: &Value| {
        let about = format!("{} {} {}", problem["object"]["name"], problem["node"], problem["message"]);
        fault.reasons.iter().any(|reason| problem["reason"] == *reason) && about.contains(fault.about)
    };
    let look = || {
        world.api.wait(&format!("one of {:?}", fault.reasons), NOTICED, |_| {
            let found = problems(world)?;
            ensure!(found.iter().any(hit), "{found:?}");
            Ok(found.into_iter().find(hit))
        })
    };
    let problem = match fault.name {
        "kubelet" => {
            let node = world.cluster.node(fault.about)?;
            node.program("kubelet")?.kill()?;
            let said = look();
            node.start("kubelet")?;
            said
        }
        "kube-apiserver" => {
            world.cluster.control_plane(fault.name)?.kill()?;
            let said = look();
            world.cluster.start(fault.name)?;
            said
        }
        _ => {
            let stopped = stop(world, fault)?;
            let said = look();
            // The kubelet may have replaced it by now.
            let _ = kill(stopped, Signal::SIGCONT);
            said
        }
    }?;
    println!("          {}: {}", problem["reason"], problem["message"]);
    none(world)
}

/// Stops the process where it is, so that it answers nobody and nobody starts another.
fn stop(world: &World, fault: &Fault) -> Result<Pid> {
    let words: &[&str] = match fault.name {
        "proxy" => &["/ztunnel", "proxy"],
        "agent" => &["/ztunnel", "agent"],
        _ => &["/controller"],
    };
    let meant = |node: &&Node| fault.name == "controller" || node.name() == fault.about;
    let mut all =
        world.cluster.nodes().iter().filter(meant).flat_map(|node| node.processes(words).unwrap_or_default());
    let victim = Pid::from_raw(all.next().with_context(|| format!("no {} runs", fault.name))?);
    kill(victim, Signal::SIGSTOP)?;
    Ok(victim)
}
