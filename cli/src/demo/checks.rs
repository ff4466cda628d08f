//! The checks. Each returns a line for people, or why it does not hold.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use culvert_sandbox::container::ContainerState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::world::World;

type Run = fn(&World) -> anyhow::Result<String>;

/// In the order in which they are shown.
pub const ALL: [(&str, Run); 11] = [
    ("service-address", service_address),
    ("service-name", service_name),
    ("identity-in-log", identity_in_log),
    ("wire-encrypted", wire_encrypted),
    ("stranger-refused", stranger_refused),
    ("outsider-permissive", outsider_permissive),
    ("outsider-strict", outsider_strict),
    ("policy-on-live-connection", policy_on_live_connection),
    ("failover", failover),
    ("label-removed", label_removed),
    ("label-restored", label_restored),
];

const NAME: &str = "http://hello.hello.svc.cluster.local/";
const CLIENT: &str = "spiffe://cluster.local/ns/hello/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/hello/sa/server";
/// What a change on disk may take until it is enforced.
const ENFORCED: Duration = Duration::from_secs(1);
/// What a log line may take until it can be read.
const LOGGED: Duration = Duration::from_secs(2);

fn service_address(world: &World) -> anyhow::Result<String> {
    let report = world.report()?;
    let service = report.services.first().context("there is no service")?;
    let ips = &service.addresses;
    let mut all = BTreeSet::new();
    for ip in ips {
        let host = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
        let versions = versions(world, &format!("http://{host}/"))?;
        ensure!(versions.len() == 2, "only {versions:?} answered at {ip}");
        all.extend(versions);
    }
    let ips: Vec<_> = ips.iter().map(ToString::to_string).collect();
    Ok(format!("{} answered at {}", all.into_iter().collect::<Vec<_>>().join(" and "), ips.join(" and ")))
}

fn service_name(world: &World) -> anyhow::Result<String> {
    let versions = versions(world, NAME)?;
    ensure!(versions.len() == 2, "only {versions:?} answered");
    let short = world.curl("client", "http://hello/")?;
    let outside = world.curl("outside/outsider", "http://hello.hello/")?;
    Ok(format!(
        "{NAME} reaches both; http://hello/ says {:?}; from outside the mesh {:?}",
        short.trim(),
        outside.trim()
    ))
}

fn identity_in_log(world: &World) -> anyhow::Result<String> {
    world.curl("client", NAME)?;
    let words = ["direction=inbound", CLIENT, SERVER, "security=\"mutual_tls\""];
    logged(world, "node-b", &words)?;
    Ok(format!("the server's proxy logged src.identity={CLIENT}"))
}

fn wire_encrypted(world: &World) -> anyhow::Result<String> {
    let (marker, report) = marked_request(world)?;
    ensure!(report.port(15008) > 0, "nothing went to port 15008");
    let hits = report.hits(marker.as_bytes());
    ensure!(hits == 0, "the wire showed the request's marker {hits} times");
    Ok(format!(
        "{} packets of HBONE between the nodes, the request's marker in 0 of them",
        report.port(15008)
    ))
}

fn stranger_refused(world: &World) -> anyhow::Result<String> {
    let error = refused(world, "stranger")?;
    let line = logged(
        world,
        "node-b",
        &["reason=\"authorization_policy\"", "policy=hello/no-strangers", "sa/stranger"],
    )?;
    ensure!(line.contains("blame=policy"), "the log does not blame policy: {line}");
    Ok(format!("curl: {error}; log: reason=authorization_policy policy=hello/no-strangers"))
}

fn outsider_permissive(world: &World) -> anyhow::Result<String> {
    let answer = world.curl("outside/outsider", NAME)?;
    logged(world, "node-b", &["direction=inbound", "security=\"none\"", "connection complete"])?;
    Ok(format!("plaintext accepted: {:?}", answer.trim()))
}

fn outsider_strict(world: &World) -> anyhow::Result<String> {
    world.edit("policy.yaml", |text| text.replace("mode: PERMISSIVE", "mode: STRICT"))?;
    let took = world
        .until(ENFORCED, "the outsider is refused", || Ok(world.curl("outside/outsider", NAME).is_err()))?;
    let error = refused(world, "outside/outsider")?;
    let answer = world.curl("client", NAME).context("the client was refused too")?;
    logged(world, "node-b", &["security=\"none\"", "blame=policy", "direction=inbound"])?;
    Ok(format!(
        "refused {} ms after the edit ({error}); the client still gets {:?}",
        took.as_millis(),
        answer.trim()
    ))
}

fn policy_on_live_connection(world: &World) -> anyhow::Result<String> {
    let url = format!("{NAME}ticks");
    let mut child = world.spawn("client", &["curl", "--silent", "--no-buffer", "--max-time", "20", &url])?;
    let mut lines = BufReader::new(child.stdout.take().context("piped")?).lines();
    for _ in 0..5 {
        lines.next().context("the stream ended before the edit")??;
    }
    let edited = Instant::now();
    world.edit("policy.yaml", |text| {
        text.replace("sa/stranger\"", "sa/stranger\", \"cluster.local/ns/hello/sa/client\"")
    })?;
    let more = lines.count();
    let took = edited.elapsed();
    let status = child.wait()?;
    ensure!(took <= ENFORCED, "the stream ended only {took:?} after the edit ({more} more lines)");
    ensure!(!status.success(), "curl took the end for a clean one");
    logged(world, "node-b", &["reason=\"authorization_policy_late\"", "sa/client"])?;
    Ok(format!(
        "an open stream was cut {} ms after the edit; log: reason=authorization_policy_late",
        took.as_millis()
    ))
}

fn failover(world: &World) -> anyhow::Result<String> {
    let report = world.report()?;
    let victim =
        report.pods.iter().find(|pod| pod.key.name == "server-v1").context("there is no server-v1")?;
    let Some(ContainerState::Running { pid, .. }) = victim.containers.first().map(|c| &c.state) else {
        bail!("server-v1 does not run");
    };
    // The recorded process is the group's leader; the group is what `culvert up` started for this container.
    kill(Pid::from_raw(-*pid), Signal::SIGKILL).context("killing server-v1")?;
    let mut answers = Vec::new();
    for _ in 0..10 {
        answers.push(world.curl("client", NAME).context("a request failed after server-v1 was killed")?);
    }
    let v2 = answers.iter().filter(|answer| answer.contains("from v2")).count();
    ensure!(answers[0].contains("from v2"), "the first answer came from {:?}", answers[0]);
    Ok(format!("server-v1 killed: 10 of 10 requests answered, {v2} by v2, none lost"))
}

fn label_removed(world: &World) -> anyhow::Result<String> {
    world.edit("namespaces.yaml", |text| {
        text.replace("istio.io/dataplane-mode: ambient", "example.com/note: none")
    })?;
    let mut hits = 0;
    let took = world.until(Duration::from_secs(5), "the wire shows the request in the clear", || {
        let (marker, report) = marked_request(world)?;
        hits = report.hits(marker.as_bytes());
        Ok(hits > 0 && report.port(15008) == 0)
    })?;
    Ok(format!(
        "{} ms after the label was removed the same capture shows the marker in {hits} packets",
        took.as_millis()
    ))
}

fn label_restored(world: &World) -> anyhow::Result<String> {
    // Between the checks the label was put back.
    world.until(Duration::from_secs(5), "the wire is encrypted again", || {
        let (marker, report) = marked_request(world)?;
        Ok(report.hits(marker.as_bytes()) == 0 && report.port(15008) > 0)
    })?;
    Ok("with the label back, and no pod restarted, the wire is encrypted again".to_owned())
}

/// The versions that answer within 40 requests, stopping at two.
fn versions(world: &World, url: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut versions = BTreeSet::new();
    for _ in 0..40 {
        let answer = world.curl("client", url)?;
        let version = answer.split_whitespace().nth(2).context("an answer of another form")?;
        versions.insert(version.trim_end_matches(',').to_owned());
        if versions.len() == 2 {
            break;
        }
    }
    Ok(versions)
}

/// A request with a marker of its own, and what the wire between the nodes showed meanwhile.
fn marked_request(world: &World) -> anyhow::Result<(String, culvert_net::capture::CaptureReport)> {
    let marker = format!("marker-{:032x}", fastrand::u128(..));
    let report = world.capture(&marker, || world.curl("client", &format!("{NAME}{marker}")).map(drop))?;
    Ok((marker, report))
}

fn refused(world: &World, pod: &str) -> anyhow::Result<String> {
    match world.curl(pod, NAME) {
        Ok(answer) => bail!("{pod} was answered: {:?}", answer.trim()),
        Err(error) => Ok(error.to_string()),
    }
}

/// Waits for a line of a node's proxy that holds every word.
fn logged(world: &World, node: &str, words: &[&str]) -> anyhow::Result<String> {
    let mut found = None;
    world.until(LOGGED, &format!("a line of {node}'s proxy with {words:?}"), || {
        found = world.proxy_log(node, words)?.pop();
        Ok(found.is_some())
    })?;
    found.context("just found")
}
