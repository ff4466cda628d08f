//! From nothing to a mesh, as a newcomer would go: install, apply an example, label a namespace; every check of the demo; and out again.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use culvert_e2e::checks::Checks;
use serde_json::json;

use crate::world::{MOMENT, PATIENCE, SYSTEM, World, is_ready};

const CLIENT: &str = "hello/client";
const STRANGER: &str = "hello/stranger";
const OUTSIDER: &str = "outside/outsider";
const NAME: &str = "http://hello.hello.svc.cluster.local/";
const LABEL: &str = "istio.io/dataplane-mode";
const PEERS: &str = "/apis/security.istio.io/v1/namespaces/hello/peerauthentications/server";
const POLICY: &str = "/apis/security.istio.io/v1/namespaces/hello/authorizationpolicies/no-strangers";

pub fn run(world: &World, checks: &mut Checks) {
    checks.check("the chart installs and everything of it is ready", || {
        world.install(&[])?;
        let pods = world.pods(SYSTEM)?;
        ensure!(pods.len() == 5 && pods.iter().all(is_ready), "{} pods", pods.len());
        Ok(())
    });
    checks.check("an example runs outside of the mesh, and its requests are read on the wire", || {
        outside(world)
    });
    checks.check("labelled, its running pods talk mutual TLS within 5 s, and none was restarted", || {
        labelled(world)
    });
    checks.check("both versions answer at each of the service's addresses and at its name", || {
        versions_answer(world)
    });
    checks.check("the server's proxy logs who called", || {
        world.curl(CLIENT, NAME)?;
        let words =
            ["direction=inbound", "ns/hello/sa/client", "ns/hello/sa/server", "security=\"mutual_tls\""];
        world.logged("node-b", &words).map(drop)
    });
    checks.check("a stranger is refused by the policy's name", || {
        refused(world, STRANGER)?;
        let words = ["reason=\"authorization_policy\"", "policy=hello/no-strangers", "sa/stranger"];
        let line = world.logged("node-b", &words)?;
        ensure!(line.contains("blame=policy"), "{line}");
        Ok(())
    });
    checks
        .check("an outsider is let in while plaintext is permitted", || world.curl(OUTSIDER, NAME).map(drop));
    checks.check("an outsider is refused under STRICT, probes of the kubelet still pass", || strict(world));
    checks.check("a policy cuts a connection that is open", || live(world));
    checks.check("when a server's process is killed every request is answered by the other", || {
        failover(world)
    });
    checks.check("without the label the requests are read on the wire again", || unlabelled(world));
    checks.check("with it back they are encrypted again, and no pod was restarted", || labelled(world));
}

fn outside(world: &World) -> Result<()> {
    world.apply_example("hello", |text| {
        text.replace(&format!("{LABEL}: ambient"), "example.com/note: none")
    })?;
    world.wait_ready("hello", 4)?;
    world.wait_ready("outside", 1)?;
    ensure!(
        world.pods("hello")?.iter().all(|pod| World::redirection(pod).is_none()),
        "a pod joined without the label"
    );
    world.api.wait("an answer in plaintext", PATIENCE, |_| {
        let (marker, report) = world.marked_request(CLIENT, NAME)?;
        Ok((report.hits(marker.as_bytes()) > 0).then_some(()))
    })
}

fn restarts(world: &World) -> Result<Vec<(String, String, u64)>> {
    let mut all = Vec::new();
    for pod in world.pods("hello")? {
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0);
        all.push((text(&pod["metadata"]["name"]), text(&pod["metadata"]["uid"]), restarts));
    }
    Ok(all)
}

/// C08, C09.
fn labelled(world: &World) -> Result<()> {
    let before = restarts(world)?;
    world.label("hello", &format!("{LABEL}=ambient"))?;
    let begun = Instant::now();
    world.wait_redirection("hello", Some("enabled"), MOMENT)?;
    let encrypted = world.api.wait("mutual TLS", MOMENT, |_| {
        let (marker, report) = world.marked_request(CLIENT, NAME)?;
        Ok((report.hits(marker.as_bytes()) == 0 && report.port(15008) > 0).then_some(begun.elapsed()))
    })?;
    ensure!(encrypted <= MOMENT, "{encrypted:?}");
    ensure!(restarts(world)? == before, "a pod was restarted");
    println!("          {} ms after the label", encrypted.as_millis());
    Ok(())
}

fn versions_answer(world: &World) -> Result<()> {
    let service = world.api.get("/api/v1/namespaces/hello/services/hello")?;
    let addresses = service["spec"]["clusterIPs"].as_array().cloned().unwrap_or_default();
    ensure!(addresses.len() == 2, "{addresses:?}");
    let mut urls = vec![NAME.to_owned(), "http://hello/".to_owned()];
    for address in addresses.iter().filter_map(|it| it.as_str()) {
        urls.push(if address.contains(':') {
            format!("http://[{address}]/")
        } else {
            format!("http://{address}/")
        });
    }
    for url in urls {
        let mut seen = BTreeSet::new();
        for _ in 0..40 {
            let answer = world.curl(CLIENT, &url)?;
            seen.insert(
                answer
                    .split_whitespace()
                    .nth(2)
                    .context("an answer of another form")?
                    .trim_end_matches(',')
                    .to_owned(),
            );
            if seen.len() == 2 {
                break;
            }
        }
        ensure!(seen.len() == 2, "only {seen:?} answered at {url}");
    }
    Ok(())
}

fn refused(world: &World, pod: &str) -> Result<()> {
    match world.curl(pod, NAME) {
        Ok(answer) => bail!("{pod} was answered: {answer:?}"),
        Err(_) => Ok(()),
    }
}

/// C54.
fn strict(world: &World) -> Result<()> {
    world.api.patch(PEERS, &json!({ "spec": { "mtls": { "mode": "STRICT" } } }))?;
    world
        .api
        .wait("the outsider's refusal", MOMENT, |_| Ok(world.curl(OUTSIDER, NAME).is_err().then_some(())))?;
    world.curl(CLIENT, NAME).context("the client was refused too")?;
    // The probes ask each second, and one failure would take the pod out.
    let until = Instant::now() + MOMENT;
    while Instant::now() < until {
        ensure!(world.pods("hello")?.iter().all(is_ready), "a pod is not ready under STRICT");
    }
    world.api.patch(PEERS, &json!({ "spec": { "mtls": { "mode": "PERMISSIVE" } } }))?;
    world.api.wait("the outsider's return", MOMENT, |_| Ok(world.curl(OUTSIDER, NAME).is_ok().then_some(())))
}

fn live(world: &World) -> Result<()> {
    let url = format!("{NAME}ticks");
    let mut child = world.spawn(CLIENT, &["curl", "--silent", "--no-buffer", "--max-time", "20", &url])?;
    let mut lines = BufReader::new(child.stdout.take().context("piped")?).lines();
    for _ in 0..5 {
        lines.next().context("the stream ended before the edit")??;
    }
    let principals = |accounts: &[&str]| {
        let names: Vec<_> = accounts.iter().map(|it| format!("cluster.local/ns/hello/sa/{it}")).collect();
        json!({ "spec": { "rules": [{ "from": [{ "source": { "principals": names } }] }] } })
    };
    world.api.patch(POLICY, &principals(&["stranger", "client"]))?;
    let edited = Instant::now();
    lines.count();
    let took = edited.elapsed();
    ensure!(!child.wait()?.success(), "curl took the end for a clean one");
    ensure!(took <= MOMENT, "the stream ended {took:?} after the edit");
    world.logged("node-b", &["reason=\"authorization_policy_late\"", "sa/client"])?;
    world.api.patch(POLICY, &principals(&["stranger"]))?;
    println!("          {} ms after the edit", took.as_millis());
    world.api.wait("the client's return", MOMENT, |_| Ok(world.curl(CLIENT, NAME).is_ok().then_some(())))
}

fn failover(world: &World) -> Result<()> {
    let node = world.cluster.node("node-b")?;
    let said = culvert_cluster::run(node.command("sh")?.args(["-c",
        "for p in /proc/[0-9]*; do if tr '\\0' '\\n' < $p/environ 2>/dev/null | grep -qx VERSION=v1; then kill -9 ${p#/proc/}; echo killed; fi; done"]))?;
    ensure!(said.contains("killed"), "server-v1 was not found");
    for _ in 0..10 {
        world.curl(CLIENT, NAME).context("a request failed after server-v1 was killed")?;
    }
    world.wait_ready("hello", 4)
}

/// C08, C32, C49.
fn unlabelled(world: &World) -> Result<()> {
    world.label("hello", &format!("{LABEL}-"))?;
    world.wait_redirection("hello", None, MOMENT)?;
    world.api.wait("the request in the clear", MOMENT, |_| {
        let (marker, report) = world.marked_request(CLIENT, NAME)?;
        Ok((report.hits(marker.as_bytes()) > 0 && report.port(15008) == 0).then_some(()))
    })
}
