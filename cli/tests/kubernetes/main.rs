//! The command about a cluster: what it asks an API server, and what it makes of the answers.
#![allow(clippy::unwrap_used, reason = "test code")]

use objects::{SYSTEM, ago, gateway, list, proxies, well};
use serde_json::{Value, json};
use server::{Server, Table, status};

mod objects;
mod server;

fn reasons(status: &Value) -> Vec<&str> {
    status["problems"].as_array().unwrap().iter().map(|it| it["reason"].as_str().unwrap()).collect()
}

/// The reasons of what is wrong after a change to a mesh that is well.
async fn after(change: impl FnOnce(&mut Table)) -> (i32, Vec<String>) {
    let server = Server::start(well()).await;
    server.change(change);
    let (code, status) = server.json(&["status"]).await;
    (code, reasons(&status).into_iter().map(str::to_owned).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mesh_that_is_well_has_no_problems_and_fits_a_screen() {
    let server = Server::start(well()).await;
    let (code, status) = server.json(&["status"]).await;
    assert_eq!((code, reasons(&status)), (0, vec![]), "{status:#}");
    assert_eq!(status["apiVersion"], "culvert.dev/v1");
    assert_eq!(status["controlPlane"]["leader"], "ctl-1");
    // By a forwarded port.
    assert_eq!(status["nodes"][1]["certificates"]["valid"], 1);
    assert_eq!(status["nodes"][0]["configuration"]["generation"], 7);
    assert_eq!(status["namespaces"][0]["enrolled"], 2);
    let table = server.run(&["status"]).await;
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.ends_with("All is well.\n"), "{text}");
    assert!(text.lines().count() <= 24, "{text}");
    let long: Vec<_> = text.lines().filter(|line| line.chars().count() > 80).collect();
    assert!(long.is_empty(), "{long:#?}");
    let yaml = server.run(&["status", "-o", "yaml"]).await;
    let yaml: Value = serde_saphyr::from_str(&String::from_utf8(yaml.stdout).unwrap()).unwrap();
    assert_eq!(yaml["kind"], "MeshStatus");
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_are_named() {
    let away = "Error trying to reach service: 'dial tcp 100.64.1.2:15014: connect: connection refused'";
    let controller = format!("{SYSTEM}/pods/ctl-1:15014/proxy/debug/proxies");
    let found = after(|table| drop(table.pages.insert(controller, (503, json!(away))))).await;
    assert_eq!(found, (1, vec!["ControllerUnreachable".to_owned()]));

    let dial = "error dialing backend: dial tcp 198.18.0.12:10250: connect: connection refused";
    let found = after(|table| drop(table.unforwarded.insert("zt-node-b".into(), dial.into()))).await;
    assert_eq!(found, (1, vec!["KubeletUnreachable".to_owned()]));

    let found =
        after(|table| drop(table.forwarded.remove(&("zt-node-b".into(), "/certificates".into())))).await;
    assert_eq!(found, (1, vec!["ProxyUnreachable".to_owned()]));

    let agent = format!("{SYSTEM}/pods/ag-node-a:8000/proxy/healthz");
    let stuck = (500, json!("nothing has been done for a minute\n"));
    let found = after(|table| drop(table.pages.insert(agent, stuck))).await;
    assert_eq!(found, (1, vec!["AgentUnreachable".to_owned()]));

    let mut behind = proxies();
    behind["proxies"][1]["types"]["Address"]["behindSince"] = json!(ago(30));
    let page = format!("{SYSTEM}/pods/ctl-1:15014/proxy/debug/proxies");
    let found = after(|table| drop(table.pages.insert(page, (200, behind)))).await;
    assert_eq!(found, (1, vec!["ProxyBehind".to_owned()]));

    let forbidden = (403, status(403, "nodes is forbidden: User \"u\" cannot list resource \"nodes\""));
    let found = after(|table| drop(table.pages.insert("/api/v1/nodes".into(), forbidden))).await;
    assert_eq!(found, (1, vec!["CannotRead".to_owned()]));

    let gateways = "/apis/gateway.networking.k8s.io/v1/gateways";
    let found = after(|table| drop(table.pages.insert(gateways.into(), list("GatewayList", &[])))).await;
    assert_eq!(found, (1, vec!["WaypointMissing".to_owned()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_that_is_away_is_a_problem_and_no_abort() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kubeconfig");
    // Nobody listens there any more.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    std::fs::write(&path, server::kubeconfig(&format!("http://{port}"))).unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_culvert"));
    command.args(["status", "-o", "json", "--context", "test", "--kubeconfig"]).arg(&path);
    let output = command.output().await.unwrap();
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), reasons(&status)), (Some(1), vec!["ApiServerUnreachable"]));
    assert!(status["problems"][0]["message"].as_str().unwrap().contains("refused"), "{status:#}");
}

/// K01, K04, K06, K08.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_knows_is_read_from_its_own_page() {
    let server = Server::start(well()).await;
    let workload = json!({"uid": "Kubernetes//Pod/shop/web-1", "name": "web-1", "namespace": "shop", "addresses": ["100.64.1.2"],
        "node": "node-a", "tunnel_protocol": "Hbone", "health": "Healthy", "services": {}});
    let dump = json!({"node": "node-b", "workloads": [workload], "services": [], "policies": []});
    server.change(|table| drop(table.forwarded.insert(("zt-node-b".into(), "/config_dump".into()), dump)));
    // The context's namespace is the default, as for kubectl.
    let (code, listed) = server.json(&["get", "workloads", "--node", "node-b"]).await;
    assert_eq!((code, listed["items"].as_array().unwrap().len()), (0, 1), "{listed:#}");
    let (_, elsewhere) = server.json(&["get", "wl", "-n", "default", "--node", "node-b"]).await;
    assert_eq!(elsewhere["items"], json!([]));
    let (_, certificates) = server.json(&["get", "certificates", "-A"]).await;
    assert_eq!(certificates["items"].as_array().unwrap().len(), 2);
    let (_, listed) = server.json(&["get", "proxies"]).await;
    assert_eq!(listed["items"][1]["pod"], "zt-node-b");
    server
        .change(|table| drop(table.forwarded.insert(("zt-node-b".into(), "/connections".into()), json!([]))));
    let everything = server.run(&["get", "all", "-A", "--node", "node-b"]).await;
    let text = String::from_utf8(everything.stdout).unwrap();
    for heading in ["PROTOCOL", "NOT AFTER", "CONTROLLER"] {
        assert!(text.contains(heading), "{heading} in {text}");
    }
    let unknown = server.run(&["get", "workloads", "--node", "node-c"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no proxy runs on node-c"));
}

/// K09.
#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_of_the_pods_node_explains() {
    let server = Server::start(well()).await;
    let page = "/debug/explain?source=shop/web-1&destination=web:80";
    let answer = json!({"source": {"uid": "Kubernetes//Pod/shop/web-1"}, "asked": "web:80", "addressed": "unknown",
        "decision": {"way": "passthrough", "destination": "1.2.3.4:80"}});
    server.change(|table| drop(table.forwarded.insert(("zt-node-a".into(), page.into()), answer)));
    let output = server.run(&["explain", "web-1", "web:80"]).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("passed through to 1.2.3.4:80"), "{output:?}");
    let nobody = server.run(&["explain", "-n", "shop", "nobody", "web:80"]).await;
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("shop/nobody"));
}

/// K11.
#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_is_applied_and_its_namespace_enrolled() {
    let server = Server::start(well()).await;
    let other = server.run(&["waypoint", "apply", "--name", "other", "--enroll-namespace"]).await;
    assert_eq!(other.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&other.stderr).contains("--overwrite"));
    assert_eq!(server.changes(), []);
    let forced =
        ["waypoint", "apply", "--name", "other", "--enroll-namespace", "--overwrite", "--for", "all"];
    let output = server.run(&forced).await;
    assert!(output.status.success(), "{output:?}");
    let changes = server.changes();
    let (method, path, body) = &changes[0];
    assert_eq!(method, "PATCH");
    assert!(path.starts_with("/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways/other?"), "{path}");
    assert!(path.contains("fieldManager=culvert"), "{path}");
    assert_eq!(body["metadata"]["labels"]["istio.io/waypoint-for"], "all");
    assert_eq!(body["spec"]["listeners"][0]["protocol"], "HBONE");
    assert_eq!(changes[1].2, json!({"metadata": {"labels": {"istio.io/use-waypoint": "other"}}}));
    assert_eq!(changes.len(), 2);
}

/// K12, K13, K14.
#[tokio::test(flavor = "multi_thread")]
async fn waypoints_are_listed_waited_for_and_deleted() {
    let server = Server::start(well()).await;
    let (_, listed) = server.json(&["waypoint", "list", "-A"]).await;
    assert_eq!(
        (&listed["items"][0]["name"], &listed["items"][0]["programmed"]),
        (&json!("waypoint"), &json!(true))
    );
    assert_eq!(server.json(&["waypoint", "status"]).await.0, 0);
    let of_shop = "/apis/gateway.networking.k8s.io/v1/namespaces/shop/gateways";
    server.change(|table| drop(table.pages.insert(of_shop.into(), list("GatewayList", &[gateway("False")]))));
    let output = server.run(&["waypoint", "status"]).await;
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("False") && text.contains("because"), "{text}");
    let waited = server.run(&["waypoint", "status", "--wait", "--waypoint-timeout", "1"]).await;
    assert_eq!(waited.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&waited.stderr).contains("not programmed after 1 s"), "{waited:?}");
    server.change(|table| {
        table.pages.insert(format!("{of_shop}/waypoint"), (200, gateway("False")));
    });
    assert_eq!(server.run(&["waypoint", "delete", "nobody"]).await.status.code(), Some(1));
    assert!(server.run(&["waypoint", "delete", "--all"]).await.status.success());
    assert_eq!(server.changes().last().unwrap().0, "DELETE");
}

/// K26.
#[tokio::test(flavor = "multi_thread")]
async fn versions_of_both_planes_are_told() {
    let server = Server::start(well()).await;
    let (code, versions) = server.json(&["version"]).await;
    assert_eq!(
        (code, &versions["controlPlane"]["0.1.0"], &versions["dataPlane"]["0.1.0"]),
        (0, &json!(1), &json!(2))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_is_asked_for_by_role_and_node() {
    let server = Server::start(well()).await;
    server.change(|table| {
        drop(table.pages.insert(format!("{SYSTEM}/pods/zt-node-b/log"), (200, json!("a line\n"))))
    });
    let output = server.run(&["logs", "proxy/node-b", "--tail", "1"]).await;
    assert_eq!(String::from_utf8_lossy(&output.stdout), "a line\n", "{output:?}");
    assert_eq!(server.run(&["logs", "proxy/node-c"]).await.status.code(), Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_says_what_a_cluster_lacks_and_what_may_not_be_done() {
    let server = Server::start(well()).await;
    let reviews = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
    let review = |allowed: bool| (201, json!({"spec": {}, "status": {"allowed": allowed}}));
    server.change(|table| drop(table.pages.insert(reviews.into(), review(true))));
    let (code, report) = server.json(&["check"]).await;
    let result = |report: &Value, name: &str| {
        let checks = report["checks"].as_array().unwrap();
        checks.iter().find(|it| it["name"] == name).map(|it| it["result"].as_str().unwrap().to_owned())
    };
    assert_eq!(code, 0, "{report:#}");
    assert_eq!(result(&report, "kubernetes").as_deref(), Some("ok"));
    assert_eq!(result(&report, "mesh").as_deref(), Some("ok"));
    assert_eq!(result(&report, "may-install"), None);
    server.change(|table| {
        table.pages.insert(reviews.into(), review(false));
        table.pages.insert("/version".into(), (200, json!({"gitVersion": "v1.30.1"})));
    });
    let (code, report) = server.json(&["check", "--pre"]).await;
    assert_eq!((code, result(&report, "kubernetes").as_deref()), (1, Some("error")));
    assert_eq!(result(&report, "may-install").as_deref(), Some("error"));
}

#[tokio::test(flavor = "multi_thread")]
async fn flags_of_both_kinds_of_mesh_are_a_usage_error() {
    let server = Server::start(well()).await;
    let output = server.run(&["status", "--state", "/nowhere"]).await;
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(server.run(&["status", "-o", "xml"]).await.status.code(), Some(2));
}
