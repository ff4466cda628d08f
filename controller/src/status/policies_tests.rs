//! What is said of objects, from the JSON of an API server to conditions.

use culvert_k8s_api::Kind;
use kube::core::DynamicObject;
use serde_json::{Value, json};

use super::policies::desired;
use super::{Target, kinds};
use crate::index::{Index, Snapshot};
use crate::sources::kubernetes::convert::{convert, key_of};
use crate::sources::kubernetes::kinds::{Watched, builtin};
use crate::sources::kubernetes::store::{Said, Store};
use crate::translate::MeshSettings;

/// An API server's objects.
struct Cluster {
    store: Store,
    index: Index,
    mesh: Vec<Watched>,
}

impl Cluster {
    fn new() -> Self {
        let mesh = |group: &str, kind: &str, is| Watched {
            group: group.to_owned(),
            version: "v1".to_owned(),
            kind: kind.to_owned(),
            plural: kind.to_lowercase(),
            is,
            optional: false,
        };
        let mut all = builtin();
        all.extend([
            mesh("security.istio.io", "AuthorizationPolicy", Kind::AuthorizationPolicy),
            mesh("security.istio.io", "PeerAuthentication", Kind::PeerAuthentication),
            mesh("networking.istio.io", "ServiceEntry", Kind::ServiceEntry),
            mesh("networking.istio.io", "WorkloadEntry", Kind::WorkloadEntry),
            mesh("gateway.networking.k8s.io", "Gateway", Kind::Gateway),
            mesh("gateway.networking.k8s.io", "HTTPRoute", Kind::HTTPRoute),
        ]);
        let mut store = Store::default();
        for kind in &all {
            store.apply(kind, Said::Begun);
        }
        for kind in &all {
            store.apply(kind, Said::Init);
            store.apply(kind, Said::Done);
        }
        Self { store, index: Index::new(MeshSettings::default(), 1), mesh: all }
    }

    fn put(&mut self, kind: &str, mut object: Value) -> &mut Self {
        let kind = self.mesh.iter().find(|it| it.kind == kind).unwrap();
        let name = object["metadata"]["name"].as_str().unwrap().to_owned();
        object["metadata"]["uid"] = format!("uid-{name}").into();
        let object: DynamicObject = serde_json::from_value(object).unwrap();
        let key = key_of(kind, &object.metadata);
        self.store.apply(kind, Said::Applied(key, Box::new(convert(kind, object))));
        self
    }

    fn policy(&mut self, name: &str, generation: i64, spec: Value) -> &mut Self {
        let metadata = json!({ "name": name, "namespace": "shop", "generation": generation });
        self.put("AuthorizationPolicy", json!({ "metadata": metadata, "spec": spec }))
    }

    /// Of namespace shop, with the label app; enrolled or not.
    fn pod(&mut self, name: &str, redirection: &str) -> &mut Self {
        let annotations = json!({ "ambient.istio.io/redirection": redirection });
        let labels = json!({ "app": name });
        self.put("Pod", json!({
            "metadata": { "name": name, "namespace": "shop", "labels": labels, "annotations": annotations },
            "spec": { "nodeName": "node-a", "containers": [{ "name": "c" }] },
            "status": { "phase": "Running", "podIP": "100.64.1.9", "conditions": [{ "type": "Ready", "status": "True" }] },
        }))
    }

    fn snapshot(&mut self) -> std::sync::Arc<Snapshot> {
        self.index.apply(self.store.world().expect("everything was listed"))
    }

    /// All conditions, each a line.
    fn said(&mut self) -> Vec<String> {
        let snapshot = self.snapshot();
        let mut lines = Vec::new();
        for (target, wanted) in desired(&snapshot, &MeshSettings::default()) {
            for condition in wanted.status["conditions"].as_array().unwrap() {
                let text = |field: &str| condition[field].as_str().unwrap().to_owned();
                let (name, generation) =
                    (&target.name, wanted.generation.map_or("any".to_owned(), |it| it.to_string()));
                lines.push(
                    format!(
                        "{name}@{generation} {}={} {}: {}",
                        text("type"),
                        text("status"),
                        text("reason"),
                        text("message")
                    )
                    .trim_end_matches([' ', ':'])
                    .to_owned(),
                );
            }
        }
        lines
    }
}

fn principals() -> Value {
    json!([{ "from": [{ "source": { "principals": ["cluster.local/ns/shop/sa/web"] } }] }])
}

/// D45: what node tunnels take, and whether it decides on anything.
#[test]
fn a_policy_says_what_enforces_it_or_why_nothing_does() {
    let mut cluster = Cluster::new();
    let selector = json!({ "matchLabels": { "app": "cart" } });
    let paths = json!([{ "to": [{ "operation": { "paths": ["/admin"], "ports": ["80"] } }] }]);
    cluster
        .policy("all", 3, json!({ "rules": principals() }))
        .policy("audit", 1, json!({ "action": "AUDIT", "rules": [{}] }))
        .policy("cart", 2, json!({ "selector": selector, "rules": principals() }))
        .policy("http-allow", 1, json!({ "rules": paths }))
        .policy("http-deny", 1, json!({ "action": "DENY", "rules": paths }));
    let annotations = json!({ "istio.io/dry-run": "true" });
    let metadata = json!({ "name": "try", "namespace": "shop", "generation": 1, "annotations": annotations });
    cluster.put("AuthorizationPolicy", json!({ "metadata": metadata, "spec": { "rules": principals() } }));
    cluster.pod("cart", "pending");
    let nobody = cluster.said();
    assert!(
        nobody.contains(&"cart@2 culvert.dev/Enforced=False NoWorkload: there are no enrolled workloads of namespace shop with app=cart".to_owned()),
        "{nobody:#?}"
    );
    cluster.pod("cart", "enabled");
    let here = "node tunnels enforce it for enrolled workloads of namespace shop";
    let expected = [
        "all@3 ZtunnelAccepted=True Accepted: taken for enrolled workloads of namespace shop".to_owned(),
        format!("all@3 culvert.dev/Enforced=True Enforced: {here}"),
        "audit@1 ZtunnelAccepted=False UnsupportedValue: spec.action: a node tunnel cannot enforce AUDIT, so it enforces nothing of it".to_owned(),
        "audit@1 culvert.dev/Enforced=False UnsupportedValue: spec.action: a node tunnel cannot enforce AUDIT, so it enforces nothing of it".to_owned(),
        "cart@2 ZtunnelAccepted=True Accepted: taken for enrolled workloads of namespace shop with app=cart".to_owned(),
        format!("cart@2 culvert.dev/Enforced=True Enforced: {here} with app=cart"),
        "http-allow@1 ZtunnelAccepted=False UnsupportedValue: spec.rules[0]: left out, since HTTP fields cannot be judged here: fewer connections are allowed".to_owned(),
        format!("http-allow@1 culvert.dev/Enforced=True Narrowed: {here}; spec.rules[0]: left out, since HTTP fields cannot be judged here: fewer connections are allowed"),
        "http-deny@1 ZtunnelAccepted=False UnsupportedValue: spec.rules[0]: HTTP fields cannot be judged here, so every connection that the rest matches is denied".to_owned(),
        format!("http-deny@1 culvert.dev/Enforced=True Widened: {here}; spec.rules[0]: HTTP fields cannot be judged here, so every connection that the rest matches is denied"),
        "try@1 ZtunnelAccepted=True Accepted: taken for enrolled workloads of namespace shop".to_owned(),
        "try@1 culvert.dev/Enforced=False DryRun: a dry run: what it would do is in the access log of enrolled workloads of namespace shop".to_owned(),
    ];
    assert_eq!(cluster.said(), expected);
}

fn gateway(name: &str, class: &str, protocol: &str, programmed: bool) -> Value {
    let status = if programmed { "True" } else { "False" };
    json!({
        "metadata": { "name": name, "namespace": "shop" },
        "spec": { "gatewayClassName": class, "listeners": [{ "name": "mesh", "port": 15008, "protocol": protocol }] },
        "status": { "conditions": [{ "type": "Programmed", "status": status }] },
    })
}

fn service(name: &str, labels: Value) -> Value {
    json!({ "metadata": { "name": name, "namespace": "shop", "labels": labels }, "spec": { "ports": [{ "port": 80 }] } })
}

/// D45: TargetNotFound and AncestorNotBound, W27: of each kind of target.
#[test]
fn a_policy_for_a_waypoint_says_what_is_missing() {
    let mut cluster = Cluster::new();
    let target = |group: &str, kind: &str, name: &str| json!({ "targetRefs": [{ "group": group, "kind": kind, "name": name }], "rules": [{}] });
    let gateways = "gateway.networking.k8s.io";
    cluster
        .put("Service", service("plain", json!({})))
        .put("Service", service("lost", json!({ "istio.io/use-waypoint": "gone" })))
        .put("Gateway", gateway("foreign", "example", "HBONE", true))
        .put("Gateway", gateway("web", "culvert-waypoint", "HTTP", true))
        .policy("class", 1, target(gateways, "GatewayClass", "culvert-waypoint"))
        .policy("foreign", 1, target(gateways, "Gateway", "foreign"))
        .policy("gateway", 1, target(gateways, "Gateway", "none"))
        .policy("lost", 1, target("", "Service", "lost"))
        .policy("nowhere", 1, target("", "Service", "nowhere"))
        .policy("plain", 1, target("", "Service", "plain"))
        .policy("pod", 1, target("", "Pod", "p"))
        .policy("web", 1, target(gateways, "Gateway", "web"));
    let said = cluster.said();
    let of = |name: &str, reason: &str, words: &str| {
        for of in ["WaypointAccepted", "culvert.dev/Enforced"] {
            let line = said.iter().find(|it| it.starts_with(&format!("{name}@1 {of}=False")));
            let line = line.unwrap_or_else(|| panic!("{name}: {said:#?}"));
            assert!(line.contains(&format!(" {reason}: ")) && line.contains(words), "{line}");
        }
        assert!(!said.iter().any(|it| it.starts_with(name) && it.contains("Ztunnel")), "{said:#?}");
    };
    of("class", "Invalid", "only a policy of namespace istio-system can be for a class");
    of("foreign", "AncestorNotBound", "Gateway shop/foreign is no waypoint of this mesh");
    of("gateway", "TargetNotFound", "Gateway shop/none does not exist");
    of("lost", "AncestorNotBound", "is bound to shop/gone, which is no waypoint of this mesh");
    of("nowhere", "TargetNotFound", "Service shop/nowhere does not exist");
    of("plain", "AncestorNotBound", "not bound to a waypoint");
    of("pod", "Invalid", "Service, ServiceEntry, Gateway or GatewayClass");
    of("web", "AncestorNotBound", "Gateway shop/web is no waypoint of this mesh");
}

/// D45, W27, W58: who enforces it, and whether that is there.
#[test]
fn a_policy_that_a_waypoint_has_says_which() {
    let mut cluster = Cluster::new();
    let target = json!({ "kind": "Service", "name": "bound" });
    let missing = json!({ "kind": "Service", "name": "nowhere" });
    let own = json!({ "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "w" });
    cluster
        .put("Service", service("bound", json!({ "istio.io/use-waypoint": "w" })))
        .put("Gateway", gateway("w", "culvert-waypoint", "HBONE", false))
        .policy("one", 1, json!({ "targetRefs": [target], "rules": [{}] }));
    let expected = [
        "one@1 WaypointAccepted=True Accepted: taken by waypoint shop/w",
        "one@1 culvert.dev/Enforced=False WaypointIsNotReady: waypoint shop/w is not programmed: what is sent through it is refused until it is",
    ];
    assert_eq!(cluster.said(), expected);
    cluster
        .put("Gateway", gateway("w", "culvert-waypoint", "HBONE", true))
        .policy("gateway", 1, json!({ "targetRefs": [own], "rules": [{}] }))
        .policy("some", 1, json!({ "targetRefs": [target, missing], "rules": [{}] }));
    let metadata = json!({ "name": "try", "namespace": "shop", "generation": 1, "annotations": { "istio.io/dry-run": "true" } });
    cluster.put(
        "AuthorizationPolicy",
        json!({ "metadata": metadata, "spec": { "targetRefs": [own], "rules": [{}] } }),
    );
    let expected = [
        "gateway@1 WaypointAccepted=True Accepted: taken by waypoint shop/w",
        "gateway@1 culvert.dev/Enforced=True Enforced: waypoint shop/w enforces it",
        "one@1 WaypointAccepted=True Accepted: taken by waypoint shop/w",
        "one@1 culvert.dev/Enforced=True Enforced: waypoint shop/w enforces it",
        "some@1 WaypointAccepted=False TargetNotFound: taken by waypoint shop/w, but not for all targets: Service shop/nowhere does not exist",
        "some@1 culvert.dev/Enforced=True Narrowed: waypoint shop/w enforces it; nothing does so for the rest: Service shop/nowhere does not exist",
        "try@1 WaypointAccepted=True Accepted: taken by waypoint shop/w",
        "try@1 culvert.dev/Enforced=False DryRun: a dry run: what it would do is in the access log of waypoint shop/w",
    ];
    assert_eq!(cluster.said(), expected);
}

/// D46, GEP-1294: the status of a route, by its parents; what is another controller's is left to it.
#[test]
fn a_route_says_at_each_parent_what_became_of_it() {
    let mut cluster = Cluster::new();
    let to = |name: &str| json!({ "group": "", "kind": "Service", "name": name });
    let parents = json!([
        to("bound"),
        { "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "foreign" },
        { "group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "w" },
        to("nowhere"),
        to("plain"),
    ]);
    let rules = json!([
        { "backendRefs": [{ "name": "bound", "port": 80 }, { "name": "gone", "port": 80, "weight": 0 }] },
        { "filters": [{ "type": "New" }] },
    ]);
    let metadata = json!({ "name": "r", "namespace": "shop", "generation": 3 });
    cluster
        .put("Service", service("bound", json!({ "istio.io/use-waypoint": "w" })))
        .put("Service", service("plain", json!({})))
        .put("Gateway", gateway("foreign", "example", "HTTP", true))
        .put("Gateway", gateway("w", "culvert-waypoint", "HBONE", true))
        .put("HTTPRoute", json!({ "metadata": metadata, "spec": { "parentRefs": parents, "rules": rules } }));
    let snapshot = cluster.snapshot();
    let desired = super::routes::desired(&snapshot);
    let wanted = &desired[&Target::new(kinds::HTTP_ROUTE, "shop", "r")];
    assert_eq!((wanted.uid.as_str(), wanted.generation), ("uid-r", Some(3)));
    let entries = wanted.status["parents"].as_array().unwrap();
    let lines: Vec<String> = entries
        .iter()
        .flat_map(|entry| {
            assert_eq!(entry["controllerName"], "culvert.dev/waypoint-controller");
            let parent = format!(
                "{}/{}",
                entry["parentRef"]["kind"].as_str().unwrap(),
                entry["parentRef"]["name"].as_str().unwrap()
            );
            let one = move |it: &Value| {
                let text = |field: &str| it[field].as_str().unwrap().to_owned();
                format!(
                    "{parent} {}={} {}: {}",
                    text("type"),
                    text("status"),
                    text("reason"),
                    text("message")
                )
            };
            entry["conditions"].as_array().unwrap().iter().map(one).collect::<Vec<_>>()
        })
        .collect();
    let broken = "what they match is answered with an error: rule 1: spec.rules[1].filters[0].type: unknown value (got \"New\", expected RequestHeaderModifier, ResponseHeaderModifier, RequestMirror, RequestRedirect, URLRewrite, CORS or ExtensionRef)";
    let expected = [
        "Service/bound Accepted=True Accepted: carried out by waypoint shop/w".to_owned(),
        "Service/bound ResolvedRefs=False BackendNotFound: Service shop/gone does not exist".to_owned(),
        format!("Service/bound PartiallyInvalid=True UnsupportedValue: Dropped Rule: {broken}"),
        "Gateway/w Accepted=False NoMatchingParent: Gateway shop/w is a waypoint, which takes routes by the services that it serves: name a Service".to_owned(),
        "Gateway/w ResolvedRefs=True ResolvedRefs: ".to_owned(),
        "Service/nowhere Accepted=False NoMatchingParent: Service shop/nowhere does not exist".to_owned(),
        "Service/nowhere ResolvedRefs=True ResolvedRefs: ".to_owned(),
        "Service/plain Accepted=True Accepted: no waypoint of this mesh serves it, so nothing carries the route out".to_owned(),
        "Service/plain ResolvedRefs=False BackendNotFound: Service shop/gone does not exist".to_owned(),
        format!("Service/plain PartiallyInvalid=True UnsupportedValue: Dropped Rule: {broken}"),
    ];
    assert_eq!(lines, expected);
}

/// D45: Invalid, with the field, and what is in force in its place.
#[test]
fn a_policy_that_cannot_be_read_says_the_field_and_what_stands_for_it() {
    let mut cluster = Cluster::new();
    cluster
        .pod("cart", "enabled")
        .policy("never-good", 1, json!({ "rule": [] }))
        .policy("was-good", 1, json!({ "action": "DENY", "rules": principals() }))
        .policy("was-good", 2, json!({ "action": "PERHAPS" }));
    let said = cluster.said();
    let expected = [
        [
            "never-good@any ZtunnelAccepted=False Invalid: spec.rule: unknown field",
            "every connection to what it selects is refused",
        ],
        [
            "never-good@any culvert.dev/Enforced=False Invalid: spec.rule",
            "every connection to what it selects is refused",
        ],
        ["was-good@any ZtunnelAccepted=False Invalid: spec.action:", "what it said before stays in force"],
        [
            "was-good@any culvert.dev/Enforced=False Invalid: spec.action:",
            "what it said before stays in force",
        ],
    ];
    assert_eq!(said.len(), expected.len(), "{said:#?}");
    for (line, [start, words]) in said.iter().zip(expected) {
        assert!(line.starts_with(start) && line.contains(words), "{line}");
    }
    cluster.policy("never-good", 2, json!({ "rules": principals() }));
    let said = cluster.said();
    assert!(said[0].starts_with("never-good@2 ZtunnelAccepted=True Accepted"), "{said:#?}");
}

/// D45 for PeerAuthentication, which has no conditions in Istio.
#[test]
fn a_mode_says_where_it_is_in_force() {
    let mut cluster = Cluster::new();
    let peer = |name: &str, namespace: &str, created: &str, spec: Value| {
        let metadata =
            json!({ "name": name, "namespace": namespace, "generation": 1, "creationTimestamp": created });
        json!({ "metadata": metadata, "spec": spec })
    };
    let strict = json!({ "mtls": { "mode": "STRICT" } });
    cluster
        .pod("cart", "enabled")
        .put("PeerAuthentication", peer("first", "shop", "2026-01-01T00:00:00Z", strict.clone()))
        .put("PeerAuthentication", peer("mesh", "istio-system", "2026-01-01T00:00:00Z", strict.clone()))
        .put("PeerAuthentication", peer("other", "empty", "2026-01-01T00:00:00Z", strict.clone()))
        .put("PeerAuthentication", peer("second", "shop", "2026-01-02T00:00:00Z", strict));
    let said = cluster.said().join("\n");
    for line in [
        "first@1 culvert.dev/Enforced=True Enforced: node tunnels enforce it for enrolled workloads of namespace shop",
        "mesh@1 culvert.dev/Enforced=True Enforced: node tunnels enforce it for enrolled workloads",
        "other@1 culvert.dev/Enforced=False NoWorkload: there are no enrolled workloads of namespace empty",
        "second@1 ZtunnelAccepted=False Shadowed: first is older and for the same namespace",
        "second@1 culvert.dev/Enforced=False Shadowed: first is older and for the same namespace",
    ] {
        assert!(said.lines().any(|it| it == line), "{line}\n{said}");
    }
}

#[test]
fn an_entry_says_what_of_it_is_ignored() {
    let mut cluster = Cluster::new();
    let entry = |name: &str, created: &str, spec: Value| {
        let metadata =
            json!({ "name": name, "namespace": "shop", "generation": 1, "creationTimestamp": created });
        json!({ "metadata": metadata, "spec": spec })
    };
    let port = |protocol: &str| json!([{ "number": 53, "name": "dns", "protocol": protocol }]);
    cluster
        .put(
            "ServiceEntry",
            entry("a", "2026-01-01T00:00:00Z", json!({ "hosts": ["a.example"], "ports": port("TCP") })),
        )
        .put(
            "ServiceEntry",
            entry("b", "2026-01-02T00:00:00Z", json!({ "hosts": ["a.example"], "ports": port("TCP") })),
        )
        .put(
            "ServiceEntry",
            entry(
                "c",
                "2026-01-01T00:00:00Z",
                json!({ "hosts": ["c.example"], "ports": port("UDP"), "exportTo": ["."] }),
            ),
        )
        .put("ServiceEntry", entry("d", "2026-01-01T00:00:00Z", json!({ "hosts": ["not a name"] })))
        .put("WorkloadEntry", entry("w", "2026-01-01T00:00:00Z", json!({ "address": "192.0.2.1" })));
    let expected = [
        "a@1 Accepted=True Accepted",
        "b@1 Accepted=False HostConflict: a.example is already a service of this namespace",
        "c@1 Accepted=True PartlyIgnored: spec.exportTo is not honoured: its hosts are known in every namespace; port dns is UDP, which is not carried",
        "d@any Accepted=False Invalid: spec.hosts[0]: invalid value (got \"not a name\", expected a DNS name, or *. and a DNS name); nothing of it is in force",
        "w@1 Accepted=True Accepted",
    ];
    assert_eq!(cluster.said(), expected);
}

#[test]
fn a_target_has_the_uid_of_the_object_that_was_judged() {
    let mut cluster = Cluster::new();
    cluster.policy("all", 3, json!({ "rules": principals() }));
    let snapshot = cluster.snapshot();
    let desired = desired(&snapshot, &MeshSettings::default());
    let wanted = &desired[&Target::new(kinds::AUTHORIZATION_POLICY, "shop", "all")];
    assert_eq!((wanted.uid.as_str(), wanted.generation), ("uid-all", Some(3)));
}
