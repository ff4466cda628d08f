//! The chart's templates against what the agent does: each call to the API server has a right, each right a call, and what the agent needs of
//! its node is mounted.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::enrolment::Settings;
use culvert_k8s_api::labels;
use culvert_runtime::tasks::Tasks;
use serde_json::{Value, json};

use super::annotate::Annotations;
use super::fake_api::{Asked, FakeApi, list, refusal};
use super::presence::{self, Presence};
use super::source::Cluster;
use super::{KubernetesConfig, events};

const AGENT: &str = include_str!("../../../helm/culvert/templates/agent.yaml");
const PROXY: &str = include_str!("../../../helm/culvert/templates/ztunnel.yaml");
const CONTROLLER: &str = include_str!("../../../helm/culvert/templates/controller.yaml");

/// A template's objects, with `x` for everything that helm puts in.
fn objects(template: &str) -> Vec<Value> {
    let filled = |line: &str| {
        let mut rest = line;
        let mut text = String::new();
        while let Some((before, after)) = rest.split_once("{{") {
            text += before;
            text += "x";
            rest = after.split_once("}}").unwrap().1;
        }
        text + rest
    };
    let kept = template.lines().filter(|line| !line.trim_start().starts_with("{{"));
    let text: String = kept.map(|line| filled(line) + "\n").collect();
    text.split("---\n").map(|it| serde_saphyr::from_str(it).unwrap()).collect()
}

fn object(template: &str, kind: &str) -> Value {
    objects(template).into_iter().find(|it| it["kind"] == kind).unwrap()
}

fn container(daemonset: &Value) -> &Value {
    &daemonset["spec"]["template"]["spec"]["containers"][0]
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().map(|it| it.as_str().unwrap().to_owned()).collect()
}

/// `verb group/resource name`; the name only where a right is for one.
type Rights = BTreeSet<String>;

fn granted(role: &Value) -> Rights {
    let mut rights = Rights::new();
    for rule in role["rules"].as_array().unwrap() {
        let names = match texts(&rule["resourceNames"]) {
            names if names.is_empty() => vec![String::new()],
            names => names,
        };
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                for verb in texts(&rule["verbs"]) {
                    rights.extend(names.iter().map(|name| format!("{verb} {group}/{resource} {name}")));
                }
            }
        }
    }
    rights
}

/// What the API server asks for before it answers; the name only of a DaemonSet.
fn needed(asked: &Asked) -> String {
    let parts: Vec<&str> = asked.path.trim_start_matches('/').split('/').collect();
    let (group, rest) = match parts.as_slice() {
        ["api", _, rest @ ..] => ("", rest),
        ["apis", group, _, rest @ ..] => (*group, rest),
        _ => panic!("{asked:?}"),
    };
    let (resource, name) = match rest {
        ["namespaces", _, resource, name, sub] => (format!("{resource}/{sub}"), Some(*name)),
        ["namespaces", _, resource, name] => ((*resource).to_owned(), Some(*name)),
        ["namespaces", _, resource] => ((*resource).to_owned(), None),
        [resource, name] => ((*resource).to_owned(), Some(*name)),
        [resource] => ((*resource).to_owned(), None),
        _ => panic!("{asked:?}"),
    };
    let verb = match (asked.method.as_str(), name) {
        ("GET", _) if asked.is_watch() => "watch",
        ("GET", Some(_)) => "get",
        ("GET", None) => "list",
        ("PATCH", _) => "patch",
        ("POST", _) => "create",
        _ => panic!("{asked:?}"),
    };
    let selected = asked.query.split('&').find_map(|it| it.strip_prefix("fieldSelector=metadata.name%3D"));
    let name = name.or(selected).filter(|_| resource == "daemonsets").unwrap_or_default();
    format!("{verb} {group}/{resource} {name}")
}

fn pod() -> Value {
    json!({"metadata": {"name": "a", "namespace": "shop", "uid": "u"}, "spec": {"containers": []}})
}

fn answer(asked: &Asked) -> (u16, Value) {
    match (asked.method.as_str(), asked.path.as_str()) {
        ("GET", "/api/v1/pods") => list(&[pod()]),
        ("GET", path) if path.ends_with("/namespaces") || path.ends_with("/daemonsets") => list(&[]),
        ("GET", path) if path.ends_with("/daemonsets/culvert-agent") => {
            (200, json!({"metadata": {}, "spec": {"selector": {}, "template": {}}}))
        }
        ("GET", path) if path.ends_with("/pods/a") => (200, pod()),
        ("GET", path) if path.contains("/nodes/") || path.contains("/namespaces/") => {
            (200, json!({"metadata": {"name": "x"}}))
        }
        ("POST" | "PATCH", path) if path.contains("/events") => (
            200,
            json!({"metadata": {"name": "e"}, "eventTime": "2026-01-01T00:00:00.000000Z", "reason": "x", "action": "x",
                "regarding": {}, "reportingController": "x", "reportingInstance": "x", "type": "Warning"}),
        ),
        ("PATCH", path) if path.ends_with("/pods/a/status") => (200, pod()),
        _ => refusal(404),
    }
}

/// C78: whatever agent and plugin ask the API server for, the chart lets them, and nothing else.
#[tokio::test]
async fn the_chart_grants_what_the_agent_asks_for_and_no_more() {
    let api = FakeApi::start(answer).await;
    let dir = tempfile::tempdir().unwrap();
    let config = KubernetesConfig { account_dir: dir.path().to_owned(), ..KubernetesConfig::default() };
    let tasks = Tasks::new("test");
    let cluster = Cluster::watch(&api.client, "n", &tasks);
    let _presence = Presence::watch(&api.client, &config, &tasks);
    presence::ask(&api.client, &config, "n").await;
    let known = async {
        while cluster.snapshot().is_none() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        for watched in ["/pods", "/namespaces", "/daemonsets"] {
            api.until(|it| it.is_watch() && it.path.ends_with(watched)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), known).await.unwrap();

    let annotations = Annotations::new(Arc::clone(&cluster));
    annotations.set("u", Some(culvert_k8s_api::status::Redirection::Enabled));
    tasks.spawn("annotate", annotations.run(api.client.clone()));
    let recorder = events::recorder(api.client.clone(), "n".to_owned());
    // The second becomes a series of the first.
    for _ in 0..2 {
        events::publish(&recorder, "u", &("shop".to_owned(), "a".to_owned()), "no proxy").await;
    }
    tokio::time::timeout(Duration::from_secs(10), api.until(|it| it.path.ends_with("/pods/a/status")))
        .await
        .unwrap();

    let kubeconfig = dir.path().join("kubeconfig");
    let cluster = json!({"name": "c", "cluster": {"server": api.url}});
    let file = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c", "clusters": [cluster],
        "users": [{"name": "u", "user": {"token": "t"}}], "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}]});
    fs::write(&kubeconfig, file.to_string()).unwrap();
    let lookup = move || crate::cni::joins(&kubeconfig, &Settings::default(), "shop", "a");
    assert!(!tokio::task::spawn_blocking(lookup).await.unwrap().unwrap());
    tasks.abort_all();

    let asked: Rights = api.asked().iter().map(needed).collect();
    let rights: Rights =
        ["ClusterRole", "Role"].into_iter().flat_map(|kind| granted(&object(AGENT, kind))).collect();
    assert_eq!(asked, rights);
}

/// C56, C78: in a network of its own, with five capabilities and nothing to write to but what it has to.
#[test]
fn the_agents_pod_has_no_more_than_it_needs() {
    let set = object(AGENT, "DaemonSet");
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(set["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"], 1);
    assert_eq!(pod["priorityClassName"], "system-node-critical");
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod.get(shared).is_none(), "{shared}");
    }
    let security = &container(&set)["securityContext"];
    assert_eq!(texts(&security["capabilities"]["drop"]), ["ALL"]);
    let mut added = texts(&security["capabilities"]["add"]);
    added.sort();
    assert_eq!(added, ["DAC_OVERRIDE", "NET_ADMIN", "NET_RAW", "SYS_ADMIN", "SYS_PTRACE"]);
    assert_eq!((&security["privileged"], &security["readOnlyRootFilesystem"]), (&json!(false), &json!(true)));
}

/// C19, C60, C72: agent, plugin and proxy meet at the same paths of the node, and what the agent reads of the node is there.
#[test]
fn what_the_agent_needs_of_its_node_is_mounted() {
    let set = object(AGENT, "DaemonSet");
    let volumes = set["spec"]["template"]["spec"]["volumes"].as_array().unwrap().clone();
    let host_path = |name: &Value| {
        let volume = volumes.iter().find(|it| it["name"] == *name).unwrap();
        volume["hostPath"]["path"].as_str().map(str::to_owned)
    };
    let mounts = container(&set)["volumeMounts"].as_array().unwrap();
    let mounted = |at: &std::path::Path| {
        let mount = mounts.iter().find(|it| it["mountPath"] == at.to_str().unwrap()).unwrap();
        (host_path(&mount["name"]).unwrap(), mount["readOnly"] == true)
    };
    let config = KubernetesConfig::default();
    assert_eq!(mounted(&config.run_dir), ("/var/run/culvert".to_owned(), false));
    assert_eq!(mounted(&config.host_proc), ("/proc".to_owned(), true));
    assert_eq!(mounted(&config.sysctl_dir), ("/proc/sys/net".to_owned(), false));
    assert!(!mounted(&config.cni_bin_dir).1 && !mounted(&config.cni_conf_dir).1);
    // Where the runtime has mounted namespaces since, they appear.
    let netns = mounts.iter().find(|it| it["name"] == "netns").unwrap();
    assert_eq!(netns["mountPropagation"], "HostToContainer");

    let proxy = object(PROXY, "DaemonSet");
    let socket = |set: &Value| {
        let env = container(set)["env"].as_array().unwrap();
        env.iter().find(|it| it["name"] == "ZDS_SOCKET").map(|it| it["value"].clone())
    };
    assert_eq!(socket(&set), Some(json!("/var/run/ztunnel/ztunnel.sock")));
    let shares = |set: &Value| {
        let mounts = container(set)["volumeMounts"].as_array().unwrap().clone();
        mounts.iter().any(|it| it["mountPath"] == "/var/run/ztunnel")
    };
    assert!(shares(&set) && shares(&proxy));
    // It asks for the plugin's and the proxy's pods by these names, and for its own DaemonSet.
    assert_eq!(set["metadata"]["name"], json!(config.daemonset));
    for set in [&set, &proxy] {
        let name = format!("{}-", set["metadata"]["name"].as_str().unwrap());
        assert!(super::OWN_PODS.contains(&name.as_str()), "{name}");
    }
    let controller = object(CONTROLLER, "Deployment");
    let name = format!("{}-", controller["metadata"]["name"].as_str().unwrap());
    assert!(super::OWN_PODS.contains(&name.as_str()), "{name}");
}

/// C19, C76: the mesh's own pods stay outside, become ready when they are, and run on every Linux node.
#[test]
fn the_nodes_own_pods_stay_outside_and_run_everywhere() {
    for (template, port, path) in [(AGENT, 8000, "/readyz"), (PROXY, 15021, "/healthz/ready")] {
        let set = object(template, "DaemonSet");
        let pod = &set["spec"]["template"]["spec"];
        let probe = &container(&set)["readinessProbe"]["httpGet"];
        assert_eq!((&probe["port"], &probe["path"]), (&json!(port), &json!(path)));
        let tolerated: Vec<(Value, Value)> = pod["tolerations"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|it| it["operator"] == "Exists" && it.get("key").is_none())
            .map(|it| (it["effect"].clone(), Value::Null))
            .collect();
        for effect in ["NoSchedule", "NoExecute"] {
            assert!(tolerated.contains(&(json!(effect), Value::Null)), "{effect}");
        }
    }
    let helpers = include_str!("../../../helm/culvert/templates/_helpers.tpl");
    assert!(helpers.contains(&format!("{}: {}", labels::DATAPLANE_MODE, labels::MODE_NONE)));
    assert!(AGENT.contains("append .Values.agent.excludeNamespaces .Release.Namespace"));
}

/// Z13, Z14: it enters pods' namespaces and opens sockets there, and may ask the Kubernetes API for nothing.
#[test]
fn the_proxys_pod_has_no_more_than_it_needs() {
    let set = object(PROXY, "DaemonSet");
    let pod = &set["spec"]["template"]["spec"];
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        assert!(pod.get(shared).is_none(), "{shared}");
    }
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    let security = &container(&set)["securityContext"];
    assert_eq!(texts(&security["capabilities"]["drop"]), ["ALL"]);
    let mut added = texts(&security["capabilities"]["add"]);
    added.sort();
    assert_eq!(added, ["NET_ADMIN", "NET_RAW", "SYS_ADMIN"]);
    assert_eq!((&security["privileged"], &security["readOnlyRootFilesystem"]), (&json!(false), &json!(true)));
    // No token for the API server, and no role that names its account.
    assert_eq!(pod["automountServiceAccountToken"], false);
    let account = object(PROXY, "ServiceAccount")["metadata"]["name"].as_str().unwrap().to_owned();
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert/templates");
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let text = fs::read_to_string(entry.path()).unwrap();
        let bindings = text
            .split("\n---")
            .filter(|it| it.contains("kind: RoleBinding") || it.contains("kind: ClusterRoleBinding"));
        for binding in bindings {
            let subjects = binding.split("subjects:").nth(1).unwrap();
            assert!(!subjects.contains(&format!("name: {account}")), "{}: {binding}", entry.path().display());
        }
    }
}

/// H08, H09, H14: the proxy's rollout, its grace, and the account that the controller trusts.
#[test]
fn the_proxys_rollout_drops_nothing_and_its_account_is_the_trusted_one() {
    let set = object(PROXY, "DaemonSet");
    let rolling = &set["spec"]["updateStrategy"]["rollingUpdate"];
    assert_eq!((&rolling["maxSurge"], &rolling["maxUnavailable"]), (&json!(1), &json!(0)));
    let env = container(&set)["env"].as_array().unwrap();
    assert!(env.iter().any(|it| it["name"] == "TERMINATION_GRACE_PERIOD_SECONDS"));
    // What it drains in comes after what it waits before it is told.
    assert!(PROXY.contains(
        "terminationGracePeriodSeconds: {{ add .Values.ztunnel.terminationGracePeriodSeconds 3 }}"
    ));
    assert_eq!(container(&set)["lifecycle"]["preStop"]["sleep"]["seconds"], 3);
    let account = object(PROXY, "ServiceAccount");
    let trusted = CONTROLLER.lines().skip_while(|it| !it.contains("TRUSTED_PROXIES")).nth(1).unwrap();
    assert!(trusted.ends_with(&format!("/{}", account["metadata"]["name"].as_str().unwrap())), "{trusted}");
    assert_eq!(account["automountServiceAccountToken"], false);
}

/// Keys of the second level, with their defaults.
fn values() -> Vec<(String, Value)> {
    let values: Value = serde_saphyr::from_str(include_str!("../../../helm/culvert/values.yaml")).unwrap();
    let groups = values.as_object().unwrap().clone();
    let keys = |(group, of): (String, Value)| {
        of.as_object().unwrap().clone().into_iter().map(move |(key, value)| (format!("{group}.{key}"), value))
    };
    groups.into_iter().flat_map(keys).collect()
}

/// H08, H10, H11: no value that somebody sets is without an effect.
#[test]
fn every_value_is_used_by_a_template() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert/templates");
    let read = |entry: fs::DirEntry| fs::read_to_string(entry.path()).unwrap();
    let templates: String = fs::read_dir(dir).unwrap().flatten().map(read).collect();
    let values = values();
    assert!(values.len() > 25, "{values:?}");
    for (key, _) in values {
        let (group, name) = key.split_once('.').unwrap();
        // By itself, picked out of its group, or as the key of a directory of the node.
        let picked = |line: &str| {
            line.contains(&format!("pick .Values.{group} ")) && line.contains(&format!("\"{name}\""))
        };
        let used = templates.contains(&format!(".Values.{key}"))
            || templates.lines().any(picked)
            || (group == "agent" && templates.contains(&format!("\"key\" \"{name}\"")));
        assert!(used, "{key}");
    }
}

/// H01, H02: what is installed without any value set is an ambient mesh, its kinds, and nothing of the Gateway API.
#[test]
fn without_any_value_the_chart_is_an_ambient_mesh() {
    let values = values();
    let value = |key: &str| &values.iter().find(|it| it.0 == key).unwrap().1;
    assert_eq!(value("agent.excludeNamespaces"), &json!(["kube-system"]));
    assert_eq!((value("agent.dnsCapture"), value("crds.install")), (&json!(true), &json!(true)));
    assert_eq!(value("agent.enablementSelectors"), &json!([]));
    assert_eq!(value("mesh.trustDomain"), "cluster.local");
    let kinds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert/files/crds");
    let groups: BTreeSet<String> = fs::read_dir(kinds)
        .unwrap()
        .flatten()
        .map(|it| serde_saphyr::from_str::<Value>(&fs::read_to_string(it.path()).unwrap()).unwrap())
        .map(|it| it["spec"]["group"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(groups, ["networking.istio.io", "security.istio.io"].map(str::to_owned).into());
}

/// C85, H03, H04, H10: each platform of the schema has directories, and without one they are those that the agent takes by itself.
#[test]
fn every_platform_has_directories() {
    let helpers = include_str!("../../../helm/culvert/templates/_helpers.tpl");
    let schema: Value =
        serde_json::from_str(include_str!("../../../helm/culvert/values.schema.json")).unwrap();
    let platforms = texts(&schema["properties"]["agent"]["properties"]["platform"]["enum"]);
    assert!(platforms.len() > 4 && platforms[0].is_empty());
    for platform in &platforms[1..] {
        assert!(helpers.contains(&format!("\"{platform}\" (dict \"cni")), "{platform}");
    }
    let config = KubernetesConfig::default();
    for (key, dir) in [
        ("cniBinDir", &config.cni_bin_dir),
        ("cniConfDir", &config.cni_conf_dir),
        ("cniNetnsDir", &config.netns_dir),
    ] {
        assert!(helpers.contains(&format!("\"{key}\" \"{}\"", dir.display())), "{key}");
    }
}

/// H06, H07.
#[test]
fn quota_and_network_policies_are_there_for_those_who_need_them() {
    let quota = include_str!("../../../helm/culvert/templates/quota.yaml");
    assert!(quota.starts_with("{{- if eq .Values.agent.platform \"gke\" }}"));
    let quota = object(quota, "ResourceQuota");
    let priorities = texts(&quota["spec"]["scopeSelector"]["matchExpressions"][0]["values"]);
    assert_eq!(priorities, ["system-node-critical", "system-cluster-critical"]);
    let policies = include_str!("../../../helm/culvert/templates/network-policy.yaml");
    for template in [AGENT, PROXY, CONTROLLER] {
        let workload = objects(template).into_iter().find(|it| it["spec"].get("template").is_some()).unwrap();
        let name = workload["metadata"]["name"].as_str().unwrap();
        let ports: Vec<u64> = container(&workload)["ports"]
            .as_array()
            .unwrap()
            .iter()
            .map(|it| it["containerPort"].as_u64().unwrap())
            .collect();
        let line = policies.lines().find(|it| it.contains("$ports :=")).unwrap();
        let open = line.split_once(&format!("\"{name}\" (list ")).unwrap().1.split_once(')').unwrap().0;
        let mut open: Vec<u64> = open.split(' ').map(|it| it.parse().unwrap()).collect();
        let mut ports = ports;
        open.sort_unstable();
        ports.sort_unstable();
        assert_eq!(open, ports, "{name}");
    }
}
