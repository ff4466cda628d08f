//! Whatever ends without warning: a process of the mesh or of Kubernetes, or a whole node.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_cluster::Node;
use culvert_e2e::checks::Checks;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::load::{Load, MARKER, now};
use crate::rollout::NAMESPACE;
use crate::world::{PATIENCE, SYSTEM, World, is_ready, unread};

/// Traffic is whole again so long after a process of the mesh is back.
const WHOLE: f64 = 5.0;
/// Kubernetes' own programs are started again by the test, as a service manager would, after this.
const PAUSE: Duration = Duration::from_millis(500);
/// New connections a second, from each node.
const RATE: u32 = 20;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Controller,
    Agent(usize),
    Proxy(usize),
    Kubelet(usize),
    ApiServer,
}

const VICTIMS: [Victim; 8] = [
    Victim::Proxy(0),
    Victim::Agent(1),
    Victim::Controller,
    Victim::Kubelet(0),
    Victim::Proxy(1),
    Victim::ApiServer,
    Victim::Agent(0),
    Victim::Kubelet(1),
];

pub fn run(world: &World, checks: &mut Checks, kills: usize) {
    checks.check(
        &format!("{kills} processes killed under load: never plaintext, whole again within 5 s"),
        || killed(world, kills),
    );
    checks.check("after that, what the proxies know is what fresh ones know", || same_as_fresh(world));
    checks.check("a node is rebooted: not one packet of its pods goes around the mesh", || reboot(world));
}

impl Victim {
    fn node(self, world: &World) -> Option<&Node> {
        match self {
            Self::Agent(at) | Self::Proxy(at) | Self::Kubelet(at) => world.cluster.nodes().get(at),
            Self::Controller | Self::ApiServer => None,
        }
    }

    /// Kills it and waits until it is back.
    fn kill(self, world: &World) -> Result<()> {
        let container = |node: &Node, words: &[&str]| {
            let pids = node.processes(words)?;
            let victim = *pids.first().with_context(|| format!("no process {words:?} on {}", node.name()))?;
            kill(Pid::from_raw(victim), Signal::SIGKILL)?;
            wait(&format!("another {words:?}"), || {
                Ok(node.processes(words)?.into_iter().any(|pid| pid != victim).then_some(()))
            })
        };
        match (self, self.node(world)) {
            (Self::Agent(_), Some(node)) => container(node, &["/ztunnel", "agent"]),
            (Self::Proxy(_), Some(node)) => container(node, &["/ztunnel", "proxy"]),
            (Self::Kubelet(_), Some(node)) => {
                node.program("kubelet")?.kill()?;
                sleep(PAUSE);
                node.start("kubelet").map(drop)
            }
            (Self::Controller, _) => {
                let runs = |node: &&Node| node.processes(&["/controller"]).is_ok_and(|pids| !pids.is_empty());
                let node = world.cluster.nodes().iter().find(runs).context("no controller runs")?;
                container(node, &["/controller"])
            }
            (Self::ApiServer, _) => {
                world.cluster.control_plane("kube-apiserver")?.kill()?;
                sleep(PAUSE);
                world.cluster.start("kube-apiserver").map(drop)
            }
            (_, None) => anyhow::bail!("no such node"),
        }
    }
}

fn killed(world: &World, kills: usize) -> Result<()> {
    // One kill, its recovery and a little quiet: 8 s at most on average.
    let seconds = 8 * kills as u64;
    let (outcome, report) = world.capture(MARKER, || {
        let loads = [
            Load::start(world, NAMESPACE, "load-a", "node-a", RATE, seconds)?,
            Load::start(world, NAMESPACE, "load-b", "node-b", RATE, seconds)?,
        ];
        let begun = Instant::now();
        let mut windows = Vec::new();
        // The order is another in each run, and is told.
        let mut word = u64::from(std::process::id());
        // Each of them once, then any.
        let mut first = VICTIMS.into_iter();
        for _ in 0..kills {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let victim = first.next().unwrap_or(VICTIMS[(word >> 33) as usize % VICTIMS.len()]);
            let from = now();
            victim.kill(world).with_context(|| format!("{victim:?}"))?;
            let back = now();
            windows.push((victim, from, back));
            // What fails after this long is a failure of the test, whatever was killed.
            let until = Instant::now() + Duration::from_secs_f64(WHOLE + 1.0);
            while Instant::now() < until && begun.elapsed() < Duration::from_secs(seconds) {
                sleep(Duration::from_millis(100));
            }
        }
        let mut failures = Vec::new();
        let mut total = 0;
        for load in loads {
            let outcome = load.finish()?;
            total += outcome.total;
            failures.extend(outcome.failures);
        }
        Ok((windows, failures, total))
    })?;
    let (windows, failures, total) = outcome;
    unread(&report, MARKER)?;
    println!("          {total} connections, {} failed while something was gone", failures.len());
    for (at, why) in &failures {
        let allowed = windows.iter().any(|(victim, from, back)| {
            // A connection that began just before may fail with the process. Kubernetes' own programs carry no traffic.
            matches!(victim, Victim::Proxy(_)) && (from - 10.0..back + WHOLE).contains(at)
        });
        let last = windows.iter().rev().find(|(_, from, _)| from <= at);
        ensure!(allowed, "a connection failed at {at} ({why}); before that {last:?}");
    }
    world.api.wait("every pod", PATIENCE, |_| {
        let pods = [world.pods(SYSTEM)?, world.pods(NAMESPACE)?].concat();
        Ok(pods.iter().all(|pod| is_ready(pod) || pod["status"]["phase"] == "Succeeded").then_some(()))
    })
}

/// What a proxy knows of the mesh: each thing as text, whatever the order in which it is shown.
fn known(node: &Node) -> Result<BTreeSet<String>> {
    let pid = *node.processes(&["/ztunnel", "proxy"])?.first().context("no proxy runs")?;
    let net = format!("--net=/proc/{pid}/ns/net");
    let said = culvert_cluster::run(std::process::Command::new("nsenter").args([
        &net,
        "--",
        "curl",
        "-s",
        "--noproxy",
        "*",
        "http://127.0.0.1:15000/config_dump",
    ]))?;
    let dump: serde_json::Value = serde_json::from_str(&said)?;
    let mut all = BTreeSet::new();
    for kind in ["workloads", "services", "policies"] {
        let of = dump[kind]
            .as_array()
            .with_context(|| format!("no {kind} in {:?}", dump.as_object().map(|it| it.keys())))?;
        all.extend(of.iter().map(|one| format!("{kind} {one}")));
    }
    Ok(all)
}

fn same_as_fresh(world: &World) -> Result<()> {
    let before: Vec<_> = world.cluster.nodes().iter().map(known).collect::<Result<_>>()?;
    ensure!(before[0].len() > 4, "{:?}", before[0]);
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).next().cloned();
    ensure!(
        before[0] == before[1],
        "nodes differ: {:?}, {:?}",
        only(&before[0], &before[1]),
        only(&before[1], &before[0])
    );
    for node in world.cluster.nodes() {
        let pid = *node.processes(&["/ztunnel", "proxy"])?.first().context("no proxy runs")?;
        kill(Pid::from_raw(pid), Signal::SIGKILL)?;
    }
    wait("the same from fresh proxies", || {
        for (node, before) in world.cluster.nodes().iter().zip(&before) {
            let after = known(node)?;
            ensure!(
                after == *before,
                "{}: gone {:?}, new {:?}",
                node.name(),
                only(before, &after),
                only(&after, before)
            );
        }
        Ok(Some(()))
    })
}

fn wait<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    culvert_e2e::world::wait_for(what, PATIENCE, &mut look)
}

/// C19, C34.
fn reboot(world: &World) -> Result<()> {
    let node = world.cluster.node("node-b")?;
    let (outcome, report) = world.capture(MARKER, || {
        // It begins to talk with its first instruction, and is started again whenever it ends.
        let service = world.api.get(&format!("/api/v1/namespaces/{NAMESPACE}/services/echo"))?;
        let address = service["spec"]["clusterIP"].as_str().context("no address")?.to_owned();
        let command =
            ["peer", "load", "--targets", &address, "--port", "9000", "--rate", "20", "--seconds", "600"];
        let pod = json!({
            "metadata": { "name": "hasty", "labels": { "app": "hasty" } },
            "spec": { "nodeName": "node-b", "terminationGracePeriodSeconds": 0,
                "containers": [{ "name": "main", "image": "culvert.test/peer:1", "command": command }] },
        });
        world.api.create(&format!("/api/v1/namespaces/{NAMESPACE}/pods"), &pod)?;
        world.wait_ready(NAMESPACE, 3)?;
        let namespaces = node.pod_namespaces()?;
        node.cut_power()?;
        node.power_on()?;
        world.api.wait("the pods of the node", PATIENCE * 2, |_| {
            let again = node.pod_namespaces()?;
            let pods = [world.pods(SYSTEM)?, world.pods(NAMESPACE)?].concat();
            let restarted = pods.iter().filter(|pod| pod["spec"]["nodeName"] == "node-b").all(|pod| {
                is_ready(pod) && pod["status"]["containerStatuses"][0]["restartCount"].as_u64() > Some(0)
            });
            Ok((restarted && again.iter().all(|it| !namespaces.contains(it))).then_some(()))
        })?;
        // It talks to the pod on the other node from inside of the mesh.
        wait("mutual TLS from the rebooted node", || {
            let log = world.log(world.cluster.node("node-a")?, "ztunnel")?;
            let since = log
                .lines()
                .rev()
                .take(200)
                .any(|line| line.contains("direction=inbound") && line.contains("hasty"));
            Ok(since.then_some(()))
        })?;
        world.api.delete(&format!("/api/v1/namespaces/{NAMESPACE}/pods/hasty"))
    })?;
    let () = outcome;
    ensure!(report.port(15008) > 0, "nothing went through the mesh");
    ensure!(
        report.hits(MARKER.as_bytes()) == 0,
        "{} packets went around the mesh",
        report.hits(MARKER.as_bytes())
    );
    Ok(())
}
