//! Which rule a request is for, against a model written from the Gateway API's text on the messages themselves.

use culvert_model::address::NamespacedHostname;
use culvert_model::route::table::FoundStream;
use culvert_model::route::{Found, RequestFacts, Routes};
use culvert_model::wire;
use culvert_proto::waypoint as proto;
use culvert_proto::waypoint::path_match::Kind as Path;
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use proptest::prelude::*;
use prost::Message;

/// A request as a test writes it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: &'static str,
    pub path: String,
    pub query: Vec<(&'static str, &'static str)>,
    pub headers: Vec<(&'static str, &'static str)>,
    pub port: u16,
    pub client: Option<&'static str>,
}

pub fn get(path: &str) -> Asked {
    Asked { method: "GET", path: path.into(), query: Vec::new(), headers: Vec::new(), port: 80, client: None }
}

pub fn route(name: &str, rules: Vec<proto::HttpRule>) -> proto::Route {
    proto::Route {
        kind: "HTTPRoute".into(),
        namespace: "shop".into(),
        name: name.into(),
        service_namespace: "shop".into(),
        service_hostname: "web.shop.svc".into(),
        http_rules: rules,
        ..Default::default()
    }
}

pub fn rule(name: &str, matches: Vec<proto::HttpMatch>) -> proto::HttpRule {
    proto::HttpRule { name: name.into(), matches, ..Default::default() }
}

pub fn on(path: Path) -> proto::HttpMatch {
    proto::HttpMatch { path: Some(proto::PathMatch { kind: Some(path) }), ..Default::default() }
}

pub fn resource_name(route: &proto::Route) -> String {
    let proto::Route { kind, namespace, name, service_namespace, service_hostname, port, .. } = route;
    format!("{kind}/{namespace}/{name}/{service_namespace}/{service_hostname}/{port}")
}

pub fn decode(message: &proto::Route) -> wire::RouteResource {
    wire::route(&resource_name(message), &message.encode_to_vec())
}

pub fn routes(messages: &[proto::Route]) -> Routes {
    let all = messages.iter().map(|message| {
        let decoded = decode(message);
        assert_eq!(decoded.error, None);
        decoded.route.unwrap()
    });
    Routes::default().with(&[], all.collect())
}

fn web() -> NamespacedHostname {
    NamespacedHostname { namespace: "shop".into(), hostname: "web.shop.svc".into() }
}

/// `route/rule` that a request is for, `-` for no match, or nothing for no route.
pub fn found(routes: &Routes, asked: &Asked) -> Option<String> {
    let method = Method::from_bytes(asked.method.as_bytes()).unwrap();
    let headers: HeaderMap = asked
        .headers
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect();
    let query: Vec<String> = asked.query.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let query = query.join("&");
    let facts = RequestFacts {
        method: &method,
        path: &asked.path,
        query: (!query.is_empty()).then_some(query.as_str()),
        headers: &headers,
    };
    match routes.find(&web(), asked.port, asked.client, &facts) {
        Found::NoRoute => None,
        Found::NoMatch => Some("-".to_owned()),
        Found::Rule { route, rule, .. } => Some(format!("{}/{}", route.name, rule.name.0)),
    }
}

mod model {
    //! The specification, slowly: every match of every rule is looked at, and all that hold are sorted.

    use super::*;

    pub fn found(routes: &[proto::Route], asked: &Asked) -> Option<String> {
        let of = |consumer: &str| -> Vec<&proto::Route> {
            let side = routes.iter().filter(|route| route.consumer_namespace == consumer);
            let named: Vec<_> = side.clone().filter(|it| it.port == u32::from(asked.port)).collect();
            if named.is_empty() { side.filter(|route| route.port == 0).collect() } else { named }
        };
        let mut all = asked.client.map(of).unwrap_or_default();
        if all.is_empty() {
            all = of("");
        }
        if all.is_empty() {
            return None;
        }
        let mut holding = Vec::new();
        for route in all {
            for (index, rule) in route.http_rules.iter().enumerate() {
                let everything = [proto::HttpMatch::default()];
                let matches = if rule.matches.is_empty() { &everything[..] } else { &rule.matches };
                for one in matches.iter().filter(|one| holds(one, asked)) {
                    // What is smaller comes first.
                    let rank = (kind(one), -length(one), -i32::from(!one.method.is_empty()));
                    let counts = (-(one.headers.len() as i32), -(one.query_params.len() as i32));
                    let age = (route.created, route.namespace.clone(), route.name.clone(), index);
                    holding.push((rank, counts, age, format!("{}/{}", route.name, rule.name)));
                }
            }
        }
        holding.sort();
        Some(holding.into_iter().next().map_or("-".to_owned(), |it| it.3))
    }

    fn path(one: &proto::HttpMatch) -> Path {
        one.path.clone().and_then(|it| it.kind).unwrap_or(Path::Prefix("/".into()))
    }

    fn kind(one: &proto::HttpMatch) -> i32 {
        match path(one) {
            Path::Exact(_) => 0,
            Path::Regex(_) => 1,
            Path::Prefix(_) => 2,
            Path::Grpc(_) => unreachable!("not among these"),
        }
    }

    fn length(one: &proto::HttpMatch) -> i32 {
        match path(one) {
            Path::Exact(path) | Path::Regex(path) => path.len() as i32,
            Path::Prefix(path) => path.trim_end_matches('/').len() as i32,
            Path::Grpc(_) => unreachable!("not among these"),
        }
    }

    fn holds(one: &proto::HttpMatch, asked: &Asked) -> bool {
        let path = match path(one) {
            Path::Exact(path) => path == asked.path,
            Path::Regex(pattern) => pattern == "/a.*" && asked.path.starts_with("/a"),
            Path::Prefix(prefix) => {
                let segments = |text: &str| {
                    let text = text.trim_start_matches('/');
                    text.split('/').map(str::to_owned).collect::<Vec<_>>()
                };
                let wanted = prefix.trim_end_matches('/');
                wanted.is_empty() || segments(&asked.path).starts_with(&segments(wanted))
            }
            Path::Grpc(_) => unreachable!("not among these"),
        };
        let is = |wanted: &proto::ValueMatch, given: &[(&str, &str)]| {
            let Some(proto::value_match::Kind::Exact(text)) = &wanted.kind else { unreachable!() };
            given.iter().any(|(name, value)| *name == wanted.name && value == text)
        };
        path && (one.method.is_empty() || one.method == asked.method)
            && one.headers.iter().all(|header| is(header, &asked.headers))
            && one.query_params.iter().all(|parameter| is(parameter, &asked.query))
    }
}

fn some_path() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(vec!["a", "ab", "b"]), 0..4)
        .prop_flat_map(|parts| (Just(parts), any::<bool>()))
        .prop_map(|(parts, slash)| {
            let path = format!("/{}", parts.join("/"));
            if slash && path.len() > 1 { format!("{path}/") } else { path }
        })
}

/// Of each name one at most.
fn some_values() -> impl Strategy<Value = Vec<(&'static str, &'static str)>> {
    let value = || prop::option::weighted(0.4, prop::sample::select(vec!["1", "2"]));
    (value(), value()).prop_map(|(x, y)| {
        x.map(|value| ("x", value)).into_iter().chain(y.map(|value| ("y", value))).collect()
    })
}

fn wanted(values: Vec<(&'static str, &'static str)>) -> Vec<proto::ValueMatch> {
    let one = |(name, text): (&str, &str)| proto::ValueMatch {
        name: name.into(),
        kind: Some(proto::value_match::Kind::Exact(text.into())),
    };
    values.into_iter().map(one).collect()
}

fn some_match() -> impl Strategy<Value = proto::HttpMatch> {
    let path = prop_oneof![
        Just(None),
        some_path().prop_map(|path| Some(Path::Exact(path))),
        some_path().prop_map(|path| Some(Path::Prefix(path))),
        Just(Some(Path::Regex("/a.*".into()))),
    ];
    let method = prop::sample::select(vec!["", "", "GET", "POST"]);
    (path, method, some_values(), some_values()).prop_map(|(path, method, headers, query)| proto::HttpMatch {
        path: path.map(|kind| proto::PathMatch { kind: Some(kind) }),
        method: method.into(),
        headers: wanted(headers),
        query_params: wanted(query),
    })
}

fn some_routes() -> impl Strategy<Value = Vec<proto::Route>> {
    let rules = prop::collection::vec(prop::collection::vec(some_match(), 0..3), 1..4);
    let client = prop::sample::select(vec!["", "", "", "client"]);
    let one = (rules, client, prop::sample::select(vec![0_u32, 0, 80]), 0_i64..2);
    prop::collection::vec(one, 0..6).prop_map(|all| {
        let named = all.into_iter().enumerate().map(|(at, (rules, client, port, created))| proto::Route {
            http_rules: rules.into_iter().enumerate().map(|(at, it)| rule(&at.to_string(), it)).collect(),
            consumer_namespace: client.into(),
            port,
            created,
            ..route(&format!("r{at}"), Vec::new())
        });
        named.collect()
    })
}

fn some_request() -> impl Strategy<Value = Asked> {
    let method = prop::sample::select(vec!["GET", "POST", "PUT"]);
    let client = prop::sample::select(vec![None, Some("client"), Some("other")]);
    let port = prop::sample::select(vec![80_u16, 81]);
    (method, some_path(), some_values(), some_values(), port, client).prop_map(
        |(method, path, query, headers, port, client)| Asked { method, path, query, headers, port, client },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    /// W33, R20: rules of all routes of a service are one list.
    #[test]
    fn as_the_specification_says(messages in some_routes(), asked in prop::collection::vec(some_request(), 1..8)) {
        let table = routes(&messages);
        for asked in asked {
            prop_assert_eq!(found(&table, &asked), model::found(&messages, &asked), "{:?}", asked);
        }
    }

    /// Step by step, in any order, with some taken away in between, it is the same table.
    #[test]
    fn changes_lead_to_the_same(messages in some_routes(), extra in some_routes(), asked in some_request()) {
        let decoded = |all: &[proto::Route]| all.iter().map(|it| decode(it).route.unwrap()).collect::<Vec<_>>();
        let mut table = Routes::default().with(&[], decoded(&extra));
        let gone: Vec<_> = extra.iter().map(|it| resource_name(it).into()).collect();
        for one in decoded(&messages).into_iter().rev() {
            table = table.with(&[], vec![one]);
        }
        let kept: Vec<String> = messages.iter().map(resource_name).collect();
        let gone: Vec<_> = gone.into_iter().filter(|it: &culvert_model::Str| !kept.contains(&it.to_string())).collect();
        table = table.with(&gone, Vec::new());
        prop_assert_eq!(table.len(), messages.len());
        prop_assert_eq!(table.iter().count(), messages.len());
        prop_assert_eq!(found(&table, &asked), model::found(&messages, &asked));
    }
}

/// Precedence of GRPCRoute: characters of the service, then of the method, then headers. W28.
#[test]
fn grpc_precedence() {
    let grpc = |service: &str, method: &str| {
        on(Path::Grpc(proto::GrpcMethod { service: service.into(), method: method.into(), regex: false }))
    };
    let header = proto::HttpMatch { headers: wanted(vec![("x", "1")]), ..grpc("a.B", "") };
    let rules = vec![
        rule("any", vec![]),
        rule("method", vec![grpc("", "Get")]),
        rule("service", vec![grpc("a.B", "")]),
        rule("header", vec![header]),
        rule("both", vec![grpc("a.B", "Get")]),
    ];
    let table = routes(&[proto::Route { kind: "GRPCRoute".into(), ..route("r", rules) }]);
    let with = |path: &str, headers: &[(&'static str, &'static str)]| {
        found(&table, &Asked { headers: headers.to_vec(), method: "POST", ..get(path) }).unwrap()
    };
    assert_eq!(with("/a.B/Get", &[("x", "1")]), "r/both");
    assert_eq!(with("/a.B/Put", &[("x", "1")]), "r/header");
    assert_eq!(with("/a.B/Put", &[]), "r/service");
    assert_eq!(with("/c.D/Get", &[]), "r/method");
    assert_eq!(with("/c.D/Put", &[]), "r/any");
}

/// W28.
#[test]
fn streams() {
    let stream = |kind: &str, name: &str, hostnames: &[&str]| proto::Route {
        kind: kind.into(),
        hostnames: hostnames.iter().map(|it| it.to_string()).collect(),
        stream_rules: vec![proto::StreamRule::default()],
        ..route(name, Vec::new())
    };
    let tls = [stream("TLSRoute", "one", &["a.example"]), stream("TLSRoute", "wild", &["*.b.example"])];
    let find = |routes: &Routes, name: Option<&str>| match routes.find_stream(&web(), 80, None, name) {
        FoundStream::NoRoute => "none".to_owned(),
        FoundStream::NoMatch => "no match".to_owned(),
        FoundStream::Rule { route, .. } => route.name.to_string(),
    };
    let table = routes(&tls);
    for (name, expected) in [
        (Some("a.example"), "one"),
        (Some("A.example."), "one"),
        (Some("x.b.example"), "wild"),
        (Some("y.x.b.example"), "wild"),
        (Some("b.example"), "no match"),
        (None, "no match"),
    ] {
        assert_eq!(find(&table, name), expected, "{name:?}");
    }
    assert_eq!(table.kinds(&web(), 80, None), (false, true));
    assert!(table.wants_server_name(&web(), 80, None));
    assert!(!routes(&[stream("TCPRoute", "plain", &[])]).wants_server_name(&web(), 80, None));
    let with_tcp = routes(&[tls[0].clone(), stream("TCPRoute", "plain", &[])]);
    assert_eq!(find(&with_tcp, None), "plain");
    assert_eq!(find(&with_tcp, Some("a.example")), "one");
    assert_eq!(find(&Routes::default(), None), "none");
}

#[test]
fn weights() {
    let backend = |weight: u32| proto::Backend {
        service_hostname: "b".into(),
        service_namespace: "n".into(),
        port: 80,
        weight,
        ..Default::default()
    };
    let backends = vec![backend(0), backend(1), backend(0), backend(3)];
    let rules = vec![proto::HttpRule { backends, ..rule("", vec![]) }];
    let route = decode(&route("r", rules)).route.unwrap();
    let drawn = |point: u64| {
        let of = &route.http[0].backends;
        let found = culvert_model::route::draw(of, &mut |total| {
            assert_eq!(total, 4);
            point
        });
        of.iter().position(|it| std::ptr::eq(it, found.unwrap())).unwrap()
    };
    assert_eq!([0, 1, 2, 3].map(drawn), [1, 3, 3, 3]);
    assert!(culvert_model::route::draw(&route.http[0].backends[..1], &mut |_| unreachable!()).is_none());
}
