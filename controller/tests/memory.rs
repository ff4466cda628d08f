//! What a pod of a cluster costs the controller: alone in its process, since memory is measured from outside.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic; the lint's own exception stops at #[test] functions"
)]

use std::time::{Duration, Instant};

use culvert_controller::index::Index;
use culvert_controller::sources::kubernetes::convert::{convert, key_of};
use culvert_controller::sources::kubernetes::kinds::{Watched, builtin};
use culvert_controller::sources::kubernetes::store::{Said, Store};
use culvert_controller::translate::MeshSettings;
use kube::api::DynamicObject;
use serde_json::{Value, json};

const PODS: usize = 5_000;
const SERVICES: usize = 1_000;
/// What a pod may cost, with its share of everything else.
const A_POD: usize = 20 * 1024;

fn kind(name: &str) -> Watched {
    builtin().into_iter().find(|it| it.kind == name).unwrap()
}

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

/// As large as the API server's own: what no mesh reads is most of it.
fn pod(number: usize, ready: bool) -> DynamicObject {
    let (namespace, service) = (format!("team-{}", number % 50), format!("s{}", number % SERVICES));
    let env: Vec<Value> = (0..20)
        .map(|n| json!({"name": format!("VARIABLE_{n}"), "value": "a value of some length"}))
        .collect();
    let fields: Vec<Value> = (0..40)
        .map(|n| json!({"manager": format!("kubelet-{n}"), "operation": "Update", "fieldsV1": {"f:status": {"f:conditions": {}}}}))
        .collect();
    let ip = format!("10.{}.{}.{}", 64 + number / 65_536, number / 256 % 256, number % 256);
    let status = if ready { "True" } else { "False" };
    object(json!({
        "metadata": {
            "name": format!("{service}-7d9f8b6c5-{number:05}"), "namespace": namespace,
            "uid": format!("0f3c1d52-7e41-4b2c-9d3a-{number:012}"),
            "labels": {"app": service, "pod-template-hash": "7d9f8b6c5", "app.kubernetes.io/name": service,
                "app.kubernetes.io/instance": "release", "version": "v1", "team": namespace},
            "annotations": {"ambient.istio.io/redirection": "enabled", "checksum/config": "0123456789abcdef".repeat(4)},
            "creationTimestamp": "2026-01-01T00:00:00Z", "managedFields": fields,
        },
        "spec": {
            "nodeName": format!("node-{}", number % 100), "serviceAccountName": service,
            "containers": [{"name": "app", "image": "registry.example/app:v1", "env": env,
                "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
                "readinessProbe": {"httpGet": {"port": "http", "path": "/ready"}}}],
        },
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": status}]},
    }))
}

fn service(number: usize) -> DynamicObject {
    let name = format!("s{number}");
    let ip = format!("10.96.{}.{}", number / 256, number % 256);
    object(json!({
        "metadata": {"name": name, "namespace": format!("team-{}", number % 50), "uid": name},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
            "ports": [{"name": "http", "port": 80, "targetPort": "http"}, {"name": "metrics", "port": 9090}]},
    }))
}

fn list(store: &mut Store, of: &str, objects: impl Iterator<Item = DynamicObject>) {
    let of = kind(of);
    store.apply(&of, Said::Init);
    for object in objects {
        let key = key_of(&of, &object.metadata);
        store.apply(&of, Said::Listed(key, Box::new(convert(&of, object))));
    }
    store.apply(&of, Said::Done);
}

/// Bytes of this process that are in memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<usize>().unwrap() * 1024
}

/// A pod costs what it is worth, in memory and in time, among 5,000 of 1,000 services: through the reader, the store, the index
/// and what is kept ready to be sent.
#[test]
fn a_pod_costs_at_most_20_kb_and_a_change_of_one_no_more_than_it_is_worth() {
    let before = resident();
    let mut store = Store::default();
    let node = |number: usize| {
        let labels = json!({"topology.kubernetes.io/zone": "z"});
        object(json!({"metadata": {"name": format!("node-{number}"), "labels": labels}}))
    };
    list(&mut store, "Node", (0..100).map(node));
    list(&mut store, "Service", (0..SERVICES).map(service));
    list(&mut store, "Pod", (0..PODS).map(|number| pod(number, true)));
    let mut index = Index::new(MeshSettings::default(), 1);
    let begun = Instant::now();
    let first = index.apply(store.world().unwrap());
    let whole = begun.elapsed();
    assert_eq!((first.addresses.len(), first.services), (PODS + SERVICES, SERVICES));
    let each = (resident() - before) / PODS;
    println!("{each} bytes a pod; the whole takes {whole:?}");
    assert!(each <= A_POD, "{each} bytes a pod");

    let pods = kind("Pod");
    let mut fastest = Duration::MAX;
    for round in 0..10 {
        let changed = pod(7, round % 2 == 1);
        let key = key_of(&pods, &changed.metadata);
        let said = Said::Applied(key, Box::new(convert(&pods, changed)));
        let generation = index.current().generation;
        let begun = Instant::now();
        store.apply(&pods, said);
        let world = store.world().unwrap();
        assert_ne!(world, *index.current().world);
        let after = index.apply(world);
        fastest = fastest.min(begun.elapsed());
        assert_eq!(after.generation, generation + 1);
    }
    println!("a change of one takes {fastest:?}");
    assert!(fastest < whole / 50, "one pod took {fastest:?}, the whole {whole:?}");
}
