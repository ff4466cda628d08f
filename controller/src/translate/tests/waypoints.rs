//! Which waypoint proxies are told of, and what is said to people.

use super::super::waypoints::bindings;
use super::*;

fn all() -> World {
    let mut world = world(include_str!("../testdata/waypoints.yaml"));
    let pods = [("all", "w-0"), ("shop", "plain"), ("shop", "bound"), ("shop", "of-a-service-waypoint")];
    for (n, (namespace, name)) in pods.into_iter().chain([("shop", "lost"), ("all", "inherits")]).enumerate()
    {
        world = world.running(namespace, name, "node-a", &[&format!("100.64.1.{}", n + 2)]);
    }
    world
}

/// What proxies are told, of everything that may be bound.
fn told(translation: &Translation) -> Map<String, Value> {
    let one = |(name, it): (&String, &culvert_proto::workload::Address)| {
        let page = render::address(it);
        let of = page.get("service").or(page.get("workload")).unwrap();
        let weighted = of["weightedWaypoints"].as_array().cloned().unwrap_or_default();
        let told = if weighted.is_empty() { of["waypoint"].clone() } else { weighted.into() };
        (name.clone(), told)
    };
    translation.addresses.iter().map(one).collect()
}

/// D44 (all reasons but that of `exportTo`), W01, W02, W03, W04, W05, W06, W09, W11: a golden file of each binding, what
/// proxies are told of it and what people are.
#[test]
fn waypoint() {
    let world = all();
    let said: Map<String, Value> = bindings(&world, &MeshSettings::default())
        .into_iter()
        .map(|it| {
            let name = format!("{:?} {}/{}", it.kind, it.metadata.namespace, it.metadata.name);
            let bound = it.bound;
            (name, serde_json::json!([bound.accepted, bound.reason, bound.message]))
        })
        .collect();
    let page = serde_json::json!({ "told": told(&run(&world)), "said": said });
    insta::assert_snapshot!(serde_json::to_string_pretty(&page).unwrap());
}

/// D44, W03, W06: what was asked for and cannot be had refuses. A name that nothing can have says why.
#[test]
fn a_binding_that_cannot_be_had_is_sent_and_leads_nowhere() {
    let told = told(&run(&all()));
    for (bound, to) in [
        ("shop/missing.shop.svc.cluster.local", "shop/no-gateway.nowhere.shop.svc.cluster.local:15008"),
        ("shop/not-ready.shop.svc.cluster.local", "shop/renamed.shop.svc.cluster.local:443"),
        (
            "shop/no-listener.shop.svc.cluster.local",
            "shop/no-hbone-listener.web-only.shop.svc.cluster.local:15008",
        ),
        (
            "shop/elsewhere.shop.svc.cluster.local",
            "all/attachment-denied.everything.all.svc.cluster.local:15008",
        ),
        (
            "stranger/refused.stranger.svc.cluster.local",
            "infra/attachment-denied.shared.infra.svc.cluster.local:15008",
        ),
        ("Kubernetes//Pod/shop/lost", "shop/no-gateway.nowhere.shop.svc.cluster.local:15008"),
    ] {
        assert_eq!(told[bound], to, "{bound}");
    }
}

/// W09: both are sent with their shares, a canary that cannot be used is left out, and the first waypoint is sent in any case.
#[test]
fn a_canary_has_a_share_or_none() {
    let translation = run(&all());
    let told = told(&translation);
    let both =
        ["shop/w.shop.svc.cluster.local:15008 80", "shop/by-hand-canary.shop.svc.cluster.local:15008 20"];
    assert_eq!(told["shop/canary.shop.svc.cluster.local"], serde_json::json!(both));
    for bad in ["canary-itself", "canary-weight", "canary-lost", "canary-none"] {
        assert_eq!(
            told[&format!("shop/{bad}.shop.svc.cluster.local")],
            "shop/w.shop.svc.cluster.local:15008",
            "{bad}"
        );
    }
    let Some(address::Type::Service(service)) =
        &translation.addresses["shop/canary.shop.svc.cluster.local"].r#type
    else {
        panic!("no service")
    };
    assert!(service.waypoint.is_some(), "who knows no shares uses the first");
}

/// D61, D64: where a waypoint is follows from who runs it.
#[test]
fn a_waypoint_is_where_its_controller_says() {
    let told = told(&run(&all()));
    assert_eq!(told["shop/inherits.shop.svc.cluster.local"], "shop/w.shop.svc.cluster.local:15008");
    assert_eq!(told["shop/hand.shop.svc.cluster.local"], "infra/mine.infra.svc.cluster.local:15008");
    assert_eq!(told["team/admitted.team.svc.cluster.local"], "198.18.130.1:15008");
}
