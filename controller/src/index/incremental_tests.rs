//! What an index makes of one edit after another is what a translation of the whole makes of the outcome.

use culvert_k8s_api::manifest::parse_file;
use culvert_k8s_api::status::{Phase, Redirection};
use culvert_k8s_api::{Kind, Object};
use culvert_proto::waypoint::{Policy, Route};
use culvert_proto::workload::{Address, address};
use culvert_proto::{POLICY_TYPE_URL, ROUTE_TYPE_URL};
use proptest::prelude::*;

use super::*;

const NAMESPACES: [&str; 3] = ["a", "b", "istio-system"];

/// One edit: an object by its kind, namespace, name and one of a few ways it may look; or a status.
#[derive(Clone, Debug)]
struct Edit {
    what: u8,
    namespace: &'static str,
    name: u8,
    look: u8,
    remove: bool,
}

fn edits() -> impl Strategy<Value = Vec<Vec<Edit>>> {
    let edit = (0u8..18, 0usize..3, 0u8..3, 0u8..4, prop::bool::weighted(0.3)).prop_map(
        |(what, namespace, name, look, remove)| Edit {
            what,
            namespace: NAMESPACES[namespace],
            name,
            look,
            remove,
        },
    );
    prop::collection::vec(prop::collection::vec(edit, 1..6), 1..25)
}

fn apply(world: &mut World, edit: &Edit) {
    let Edit { what, namespace, name, look, remove } = edit;
    let key = (namespace.to_string(), format!("p{name}"));
    match what {
        8 if *remove => drop(world.pods.remove(&key)),
        8 => drop(world.pods.insert(key, pod_status(namespace, *name, *look))),
        9 if *remove => drop(world.services.remove(&(namespace.to_string(), format!("s{name}")))),
        9 => {
            let cluster_ips = vec![format!("198.18.200.{look}").parse().unwrap()];
            let key = (namespace.to_string(), format!("s{name}"));
            world.services.insert(key, ServiceStatus { cluster_ips });
        }
        10 => {
            let key = (format!("node-{look}"), format!("uid-{namespace}-{name}"));
            if *remove {
                world.redirection.remove(&key);
            } else {
                let redirection = RedirectionStatus { redirection: Redirection::Enabled, error: None };
                world.redirection.insert(key, redirection);
            }
        }
        _ => {
            let parsed = parse_file("f", &manifest(edit));
            assert_eq!(parsed.errors, [], "{edit:?}");
            for manifest in parsed.objects {
                let key = manifest.object.key();
                if *remove {
                    world.objects.remove(&key);
                } else {
                    world.objects.insert(key, manifest);
                }
            }
        }
    }
}

fn pod_status(namespace: &str, name: u8, look: u8) -> PodStatus {
    PodStatus {
        uid: format!("uid-{namespace}-{name}"),
        namespace: namespace.to_owned(),
        name: format!("p{name}"),
        node_name: format!("node-{look}"),
        pod_ips: vec![format!("10.0.{look}.{name}").parse().unwrap()],
        phase: if look == 3 { Phase::Succeeded } else { Phase::Running },
        ready: look != 2,
        netns: None,
        deleted: false,
    }
}

fn manifest(edit: &Edit) -> String {
    let Edit { what, namespace, name, look, .. } = edit;
    // Some are bound to a waypoint of another namespace, some are what a waypoint is made of.
    let more = match (what, look) {
        (0 | 1 | 3, 1) => ", istio.io/use-waypoint: w0, istio.io/use-waypoint-namespace: a",
        (0 | 1 | 3, 3) => ", gateway.networking.k8s.io/gateway-name: w1",
        _ => "",
    };
    let meta = format!("metadata: {{name: {{}}, namespace: {namespace}, labels: {{app: l{look}{more}}}}}");
    let meta = |prefix: &str| meta.replace("{}", &format!("{prefix}{name}"));
    match what {
        0 => format!(
            "apiVersion: v1\nkind: Pod\n{}\nspec: {{containers: [{{name: c, ports: [{{name: web, containerPort: 8{look}}}]}}]}}",
            meta("p")
        ),
        1 => format!(
            "apiVersion: v1\nkind: Service\n{}\nspec: {{clusterIP: 198.18.128.{name}, {}ports: [{{port: 80, targetPort: web}}]}}",
            meta("s"),
            // Without a selector slices say where it leads.
            if look % 2 == 0 { format!("selector: {{app: l{look}}}, ") } else { String::new() }
        ),
        2 => format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\n{}\nspec: {{hosts: [h{look}.example], ports: [{{number: 80, name: http, protocol: HTTP}}], resolution: STATIC, {}}}",
            meta("e"),
            if look % 2 == 0 {
                "workloadSelector: {labels: {app: l1}}"
            } else {
                "endpoints: [{address: 192.0.2.1, labels: {app: l1}}]"
            }
        ),
        3 => format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\n{}\nspec: {{address: 192.0.2.{look}, labels: {{app: l{look}}}}}",
            meta("w")
        ),
        4 if *look == 3 => format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{}\nspec: {{targetRefs: [{{kind: Service, name: s{name}}}, {{group: gateway.networking.k8s.io, kind: Gateway, name: w{name}}}]}}",
            meta("a")
        ),
        4 => format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n{}\nspec: {{{}action: DENY, rules: [{{to: [{{operation: {{ports: [\"8{look}\"]}}}}]}}]}}",
            meta("a"),
            if look % 2 == 0 { "selector: {matchLabels: {app: l1}}, " } else { "" }
        ),
        5 => format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n{}\nspec: {{{}mtls: {{mode: {}}}}}",
            meta("m"),
            if look % 2 == 0 { "selector: {matchLabels: {app: l1}}, " } else { "" },
            if *look < 2 { "STRICT" } else { "PERMISSIVE" }
        ),
        11 => format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n{}\nspec: {{podSelector: {{matchLabels: {{app: l{look}}}}}, policyTypes: [Ingress]}}",
            meta("n")
        ),
        12 => format!(
            "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\n{}\nspec: {{endpointSelector: {{}}}}",
            meta("o")
        ),
        13 | 14 | 16 | 17 => gateway_api(edit),
        15 => slice(edit),
        6 => format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{istio.io/use-waypoint: w{look}}}}}"
        ),
        _ => format!(
            "apiVersion: v1\nkind: Node\nmetadata: {{name: node-{look}, labels: {{topology.kubernetes.io/zone: z{name}}}}}"
        ),
    }
}

/// Of what the Gateway API has.
fn gateway_api(edit: &Edit) -> String {
    let Edit { what, namespace, name, look, .. } = edit;
    match what {
        13 => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w{name}, namespace: {namespace}, labels: {{istio.io/waypoint-for: {}}}}}\nspec: {{gatewayClassName: {}, listeners: [{{name: mesh, port: 1500{look}, protocol: HBONE, allowedRoutes: {{namespaces: {{from: {}}}}}}}]}}\n{}",
            ["service", "workload", "all", "none"][usize::from(*look)],
            if look % 2 == 0 { "culvert-waypoint" } else { "c1" },
            if *name == 0 { "All" } else { "Same" },
            if look % 2 == 0 { "" } else { "status: {addresses: [{value: 10.9.9.9}]}" },
        ),
        14 => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: GatewayClass\nmetadata: {{name: c{name}, labels: {{istio.io/waypoint-for: {}}}}}\nspec: {{controllerName: example.com/c{look}}}",
            if look % 2 == 0 { "workload" } else { "all" }
        ),
        16 => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r{name}, namespace: {namespace}}}\nspec: {{parentRefs: [{{group: \"\", kind: Service, name: s{look}, namespace: a}}], rules: [{{backendRefs: [{{name: s{name}, namespace: b, port: 80}}]}}]}}"
        ),
        _ => format!(
            "apiVersion: gateway.networking.k8s.io/v1\nkind: ReferenceGrant\nmetadata: {{name: g{name}, namespace: {namespace}}}\nspec: {{from: [{{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: a}}], to: [{{group: \"\", kind: Service, name: s{look}}}]}}"
        ),
    }
}

/// A slice of a Service that may have no selector: of a pod, named or not, and of something else.
fn slice(edit: &Edit) -> String {
    let Edit { namespace, name, look, .. } = edit;
    let target = if look % 2 == 0 {
        format!(", targetRef: {{kind: Pod, name: p{name}, namespace: b}}")
    } else {
        String::new()
    };
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: x{name}, namespace: {namespace}, labels: {{kubernetes.io/service-name: s{name}}}}}\naddressType: IPv4\nports: [{{port: 808{look}}}]\nendpoints: [{{addresses: [10.0.1.{name}]{target}}}, {{addresses: [192.0.2.{name}], conditions: {{ready: false}}}}]"
    )
}

fn check(index: &mut Index, world: &World) -> Result<(), TestCaseError> {
    let vips = index.current().translation.vips.clone();
    let before = index.current();
    let after = index.apply(world.clone());
    let whole = translate::translate(world, &vips, &MeshSettings::default());
    let addresses: BTreeMap<_, _> =
        after.addresses.iter().map(|(name, it)| (name.clone(), (*it.message).clone())).collect();
    let policies: BTreeMap<_, _> =
        after.policies.iter().map(|(name, it)| (name.clone(), (*it.message).clone())).collect();
    prop_assert_eq!(&addresses, &whole.addresses);
    prop_assert_eq!(&policies, &whole.policies);
    prop_assert_eq!(&after.translation.policy_status, &whole.policy_status);
    prop_assert_eq!(&after.translation.notes, &whole.notes);
    prop_assert_eq!(&after.translation.vips, &whole.vips);
    prop_assert_eq!(&after.translation.routed, &whole.routed);
    prop_assert_eq!(&after.translation.targeted, &whole.targeted);
    waypoints(&before, &after, &whole)?;
    // What is served is what is known, and nothing is told anew that did not change.
    let served = after.set.of_type(ADDRESS_TYPE_URL);
    prop_assert_eq!(served.len(), after.addresses.len());
    for (name, it) in &after.addresses {
        let resource = &served[name.as_str()];
        prop_assert_eq!(&*resource.version, it.version.as_str());
        prop_assert_eq!(&Address::decode(resource.body.clone()).unwrap(), &*it.message);
        if let Some(old) = before.addresses.get(name).filter(|old| old.message == it.message) {
            prop_assert_eq!(&old.version, &it.version);
        }
    }
    let same = before.addresses == after.addresses
        && before.policies == after.policies
        && before.translation.told() == after.translation.told();
    prop_assert_eq!(same && !before.set.types.is_empty(), before.generation == after.generation);
    Ok(())
}

/// What waypoints are served is what they are told, and nothing of it anew that did not change.
fn waypoints(before: &Snapshot, after: &Snapshot, whole: &Translation) -> Result<(), TestCaseError> {
    let told = whole.told();
    prop_assert_eq!(after.waypoints.keys().collect::<Vec<_>>(), told.keys().collect::<Vec<_>>());
    for (gateway, told) in &told {
        let set = after.waypoints[gateway].set(&after.set);
        let old = before.waypoints.get(gateway).map(|own| own.set(&before.set));
        let served = set.of_type(ROUTE_TYPE_URL);
        prop_assert_eq!(served.len(), told.routes.len());
        for (name, route) in &told.routes {
            prop_assert_eq!(&Route::decode(served[name.as_str()].body.clone()).unwrap(), &**route);
            let kept = old.as_ref().and_then(|set| set.of_type(ROUTE_TYPE_URL).get(name.as_str()).cloned());
            if let Some(kept) = kept.filter(|it| it.body == served[name.as_str()].body) {
                prop_assert_eq!(kept, served[name.as_str()].clone());
            }
        }
        let served = set.of_type(POLICY_TYPE_URL);
        prop_assert_eq!(served.len(), told.policies.len());
        for (name, policy) in &told.policies {
            prop_assert_eq!(&Policy::decode(served[name.as_str()].body.clone()).unwrap(), &**policy);
        }
    }
    Ok(())
}

proptest! {
    /// Must be so whatever changes together, in whatever order.
    #[test]
    fn one_edit_after_another_is_the_whole(steps in edits()) {
        let mut index = Index::new(MeshSettings::default(), 1);
        let mut world = World::default();
        for step in steps {
            for edit in &step {
                apply(&mut world, edit);
            }
            check(&mut index, &world)?;
        }
    }
}

fn large(pods: usize) -> World {
    let mut world = World::default();
    for n in 0..pods / 10 {
        let (namespace, service) = (format!("team-{}", n % 20), format!("s{n}"));
        let manifest = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: {namespace}}}\nspec: {{clusterIP: 198.18.128.1, selector: {{app: {service}}}, ports: [{{port: 80}}]}}"
        );
        world.objects.extend(by_key(parse_file("f", &manifest).objects));
    }
    for n in 0..pods {
        let service = n % (pods / 10);
        let namespace = format!("team-{}", service % 20);
        let name = format!("p{n}");
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: s{service}}}}}\nspec: {{containers: [{{name: c}}]}}"
        );
        world.objects.extend(by_key(parse_file("f", &text).objects));
        let status = PodStatus { name: name.clone(), uid: name.clone(), ..pod_status(&namespace, 1, 1) };
        world.pods.insert((namespace, name), status);
    }
    world
}

/// A change of one pod costs a small part of the whole: it is not the whole with a shortcut at the end. A share, because a
/// machine that is slow is slow at both.
#[test]
fn a_pod_costs_what_a_pod_is_worth() {
    let mut world = large(5_000);
    let mut index = Index::new(MeshSettings::default(), 1);
    let begun = std::time::Instant::now();
    index.apply(world.clone());
    let whole = begun.elapsed();
    let key = ("team-7".to_owned(), "p7".to_owned());
    let mut fastest = whole;
    for look in [2, 1, 2, 1, 2] {
        let status = PodStatus { name: "p7".into(), uid: "p7".into(), ..pod_status("team-7", 1, look) };
        world.pods.insert(key.clone(), status);
        let begun = std::time::Instant::now();
        let before = index.current().generation;
        let after = index.apply(world.clone());
        fastest = fastest.min(begun.elapsed());
        assert_eq!(after.generation, before + 1);
    }
    println!("the whole takes {whole:?}, one pod {fastest:?}");
    assert!(fastest < whole / 20, "one pod of 5,000 took {fastest:?}, the whole {whole:?}");
    let Some(address::Type::Workload(pod)) =
        &index.current().addresses["Kubernetes//Pod/team-7/p7"].message.r#type
    else {
        panic!("no workload")
    };
    assert_eq!(pod.services.len(), 1);
    assert!(matches!(&world.objects.values().next().unwrap().object, Object::Pod(_) | Object::Service(_)));
}

/// A Gateway costs what is bound to it: neither the pods beside, nor those of other namespaces.
#[test]
fn a_gateway_costs_what_is_bound_to_it() {
    let mut text = String::new();
    for (namespace, labels) in [
        ("by-name", "istio.io/use-waypoint: w"),
        ("elsewhere", "istio.io/use-waypoint: w, istio.io/use-waypoint-namespace: by-name"),
        ("other", "istio.io/use-waypoint: v"),
        ("none", "x: y"),
    ] {
        text += &format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, labels: {{{labels}}}}}\n---\n"
        );
        for (pod, own) in [
            ("plain", "x: y"),
            ("out", "istio.io/use-waypoint: none"),
            ("own", "istio.io/use-waypoint: w"),
            ("instance", "gateway.networking.k8s.io/gateway-name: w"),
        ] {
            text += &format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{name: {pod}, namespace: {namespace}, labels: {{{own}}}}}\nspec: {{containers: [{{name: c}}]}}\n---\n"
            );
        }
    }
    text += "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: by-name}\nspec: {gatewayClassName: c, listeners: []}\n";
    let world = World { objects: by_key(parse_file("f", &text).objects), ..World::default() };
    let mut before = world.clone();
    before.objects = before.objects.into_iter().filter(|(key, _)| key.kind != Kind::Gateway).collect();
    let changes = Changes::between(&before, &world, &MeshSettings::default());
    let pod = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
    let bound = [
        pod("by-name", "instance"),
        pod("by-name", "own"),
        pod("by-name", "plain"),
        pod("elsewhere", "instance"),
        pod("elsewhere", "plain"),
    ];
    assert_eq!(changes.pods, BTreeSet::from(bound));
    assert!(changes.context && !changes.all && changes.entries.is_empty());
}

/// A route is what waypoints are told, and nothing else is translated again for it.
#[test]
fn a_route_costs_no_workload() {
    let mut world = large(1_000);
    let mut index = Index::new(MeshSettings::default(), 1);
    let before = index.apply(world.clone());
    let text = "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r, namespace: team-7}\nspec: {parentRefs: [{group: \"\", kind: Service, name: s7}]}";
    world.objects.extend(by_key(parse_file("f", text).objects));
    let changes = Changes::between(&before.world, &world, &MeshSettings::default());
    assert_eq!(changes, Changes { routes: true, ..Changes::default() });
    let after = index.apply(world);
    assert_eq!(after.translation.routed.status.len(), 1);
    assert_eq!(after.generation, before.generation, "no waypoint serves it, so nobody is told");
}
