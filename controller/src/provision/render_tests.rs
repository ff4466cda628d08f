use clap::Parser;
use culvert_k8s_api::Object;
use culvert_k8s_api::manifest::parse_file;

use super::super::overlay;
use super::*;

pub(crate) fn settings() -> Settings {
    let map = |value: Value| value.as_object().unwrap().clone();
    Settings {
        image: "registry.example/culvert/waypoint:1.2.3".to_owned(),
        pull_policy: "IfNotPresent".to_owned(),
        pull_secrets: vec!["registry".to_owned()],
        resources: map(
            json!({"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}}),
        ),
        scheduling: map(json!({"nodeSelector": {"kubernetes.io/os": "linux"}})),
        env: vec![(
            "XDS_ADDRESS".to_owned(),
            "https://culvert-controller.culvert-system.svc:15012".to_owned(),
        )],
        grace: 30,
        cluster_domain: "cluster.local".to_owned(),
    }
}

pub(crate) fn gateway(metadata: &str, spec: &str) -> Gateway {
    let text = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: w, namespace: shop, uid: u-1{metadata}}}\nspec: {{gatewayClassName: culvert-waypoint, listeners: [{{name: mesh, port: 15008, protocol: HBONE}}]{spec}}}\n"
    );
    let parsed = parse_file("g.yaml", &text);
    assert_eq!(parsed.errors, [], "{text}");
    match &parsed.objects[0].object {
        Object::Gateway(it) => (**it).clone(),
        other => panic!("{other:?}"),
    }
}

fn overlays(pairs: &[(&str, &str)]) -> Overlays {
    overlay::read(&pairs.iter().map(|(key, text)| ((*key).to_owned(), (*text).to_owned())).collect()).unwrap()
}

fn rendered(gateway: &Gateway, overlays: &[&Overlays]) -> Value {
    render(gateway, 15008, overlays, &settings())
        .unwrap()
        .into_iter()
        .map(|it| Value::from(it.object))
        .collect()
}

fn part(all: &Value, kind: &str) -> Value {
    all.as_array().unwrap().iter().find(|it| it["kind"] == kind).cloned().unwrap_or_default()
}

/// D57, D58, D59. R17.
#[test]
fn a_gateway_becomes_these_objects() {
    let all = rendered(&gateway("", ""), &[]);
    insta::assert_snapshot!("gateway", serde_json::to_string_pretty(&all).unwrap());
}

/// D60.
#[test]
fn infrastructure_and_overlays_are_laid_over_it() {
    let it = gateway(
        "",
        ", infrastructure: {labels: {team: a, istio.io/dataplane-mode: ambient}, annotations: {note: b}}",
    );
    let class =
        overlays(&[("deployment", "spec: {replicas: 2, template: {spec: {priorityClassName: high}}}")]);
    let own = overlays(&[
        (
            "deployment",
            "metadata: {name: other, labels: {gateway.istio.io/managed: me}, ownerReferences: [{uid: x}]}\nspec:\n  replicas: 3\n  template:\n    spec:\n      containers:\n      - name: waypoint\n        resources: {limits: {memory: 2Gi, cpu: null}}\n",
        ),
        ("service", "spec: {ports: [{port: 80, name: more}]}"),
        ("serviceAccount", "metadata: {annotations: {example.com/role: r}}"),
        ("horizontalPodAutoscaler", "spec: {minReplicas: 2, maxReplicas: 5}"),
        ("podDisruptionBudget", "spec: {minAvailable: 1}"),
    ]);
    let all = rendered(&it, &[&class, &own]);
    insta::assert_snapshot!("overlays", serde_json::to_string_pretty(&all).unwrap());
}

/// D60: whose an object is and what it is called is not an overlay's to say.
#[test]
fn an_overlay_does_not_rename_disown_or_relabel() {
    let own = overlays(&[(
        "service",
        "metadata: {name: other, namespace: elsewhere, finalizers: [x/y], ownerReferences: [{uid: x, name: z}], labels: {gateway.istio.io/managed: me, gateway.networking.k8s.io/gateway-name: q, mine: yes-it-is}}\nstatus: {loadBalancer: {}}",
    )]);
    let service = part(&rendered(&gateway("", ""), &[&own]), "Service");
    let metadata = &service["metadata"];
    assert_eq!((&metadata["name"], &metadata["namespace"]), (&json!("w"), &json!("shop")));
    assert_eq!(metadata["ownerReferences"].as_array().map(Vec::len), Some(1));
    assert_eq!(metadata["ownerReferences"][0]["uid"], "u-1");
    assert_eq!(metadata["labels"][labels::GATEWAY_MANAGED], gateways::MANAGED);
    assert_eq!(metadata["labels"][labels::GATEWAY_NAME], "w");
    assert_eq!(metadata["labels"]["mine"], "yes-it-is");
    assert!(metadata.get("finalizers").is_none() && service.get("status").is_none());
}

/// D62.
#[test]
fn annotations_change_name_account_and_type() {
    let it = gateway(
        ", annotations: {gateway.istio.io/name-override: other, gateway.istio.io/service-account: theirs, networking.istio.io/service-type: LoadBalancer}",
        "",
    );
    let all = rendered(&it, &[]);
    assert_eq!(part(&all, "ServiceAccount"), Value::Null, "theirs exists");
    let deployment = part(&all, "Deployment");
    assert_eq!(deployment["metadata"]["name"], "other");
    // Bindings are sent by the name of the Service.
    let env = deployment["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
    assert!(env.contains(&json!({ "name": "GATEWAY_SERVICE", "value": "other" })), "{env:?}");
    assert_eq!(deployment["spec"]["template"]["spec"]["serviceAccountName"], "theirs");
    assert_eq!(part(&all, "Service")["spec"]["type"], "LoadBalancer");
    let same = gateway(", annotations: {gateway.istio.io/service-account: w}", "");
    assert_ne!(
        part(&rendered(&same, &[]), "ServiceAccount"),
        Value::Null,
        "the one that is made has that name"
    );
    let odd = gateway(", annotations: {networking.istio.io/service-type: ExternalName}", "");
    let error = render(&odd, 15008, &[], &settings()).unwrap_err();
    assert!(error.message.contains("service-type") && error.message.contains("ExternalName"), "{error:?}");
}

/// D57: clients use the listener's port, the program its own.
#[test]
fn the_service_has_the_port_of_the_listener() {
    let all = render(&gateway("", ""), 443, &[], &settings()).unwrap();
    let service = all.iter().find(|it| it.part == Part::Service).unwrap();
    let ports = &service.object["spec"]["ports"];
    assert_eq!((&ports[1]["port"], &ports[1]["targetPort"]), (&json!(443), &json!(15008)));
}

#[test]
fn a_variable_that_is_given_again_is_there_once() {
    let mut again = settings();
    again
        .env
        .extend([("XDS_ADDRESS", "mine"), ("NODE_NAME", "here")].map(|(a, b)| (a.to_owned(), b.to_owned())));
    let all = render(&gateway("", ""), 15008, &[], &again).unwrap();
    let deployment = all.iter().find(|it| it.part == Part::Deployment).unwrap();
    let env = deployment.object["spec"]["template"]["spec"]["containers"][0]["env"].as_array().unwrap();
    for (name, value) in [("XDS_ADDRESS", "mine"), ("NODE_NAME", "here")] {
        let of: Vec<&Value> = env.iter().filter(|it| it["name"] == name).collect();
        assert_eq!(of, [&json!({"name": name, "value": value})]);
    }
}

/// D63: what the chart changes changes what is wanted.
#[test]
fn another_image_is_another_deployment() {
    let image = |settings: &Settings| {
        let all = render(&gateway("", ""), 15008, &[], settings).unwrap();
        let deployment = all.iter().find(|it| it.part == Part::Deployment).unwrap();
        deployment.object["spec"]["template"]["spec"]["containers"][0]["image"].clone()
    };
    let mut newer = settings();
    newer.image = "registry.example/culvert/waypoint:1.2.4".to_owned();
    assert_eq!(image(&settings()), "registry.example/culvert/waypoint:1.2.3");
    assert_eq!(image(&newer), newer.image);
}

/// What the program reads is there, from what the chart gives the controller.
#[test]
fn a_waypoint_is_told_all_that_it_reads() {
    let args = crate::args::Args::parse_from([
        "controller",
        "--server-name=culvert-controller.culvert-system.svc",
        "--waypoint-env=CLUSTER_ID=one",
        "--waypoint-env=NETWORK=",
        "--waypoint-env=LOG_LEVEL=info",
        "--waypoint-env=LOG_FORMAT=text",
    ]);
    let rendered = render(&gateway("", ""), 15008, &[], &args.waypoints()).unwrap();
    let all: Value = rendered.into_iter().map(|it| Value::from(it.object)).collect();
    let container = &part(&all, "Deployment")["spec"]["template"]["spec"]["containers"][0];
    assert_eq!(container["args"], json!(["proxy"]));
    let env = container["env"].as_array().unwrap();
    let value = |name: &str| {
        let it = env.iter().find(|it| it["name"] == name).unwrap_or_else(|| panic!("{name} is missing"));
        it["value"].as_str().or(it["valueFrom"]["fieldRef"]["fieldPath"].as_str()).unwrap().to_owned()
    };
    for (name, expected) in [
        ("NODE_NAME", "spec.nodeName"),
        ("POD_NAME", "metadata.name"),
        ("POD_NAMESPACE", "metadata.namespace"),
        ("INSTANCE_IP", "status.podIP"),
        ("SERVICE_ACCOUNT", "spec.serviceAccountName"),
        ("GATEWAY_NAME", "w"),
        ("CLUSTER_ID", "one"),
        ("NETWORK", ""),
        ("TRUST_DOMAIN", "cluster.local"),
        ("DOMAIN_SUFFIX", "cluster.local"),
        ("XDS_ADDRESS", "https://culvert-controller.culvert-system.svc:15012"),
        ("XDS_SERVER_NAME", "culvert-controller.culvert-system.svc"),
        ("XDS_ROOT_CERT", "/var/run/secrets/istio/root-cert.pem"),
        ("TOKEN_FILE", "/var/run/secrets/tokens/istio-token"),
        ("LOG_LEVEL", "info"),
        ("LOG_FORMAT", "text"),
        ("TERMINATION_GRACE_PERIOD_SECONDS", "30"),
    ] {
        assert_eq!(value(name), expected, "{name}");
    }
    let mut names: Vec<&str> = env.iter().filter_map(|it| it["name"].as_str()).collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count, "the API server takes no name twice");
}
