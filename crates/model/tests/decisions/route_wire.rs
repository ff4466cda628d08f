//! Routes as they come over the wire: what is not understood answers 500 to what it might have been for, and touches no other.

use culvert_model::route::Filter;
use culvert_model::wire;
use culvert_proto::waypoint as proto;
use culvert_proto::waypoint::path_match::Kind as Path;
use prost::Message;

use crate::route::{decode, found, get, on, resource_name, route, rule};

/// The reason why what a request is for is broken.
fn broken(decoded: &wire::RouteResource, path: &str) -> Option<String> {
    let table = culvert_model::route::Routes::default().with(&[], vec![decoded.route.clone().unwrap()]);
    let name = found(&table, &get(path)).unwrap();
    let route = decoded.route.as_ref().unwrap();
    let rule = route.http.iter().find(|it| name == format!("{}/{}", route.name, it.rule_name()))?;
    rule.broken.as_deref().map(str::to_owned)
}

trait Named {
    fn rule_name(&self) -> &str;
}

impl Named for culvert_model::route::HttpRule {
    fn rule_name(&self) -> &str {
        &self.name.0
    }
}

#[test]
fn an_unknown_field_breaks_the_route() {
    let good = route("r", vec![rule("one", vec![on(Path::Exact("/a".into()))])]);
    let mut body = good.encode_to_vec();
    body.extend_from_slice(&[0xf8, 0x07, 0x01]); // field 127
    let decoded = wire::route(&resource_name(&good), &body);
    assert!(decoded.error.as_ref().unwrap().reason.contains("127"), "{:?}", decoded.error);
    assert!(broken(&decoded, "/other").unwrap().contains("127"));
    let junk = wire::route(&resource_name(&good), &[0xff]);
    assert!(broken(&junk, "/any").is_some() && junk.error.is_some());
}

#[test]
fn a_name_that_is_none_says_nothing() {
    for name in
        ["", "r", "HTTPRoute/n/r/n/h", "Ingress/n/r/n/h/0", "HTTPRoute/n/r/n/h/70000", "HTTPRoute//r/n/h/0"]
    {
        let decoded = wire::route(name, &[]);
        assert!(decoded.route.is_none() && decoded.error.is_some(), "{name}");
    }
    let other = route("other", vec![]);
    let decoded = wire::route("HTTPRoute/shop/r/shop/web.shop.svc/0", &other.encode_to_vec());
    assert!(broken(&decoded, "/").unwrap().contains("different"));
}

/// A rule that cannot be understood breaks that rule; the others of its route go on.
#[test]
fn a_bad_value_breaks_its_rule() {
    let regex = on(Path::Regex("(".into()));
    let decoded = decode(&route("r", vec![rule("bad", vec![regex]), rule("good", vec![])]));
    assert!(decoded.error.is_some());
    assert!(broken(&decoded, "/").is_some(), "it might have been for this, and nobody knows that it was not");

    let filter = proto::Filter {
        kind: Some(proto::filter::Kind::RequestHeaders(proto::HeaderChange {
            remove: vec!["Transfer-Encoding".into()],
            ..Default::default()
        })),
    };
    let bad = proto::HttpRule { filters: vec![filter], ..rule("bad", vec![on(Path::Exact("/a".into()))]) };
    let decoded = decode(&route("r", vec![bad, rule("good", vec![])]));
    assert!(decoded.error.is_some());
    assert!(broken(&decoded, "/a").unwrap().contains("transfer-encoding"));
    assert_eq!(broken(&decoded, "/b"), None);
}

#[test]
fn what_is_out_of_bounds_is_named() {
    use proto::filter::Kind;
    let redirect = |change: &dyn Fn(&mut proto::Redirect)| {
        let mut redirect = proto::Redirect { status: 302, ..Default::default() };
        change(&mut redirect);
        Kind::Redirect(redirect)
    };
    let full = |path: &str| {
        let kind = Some(proto::path_change::Kind::Full(path.into()));
        Some(proto::PathChange { kind })
    };
    let header = |name: &str, value: &str| {
        let one = proto::Header { name: name.into(), value: value.into() };
        Kind::RequestHeaders(proto::HeaderChange { set: vec![one], ..Default::default() })
    };
    for (kind, names) in [
        (redirect(&|it| it.status = 200), "200"),
        (redirect(&|it| it.scheme = "ftp".into()), "ftp"),
        (redirect(&|it| it.port = 65_536), "65536"),
        (redirect(&|it| it.hostname = "a b".into()), "a b"),
        (redirect(&|it| it.path = full("/a?b")), "/a?b"),
        (header("a b", "1"), "a b"),
        (header("a", "1\n2"), "1\\n2"),
        (header("content-length", "1"), "content-length"),
        (Kind::Mirror(proto::Mirror::default()), "mirror.backend"),
    ] {
        let filters = vec![proto::Filter { kind: Some(kind) }];
        let decoded = decode(&route("r", vec![proto::HttpRule { filters, ..rule("one", vec![]) }]));
        let reason = decoded.error.unwrap().reason;
        assert!(reason.contains(names) && reason.starts_with("http_rules[0]: "), "{reason}");
    }
}

/// A message that holds itself again and again ends the walk, not the stack.
#[test]
fn depth_is_bounded() {
    let mut backend = proto::Backend { service_hostname: "h".into(), port: 80, ..Default::default() };
    for _ in 0..40 {
        let mirror = proto::Mirror { backend: Some(backend), share: 1 };
        let filters = vec![proto::Filter { kind: Some(proto::filter::Kind::Mirror(mirror)) }];
        backend = proto::Backend { filters, service_hostname: "h".into(), port: 80, ..Default::default() };
    }
    let decoded =
        decode(&route("r", vec![proto::HttpRule { backends: vec![backend], ..rule("one", vec![]) }]));
    assert!(decoded.error.unwrap().reason.contains("deep"));
}

#[test]
fn a_broken_backend_is_only_its_share() {
    let backend = proto::Backend { weight: 1, broken: "no such Service".into(), ..Default::default() };
    let decoded =
        decode(&route("r", vec![proto::HttpRule { backends: vec![backend], ..rule("one", vec![]) }]));
    assert_eq!(decoded.error, None);
    let route = decoded.route.unwrap();
    assert_eq!(route.http[0].broken, None);
    assert_eq!(route.http[0].backends[0].broken.as_deref(), Some("no such Service"));
    let filter = proto::Filter { kind: Some(proto::filter::Kind::Broken("why".into())) };
    let decoded = decode(&crate::route::route(
        "r",
        vec![proto::HttpRule { filters: vec![filter], ..rule("one", vec![]) }],
    ));
    assert!(matches!(&decoded.route.unwrap().http[0].filters[..], [Filter::Broken(why)] if &**why == "why"));
}
