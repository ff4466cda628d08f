//! Routes and their filters, end to end.

use culvert_model::workload::AppProtocol;
use culvert_proto::waypoint as proto;
use culvert_proto::waypoint::filter::Kind;
use http::Request;

use super::apps::{App, Got, Sent, ask, get, http1, sent};
use super::soon;
use super::world::{WEB, World, backend, identity, pod, route, rule, service, web};
use crate::http::body;

const ONE: &str = "shop/one.shop.svc.cluster.local";
const TWO: &str = "shop/two.shop.svc.cluster.local";

/// Two backends, and routes to them.
struct Shop {
    world: World,
    one: App,
    two: App,
}

impl Shop {
    async fn new(rules: Vec<proto::HttpRule>) -> Self {
        Self::with(vec![route(rules)]).await
    }

    async fn with(routes: Vec<proto::Route>) -> Self {
        let world = World::new(vec![], vec![], vec![]).await;
        let one = App::start(&world.tasks, "one", "127.0.0.1").await;
        let two = App::start(&world.tasks, "two", "127.0.0.2").await;
        let services = vec![
            web(AppProtocol::Http11),
            service(ONE, "198.18.0.2", 80, AppProtocol::Http11),
            service(TWO, "198.18.0.3", 80, AppProtocol::Http11),
        ];
        let pods = vec![pod("one", one.address, &[ONE, WEB]), pod("two", two.address, &[TWO])];
        world.know(services, pods, routes);
        Self { world, one, two }
    }

    async fn ask(&self, request: Request<Sent>) -> Got {
        let mut client = http1(&self.world.tasks, self.world.tunnel().await).await;
        ask(&mut client, request).await
    }
}

fn filter(kind: Kind) -> proto::Filter {
    proto::Filter { kind: Some(kind) }
}

fn change(set: &[(&str, &str)], add: &[(&str, &str)], remove: &[&str]) -> proto::HeaderChange {
    let headers = |all: &[(&str, &str)]| {
        all.iter()
            .map(|(name, value)| proto::Header { name: (*name).into(), value: (*value).into() })
            .collect()
    };
    proto::HeaderChange {
        set: headers(set),
        add: headers(add),
        remove: remove.iter().map(|it| (*it).into()).collect(),
    }
}

fn filtered(prefix: &str, to: &str, kinds: Vec<Kind>) -> proto::HttpRule {
    proto::HttpRule { filters: kinds.into_iter().map(filter).collect(), ..rule(prefix, &[(to, 1)]) }
}

fn prefix(text: &str) -> Option<proto::PathChange> {
    Some(proto::PathChange { kind: Some(proto::path_change::Kind::Prefix(text.into())) })
}

/// W28.
#[tokio::test]
async fn a_path_leads_to_its_backend() {
    let shop = Shop::new(vec![rule("/one", &[(ONE, 1)]), rule("/two", &[(TWO, 1)])]).await;
    for (path, app) in [("/one", "one"), ("/one/a", "one"), ("/two?x", "two")] {
        assert_eq!(shop.ask(get(path)).await.header("x-app"), app, "{path}");
    }
    let got = shop.ask(get("/other")).await;
    assert_eq!((got.status, got.body.as_str()), (404, "not found"));
}

/// W36.
#[tokio::test]
async fn weights_share_the_requests() {
    let shop = Shop::new(vec![rule("/", &[(ONE, 9), (TWO, 1), (WEB, 0)])]).await;
    let mut client = http1(&shop.world.tasks, shop.world.tunnel().await).await;
    for _ in 0..200 {
        assert_eq!(ask(&mut client, get("/")).await.status, 200);
    }
    // By chance fewer than 3 of 200 once in a million runs.
    let (one, two) = (shop.one.served(), shop.two.served());
    assert!(one + two == 200 && (3..60).contains(&two), "{one} and {two}");
}

/// W36.
#[tokio::test]
async fn headers_change_both_ways() {
    let request = change(&[("X-Set", "new")], &[("x-add", "2")], &["X-Remove"]);
    let response = change(&[("x-app", "hidden")], &[("x-more", "1")], &["seen-host"]);
    let kinds = vec![Kind::RequestHeaders(request), Kind::ResponseHeaders(response)];
    let mut of_rule = filtered("/", ONE, kinds);
    // The backend's filters come after the rule's.
    let own = change(&[("x-backend", "one")], &[], &[]);
    of_rule.backends[0].filters = vec![filter(Kind::RequestHeaders(own))];
    let shop = Shop::new(vec![of_rule]).await;
    let asked = get("/").map(|body| body);
    let (mut parts, body) = asked.into_parts();
    for (name, value) in [("x-set", "old"), ("x-add", "1"), ("x-remove", "1")] {
        parts.headers.insert(name, value.parse().unwrap());
    }
    let got = shop.ask(Request::from_parts(parts, body)).await;
    let added: Vec<_> = got.headers.get_all("seen-x-add").iter().map(|it| it.to_str().unwrap()).collect();
    assert_eq!((got.header("seen-x-set"), added, got.header("seen-x-remove")), ("new", vec!["1", "2"], ""));
    assert_eq!(
        (got.header("seen-x-backend"), got.header("x-app"), got.header("x-more")),
        ("one", "hidden", "1")
    );
    assert_eq!(got.header("seen-host"), "");
}

/// W36.
#[tokio::test]
async fn a_redirect_is_answered_here() {
    let redirect = proto::Redirect {
        hostname: "example.org".into(),
        path: prefix("/new"),
        status: 308,
        ..Default::default()
    };
    let rules =
        vec![proto::HttpRule { backends: vec![], ..filtered("/old", ONE, vec![Kind::Redirect(redirect)]) }];
    let shop = Shop::new(rules).await;
    let got = shop.ask(get("/old/page?x=1")).await;
    assert_eq!((got.status, got.header("location")), (308, "http://example.org/new/page?x=1"));
    assert_eq!(shop.one.served(), 0);
}

#[tokio::test]
async fn a_rewrite_changes_what_the_backend_is_asked() {
    let rewrite = proto::Rewrite { hostname: "inside".into(), path: prefix("/") };
    let shop = Shop::new(vec![filtered("/api", ONE, vec![Kind::Rewrite(rewrite)])]).await;
    assert_eq!(shop.ask(get("/api/v1?x=1")).await.body, "one HTTP/1.1 GET inside/v1?x=1 ");
    assert_eq!(shop.ask(get("/api")).await.body, "one HTTP/1.1 GET inside/ ");
}

/// W36, R30.
#[tokio::test]
async fn a_mirror_gets_a_copy() {
    let mirror = proto::Mirror { backend: Some(backend(TWO, 1)), share: 1_000_000 };
    let never = proto::Mirror { backend: Some(backend(TWO, 1)), share: 0 };
    let shop = Shop::new(vec![filtered("/", ONE, vec![Kind::Mirror(mirror), Kind::Mirror(never)])]).await;
    let post = Request::post("/a").header("host", "web").body(sent("body")).unwrap();
    let got = shop.ask(post).await;
    assert_eq!(got.body, "one HTTP/1.1 POST web/a body");
    let copied = async {
        while shop.two.served() == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(copied).await;
    assert_eq!((shop.one.served(), shop.two.served()), (1, 1));
}

#[tokio::test]
async fn cors() {
    let cors = proto::Cors {
        allow_origins: vec!["https://a.example".into()],
        allow_methods: vec!["PUT".into()],
        ..Default::default()
    };
    let shop = Shop::new(vec![filtered("/", ONE, vec![Kind::Cors(cors)])]).await;
    let asked = |method: &str| {
        Request::builder()
            .method(method)
            .uri("/")
            .header("host", "web")
            .header("origin", "https://a.example")
            .header("access-control-request-method", "PUT")
            .body(body::empty())
            .unwrap()
    };
    let got = shop.ask(asked("OPTIONS")).await;
    assert_eq!((got.status, got.header("access-control-allow-methods")), (204, "PUT"));
    assert_eq!(shop.one.served(), 0);
    let got = shop.ask(asked("PUT")).await;
    assert_eq!((got.status, got.header("access-control-allow-origin")), (200, "https://a.example"));
}

/// What cannot be carried out is a 500, for its own requests only. W33.
#[tokio::test]
async fn what_is_broken_is_a_500() {
    let mut no_backend = rule("/none", &[]);
    no_backend.backends =
        vec![proto::Backend { weight: 1, broken: "no such Service".into(), ..Default::default() }];
    let shop = Shop::new(vec![
        rule("/", &[(ONE, 1)]),
        no_backend,
        rule("/empty", &[]),
        filtered("/filter", ONE, vec![Kind::Broken("not supported".into())]),
        rule("/port", &[("shop/nobody.shop.svc.cluster.local", 1)]),
    ])
    .await;
    for path in ["/none", "/empty", "/filter"] {
        assert_eq!(shop.ask(get(path)).await.status, 500, "{path}");
    }
    assert_eq!(shop.ask(get("/port")).await.status, 503);
    assert_eq!(shop.ask(get("/ok")).await.status, 200);
}

/// A consumer's routes are for clients of its namespace, and for them instead of the producer's. W32.
#[tokio::test]
async fn consumers_have_their_own() {
    let own = change(&[("x-for", "consumer")], &[], &[]);
    let consumer = proto::Route {
        namespace: "elsewhere".into(),
        consumer_namespace: "elsewhere".into(),
        ..route(vec![filtered("/", ONE, vec![Kind::ResponseHeaders(own)])])
    };
    let shop = Shop::with(vec![route(vec![rule("/", &[(TWO, 1)])]), consumer]).await;
    let got = shop.ask(get("/")).await;
    assert_eq!((got.header("x-app"), got.header("x-for")), ("two", ""));
    let client = identity("elsewhere", "client");
    let tunnel = shop.world.tunnel_to(&client, "198.18.0.1:80").await.unwrap();
    let mut client = http1(&shop.world.tasks, tunnel).await;
    let got = ask(&mut client, get("/")).await;
    assert_eq!((got.header("x-app"), got.header("x-for")), ("one", "consumer"));
}
