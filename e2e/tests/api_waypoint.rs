//! Waypoints under a real Kubernetes API server: what a Gateway becomes, what its status says, who is bound to it, and what is
//! left when it goes. There is no kubelet, so a Deployment's status is written by the test.
//!
//! Needs what `api_server` needs (`make api-server`), kubectl and kube-controller-manager beside it, and Go for the definitions of
//! the Gateway API.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use culvert_e2e::apiserver::{Cluster, Controller, SYSTEM, free_port};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::{PATIENCE, wait_for};
use serde_json::{Value, json};

/// The definitions, as a Go module.
const GATEWAY_API: &str = "sigs.k8s.io/gateway-api@v1.6.3";
const IMAGE: &str = "registry.example/culvert/waypoint:test";
const GATEWAYS: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways";
const APPS: &str = "/apis/apps/v1/namespaces/shop/deployments";
const CORE: &str = "/api/v1/namespaces/shop";
const SCALERS: &str = "/apis/autoscaling/v2/namespaces/shop/horizontalpodautoscalers";

fn programs() -> Result<PathBuf> {
    #[allow(clippy::disallowed_methods, reason = "a test's own setting")]
    let programs =
        std::env::var_os("KUBERNETES_BIN").context("KUBERNETES_BIN is not set: `make api-server`")?;
    Ok(programs.into())
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The Gateway API's own definitions, at their standard channel.
fn definitions(cluster: &Cluster) -> Result<()> {
    let module: Value = serde_json::from_str(&run(Command::new("go")
        .args(["mod", "download", "-json", GATEWAY_API])
        .current_dir(cluster.path(".")))?)?;
    let dir = Path::new(module["Dir"].as_str().context("no directory")?).join("config/crd/standard");
    let mut kubectl = Command::new(programs()?.join("kubectl"));
    kubectl.env("KUBECONFIG", cluster.path("kubeconfig")).args(["apply", "--server-side"]);
    for kind in ["gateways", "gatewayclasses"] {
        kubectl.arg("-f").arg(dir.join(format!("gateway.networking.k8s.io_{kind}.yaml")));
    }
    run(&mut kubectl)?;
    wait_for("the definitions", PATIENCE, || {
        let served = cluster.get("/apis/gateway.networking.k8s.io/v1")?;
        let kinds = served["resources"].as_array().map_or(0, Vec::len);
        Ok((kinds >= 4).then_some(()))
    })
}

/// What deletes the objects of an owner that is gone.
fn garbage_collector(cluster: &mut Cluster) -> Result<()> {
    let mut command = Command::new(programs()?.join("kube-controller-manager"));
    command.arg("--kubeconfig").arg(cluster.path("kubeconfig"));
    command.args(["--controllers=garbage-collector-controller", "--leader-elect=false"]);
    command.args(["--bind-address=127.0.0.1", &format!("--secure-port={}", free_port()?)]);
    command.arg("--cert-dir").arg(cluster.path("garbage"));
    cluster.spawn("kube-controller-manager", command)
}

fn gateway(name: &str, more: &Value) -> Value {
    let mut spec = json!({
        "gatewayClassName": "culvert-waypoint",
        "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": { "name": name, "labels": { "team": "a" } }, "spec": spec,
    })
}

fn there(cluster: &Cluster, path: &str) -> Result<Value> {
    wait_for(path, PATIENCE, || {
        let found = cluster.get(path)?;
        Ok((found["kind"] != "Status" && found["metadata"]["deletionTimestamp"].is_null()).then_some(found))
    })
}

fn gone(cluster: &Cluster, path: &str) -> Result<()> {
    wait_for(
        &format!("the end of {path}"),
        PATIENCE,
        || Ok((cluster.get(path)?["code"] == 404).then_some(())),
    )
}

/// Waits until a condition is as it should be; its message.
fn condition(cluster: &Cluster, path: &str, kind: &str, status: &str, reason: &str) -> Result<String> {
    let mut last = Value::Null;
    let found = wait_for(&format!("{path}: {kind}={status} {reason}"), PATIENCE, || {
        let object = cluster.get(path)?;
        let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let it = all.iter().find(|it| it["type"] == kind).cloned().unwrap_or_default();
        last = object["status"].clone();
        let fresh = it["observedGeneration"].is_null()
            || it["observedGeneration"] == object["metadata"]["generation"];
        let is = fresh && it["status"] == status && it["reason"] == reason;
        Ok(is.then(|| it["message"].as_str().unwrap_or_default().to_owned()))
    });
    found.with_context(|| format!("it is {last}"))
}

fn available(cluster: &Cluster, name: &str, replicas: u32) -> Result<()> {
    let status = json!({ "status": {
        "replicas": replicas, "readyReplicas": replicas, "availableReplicas": replicas, "updatedReplicas": replicas,
    } });
    cluster.must_patch(&format!("{APPS}/{name}/status"), &status)
}

fn made(cluster: &Cluster) -> Result<()> {
    // asserts D46, D57, D58, D59
    cluster
        .must_make(GATEWAYS, &gateway("w", &json!({ "infrastructure": { "labels": { "cost": "b" } } })))?;
    let uid = cluster.get(&format!("{GATEWAYS}/w"))?["metadata"]["uid"].take();
    let paths = [format!("{CORE}/serviceaccounts/w"), format!("{CORE}/services/w"), format!("{APPS}/w")];
    for path in &paths {
        let object = there(cluster, path)?;
        let (owner, labels) = (&object["metadata"]["ownerReferences"][0], &object["metadata"]["labels"]);
        ensure!(owner["uid"] == uid && owner["kind"] == "Gateway", "{path}: {owner}");
        ensure!(labels["gateway.networking.k8s.io/gateway-name"] == "w" && labels["cost"] == "b", "{labels}");
        ensure!(labels["gateway.istio.io/managed"] == "culvert.dev-waypoint-controller", "{labels}");
    }
    let deployment = cluster.get(&paths[2])?;
    let container = &deployment["spec"]["template"]["spec"]["containers"][0];
    ensure!(
        container["image"] == IMAGE && container["resources"]["limits"]["memory"] == "1Gi",
        "{container}"
    );
    let service = cluster.get(&paths[1])?;
    ensure!(service["spec"]["type"] == "ClusterIP", "{service}");
    let ports = service["spec"]["ports"].as_array().cloned().unwrap_or_default();
    let ports: Vec<&Value> = ports.iter().map(|it| &it["port"]).collect();
    ensure!(ports == [&json!(15021), &json!(15008)], "{ports:?}");

    condition(cluster, &format!("{GATEWAYS}/w"), "Accepted", "True", "Accepted")?;
    let why = condition(cluster, &format!("{GATEWAYS}/w"), "Programmed", "False", "NoResources")?;
    ensure!(why.contains("no available replica"), "{why}");
    available(cluster, "w", 1)?;
    condition(cluster, &format!("{GATEWAYS}/w"), "Programmed", "True", "Programmed")?;
    let status = cluster.get(&format!("{GATEWAYS}/w"))?["status"].take();
    ensure!(status["addresses"][0]["value"] == service["spec"]["clusterIP"], "{status}");
    ensure!(status["addresses"][0]["type"] == "IPAddress", "{status}");
    let listener = &status["listeners"][0];
    ensure!(listener["name"] == "mesh" && listener["attachedRoutes"] == 0, "{listener}");
    let class = "/apis/gateway.networking.k8s.io/v1/gatewayclasses/culvert-waypoint";
    condition(cluster, class, "Accepted", "True", "Accepted")?;
    Ok(())
}

fn bound(cluster: &Cluster, controller: &Controller) -> Result<()> {
    // asserts D44
    let service = |name: &str, waypoint: &str| {
        json!({
            "metadata": { "name": name, "labels": { "istio.io/use-waypoint": waypoint } },
            "spec": { "ports": [{ "port": 80 }] },
        })
    };
    let told = |name: &str| -> Result<Value> {
        Ok(controller.index()?["addresses"][format!("shop/{name}.shop.svc.cluster.local")]["resource"]["service"]
            ["waypoint"]
            .take())
    };
    for (name, waypoint) in [("good", "w"), ("lost", "nowhere")] {
        cluster.must_make(&format!("{CORE}/services"), &service(name, waypoint))?;
    }
    const BOUND: &str = "istio.io/WaypointBound";
    condition(cluster, &format!("{CORE}/services/good"), BOUND, "True", "WaypointAccepted")?;
    let why = condition(cluster, &format!("{CORE}/services/lost"), BOUND, "False", "WaypointIsNotReady")?;
    ensure!(why.contains("no Gateway shop/nowhere"), "{why}");
    ensure!(told("good")? == "shop/w.shop.svc.cluster.local:15008", "{}", told("good")?);
    ensure!(told("lost")? == "shop/no-gateway.nowhere.shop.svc.cluster.local:15008", "{}", told("lost")?);
    outside(cluster)?;
    let purpose = json!({ "metadata": { "labels": { "istio.io/waypoint-for": "workload" } } });
    cluster.must_patch(&format!("{GATEWAYS}/w"), &purpose)?;
    condition(cluster, &format!("{CORE}/services/good"), BOUND, "False", "UnsupportedTrafficType")?;
    wait_for("the end of the binding", PATIENCE, || Ok(told("good")?.is_null().then_some(())))?;
    cluster.must_patch(
        &format!("{GATEWAYS}/w"),
        &json!({ "metadata": { "labels": { "istio.io/waypoint-for": null } } }),
    )?;
    condition(cluster, &format!("{CORE}/services/good"), BOUND, "True", "WaypointAccepted")?;
    // Who is not bound any more is not said to be.
    let unbound = json!({ "metadata": { "labels": { "istio.io/use-waypoint": null } } });
    cluster.must_patch(&format!("{CORE}/services/lost"), &unbound)?;
    wait_for("the end of the condition", PATIENCE, || {
        let status = cluster.get(&format!("{CORE}/services/lost"))?["status"].take();
        Ok(status["conditions"].as_array().is_none_or(Vec::is_empty).then_some(()))
    })
}

/// Beside what another part of the controller says of the same objects.
fn outside(cluster: &Cluster) -> Result<()> {
    let networking = "/apis/networking.istio.io/v1/namespaces/shop";
    let labels = json!({ "istio.io/use-waypoint": "w" });
    let ports = json!([{ "number": 443, "name": "tls", "protocol": "TLS" }]);
    let entry = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "ServiceEntry",
        "metadata": { "name": "outside", "labels": labels },
        "spec": { "hosts": ["outside.example.com"], "ports": ports, "resolution": "DNS" },
    });
    let machine = json!({
        "apiVersion": "networking.istio.io/v1", "kind": "WorkloadEntry",
        "metadata": { "name": "vm", "labels": labels }, "spec": { "address": "192.0.2.7" },
    });
    cluster.must_make(&format!("{networking}/serviceentries"), &entry)?;
    cluster.must_make(&format!("{networking}/workloadentries"), &machine)?;
    let (entry, machine) =
        (format!("{networking}/serviceentries/outside"), format!("{networking}/workloadentries/vm"));
    condition(cluster, &entry, "istio.io/WaypointBound", "True", "WaypointAccepted")?;
    condition(cluster, &entry, "Accepted", "True", "Accepted")?;
    condition(cluster, &machine, "istio.io/WaypointBound", "False", "UnsupportedTrafficType")?;
    condition(cluster, &machine, "Accepted", "True", "Accepted")?;
    let both = cluster.get(&entry)?["status"]["conditions"].take();
    ensure!(both.as_array().is_some_and(|all| all.len() == 2), "{both}");
    Ok(())
}

fn repaired(cluster: &Cluster) -> Result<()> {
    // asserts D61
    let image =
        json!([{ "op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "other" }]);
    let answer = cluster.ask("PATCH", &format!("{APPS}/w"), "application/json-patch+json", Some(&image))?;
    ensure!(answer["kind"] == "Deployment", "{answer}");
    wait_for("the image", PATIENCE, || {
        let deployment = cluster.get(&format!("{APPS}/w"))?;
        Ok((deployment["spec"]["template"]["spec"]["containers"][0]["image"] == IMAGE).then_some(()))
    })?;
    cluster.must_delete(&format!("{CORE}/services/w"))?;
    there(cluster, &format!("{CORE}/services/w"))?;
    // What is said nothing of here is not taken back.
    cluster.must_patch(&format!("{APPS}/w"), &json!({ "spec": { "replicas": 3 } }))?;
    cluster.must_delete(&format!("{CORE}/serviceaccounts/w"))?;
    there(cluster, &format!("{CORE}/serviceaccounts/w"))?;
    ensure!(cluster.get(&format!("{APPS}/w"))?["spec"]["replicas"] == 3, "replicas are taken back");
    Ok(())
}

fn overlaid(cluster: &Cluster) -> Result<()> {
    // asserts D60, D65
    let map = json!({ "metadata": { "name": "p" }, "data": {
        "horizontalPodAutoscaler": "spec: {minReplicas: 2, maxReplicas: 4}",
        "deployment": "spec: {template: {spec: {priorityClassName: system-cluster-critical}}}",
    } });
    cluster.must_make(&format!("{CORE}/configmaps"), &map)?;
    let parameters = json!({ "group": "", "kind": "ConfigMap", "name": "p" });
    cluster.must_patch(
        &format!("{GATEWAYS}/w"),
        &json!({ "spec": { "infrastructure": { "parametersRef": parameters } } }),
    )?;
    let scaler = there(cluster, &format!("{SCALERS}/w"))?;
    ensure!(
        scaler["spec"]["maxReplicas"] == 4 && scaler["spec"]["scaleTargetRef"]["name"] == "w",
        "{scaler}"
    );
    let priority = || -> Result<Value> {
        Ok(cluster.get(&format!("{APPS}/w"))?["spec"]["template"]["spec"]["priorityClassName"].take())
    };
    wait_for("the overlay", PATIENCE, || Ok((priority()? == "system-cluster-critical").then_some(())))?;
    let bad = json!({ "data": { "horizontalPodAutoscaler": null, "deployment": "spec: [" } });
    cluster.must_patch(&format!("{CORE}/configmaps/p"), &bad)?;
    let why = condition(cluster, &format!("{GATEWAYS}/w"), "Accepted", "False", "InvalidParameters")?;
    ensure!(why.contains("ConfigMap p: key deployment"), "{why}");
    ensure!(
        cluster.get(&format!("{SCALERS}/w"))?["kind"] == "HorizontalPodAutoscaler",
        "it went with bad parameters"
    );
    cluster.must_patch(&format!("{CORE}/configmaps/p"), &json!({ "data": { "deployment": null } }))?;
    gone(cluster, &format!("{SCALERS}/w"))?;
    wait_for("the end of the overlay", PATIENCE, || Ok(priority()?.is_null().then_some(())))?;
    condition(cluster, &format!("{GATEWAYS}/w"), "Accepted", "True", "Accepted")?;
    Ok(())
}

fn left_alone(cluster: &Cluster) -> Result<()> {
    // asserts D61
    let theirs = json!({ "metadata": { "name": "x" }, "spec": { "ports": [{ "port": 7 }] } });
    cluster.must_make(&format!("{CORE}/services"), &theirs)?;
    cluster.must_make(GATEWAYS, &gateway("x", &json!({})))?;
    let why = condition(cluster, &format!("{GATEWAYS}/x"), "Programmed", "False", "NoResources")?;
    ensure!(why.contains("Service shop/x exists without label gateway.istio.io/managed"), "{why}");
    let service = cluster.get(&format!("{CORE}/services/x"))?;
    ensure!(service["spec"]["ports"][0]["port"] == 7 && service["metadata"]["labels"].is_null(), "{service}");
    let addresses = json!({ "addresses": [{ "type": "IPAddress", "value": "198.18.140.1" }] });
    cluster.must_make(GATEWAYS, &gateway("by-hand", &addresses))?;
    condition(cluster, &format!("{GATEWAYS}/by-hand"), "Programmed", "True", "Programmed")?;
    ensure!(cluster.get(&format!("{APPS}/by-hand"))?["code"] == 404, "something was made for it");
    Ok(())
}

/// What was written is written once for each thing that happened: an answer of the API server is no reason to write again.
fn calm(cluster: &Cluster) -> Result<()> {
    let log = cluster.log("controller")?;
    let written =
        log.lines().filter(|line| line.contains("culvert_controller::provision") && line.contains("written"));
    let written: Vec<&str> = written.collect();
    // Five objects of `w`, one of `x`; an edit or a deletion, and what Kubernetes fills in, cost one more each.
    ensure!((6..16).contains(&written.len()), "{} writes:\n{}", written.len(), written.join("\n"));
    Ok(())
}

/// With the Gateway its objects go by their owner, with another class by us.
fn ended(cluster: &mut Cluster) -> Result<()> {
    // asserts D57, D64
    cluster.must_make(GATEWAYS, &gateway("v", &json!({})))?;
    there(cluster, &format!("{APPS}/v"))?;
    let foreign = json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "GatewayClass",
        "metadata": { "name": "foreign" }, "spec": { "controllerName": "example.com/other" },
    });
    cluster.must_make("/apis/gateway.networking.k8s.io/v1/gatewayclasses", &foreign)?;
    cluster.must_patch(&format!("{GATEWAYS}/v"), &json!({ "spec": { "gatewayClassName": "foreign" } }))?;
    for path in [format!("{APPS}/v"), format!("{CORE}/services/v"), format!("{CORE}/serviceaccounts/v")] {
        gone(cluster, &path)?;
    }
    garbage_collector(cluster)?;
    cluster.must_delete(&format!("{GATEWAYS}/w"))?;
    for path in [format!("{APPS}/w"), format!("{CORE}/services/w"), format!("{CORE}/serviceaccounts/w")] {
        gone(cluster, &path).with_context(|| cluster.log("kube-controller-manager").unwrap_or_default())?;
    }
    condition(
        cluster,
        &format!("{CORE}/services/good"),
        "istio.io/WaypointBound",
        "False",
        "WaypointIsNotReady",
    )?;
    Ok(())
}

/// What the chart lets the controller do is what all of this needs, and no more than is said.
fn permitted(cluster: &Cluster) -> Result<()> {
    let may = |group: &str, resource: &str, subresource: &str, verb: &str| -> Result<bool> {
        let attributes = json!({
            "namespace": "shop", "group": group, "resource": resource, "subresource": subresource, "verb": verb,
        });
        let user = format!("system:serviceaccount:{SYSTEM}:culvert-controller");
        let review = json!({ "spec": { "user": user, "resourceAttributes": attributes } });
        let answer = cluster.make("/apis/authorization.k8s.io/v1/subjectaccessreviews", &review)?;
        Ok(answer["status"]["allowed"] == true)
    };
    let made = [
        ("", "serviceaccounts"),
        ("", "services"),
        ("apps", "deployments"),
        ("autoscaling", "horizontalpodautoscalers"),
        ("policy", "poddisruptionbudgets"),
    ];
    for (group, resource) in made {
        for verb in ["get", "list", "watch", "create", "patch", "delete"] {
            ensure!(may(group, resource, "", verb)?, "it may not {verb} {resource}");
        }
    }
    let gateway = "gateway.networking.k8s.io";
    let said = [(gateway, "gateways"), (gateway, "gatewayclasses"), ("", "services")];
    for (group, resource) in said {
        ensure!(may(group, resource, "status", "patch")?, "it may not say the status of {resource}");
    }
    ensure!(may("", "configmaps", "", "watch")?, "it may not watch ConfigMaps");
    for (group, resource, verb) in [
        ("", "secrets", "get"),
        ("apps", "daemonsets", "create"),
        (gateway, "gateways", "patch"),
        ("", "pods", "create"),
    ] {
        ensure!(!may(group, resource, "", verb)?, "it may {verb} {resource}");
    }
    Ok(())
}

#[test]
fn waypoints_on_a_real_api_server() {
    let mut cluster = Cluster::start().expect("a control plane");
    let mut checks = Checks::default();
    checks.check("the definitions of the Gateway API and the chart install", || {
        for namespace in [SYSTEM, "shop"] {
            cluster.must_make("/api/v1/namespaces", &json!({ "metadata": { "name": namespace } }))?;
        }
        definitions(&cluster)?;
        cluster.helm(&["install", "culvert", "--namespace", SYSTEM])
    });
    let flags = ["--waypoint-image", IMAGE];
    let controller = Controller::start_as(&mut cluster, "controller", &flags).expect("the controller");
    checks.check("the chart permits what is needed and no more", || permitted(&cluster));
    checks.check("a Gateway becomes objects, and its status says how far they are", || made(&cluster));
    checks.check("who is bound is told so, and who is bound to nothing", || bound(&cluster, &controller));
    checks.check("what somebody edits or deletes is put back", || repaired(&cluster));
    checks.check("a ConfigMap changes what is made, and takes it away again", || overlaid(&cluster));
    checks.check("what is not ours is left alone, and said", || left_alone(&cluster));
    checks.check("nothing is written again and again", || calm(&cluster));
    checks.check("another class or the end of a Gateway takes everything away", || ended(&mut cluster));
    checks.finish();
}
