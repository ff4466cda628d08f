//! Which policies decide, and in which order (W53, W64).

use culvert_model::address::NamespacedHostname;
use culvert_model::outcome::Reason;
use culvert_model::request::{Denial, Findings, Permit, PolicySet, Step, Truth, Verdict, explain};
use culvert_proto::waypoint as proto;
use proto::policy::Action;

use crate::world::{Request, allow, decode, deny, policy, service, set, set_of, texts, when};

fn everything() -> Vec<proto::PolicyRule> {
    vec![proto::PolicyRule::default()]
}

fn nothing() -> Vec<proto::PolicyRule> {
    vec![when("source.namespace", &["nobody"], &[])]
}

fn permit(verdict: Verdict) -> Permit {
    match verdict {
        Verdict::Allow(permit) => permit,
        other => panic!("{other:?}"),
    }
}

fn denial(verdict: Verdict) -> Denial {
    match verdict {
        Verdict::Deny(denial) => denial,
        other => panic!("{other:?}"),
    }
}

fn judge(messages: &[proto::Policy]) -> Verdict {
    Request::usual().judge(&set(messages))
}

fn findings(messages: &[proto::Policy]) -> (bool, Findings) {
    match judge(messages) {
        Verdict::Allow(permit) => (true, permit.findings().clone()),
        Verdict::Deny(denial) => (false, denial.findings),
        Verdict::Ask(question) => panic!("{question:?}"),
    }
}

fn would(messages: &[proto::Policy]) -> (bool, Vec<String>) {
    let (allowed, findings) = findings(messages);
    let all = findings.dry_run.into_iter().map(|one| format!("{} {}", one.would, one.policy.name));
    (allowed, all.collect())
}

fn on_trial(mut message: proto::Policy) -> proto::Policy {
    message.dry_run = true;
    message.name = format!("trial-{}", message.name);
    message
}

#[test]
fn without_a_policy_everything_passes() {
    assert_eq!(permit(judge(&[])).by(), None);
    assert!(set(&[]).is_empty() && !set(&[allow(vec![])]).is_empty());
}

#[test]
fn allow_refuses_what_it_does_not_match() {
    let permit = permit(judge(&[allow(everything())]));
    assert_eq!(permit.by().unwrap().to_string(), "a/allow");
    // No rules: nothing matches, everything is refused.
    for rules in [nothing(), vec![]] {
        let denial = denial(judge(&[allow(rules)]));
        assert_eq!((denial.reason, denial.policy), (Reason::AuthorizationPolicy, None));
    }
    let two = [allow(nothing()), policy("other", Action::Allow, everything())];
    assert_eq!(&*judge_by(&two), "a/other");
}

fn judge_by(messages: &[proto::Policy]) -> String {
    permit(judge(messages)).by().unwrap().to_string()
}

/// W53.
#[test]
fn deny_comes_before_allow() {
    let denied = denial(judge(&[allow(everything()), deny(everything())]));
    assert_eq!(denied.policy.unwrap().to_string(), "a/deny");
    assert_eq!(denied.detail, "denied by policy a/deny");
    // No rules: nothing matches, nothing is refused.
    for rules in [nothing(), vec![]] {
        permit(judge(&[deny(rules.clone())]));
        assert_eq!(judge_by(&[deny(rules), allow(everything())]), "a/allow");
    }
}

/// W53.
#[test]
fn custom_asks_before_anything_else_and_the_rest_is_judged_afterwards() {
    let custom = |name: &str, provider: &str, rules| proto::Policy {
        provider: provider.into(),
        ..policy(name, Action::Custom, rules)
    };
    let token = || vec![when("request.headers[x-user]", &["me"], &[])];
    let messages = [
        custom("c1", "p", everything()),
        custom("c2", "p", everything()),
        custom("c3", "q", everything()),
        custom("c4", "r", nothing()),
        custom("c5", "s", vec![]),
        allow(token()),
    ];
    let policies = set(&messages);
    let request = Request::usual();
    let question = || match request.judge(&policies) {
        Verdict::Ask(question) => question,
        other => panic!("{other:?}"),
    };
    let asked: Vec<_> =
        question().asked().iter().map(|one| format!("{} {}", one.provider, one.policy)).collect();
    assert_eq!(asked, ["p a/c1", "q a/c3"]);

    let refused = question().refused(&question().asked()[1], "it is not known");
    assert_eq!(refused.policy.unwrap().to_string(), "a/c3");
    assert_eq!(refused.detail, "provider q, asked for policy a/c3: it is not known");

    // As it was sent, and with what the provider added.
    let refused = request.ask(|facts| question().granted(&policies, facts)).unwrap_err();
    assert_eq!(refused.policy, None);
    let changed = request.clone().header("x-user", "me");
    let permit = changed.ask(|facts| question().granted(&policies, facts)).unwrap();
    assert_eq!(permit.by().unwrap().to_string(), "a/allow");

    // Meanwhile a policy arrived that is not understood.
    let later = set_of(&[policy("new", Action::Allow, vec![when("new.key", &["v"], &[])])]);
    let refused = changed.ask(|facts| question().granted(&later, facts)).unwrap_err();
    assert_eq!(refused.reason, Reason::PolicyUnavailable);

    // A DENY does not spare the provider, as in Istio.
    let denied = [custom("c1", "p", everything()), deny(everything())];
    assert!(matches!(judge(&denied), Verdict::Ask(_)));
}

/// W53.
#[test]
fn audit_notes_and_decides_nothing() {
    let audit = |rules| policy("audit", Action::Audit, rules);
    let noted = |messages: &[proto::Policy]| {
        let (allowed, findings) = findings(messages);
        let audit: Vec<_> = findings.audit.iter().map(ToString::to_string).collect();
        (allowed, audit)
    };
    assert_eq!(noted(&[audit(everything())]), (true, vec!["a/audit".to_owned()]));
    assert_eq!(noted(&[audit(nothing())]), (true, vec![]));
    assert_eq!(noted(&[audit(everything()), deny(everything())]), (false, vec!["a/audit".to_owned()]));
    assert_eq!(noted(&[audit(everything()), allow(nothing())]), (false, vec!["a/audit".to_owned()]));
}

/// W64.
#[test]
fn a_trial_decides_nothing_and_tells_what_it_would_have_done() {
    let t = on_trial;
    let told = |allowed: bool, all: &[&str]| (allowed, texts(all));
    assert_eq!(would(&[t(deny(everything()))]), told(true, &["deny trial-deny"]));
    assert_eq!(would(&[t(deny(nothing()))]), told(true, &[]));
    assert_eq!(would(&[t(allow(everything()))]), told(true, &["allow trial-allow"]));
    assert_eq!(would(&[t(allow(nothing()))]), told(true, &["deny trial-allow"]));
    // Another ALLOW allows it, so the trial's refusal would change nothing.
    assert_eq!(would(&[t(allow(nothing())), allow(everything())]), told(true, &[]));
    let other = proto::Policy { name: "trial-b".into(), ..t(allow(everything())) };
    assert_eq!(would(&[t(allow(nothing())), other]), told(true, &["allow trial-b"]));
    assert_eq!(would(&[t(allow(everything())), allow(nothing())]), told(false, &["allow trial-allow"]));
    assert_eq!(would(&[t(deny(everything())), deny(everything())]), told(false, &["deny trial-deny"]));
    assert_eq!(would(&[t(policy("c", Action::Custom, everything()))]), told(true, &["ask trial-c"]));
    assert_eq!(would(&[t(policy("u", Action::Audit, everything()))]), told(true, &["audit trial-u"]));
}

#[test]
fn what_is_not_understood_denies_its_targets_and_nothing_else() {
    for action in [Action::Allow, Action::Deny, Action::Audit, Action::Custom] {
        for dry_run in [false, true] {
            let mut broken =
                policy("broken", action, vec![when("experimental.envoy.filters.a[b]", &["v"], &[])]);
            broken.dry_run = dry_run;
            let denial = denial(Request::usual().judge(&set_of(&[allow(everything()), broken.clone()])));
            assert_eq!(denial.reason, Reason::PolicyUnavailable);
            assert_eq!(denial.policy.unwrap().to_string(), "a/broken");
            assert!(denial.detail.contains("experimental.envoy.filters.a[b]"), "{}", denial.detail);

            let other =
                proto::Target { service_namespace: "a".into(), service_hostname: "other.a.svc".into() };
            broken.targets = vec![other];
            permit(Request::usual().judge(&set_of(&[broken])));
        }
    }
}

/// W27.
#[test]
fn a_policy_is_for_its_targets() {
    let target = |namespace: &str, hostname: &str| proto::Target {
        service_namespace: namespace.into(),
        service_hostname: hostname.into(),
    };
    let ours = service();
    let (namespace, hostname) = (&*ours.namespace, &*ours.hostname);
    let for_targets = |targets: &[proto::Target], service: Option<&NamespacedHostname>| {
        let decoded = decode(&proto::Policy { targets: targets.to_vec(), ..deny(everything()) });
        assert_eq!(decoded.error, None);
        !PolicySet::new(&[decoded.policy.into()], service).is_empty()
    };
    assert!(for_targets(&[], Some(&ours)) && for_targets(&[], None));
    assert!(for_targets(&[target("b", "x"), target(namespace, hostname)], Some(&ours)));
    assert!(for_targets(&[target(namespace, "Shop.A.svc.cluster.local.")], Some(&ours)));
    assert!(!for_targets(&[target("b", hostname)], Some(&ours)));
    assert!(!for_targets(&[target(namespace, "other")], Some(&ours)));
    assert!(!for_targets(&[target(namespace, hostname)], None));
}

#[test]
fn an_explanation_is_the_same_walk() {
    let messages = [
        deny(vec![when("request.headers[x-a]", &["v"], &[]), when("destination.port", &["443"], &[])]),
        allow(vec![when("source.namespace", &[], &["b"])]),
    ];
    let policies = set(&messages);
    let request = Request::usual();
    let explained = request.ask(|facts| explain(&policies, facts));
    assert_eq!(explained.verdict, request.judge(&policies));
    assert_eq!(explained.granted, None);
    let steps: Vec<String> = explained
        .steps
        .iter()
        .map(|step| match step {
            Step::Condition { part, index, condition, holds, .. } => {
                format!("{part}[{index}] {condition} {holds:?}")
            }
            Step::Rule { rule, holds, .. } => format!("rule {rule} {holds:?}"),
            Step::Policy { policy, action, matched, .. } => format!("{policy} {action} {matched}"),
            other => format!("{other:?}"),
        })
        .collect();
    assert_eq!(
        steps,
        [
            "when[0] request.headers[x-a] No",
            "rule 0 No",
            "when[0] destination.port No",
            "rule 1 No",
            "a/deny deny false",
            "when[0] not source.namespace Yes",
            "rule 0 Yes",
            "a/allow allow true",
        ]
    );
    let asked = set(&[policy("c", Action::Custom, everything()), allow(nothing())]);
    let explained = request.ask(|facts| explain(&asked, facts));
    assert!(matches!(explained.verdict, Verdict::Ask(_)));
    assert!(explained.granted.unwrap().is_err());
    assert_eq!(explained.steps.last(), Some(&Step::NoneAllowed));
    let none = request.ask(|facts| explain(&set(&[]), facts));
    assert_eq!(none.steps, [Step::NoAllowPolicy]);
    assert!(Truth::No < Truth::Maybe && Truth::Maybe < Truth::Yes);
}
