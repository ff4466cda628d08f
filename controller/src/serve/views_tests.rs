use std::collections::BTreeMap;

use culvert_k8s_api::manifest::parse_file;
use culvert_proto::{ADDRESS_TYPE_URL, POLICY_TYPE_URL, ROUTE_TYPE_URL};
use prost_types::{Struct, Value};

use super::*;
use crate::index::{Index, World, by_key};
use crate::translate::MeshSettings;

const SHOP: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/use-waypoint: w}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Service
metadata: {name: echo, namespace: shop}
spec: {clusterIP: 198.18.128.1, selector: {app: echo}, ports: [{port: 80}]}
"#;

fn route(namespace: &str, header: &str) -> String {
    format!(
        "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {{name: r, namespace: {namespace}}}\nspec: {{parentRefs: [{{group: \"\", kind: Service, name: echo, namespace: shop}}], rules: [{{matches: [{{headers: [{{name: x, value: {header}}}]}}]}}]}}\n"
    )
}

fn world(more: &str) -> World {
    let parsed = parse_file("f", &format!("{SHOP}{more}"));
    assert_eq!(parsed.errors, []);
    World { objects: by_key(parsed.objects), ..World::default() }
}

fn node(gateway: Option<&str>) -> Node {
    let value = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
    let fields =
        gateway.map(|it| (GATEWAY_METADATA.to_owned(), value(it))).into_iter().collect::<BTreeMap<_, _>>();
    Node { metadata: Some(Struct { fields }), ..Node::default() }
}

fn names(set: &ResourceSet, type_url: &str) -> Vec<String> {
    set.of_type(type_url).keys().map(ToString::to_string).collect()
}

#[test]
fn a_waypoint_has_its_own_and_everyone_else_none_of_it() {
    let mut index = Index::new(MeshSettings::default(), 1);
    let first = index.apply(world(&route("shop", "a")));
    let publisher = Publisher::new(Arc::clone(&first));
    let views = publisher.views();
    let peer = Peer { name: "node-a".to_owned() };
    let of = |gateway: Option<&str>| views.resources(&peer, &node(gateway));
    let (own, other, everyone) = (of(Some("shop/w")), of(Some("shop/other")), of(None));
    let mine = own.borrow().clone();
    assert_eq!(names(&mine, ROUTE_TYPE_URL), ["HTTPRoute/shop/r/shop/echo.shop.svc.cluster.local/0"]);
    assert_eq!(mine.generation, first.generation);
    assert!(
        Arc::ptr_eq(&mine.types[ADDRESS_TYPE_URL], &first.set.types[ADDRESS_TYPE_URL]),
        "shared with everyone"
    );
    assert_eq!(names(&other.borrow(), ROUTE_TYPE_URL), [""; 0]);
    for type_url in [ROUTE_TYPE_URL, POLICY_TYPE_URL] {
        assert!(!everyone.borrow().types.contains_key(type_url));
    }

    // A route that changes is one resource, in one new generation, for whoever is connected.
    let second = index.apply(world(&format!("{}{}", route("shop", "a"), route("web", "b"))));
    assert_eq!(second.generation, first.generation + 1);
    publisher.publish(&second);
    let now = own.borrow().clone();
    assert_eq!(names(&now, ROUTE_TYPE_URL).len(), 2);
    let (name, kept) = now.types[ROUTE_TYPE_URL].iter().next().unwrap();
    assert_eq!(kept, &mine.types[ROUTE_TYPE_URL][name], "what did not change keeps its version");
    assert!(Arc::ptr_eq(&now.types[ADDRESS_TYPE_URL], &mine.types[ADDRESS_TYPE_URL]));
    assert_eq!(everyone.borrow().generation, second.generation);
    assert!(Arc::ptr_eq(&everyone.borrow().types[ADDRESS_TYPE_URL], &first.set.types[ADDRESS_TYPE_URL]));

    // The same again is nothing new; without routes there are none.
    let third = index.apply(world(&format!("{}{}", route("shop", "a"), route("web", "b"))));
    assert!(third.generation == second.generation && Arc::ptr_eq(&third.set, &second.set));
    let fourth = index.apply(world(""));
    publisher.publish(&fourth);
    assert_eq!(names(&own.borrow(), ROUTE_TYPE_URL), [""; 0]);
}

#[test]
fn nothing_is_kept_of_who_has_gone() {
    let mut index = Index::new(MeshSettings::default(), 1);
    let first = index.apply(world(&route("shop", "a")));
    let publisher = Publisher::new(Arc::clone(&first));
    let views = publisher.views();
    let peer = Peer { name: "node-a".to_owned() };
    let known = || views.state.lock().gateways.len();
    let own = views.resources(&peer, &node(Some("shop/w")));
    let again = views.resources(&peer, &node(Some("shop/w")));
    assert_eq!(known(), 1);
    drop(own);
    publisher.publish(&first);
    assert_eq!(known(), 1, "one listens still");
    drop(again);
    publisher.publish(&first);
    assert_eq!(known(), 0);
    let mut last = views.resources(&peer, &node(Some("shop/w")));
    last.borrow_and_update();
    drop(publisher);
    assert!(last.has_changed().is_err(), "its stream ends with the publisher");
}
