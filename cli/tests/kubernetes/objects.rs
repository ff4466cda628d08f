//! A mesh of two nodes that is well, as an API server tells of it.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::server::Table;

pub const SYSTEM: &str = "/api/v1/namespaces/culvert-system";

pub fn ago(seconds: i64) -> String {
    let then = Timestamp::now() - SignedDuration::from_secs(seconds);
    Timestamp::from_second(then.as_second()).unwrap().to_string()
}

/// `renewTime` has microseconds.
fn ago_micro(seconds: i64) -> String {
    ago(seconds).replace('Z', ".000000Z")
}

pub fn list(kind: &str, items: &[Value]) -> (u16, Value) {
    (200, json!({"kind": kind, "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": items}))
}

fn pod(namespace: &str, name: &str, app: &str, node: &str) -> Value {
    let enrolled =
        if namespace == "shop" { json!({"ambient.istio.io/redirection": "enabled"}) } else { json!({}) };
    json!({
        "metadata": {"name": name, "namespace": namespace, "uid": name, "labels": {"app": app}, "annotations": enrolled,
            "creationTimestamp": ago(900)},
        "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
        "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": ago(800)}]},
    })
}

fn node(name: &str) -> Value {
    json!({
        "metadata": {"name": name},
        "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": ago(900)}], "nodeInfo": {
            "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "", "kernelVersion": "6.1.0", "kubeProxyVersion": "",
            "kubeletVersion": "v1.36.3", "machineID": "", "operatingSystem": "linux", "osImage": "", "systemUUID": ""}},
    })
}

fn lease(name: &str, seconds: i64) -> Value {
    let spec =
        json!({"holderIdentity": "ctl-1", "renewTime": ago_micro(seconds), "leaseDurationSeconds": 15});
    json!({"metadata": {"name": name, "namespace": "x"}, "spec": spec})
}

fn daemon_set(name: &str) -> Value {
    let container =
        json!({"name": "c", "args": ["agent", "--exclude-namespaces=kube-system,culvert-system"]});
    json!({
        "metadata": {"name": name, "namespace": "culvert-system", "generation": 1},
        "spec": {"selector": {}, "template": {"spec": {"containers": [container]}}},
        "status": {"desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "observedGeneration": 1,
            "currentNumberScheduled": 2, "numberMisscheduled": 0, "numberReady": 2},
    })
}

fn progress() -> Value {
    json!({"ackedGeneration": 7, "behindSince": null, "sent": 2, "nacked": 0, "lastNack": null})
}

pub fn proxies() -> Value {
    let proxy = |node: &str| {
        json!({"node": node, "namespace": "culvert-system", "pod": format!("zt-{node}"), "version": "0.1.0", "generations": true,
            "connected": ago(700), "types": {"Address": progress(), "Authorization": progress()}})
    };
    json!({"version": "0.1.0", "generation": 7, "published": ago(600), "proxies": [proxy("node-a"), proxy("node-b")]})
}

pub fn certificates() -> Value {
    json!([{"identity": "spiffe://cluster.local/ns/shop/sa/web", "state": "Available", "serial": "01", "notBefore": ago(3600),
        "notAfter": ago(-80_000), "generation": 1, "failures": 0, "lastError": null}])
}

pub fn gateway(programmed: &str) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "waypoint", "namespace": "shop", "creationTimestamp": ago(500)},
        "spec": {"gatewayClassName": "culvert-waypoint", "listeners": []},
        "status": {"conditions": [
            {"type": "Accepted", "status": "True", "reason": "Accepted", "message": ""},
            {"type": "Programmed", "status": programmed, "reason": "Why", "message": "because", "lastTransitionTime": ago(400)}]},
    })
}

/// Everything that `culvert status` looks at.
pub fn well() -> Table {
    let own = [
        pod("culvert-system", "ctl-1", "culvert-controller", "node-a"),
        pod("culvert-system", "ag-node-a", "culvert-agent", "node-a"),
        pod("culvert-system", "ag-node-b", "culvert-agent", "node-b"),
        pod("culvert-system", "zt-node-a", "ztunnel", "node-a"),
        pod("culvert-system", "zt-node-b", "ztunnel", "node-b"),
    ];
    let apps = [pod("shop", "web-1", "web", "node-a"), pod("shop", "web-2", "web", "node-b")];
    let all: Vec<Value> = own.iter().chain(&apps).cloned().collect();
    let label = json!({"istio.io/dataplane-mode": "ambient", "istio.io/use-waypoint": "waypoint"});
    let namespaces =
        [json!({"metadata": {"name": "shop", "labels": label}}), json!({"metadata": {"name": "default"}})];
    let deployment = json!({
        "metadata": {"name": "culvert-controller", "namespace": "culvert-system", "generation": 1},
        "spec": {"replicas": 1, "selector": {}, "template": {}}, "status": {"updatedReplicas": 1, "observedGeneration": 1},
    });
    let policy = json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "shop"}, "spec": {}});
    let apps_of = "/apis/apps/v1/namespaces/culvert-system";
    let mut pages: BTreeMap<String, (u16, Value)> = [
        ("/version".to_owned(), (200, json!({"gitVersion": "v1.36.3", "major": "1", "minor": "36"}))),
        (format!("{apps_of}/deployments/culvert-controller"), (200, deployment)),
        (format!("{apps_of}/daemonsets/culvert-agent"), (200, daemon_set("culvert-agent"))),
        (format!("{apps_of}/daemonsets/ztunnel"), (200, daemon_set("ztunnel"))),
        (
            "/apis/coordination.k8s.io/v1/namespaces/culvert-system/leases/culvert-leader".to_owned(),
            (200, lease("culvert-leader", 3)),
        ),
        (
            "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases".to_owned(),
            list("LeaseList", &[lease("node-a", 5), lease("node-b", 6)]),
        ),
        (format!("{SYSTEM}/pods"), list("PodList", &own)),
        ("/api/v1/pods".to_owned(), list("PodList", &all)),
        ("/api/v1/nodes".to_owned(), list("NodeList", &[node("node-a"), node("node-b")])),
        ("/api/v1/namespaces".to_owned(), list("NamespaceList", &namespaces)),
        ("/api/v1/namespaces/shop".to_owned(), (200, namespaces[0].clone())),
        ("/api/v1/services".to_owned(), list("ServiceList", &[])),
        (
            "/apis/security.istio.io/v1/authorizationpolicies".to_owned(),
            list("AuthorizationPolicyList", &[policy]),
        ),
        ("/apis/gateway.networking.k8s.io/v1/gateways".to_owned(), list("GatewayList", &[gateway("True")])),
        (
            "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways".to_owned(),
            list("GatewayList", &[gateway("True")]),
        ),
        ("/api/v1/namespaces/shop/pods/web-1".to_owned(), (200, apps[0].clone())),
        (format!("{SYSTEM}/pods/ctl-1:15014/proxy/debug/proxies"), (200, proxies())),
        (format!("{SYSTEM}/pods/ctl-1:15014/proxy/debug/policies"), (200, json!({"policies": []}))),
    ]
    .into();
    for node in ["node-a", "node-b"] {
        pages.insert(format!("{SYSTEM}/pods/ag-{node}:8000/proxy/healthz"), (200, json!("alive\n")));
    }
    let forwarded =
        ["zt-node-a", "zt-node-b"].map(|pod| ((pod.to_owned(), "/certificates".to_owned()), certificates()));
    Table { pages, forwarded: forwarded.into(), ..Table::default() }
}
