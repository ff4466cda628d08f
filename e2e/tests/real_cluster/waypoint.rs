//! A waypoint in the cluster: made of a Gateway, bound by a label, and what it does with requests.

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use serde_json::{Value, json};

use crate::world::{MOMENT, PATIENCE, World, is_ready};

const CLIENT: &str = "hello/client";
const STRANGER: &str = "hello/stranger";
const NAME: &str = "http://hello.hello.svc.cluster.local";
const GATEWAYS: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/hello/gateways";
const ROUTES: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/hello/httproutes";
const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/hello/authorizationpolicies";

/// What curl says of one answer.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

pub fn run(world: &World, checks: &mut Checks) {
    checks.check(
        "with the Gateway API a waypoint is made of a Gateway, and a namespace is bound to it",
        || made(world),
    );
    checks
        .check("its requests are encrypted on both ways, and the waypoint says who asked", || through(world));
    checks.check(
        "an HTTPRoute sends a path to one version and changes a header; what it does not name is not found",
        || routed(world),
    );
    checks.check("a policy of the service refuses a path and a caller, by 403", || refused(world));
    checks.check("without the label requests go straight again", || unbound(world));
}

fn ask(world: &World, pod: &str, path: &str) -> Result<Answer> {
    let command =
        ["curl", "--silent", "--show-error", "--include", "--max-time", "5", &format!("{NAME}{path}")];
    let said = world.exec(pod, &command)?;
    let (head, body) = said.split_once("\r\n\r\n").with_context(|| format!("no head in {said:?}"))?;
    let status = head.split_whitespace().nth(1).context("no status")?.parse()?;
    Ok(Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() })
}

/// W01, W02, D57.
fn made(world: &World) -> Result<()> {
    world.gateway_api("v1.6.3")?;
    // The class is made where its kind is.
    world.install(&[])?;
    let gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": { "name": "waypoint" },
        "spec": { "gatewayClassName": "culvert-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }] },
    });
    world.api.wait("the Gateway", PATIENCE, |api| api.create(GATEWAYS, &gateway).map(Some))?;
    world.api.wait("a programmed Gateway", PATIENCE, |api| {
        let gateway = api.get(&format!("{GATEWAYS}/waypoint"))?;
        let conditions = gateway["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let done = conditions.iter().any(|it| it["type"] == "Programmed" && it["status"] == "True");
        ensure!(done, "{conditions:?}");
        Ok(Some(()))
    })?;
    world.label("hello", "istio.io/use-waypoint=waypoint")
}

/// W14, W16, W72.
fn through(world: &World) -> Result<()> {
    world.api.wait("a line of the waypoint's way", MOMENT, |_| {
        let (marker, report) = world.marked_request(CLIENT, &format!("{NAME}/"))?;
        // Client and server are on different nodes, so something crosses.
        ensure!(
            report.hits(marker.as_bytes()) == 0 && report.port(15008) > 0,
            "read on the wire, or not sent"
        );
        let words = ["hello/sa/client", "dst.service=hello.hello.svc.cluster.local", "status=200"];
        let mut lines = Vec::new();
        for node in world.cluster.nodes() {
            lines.extend(world.log_of(node, "hello", "waypoint")?.lines().map(str::to_owned));
        }
        Ok(lines.iter().any(|it| words.iter().all(|word| it.contains(word))).then_some(()))
    })?;
    ensure!(world.pods("hello")?.iter().all(is_ready), "a pod is not ready");
    Ok(())
}

fn route(world: &World, rules: &Value) -> Result<()> {
    let route = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute", "metadata": { "name": "hello" },
        "spec": { "parentRefs": [{ "group": "", "kind": "Service", "name": "hello", "port": 80 }], "rules": rules },
    });
    world.api.create(ROUTES, &route).map(drop)
}

/// W28.
fn routed(world: &World) -> Result<()> {
    for version in ["v1", "v2"] {
        let service = json!({
            "metadata": { "name": format!("hello-{version}") },
            "spec": { "selector": { "app": "server", "version": version },
                "ports": [{ "name": "http", "port": 80, "targetPort": "http" }] },
        });
        world.api.create("/api/v1/namespaces/hello/services", &service)?;
    }
    let rule = |version: &str, path: &str| {
        json!({
            "matches": [{ "path": { "type": "PathPrefix", "value": path } }],
            "filters": [{ "type": "ResponseHeaderModifier",
                "responseHeaderModifier": { "set": [{ "name": "x-version", "value": version }] } }],
            "backendRefs": [{ "name": format!("hello-{version}"), "port": 80 }],
        })
    };
    route(world, &json!([rule("v1", "/one"), rule("v2", "/two")]))?;
    world.api.wait("the route", MOMENT, |_| {
        let answer = ask(world, CLIENT, "/one")?;
        Ok((answer.status == 200 && answer.head.contains("x-version: v1")).then_some(()))
    })?;
    for _ in 0..10 {
        for (path, version) in [("/one", "v1"), ("/two/deep", "v2")] {
            let answer = ask(world, CLIENT, path)?;
            ensure!(
                answer.status == 200 && answer.body.contains(version),
                "{path}: {}: {}",
                answer.head,
                answer.body
            );
        }
    }
    let other = ask(world, CLIENT, "/onerous")?;
    ensure!(other.status == 404, "{}", other.head);
    let status = world.api.get(&format!("{ROUTES}/hello"))?["status"]["parents"].clone();
    for kind in ["Accepted", "ResolvedRefs"] {
        let conditions = status[0]["conditions"].as_array().into_iter().flatten();
        ensure!(
            conditions.clone().any(|it| it["type"] == kind && it["status"] == "True"),
            "{kind}: {status}"
        );
    }
    Ok(())
}

/// W53, W54, W57, W58, W63.
fn refused(world: &World) -> Result<()> {
    let target = json!([{ "group": "", "kind": "Service", "name": "hello" }]);
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": "requests" },
        "spec": { "targetRefs": target, "action": "DENY", "rules": [
            { "to": [{ "operation": { "paths": ["/one/secret*"] } }] },
            { "from": [{ "source": { "principals": ["cluster.local/ns/hello/sa/stranger"] } }] },
        ] },
    });
    world.api.create(POLICIES, &policy)?;
    world.api.wait("the refusal", MOMENT, |_| {
        let answer = ask(world, CLIENT, "/one/secrets")?;
        Ok((answer.status == 403 && answer.body.contains("RBAC: access denied")).then_some(()))
    })?;
    ensure!(ask(world, CLIENT, "/one/%73ecrets")?.status == 403, "the path was not normalised");
    ensure!(ask(world, CLIENT, "/one")?.status == 200, "the rest was refused too");
    ensure!(ask(world, STRANGER, "/one")?.status == 403, "the stranger was let in");
    world.api.delete(&format!("{POLICIES}/requests"))
}

fn unbound(world: &World) -> Result<()> {
    world.label("hello", "istio.io/use-waypoint-")?;
    world.api.wait("an answer that no route touches", MOMENT, |_| {
        Ok((ask(world, CLIENT, "/onerous")?.status == 200).then_some(()))
    })?;
    world.api.delete(&format!("{ROUTES}/hello"))?;
    world.api.delete(&format!("{GATEWAYS}/waypoint"))
}
