use culvert_k8s_api::ObjectMeta;
use culvert_k8s_api::gateway::GatewayClassSpec;

use super::super::render::Invalid;
use super::super::render::tests::gateway as made;
use super::*;

fn provisioned(progress: Progress, available: u64) -> Provisioned {
    Provisioned {
        progress,
        hostname: Some("w.shop.svc.cluster.local".to_owned()),
        addresses: vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()],
        available,
        problem: String::new(),
    }
}

/// `type=status reason`, and the messages.
fn conditions(value: &Value) -> (Vec<String>, String) {
    let all = value.as_array().unwrap();
    let text = |it: &Value, field: &str| it[field].as_str().unwrap().to_owned();
    let said = |it: &Value| format!("{}={} {}", text(it, "type"), text(it, "status"), text(it, "reason"));
    (all.iter().map(said).collect(), all.iter().map(|it| text(it, "message")).collect::<Vec<_>>().join("; "))
}

fn of(gateway: &Gateway, is: Option<&Provisioned>) -> (Vec<String>, String, Value) {
    let status = Value::Object(super::gateway(gateway, is).status);
    let (conditions, messages) = conditions(&status["conditions"]);
    (conditions, messages, status)
}

/// D46.
#[test]
fn a_gateway_is_programmed_when_somebody_is_there() {
    let it = made("", "");
    let done = |available| provisioned(Progress::Done, available);
    let (all, _, status) = of(&it, Some(&done(2)));
    assert_eq!(all, ["Accepted=True Accepted", "Programmed=True Programmed"]);
    let ip = |value: &str| json!({"type": "IPAddress", "value": value});
    assert_eq!(status["addresses"], json!([ip("10.0.0.9"), ip("fd00::9")]));
    let listener = &status["listeners"][0];
    assert_eq!((&listener["name"], &listener["attachedRoutes"]), (&json!("mesh"), &json!(0)));
    assert_eq!(listener["supportedKinds"], json!([]));
    assert_eq!(
        conditions(&listener["conditions"]).0,
        [
            "Accepted=True Accepted",
            "Programmed=True Programmed",
            "ResolvedRefs=True ResolvedRefs",
            "Conflicted=False NoConflicts"
        ]
    );
    let headless = Provisioned { addresses: Vec::new(), ..done(1) };
    let (.., status) = of(&it, Some(&headless));
    assert_eq!(status["addresses"], json!([{"type": "Hostname", "value": "w.shop.svc.cluster.local"}]));
}

/// D46: each way not to be programmed has its reason.
#[test]
fn why_a_gateway_is_not_programmed() {
    let it = made("", "");
    let refused = |reason| Progress::Invalid(Invalid { reason, message: "it says why".to_owned() });
    let quota = Provisioned { problem: "exceeded quota".to_owned(), ..provisioned(Progress::Done, 0) };
    let nothing = Provisioned { hostname: None, addresses: Vec::new(), ..provisioned(Progress::Done, 0) };
    for (is, accepted, programmed, said) in [
        (None, "Accepted=True Accepted", "Programmed=False Pending", "is being written"),
        (
            Some(provisioned(Progress::Done, 0)),
            "Accepted=True Accepted",
            "Programmed=False NoResources",
            "no available replica, so what is bound to it is refused",
        ),
        (Some(quota), "Accepted=True Accepted", "Programmed=False NoResources", "(exceeded quota)"),
        (Some(nothing), "Accepted=True Accepted", "Programmed=False AddressNotAssigned", "Service"),
        (
            Some(provisioned(Progress::Failed("Service shop/w exists".to_owned()), 1)),
            "Accepted=True Accepted",
            "Programmed=False NoResources",
            "Service shop/w exists",
        ),
        (
            Some(provisioned(refused("InvalidParameters"), 1)),
            "Accepted=False InvalidParameters",
            "Programmed=False Invalid",
            "it says why",
        ),
    ] {
        let (all, messages, _) = of(&it, is.as_ref());
        assert_eq!(all, [accepted, programmed]);
        assert!(messages.contains(said), "{messages}");
    }
}

/// D46.
#[test]
fn each_listener_says_what_is_wrong_with_it() {
    let mut it = made("", "");
    let with = |name: &str, port: u16, protocol: &str| Listener {
        name: name.to_owned(),
        port: culvert_k8s_api::values::Port::new(port).unwrap(),
        protocol: protocol.to_owned(),
        allowed_routes: None,
    };
    it.spec.listeners =
        vec![with("mesh", 15008, "HBONE"), with("web", 80, "HTTP"), with("second", 15009, "HBONE")];
    let (all, messages, status) = of(&it, Some(&provisioned(Progress::Done, 1)));
    assert_eq!(all, ["Accepted=True ListenersNotValid", "Programmed=True Programmed"]);
    assert!(messages.contains("without listener web: protocol \"HTTP\" is not supported"), "{messages}");
    let of_listener = |index: usize| conditions(&status["listeners"][index]["conditions"]).0;
    assert_eq!(of_listener(0)[0], "Accepted=True Accepted");
    assert_eq!(of_listener(1)[..2], ["Accepted=False UnsupportedProtocol", "Programmed=False Invalid"]);
    assert_eq!(of_listener(2)[0], "Accepted=False PortUnavailable");
    it.spec.listeners = vec![with("mesh", 15008, "HBONE"), with("same", 15008, "TCP")];
    let (.., status) = of(&it, Some(&provisioned(Progress::Done, 1)));
    let both = conditions(&status["listeners"][1]["conditions"]).0;
    assert_eq!(
        (both[0].as_str(), both[3].as_str()),
        ("Accepted=False ProtocolConflict", "Conflicted=True ProtocolConflict")
    );
    let routes = made("", "").spec.listeners.remove(0);
    let kinds = vec![culvert_k8s_api::gateway::RouteKind { group: None, kind: "HTTPRoute".to_owned() }];
    let allowed = culvert_k8s_api::gateway::AllowedRoutes { namespaces: None, kinds };
    it.spec.listeners = vec![Listener { allowed_routes: Some(allowed), ..routes }];
    let (.., status) = of(&it, Some(&provisioned(Progress::Done, 1)));
    let (all, messages) = conditions(&status["listeners"][0]["conditions"]);
    assert_eq!(all[2], "ResolvedRefs=False InvalidRouteKinds");
    assert!(messages.contains("HTTPRoute"), "{messages}");
}

/// D46, D61: who has addresses of his own is told that nothing is made, or what is wrong with them.
#[test]
fn a_gateway_with_addresses_of_its_own_is_passed_on() {
    let (all, messages, status) = of(&made("", ", addresses: [{type: Hostname, value: w.example}]"), None);
    assert_eq!(all, ["Accepted=True Accepted", "Programmed=True Programmed"]);
    assert!(messages.contains("nothing is made for it"), "{messages}");
    assert_eq!(status["addresses"], json!([{"type": "Hostname", "value": "w.example"}]));
    let (all, messages, _) = of(&made("", ", addresses: [{value: not-an-ip}]"), None);
    assert_eq!(all[0], "Accepted=False UnsupportedAddress");
    assert!(messages.contains("not-an-ip"), "{messages}");
}

/// D46: only what works is named, in order.
#[test]
fn a_class_is_accepted_with_the_features_that_work() {
    let mut it = GatewayClass {
        metadata: ObjectMeta { name: "c".to_owned(), generation: Some(3), ..ObjectMeta::default() },
        spec: GatewayClassSpec { controller_name: gateways::CONTROLLER.to_owned(), parameters_ref: None },
    };
    let wanted = class(&it);
    assert_eq!(
        (wanted.generation, conditions(&wanted.status["conditions"]).0),
        (Some(3), vec!["Accepted=True Accepted".to_owned()])
    );
    assert_eq!(wanted.status["supportedFeatures"], json!([]));
    assert!(FEATURES.is_sorted());
    it.spec.parameters_ref = Some(culvert_k8s_api::gateway::ParametersRef::default());
    assert_eq!(conditions(&class(&it).status["conditions"]).0, ["Accepted=False InvalidParameters"]);
}
