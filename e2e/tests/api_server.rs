//! The controller and a proxy under a real Kubernetes API server: etcd, kube-apiserver and helm, without nodes.
//!
//! Needs `KUBERNETES_BIN`, the directory of those programs, and Debian's etcd: `make api-server`. Without it this test fails; no
//! other command runs it. Everything listens on loopback.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
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
    let two = ["--set", "controller.replicas=2,taint.enabled=true"];
    cluster.helm(&["install", "culvert", "--namespace", SYSTEM, two[0], two[1]])?;
    let path = format!("/apis/policy/v1/namespaces/{SYSTEM}/poddisruptionbudgets/culvert-controller");
    let budget = cluster.get(&path)?;
    ensure!(budget["spec"]["minAvailable"] == 1, "{budget}");
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
    wait_for("the policy", PATIENCE, || {
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

/// A kind that comes and goes while the controller runs.
fn definitions(cluster: &Cluster, controller: &Controller) -> Result<()> {
    const KIND: &str = "ciliumnetworkpolicies.cilium.io";
    let path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    let schema =
        json!({ "openAPIV3Schema": { "type": "object", "x-kubernetes-preserve-unknown-fields": true } });
    let version = json!({ "name": "v2", "served": true, "storage": true, "schema": schema });
    let names = json!({ "plural": "ciliumnetworkpolicies", "singular": "ciliumnetworkpolicy",
        "kind": "CiliumNetworkPolicy", "listKind": "CiliumNetworkPolicyList" });
    let spec = json!({ "group": "cilium.io", "scope": "Namespaced", "names": names, "versions": [version] });
    let begun = Instant::now();
    cluster.must_make(path, &json!({ "metadata": { "name": KIND }, "spec": spec }))?;
    let objects = |count: &str| {
        let line = format!("culvert_controller_watch_objects{{kind=\"{KIND}\"}} {count}");
        Ok(controller.page("/metrics")?.lines().any(|it| it == line).then_some(()))
    };
    wait_for("the kind", PATIENCE, || objects("0"))?;
    let took = begun.elapsed();
    println!("a new kind is read after {took:?}");
    ensure!(took < Duration::from_secs(8), "a new kind was read after {took:?}");
    let policy =
        json!({ "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": { "name": "x" } });
    cluster.must_make("/apis/cilium.io/v2/namespaces/shop/ciliumnetworkpolicies", &policy)?;
    wait_for("an object of the kind", PATIENCE, || objects("1"))?;
    cluster.ask("DELETE", &format!("{path}/{KIND}"), "application/json", None)?;
    wait_for("the end of the kind", PATIENCE, || {
        Ok((!controller.page("/metrics")?.contains(KIND)).then_some(()))
    })
}

/// A Service without a selector leads where its slice says.
fn slices(cluster: &Cluster, controller: &Controller) -> Result<()> {
    let known = || -> Result<Option<String>> {
        let metrics = controller.page("/metrics")?;
        let name = "culvert_controller_watch_objects{kind=\"endpointslices.discovery.k8s.io\"} ";
        Ok(metrics.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned))
    };
    // Kubernetes may have one for its own Service, which has no selector either.
    let before = known()?;
    let ports = json!([{ "port": 5432 }]);
    let service = json!({ "metadata": { "name": "db" }, "spec": { "ports": ports } });
    cluster.must_make("/api/v1/namespaces/shop/services", &service)?;
    let metadata = json!({ "name": "db-1", "labels": { "kubernetes.io/service-name": "db" } });
    let endpoints = json!([{ "addresses": ["192.0.2.7"] }, { "addresses": ["100.64.1.9"] }]);
    let slice =
        json!({ "metadata": metadata, "addressType": "IPv4", "ports": ports, "endpoints": endpoints });
    cluster.must_make("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", &slice)?;
    let key = "shop/db.shop.svc.cluster.local";
    let machine = wait_for("the endpoint", PATIENCE, || {
        controller.workload("Kubernetes/discovery.k8s.io/EndpointSlice/shop/db-1/192.0.2.7")
    })?;
    ensure!(machine["services"][key] == json!(["5432->5432"]) && machine["tunnel"] == "NONE", "{machine}");
    let cart = controller.workload("Kubernetes//Pod/shop/cart")?.context("no pod")?;
    ensure!(cart["services"][key] == json!(["5432->5432"]) && cart["tunnel"] == "HBONE", "{cart}");
    // Those that Kubernetes makes of a selector are not even listed.
    let metadata = json!({ "name": "cart-1", "labels": {
        "kubernetes.io/service-name": "cart", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io" } });
    let of_selector =
        json!({ "metadata": metadata, "addressType": "IPv4", "ports": ports, "endpoints": endpoints });
    cluster.must_make("/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices", &of_selector)?;
    cluster.ask(
        "DELETE",
        "/apis/discovery.k8s.io/v1/namespaces/shop/endpointslices/db-1",
        "application/json",
        None,
    )?;
    wait_for("the end of the slice", PATIENCE, || Ok((known()? == before).then_some(())))
}

/// A node's taint goes when the agent there is ready, and only that one.
fn taints(cluster: &Cluster) -> Result<()> {
    let path = "/api/v1/nodes/node-a";
    let ours = json!({ "key": "culvert.dev/not-ready", "effect": "NoSchedule" });
    let other = json!({ "key": "other", "value": "x", "effect": "NoSchedule" });
    let patch = json!({ "spec": { "taints": [ours, other] } });
    let merge = "application/merge-patch+json";
    cluster.ask("PATCH", path, merge, Some(&patch))?;
    cluster.pod(SYSTEM, "culvert-agent", "node-a", "ztunnel", &json!({}))?;
    let keys = || -> Result<Vec<String>> {
        let node = cluster.get(path)?;
        let taints = node["spec"]["taints"].as_array().cloned().unwrap_or_default();
        Ok(taints.iter().filter_map(|it| it["key"].as_str().map(str::to_owned)).collect())
    };
    ensure!(keys()?.iter().any(|key| key == "culvert.dev/not-ready"), "{:?}", keys()?);
    let conditions = json!([{ "type": "Ready", "status": "True" }]);
    let ready = json!({ "status": { "phase": "Running", "conditions": conditions } });
    let status = format!("/api/v1/namespaces/{SYSTEM}/pods/culvert-agent/status");
    cluster.ask("PATCH", &status, merge, Some(&ready))?;
    wait_for("the taint to go", PATIENCE, || {
        let keys = keys()?;
        Ok((!keys.iter().any(|key| key == "culvert.dev/not-ready")).then_some(keys))
    })
    .and_then(|left| {
        ensure!(left.iter().any(|key| key == "other"), "{left:?}");
        Ok(())
    })
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

/// C84, D20, D79, D15, D17, D22, D49, D50, D52, D54.
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
    checks.check("a Service without a selector leads where its slice says", || slices(&cluster, &controller));
    checks.check("a kind is read soon after it is defined, and no more when it is not", || {
        definitions(&cluster, &controller)
    });
    checks.check("a node's taint goes when its agent is ready", || taints(&cluster));
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
