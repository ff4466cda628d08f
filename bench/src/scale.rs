//! A large mesh: how long a proxy takes to load it, what it weighs, and whether traffic waits while all of it changes.
//!
//! Two nodes come up with the real controller, which stays the certificate authority. Then a control plane of ours with a
//! made-up mesh takes its place for the workload API, the proxies are replaced by new processes, and small requests go
//! from a pod of one node to a pod of the other: first while nothing changes, then while every workload does, then again
//! while nothing does. The same requests go between two pods outside of the mesh at the same time: what those wait is the
//! machine's doing.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::{Value, json};

use crate::probe::{Probed, Times};
use crate::world::{Route, Setup, World, processor_time, resident};

pub mod control;
mod mesh;

/// The namespace whose pods are enrolled.
const MESH_NAMESPACE: &str = "mesh";
/// The name under which proxies know the controller of a sandbox.
const SERVER_NAME: &str = "culvert-controller.culvert-system.svc";
/// What loading took for itself, a proxy has given back to the system by then.
const SETTLE: Duration = Duration::from_secs(5);
/// Where the made-up control plane listens, in the controller's namespace.
const PORT: u16 = 15112;

/// Arguments of `scale`.
#[derive(Debug, clap::Args)]
pub struct ScaleArgs {
    /// The `culvert` program; beside this one if absent.
    #[arg(long)]
    culvert: Option<PathBuf>,
    /// Workloads.
    #[arg(long, default_value_t = 100_000)]
    workloads: usize,
    /// Services.
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Changed workloads a second during churn.
    #[arg(long, default_value_t = 5_000)]
    rate: usize,
    /// Fail where a bound is crossed: 5 s to load, 2 KB a workload, and more stalls with churn than without.
    #[arg(long)]
    check: bool,
    /// `table` or `json`.
    #[arg(short, long, default_value = "table")]
    output: String,
}

/// What one proxy came to.
struct Loaded {
    node: String,
    seconds: f64,
    before: u64,
    after: u64,
    /// As `after`, [`SETTLE`] later.
    settled: u64,
    churned: u64,
    /// Processor time during churn, seconds.
    cpu: f64,
}

/// What the requests of one phase waited.
struct Phase {
    name: &'static str,
    mesh: Probed,
    direct: Probed,
}

/// The running control plane.
struct Control {
    child: Child,
    input: ChildStdin,
    lines: std::io::Lines<BufReader<ChildStdout>>,
}

/// Runs everything and prints it.
pub fn run(args: &ScaleArgs) -> anyhow::Result<()> {
    let culvert = match &args.culvert {
        Some(path) => path.clone(),
        None => crate::run::beside("culvert")?,
    };
    let world = World::start(culvert, "scale", Setup { programs: Some(programs), ..Setup::default() })?;
    let before: Vec<_> = world.proxy_memory()?;
    let mut control = Control::start(&world, args)?;
    take_over(&world)?;
    let mut loaded = Vec::new();
    for (node, before) in before {
        world.restart_proxy(&node)?;
        let seconds = control.event("loaded", &node)?["seconds"].as_f64().context("seconds")?;
        loaded.push(Loaded { node, seconds, before, after: 0, settled: 0, churned: 0, cpu: 0.0 });
    }
    each(&world, &mut loaded, |one, pid| set(&mut one.after, resident(pid)))?;
    std::thread::sleep(SETTLE);
    each(&world, &mut loaded, |one, pid| set(&mut one.settled, resident(pid)))?;
    // As long as it takes to change everything once, and never so short that a percentile means nothing.
    let seconds = (args.workloads / args.rate.max(1)).max(5) as u64;
    let mut phases = vec![phase(&world, "nothing changes", seconds)?];
    each(&world, &mut loaded, |one, pid| set(&mut one.cpu, processor_time(pid)))?;
    control.say("churn")?;
    phases.push(phase(&world, "everything changes", seconds)?);
    control.say("still")?;
    let churn = control.event("churned", "")?;
    each(&world, &mut loaded, |one, pid| {
        let before = one.cpu;
        set(&mut one.cpu, processor_time(pid).map(|now| now - before))
    })?;
    each(&world, &mut loaded, |one, pid| set(&mut one.churned, resident(pid)))?;
    phases.push(phase(&world, "nothing changes, again", seconds)?);
    drop(control.input);
    control.child.wait()?;
    print(args, &loaded, &phases, &churn)?;
    if args.check { check(args, &loaded, &phases) } else { Ok(()) }
}

/// Our programs, the proxy behind a script that listens to whom [`take_over`] says.
fn programs(dir: &Path, ours: &Path) -> anyhow::Result<PathBuf> {
    let bin = dir.join("bin");
    std::fs::create_dir_all(&bin)?;
    std::os::unix::fs::symlink(ours.join("controller"), bin.join("controller"))?;
    let (ours, roots) = (ours.join("ztunnel"), roots(dir));
    let script = format!(
        r#"#!/bin/bash
if [ "$1" = proxy ] && [ -e '{roots}' ]; then
  args=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --xds-address) args+=("$1" "${{2%:*}}:{PORT}" --ca-address "$2"); shift 2 ;;
      --xds-root-cert) args+=("$1" '{roots}'); shift 2 ;;
      *) args+=("$1"); shift ;;
    esac
  done
  set -- "${{args[@]}}"
fi
exec '{ours}' "$@"
"#,
        roots = roots.display(),
        ours = ours.display()
    );
    let path = bin.join("ztunnel");
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(bin)
}

/// From its being there on, proxies that start follow the made-up control plane; it holds the roots of both.
fn roots(dir: &Path) -> PathBuf {
    dir.join("roots.pem")
}

fn own_root(dir: &Path) -> PathBuf {
    dir.join("control-root.pem")
}

fn take_over(world: &World) -> anyhow::Result<()> {
    let mut all = std::fs::read_to_string(world.dir().join("state/controller/root-cert.pem"))?;
    all.push_str(&std::fs::read_to_string(own_root(world.dir()))?);
    Ok(std::fs::write(roots(world.dir()), all)?)
}

fn each(
    world: &World,
    loaded: &mut [Loaded],
    mut of: impl FnMut(&mut Loaded, u64) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let pids = world.proxies()?;
    for loaded in loaded {
        let (_, pid) = pids.iter().find(|(node, _)| *node == loaded.node).context("a proxy is gone")?;
        of(loaded, *pid)?;
    }
    Ok(())
}

fn set<T>(place: &mut T, value: anyhow::Result<T>) -> anyhow::Result<()> {
    *place = value?;
    Ok(())
}

fn phase(world: &World, name: &'static str, seconds: u64) -> anyhow::Result<Phase> {
    let start = |route: Route| {
        let mut command = world.bench(route);
        command.args(["probe", "--target", &world.target(route)?, "--seconds", &seconds.to_string()]);
        anyhow::Ok(command.stdout(Stdio::piped()).spawn()?)
    };
    let finish = |child: Child| {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "a probe failed ({})", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let (mesh, direct) = (start(Route::Mesh)?, start(Route::Direct)?);
    Ok(Phase { name, mesh: finish(mesh)?, direct: finish(direct)? })
}

impl Control {
    fn start(world: &World, args: &ScaleArgs) -> anyhow::Result<Self> {
        let mut command = world.bench_beside_controller();
        command
            .args(["scale-control", "--server-name", SERVER_NAME, "--listen", &format!("[::]:{PORT}")])
            .arg("--state")
            .arg(world.dir().join("state"))
            .arg("--root-cert-out")
            .arg(own_root(world.dir()))
            .args(["--workloads", &args.workloads.to_string(), "--services", &args.services.to_string()])
            .args(["--rate", &args.rate.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("piped")?;
        let lines = BufReader::new(child.stdout.take().context("piped")?).lines();
        let mut control = Self { child, input, lines };
        control.event("serving", "")?;
        Ok(control)
    }

    fn say(&mut self, word: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.input, "{word}")?)
    }

    /// The next event of this kind, and of this node if there is one.
    fn event(&mut self, kind: &str, node: &str) -> anyhow::Result<Value> {
        for line in &mut self.lines {
            let event: Value = serde_json::from_str(&line?)?;
            if event["event"] == kind && (node.is_empty() || event["node"] == node) {
                return Ok(event);
            }
        }
        anyhow::bail!("the control plane ended before {kind:?}")
    }
}

fn check(args: &ScaleArgs, loaded: &[Loaded], phases: &[Phase]) -> anyhow::Result<()> {
    for one in loaded {
        ensure!(one.seconds <= 5.0, "{}: loading took {:.1} s, more than 5", one.node, one.seconds);
        for (when, resident) in [("settled", one.settled), ("after churn", one.churned)] {
            let weight = weight(one.before, resident, args);
            ensure!(weight <= 2048, "{}: {weight} bytes a workload {when}, more than 2048", one.node);
        }
    }
    let stalls = |phase: &Phase| {
        let of = |probed: &Probed| probed.requests.stalls + probed.connections.stalls;
        // What pods outside of the mesh wait at the same time is not the proxies' doing.
        of(&phase.mesh).saturating_sub(of(&phase.direct))
    };
    let still = stalls(&phases[0]).max(stalls(&phases[2]));
    let churn = stalls(&phases[1]);
    ensure!(churn <= still, "{churn} stalls of more than 5 ms with churn, {still} without");
    Ok(())
}

fn weight(before: u64, after: u64, args: &ScaleArgs) -> u64 {
    after.saturating_sub(before) / args.workloads.max(1) as u64
}

fn print(args: &ScaleArgs, loaded: &[Loaded], phases: &[Phase], churn: &Value) -> anyhow::Result<()> {
    if args.output == "json" {
        let proxies = loaded.iter().map(|one| {
            json!({
                "node": one.node, "loadSeconds": one.seconds, "rssBefore": one.before, "rssLoaded": one.after,
                "rssSettled": one.settled, "settledAfterSeconds": SETTLE.as_secs(), "rssChurned": one.churned,
                "bytesPerWorkloadLoaded": weight(one.before, one.after, args),
                "bytesPerWorkload": weight(one.before, one.settled, args),
                "bytesPerWorkloadChurned": weight(one.before, one.churned, args), "churnCpuSeconds": one.cpu,
            })
        });
        let phases = phases
            .iter()
            .map(|phase| json!({ "phase": phase.name, "mesh": phase.mesh, "direct": phase.direct }));
        let (proxies, phases): (Vec<_>, Vec<_>) = (proxies.collect(), phases.collect());
        println!("{}", json!({ "proxies": proxies, "phases": phases, "churn": churn }));
        return Ok(());
    }
    println!(
        "{} workloads, {} services, {} changed workloads a second\n",
        args.workloads, args.services, args.rate
    );
    println!(
        "{:<10}{:>10}{:>12}{:>12}{:>8}{:>18}{:>8}{:>16}{:>8}{:>14}",
        "proxy",
        "loaded in",
        "empty, MB",
        "loaded, MB",
        "B each",
        format!("{} s later, MB", SETTLE.as_secs()),
        "B each",
        "after churn, MB",
        "B each",
        "churn, CPU s"
    );
    for one in loaded {
        println!(
            "{:<10}{:>8.2} s{:>12.1}{:>12.1}{:>8}{:>18.1}{:>8}{:>16.1}{:>8}{:>14.2}",
            one.node,
            one.seconds,
            one.before as f64 / 1e6,
            one.after as f64 / 1e6,
            weight(one.before, one.after, args),
            one.settled as f64 / 1e6,
            weight(one.before, one.settled, args),
            one.churned as f64 / 1e6,
            weight(one.before, one.churned, args),
            one.cpu
        );
    }
    println!("\npushes during churn: {churn}\n");
    println!(
        "{:<24}{:<14}{:<8}{:>8}{:>10}{:>10}{:>10}{:>10}{:>8}",
        "", "", "", "count", "p50 us", "p99 us", "p99.9 us", "max us", ">5 ms"
    );
    for phase in phases {
        for (path, probed) in [("mesh", &phase.mesh), ("direct", &phase.direct)] {
            line(phase.name, "requests", path, &probed.requests);
            line(phase.name, "connections", path, &probed.connections);
        }
    }
    Ok(())
}

fn line(phase: &str, what: &str, path: &str, times: &Times) {
    println!(
        "{phase:<24}{what:<14}{path:<8}{:>8}{:>10.0}{:>10.0}{:>10.0}{:>10.0}{:>8}",
        times.count, times.p50, times.p99, times.p999, times.max, times.stalls
    );
}
