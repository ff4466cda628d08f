//! What waypoints are told, and what is said of routes to people.

use culvert_proto::DESCRIPTORS;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};

use super::*;
use crate::translate::routes::ParentStatus;

fn all() -> World {
    world(include_str!("../testdata/routes.yaml"))
}

/// Any message as JSON, without what says nothing.
fn json(name: &str, message: &impl Message) -> Value {
    let pool = DescriptorPool::decode(DESCRIPTORS).unwrap();
    let of = pool.get_message_by_name(&format!("culvert.waypoint.v1.{name}")).unwrap();
    let dynamic = DynamicMessage::decode(of, message.encode_to_vec().as_slice()).unwrap();
    serde_json::to_value(&dynamic).unwrap()
}

fn told(translation: &Translation) -> Value {
    let mut out = Map::new();
    for (gateway, told) in translation.told() {
        let routes: Map<String, Value> =
            told.routes.iter().map(|(name, it)| (name.clone(), json("Route", it.as_ref()))).collect();
        let policies: Map<String, Value> =
            told.policies.iter().map(|(name, it)| (name.clone(), json("Policy", it.as_ref()))).collect();
        out.insert(gateway, serde_json::json!({ "routes": routes, "policies": policies }));
    }
    out.into()
}

/// One line for each condition of each parent.
fn said(translation: &Translation) -> Vec<String> {
    let line = |name: &str, it: &ParentStatus| {
        let parent = &it.parent;
        let port = parent.port.map(|port| format!(":{port}")).unwrap_or_default();
        let place = format!("{name} at {} {}{port}", parent.kind, parent.name);
        let verdict = |of: &str, is: bool, reason: &str, message: &str| {
            format!("{place}: {of}={is} {reason} {message}").trim_end().to_owned()
        };
        let (accepted, resolved) = (&it.accepted, &it.resolved);
        let mut lines = vec![
            verdict("Accepted", accepted.is, accepted.reason, &accepted.message),
            verdict("ResolvedRefs", resolved.is, resolved.reason, &resolved.message),
        ];
        lines.extend(it.partly.as_ref().map(|it| verdict("PartiallyInvalid", true, "", it)));
        lines
    };
    let of =
        |((of, namespace, name), parents): (&crate::translate::routes::RouteName, &Vec<ParentStatus>)| {
            let name = format!("{} {namespace}/{name}", of.kind());
            parents.iter().flat_map(|it| line(&name, it)).collect::<Vec<_>>()
        };
    translation.routed.status.iter().flat_map(of).collect()
}

/// GEP-1294, W27, W28, W58: a golden file of what each waypoint is told, and what is said of each route and policy.
#[test]
fn routes() {
    let translation = run(&all());
    let targeted: Vec<_> = translation.policy_status.iter().filter(|it| it.targeted).collect();
    let page =
        serde_json::json!({ "told": told(&translation), "routes": said(&translation), "policies": targeted });
    insta::assert_snapshot!(serde_json::to_string_pretty(&page).unwrap());
}

/// What only the service's waypoints carry out is told to nobody else, and a canary knows all that the first waypoint does of it.
#[test]
fn whose_waypoint_is_told_of_a_route() {
    let told = run(&all()).told();
    let names = |gateway: &str| {
        let of = |it: &String| it.split('/').nth(2).unwrap().to_owned();
        told[gateway].routes.keys().map(of).collect::<std::collections::BTreeSet<_>>()
    };
    let first = names("shop/w");
    let canary = names("shop/v");
    assert!(first.contains("lost") && !canary.contains("lost"), "{canary:?}");
    assert!(canary.contains("consumer") && canary.contains("everything") && canary.is_subset(&first));
    assert!(!told.contains_key("shop/ingress") && told.len() == 2);
}

/// A route without a port counts at every port: also where another names one, unless that is of a kind that comes before it.
#[test]
fn ports_that_others_name_are_no_holes() {
    let told = run(&all()).told();
    let ports = |name: &str| {
        let of = told["shop/w"].routes.values().filter(|it| it.name == name);
        of.map(|it| it.port).collect::<Vec<_>>()
    };
    assert_eq!(ports("everything"), [0, 80], "7070 is the GRPCRoute's");
    assert_eq!(ports("grpc"), [7070]);
    assert_eq!(ports("tcp"), [0; 0]);
    assert_eq!(ports("consumer"), [80]);
    // Of one kind both count.
    assert_eq!((ports("lost"), ports("partly")), (vec![0, 80], vec![80]));
}

/// A waypoint has an identity of its own, and reaches what the author of a route may not.
#[test]
fn another_namespace_is_reached_by_its_leave_alone() {
    let told = run(&all()).told();
    let consumer = &told["shop/w"].routes["HTTPRoute/web/consumer/shop/echo.shop.svc.cluster.local/80"];
    let [own, beside] = consumer.http_rules[0].backends.as_slice() else { panic!("{consumer:?}") };
    assert!(own.broken.is_empty() && own.service_hostname == "echo.shop.svc.cluster.local");
    assert!(beside.broken.contains("no ReferenceGrant") && beside.service_hostname.is_empty());
    assert_eq!((consumer.consumer_namespace.as_str(), consumer.created), ("web", i64::MAX));
}

/// Nothing that was written is skipped: a rule that cannot be carried out answers where it may have matched. W33.
#[test]
fn a_broken_rule_answers_with_an_error() {
    use culvert_proto::waypoint::filter::Kind;
    let told = run(&all()).told();
    let partly = &told["shop/w"].routes["HTTPRoute/shop/partly/shop/v2.shop.svc.cluster.local/80"];
    let [good, bad, expression] = partly.http_rules.as_slice() else { panic!("{partly:?}") };
    assert!(good.filters.is_empty() && good.backends.len() == 1);
    assert!(matches!(bad.filters[0].kind, Some(Kind::Broken(_))) && bad.backends.is_empty());
    assert_eq!(bad.matches[0].method, "", "what cannot be read matches anything");
    assert!(bad.matches[0].path.is_some());
    assert!(matches!(expression.filters[0].kind, Some(Kind::Broken(_))));
    assert!(expression.matches[0].path.is_none() && expression.matches[0].headers.len() == 1);
    let wholly = &told["shop/w"].routes["HTTPRoute/shop/wholly/shop/v2.shop.svc.cluster.local/0"];
    assert!(wholly.http_rules.iter().all(|rule| matches!(rule.filters[0].kind, Some(Kind::Broken(_)))));
}

/// One route: its kind (an index), whether it is a consumer's, and its port.
type Wish = (usize, bool, Option<u32>);

const ORDER: [&str; 4] = ["GRPCRoute", "HTTPRoute", "TLSRoute", "TCPRoute"];
const PORTS: [u32; 3] = [80, 8080, 7070];

fn wished(wishes: &[Wish]) -> World {
    let mut text = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: w, namespace: shop}\nspec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n---\napiVersion: v1\nkind: Service\nmetadata: {name: s, namespace: shop, labels: {istio.io/use-waypoint: w}}\nspec: {clusterIP: 198.18.128.1, ports: [{name: a, port: 80}, {name: b, port: 8080}, {name: c, port: 7070}]}\n".to_owned();
    for (index, (kind, consumer, port)) in wishes.iter().enumerate() {
        let namespace = if *consumer { "web" } else { "shop" };
        let port = port.map(|port| format!(", port: {port}")).unwrap_or_default();
        let hosts = if ORDER[*kind] == "TLSRoute" { "hostnames: [a.example], " } else { "" };
        text += &format!(
            "---\napiVersion: gateway.networking.k8s.io/v1\nkind: {}\nmetadata: {{name: r{index}, namespace: {namespace}}}\nspec: {{{hosts}parentRefs: [{{group: \"\", kind: Service, name: s, namespace: shop{port}}}], rules: [{{backendRefs: [{{name: s, namespace: shop, port: 80}}]}}]}}\n",
            ORDER[*kind]
        );
    }
    world(&text)
}

proptest! {
    /// GEP-1294, said of each port by itself: of the routes that are for it, or for every port, those of the first kind count, for
    /// producers and consumers apart. A waypoint that takes what names a port, and where nothing does what names none, comes to the
    /// same; and who counts nowhere is told so. W32.
    #[test]
    fn at_each_port_the_right_routes_count(
        wishes in prop::collection::vec(
            (0_usize..4, any::<bool>(), prop::option::of(prop::sample::select(PORTS.to_vec()))), 0..7,
        )
    ) {
        let translation = run(&wished(&wishes));
        let told = translation.told();
        let messages: Vec<_> = told.get("shop/w").into_iter().flat_map(|it| it.routes.values()).collect();
        let mut counts = vec![false; wishes.len()];
        for port in PORTS {
            let named = messages.iter().any(|it| it.port == port);
            for consumer in [false, true] {
                let mut got: Vec<&str> = messages
                    .iter()
                    .filter(|it| it.port == if named { port } else { 0 })
                    .filter(|it| it.consumer_namespace.is_empty() != consumer)
                    .map(|it| it.name.as_str())
                    .collect();
                got.sort_unstable();
                let here = |wish: &&(usize, &Wish)| {
                    let (_, of, at) = *wish.1;
                    of == consumer && at.is_none_or(|at| at == port)
                };
                let all: Vec<(usize, &Wish)> = wishes.iter().enumerate().collect();
                let first = all.iter().filter(here).map(|(_, wish)| wish.0).min();
                let mut expected = Vec::new();
                for (index, _) in all.iter().filter(here).filter(|(_, wish)| Some(wish.0) == first) {
                    counts[*index] = true;
                    expected.push(format!("r{index}"));
                }
                prop_assert_eq!(got, expected, "{} {}", port, consumer);
            }
        }
        // The port of no route's own stands for those that the service may get later.
        for (index, (kind, consumer, port)) in wishes.iter().enumerate() {
            let before = |other: &Wish| other.1 == *consumer && other.2.is_none() && other.0 < *kind;
            counts[index] |= port.is_none() && !wishes.iter().any(before);
            let namespace = if *consumer { "web" } else { "shop" };
            let status = translation.routed.status.iter().find(|((of, in_namespace, name), _)| {
                of.kind() == ORDER[*kind] && in_namespace == namespace && *name == format!("r{index}")
            });
            let accepted = &status.unwrap().1[0].accepted;
            prop_assert_eq!(accepted.is, counts[index], "{} {:?}", index, accepted);
        }
    }
}

/// What a waypoint is told it can read: what it would not carry out is broken already, and the status has said so.
#[test]
fn a_waypoint_reads_all_that_it_is_told() {
    let translation = run(&all());
    let mut refused = Vec::new();
    for told in translation.told().values() {
        for (name, route) in &told.routes {
            let read = culvert_model::wire::route(name, &route.encode_to_vec());
            refused.extend(read.error.map(|error| error.to_string()));
        }
        for (name, policy) in &told.policies {
            let read = culvert_model::wire::request::decode(name, &policy.encode_to_vec());
            refused.extend(read.error.map(|error| error.to_string()));
        }
    }
    assert_eq!(refused, [""; 0]);
}

/// A policy that the loader takes and a waypoint cannot read denies, and says so.
#[test]
fn what_a_waypoint_cannot_read_of_a_policy_is_said() {
    let text = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\nspec: {targetRefs: [{kind: Service, group: \"\", name: s}], rules: [{to: [{operation: {paths: [no-slash]}}]}]}\n";
    let mut world = wished(&[]);
    world.objects.extend(crate::index::by_key(parse_file("p", text).objects));
    let status = &run(&world).policy_status[0];
    assert_eq!((status.accepted, status.reason), (true, "UnsupportedValue"));
    assert!(
        status.message.contains("denies everything") && status.message.contains("no-slash"),
        "{status:?}"
    );
}
