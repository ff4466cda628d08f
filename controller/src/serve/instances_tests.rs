use std::sync::Arc;

use culvert_k8s_api::manifest::parse_file;
use culvert_k8s_api::status::PodStatus;

use super::*;
use crate::auth::NodeName;
use crate::index::by_key;

const MANIFESTS: &str = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: other, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: w, namespace: bank}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: foreign, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: web, namespace: shop}
spec: {gatewayClassName: culvert-waypoint, listeners: [{name: web, port: 80, protocol: HTTP}]}
---
apiVersion: v1
kind: Pod
metadata: {name: w-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: w}}
spec: {containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: foreign-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: foreign}}
spec: {containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-0, namespace: shop, labels: {gateway.networking.k8s.io/gateway-name: web}}
spec: {containers: [{name: c}]}
---
apiVersion: v1
kind: Pod
metadata: {name: plain, namespace: shop}
spec: {containers: [{name: c}]}
"#;

fn world(phase: Phase) -> index::World {
    let parsed = parse_file("f", MANIFESTS);
    assert_eq!(parsed.errors, []);
    let mut world = index::World { objects: by_key(parsed.objects), ..index::World::default() };
    for name in ["w-0", "foreign-0", "web-0", "plain"] {
        let status = PodStatus {
            uid: format!("uid-{name}"),
            namespace: "shop".into(),
            name: name.into(),
            node_name: "node-a".into(),
            pod_ips: Vec::new(),
            phase,
            ready: false,
            netns: None,
            deleted: false,
        };
        world.pods.insert(("shop".into(), name.into()), status);
    }
    world
}

fn own(node: &str, namespace: &str, pod: &str) -> Caller {
    let grant = Grant::Own { namespace: namespace.into(), account: "any".into(), pod: pod.into() };
    Caller { node: NodeName::from(node), grant }
}

/// D15. Of whom a stream is asked for, and as what.
#[test]
fn a_pod_is_admitted_as_the_waypoint_that_it_is() {
    let running = Arc::new(world(Phase::Running));
    let ask = |compat: bool, caller: &Caller, said: Option<Option<&str>>| {
        World { objects: &running, compat }.admits(caller, said).is_ok()
    };
    let (waypoint, node) = (own("node-a", "shop", "w-0"), Caller::node(NodeName::from("node-a")));
    for (caller, said, good) in [
        // Before it names its node, and when it does.
        (&waypoint, None, true),
        (&waypoint, Some(Some("shop/w")), true),
        (&waypoint, Some(None), false),
        (&waypoint, Some(Some("")), false),
        (&waypoint, Some(Some("shop/other")), false),
        (&waypoint, Some(Some("bank/w")), false),
        (&waypoint, Some(Some("shop/none")), false),
        // The token says where: the pod must be there.
        (&own("node-b", "shop", "w-0"), None, false),
        (&own("node-b", "shop", "w-0"), Some(Some("shop/w")), false),
        // A name in another namespace, a pod that nobody knows, and pods that are no waypoints.
        (&own("node-a", "bank", "w-0"), Some(Some("bank/w")), false),
        (&own("node-a", "shop", "gone"), Some(Some("shop/w")), false),
        (&own("node-a", "shop", "plain"), None, false),
        (&own("node-a", "shop", "plain"), Some(Some("shop/w")), false),
        (&own("node-a", "shop", "web-0"), Some(Some("shop/web")), false),
        (&own("node-a", "shop", "foreign-0"), Some(Some("shop/foreign")), false),
        // A node's proxy: as itself anything, as a waypoint only where one is.
        (&node, None, true),
        (&node, Some(None), true),
        (&node, Some(Some("shop/w")), true),
        (&node, Some(Some("shop/other")), false),
        (&Caller::node(NodeName::from("node-b")), Some(Some("shop/w")), false),
        (&Caller::node(NodeName::from("node-b")), Some(None), true),
    ] {
        assert_eq!(ask(false, caller, said), good, "{caller:?} {said:?}");
    }
    assert!(
        ask(true, &own("node-a", "shop", "foreign-0"), Some(Some("shop/foreign"))),
        "with compat it is ours"
    );
}

#[test]
fn a_pod_that_has_ended_is_no_waypoint() {
    for (phase, good) in
        [(Phase::Pending, true), (Phase::Running, true), (Phase::Failed, false), (Phase::Succeeded, false)]
    {
        let world = world(phase);
        let asked = World { objects: &world, compat: false }
            .admits(&own("node-a", "shop", "w-0"), Some(Some("shop/w")));
        assert_eq!(asked.is_ok(), good, "{phase:?}");
    }
}
