//! What each field of a rule compares (W54, W55).

use culvert_model::request::Verdict;
use culvert_proto::waypoint as proto;

use crate::world::{Request, allow, from, identity, set, texts, to, when};

fn allows(rule: proto::PolicyRule, request: &Request) -> bool {
    matches!(request.judge(&set(&[allow(vec![rule])])), Verdict::Allow(_))
}

/// One request against the values of one field, and against the same values in its `not` field.
fn check(
    field: impl Fn(Vec<String>, bool) -> proto::PolicyRule,
    request: &Request,
    cases: &[(&[&str], bool)],
) {
    for (values, wanted) in cases {
        assert_eq!(allows(field(texts(values), true), request), *wanted, "{values:?}");
        assert_eq!(allows(field(texts(values), false), request), !*wanted, "not {values:?}");
    }
}

macro_rules! source {
    ($is:ident, $not:ident) => {
        |values, wanted| {
            from(if wanted {
                proto::Source { $is: values, ..Default::default() }
            } else {
                proto::Source { $not: values, ..Default::default() }
            })
        }
    };
}

macro_rules! operation {
    ($is:ident, $not:ident) => {
        |values, wanted| {
            to(if wanted {
                proto::Operation { $is: values, ..Default::default() }
            } else {
                proto::Operation { $not: values, ..Default::default() }
            })
        }
    };
}

fn condition(key: &str) -> impl Fn(Vec<String>, bool) -> proto::PolicyRule {
    move |values, wanted| {
        let values: Vec<&str> = values.iter().map(String::as_str).collect();
        if wanted { when(key, &values, &[]) } else { when(key, &[], &values) }
    }
}

/// W54, W55.
#[test]
fn principals_with_and_without_their_scheme() {
    let cases: &[(&[&str], bool)] = &[
        (&["cluster.local/ns/a/sa/x"], true),
        (&["spiffe://cluster.local/ns/a/sa/x"], true),
        (&["spiffe://cluster.local/ns/a/*"], true),
        (&["cluster.local/*"], true),
        (&["*/sa/x"], true),
        (&["*"], true),
        (&["other/ns/a/sa/x", "*/sa/x"], true),
        (&["cluster.local/ns/a/sa/xy"], false),
        (&["cluster.local/ns/a/sa"], false),
        (&["s*"], false),
        (&["cluster.local/ns/*/sa/x"], false),
    ];
    check(source!(principals, not_principals), &Request::usual(), cases);
    check(condition("source.principal"), &Request::usual(), cases);
    check(source!(principals, not_principals), &Request::usual().no_identity(), &[(&["*"], false)]);
}

/// W54, W55.
#[test]
fn namespaces_with_stars_anywhere() {
    let request = Request::usual().with(|r| r.identity = Some(identity("cluster.local/ns/team-1-prod/sa/x")));
    let cases: &[(&[&str], bool)] = &[
        (&["team-1-prod"], true),
        (&["team-*"], true),
        (&["*-prod"], true),
        (&["team-*-prod"], true),
        (&["*"], true),
        (&["team-1"], false),
        (&["team-*-dev"], false),
    ];
    check(source!(namespaces, not_namespaces), &request, cases);
    check(condition("source.namespace"), &request, cases);
    check(condition("source.namespace"), &request.no_identity(), &[(&["*"], false)]);
}

/// W54, W55.
#[test]
fn service_accounts_of_a_namespace_or_the_policys_own() {
    let cases: &[(&[&str], bool)] =
        &[(&["a/x"], true), (&["x"], true), (&["b/x"], false), (&["y"], false), (&["b/x", "x"], true)];
    let other_domain = Request::usual().with(|r| r.identity = Some(identity("other.domain/ns/a/sa/x")));
    for request in [Request::usual(), other_domain] {
        check(source!(service_accounts, not_service_accounts), &request, cases);
        check(condition("source.serviceAccount"), &request, cases);
    }
}

/// W55.
#[test]
fn the_trust_domain() {
    let cases: &[(&[&str], bool)] =
        &[(&["cluster.local"], true), (&["cluster.*"], true), (&["other"], false), (&["*"], true)];
    check(condition("source.trustDomain"), &Request::usual(), cases);
}

/// W54, W55.
#[test]
fn addresses_of_the_client_what_proxies_say_of_it_and_of_the_service() {
    let block = |values: &[&'static str], is: &'static str, other: &'static str| {
        let mut all: Vec<(Vec<&str>, bool)> = vec![(vec![is], true), (vec![other], false)];
        all.push((vec![other, is], true));
        all.extend(values.iter().map(|value| (vec![*value], true)));
        all
    };
    let run = |field: &dyn Fn(Vec<String>, bool) -> proto::PolicyRule, cases: Vec<(Vec<&str>, bool)>| {
        for (values, wanted) in cases {
            check(field, &Request::usual(), &[(&values, wanted)]);
        }
    };
    let of_source = || {
        let wide = ["10.0.0.0/8", "10.0.0.9/24", "0.0.0.0/0", "::ffff:10.0.0.1", "::ffff:10.0.0.0/120"];
        block(&wide, "10.0.0.1", "192.0.2.1")
    };
    run(&source!(ip_blocks, not_ip_blocks), of_source());
    run(&condition("source.ip"), of_source());
    let of_remote = || block(&["192.0.2.0/24"], "192.0.2.1", "10.0.0.1");
    run(&source!(remote_ip_blocks, not_remote_ip_blocks), of_remote());
    run(&condition("remote.ip"), of_remote());
    run(&condition("destination.ip"), block(&["10.96.0.0/12"], "10.96.0.1", "10.0.0.1"));

    let mapped = Request::usual().with(|r| r.source = Some("::ffff:10.0.0.1".parse().unwrap()));
    check(condition("source.ip"), &mapped, &[(&["10.0.0.1"], true), (&["::/0"], false)]);
}

/// W54, W55.
#[test]
fn the_services_port_and_the_server_name() {
    let ports = |ports: &[u32], not_ports: &[u32]| {
        to(proto::Operation { ports: ports.to_vec(), not_ports: not_ports.to_vec(), ..Default::default() })
    };
    let request = Request::usual();
    assert!(allows(ports(&[80], &[]), &request) && allows(ports(&[443, 80], &[443]), &request));
    assert!(!allows(ports(&[443], &[]), &request) && !allows(ports(&[], &[80]), &request));
    check(condition("destination.port"), &request, &[(&["80"], true), (&["8080"], false)]);

    let named = Request::usual().with(|r| r.server_name = Some("Shop.Example".into()));
    let cases: &[(&[&str], bool)] = &[
        (&["shop.example"], true),
        (&["SHOP.*"], true),
        (&["*.example"], true),
        (&["*"], true),
        (&["shop"], false),
    ];
    check(condition("connection.sni"), &named, cases);
    for none in [None, Some(String::new())] {
        let request = Request::usual().with(|r| r.server_name = none);
        check(condition("connection.sni"), &request, &[(&["*"], false)]);
    }
}

/// W54.
#[test]
fn methods_and_hosts() {
    let methods: &[(&[&str], bool)] =
        &[(&["GET"], true), (&["G*"], true), (&["*T"], true), (&["*"], true), (&["get"], false)];
    check(operation!(methods, not_methods), &Request::usual(), methods);
    check(condition("request.headers[:method]"), &Request::usual(), methods);
    let request = Request::usual().host("Shop.Example");
    let hosts: &[(&[&str], bool)] = &[
        (&["shop.example"], true),
        (&["SHOP.EXAMPLE"], true),
        (&["shop.*"], true),
        (&["*.EXAMPLE"], true),
        (&["*"], true),
        (&["example"], false),
    ];
    check(operation!(hosts, not_hosts), &request, hosts);
    check(condition("request.headers[Host]"), &request, hosts);
    check(condition("request.headers[:authority]"), &request, hosts);
    let without = Request::usual().http(|http| http.authority = None);
    check(operation!(hosts, not_hosts), &without, &[(&["*"], false)]);
}

/// W54.
#[test]
fn paths_without_their_query_as_they_are_normalised() {
    let request = Request::usual().path("/a//%62/../c/d.txt?/a/x");
    let cases: &[(&[&str], bool)] = &[
        (&["/a/c/d.txt"], true),
        (&["/a/*"], true),
        (&["*.txt"], true),
        (&["*"], true),
        (&["/a/{*}/d.txt"], true),
        (&["/{**}"], true),
        (&["/a/./c//%64.txt"], true),
        (&["/a"], false),
        (&["*/x"], false),
        (&["/a/{*}"], false),
        (&["/a/*/d.txt"], false),
    ];
    check(operation!(paths, not_paths), &request, cases);
}

/// W55.
#[test]
fn headers_by_name_without_case() {
    let request = Request::usual().header("x-a", "one").header("x-empty", "");
    let cases: &[(&[&str], bool)] = &[
        (&["one"], true),
        (&["o*"], true),
        (&["*e"], true),
        (&["*"], true),
        (&["two", "one"], true),
        (&["One"], false),
        (&["on"], false),
    ];
    check(condition("request.headers[X-A]"), &request, cases);
    check(condition("request.headers[x-empty]"), &request, &[(&["*"], true), (&["a"], false)]);
    check(condition("request.headers[x-b]"), &request, &[(&["*"], false)]);
}

/// W54, W55.
#[test]
fn what_a_token_claims() {
    let request = Request::usual().claims(
        r#"{"iss":"https://issuer","sub":"me","aud":["one","two"],"azp":"app","admin":true,
            "groups":["dev","ops"],"realm":{"roles":["read"]},"empty":""}"#,
    );
    let principals: &[(&[&str], bool)] = &[
        (&["https://issuer/me"], true),
        (&["https://issuer/*"], true),
        (&["https://iss*"], true),
        (&["*/me"], true),
        (&["*"], true),
        (&["https://issuer"], false),
        (&["me"], false),
    ];
    check(source!(request_principals, not_request_principals), &request, principals);
    check(condition("request.auth.principal"), &request, principals);
    let of = |name: &str, cases: &[(&[&str], bool)]| check(condition(name), &request, cases);
    of("request.auth.audiences", &[(&["two"], true), (&["three"], false), (&["o*"], true)]);
    of("request.auth.presenter", &[(&["app"], true), (&["one"], false)]);
    of("request.auth.claims[iss]", &[(&["https://issuer"], true), (&["*"], true)]);
    of("request.auth.claims[admin]", &[(&["true"], true), (&["false"], false)]);
    of("request.auth.claims[groups]", &[(&["ops"], true), (&["sales"], false), (&["d*"], true)]);
    of("request.auth.claims[realm][roles]", &[(&["read"], true), (&["write"], false)]);
    of("request.auth.claims[realm]", &[(&["*"], false)]);
    of("request.auth.claims[empty]", &[(&["*"], false)]);

    for claims in
        [r#"{"iss":"i"}"#, r#"{"sub":"s"}"#, r#"{"iss":"","sub":"s"}"#, r#"{"iss":["i"],"sub":"s"}"#]
    {
        check(condition("request.auth.principal"), &Request::usual().claims(claims), &[(&["*"], false)]);
    }
    check(condition("request.auth.principal"), &Request::usual(), &[(&["*"], false)]);
    check(condition("request.auth.claims[iss]"), &Request::usual(), &[(&["*"], false)]);
}

#[test]
fn of_a_rule_each_part_has_to_hold_and_of_a_part_any_element() {
    let source = |namespace: &str| proto::Source { namespaces: texts(&[namespace]), ..Default::default() };
    let operation = |method: &str| proto::Operation { methods: texts(&[method]), ..Default::default() };
    let one = |value: &str| when("request.headers[x]", &[value], &[]).when;
    let rule = |sources: &[&str], to: &[&str], when: &[&str]| proto::PolicyRule {
        from: sources.iter().map(|one| source(one)).collect(),
        to: to.iter().map(|one| operation(one)).collect(),
        when: when.iter().flat_map(|value| one(value)).collect(),
    };
    let request = Request::usual().header("x", "v");
    for (sources, to, when, wanted) in [
        (&["a"][..], &["GET"][..], &["v"][..], true),
        (&["b", "a"], &["PUT", "GET"], &["v", "*"], true),
        (&["b"], &["GET"], &["v"], false),
        (&["a"], &["PUT"], &["v"], false),
        (&["a"], &["GET"], &["w"], false),
        (&["a"], &["GET"], &["v", "w"], false),
        (&[], &[], &[], true),
        (&[], &["GET"], &[], true),
    ] {
        assert_eq!(allows(rule(sources, to, when), &request), wanted, "{sources:?} {to:?} {when:?}");
    }
    // All lists of one element.
    let both = proto::Source { not_principals: texts(&["*/sa/x"]), ..source("a") };
    assert!(!allows(from(both.clone()), &request));
    let other = request.with(|r| r.identity = Some(identity("cluster.local/ns/a/sa/y")));
    assert!(allows(from(both), &other));
}
