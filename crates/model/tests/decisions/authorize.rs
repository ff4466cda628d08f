//! Rules Z58-Z64, D39 and the points where refusing differs from skipping.

use std::collections::BTreeSet;

use culvert_model::authorize::{ConnectionFacts, DryRun, MatchResult, Step, authorize, explain};
use culvert_model::identity::Identity;
use culvert_model::outcome::Reason;
use culvert_model::policy::{Action, Match, Policy, PolicyScope, ServiceAccountMatch, StringMatch};
use culvert_model::snapshot::{Applicable, Snapshot};
use culvert_model::workload::Workload;
use proptest::prelude::*;

use crate::world::{World, policy, policy_key, workload};

use Action::{Allow, Deny};
use PolicyScope::{Global, Namespace, WorkloadSelector};

fn client() -> Identity {
    Identity::new("cluster.local", "shop", "web").unwrap()
}

fn facts(identity: Option<&Identity>) -> ConnectionFacts<'_> {
    ConnectionFacts {
        identity,
        source: "100.64.1.7:40000".parse().unwrap(),
        destination: "100.64.2.9:8080".parse().unwrap(),
    }
}

fn allowed(snapshot: &Snapshot, destination: &Workload, identity: Option<&Identity>) -> bool {
    let facts = facts(identity);
    let verdict = authorize(snapshot, destination, &facts);
    let explained = explain(snapshot, destination, &facts);
    assert_eq!(verdict, explained.verdict);
    verdict.is_ok()
}

/// Whether one policy's groups match the client, told by a DENY of these groups.
fn groups_match(groups: Vec<Vec<Vec<Match>>>) -> bool {
    let world = World::new().policy(policy("app/p", Namespace, Deny, groups));
    !allowed(&world.snapshot(), &workload("app", "server", &[]), Some(&client()))
}

fn exact(text: &str) -> StringMatch {
    StringMatch::Exact(text.into())
}

fn hit() -> Match {
    Match { namespaces: vec![exact("shop")], ..Match::default() }
}

fn miss() -> Match {
    Match { namespaces: vec![exact("other")], ..Match::default() }
}

/// TRAP9. Z58: groups are alternatives, rules are required together, matches are alternatives.
/// Z59: an empty policy never matches; a rule with an empty match list matches everything; an all-empty match is skipped.
#[test]
fn the_tree() {
    let empty = Match::default;
    for (groups, matches) in [
        (vec![], false),
        (vec![vec![]], true),
        (vec![vec![vec![]]], true),
        (vec![vec![vec![empty()]]], false),
        (vec![vec![vec![empty(), hit()]]], true),
        (vec![vec![vec![empty(), miss()]]], false),
        (vec![vec![vec![hit()]]], true),
        (vec![vec![vec![miss()]]], false),
        (vec![vec![vec![miss(), hit()]]], true),
        (vec![vec![vec![hit()], vec![miss()]]], false),
        (vec![vec![vec![hit()], vec![hit()]]], true),
        (vec![vec![vec![hit()], vec![]]], true),
        (vec![vec![vec![hit()], vec![empty()]]], false),
        (vec![vec![vec![miss()]], vec![vec![hit()]]], true),
        (vec![vec![vec![miss()]], vec![vec![miss()]]], false),
    ] {
        assert_eq!(groups_match(groups.clone()), matches, "{groups:?}");
    }
}

/// Z58, Z60: within a match every field is required, within a field values are alternatives, and `not_` holds if none does.
#[test]
fn fields() {
    let net = |text: &str| vec![text.parse().unwrap()];
    let account =
        |ns: &str, sa: &str| ServiceAccountMatch { namespace: ns.into(), service_account: sa.into() };
    let d = Match::default;
    for (m, matches) in [
        (Match { namespaces: vec![exact("other"), exact("shop")], ..d() }, true),
        (Match { not_namespaces: vec![exact("other")], ..d() }, true),
        (Match { not_namespaces: vec![exact("other"), exact("shop")], ..d() }, false),
        (Match { service_accounts: vec![account("shop", "web")], ..d() }, true),
        (Match { service_accounts: vec![account("shop", "we")], ..d() }, false),
        (Match { not_service_accounts: vec![account("shop", "web")], ..d() }, false),
        (Match { source_ips: net("100.64.1.0/24"), ..d() }, true),
        (Match { source_ips: net("100.64.2.0/24"), ..d() }, false),
        (Match { not_source_ips: net("100.64.2.0/24"), ..d() }, true),
        (Match { destination_ips: net("100.64.2.9/32"), ..d() }, true),
        (Match { not_destination_ips: net("100.64.2.9/32"), ..d() }, false),
        (Match { destination_ports: vec![80, 8080], ..d() }, true),
        (Match { destination_ports: vec![80], ..d() }, false),
        (Match { not_destination_ports: vec![8080], ..d() }, false),
        (Match { not_destination_ports: vec![80], ..d() }, true),
        (Match { destination_ports: vec![80], ..hit() }, false),
        (Match { destination_ports: vec![8080], ..hit() }, true),
    ] {
        assert_eq!(groups_match(vec![vec![vec![m.clone()]]]), matches, "{m:?}");
    }
}

/// Z61, and U22 where it differs: a principal is matched with or without `spiffe://`.
#[test]
fn principals() {
    let prefix = |t: &str| StringMatch::Prefix(t.into());
    let suffix = |t: &str| StringMatch::Suffix(t.into());
    for (pattern, matches) in [
        (exact("cluster.local/ns/shop/sa/web"), true),
        (exact("spiffe://cluster.local/ns/shop/sa/web"), true),
        (exact("cluster.local/ns/shop/sa/web2"), false),
        (exact("cluster.local/ns/shop/sa/we"), false),
        (exact("spiffe://"), false),
        (exact(""), false),
        (prefix("cluster.local/ns/sh"), true),
        (prefix("spiffe://cluster.local/ns/shop/"), true),
        (prefix("spiffe://"), true),
        (prefix("s"), false),
        (prefix("spiffe:/"), false),
        (prefix("cluster.local/ns/shop/sa/web/"), false),
        (suffix("/sa/web"), true),
        (suffix("shop/sa/web"), true),
        (suffix("spiffe://cluster.local/ns/shop/sa/web"), true),
        (suffix("//cluster.local/ns/shop/sa/web"), false),
        (suffix("/sa/we"), false),
        (StringMatch::Presence, true),
    ] {
        let m = Match { principals: vec![pattern.clone()], ..Match::default() };
        assert_eq!(groups_match(vec![vec![vec![m]]]), matches, "{pattern:?}");
    }
}

/// D39: STRICT is a DENY of whoever has no identity; Z55: plaintext has none.
#[test]
fn strict_denies_plaintext_only() {
    let strict = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let world =
        World::new().policy(policy("istio-system/strict", WorkloadSelector, Deny, vec![vec![vec![strict]]]));
    let snapshot = world.snapshot();
    let mut server = workload("app", "server", &[]);
    assert!(allowed(&snapshot, &server, None), "it does not name the policy");
    server.authorization_policies.push("istio-system/strict".into());
    assert!(!allowed(&snapshot, &server, None));
    assert!(allowed(&snapshot, &server, Some(&client())));
}

/// Z63, Z64: which policies apply, and in which order they decide.
#[test]
fn scopes_and_order() {
    let all = || vec![vec![vec![]]];
    let server = workload("app", "server", &[]);
    for (policies, permit) in [
        (vec![], true),
        (vec![policy("app/nothing", Namespace, Allow, vec![])], false),
        (vec![policy("app/all", Namespace, Allow, all())], true),
        (vec![policy("app/nothing", Namespace, Deny, vec![])], true),
        (vec![policy("app/all", Namespace, Deny, all())], false),
        (vec![policy("app/a", Namespace, Allow, all()), policy("app/d", Namespace, Deny, all())], false),
        (vec![policy("app/a", Namespace, Allow, all()), policy("app/n", Namespace, Allow, vec![])], true),
        (vec![policy("shop/all", Namespace, Deny, all())], true),
        (vec![policy("root/all", Global, Deny, all())], false),
        (vec![policy("app/all", WorkloadSelector, Deny, all())], true),
    ] {
        let world = policies.iter().cloned().fold(World::new(), World::policy);
        assert_eq!(allowed(&world.snapshot(), &server, Some(&client())), permit, "{policies:?}");
    }
}

/// Where Z64 skips: a named policy that is not known denies, and so does one that was not understood.
#[test]
fn fail_closed() {
    let mut server = workload("app", "server", &[]);
    server.authorization_policies.push("app/gone".into());
    let denial = authorize(&World::new().snapshot(), &server, &facts(None)).unwrap_err();
    assert_eq!(denial.reason, Reason::PolicyUnavailable);
    assert!(denial.detail.contains("app/gone"), "{denial}");

    let broken = |scope, dry_run| Policy {
        undecodable: Some("unknown field 99 of Match".into()),
        dry_run,
        ..policy("app/broken", scope, Allow, vec![vec![vec![]]])
    };
    let server = workload("app", "server", &[]);
    for (scope, permit) in [(Global, false), (Namespace, false), (WorkloadSelector, true)] {
        for dry_run in [false, true] {
            let snapshot = World::new().policy(broken(scope, dry_run)).snapshot();
            let verdict = authorize(&snapshot, &server, &facts(Some(&client())));
            assert_eq!(verdict.is_ok(), permit, "{scope:?}");
            if let Err(denial) = verdict {
                assert_eq!(denial.reason, Reason::PolicyUnavailable);
                assert_eq!(denial.policy, Some(policy_key("app/broken")));
                assert!(denial.detail.contains("unknown field 99"), "{denial}");
            }
        }
    }
}

/// Z63: policies on trial decide nothing, and what they would have done is reported.
#[test]
fn dry_run() {
    let on_trial = |name, action, groups| Policy { dry_run: true, ..policy(name, Namespace, action, groups) };
    let server = workload("app", "server", &[]);
    let world = World::new().policy(on_trial("app/deny", Deny, vec![vec![vec![]]])).policy(on_trial(
        "app/allow",
        Allow,
        vec![vec![vec![miss()]]],
    ));
    let permit = authorize(&world.snapshot(), &server, &facts(Some(&client()))).unwrap();
    assert_eq!(permit.by(), None);
    let would = |name| DryRun { policy: policy_key(name), would: Deny };
    assert_eq!(permit.dry_run(), [would("app/deny"), would("app/allow")]);

    let world = World::new().policy(on_trial("app/allow", Allow, vec![vec![vec![hit()]]])).policy(policy(
        "app/nothing",
        Namespace,
        Allow,
        vec![],
    ));
    let denial = authorize(&world.snapshot(), &server, &facts(Some(&client()))).unwrap_err();
    assert_eq!(denial.dry_run, [DryRun { policy: policy_key("app/allow"), would: Allow }]);
}

/// An explanation names the clause that decided.
#[test]
fn the_trace_names_the_clause() {
    let groups = vec![vec![vec![miss(), hit()], vec![Match { destination_ports: vec![1], ..hit() }]]];
    let snapshot = World::new().policy(policy("app/p", Namespace, Allow, groups)).snapshot();
    let identity = client();
    let explanation = explain(&snapshot, &workload("app", "server", &[]), &facts(Some(&identity)));
    let key = policy_key("app/p");
    let result = |rule, index, result| Step::Match { policy: key.clone(), group: 0, rule, index, result };
    let rule = |rule, matched| Step::Rule { policy: key.clone(), group: 0, rule, matched };
    let expected = [
        result(0, 0, MatchResult::Failed("namespaces")),
        result(0, 1, MatchResult::Matched),
        rule(0, true),
        result(1, 0, MatchResult::Failed("destination_ports")),
        rule(1, false),
        Step::Policy { policy: key.clone(), action: Allow, scope: Namespace, dry_run: false, matched: false },
        Step::NoneAllowed,
    ];
    assert_eq!(explanation.steps, expected);
    assert_eq!(explanation.verdict.unwrap_err().reason, Reason::AuthorizationPolicy);
    assert!(serde_json::to_string(&explanation.steps).unwrap().contains("\"failed\":\"namespaces\""));
}

/// Addresses of a socket that takes both families may be IPv4 in IPv6's clothes.
#[test]
fn mapped_addresses_are_ipv4() {
    let m = Match { source_ips: vec!["100.64.0.0/10".parse().unwrap()], ..Match::default() };
    let snapshot = World::new().policy(policy("app/p", Namespace, Deny, vec![vec![vec![m]]])).snapshot();
    let facts = ConnectionFacts { source: "[::ffff:100.64.1.7]:1".parse().unwrap(), ..facts(None) };
    assert!(authorize(&snapshot, &workload("app", "server", &[]), &facts).is_err());
}

/// The specification, written as its sentences are, with everything joined and collected that the real one avoids.
mod reference {
    use super::*;

    pub fn permits(policies: &[Policy], destination: &Workload, facts: &ConnectionFacts<'_>) -> bool {
        let name = |p: &Policy| p.key.to_string();
        for wanted in &destination.authorization_policies {
            if !policies.iter().any(|p| name(p) == **wanted) {
                return false;
            }
        }
        let applies = |p: &&Policy| match p.scope {
            Global => true,
            Namespace if p.key.namespace == destination.namespace => true,
            _ => destination.authorization_policies.iter().any(|n| **n == name(p)),
        };
        let applicable: Vec<&Policy> = policies.iter().filter(applies).collect();
        if applicable.iter().any(|p| p.undecodable.is_some()) {
            return false;
        }
        let enforced: Vec<&&Policy> = applicable.iter().filter(|p| !p.dry_run).collect();
        if enforced.iter().any(|p| p.action == Deny && matches(p, facts)) {
            return false;
        }
        let allows: Vec<_> = enforced.iter().filter(|p| p.action == Allow).collect();
        allows.is_empty() || allows.iter().any(|p| matches(p, facts))
    }

    /// What policies on trial would have done (Z63): a DENY that matches would have denied, an ALLOW that matches would have
    /// allowed. Where nothing that is enforced decides, ALLOW policies on trial would together have denied what none of
    /// them matches; one of them, any, stands for all. `Err` holds those.
    #[allow(clippy::type_complexity, reason = "what must be said, and what one of must be said")]
    pub fn on_trial(
        policies: &[Policy],
        destination: &Workload,
        facts: &ConnectionFacts<'_>,
    ) -> (BTreeSet<(String, String)>, BTreeSet<String>) {
        let applicable: Vec<&Policy> = policies.iter().filter(|p| applies(p, destination)).collect();
        let missing = destination
            .authorization_policies
            .iter()
            .any(|name| !policies.iter().any(|p| p.key.to_string() == **name));
        if missing || applicable.iter().any(|p| p.undecodable.is_some()) {
            return Default::default();
        }
        let of = |action, dry_run| {
            applicable.iter().copied().filter(move |p| p.action == action && p.dry_run == dry_run)
        };
        let said = |p: &Policy| (p.key.to_string(), format!("{:?}", p.action));
        let mut must: BTreeSet<_> = of(Deny, true).filter(|p| matches(p, facts)).map(said).collect();
        if of(Deny, false).any(|p| matches(p, facts)) {
            return (must, BTreeSet::new());
        }
        let allowing: BTreeSet<_> = of(Allow, true).filter(|p| matches(p, facts)).map(said).collect();
        let mut one_of = BTreeSet::new();
        if allowing.is_empty() && of(Allow, false).next().is_none() {
            one_of = of(Allow, true).map(|p| p.key.to_string()).collect();
        }
        must.extend(allowing);
        (must, one_of)
    }

    fn applies(p: &Policy, destination: &Workload) -> bool {
        let named = destination.authorization_policies.iter().any(|n| **n == p.key.to_string());
        match p.scope {
            Global => true,
            Namespace => p.key.namespace == destination.namespace || named,
            WorkloadSelector => named,
        }
    }

    pub fn matches(policy: &Policy, facts: &ConnectionFacts<'_>) -> bool {
        policy.groups.iter().any(|group| {
            group.rules.iter().all(|rule| {
                rule.matches.is_empty()
                    || rule.matches.iter().any(|m| *m != Match::default() && holds(m, facts))
            })
        })
    }

    fn holds(m: &Match, facts: &ConnectionFacts<'_>) -> bool {
        let (ns, principal) = match facts.identity {
            Some(id) => (vec![id.namespace().to_string()], vec![id.principal()]),
            None => (vec![], vec![]),
        };
        let any = |wanted: &[StringMatch], have: &[String]| {
            wanted.iter().any(|w| {
                have.iter().any(|h| match w {
                    StringMatch::Exact(p) => h == p.trim_start_matches("spiffe://"),
                    StringMatch::Prefix(p) => h.starts_with(p.trim_start_matches("spiffe://")),
                    StringMatch::Suffix(p) => h.ends_with(&**p),
                    StringMatch::Presence => true,
                })
            })
        };
        let account = |wanted: &[ServiceAccountMatch]| {
            wanted.iter().any(|w| {
                facts.identity.is_some_and(|id| {
                    id.namespace() == &w.namespace && id.service_account() == &w.service_account
                })
            })
        };
        let (source, destination) = (facts.source.ip(), facts.destination.ip());
        let port = facts.destination.port();
        (m.namespaces.is_empty() || any(&m.namespaces, &ns))
            && (m.not_namespaces.is_empty() || !any(&m.not_namespaces, &ns))
            && (m.principals.is_empty() || any(&m.principals, &principal))
            && (m.not_principals.is_empty() || !any(&m.not_principals, &principal))
            && (m.service_accounts.is_empty() || account(&m.service_accounts))
            && (m.not_service_accounts.is_empty() || !account(&m.not_service_accounts))
            && (m.source_ips.is_empty() || m.source_ips.iter().any(|n| n.contains(&source)))
            && !m.not_source_ips.iter().any(|n| n.contains(&source))
            && (m.destination_ips.is_empty() || m.destination_ips.iter().any(|n| n.contains(&destination)))
            && !m.not_destination_ips.iter().any(|n| n.contains(&destination))
            && (m.destination_ports.is_empty() || m.destination_ports.contains(&port))
            && !m.not_destination_ports.contains(&port)
    }
}

pub fn any_text() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        prop_oneof![Just("a"), Just("b"), Just("t/ns/a/sa/b"), Just("spiffe://t/ns/a/sa/a")].prop_map(exact),
        prop_oneof![Just(""), Just("t"), Just("t/ns/b/s"), Just("spiffe://t/ns/a")]
            .prop_map(|p| StringMatch::Prefix(p.into())),
        prop_oneof![Just("a"), Just("/sa/b")].prop_map(|p| StringMatch::Suffix(p.into())),
        Just(StringMatch::Presence),
    ]
}

pub fn any_match() -> impl Strategy<Value = Match> {
    let texts = || prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(any_text(), 1..3)];
    let account = ("[ab]", "[ab]").prop_map(|(ns, sa)| ServiceAccountMatch {
        namespace: ns.as_str().into(),
        service_account: sa.as_str().into(),
    });
    let accounts = prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(account, 1..3)];
    let net = prop_oneof![Just("10.0.0.1/32"), Just("10.0.0.0/24"), Just("0.0.0.0/0"), Just("fd00::/8")];
    let net = net.prop_map(|n| n.parse().unwrap());
    let nets = || prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(net.clone(), 1..3)];
    let ports = || prop_oneof![4 => Just(vec![]), 1 => prop::collection::vec(1_u16..4, 1..3)];
    (
        (texts(), texts(), texts(), texts()),
        (accounts.clone(), accounts),
        (nets(), nets(), nets(), nets()),
        (ports(), ports()),
    )
        .prop_map(|(t, a, n, p)| Match {
            namespaces: t.0,
            not_namespaces: t.1,
            principals: t.2,
            not_principals: t.3,
            service_accounts: a.0,
            not_service_accounts: a.1,
            source_ips: n.0,
            not_source_ips: n.1,
            destination_ips: n.2,
            not_destination_ips: n.3,
            destination_ports: p.0,
            not_destination_ports: p.1,
        })
}

pub fn any_policy() -> impl Strategy<Value = Policy> {
    let scope = prop_oneof![Just(Global), Just(Namespace), Just(WorkloadSelector)];
    let action = prop_oneof![Just(Allow), Just(Deny)];
    let rules = prop::collection::vec(prop::collection::vec(any_match(), 0..3), 0..3);
    let groups = prop::collection::vec(rules, 0..3);
    let broken = prop::option::weighted(0.05, Just("broken".into()));
    ("[ab]/[pqr]", scope, action, groups, prop::bool::weighted(0.2), broken).prop_map(
        |(name, scope, action, groups, dry_run, undecodable)| Policy {
            dry_run,
            undecodable,
            ..policy(&name, scope, action, groups)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// TRAP9.
    /// Z58-Z64 with the fail-closed points: any policies and any peer are judged as the specification says, explained alike,
    /// and the steps say what was decided.
    #[test]
    fn judged_as_specified(
        policies in prop::collection::vec(any_policy(), 0..5),
        named in prop::collection::vec("[ab]/[pq]", 0..3),
        peer in prop::option::of(("[ab]", "[ab]")),
        source in prop_oneof![Just("10.0.0.1:5"), Just("10.0.1.1:5"), Just("[fd00::1]:5")],
        port in 1_u16..4,
    ) {
        // The last of one name stands.
        let mut last: Vec<Policy> = Vec::new();
        for policy in &policies {
            last.retain(|p| p.key != policy.key);
            last.push(policy.clone());
        }
        let snapshot = policies.into_iter().fold(World::new(), World::policy).snapshot();
        let mut server = workload("a", "server", &[]);
        server.authorization_policies = named.iter().map(|n| n.as_str().into()).collect();
        let identity = peer.map(|(ns, sa)| Identity::new("t", ns, sa).unwrap());
        let facts = ConnectionFacts {
            identity: identity.as_ref(),
            source: source.parse().unwrap(),
            destination: (std::net::Ipv4Addr::new(10, 0, 0, 1), port).into(),
        };
        let verdict = authorize(&snapshot, &server, &facts);
        prop_assert_eq!(verdict.is_ok(), reference::permits(&last, &server, &facts));
        let (dry_run, by) = match &verdict {
            Ok(permit) => (permit.dry_run(), permit.by()),
            Err(denial) => (&denial.dry_run[..], denial.policy.as_ref()),
        };
        let said: BTreeSet<_> = dry_run.iter().map(|d| (d.policy.to_string(), format!("{:?}", d.would))).collect();
        let (must, one_of) = reference::on_trial(&last, &server, &facts);
        let more: Vec<_> = said.difference(&must).collect();
        prop_assert!(must.is_subset(&said) && more.len() == usize::from(!one_of.is_empty()), "{said:?} {must:?}");
        prop_assert!(more.iter().all(|(name, would)| one_of.contains(name) && would == "Deny"));
        // The policy that is named did decide: it is enforced, matches, and does what the verdict is.
        let named = by.and_then(|by| last.iter().find(|p| p.key == *by)).filter(|p| p.undecodable.is_none());
        if let Some(policy) = named {
            prop_assert!(!policy.dry_run && reference::matches(policy, &facts));
            prop_assert_eq!(policy.action == Allow, verdict.is_ok());
        }
        let explained = explain(&snapshot, &server, &facts);
        prop_assert_eq!(&explained.verdict, &verdict);
        let last_step = explained.steps.last();
        match verdict {
            Ok(permit) => match permit.by() {
                None => prop_assert_eq!(last_step, Some(&Step::NoAllowPolicy)),
                Some(by) => {
                    let decided = matches!(last_step, Some(Step::Policy { policy, matched: true, .. }) if policy == by);
                    prop_assert!(decided);
                }
            },
            Err(denial) => {
                let missing = snapshot.policies_for(&server).any(|a| matches!(a, Applicable::Missing(_)));
                if denial.reason == Reason::AuthorizationPolicy {
                    prop_assert!(!missing);
                } else {
                    let decided = matches!(last_step, Some(Step::Missing { .. } | Step::Undecodable { .. }));
                    prop_assert!(decided);
                }
            }
        }
    }
}
