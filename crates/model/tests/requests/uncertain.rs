//! What can be read in two ways satisfies no ALLOW and escapes no DENY.

use culvert_model::request::Verdict;
use culvert_proto::waypoint as proto;

use crate::world::{Request, allow, deny, from, set, texts, to, when};

/// Whether an ALLOW lets it through, and whether a DENY stops it.
fn outcome(request: &Request, rule: proto::PolicyRule) -> (bool, bool) {
    let passes = |policy| matches!(request.judge(&set(&[policy])), Verdict::Allow(_));
    (passes(allow(vec![rule.clone()])), !passes(deny(vec![rule])))
}

const YES: (bool, bool) = (true, true);
const MAYBE: (bool, bool) = (false, true);
const NO: (bool, bool) = (false, false);

#[test]
fn a_repeated_header_is_read_line_by_line_and_joined() {
    let of = |name: &str, lines: &[&str]| {
        let request = lines.iter().fold(Request::usual(), |request, line| request.header(name, line));
        let key = format!("request.headers[{name}]");
        move |values: &[&str], not: &[&str]| outcome(&request, when(&key, values, not))
    };
    let two = of("x-user", &["guest", "admin"]);
    assert_eq!(two(&["admin"], &[]), MAYBE);
    assert_eq!(two(&["guest"], &[]), MAYBE);
    assert_eq!(two(&["guest,admin"], &[]), MAYBE);
    assert_eq!(two(&["guest, admin"], &[]), MAYBE);
    assert_eq!(two(&["*"], &[]), YES);
    assert_eq!(two(&["other"], &[]), NO);
    assert_eq!(two(&[], &["admin"]), MAYBE);
    assert_eq!(two(&[], &["other"]), YES);
    assert_eq!(two(&[], &["*"]), NO);
    let alike = of("x-user", &["admin-a", "admin-b", "admin-c"]);
    assert_eq!(alike(&["admin-*"], &[]), YES);
    assert_eq!(alike(&[], &["admin-*"]), NO);
    // As one would forge it: a DENY for everyone but one does not take the line that it likes.
    assert_eq!(of("x-user", &["me", "you"])(&[], &["me"]), MAYBE);
    assert_eq!(of("x-user", &["", "me"])(&["me"], &[]), MAYBE);
    // One line is one value, whatever is in it.
    assert_eq!(of("x-user", &["guest,admin"])(&["admin"], &[]), NO);

    let cookie = of("cookie", &["a=1", "b=2"]);
    assert_eq!(cookie(&["a=1; b=2"], &[]), YES);
    assert_eq!(cookie(&["a=1"], &[]), NO);
    assert_eq!(cookie(&["*b=2"], &[]), YES);
}

#[test]
fn a_host_with_a_port_or_a_dot_may_be_the_host() {
    let of = |authority: &str, hosts: &[&str], not_hosts: &[&str]| {
        let operation =
            proto::Operation { hosts: texts(hosts), not_hosts: texts(not_hosts), ..Default::default() };
        outcome(&Request::usual().host(authority), to(operation))
    };
    assert_eq!(of("shop", &["shop"], &[]), YES);
    for spelled in ["shop:80", "shop.", "SHOP.:8080"] {
        assert_eq!(of(spelled, &["shop"], &[]), MAYBE, "{spelled}");
        assert_eq!(of(spelled, &[], &["shop"]), MAYBE, "{spelled}");
        assert_eq!(of(spelled, &["shop*"], &[]), YES, "{spelled}");
    }
    // As Istio's best practices write it.
    assert_eq!(of("shop:80", &["shop", "shop:*"], &[]), YES);
    assert_eq!(of("shop:80", &["shop:81"], &[]), NO);
    assert_eq!(of("shopping", &["shop"], &[]), NO);
    assert_eq!(of("[fd00::1]:80", &["[fd00::1]"], &[]), MAYBE);
}

#[test]
fn a_subject_with_a_slash_may_be_anothers() {
    let of = |issuer: &str, subject: &str, value: &str| {
        let claims = serde_json::json!({ "iss": issuer, "sub": subject }).to_string();
        let source = proto::Source { request_principals: texts(&[value]), ..Default::default() };
        outcome(&Request::usual().claims(&claims), from(source))
    };
    assert_eq!(of("i", "t/bob", "i/t/bob"), MAYBE);
    assert_eq!(of("i/t", "bob", "i/t/bob"), YES);
    assert_eq!(of("i", "t/bob", "i/t/*"), MAYBE);
    assert_eq!(of("i/t", "bob", "i/t/*"), YES);
    assert_eq!(of("i", "t/bob", "i/*"), YES);
    assert_eq!(of("i", "t/bob", "i/t*"), YES);
    assert_eq!(of("issuer", "t/bob", "iss*"), YES);
    assert_eq!(of("i", "t/bob", "*/bob"), MAYBE);
    assert_eq!(of("i", "t/bob", "*bob"), YES);
    assert_eq!(of("i", "t/bob", "*"), YES);
    assert_eq!(of("i", "t/bob", "j/*"), NO);
}

#[test]
fn an_address_that_is_not_known_may_be_any() {
    let request = Request::usual().with(|r| (r.source, r.remote) = (None, None));
    for key in ["source.ip", "remote.ip"] {
        assert_eq!(outcome(&request, when(key, &["10.0.0.0/8"], &[])), MAYBE);
        assert_eq!(outcome(&request, when(key, &[], &["10.0.0.0/8"])), MAYBE);
    }
}

/// W56: on a connection that is not HTTP an ALLOW rule about HTTP does not match, and of a DENY rule the rest is enforced.
#[test]
fn a_rule_about_http_where_there_is_none() {
    let tcp = Request::usual().with(|request| request.http = None);
    let operation = || proto::Operation { paths: texts(&["/a"]), ..Default::default() };
    let not = || proto::Operation { not_paths: texts(&["/a"]), ..Default::default() };
    assert_eq!(outcome(&tcp, to(operation())), MAYBE);
    assert_eq!(outcome(&tcp, to(not())), MAYBE);
    let with_port = |port: u32| to(proto::Operation { ports: vec![port], ..operation() });
    assert_eq!(outcome(&tcp, with_port(80)), MAYBE);
    assert_eq!(outcome(&tcp, with_port(443)), NO);
    for key in [
        "request.headers[x]",
        "request.headers[host]",
        "request.headers[:method]",
        "request.auth.principal",
        "request.auth.audiences",
        "request.auth.claims[a]",
    ] {
        assert_eq!(outcome(&tcp, when(key, &["v"], &[])), MAYBE, "{key}");
        assert_eq!(outcome(&tcp, when(key, &[], &["v"])), MAYBE, "{key}");
    }
    assert_eq!(outcome(&tcp, when("source.namespace", &["a"], &[])), YES);
    assert_eq!(outcome(&tcp, when("source.namespace", &["b"], &[])), NO);
    // An alternative that is sure is enough.
    let alternatives = proto::PolicyRule {
        to: vec![operation(), proto::Operation { ports: vec![80], ..Default::default() }],
        ..Default::default()
    };
    assert_eq!(outcome(&tcp, alternatives), YES);
}
