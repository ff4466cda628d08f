use crate::Object;
use crate::manifest::parse_file;

use super::*;

fn route(kind: &str, spec: &str) -> Route {
    let text = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: {kind}\nmetadata: {{name: r, namespace: shop}}\nspec: {spec}\n"
    );
    let parsed = parse_file("r.yaml", &text);
    assert_eq!(parsed.errors, [], "{text}");
    let object = &parsed.objects[0].object;
    assert_eq!(
        parsed.notes.len(),
        object.route().unwrap().faults().count(),
        "each fault is noted with its line"
    );
    object.route().unwrap().clone()
}

fn faults(kind: &str, spec: &str) -> Vec<String> {
    route(kind, spec).faults().map(ToString::to_string).collect()
}

/// The one rule of an HTTPRoute, in flow style.
fn http(rule: &str) -> HttpRule {
    route("HTTPRoute", &format!("{{parentRefs: [{{kind: Service, group: \"\", name: s}}], rules: [{rule}]}}"))
        .spec
        .http[0]
        .clone()
}

#[test]
fn what_is_left_out_is_as_the_gateway_api_says() {
    let read = route(
        "HTTPRoute",
        "{parentRefs: [{name: g}, {group: \"\", kind: Service, name: s, namespace: other, port: 80, sectionName: http}], rules: [{matches: [{}, {path: {}}], backendRefs: [{name: b, port: 80}]}]}",
    );
    assert_eq!(read.faults().count(), 0, "{read:#?}");
    let [gateway, service] = read.spec.parents.as_slice() else { panic!("{read:#?}") };
    assert_eq!((gateway.group.as_str(), gateway.kind.as_str()), (GROUP, "Gateway"));
    assert_eq!((service.namespace.as_deref(), service.port.map(Port::get)), (Some("other"), Some(80)));
    let rule = &read.spec.http[0];
    assert_eq!(rule.matches[0].path, None);
    assert_eq!(rule.matches[1].path, Some(PathMatch::Prefix("/".to_owned())));
    let backend = &rule.backends[0];
    assert_eq!(
        (backend.weight, backend.target.kind.as_str(), backend.target.group.as_str()),
        (1, "Service", "")
    );
    assert_eq!(route("HTTPRoute", "{}").spec.http, [HttpRule::default()]);
    assert_eq!(route("GRPCRoute", "{}").spec.http, []);
}

#[test]
fn every_field_of_a_rule_is_read() {
    let rule = http(
        "{name: one, matches: [{path: {type: Exact, value: /a}, method: GET, headers: [{name: X-A, value: b}, {name: x-a, value: c}, {name: Y, type: RegularExpression, value: 'a|b'}], queryParams: [{name: q, value: v}]}], \
        filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: A, value: b}], add: [{name: C, value: d}], remove: [E]}}, \
        {type: URLRewrite, urlRewrite: {hostname: h.example, path: {type: ReplaceFullPath, replaceFullPath: /b}}}, \
        {type: RequestMirror, requestMirror: {backendRef: {name: m, port: 1}, fraction: {numerator: 1, denominator: 3}}}, \
        {type: CORS, cors: {allowOrigins: ['https://*.example.com:8443'], allowMethods: [GET], allowCredentials: true, maxAge: 7}}], \
        backendRefs: [{name: b, port: 80, weight: 0, filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {remove: [Server]}}]}], \
        timeouts: {request: 10s, backendRequest: 500ms}, retry: {codes: [503], attempts: 2, backoff: 100ms}, \
        sessionPersistence: {type: Cookie, absoluteTimeout: 1h, cookie: {name: sid, lifetimeType: Permanent}}}",
    );
    assert_eq!(rule.faults, []);
    assert_eq!(rule.matches[0].headers.len(), 2, "of one name the first counts");
    assert_eq!((rule.filters.len(), rule.backends[0].filters.len(), rule.backends[0].weight), (4, 1, 0));
    assert_eq!((rule.request_timeout, rule.backend_timeout), (Some(Millis(10_000)), Some(Millis(500))));
    assert_eq!(rule.retry.unwrap().backoff, Some(Millis(100)));
    let session = rule.session.unwrap();
    assert_eq!((session.name.as_str(), session.permanent), ("sid", true));
    let Filter::Mirror(mirror) = &rule.filters[2] else { panic!() };
    assert_eq!((mirror.share.numerator, mirror.share.denominator, mirror.target.name.as_str()), (1, 3, "m"));
}

/// A rule of an HTTPRoute, and what is said of it.
const RULES: &[(&str, &str)] = &[
    ("{filter: []}", "spec.rules[0].filter: unknown field"),
    (
        "{filters: [{type: ExternalAuth, externalAuth: {protocol: GRPC}}]}",
        "spec.rules[0].filters[0].type: is not carried out",
    ),
    ("{filters: [{type: New}]}", "spec.rules[0].filters[0].type: unknown value (got \"New\""),
    ("{filters: [{type: CORS}]}", "spec.rules[0].filters[0].cors: is required"),
    (
        "{filters: [{type: CORS, cors: {allowOrigins: [example.com]}}]}",
        "spec.rules[0].filters[0].cors.allowOrigins: invalid value (got \"example.com\"",
    ),
    (
        "{filters: [{type: CORS, cors: {allowMethods: [GET, '*']}}]}",
        "spec.rules[0].filters[0].cors.allowMethods: stands beside",
    ),
    (
        "{filters: [{type: RequestRedirect, requestRedirect: {statusCode: 305}}]}",
        "spec.rules[0].filters[0].requestRedirect.statusCode: unknown value (got \"305\"",
    ),
    (
        "{filters: [{type: RequestRedirect, requestRedirect: {}}], backendRefs: [{name: b, port: 1}]}",
        "spec.rules[0].backendRefs: stand beside a redirect",
    ),
    (
        "{filters: [{type: RequestRedirect, requestRedirect: {}}, {type: URLRewrite, urlRewrite: {}}]}",
        "spec.rules[0].filters: has RequestRedirect beside",
    ),
    (
        "{matches: [{path: {type: Exact, value: /}}], filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /}}}]}",
        "spec.rules[0].filters: replaces a prefix",
    ),
    (
        "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: b}, percent: 101}}]}",
        "spec.rules[0].filters[0].requestMirror: is no part of one (got \"101/100\"",
    ),
    (
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: 'a b', value: c}]}}]}",
        "spec.rules[0].filters[0].requestHeaderModifier.set[0].name: invalid value (got \"a b\"",
    ),
    (
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: \"b\\r\\nc: d\"}]}}]}",
        "spec.rules[0].filters[0].requestHeaderModifier.set[0].value: invalid value",
    ),
    (
        "{backendRefs: [{name: b, port: 80, weight: 1000001}]}",
        "spec.rules[0].backendRefs[0].weight: invalid value",
    ),
    ("{backendRefs: [{name: b, port: 80, wait: 1}]}", "spec.rules[0].backendRefs[0].wait: unknown field"),
    (
        "{backendRefs: [{name: b/c, port: 80}]}",
        "spec.rules[0].backendRefs[0].name: invalid name (got \"b/c\"",
    ),
    (
        "{backendRefs: [{name: b, namespace: a.b, port: 80}]}",
        "spec.rules[0].backendRefs[0].namespace: invalid name",
    ),
    ("{timeouts: {request: 10}}", "spec.rules[0].timeouts.request: wrong type"),
    ("{timeouts: {request: 1s, backendRequest: 2s}}", "spec.rules[0].timeouts.backendRequest: is longer"),
    ("{retry: {codes: [302]}}", "spec.rules[0].retry.codes: invalid value (got \"302\""),
    (
        "{sessionPersistence: {cookie: {lifetimeType: Permanent}}}",
        "spec.rules[0].sessionPersistence.absoluteTimeout: is required",
    ),
    ("{matches: [{path: {value: a}}]}", "spec.rules[0].matches[0].path.value: invalid value (got \"a\""),
    ("{matches: [{path: {type: Suffix, value: /a}}]}", "spec.rules[0].matches[0].path.type: unknown"),
    ("{matches: [{method: get}]}", "spec.rules[0].matches[0].method: unknown value (got \"get\""),
    ("{matches: [{cookies: []}]}", "spec.rules[0].matches[0].cookies: unknown field"),
    ("{name: A}", "spec.rules[0].name: invalid name"),
];

/// The same of what could make two parties read one message differently.
const FRAMING: &[(&str, &str)] = &[
    (
        "{filters: [{type: RequestHeaderModifier, requestHeaderModifier: {remove: [Content-Length]}}]}",
        "spec.rules[0].filters[0].requestHeaderModifier: says how a message is framed or where it goes, and no filter may change that (got \"Content-Length\"",
    ),
    (
        "{filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {add: [{name: transfer-encoding, value: chunked}]}}]}",
        "spec.rules[0].filters[0].responseHeaderModifier: says how",
    ),
    (
        "{filters: [{type: URLRewrite, urlRewrite: {path: {type: ReplaceFullPath, replaceFullPath: '/a?b'}}}]}",
        "spec.rules[0].filters[0].urlRewrite.path.replaceFullPath: invalid value (got \"/a?b\"",
    ),
];

/// A kind, its `spec`, and what is said of it.
const SPECS: &[(&str, &str, &str)] = &[
    ("HTTPRoute", "{useDefaultGateways: All}", "spec.useDefaultGateways: unknown field"),
    ("HTTPRoute", "{parentRefs: [{name: a/b}]}", "spec.parentRefs[0].name: invalid name"),
    ("HTTPRoute", "{hostnames: ['*']}", "spec.hostnames[0]: invalid value"),
    ("HTTPRoute", "{rules: {}}", "spec.rules: is no list"),
    ("TCPRoute", "{rules: [{}]}", "spec.rules[0].backendRefs: is required"),
    (
        "TCPRoute",
        "{rules: [{backendRefs: [{name: b, port: 1, filters: []}]}]}",
        "spec.rules[0].backendRefs[0].filters: unknown field",
    ),
    ("GRPCRoute", "{rules: [{timeouts: {request: 1s}}]}", "spec.rules[0].timeouts: unknown field"),
    (
        "GRPCRoute",
        "{rules: [{filters: [{type: CORS, cors: {}}]}]}",
        "spec.rules[0].filters[0].type: is no filter of a GRPCRoute",
    ),
    (
        "GRPCRoute",
        "{rules: [{matches: [{method: {service: a/b}}]}]}",
        "spec.rules[0].matches[0].method.service: invalid value",
    ),
    ("GRPCRoute", "{rules: [{matches: [{method: {}}]}]}", "spec.rules[0].matches[0].method: has neither"),
];

/// Nothing is dropped: whatever is not known, or out of range, is a fault of its rule, with field, value and what would be right.
#[test]
fn what_does_not_fit_breaks_its_rule_and_no_other() {
    for (rule, expected) in RULES.iter().chain(FRAMING) {
        let said = faults("HTTPRoute", &format!("{{rules: [{rule}, {{}}]}}"));
        assert!(said.len() == 1 && said[0].starts_with(expected), "{rule}: {said:?}");
        let read = route("HTTPRoute", &format!("{{rules: [{rule}, {{}}]}}"));
        assert!(read.spec.http[1].faults.is_empty() && read.spec.faults.is_empty(), "{rule}");
    }
    for (kind, spec, expected) in SPECS {
        let said = faults(kind, spec);
        assert!(said.len() == 1 && said[0].starts_with(expected), "{kind} {spec}: {said:?}");
    }
}

/// What cannot be read of a match makes it match more, so that nothing that it may have meant passes by another rule.
#[test]
fn a_match_that_cannot_be_read_keeps_what_can_be() {
    let rule = http(
        "{matches: [{path: {type: Exact, value: /admin}, method: BREW, headers: [{name: a, value: b}, {name: c}]}]}",
    );
    assert_eq!(rule.faults.len(), 2);
    let one = &rule.matches[0];
    assert_eq!(one.path, Some(PathMatch::Exact("/admin".to_owned())));
    assert_eq!((one.method.as_deref(), one.headers.len()), (None, 1));
}

#[test]
fn grpc_methods() {
    let read = route(
        "GRPCRoute",
        "{rules: [{matches: [{method: {service: a.B}}, {method: {type: RegularExpression, method: 'Get.*'}, headers: [{name: x, value: y}]}], backendRefs: [{name: b, port: 80}]}]}",
    );
    assert_eq!(read.faults().count(), 0);
    let grpc = |service: Option<&str>, method: Option<&str>, regex| {
        Some(PathMatch::Grpc {
            service: service.map(str::to_owned),
            method: method.map(str::to_owned),
            regex,
        })
    };
    let paths: Vec<_> = read.spec.http[0].matches.iter().map(|it| it.path.clone()).collect();
    assert_eq!(paths, [grpc(Some("a.B"), None, false), grpc(None, Some("Get.*"), true)]);
}

#[test]
fn streams_and_versions() {
    let read = route(
        "TLSRoute",
        "{hostnames: ['*.a.example'], rules: [{name: x, backendRefs: [{name: b, port: 443, weight: 3}]}]}",
    );
    assert_eq!((read.spec.hostnames.len(), read.spec.streams[0].backends[0].weight), (1, 3));
    let version = |kind: &str, version: &str| {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: r}}\nspec: {{}}\n"
        );
        parse_file("r.yaml", &text).errors.is_empty()
    };
    for (kind, good, bad) in [
        ("HTTPRoute", "v1beta1", "v1alpha2"),
        ("GRPCRoute", "v1alpha2", "v1beta1"),
        ("TCPRoute", "v1alpha2", "v2"),
        ("TLSRoute", "v1alpha3", "v1beta1"),
        ("ReferenceGrant", "v1beta1", "v1alpha2"),
    ] {
        assert!(version(kind, "v1") && version(kind, good) && !version(kind, bad), "{kind}");
    }
}

#[test]
fn a_grant_permits_what_it_names() {
    let grant = |spec: &str| {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1beta1\nkind: ReferenceGrant\nmetadata: {{name: g, namespace: shop}}\nspec: {spec}\n"
        );
        let parsed = parse_file("g.yaml", &text);
        match parsed.objects.first().map(|it| &it.object) {
            Some(Object::ReferenceGrant(it)) => Some((**it).clone()),
            _ => None,
        }
    };
    let from = "from: [{group: gateway.networking.k8s.io, kind: HTTPRoute, namespace: web}]";
    let all = grant(&format!("{{{from}, to: [{{group: \"\", kind: Service}}]}}")).unwrap();
    let one = grant(&format!("{{{from}, to: [{{group: \"\", kind: Service, name: s}}]}}")).unwrap();
    assert!(all.permits("HTTPRoute", "web", ("", "Service", "t")));
    assert!(
        one.permits("HTTPRoute", "web", ("", "Service", "s"))
            && !one.permits("HTTPRoute", "web", ("", "Service", "t"))
    );
    assert!(
        !all.permits("GRPCRoute", "web", ("", "Service", "t"))
            && !all.permits("HTTPRoute", "other", ("", "Service", "t"))
    );
    assert!(!all.permits("HTTPRoute", "web", ("networking.istio.io", "ServiceEntry", "t")));
    assert_eq!(
        grant(&format!("{{{from}, to: [{{kind: Service, only: x}}]}}")),
        None,
        "what may restrict it is not skipped"
    );
}
