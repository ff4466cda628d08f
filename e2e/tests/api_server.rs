//! The controller and a proxy under a real Kubernetes API server: etcd, kube-apiserver and helm, without nodes.
//!
//! Needs `KUBERNETES_BIN`, the directory of those programs, and Debian's etcd: `make api-server`. Without it this test fails; no
//! other command runs it. Everything listens on loopback.

use anyhow::{Result, ensure};
use culvert_e2e::apiserver::{AUDIENCE, Cluster, Controller, MERGE, ROOT_CERTIFICATE, SYSTEM};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::{PATIENCE, wait_for};
use serde_json::{Value, json};

fn objects(cluster: &Cluster) -> Result<()> {
    for namespace in [SYSTEM, "shop"] {
        let labels =
            json!({ "istio.io/dataplane-mode": if namespace == "shop" { "ambient" } else { "none" } });
        cluster.must_make(
            "/api/v1/namespaces",
            &json!({ "metadata": { "name": namespace, "labels": labels } }),
        )?;
    }
    for node in ["node-a", "node-b"] {
        cluster.must_make("/api/v1/nodes", &json!({ "metadata": { "name": node } }))?;
    }
    cluster.helm(&["install", "culvert", "--namespace", SYSTEM])?;
    cluster
        .must_make("/api/v1/namespaces/shop/serviceaccounts", &json!({ "metadata": { "name": "cart" } }))?;
    let none = json!({});
    cluster.pod(SYSTEM, "ztunnel-a", "node-a", "ztunnel", &none)?;
    cluster.pod(SYSTEM, "ztunnel-b", "node-b", "ztunnel", &none)?;
    cluster.pod("shop", "cart", "node-a", "cart", &json!({ "ambient.istio.io/redirection": "enabled" }))?;
    let ports = json!([{ "port": 80, "targetPort": 8080 }]);
    let service =
        json!({ "metadata": { "name": "cart" }, "spec": { "selector": { "app": "cart" }, "ports": ports } });
    cluster.must_make("/api/v1/namespaces/shop/services", &service)?;
    cluster.runs("shop", "cart", "100.64.1.9")?;
    Ok(())
}

fn policies(cluster: &Cluster, controller: &Controller) -> Result<()> {
    let path = "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies";
    let kind = json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy" });
    let with = |name: &str, spec: Value| {
        let mut policy = kind.clone();
        policy["metadata"] = json!({ "name": name });
        policy["spec"] = spec;
        policy
    };
    let refused = cluster.make(path, &with("bad", json!({ "action": "PERHAPS" })))?;
    let message = refused["message"].as_str().unwrap_or_default();
    ensure!(refused["code"] == 422 && message.contains("spec.action"), "{refused}");
    let from = json!([{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }]);
    let spec = json!({ "selector": { "matchLabels": { "app": "cart" } }, "action": "ALLOW", "rules": [{ "from": from }] });
    cluster.must_make(path, &with("only-web", spec))?;
    // Kinds are looked for every 15 s, and the chart brought these after the controller had started at the latest then.
    wait_for("the policy", PATIENCE * 2, || {
        let workload = controller.workload("Kubernetes//Pod/shop/cart")?;
        Ok(workload.filter(|it| it["policies"][0] == "shop/only-web"))
    })?;
    cluster.ask("DELETE", &format!("{path}/only-web"), "application/json", None)?;
    wait_for("the end of the policy", PATIENCE, || {
        let workload = controller.workload("Kubernetes//Pod/shop/cart")?;
        Ok(workload.filter(|it| it["policies"].is_null()))
    })?;
    Ok(())
}

fn tokens(cluster: &mut Cluster, controller: &Controller) -> Result<()> {
    const NO_TOKEN: &str = "request authenticate failure";
    let good = cluster.token("good", SYSTEM, "ztunnel", "ztunnel-a", AUDIENCE)?;
    controller.proxy_says(cluster, "node-a", &good, "connected to the control plane")?;
    ensure!(!cluster.log("proxy")?.contains("the stream failed"), "{}", cluster.log("proxy")?);
    controller.proxy_says(cluster, "node-b", &good, "the token is another node's")?;
    let cart = cluster.token("cart", "shop", "cart", "cart", AUDIENCE)?;
    controller.proxy_says(cluster, "node-a", &cart, "the token is no proxy's")?;
    let other = cluster.token("other", SYSTEM, "ztunnel", "ztunnel-a", "somebody-else")?;
    controller.proxy_says(cluster, "node-a", &other, NO_TOKEN)?;
    cluster.write("forged", "aaaa.bbbb.cccc")?;
    let forged = cluster.path("forged");
    controller.proxy_says(cluster, "node-a", &forged, NO_TOKEN)?;
    let gone = cluster.token("gone", SYSTEM, "ztunnel", "ztunnel-b", AUDIENCE)?;
    let path = format!("/api/v1/namespaces/{SYSTEM}/pods/ztunnel-b?gracePeriodSeconds=0");
    cluster.ask("DELETE", &path, "application/json", None)?;
    controller.proxy_says(cluster, "node-b", &gone, NO_TOKEN)?;
    let log = cluster.log("controller")?;
    for why in [
        "is invalid for the target audiences",
        "has been invalidated",
        "no trusted proxy",
        "another node than",
    ] {
        ensure!(log.contains(why), "the controller's log does not say {why:?}");
    }
    Ok(())
}

fn root(cluster: &Cluster) -> Result<()> {
    let secret = cluster.get(&format!("/api/v1/namespaces/{SYSTEM}/secrets/culvert-ca-secret"))?;
    ensure!(secret["data"]["ca-key.pem"].is_string(), "no key in the Secret: {}", secret["kind"]);
    let path = |namespace: &str| format!("/api/v1/namespaces/{namespace}/configmaps/{ROOT_CERTIFICATE}");
    let bundle = |namespace: &str| {
        wait_for("the root certificate", PATIENCE, || {
            let found = cluster.get(&path(namespace))?["data"]["root-cert.pem"].take();
            Ok(found.as_str().map(str::to_owned).filter(|pem| pem.contains("BEGIN CERTIFICATE")))
        })
    };
    let first = bundle("shop")?;
    cluster.must_make("/api/v1/namespaces", &json!({ "metadata": { "name": "new" } }))?;
    ensure!(bundle("new")? == first, "another root in another namespace");
    let edit = json!({ "data": { "root-cert.pem": "nothing" } });
    cluster.ask("PATCH", &path("shop"), MERGE, Some(&edit))?;
    ensure!(bundle("shop")? == first, "an edit stays");
    cluster.ask("DELETE", &path("shop"), "application/json", None)?;
    ensure!(bundle("shop")? == first, "another root after it was deleted");
    let lease =
        cluster.get(&format!("/apis/coordination.k8s.io/v1/namespaces/{SYSTEM}/leases/culvert-leader"))?;
    ensure!(lease["spec"]["holderIdentity"] == "controller", "{lease}");
    Ok(())
}

#[test]
fn the_control_plane_on_a_real_api_server() {
    let mut cluster = Cluster::start().expect("a control plane");
    let mut checks = Checks::default();
    checks.check("the chart installs, and objects are accepted", || objects(&cluster));
    let controller = Controller::start(&mut cluster).expect("the controller");
    checks.check("a pod is a workload, by its annotation one with a tunnel", || {
        let cart = wait_for("the pod", PATIENCE, || controller.workload("Kubernetes//Pod/shop/cart"))?;
        ensure!(cart["tunnel"] == "HBONE" && cart["node"] == "node-a", "{cart}");
        ensure!(cart["addresses"] == json!(["100.64.1.9"]) && cart["serviceAccount"] == "cart", "{cart}");
        ensure!(cart["services"]["shop/cart.shop.svc.cluster.local"] == json!(["80->8080"]), "{cart}");
        Ok(())
    });
    checks.check("the root is kept and handed out", || root(&cluster));
    checks.check("a bad policy is refused by its kind, a good one reaches the workload and goes", || {
        policies(&cluster, &controller)
    });
    checks.check("tokens: only this node's proxy is served, and the log says why others are not", || {
        tokens(&mut cluster, &controller)
    });
    checks.check("nothing of the chart is left but the kinds", || {
        cluster.helm(&["uninstall", "culvert", "--namespace", SYSTEM])?;
        let roles = cluster.get(
            "/apis/rbac.authorization.k8s.io/v1/clusterroles?labelSelector=app.kubernetes.io/part-of=culvert",
        )?;
        ensure!(roles["items"] == json!([]), "{roles}");
        let kinds = cluster.get("/apis/apiextensions.k8s.io/v1/customresourcedefinitions")?;
        ensure!(kinds["items"].as_array().is_some_and(|kinds| kinds.len() == 6), "the kinds went too");
        Ok(())
    });
    checks.finish();
}
