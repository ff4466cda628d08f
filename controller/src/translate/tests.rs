use std::sync::Arc;

use culvert_k8s_api::labels;
use culvert_k8s_api::manifest::{Manifest, parse_file};
use culvert_k8s_api::status::{Phase, PodStatus, Redirection, RedirectionStatus, ServiceStatus};
use proptest::prelude::*;
use serde_json::{Map, Value};

use super::*;

/// A world from manifests; statuses are added to it.
fn world(text: &str) -> World {
    let parsed = parse_file("world.yaml", text);
    assert_eq!(parsed.errors, [], "the test's own manifests");
    World { objects: crate::index::by_key(parsed.objects), ..World::default() }
}

impl World {
    fn running(mut self, namespace: &str, name: &str, node: &str, ips: &[&str]) -> Self {
        let status = PodStatus {
            uid: format!("uid-{name}"),
            namespace: namespace.into(),
            name: name.into(),
            node_name: node.into(),
            pod_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            phase: Phase::Running,
            ready: true,
            netns: None,
            deleted: false,
        };
        self.pods.insert((namespace.into(), name.into()), status);
        self
    }

    fn pod(mut self, namespace: &str, name: &str, change: impl FnOnce(&mut PodStatus)) -> Self {
        change(self.pods.get_mut(&(namespace.into(), name.into())).unwrap());
        self
    }

    fn enrolled(mut self, node: &str, name: &str, redirection: Redirection) -> Self {
        let status = RedirectionStatus { redirection, error: None };
        self.redirection.insert((node.into(), format!("uid-{name}")), status);
        self
    }

    fn service(mut self, namespace: &str, name: &str, ips: &[&str]) -> Self {
        let cluster_ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        self.services.insert((namespace.into(), name.into()), ServiceStatus { cluster_ips });
        self
    }
}

fn run(world: &World) -> Translation {
    translate(world, &BTreeMap::new(), &MeshSettings::default())
}

/// All that is sent and said, as a person reads it.
fn shown(translation: &Translation) -> String {
    let addresses: Map<String, Value> =
        translation.addresses.iter().map(|(name, it)| (name.clone(), render::address(it))).collect();
    // The one policy that is always there is shown once, in the table of modes.
    let policies: Map<String, Value> = translation
        .policies
        .iter()
        .filter(|(name, _)| !name.ends_with("/istio_converted_static_strict"))
        .map(|(name, it)| (name.clone(), render::policy(it)))
        .collect();
    let page = serde_json::json!({
        "addresses": addresses,
        "policies": policies,
        "status": translation.policy_status,
        "notes": translation.notes,
    });
    serde_json::to_string_pretty(&page).unwrap()
}

fn workload<'a>(translation: &'a Translation, uid: &str) -> &'a culvert_proto::workload::Workload {
    match &translation.addresses[uid].r#type {
        Some(address::Type::Workload(workload)) => workload,
        other => panic!("{uid} is {other:?}"),
    }
}

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Node
metadata:
  name: node-a
  labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-1, topology.istio.io/subzone: r7}
---
apiVersion: v1
kind: Pod
metadata: {name: web-v1, namespace: shop, labels: {app: web, version: v1}}
spec:
  serviceAccountName: web
  containers:
  - name: c
    ports: [{name: http-web, containerPort: 8080}, {name: http-web, containerPort: 9, protocol: UDP}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-v2, namespace: shop, labels: {app: web, app.kubernetes.io/name: frontend, service.istio.io/canonical-revision: r2}}
spec:
  containers: [{name: c, ports: [{name: http-web, containerPort: 9090}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: web-v3, namespace: shop, labels: {app: web}}
spec: {containers: [{name: no-such-port}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: shop, labels: {app: web}}
spec: {hostNetwork: true, containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: native, namespace: shop, labels: {networking.istio.io/tunnel: http}}
spec: {containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http-web}
  - {name: metrics, port: 9100}
  - {name: dns, port: 53, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: web-headless, namespace: shop}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 7070, targetPort: 7071, appProtocol: kubernetes.io/h2c}], publishNotReadyAddresses: true}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: other}
spec: {selector: {app: web}, clusterIP: 198.18.128.9, ports: [{port: 80}]}
"#;

fn pods() -> World {
    world(PODS)
        .running("shop", "web-v1", "node-a", &["100.64.1.2", "fd00:64:1::2"])
        .running("shop", "web-v2", "node-b", &["100.64.2.2"])
        .running("shop", "web-v3", "node-b", &["100.64.2.3"])
        .running("shop", "agent", "node-a", &["198.18.0.11"])
        .running("shop", "native", "node-a", &["100.64.1.3"])
        .enrolled("node-a", "web-v1", Redirection::Enabled)
        .enrolled("node-b", "web-v2", Redirection::Pending)
        // Of another node: a status that a node wrote about a pod it does not have.
        .enrolled("node-a", "web-v3", Redirection::Enabled)
        .enrolled("node-a", "agent", Redirection::Enabled)
        .service("shop", "web", &["198.18.128.5", "fd00:18:80::5"])
}

/// D01, D08, D19, D21, D22, D23, D25, D28.
#[test]
fn pods_and_services() {
    insta::assert_snapshot!(shown(&run(&pods())));
}

/// C10, D17, D18, D19: and which of them speak HBONE.
#[test]
fn which_pods_are_sent_and_healthy() {
    let uid = "Kubernetes//Pod/shop/web-v1";
    let status = |change: fn(&mut PodStatus)| {
        let translation = run(&pods().pod("shop", "web-v1", change));
        translation.addresses.contains_key(uid).then(|| workload(&translation, uid).status().as_str_name())
    };
    assert_eq!(status(|_| {}), Some("HEALTHY"));
    assert_eq!(status(|pod| pod.ready = false), Some("UNHEALTHY"));
    assert_eq!(status(|pod| pod.deleted = true), Some("UNHEALTHY"));
    assert_eq!(status(|pod| pod.phase = Phase::Pending), Some("UNHEALTHY"));
    assert_eq!(status(|pod| pod.phase = Phase::Succeeded), None);
    assert_eq!(status(|pod| pod.phase = Phase::Failed), None);
    assert_eq!(status(|pod| pod.pod_ips.clear()), None);
    // Another incarnation: what was true of the old one's redirection is not of this one (trap 5).
    let translation = run(&pods().pod("shop", "web-v1", |pod| pod.uid = "new".into()));
    assert_eq!(workload(&translation, uid).tunnel_protocol().as_str_name(), "NONE");
}

/// D24, D25.
#[test]
fn load_balancing() {
    let service = |spec: &str, annotation: &str, namespace: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: n, annotations: {{{namespace}}}}}\n---\napiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: n, annotations: {{{annotation}}}}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}], {spec}}}\n"
        );
        let translation = run(&world(&text));
        let page = render::address(&translation.addresses["n/s.n.svc.cluster.local"]);
        let balancing = &page["service"]["loadBalancing"];
        if balancing.is_null() { String::new() } else { balancing.to_string() }
    };
    let only = |mode: &str, scopes: &str| {
        let scopes = if scopes.is_empty() { String::new() } else { format!(r#","scopes":[{scopes}]"#) };
        format!(r#"{{"health":"ONLY_HEALTHY","mode":"{mode}"{scopes}}}"#)
    };
    let zone = only("FAILOVER", r#""NETWORK","REGION","ZONE""#);
    let node = only("FAILOVER", r#""NETWORK","REGION","ZONE","SUBZONE","NODE""#);
    let key = labels::TRAFFIC_DISTRIBUTION;
    assert_eq!(service("", "", ""), "");
    assert_eq!(service("internalTrafficPolicy: Local", "", ""), only("STRICT", r#""NODE""#));
    assert_eq!(service("internalTrafficPolicy: Cluster", "", ""), "");
    for near in ["PreferClose", "PreferSameZone"] {
        assert_eq!(service(&format!("trafficDistribution: {near}"), "", ""), zone);
        assert_eq!(service("", &format!("{key}: {near}"), ""), zone);
        assert_eq!(service("", "", &format!("{key}: {near}")), zone);
    }
    assert_eq!(service("trafficDistribution: PreferSameNode", &format!("{key}: PreferClose"), ""), node);
    assert_eq!(service("", &format!("{key}: Any"), &format!("{key}: PreferClose")), "");
    assert_eq!(
        service("publishNotReadyAddresses: true", "", ""),
        r#"{"health":"ALLOW_ALL","mode":"UNSPECIFIED_MODE"}"#
    );
}

/// `sessionAffinity: ClientIP` reaches the proxies as an extension that they understand; others pass over it.
#[test]
fn session_affinity() {
    use culvert_model::service::Affinity;
    let kept = |spec: &str| {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: n}}\nspec: {{clusterIP: 10.0.0.1, ports: [{{port: 80}}], {spec}}}\n"
        );
        let message = run(&world(&text)).addresses["n/s.n.svc.cluster.local"].clone();
        let bytes = prost::Message::encode_to_vec(&message);
        match culvert_model::wire::address("n/s.n.svc.cluster.local", &bytes).unwrap() {
            culvert_model::wire::AddressResource::Service(service) => service.load_balancing.affinity,
            other => panic!("{other:?}"),
        }
    };
    let timeout = "sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}";
    assert_eq!(kept("sessionAffinity: ClientIP"), Affinity::ClientAddress);
    assert_eq!(kept(&format!("sessionAffinity: ClientIP, {timeout}")), Affinity::ClientAddress);
    assert_eq!(kept("sessionAffinity: None"), Affinity::None);
    assert_eq!(kept(""), Affinity::None);
}

/// R26: an entry of a network that the mesh does not know is sent as what it is, and nothing else is in its way.
#[test]
fn an_entry_of_a_foreign_network() {
    let text = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: vm, namespace: n}\nspec: {address: 192.0.2.7, network: moon, labels: {app: web}}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: n}\nspec: {clusterIP: 10.0.0.1, selector: {app: web}, ports: [{port: 80}]}\n";
    let translation = run(&world(text));
    let vm = workload(&translation, "Kubernetes/networking.istio.io/WorkloadEntry/n/vm");
    assert_eq!((vm.network.as_str(), &vm.network_gateway, vm.services.len()), ("moon", &None, 1));
    assert_eq!(translation.notes, [""; 0]);
}

/// TRAP17, R11.
#[test]
fn one_services_health_policy_is_not_anothers() {
    let one = "apiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: n}\nspec: {clusterIP: 10.0.0.1, trafficDistribution: PreferClose, publishNotReadyAddresses: true, ports: [{port: 80}]}\n";
    let other = one
        .replace("name: a", "name: b")
        .replace("publishNotReadyAddresses: true, ", "")
        .replace("0.1", "0.2");
    let page = shown(&run(&world(&format!("{one}---\n{other}"))));
    assert_eq!((page.matches("ALLOW_ALL").count(), page.matches("ONLY_HEALTHY").count()), (1, 1), "{page}");
}

/// D23, D01, D08, D20, D26, D27, D29.
#[test]
fn entries() {
    let text = include_str!("testdata/entries.yaml");
    let world = world(text).running("shop", "db-0", "node-a", &["100.64.1.9"]);
    insta::assert_snapshot!(shown(&run(&world)));
}

/// D20, D22, D23.
#[test]
fn slices() {
    let text = include_str!("testdata/slices.yaml");
    let world = world(text)
        .running("data", "db-0", "node-a", &["100.64.1.9", "fd00:64:1::9"])
        .running("system", "server", "node-a", &["198.18.0.11"])
        .enrolled("node-a", "db-0", Redirection::Enabled);
    insta::assert_snapshot!(shown(&run(&world)));
}

/// D31-D37. R14. Z66.
#[test]
fn policies() {
    let text = include_str!("testdata/policies.yaml");
    let world = world(text)
        .running("shop", "web", "node-a", &["100.64.1.2"])
        .running("shop", "db", "node-a", &["100.64.1.3"])
        .running("istio-system", "gate", "node-a", &["100.64.1.4"]);
    insta::assert_snapshot!(shown(&run(&world)));
}

#[test]
fn waypoints_that_labels_ask_for_are_named_even_if_they_do_not_exist() {
    let text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: n, labels: {istio.io/use-waypoint: wp}}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: a, namespace: n}\nspec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: b, namespace: n, labels: {istio.io/use-waypoint: none}}\nspec: {clusterIP: 10.0.0.2, ports: [{port: 80}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: c, namespace: n, labels: {istio.io/use-waypoint: x, istio.io/use-waypoint-namespace: m}}\nspec: {clusterIP: 10.0.0.3, ports: [{port: 80}]}\n---\napiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n}\nspec: {containers: [{name: c}]}\n";
    let translation = run(&world(text).running("n", "p", "node-a", &["100.64.1.2"]));
    let bound = |name: &str| {
        let page = render::address(&translation.addresses[name]);
        let of = page.get("service").or(page.get("workload")).unwrap();
        of["waypoint"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(bound("n/a.n.svc.cluster.local"), "n/no-gateway.wp.n.svc.cluster.local:15008");
    assert_eq!(bound("n/b.n.svc.cluster.local"), "");
    assert_eq!(bound("n/c.n.svc.cluster.local"), "m/no-gateway.x.m.svc.cluster.local:15008");
    assert_eq!(bound("Kubernetes//Pod/n/p"), "");
}

fn peer(namespace: &str, name: &str, selector: bool, mode: Option<&str>, ports: &[(u16, &str)]) -> String {
    let mut text = format!(
        "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n"
    );
    if selector {
        text += "  selector: {matchLabels: {app: web}}\n";
    }
    if let Some(mode) = mode {
        text += &format!("  mtls: {{mode: {mode}}}\n");
    }
    if !ports.is_empty() {
        text += "  portLevelMtls:\n";
        for (port, mode) in ports {
            text += &format!("    {port}: {{mode: {mode}}}\n");
        }
    }
    if text.ends_with("spec:\n") { text.replace("spec:\n", "spec: {}\n") } else { text }
}

/// D39-D43. TRAP10. The effective mode for each combination of levels, as the policies that enforce it (D39 to D42).
#[test]
fn modes_by_level() {
    const STATIC: &str = "istio-system/istio_converted_static_strict";
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n, labels: {app: web}}\nspec: {containers: [{name: c}]}\n";
    let enforced = |parts: &[String]| {
        let text = format!("{pod}{}", parts.concat());
        let translation = run(&world(&text).running("n", "p", "node-a", &["100.64.1.2"]));
        let names = &workload(&translation, "Kubernetes//Pod/n/p").authorization_policies;
        let groups: Vec<String> = names
            .iter()
            .map(|name| {
                let policy = &translation.policies[name];
                assert_eq!(
                    (policy.action().as_str_name(), policy.scope().as_str_name()),
                    ("DENY", "WORKLOAD_SELECTOR")
                );
                render::policy(policy)["groups"].to_string()
            })
            .collect();
        (names.join(" "), groups.join(" "))
    };
    let nobody = r#"[{"notPrincipals":["*"]}]"#;
    let strict = (STATIC.to_owned(), format!("[[{nobody}]]"));
    let open = (String::new(), String::new());
    let converted = |groups: &str| ("n/converted_peer_authentication_w".to_owned(), groups.to_owned());

    let mesh = |mode| peer("istio-system", "m", false, mode, &[]);
    let namespace = |mode| peer("n", "ns", false, mode, &[]);
    let own = |mode, ports: &[(u16, &str)]| peer("n", "w", true, mode, ports);

    let table = [
        (vec![], open.clone()),
        (vec![mesh(Some("STRICT"))], strict.clone()),
        (vec![mesh(Some("DISABLE"))], open.clone()),
        (vec![mesh(Some("STRICT")), namespace(Some("PERMISSIVE"))], open.clone()),
        (vec![mesh(Some("STRICT")), namespace(Some("DISABLE"))], open.clone()),
        (vec![mesh(Some("STRICT")), namespace(None)], strict.clone()),
        (vec![mesh(Some("STRICT")), namespace(Some("UNSET"))], strict.clone()),
        (vec![mesh(Some("PERMISSIVE")), namespace(Some("STRICT"))], strict.clone()),
        (vec![namespace(Some("STRICT")), own(Some("PERMISSIVE"), &[])], open.clone()),
        (vec![namespace(Some("STRICT")), own(None, &[])], strict.clone()),
        (vec![own(Some("STRICT"), &[])], strict.clone()),
        // Ports under a strict workload: one group that exempts them all.
        (
            vec![own(
                Some("STRICT"),
                &[(9090, "PERMISSIVE"), (8080, "DISABLE"), (7070, "STRICT"), (1, "UNSET")],
            )],
            converted(&format!(
                r#"[[{nobody},[{{"notDestinationPorts":[8080]}}],[{{"notDestinationPorts":[9090]}}]]]"#
            )),
        ),
        // Ports under a permissive one: a group for each.
        (
            vec![own(Some("PERMISSIVE"), &[(9090, "STRICT"), (8080, "STRICT"), (1, "PERMISSIVE")])],
            converted(&format!(
                r#"[[{nobody},[{{"destinationPorts":[8080]}}]],[{nobody},[{{"destinationPorts":[9090]}}]]]"#
            )),
        ),
        // The base comes from above: also when the namespace's policy says nothing (D43 gets this wrong).
        (
            vec![mesh(Some("STRICT")), namespace(None), own(None, &[(80, "PERMISSIVE")])],
            converted(&format!(r#"[[{nobody},[{{"notDestinationPorts":[80]}}]]]"#)),
        ),
        (vec![own(None, &[(80, "PERMISSIVE")])], open.clone()),
        // In the root namespace a selector means nothing.
        (vec![peer("istio-system", "r", true, Some("STRICT"), &[])], open.clone()),
        // Another namespace's policy is another namespace's.
        (vec![peer("other", "o", false, Some("STRICT"), &[])], open),
    ];
    for (parts, expected) in table {
        assert_eq!(enforced(&parts), expected, "{}", parts.concat());
    }
}

/// D42.
#[test]
fn of_several_at_one_level_the_oldest_wins() {
    let peer = |name: &str, created: &str, mode: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}, namespace: n, creationTimestamp: {created}}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    let pod =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p, namespace: n}\nspec: {containers: [{name: c}]}\n";
    let young = peer("a", "\"2026-02-01T00:00:00Z\"", "PERMISSIVE");
    let old = peer("z", "\"2025-02-01T00:00:00Z\"", "STRICT");
    let undated = peer("b", "null", "PERMISSIVE");
    let translation =
        run(&world(&format!("{pod}{young}{old}{undated}")).running("n", "p", "node-a", &["100.64.1.2"]));
    assert_eq!(
        workload(&translation, "Kubernetes//Pod/n/p").authorization_policies,
        ["istio-system/istio_converted_static_strict"]
    );
    let said: Vec<(&str, &str)> =
        translation.policy_status.iter().map(|it| (it.name.as_str(), it.reason)).collect();
    assert_eq!(said, [("a", "Shadowed"), ("b", "Shadowed"), ("z", "Accepted")]);
}

/// D35.
#[test]
fn a_value_that_no_loader_checked_denies_rather_than_being_skipped() {
    let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: n}\nspec: {rules: [{when: [{key: source.ip, values: [10.0.0.0/8]}]}]}\n";
    let mut world = world(text);
    let mut manifest = Manifest::clone(world.objects.values().next().unwrap());
    let culvert_k8s_api::Object::AuthorizationPolicy(policy) = &mut manifest.object else { panic!() };
    policy.spec.rules[0].when[0].values[0] = "10.0.0.0/99".into();
    world.objects = crate::index::by_key([Arc::new(manifest)]);
    let translation = run(&world);
    let page = render::policy(&translation.policies["n/p"]);
    assert_eq!((page["action"].as_str(), page["groups"].to_string().as_str()), (Some("DENY"), "[[[]]]"));
    assert_eq!(translation.policy_status[0].reason, "Invalid");
}

proptest! {
    /// The order in which files are read is no part of the result, and the result is one that a proxy can read.
    #[test]
    fn any_order_gives_the_same(seed in any::<u64>()) {
        let mut shuffled = pods();
        let entries = world(include_str!("testdata/entries.yaml"));
        shuffled.objects.extend(entries.objects);
        shuffled.objects.extend(world(include_str!("testdata/policies.yaml")).objects);
        shuffled.objects.extend(world(include_str!("testdata/slices.yaml")).objects);
        let straight = run(&shuffled);
        let mut state = seed;
        let mut objects: Vec<_> = shuffled.objects.values().cloned().collect();
        for index in (1..objects.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            objects.swap(index, usize::try_from(state >> 33).unwrap() % (index + 1));
        }
        shuffled.objects = crate::index::by_key(objects);
        let again = run(&shuffled);
        prop_assert_eq!(&straight, &again);
        for (name, message) in &straight.addresses {
            let bytes = prost::Message::encode_to_vec(message);
            let read = culvert_model::wire::address(name, &bytes);
            prop_assert!(read.is_ok(), "{name}: {read:?}");
        }
    }
}

/// Z28 differs: a connection may stay on a node only where no NetworkPolicy selects either pod, and only we say so.
#[test]
fn whom_network_policies_select() {
    const PODS: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}}\nspec: {containers: [{name: c}]}\n---\n\
        apiVersion: v1\nkind: Pod\nmetadata: {name: db, namespace: shop, labels: {app: db}}\nspec: {containers: [{name: c}]}\n---\n\
        apiVersion: v1\nkind: Pod\nmetadata: {name: node, namespace: shop}\nspec: {hostNetwork: true, containers: [{name: c}]}\n";
    let policy = |namespace: &str, selector: &str| {
        format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: {namespace}}}\nspec: {{podSelector: {selector}}}\n"
        )
    };
    let other =
        "---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p, namespace: bank}\n";
    let run = |more: &str, settings: &MeshSettings| {
        let world = world(&format!("{PODS}{more}"))
            .running("shop", "web", "a", &["100.64.1.2"])
            .running("shop", "db", "a", &["100.64.1.3"])
            .running("shop", "node", "a", &["198.18.0.11"]);
        let translation = translate(&world, &BTreeMap::new(), settings);
        assert!(workload(&translation, "Kubernetes//Pod/shop/node").extensions.is_empty());
        let said = ["web", "db"].map(|name| {
            let shown = render::address(&translation.addresses[&format!("Kubernetes//Pod/shop/{name}")]);
            let text = shown["workload"]["extensions"][0].as_str().unwrap().to_owned();
            let start = format!("culvert.dev/pod: uid uid-{name}, network policies ");
            text.strip_prefix(&start).unwrap_or_else(|| panic!("{text}")).to_owned()
        });
        (said, translation.notes)
    };
    let ours = MeshSettings::default();
    let blind = MeshSettings { network_policies: false, ..MeshSettings::default() };
    for (more, settings, web, db) in [
        (String::new(), &ours, "NONE", "NONE"),
        (policy("shop", "{matchLabels: {app: web}}"), &ours, "SELECTED", "NONE"),
        (policy("shop", "{}"), &ours, "SELECTED", "SELECTED"),
        (policy("bank", "{}"), &ours, "NONE", "NONE"),
        (String::new(), &blind, "UNKNOWN", "UNKNOWN"),
        (policy("shop", "{matchLabels: {app: web}}"), &blind, "SELECTED", "UNKNOWN"),
        (other.to_owned(), &ours, "UNKNOWN", "UNKNOWN"),
        (format!("{}{other}", policy("shop", "{matchLabels: {app: db}}")), &ours, "UNKNOWN", "SELECTED"),
    ] {
        let (said, notes) = run(&more, settings);
        assert_eq!(said, [web, db], "{more}");
        let told = notes.iter().any(|note| note.contains("CiliumNetworkPolicy"));
        assert_eq!(told, more.contains("Cilium"), "{notes:?}");
    }
}

mod modes;
mod routes;
mod waypoints;
