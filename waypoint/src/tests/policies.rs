//! Policies, end to end.

use culvert_hbone::error::ConnectError;
use culvert_model::workload::AppProtocol;
use culvert_proto::waypoint as proto;
use culvert_proto::waypoint::policy::Action;
use http::Request;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::apps::{App, ask, get, http1, http2, read};
use super::soon;
use super::world::{VIP, WEB, World, identity, key, pod, web};
use crate::http::body;

fn policy(name: &str, action: Action, rules: Vec<proto::PolicyRule>) -> proto::Policy {
    let service = key(WEB);
    let target = proto::Target {
        service_namespace: service.namespace.to_string(),
        service_hostname: service.hostname.to_string(),
    };
    proto::Policy {
        namespace: "shop".into(),
        name: name.into(),
        action: action.into(),
        targets: vec![target],
        rules,
        ..Default::default()
    }
}

fn to(paths: &[&str]) -> proto::PolicyRule {
    let operation =
        proto::Operation { paths: paths.iter().map(|it| (*it).into()).collect(), ..Default::default() };
    proto::PolicyRule { to: vec![operation], ..Default::default() }
}

fn from(principal: &str) -> proto::PolicyRule {
    let source = proto::Source { principals: vec![principal.into()], ..Default::default() };
    proto::PolicyRule { from: vec![source], ..Default::default() }
}

async fn world(app_protocol: AppProtocol) -> (World, App) {
    let world = World::new(vec![], vec![], vec![]).await;
    let app = App::start(&world.tasks, "one", "127.0.0.1").await;
    world.know(vec![web(app_protocol)], vec![pod("one", app.address, &[WEB])], vec![]);
    (world, app)
}

/// A change of protocol is seen by the policies, and passed on if they permit it.
#[tokio::test]
async fn an_upgrade_can_be_denied() {
    let (world, app) = world(AppProtocol::Http11).await;
    let condition = proto::Condition {
        key: "request.headers[upgrade]".into(),
        values: vec!["websocket".into()],
        ..Default::default()
    };
    let rule = proto::PolicyRule { when: vec![condition], ..Default::default() };
    world.enforce(&[policy("deny", Action::Deny, vec![rule])]);
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let mut asked = get("/upgrade");
    asked.headers_mut().insert("connection", "upgrade".parse().unwrap());
    asked.headers_mut().insert("upgrade", "websocket".parse().unwrap());
    assert_eq!(ask(&mut client, asked).await.status, 403);
    assert_eq!(app.served(), 0);
}

/// W57, W63. However a path is written, it is the one path that the policy is about.
#[tokio::test]
async fn a_denied_path_is_denied_however_it_is_written() {
    let (world, app) = world(AppProtocol::Http11).await;
    world.enforce(&[policy("deny", Action::Deny, vec![to(&["/admin", "/admin/*"])])]);
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    for path in ["/admin", "/admin/x", "//admin", "/a/../admin", "/%61dmin", "/admin%2fx", "/./admin?x"] {
        let got = ask(&mut client, get(path)).await;
        assert_eq!((got.status, got.body.as_str()), (403, "RBAC: access denied"), "{path}");
    }
    assert_eq!(app.served(), 0);
    let got = ask(&mut client, get("/a/%7eb?x=%2f")).await;
    assert_eq!(got.body, "one HTTP/1.1 GET web/a/~b?x=%2f ", "the application sees the same path");
}

/// W14, W54.
#[tokio::test]
async fn who_asks_is_who_the_certificate_says() {
    let (world, _app) = world(AppProtocol::Http11).await;
    world.enforce(&[policy("allow", Action::Allow, vec![from("cluster.local/ns/shop/sa/friend")])]);
    for (account, status) in [("friend", 200), ("client", 403)] {
        let tunnel = world.tunnel_to(&identity("shop", account), &format!("{VIP}:80")).await.unwrap();
        let mut client = http1(&world.tasks, tunnel).await;
        assert_eq!(ask(&mut client, get("/")).await.status, status, "{account}");
    }
}

/// W57.
#[tokio::test]
async fn grpc_hears_permission_denied() {
    let (world, app) = world(AppProtocol::Grpc).await;
    world.enforce(&[policy("deny", Action::Deny, vec![to(&["/a.B/Secret"])])]);
    let mut client = http2(&world.tasks, world.tunnel().await).await;
    let call = Request::post("http://web/a.B/Secret").header("content-type", "application/grpc");
    let got = read(soon(client.send_request(call.body(body::empty()).unwrap())).await.unwrap()).await;
    assert_eq!((got.status, got.header("grpc-status"), app.served()), (200, "7", 0));
    assert_eq!(got.header("content-type"), "application/grpc");
}

/// A policy of which something is not understood denies what it is for, and nothing else; so does one that has to ask somebody.
/// W27, W53.
#[tokio::test]
async fn what_is_not_understood_denies() {
    let (world, _app) = world(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    let condition = proto::Condition { key: "made.up".into(), values: vec!["x".into()], not_values: vec![] };
    let unknown = proto::PolicyRule { when: vec![condition], ..Default::default() };
    world.enforce(&[policy("unknown", Action::Allow, vec![unknown.clone()])]);
    assert_eq!(ask(&mut client, get("/")).await.status, 403);
    let custom =
        proto::Policy { provider: "asks".into(), ..policy("custom", Action::Custom, vec![to(&["/"])]) };
    world.enforce(&[custom]);
    assert_eq!(ask(&mut client, get("/")).await.status, 403);
    assert_eq!(ask(&mut client, get("/other")).await.status, 200);
    let mut elsewhere = policy("elsewhere", Action::Allow, vec![unknown]);
    elsewhere.targets[0].service_hostname = "other.shop.svc.cluster.local".into();
    world.enforce(&[elsewhere]);
    assert_eq!(ask(&mut client, get("/")).await.status, 200);
}

/// A policy that is changed holds for the next request of a connection that was open before.
#[tokio::test]
async fn a_change_holds_at_once() {
    let (world, _app) = world(AppProtocol::Http11).await;
    let mut client = http1(&world.tasks, world.tunnel().await).await;
    assert_eq!(ask(&mut client, get("/")).await.status, 200);
    world.enforce(&[policy("deny", Action::Deny, vec![to(&["*"])])]);
    assert_eq!(ask(&mut client, get("/")).await.status, 403);
    world.enforce(&[]);
    assert_eq!(ask(&mut client, get("/")).await.status, 200);
}

/// W56, closed: an ALLOW policy about requests lets no stream through, one about who asks does.
#[tokio::test]
async fn streams_are_judged_by_what_can_be_known_of_them() {
    let (world, _app) = world(AppProtocol::Tcp).await;
    let client = identity("shop", "client");
    let open = || async { world.tunnel_to(&client, &format!("{VIP}:80")).await };
    world.enforce(&[policy("allow", Action::Allow, vec![to(&["/"])])]);
    match open().await {
        Err(ConnectError::Refused { status, .. }) => assert_eq!(status, 401),
        other => panic!("{other:?}"),
    }
    world.enforce(&[policy("allow", Action::Allow, vec![from("cluster.local/ns/shop/sa/client")])]);
    let mut tunnel = open().await.unwrap();
    soon(tunnel.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")).await.unwrap();
    let mut answer = [0; 12];
    soon(tunnel.read_exact(&mut answer)).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
}
