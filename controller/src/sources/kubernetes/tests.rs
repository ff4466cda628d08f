//! Conversion, lists and bursts, without an API server.

use culvert_k8s_api::status::{Phase, Redirection};
use culvert_k8s_api::{Kind, Object, ObjectKey};
use serde_json::{Value, json};

use super::*;

fn kind(of: &str) -> Watched {
    let mesh = |group: &str, is| Watched {
        group: group.to_owned(),
        version: "v1".to_owned(),
        kind: of.to_owned(),
        plural: of.to_lowercase(),
        is,
        optional: is == Kind::OtherNetworkPolicy,
    };
    match of {
        "AuthorizationPolicy" => mesh("security.istio.io", Kind::AuthorizationPolicy),
        "PeerAuthentication" => mesh("security.istio.io", Kind::PeerAuthentication),
        "Gateway" => mesh("gateway.networking.k8s.io", Kind::Gateway),
        "CiliumNetworkPolicy" => mesh("cilium.io", Kind::OtherNetworkPolicy),
        _ => kinds::builtin().into_iter().find(|it| it.kind == of).unwrap(),
    }
}

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

fn pod(name: &str, ip: &str, redirection: &str) -> DynamicObject {
    object(json!({
        "metadata": {
            "name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": {"app": "web"},
            "annotations": {"ambient.istio.io/redirection": redirection, "kubectl.kubernetes.io/last-applied-configuration": "{}"},
            "managedFields": [{"manager": "kubelet"}], "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "nodeName": "node-a", "serviceAccountName": "web", "volumes": [{"name": "v"}], "dnsPolicy": "ClusterFirst",
            "containers": [{"name": "c", "image": "i", "args": ["x"], "env": [{"name": "A", "value": "b"}],
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}],
        },
        "status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}, {"ip": "fd00::1"}],
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}],
        },
    }))
}

fn policy(spec: Value) -> DynamicObject {
    object(json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}))
}

fn apply(store: &mut Store, of: &Watched, event: Event<DynamicObject>) -> bool {
    store.apply(of, said(of, event))
}

fn list(store: &mut Store, of: &Watched, objects: Vec<DynamicObject>) {
    apply(store, of, Event::Init);
    for object in objects {
        apply(store, of, Event::InitApply(object));
    }
    apply(store, of, Event::InitDone);
}

fn key(is: Kind, name: &str) -> ObjectKey {
    ObjectKey { kind: is, namespace: "shop".to_owned(), name: name.to_owned() }
}

#[test]
fn of_a_gateway_stays_where_it_is_too() {
    let gateway = object(json!({
        "metadata": {"name": "w", "namespace": "shop", "generation": 4},
        "spec": {"gatewayClassName": "c", "listeners": [{"name": "m", "port": 15008, "protocol": "HBONE"}]},
        "status": {"addresses": [{"type": "IPAddress", "value": "10.0.0.9"}], "listeners": [{"name": "m"}],
            "conditions": [{"type": "Programmed", "status": "True", "reason": "Programmed"}]},
    }));
    let converted = convert(&kind("Gateway"), gateway).unwrap();
    let Object::Gateway(it) = &converted.manifest.object else { panic!("{converted:?}") };
    assert!(it.status.programmed && it.metadata.generation == Some(4));
    assert_eq!(it.status.addresses[0].value, "10.0.0.9");
}

#[test]
fn of_a_pod_stays_what_the_mesh_reads() {
    let converted = convert(&kind("Pod"), pod("web", "10.0.0.1", "enabled")).unwrap();
    let status = converted.pod.unwrap();
    assert_eq!((status.phase, status.ready, status.deleted), (Phase::Running, true, false));
    assert_eq!(status.pod_ips.len(), 2);
    assert_eq!((status.uid.as_str(), status.node_name.as_str()), ("uid-web", "node-a"));
    assert_eq!(converted.redirection.unwrap().redirection, Redirection::Enabled);
    let Object::Pod(pod) = &converted.manifest.object else { panic!() };
    assert_eq!(pod.service_account(), "web");
    assert_eq!(pod.named_port("http").unwrap().get(), 8080);
    assert!(pod.metadata.annotations.is_empty() && pod.spec.containers[0].env.is_empty());
    assert_eq!(pod.metadata.creation_timestamp.as_deref(), Some("2026-01-01T00:00:00Z"));
}

#[test]
fn nothing_is_served_before_each_kind_was_listed() {
    let mut store = Store::default();
    let (pods, services) = (kind("Pod"), kind("Service"));
    assert_eq!(store.world(), None);
    store.apply(&pods, Said::Begun);
    store.apply(&services, Said::Begun);
    list(&mut store, &pods, vec![pod("web", "10.0.0.1", "enabled")]);
    assert_eq!(store.world(), None);
    assert_eq!(store.missing().map(|it| it.plural.as_str()).collect::<Vec<_>>(), ["services"]);
    list(&mut store, &services, vec![]);
    assert_eq!(store.world().unwrap().pods.len(), 1);
}

/// A kind that is defined later keeps nothing back, and one that is served in another version loses nothing meanwhile.
#[test]
fn kinds_that_come_later_or_change_their_version() {
    let mut store = Store::default();
    let (pods, policies) = (kind("Pod"), kind("AuthorizationPolicy"));
    list(&mut store, &pods, vec![pod("web", "10.0.0.1", "enabled")]);
    assert_eq!(store.world().unwrap().objects.len(), 1);
    store.apply(&policies, Said::Begun);
    assert_eq!(store.world().unwrap().objects.len(), 1);
    list(&mut store, &policies, vec![policy(json!({}))]);
    assert_eq!(store.world().unwrap().objects.len(), 2);
    let newer = Watched { version: "v2".to_owned(), ..policies.clone() };
    store.apply(&newer, Said::Replaces(policies));
    apply(&mut store, &newer, Event::Init);
    assert_eq!(store.world().unwrap().objects.len(), 2, "known until the new list says otherwise");
    apply(&mut store, &newer, Event::InitDone);
    assert_eq!(store.world().unwrap().objects.len(), 1);
}

/// D30: what is in a namespace that is not selected is not there, and is as soon as it is, whichever was read first.
#[test]
fn namespaces_that_are_not_selected_are_not_there() {
    let selection = Selection::new(vec!["mesh=on".parse().unwrap()], ["istio-system".to_owned()]);
    let mut store = Store::new(selection);
    let (pods, namespaces, policies) = (kind("Pod"), kind("Namespace"), kind("AuthorizationPolicy"));
    let shop = |mesh: &str| object(json!({"metadata": {"name": "shop", "labels": {"mesh": mesh}}}));
    let root = object(json!({"metadata": {"name": "everywhere", "namespace": "istio-system"}, "spec": {}}));
    list(&mut store, &pods, vec![pod("web", "10.0.0.1", "enabled")]);
    list(&mut store, &policies, vec![policy(json!({})), root]);
    list(&mut store, &namespaces, vec![shop("off")]);
    let seen = |store: &mut Store| {
        let world = store.world().unwrap();
        (world.objects.len(), world.pods.len(), world.redirection.len())
    };
    assert_eq!(seen(&mut store), (2, 0, 0), "the namespace itself, and the root namespace's policy");
    apply(&mut store, &namespaces, Event::Apply(shop("on")));
    assert_eq!(seen(&mut store), (4, 1, 1));
    apply(&mut store, &namespaces, Event::Apply(shop("off")));
    assert_eq!(seen(&mut store), (2, 0, 0));
    // What happens meanwhile counts.
    apply(&mut store, &pods, Event::Apply(pod("other", "10.0.0.2", "")));
    apply(&mut store, &pods, Event::Delete(pod("web", "10.0.0.1", "")));
    apply(&mut store, &namespaces, Event::Apply(shop("on")));
    assert_eq!(seen(&mut store), (4, 1, 0));
    assert!(store.world().unwrap().pods.contains_key(&("shop".to_owned(), "other".to_owned())));
    apply(&mut store, &namespaces, Event::Delete(shop("on")));
    assert_eq!(seen(&mut store), (1, 0, 0));
}

/// D22. Kubernetes' own slices of Services with a selector are not even asked for.
#[test]
fn only_slices_that_say_something_are_asked_for() {
    assert_eq!(
        kind("EndpointSlice").labels().unwrap(),
        "kubernetes.io/service-name,endpointslice.kubernetes.io/managed-by!=endpointslice-controller.k8s.io"
    );
    assert_eq!(kind("Pod").labels(), None);
    let slice = object(json!({
        "metadata": {"name": "db-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "db"},
            "managedFields": [{"manager": "kubectl"}], "ownerReferences": [{"kind": "Service"}]},
        "addressType": "IPv4", "ports": [{"name": "", "port": 5432, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": true}, "zone": "a"}],
    }));
    let converted = convert(&kind("EndpointSlice"), slice).unwrap();
    let Object::EndpointSlice(slice) = &converted.manifest.object else { panic!("{converted:?}") };
    assert_eq!((slice.service(), slice.endpoints[0].ip()), (Some("db"), Some("192.0.2.1".parse().unwrap())));
}

#[test]
fn a_list_replaces_what_was_known_at_its_end_and_not_before() {
    let mut store = Store::default();
    let pods = kind("Pod");
    list(&mut store, &pods, vec![pod("a", "10.0.0.1", "enabled"), pod("b", "10.0.0.2", "enabled")]);
    let before = store.world().unwrap();
    assert_eq!((before.pods.len(), before.redirection.len()), (2, 2));
    // 410: it is listed again. Half way nothing is missing.
    apply(&mut store, &pods, Event::Init);
    apply(&mut store, &pods, Event::InitApply(pod("a", "10.0.0.1", "enabled")));
    assert_eq!(store.world().unwrap(), before);
    apply(&mut store, &pods, Event::InitApply(pod("c", "10.0.0.3", "pending")));
    apply(&mut store, &pods, Event::InitDone);
    let after = store.world().unwrap();
    let names: Vec<_> = after.pods.keys().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["a", "c"]);
    assert_eq!(after.objects.len(), 2);
    assert_eq!(after.redirection.len(), 2);
    let of = |world: &World| std::sync::Arc::clone(&world.objects[&key(Kind::Pod, "a")]);
    assert!(std::sync::Arc::ptr_eq(&of(&before), &of(&after)), "what did not change keeps its place");
    // The agent takes its word back, then the pod goes.
    apply(&mut store, &pods, Event::Apply(pod("a", "10.0.0.1", "")));
    assert_eq!(store.world().unwrap().redirection.len(), 1);
    apply(&mut store, &pods, Event::Delete(pod("c", "10.0.0.3", "pending")));
    let last = store.world().unwrap();
    assert_eq!((last.pods.len(), last.redirection.len(), last.objects.len()), (1, 0, 1));
}

#[test]
fn a_bad_policy_leaves_the_last_good_one_and_else_denies() {
    let mut store = Store::default();
    let policies = kind("AuthorizationPolicy");
    let bad = || {
        policy(
            json!({"selector": {"matchLabels": {"app": "web"}}, "action": "DENY", "rules": [{"form": []}]}),
        )
    };
    list(&mut store, &policies, vec![bad()]);
    let world = store.world().unwrap();
    assert!(
        world.errors[0].to_string().contains("AuthorizationPolicy shop/p: spec.rules[0]"),
        "{:?}",
        world.errors
    );
    let Object::AuthorizationPolicy(it) = &world.objects[&key(Kind::AuthorizationPolicy, "p")].object else {
        panic!()
    };
    assert!(it.spec.rules.is_empty() && it.spec.selector.is_some());
    assert_eq!(format!("{:?}", it.spec.action), "Allow");
    let good = policy(json!({"action": "DENY", "rules": [{"to": [{"operation": {"ports": ["80"]}}]}]}));
    apply(&mut store, &policies, Event::Apply(good));
    let mended = store.world().unwrap();
    assert!(mended.errors.is_empty());
    apply(&mut store, &policies, Event::Apply(bad()));
    let kept = store.world().unwrap();
    assert_eq!(kept.objects, mended.objects);
    assert_eq!(kept.errors.len(), 1);
    apply(&mut store, &policies, Event::Delete(bad()));
    let gone = store.world().unwrap();
    assert!(gone.objects.is_empty() && gone.errors.is_empty());
}

#[test]
fn a_network_policy_that_may_not_be_read_may_select_anything() {
    let mut store = Store::default();
    let others = kind("CiliumNetworkPolicy");
    store.apply(&others, Said::Begun);
    store.apply(&others, Said::Denied);
    assert_eq!(store.world().unwrap().objects.len(), 1);
    list(&mut store, &others, vec![]);
    assert!(store.world().unwrap().objects.is_empty());
    list(&mut store, &others, vec![object(json!({"metadata": {"name": "x", "namespace": "shop"}}))]);
    assert_eq!(store.world().unwrap().objects.len(), 1);
    store.apply(&others, Said::Gone);
    assert!(store.world().unwrap().objects.is_empty());
}

/// D12.
#[tokio::test(start_paused = true)]
async fn a_burst_is_one_change_and_an_endless_one_is_taken_in_in_time() {
    let (sender, messages) = mpsc::channel(MESSAGES);
    let mut source = Kubernetes::of(messages);
    let pods = kind("Pod");
    for event in [Event::Init, Event::InitApply(pod("a", "10.0.0.1", "")), Event::InitDone] {
        sender.send((pods.clone(), said(&pods, event))).await.unwrap();
    }
    let started = Instant::now();
    assert!(source.changed().await);
    assert_eq!(started.elapsed(), QUIET);
    assert_eq!(source.world().unwrap().pods.len(), 1);
    let writer = async {
        for number in 0..100 {
            let event = Event::Apply(pod(&format!("p{number}"), "10.0.0.2", ""));
            sender.send((pods.clone(), said(&pods, event))).await.unwrap();
            tokio::time::sleep(QUIET / 2).await;
        }
    };
    let reader = async {
        let started = Instant::now();
        assert!(source.changed().await);
        assert!(started.elapsed() <= LONGEST + QUIET, "{:?}", started.elapsed());
        source.world().unwrap().pods.len()
    };
    let ((), seen) = tokio::join!(writer, reader);
    assert!((15..=25).contains(&seen), "{seen}");
}
