//! A mesh of 5,000 pods and 1,000 services under a real API server, objects only: what the controller needs for it, how soon a
//! proxy knows it, how soon a change counts, and what a gap does.
//!
//! Needs what `api_server` needs: `make api-server`.

mod api;
mod changes;
mod objects;
mod recorder;
mod relay;

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::apiserver::{AUDIENCE, Cluster, Controller, Proxy, SYSTEM};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::{PATIENCE, wait_for};
use culvert_runtime::tasks::Tasks;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::runtime::Runtime;

use api::Api;
use changes::{Change, Times};
use objects::{ALL_PODS, CLIENT, NAMESPACES, POLICIES, Pod, SERVICES};
use recorder::Recorder;
use relay::Relay;

/// Pods of services and the client.
const WORKLOADS: usize = ALL_PODS + 1;
/// Most memory a pod, bytes, once a controller has settled.
const MEMORY: u64 = 20_000;
/// Longest time from a proxy's start to its first whole mesh.
const FIRST_SYNC: Duration = Duration::from_secs(5);
/// Longest time from a change to its enforcement, for 99 of 100.
const CHANGE: Duration = Duration::from_secs(1);
/// Changes of each kind, one after the other.
const ROUNDS: usize = 60;
const BURSTS: usize = 3;
const NODE: &str = "node-0";
const A: &str = "controller";
const B: &str = "controller-b";

/// Memory that a process has, and the most it ever had, bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    now: u64,
    most: u64,
}

struct Mesh {
    cluster: Cluster,
    runtime: Runtime,
    tasks: Tasks,
    api: Api,
}

/// A state that the proxy put in force.
#[derive(Clone, Copy, Debug)]
struct Commit {
    at: OffsetDateTime,
    generation: u64,
    workloads: usize,
}

/// Proxies and what is between them and the controllers.
struct Watched {
    relay: Relay,
    proxy: Proxy,
    recorder: Recorder,
}

impl Mesh {
    fn start() -> Result<Self> {
        let cluster = Cluster::start()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let tasks = Tasks::new("test");
        let api = runtime.block_on(Api::open(&cluster.path("kubeconfig")))?;
        wait_for("the namespace of nodes' leases, which the API server makes", PATIENCE, || {
            Ok((cluster.get("/api/v1/namespaces/kube-node-lease")?["kind"] == "Namespace").then_some(()))
        })?;
        objects::before(&cluster)?;
        cluster.helm(&["install", "culvert", "--namespace", SYSTEM])?;
        wait_for("the policies' kind", PATIENCE, || {
            Ok((cluster.get(&objects::policy_path(0))?["items"].is_array()).then_some(()))
        })?;
        cluster.pod(SYSTEM, "ztunnel-0", NODE, "ztunnel", &json!({}))?;
        Ok(Self { cluster, runtime, tasks, api })
    }

    fn memory(&self, name: &str) -> Result<Memory> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.cluster.pid(name)?))?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
            let kilobytes: u64 = line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?;
            anyhow::Ok(kilobytes * 1024)
        };
        Ok(Memory { now: field("VmRSS")?, most: field("VmHWM")? })
    }

    /// Its memory once that has stayed within 1 % for 3 s.
    fn settled(&self, name: &str) -> Result<Memory> {
        let mut since = (Instant::now(), self.memory(name)?);
        wait_for("memory that settles", PATIENCE * 3, || {
            let memory = self.memory(name)?;
            if memory.now.abs_diff(since.1.now) * 100 > since.1.now {
                since = (Instant::now(), memory);
            }
            Ok((since.0.elapsed() > Duration::from_secs(3)).then_some(memory))
        })
    }

    /// Waits until a controller serves as many addresses and policies.
    fn serves(&self, controller: &Controller) -> Result<()> {
        wait_for("a controller that serves everything", PATIENCE * 3, || {
            let metrics = controller.page("/metrics")?;
            let served = |kind: &str| -> usize {
                let name = format!("culvert_controller_resources{{type=\"{kind}\"}} ");
                let line = metrics.lines().find_map(|line| line.strip_prefix(&name));
                line.and_then(|count| count.parse().ok()).unwrap_or_default()
            };
            let all = served("Address") >= WORKLOADS + NAMESPACES * SERVICES
                && served("Authorization") >= NAMESPACES * POLICIES;
            Ok(all.then_some(()))
        })
    }

    fn fill(&self) -> Result<()> {
        let started = Instant::now();
        objects::services(&self.cluster)?;
        objects::policies(&self.cluster)?;
        objects::pods(&self.cluster)?;
        let took = started.elapsed().as_secs_f64();
        let bytes = objects::bytes_a_pod(&self.cluster)?;
        println!(
            "        {ALL_PODS} pods of {bytes} bytes of JSON, {} services, {} policies made in {took:.1} s",
            NAMESPACES * SERVICES,
            NAMESPACES * POLICIES,
        );
        ensure!((8_000..13_000).contains(&bytes), "that is not what pods look like");
        Ok(())
    }

    /// What the proxy put in force, in order.
    fn commits(&self) -> Result<Vec<Commit>> {
        let log = self.cluster.log("proxy")?;
        // The last line may be unfinished.
        let lines = log.split_inclusive('\n').filter(|it| it.ends_with('\n') && it.contains("committed"));
        let commit = |line: &str| {
            let at = OffsetDateTime::parse(line.split_whitespace().next()?, &Rfc3339).ok()?;
            let generation = number(line, "generation=")?;
            Some(Commit { at, generation, workloads: usize::try_from(number(line, "workloads=")?).ok()? })
        };
        lines.map(|line| commit(line).with_context(|| line.to_owned())).collect()
    }

    /// Once a controller had all policies, it never had fewer.
    fn kept_policies(&self, controller: &str) -> Result<()> {
        let log = self.cluster.log(controller)?;
        let counts = log.lines().filter(|line| line.contains("changed generation="));
        let counts: Vec<u64> = counts.filter_map(|line| number(line, "policies=")).collect();
        let all = (NAMESPACES * POLICIES) as u64;
        let short = counts.iter().skip_while(|count| **count < all).find(|count| **count < all);
        ensure!(short.is_none(), "{controller} had {short:?} policies for a while");
        Ok(())
    }

    /// Makes changes at once; each is timed until the proxy's first commit of the generation that brought it to the recorder.
    fn burst(&self, watched: &Watched, changes: Vec<Change>, times: &mut Times) -> Result<()> {
        watched.recorder.since();
        let admin = watched.proxy.admin;
        let written = self.runtime.block_on(async {
            let written = changes::write_all(&self.api, admin, changes).await?;
            changes::all_hold(admin, &written).await?;
            anyhow::Ok(written)
        })?;
        for (change, since) in written {
            let generation = wait_for("the record", PATIENCE, || {
                let names = change.names();
                let known =
                    watched.recorder.look(|it| names.iter().map(|name| it.first(name)).collect::<Vec<_>>());
                Ok(known.into_iter().collect::<Option<Vec<_>>>().and_then(|it| it.into_iter().max()))
            })?;
            let commits = self.commits()?;
            let commit = commits.iter().find(|it| it.generation >= generation).context("no such commit")?;
            times.put(change, (commit.at - since).try_into().unwrap_or_default());
        }
        Ok(())
    }

    fn watch(&mut self, controller: &Controller) -> Result<Watched> {
        let token = self.cluster.token("token", SYSTEM, "ztunnel", "ztunnel-0", AUDIENCE)?;
        let roots = self.cluster.root_certificate(SYSTEM)?;
        let _inside = self.runtime.enter();
        let relay = self.runtime.block_on(Relay::start(&self.tasks, controller.xds))?;
        let started = Instant::now();
        let proxy = Proxy::start(&mut self.cluster, "proxy", relay.port, NODE, &token)?;
        wait_for("the proxy's first commit", PATIENCE, || Ok(self.commits()?.first().copied()))?;
        let took = started.elapsed();
        println!("        a proxy knew the mesh {:.2} s after its start", took.as_secs_f64());
        let first = self.commits()?[0];
        ensure!(first.workloads >= WORKLOADS, "the first commit was a part: {first:?}");
        ensure!(took <= FIRST_SYNC, "that is more than {FIRST_SYNC:?}");
        let recorder = Recorder::start(&self.tasks, relay.port, NODE, &token, &roots)?;
        wait_for("the recorder", PATIENCE, || {
            Ok(recorder
                .look(|it| it.known.len() >= WORKLOADS + NAMESPACES * (SERVICES + POLICIES))
                .then_some(()))
        })?;
        recorder.since();
        Ok(Watched { relay, proxy, recorder })
    }
}

/// The number behind a name in a line of a log.
fn number(line: &str, name: &str) -> Option<u64> {
    let (_, rest) = line.split_once(name)?;
    rest.split(|it: char| !it.is_ascii_digit()).next()?.parse().ok()
}

/// The uids in a proxy's dump.
fn uids(proxy: &Proxy) -> Result<BTreeSet<String>> {
    let dump: Value = serde_json::from_str(&proxy.page("/config_dump")?)?;
    let workloads = dump["workloads"].as_array().context("no workloads")?;
    // The API server's own address is an endpoint too, of a Service without a selector, and no pod.
    let pods = workloads.iter().filter_map(|it| it["uid"].as_str()).filter(|uid| uid.contains("//Pod/"));
    Ok(pods.map(str::to_owned).collect())
}

fn all_uids() -> BTreeSet<String> {
    Pod::all().map(Pod::uid).chain([format!("Kubernetes//Pod/app-0/{CLIENT}")]).collect()
}

fn a_pod(memory: u64, empty: Memory) -> f64 {
    memory.saturating_sub(empty.now) as f64 / ALL_PODS as f64 / 1e3
}

fn report(of: &str, memory: Memory, empty: Memory) {
    println!(
        "        {of}: {:.1} MB, at most {:.1} MB; above the {:.1} MB of an empty one {:.1} KB a pod, at most {:.1} KB",
        memory.now as f64 / 1e6,
        memory.most as f64 / 1e6,
        empty.now as f64 / 1e6,
        a_pod(memory.now, empty),
        a_pod(memory.most, empty),
    );
}

fn bounded(memory: Memory, empty: Memory) -> Result<()> {
    let a_pod = memory.now.saturating_sub(empty.now) / ALL_PODS as u64;
    ensure!(a_pod <= MEMORY, "{a_pod} bytes a pod");
    Ok(())
}

/// Nobody translates what kubelets say of their nodes all the time.
fn heartbeats(mesh: &Mesh, watched: &Watched) -> Result<()> {
    for beat in 1..=3 {
        objects::heartbeats(&mesh.cluster, beat)?;
    }
    // What comes after it shows that it was seen.
    let pod = Pod { namespace: 9, service: 40, number: 0 };
    mesh.runtime.block_on(Times::default().add(
        &mesh.api,
        watched.proxy.admin,
        Change::Quarantine(pod, true),
    ))?;
    let (came, went) = watched.recorder.since();
    ensure!(came == [pod.uid()] && went.is_empty(), "came {came:?}, went {went:?}");
    Ok(())
}

fn changes(mesh: &Mesh, watched: &Watched) -> Result<()> {
    let (mut single, mut bursts) = (Times::default(), Times::default());
    mesh.runtime.block_on(changes::in_sequence(&mut single, &mesh.api, watched.proxy.admin, ROUNDS))?;
    for step in 0..BURSTS {
        mesh.burst(watched, changes::burst(step), &mut bursts)?;
        let again = |namespace| Change::Create(Pod { namespace, service: 70 + step, number: 1 });
        mesh.burst(watched, (0..NAMESPACES).map(again).collect(), &mut bursts)?;
    }
    single.print("one after the other");
    bursts.print("50 at once");
    ensure!(single.len() == 6 * ROUNDS && bursts.len() == 60 * BURSTS, "not all were made");
    ensure!(single.p99() <= CHANGE && bursts.p99() <= CHANGE, "p99 is more than {CHANGE:?}");
    ensure!(uids(&watched.proxy)? == all_uids(), "another mesh is left than was there before");
    watched.recorder.since();
    Ok(())
}

/// Runs what must take no workload from anybody but those named.
fn only_loses(
    mesh: &mut Mesh,
    watched: &Watched,
    these: &[Pod],
    run: impl FnOnce(&mut Mesh) -> Result<()>,
) -> Result<()> {
    watched.recorder.since();
    let (before, known) = (mesh.commits()?.len(), watched.recorder.look(|it| it.known.clone()));
    run(mesh)?;
    let (_, went) = watched.recorder.since();
    let went: BTreeSet<String> = went.into_iter().collect();
    let wanted: BTreeSet<String> = these.iter().map(|pod| pod.uid()).collect();
    ensure!(went == wanted, "went: {went:?}");
    let least = mesh.commits()?.split_off(before).iter().map(|it| it.workloads).min().unwrap_or(WORKLOADS);
    ensure!(least >= WORKLOADS - these.len(), "the proxy was left with {least} workloads");
    let lost = watched.recorder.look(|it| known.keys().filter(|name| !it.known.contains_key(*name)).count());
    ensure!(lost == these.len(), "{lost} names are not known any more");
    mesh.kept_policies(A)?;
    mesh.kept_policies(B)
}

/// A change that both the proxy and the recorder have heard of.
fn fence(mesh: &Mesh, watched: &Watched, pod: Pod) -> Result<()> {
    let change = Change::Quarantine(pod, true);
    mesh.runtime.block_on(Times::default().add(&mesh.api, watched.proxy.admin, change))?;
    wait_for("the recorder", PATIENCE, || Ok(watched.recorder.look(|it| it.has(&pod.uid())).then_some(())))
}

/// Both go to another controller; `came` is what that has to tell besides the fence.
fn switch(mesh: &Mesh, watched: &Watched, to: &Controller, pod: Pod) -> Result<()> {
    let connections = watched.recorder.look(|it| it.connections);
    watched.relay.switch(to.xds);
    wait_for("the recorder's new connection", PATIENCE, || {
        Ok(watched.recorder.look(|it| it.connections > connections).then_some(()))
    })?;
    fence(mesh, watched, pod)?;
    watched.recorder.look(|it| {
        let only = it.came.iter().all(|(name, _)| *name == pod.uid());
        ensure!(only, "{} resources came again: {:?}", it.came.len(), it.came.first());
        Ok(())
    })
}

/// The controller sleeps while pods go, others change, history is compacted and the API server starts again.
fn gap(mesh: &mut Mesh, watched: &Watched, gone: &[Pod], sleeps: &str) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(mesh.cluster.pid(sleeps)?)?);
    kill(pid, Signal::SIGSTOP)?;
    let changed = Pod { namespace: 5, service: 41, number: 1 };
    mesh.runtime.block_on(async {
        for pod in gone {
            mesh.api.delete(&pod.path()).await?;
        }
        let label = json!({ "metadata": { "labels": { "quarantine": "true" } } });
        mesh.api.merge(&changed.path(), &label).await
    })?;
    mesh.cluster.compact()?;
    mesh.cluster.stop("kube-apiserver")?;
    mesh.cluster.start_api_server()?;
    kill(pid, Signal::SIGCONT)?;
    let started = Instant::now();
    wait_for("what changed meanwhile", PATIENCE * 2, || {
        Ok(watched.recorder.look(|it| it.has(&changed.uid()) && it.went.len() >= gone.len()).then_some(()))
    })?;
    println!("        known {:.1} s after the end of the gap", started.elapsed().as_secs_f64());
    let log = mesh.cluster.log(sleeps)?;
    ensure!(log.contains("too old resource version") || log.contains("410"), "there was no gap: {log}");
    Ok(())
}

/// The API server is away for as long as it takes to start.
fn away(mesh: &mut Mesh, watched: &Watched, pod: Pod) -> Result<()> {
    mesh.cluster.stop("kube-apiserver")?;
    mesh.cluster.start_api_server()?;
    fence(mesh, watched, pod)
}

/// After a power cut: the controller comes back before the API server serves all kinds, or even answers.
fn together(mesh: &mut Mesh, watched: &Watched, pod: Pod) -> Result<()> {
    for name in ["kube-apiserver", A, B] {
        mesh.cluster.stop(name)?;
    }
    mesh.cluster.begin_api_server()?;
    let mut a = Controller::begin(&mut mesh.cluster, A, &[])?;
    wait_for("the controller", PATIENCE * 4, || {
        // As kubelet would.
        if mesh.cluster.ended(A)? {
            a = Controller::begin(&mut mesh.cluster, A, &[])?;
        }
        Ok((a.page("/healthz/ready")?.trim() == "ready").then_some(()))
    })?;
    Controller::start_as(&mut mesh.cluster, B, &["--pod-name", B])?;
    switch(mesh, watched, &a, pod)
}

#[test]
fn five_thousand_pods_on_a_real_api_server() {
    let mut checks = Checks::default();
    let mut mesh = Mesh::start().expect("a control plane");
    let a = Controller::start(&mut mesh.cluster).expect("the controller");
    let empty = mesh.settled(A).expect("its memory");
    mesh.fill().expect("the mesh");
    mesh.serves(&a).expect("the whole mesh");
    checks.check("memory of a controller that saw them come", || {
        let memory = mesh.settled(A)?;
        report("after they came", memory, empty);
        bounded(memory, empty)
    });
    let started = Instant::now();
    let b = Controller::start_as(&mut mesh.cluster, B, &["--pod-name", B]).expect("another controller");
    println!("        another controller was ready after {:.1} s", started.elapsed().as_secs_f64());
    checks.check("memory of a controller that lists them", || {
        mesh.serves(&b)?;
        let memory = mesh.settled(B)?;
        report("after the list", memory, empty);
        bounded(memory, empty)
    });
    let watched = mesh.watch(&a).expect("a proxy that knows all in time");
    checks.check("the proxy knows exactly the pods there are", || {
        ensure!(uids(&watched.proxy)? == all_uids(), "others");
        Ok(())
    });
    checks.check("what kubelets say of nodes is no change", || heartbeats(&mesh, &watched));
    checks.check("a change counts in a proxy within a second", || changes(&mesh, &watched));
    let pod = |number| Pod { namespace: 3, service: 42, number };
    checks.check("another replica serves the same: nothing comes again, nothing goes", || {
        only_loses(&mut mesh, &watched, &[], |mesh| switch(mesh, &watched, &b, pod(0)))
    });
    checks.check("a controller that starts again takes nothing away", || {
        mesh.cluster.stop(A)?;
        let a = Controller::start(&mut mesh.cluster)?;
        only_loses(&mut mesh, &watched, &[], |mesh| switch(mesh, &watched, &a, pod(1)))
    });
    let gone = [0, 1, 2].map(|number| Pod { namespace: 4, service: 43, number });
    checks.check("after a gap with a compaction only what is gone goes", || {
        only_loses(&mut mesh, &watched, &gone, |mesh| gap(mesh, &watched, &gone, A))
    });
    checks.check("an API server that starts again takes nothing away", || {
        for pod in gone {
            let change = Change::Create(pod);
            mesh.runtime.block_on(Times::default().add(&mesh.api, watched.proxy.admin, change))?;
        }
        only_loses(&mut mesh, &watched, &[], |mesh| away(mesh, &watched, pod(2)))
    });
    checks.check("an API server and controllers that start together take nothing away", || {
        let pod = Pod { namespace: 6, service: 44, number: 2 };
        only_loses(&mut mesh, &watched, &[], |mesh| together(mesh, &watched, pod))
    });
    checks.check("in the end the proxy knows exactly the pods there are", || {
        ensure!(uids(&watched.proxy)? == all_uids(), "others");
        println!("        the proxy committed {} times", mesh.commits()?.len());
        Ok(())
    });
    checks.finish();
}
