//! The objects of the mesh: 10 namespaces, each with 100 services of 5 pods, and policies; 100 nodes.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use culvert_e2e::apiserver::{Cluster, MERGE, SYSTEM};
use serde_json::{Value, json};

use crate::api::Api;

pub const NAMESPACES: usize = 10;
/// In a namespace.
pub const SERVICES: usize = 100;
/// Of a service.
pub const PODS: usize = 5;
pub const NODES: usize = 100;
/// All pods of services.
pub const ALL_PODS: usize = NAMESPACES * SERVICES * PODS;
/// In a namespace: those that [`policies`] makes.
pub const POLICIES: usize = 12;
/// Service accounts of a namespace: five services have one in common.
const ACCOUNTS: usize = SERVICES / 5;
/// What pods listen on.
pub const PORT: u16 = 8080;
/// A pod that is nobody's endpoint, from which things are looked at.
pub const CLIENT: &str = "client";

/// A pod of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    pub namespace: usize,
    pub service: usize,
    pub number: usize,
}

impl Pod {
    pub fn all() -> impl Iterator<Item = Self> {
        (0..ALL_PODS).map(|n| Self {
            namespace: n / PODS / SERVICES,
            service: n / PODS % SERVICES,
            number: n % PODS,
        })
    }

    fn index(self) -> usize {
        (self.namespace * SERVICES + self.service) * PODS + self.number
    }

    pub fn name(self) -> String {
        format!("svc-{}-6d4f8b7c9d-{}", self.service, self.number)
    }

    pub fn namespace(self) -> String {
        format!("app-{}", self.namespace)
    }

    pub fn path(self) -> String {
        format!("/api/v1/namespaces/{}/pods/{}", self.namespace(), self.name())
    }

    pub fn uid(self) -> String {
        format!("Kubernetes//Pod/{}/{}", self.namespace(), self.name())
    }

    pub fn address(self) -> Ipv4Addr {
        address(self.index())
    }

    pub fn service_path(self) -> String {
        format!("/api/v1/namespaces/{}/services/svc-{}", self.namespace(), self.service)
    }

    fn pods_path(self) -> String {
        format!("/api/v1/namespaces/{}/pods?fieldManager=kube-controller-manager", self.namespace())
    }

    fn status_path(self) -> String {
        format!("{}/status?fieldManager=kubelet", self.path())
    }

    /// Name, app, node and account.
    fn texts(self) -> [String; 4] {
        let node = format!("node-{}", self.index() % NODES);
        [self.name(), format!("svc-{}", self.service), node, format!("team-{}", self.service / 5)]
    }

    /// Made, and not yet run by anybody.
    pub async fn define(self, api: &Api) -> Result<()> {
        let [name, app, node, account] = self.texts();
        api.make(&self.pods_path(), pod(&name, &app, &node, &account)).await
    }

    /// What kubelet says of it then.
    pub async fn runs(self, api: &Api) -> Result<()> {
        api.merge(&self.status_path(), &running(self.address())).await
    }
}

fn address(index: usize) -> Ipv4Addr {
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 10));
    Ipv4Addr::from(first + u32::try_from(index).expect("some thousands"))
}

/// Of the client, above those of all pods.
fn client_address() -> Ipv4Addr {
    address(ALL_PODS)
}

/// What a request sends to be accepted: a path and a body.
type Request = (String, String);

fn make(cluster: &Cluster, objects: impl IntoIterator<Item = Request>) -> Result<()> {
    cluster.ask_all("POST", "application/json", objects)
}

/// What there is before any pod of a service: namespaces, nodes with their leases, accounts.
pub fn before(cluster: &Cluster) -> Result<()> {
    let request = |path: &str, object: Value| (path.to_owned(), object.to_string());
    let mine = (0..NAMESPACES).map(|n| format!("app-{n}")).chain([SYSTEM.to_owned()]);
    make(
        cluster,
        mine.map(|name| {
            let labels =
                json!({ "istio.io/dataplane-mode": if name == SYSTEM { "none" } else { "ambient" } });
            request("/api/v1/namespaces", json!({ "metadata": { "name": name, "labels": labels } }))
        }),
    )?;
    make(
        cluster,
        (0..NAMESPACES * ACCOUNTS).map(|n| {
            let path = format!("/api/v1/namespaces/app-{}/serviceaccounts", n / ACCOUNTS);
            request(&path, json!({ "metadata": { "name": format!("team-{}", n % ACCOUNTS) } }))
        }),
    )?;
    make(
        cluster,
        (0..NODES).map(|n| {
            let (name, zone) = (format!("node-{n}"), format!("zone-{}", n % 3));
            let labels = json!({ "kubernetes.io/hostname": name, "topology.kubernetes.io/region": "one",
            "topology.kubernetes.io/zone": zone });
            request("/api/v1/nodes", json!({ "metadata": { "name": name, "labels": labels } }))
        }),
    )?;
    make(
        cluster,
        (0..NODES).map(|n| {
            let spec = json!({ "holderIdentity": format!("node-{n}"), "leaseDurationSeconds": 40 });
            let object = json!({ "metadata": { "name": format!("node-{n}") }, "spec": spec });
            request("/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases", object)
        }),
    )?;
    heartbeats(cluster, 0)
}

/// What every kubelet says of its node every few minutes; `beat` counts them.
pub fn heartbeats(cluster: &Cluster, beat: usize) -> Result<()> {
    let time = format!("2026-01-01T00:{:02}:00Z", beat % 60);
    let condition = |kind: &str, status: &str| json!({ "type": kind, "status": status, "reason": "KubeletSays", "lastHeartbeatTime": time });
    let conditions = ["MemoryPressure", "DiskPressure", "PIDPressure"].map(|kind| condition(kind, "False"));
    let conditions: Vec<_> = conditions.into_iter().chain([condition("Ready", "True")]).collect();
    let images: Vec<_> = (0..20)
        .map(|n| json!({ "names": [format!("registry.example/team/program-{n}:1.2.{beat}")], "sizeBytes": 12_345_678 }))
        .collect();
    let status = json!({ "status": { "conditions": conditions, "images": images,
        "capacity": { "cpu": "16", "memory": "64Gi", "pods": "110" } } });
    let path = |n| format!("/api/v1/nodes/node-{n}/status?fieldManager=kubelet");
    cluster.ask_all("PATCH", MERGE, (0..NODES).map(|n| (path(n), status.to_string())))
}

/// Services, with the slices that another controller would make of them.
pub fn services(cluster: &Cluster) -> Result<()> {
    let numbers = || (0..NAMESPACES * SERVICES).map(|n| (n / SERVICES, n % SERVICES));
    make(cluster, numbers().map(|(namespace, service)| {
        let name = format!("svc-{service}");
        let object = json!({
            "metadata": { "name": name, "labels": { "app": name, "team": format!("team-{}", service / 5) } },
            "spec": { "selector": { "app": name }, "ports": ports(PORT) },
        });
        (format!("/api/v1/namespaces/app-{namespace}/services"), object.to_string())
    }))?;
    make(
        cluster,
        numbers().map(|(namespace, service)| {
            let pods = (0..PODS).map(|number| Pod { namespace, service, number });
            let endpoints: Vec<Value> = pods.map(endpoint).collect();
            let name = format!("svc-{service}");
            let object = json!({
                "metadata": { "name": format!("{name}-x7k2p"), "labels": { "kubernetes.io/service-name": name,
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io" } },
                "addressType": "IPv4", "endpoints": endpoints,
                "ports": [{ "name": "http", "port": PORT, "protocol": "TCP" }],
            });
            (
                format!("/apis/discovery.k8s.io/v1/namespaces/app-{namespace}/endpointslices"),
                object.to_string(),
            )
        }),
    )
}

fn endpoint(pod: Pod) -> Value {
    json!({
        "addresses": [pod.address()], "nodeName": format!("node-{}", pod.index() % NODES),
        "conditions": { "ready": true, "serving": true, "terminating": false },
        "targetRef": { "kind": "Pod", "name": pod.name(), "namespace": pod.namespace() },
    })
}

/// The ports of a service whose pods listen on `target`.
pub fn ports(target: u16) -> Value {
    json!([{ "name": "http", "port": 80, "protocol": "TCP", "targetPort": target }])
}

/// All pods, and what kubelets say of them: that they run.
pub fn pods(cluster: &Cluster) -> Result<()> {
    make(cluster, [("/api/v1/namespaces/app-0/pods".to_owned(), pod(CLIENT, CLIENT, "node-0", "team-0"))])?;
    let path = format!("/api/v1/namespaces/app-0/pods/{CLIENT}/status");
    cluster.must_patch(&path, &running(client_address()))?;
    // Once, with marks: making 10 KB of JSON is slow where nothing is optimised.
    let like = pod("@NAME", "@APP", "@NODE", "@ACCOUNT");
    make(
        cluster,
        Pod::all().map(|it| {
            let texts = it.texts();
            let marks = ["@NAME", "@APP", "@NODE", "@ACCOUNT"];
            let text = marks.iter().zip(&texts).fold(like.clone(), |text, (mark, it)| text.replace(mark, it));
            (it.pods_path(), text)
        }),
    )?;
    let like = running(Ipv4Addr::UNSPECIFIED).to_string();
    cluster.ask_all(
        "PATCH",
        MERGE,
        Pod::all().map(|it| (it.status_path(), like.replace("0.0.0.0", &it.address().to_string()))),
    )
}

/// In each namespace: one that denies everything to pods that are labelled so, one that denies a port, and some that allow.
pub fn policies(cluster: &Cluster) -> Result<()> {
    let of = |namespace: usize, name: &str, spec: &Value| {
        let policy = json!({ "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
            "metadata": { "name": name }, "spec": spec });
        (policy_path(namespace), policy.to_string())
    };
    let labelled = json!({ "matchLabels": { "quarantine": "true" } });
    let quarantine = json!({ "selector": labelled, "action": "DENY", "rules": [{}] });
    make(
        cluster,
        (0..NAMESPACES).flat_map(|namespace| {
            let allow = (0..POLICIES - 2).map(move |n| {
                let selector = json!({ "matchLabels": { "app": format!("svc-{}", 50 + n) } });
                let principals = json!([format!("cluster.local/ns/app-{namespace}/sa/team-{n}")]);
                let rules = json!([{ "from": [{ "source": { "principals": principals } }] }]);
                let spec = json!({ "selector": selector, "action": "ALLOW", "rules": rules });
                of(namespace, &format!("allow-{n}"), &spec)
            });
            allow.chain([of(namespace, "quarantine", &quarantine), of(namespace, "port", &denies(9000))])
        }),
    )
}

pub fn policy_path(namespace: usize) -> String {
    format!("/apis/security.istio.io/v1/namespaces/app-{namespace}/authorizationpolicies")
}

/// The spec of a policy for the pods of service 0.
pub fn denies(port: u16) -> Value {
    let to = json!([{ "operation": { "ports": [port.to_string()] } }]);
    json!({ "selector": { "matchLabels": { "app": "svc-0" } }, "action": "DENY", "rules": [{ "to": to }] })
}

/// Bytes of JSON of a pod, on average over some.
pub fn bytes_a_pod(cluster: &Cluster) -> Result<usize> {
    let list = cluster.get("/api/v1/pods?limit=200")?;
    let count = list["items"].as_array().context("no list")?.len();
    Ok(list.to_string().len() / count)
}

fn running(address: Ipv4Addr) -> Value {
    let container = |name: &str| {
        let id = format!("containerd://{}", "5f".repeat(32));
        let image = format!("registry.example/shop/{name}@sha256:{}", "a7".repeat(32));
        json!({ "name": name, "ready": true, "started": true, "restartCount": 0, "image": image, "imageID": image,
            "containerID": id, "state": { "running": { "startedAt": "2026-01-01T00:00:00Z" } } })
    };
    let conditions: Vec<_> = ["Initialized", "Ready", "ContainersReady", "PodScheduled"]
        .map(|kind| json!({ "type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z" }))
        .into();
    json!({ "status": {
        "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }], "hostIP": "198.18.0.9",
        "startTime": "2026-01-01T00:00:00Z", "conditions": conditions,
        "containerStatuses": [container("app"), container("log")],
    } })
}

/// With what pods usually carry and the mesh does not read.
fn pod(name: &str, app: &str, node: &str, account: &str) -> String {
    let labels = json!({ "app": app, "version": "v1", "pod-template-hash": "6d4f8b7c9d",
        "app.kubernetes.io/part-of": "shop", "app.kubernetes.io/managed-by": "helm" });
    let annotations = json!({
        "ambient.istio.io/redirection": "enabled",
        "prometheus.io/scrape": "true", "prometheus.io/port": "9090", "prometheus.io/path": "/metrics",
        "checksum/config": "9c".repeat(32), "checksum/secret": "4e".repeat(32),
        "example.com/history": "rolled out by the pipeline of the shop's team, ".repeat(3),
    });
    let owner = json!([{ "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-6d4f8b7c9d"),
        "uid": "2f8f2a0e-6b0e-4d5c-9c39-5b9f6f7f2a11", "controller": true, "blockOwnerDeletion": true }]);
    let variables: Vec<Value> = (0..5)
        .map(|n| json!({ "name": format!("SETTING_{n}"), "value": format!("https://thing-{n}.example.com/api/v2") }))
        .chain([json!({ "name": "POD_IP", "valueFrom": { "fieldRef": { "fieldPath": "status.podIP" } } })])
        .chain(["user", "password"].map(|key| {
            json!({ "name": format!("DB_{key}"), "valueFrom": { "secretKeyRef": { "name": "database", "key": key } } })
        }))
        .collect();
    let mounts: Vec<Value> = ["config", "secrets", "cache", "tmp"]
        .map(|name| json!({ "name": name, "mountPath": format!("/var/run/{name}") }))
        .into();
    let probe = json!({ "httpGet": { "path": "/healthz", "port": "http" }, "periodSeconds": 10 });
    let container = |name: &str, port: u16, variables: &[Value]| {
        json!({ "name": name, "image": format!("registry.example/shop/{name}:1.2.3"), "args": ["--serve", "--verbose"],
            "env": variables, "volumeMounts": mounts, "livenessProbe": probe, "readinessProbe": probe,
            "ports": [{ "name": "http", "containerPort": port }],
            "resources": { "requests": { "cpu": "100m", "memory": "128Mi" }, "limits": { "memory": "256Mi" } },
            "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } } })
    };
    let spec = json!({
        "nodeName": node, "serviceAccountName": account,
        "containers": [container("app", PORT, &variables), container("log", 9090, &[])],
        "volumes": [
            { "name": "config", "configMap": { "name": app } }, { "name": "secrets", "secret": { "secretName": app } },
            { "name": "cache", "emptyDir": {} }, { "name": "tmp", "emptyDir": { "medium": "Memory" } },
        ],
        "tolerations": [{ "key": "dedicated", "operator": "Exists", "effect": "NoSchedule" }],
    });
    let metadata =
        json!({ "name": name, "labels": labels, "annotations": annotations, "ownerReferences": owner });
    json!({ "metadata": metadata, "spec": spec }).to_string()
}
