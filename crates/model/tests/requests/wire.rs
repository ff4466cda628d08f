//! What is understood of a policy's bytes, and what happens to the rest (W55, D06).

use culvert_model::address::NamespacedHostname;
use culvert_model::request::{Action, Targets};
use culvert_model::wire::RequestPolicyError as Error;
use culvert_model::wire::request::decode as decode_bytes;
use culvert_model::wire::unknown::UnknownError;
use culvert_proto::waypoint as proto;
use proptest::prelude::*;
use prost::Message;

use crate::generate::Dice;
use crate::world::{allow, decode, from, policy, texts, to, when};

fn error(rule: proto::PolicyRule) -> Error {
    let decoded = decode(&allow(vec![rule]));
    let error = decoded.error.expect("refused");
    assert_eq!(decoded.policy.undecodable.as_deref(), Some(&*error.to_string()));
    error
}

fn bytes(message: &proto::Policy) -> Vec<u8> {
    message.encode_to_vec()
}

/// A length-delimited field.
fn field(tag: u8, inner: &[u8]) -> Vec<u8> {
    [&[tag << 3 | 2, u8::try_from(inner.len()).unwrap()], inner].concat()
}

fn target(namespace: &str, hostname: &str) -> proto::Target {
    proto::Target { service_namespace: namespace.into(), service_hostname: hostname.into() }
}

/// W55.
#[test]
fn keys_that_are_not_known_are_refused() {
    for key in [
        "experimental.envoy.filters.network.mysql_proxy[db.table]",
        "destination.labels[version]",
        "source.ip ",
        "Source.ip",
        "request.headers",
        "request.auth.claims",
        "request.auth",
        "",
    ] {
        assert_eq!(error(when(key, &["v"], &[])), Error::Key(key.into()));
    }
    for key in [
        "request.headers[]",
        "request.headers[a",
        "request.headers[a b]",
        "request.headers[a]b",
        "request.headers[a][b]",
        "request.auth.claims[]",
        "request.auth.claims[a][]",
        "request.auth.claims[a]x[b]",
        "request.auth.claims[a",
    ] {
        assert_eq!(error(when(key, &["v"], &[])), Error::KeyName(key.into()));
    }
    for key in ["request.headers[:path]", "request.headers[:scheme]"] {
        assert!(matches!(error(when(key, &["v"], &[])), Error::Pseudo { .. }));
    }
}

#[test]
fn values_that_nothing_matches_are_refused() {
    for (key, value) in [("source.ip", "10.0.0.0/33"), ("remote.ip", "localhost"), ("destination.ip", "")] {
        for rule in [when(key, &[value], &[]), when(key, &[], &["10.0.0.1", value])] {
            assert!(matches!(error(rule), Error::Block { .. }), "{key} {value}");
        }
    }
    for value in ["65536", "-1", "+80", "http", "", "80-90"] {
        assert!(matches!(error(when("destination.port", &[value], &[])), Error::Port { .. }), "{value}");
    }
    let ports = proto::Operation { not_ports: vec![65_536], ..Default::default() };
    let wanted = "not ports has \"65536\", which is no port between 0 and 65535";
    assert_eq!(error(to(ports)).to_string(), wanted);
    for value in ["a/b/c", "/x", "a/", "", "a/*", "*"] {
        assert!(matches!(error(when("source.serviceAccount", &[value], &[])), Error::Account { .. }));
    }
    for key in ["source.namespace", "source.principal", "request.headers[x]", "connection.sni"] {
        assert!(matches!(error(when(key, &[""], &[])), Error::Empty { .. }), "{key}");
    }
    for path in ["a", "/a?b", "/{*}/{name}", "/%zz"] {
        let operation = proto::Operation { paths: texts(&[path]), ..Default::default() };
        assert!(matches!(error(to(operation)), Error::Path { .. }), "{path}");
    }
    let empty = proto::Operation { paths: texts(&[""]), ..Default::default() };
    assert!(matches!(error(to(empty)), Error::Empty { .. }));
}

#[test]
fn an_element_that_asks_for_nothing_is_refused() {
    let part = |rule| match error(rule) {
        Error::Nothing { rule, part, index } => (rule, part, index),
        other => panic!("{other}"),
    };
    assert_eq!(part(from(proto::Source::default())), (0, "from", 0));
    assert_eq!(part(to(proto::Operation::default())), (0, "to", 0));
    assert_eq!(part(when("source.ip", &[], &[])), (0, "when", 0));
    // A rule without parts is everything, and says so.
    assert_eq!(decode(&allow(vec![proto::PolicyRule::default()])).error, None);
}

#[test]
fn a_provider_belongs_to_custom() {
    use proto::policy::Action as Wire;
    let with = |action, provider: &str| {
        decode(&proto::Policy { provider: provider.into(), ..policy("p", action, vec![]) })
    };
    assert_eq!(with(Wire::Custom, "ext").policy.action, Action::Custom("ext".into()));
    assert_eq!(with(Wire::Custom, "").error, Some(Error::Provider(String::new())));
    for action in [Wire::Allow, Wire::Deny, Wire::Audit] {
        assert_eq!(with(action, "").error, None);
        assert_eq!(with(action, "ext").error, Some(Error::Provider("ext".into())));
    }
}

#[test]
fn a_policy_is_what_its_resource_is_named() {
    let body = bytes(&allow(vec![]));
    assert_eq!(decode_bytes("a/allow", &body).error, None);
    for name in ["a/other", "b/allow"] {
        let decoded = decode_bytes(name, &body);
        assert_eq!(decoded.error, Some(Error::Name { resource: name.into(), found: "a/allow".into() }));
        assert_eq!(decoded.policy.key.to_string(), name);
    }
    for name in ["allow", "/allow", "a/", ""] {
        assert_eq!(decode_bytes(name, &body).error, Some(Error::ResourceName(name.into())));
    }
}

#[test]
fn an_unknown_field_or_action_denies_the_targets_that_can_be_read() {
    let targeted =
        proto::Policy { targets: vec![target("a", "shop"), target("b", "Cart.")], ..allow(vec![]) };
    let services = Targets::Services(vec![
        NamespacedHostname { namespace: "a".into(), hostname: "shop".into() },
        NamespacedHostname { namespace: "b".into(), hostname: "cart".into() },
    ]);
    let denies = |body: &[u8]| {
        let decoded = decode_bytes("a/allow", body);
        assert!(decoded.error.is_some() && decoded.policy.undecodable.is_some(), "{decoded:?}");
        (decoded.error.unwrap(), decoded.policy.targets)
    };
    let body = bytes(&targeted);
    let unknown = |message, tag| Error::Unknown(UnknownError::Field { message, tag });
    // At each depth.
    assert_eq!(denies(&[&body[..], &field(8, b"x")].concat()), (unknown("Policy", 8), services.clone()));
    for (path, message, tag) in [
        (&[7][..], "PolicyRule", 4),
        (&[7, 1], "Source", 13),
        (&[7, 2], "Operation", 9),
        (&[7, 3], "Condition", 4),
    ] {
        let inner = path.iter().rev().fold(field(tag, b"x"), |inner, outer| field(*outer, &inner));
        assert_eq!(
            denies(&[&body[..], &inner].concat()),
            (unknown(message, tag.into()), services.clone()),
            "{message}"
        );
    }
    let action = proto::Policy { action: 4, ..targeted.clone() };
    let value = UnknownError::Value { message: "Policy", field: "action", value: 4 };
    assert_eq!(denies(&bytes(&action)), (Error::Unknown(value), services.clone()));
    // Texts that are none, in a rule: the targets are still there.
    let rule = field(7, &field(3, &field(1, &[0xff])));
    assert_eq!(denies(&[&body[..], &rule].concat()).1, services);
}

#[test]
fn what_cannot_be_read_could_be_about_anything() {
    let targeted = bytes(&proto::Policy { targets: vec![target("a", "shop")], ..allow(vec![]) });
    let readable = decode_bytes("a/allow", &targeted).policy.targets;
    assert!(matches!(readable, Targets::Services(_)));
    for extra in [
        // A target with a field that may make another of it, without a name, or that is no message.
        field(6, &[field(1, b"a"), field(2, b"shop"), field(3, b"x")].concat()),
        field(6, &field(1, b"a")),
        field(6, &field(2, b"shop")),
        field(6, &[0xff]),
        vec![6 << 3, 1],
        // What follows is lost.
        vec![7 << 3 | 2, 200],
        vec![0xff],
    ] {
        let decoded = decode_bytes("a/allow", &[&targeted[..], &extra].concat());
        assert_eq!(decoded.policy.targets, Targets::All, "{extra:?}");
        assert!(decoded.policy.undecodable.is_some(), "{extra:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_make_a_policy(name in "[a-z/]{0,5}", body in prop::collection::vec(any::<u8>(), 0..64)) {
        let decoded = decode_bytes(&name, &body);
        prop_assert_eq!(decoded.error.is_some(), decoded.policy.undecodable.is_some());
    }

    /// A real policy, with a few bytes changed or the end cut off: understood, or denying.
    #[test]
    fn damaged_bytes_make_a_policy(
        seed in any::<u64>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        length in any::<prop::sample::Index>(),
    ) {
        let mut body = Dice::new(seed).policy("p").encode_to_vec();
        prop_assume!(!body.is_empty());
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        body.truncate(length.index(body.len() + 1));
        let decoded = decode_bytes("a/p", &body);
        prop_assert_eq!(decoded.error.is_some(), decoded.policy.undecodable.is_some());
    }
}
