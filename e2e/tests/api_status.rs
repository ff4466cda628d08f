//! Status and admission under a real Kubernetes API server: what the controller says of policies, and what it refuses to have stored.
//!
//! The API server reaches the webhook by address instead of by Service: there is no node that would carry the latter.

use anyhow::{Context, Result, ensure};
use culvert_e2e::apiserver::{Cluster, Controller, MERGE, SYSTEM, free_port};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::{PATIENCE, wait_for};
use serde_json::{Value, json};

const POLICIES: &str = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
const WEBHOOK: &str =
    "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations/culvert-validator";
/// Status is written at most this long after the change: watches and a pause of half a second are in it, and the discovery of kinds.
const WRITTEN: std::time::Duration = PATIENCE;

fn policy(name: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": { "name": name }, "spec": spec,
    })
}

fn for_cart() -> Value {
    let from = json!([{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }]);
    json!({ "selector": { "matchLabels": { "app": "cart" } }, "action": "ALLOW", "rules": [{ "from": from }] })
}

/// Waits until a condition has a reason; the condition.
fn says(cluster: &Cluster, path: &str, of: &str, reason: &str) -> Result<Value> {
    let mut last = Value::Null;
    wait_for(&format!("{of} {reason} of {path}"), WRITTEN, || {
        last = cluster.get(path)?;
        let conditions = last["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.into_iter().find(|it| it["type"] == of && it["reason"] == reason))
    })
    .with_context(|| last.to_string())
}

fn world(cluster: &Cluster) -> Result<()> {
    for (namespace, mode) in [(SYSTEM, "none"), ("shop", "ambient")] {
        let labels = json!({ "istio.io/dataplane-mode": mode });
        let object = json!({ "metadata": { "name": namespace, "labels": labels } });
        cluster.must_make("/api/v1/namespaces", &object)?;
    }
    cluster.must_make("/api/v1/nodes", &json!({ "metadata": { "name": "node-a" } }))?;
    cluster
        .must_make("/api/v1/namespaces/shop/serviceaccounts", &json!({ "metadata": { "name": "cart" } }))?;
    cluster.helm(&["install", "culvert", "--namespace", SYSTEM])
}

/// D45, D47.
fn policies(cluster: &Cluster) -> Result<()> {
    cluster.must_make(POLICIES, &policy("only-web", for_cart()))?;
    let path = format!("{POLICIES}/only-web");
    let nobody = says(cluster, &path, "culvert.dev/Enforced", "NoWorkload")?;
    ensure!(nobody["status"] == "False" && nobody["observedGeneration"] == 1, "{nobody}");
    says(cluster, &path, "ZtunnelAccepted", "Accepted")?;
    let enrolled = json!({ "ambient.istio.io/redirection": "enabled" });
    cluster.pod("shop", "cart", "node-a", "cart", &enrolled)?;
    cluster.runs("shop", "cart", "100.64.1.9")?;
    let enforced = says(cluster, &path, "culvert.dev/Enforced", "Enforced")?;
    ensure!(enforced["status"] == "True", "{enforced}");

    let mut paths = for_cart();
    paths["rules"][0]["to"] = json!([{ "operation": { "paths": ["/admin"] } }]);
    cluster.must_patch(&path, &json!({ "spec": paths }))?;
    let narrowed = says(cluster, &path, "culvert.dev/Enforced", "Narrowed")?;
    ensure!(narrowed["observedGeneration"] == 2, "{narrowed}");
    ensure!(narrowed["lastTransitionTime"] == enforced["lastTransitionTime"], "{narrowed} after {enforced}");
    says(cluster, &path, "ZtunnelAccepted", "UnsupportedValue")?;

    let target = json!({ "targetRefs": [{ "kind": "Service", "name": "nowhere" }], "rules": [{}] });
    cluster.must_make(POLICIES, &policy("for-a-waypoint", target))?;
    says(cluster, &format!("{POLICIES}/for-a-waypoint"), "WaypointAccepted", "TargetNotFound")?;
    let audit = json!({ "action": "AUDIT", "rules": [{}] });
    cluster.must_make(POLICIES, &policy("audit", audit))?;
    says(cluster, &format!("{POLICIES}/audit"), "ZtunnelAccepted", "UnsupportedValue")?;
    let rule = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": { "name": "cart" },
        "spec": { "host": "cart" },
    });
    let rules = "/apis/networking.istio.io/v1/namespaces/shop/destinationrules";
    cluster.must_make(rules, &rule)?;
    says(cluster, &format!("{rules}/cart"), "culvert.dev/Enforced", "WaypointRequired")?;
    Ok(())
}

/// D47: others' conditions stay, ours come back, and nothing is written that is there.
fn owners(cluster: &Cluster) -> Result<()> {
    let path = format!("{POLICIES}/audit");
    let apply = |manager: &str, condition: Value, force: bool| {
        let object = json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": { "name": "audit", "namespace": "shop" }, "status": { "conditions": [condition] },
        });
        let query = format!("{path}/status?fieldManager={manager}&force={force}");
        cluster.ask("PATCH", &query, "application/apply-patch+yaml", Some(&object))
    };
    let theirs = json!({ "type": "example.com/Seen", "status": "True", "reason": "Seen", "message": "" });
    let answer = apply("example", theirs, false)?;
    ensure!(answer["kind"] == "AuthorizationPolicy", "a condition of another: {answer}");
    let edit = json!({ "type": "culvert.dev/Enforced", "status": "True", "reason": "Edited", "message": "" });
    let answer = apply("somebody", edit, true)?;
    ensure!(answer["kind"] == "AuthorizationPolicy", "an edit of ours: {answer}");
    says(cluster, &path, "culvert.dev/Enforced", "UnsupportedValue")?;
    says(cluster, &path, "example.com/Seen", "Seen")?;
    let before = cluster.get(&path)?["metadata"]["resourceVersion"].clone();
    // Whatever makes the controller look at everything again.
    cluster
        .must_patch(&format!("{POLICIES}/only-web"), &json!({ "metadata": { "labels": { "a": "b" } } }))?;
    cluster.must_make(POLICIES, &policy("later", json!({ "action": "DENY", "rules": [{}] })))?;
    says(cluster, &format!("{POLICIES}/later"), "culvert.dev/Enforced", "Enforced")?;
    ensure!(cluster.get(&path)?["metadata"]["resourceVersion"] == before, "it was written again");
    Ok(())
}

/// D66, D67.
fn webhook(cluster: &Cluster, port: u16) -> Result<()> {
    let installed = cluster.get(WEBHOOK)?;
    ensure!(installed["webhooks"][0]["failurePolicy"] == "Ignore", "as installed: {installed}");
    let rooted = wait_for("the webhook's roots", PATIENCE, || {
        let found = cluster.get(WEBHOOK)?;
        Ok(found["webhooks"][0]["clientConfig"]["caBundle"].is_string().then_some(found))
    })?;
    let root = rooted["webhooks"][0]["clientConfig"]["caBundle"].clone();
    let here = json!({ "url": format!("https://localhost:{port}/validate"), "caBundle": root });
    let by_address = json!([{ "op": "replace", "path": "/webhooks/0/clientConfig", "value": here }]);
    let answer = cluster.ask("PATCH", WEBHOOK, "application/json-patch+json", Some(&by_address))?;
    ensure!(answer["webhooks"][0]["clientConfig"]["url"].is_string(), "{answer}");
    // The schema of the kind does not know attributes; the API server takes up a changed webhook after a moment.
    let unknown = json!({ "rules": [{ "when": [{ "key": "sauce.ip", "values": ["10.0.0.1"] }] }] });
    wait_for("a refusal", PATIENCE, || {
        let answer = cluster.ask(
            "POST",
            &format!("{POLICIES}?dryRun=All"),
            "application/json",
            Some(&policy("typo", unknown.clone())),
        )?;
        let message = answer["message"].as_str().unwrap_or_default();
        let named =
            ["spec.rules[0].when[0].key", "sauce.ip", "source.ip"].iter().all(|it| message.contains(it));
        Ok((answer["code"] == 422 && named).then_some(()))
    })?;
    wait_for("an answer to be demanded", PATIENCE, || {
        Ok((cluster.get(WEBHOOK)?["webhooks"][0]["failurePolicy"] == "Fail").then_some(()))
    })
}

/// D66: while no controller runs nothing is made and no spec changed, and everything can be labelled and deleted.
fn without(cluster: &mut Cluster) -> Result<()> {
    cluster.stop("controller")?;
    let answer = cluster.make(POLICIES, &policy("unjudged", for_cart()))?;
    let message = answer["message"].as_str().unwrap_or_default();
    ensure!(message.contains("validation.culvert.dev"), "{answer}");
    let answer = cluster.ask(
        "PATCH",
        &format!("{POLICIES}/audit"),
        MERGE,
        Some(&json!({ "spec": { "action": "DENY" } })),
    )?;
    ensure!(answer["kind"] == "Status" && answer["status"] == "Failure", "{answer}");
    cluster
        .must_patch(&format!("{POLICIES}/audit"), &json!({ "metadata": { "labels": { "team": "shop" } } }))?;
    cluster.must_delete(&format!("{POLICIES}/later"))?;
    cluster.must_make("/api/v1/namespaces", &json!({ "metadata": { "name": "another" } }))
}

fn uninstalled(cluster: &Cluster) -> Result<()> {
    cluster.helm(&["uninstall", "culvert", "--namespace", SYSTEM])?;
    ensure!(cluster.get(WEBHOOK)?["code"] == 404, "the webhook is still there");
    let typo = json!({ "rules": [{ "when": [{ "key": "sauce.ip", "values": ["10.0.0.1"] }] }] });
    cluster.must_make(POLICIES, &policy("nobody-judges", typo))
}

#[test]
fn status_and_admission_on_a_real_api_server() {
    let mut cluster = Cluster::start().expect("a control plane");
    let mut checks = Checks::default();
    checks.check("the chart installs", || world(&cluster));
    let port = free_port().expect("a port");
    let listen = format!("127.0.0.1:{port}");
    let flags = ["--webhook-listen", listen.as_str(), "--server-name", "localhost"];
    Controller::start_as(&mut cluster, "controller", &flags).expect("the controller");
    checks.check("the webhook gets roots, refuses by field, and must answer once it was heard", || {
        webhook(&cluster, port)
    });
    checks.check("a policy says what enforces it, and why nothing does", || policies(&cluster));
    checks.check("conditions of others stay, ours come back, and nothing is written twice", || {
        owners(&cluster)
    });
    checks.check("without a controller nothing is made or changed, and all can be deleted", || {
        without(&mut cluster)
    });
    checks.check("nothing blocks once it is uninstalled", || uninstalled(&cluster));
    checks.finish();
}
