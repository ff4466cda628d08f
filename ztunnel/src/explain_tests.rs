use culvert_model::policy::{Action, Policy, PolicyKey, PolicyScope};
use culvert_model::snapshot::{SnapshotWriter, Update};
use culvert_model::wire::AddressResource;
use culvert_model::workload::{Health, TunnelProtocol};

use super::*;
use crate::world::{by_name, serve, service, workload};

const WEB: &str = "shop/web.shop.svc.cluster.local";
const WAYPOINT: &str = "shop/waypoint.shop.svc.cluster.local";

/// `client` of `shop` and of `other`; `web` with one endpoint that is ready and one that is not; a database outside.
fn known(bound: bool) -> Snapshot {
    let web = |name: &str, ip: &str| serve(workload("shop", name, &[ip]), WEB, &[(80, 8080)]);
    let mut service_of = service(WEB, &["10.96.0.1"]);
    service_of.waypoint = bound.then(|| by_name(WAYPOINT));
    let deny = Policy {
        key: PolicyKey { namespace: "shop".into(), name: "nobody".into() },
        scope: PolicyScope::Namespace,
        action: Action::Allow,
        groups: vec![],
        dry_run: false,
        undecodable: None,
    };
    let workloads = [
        workload("shop", "client", &["100.64.1.1"]),
        workload("other", "client", &["100.64.1.2"]),
        workload("other", "plain", &["100.64.1.3"]),
        web("web-0", "100.64.2.1"),
        Workload { health: Health::Unhealthy, ..web("web-1", "100.64.2.2") },
        Workload { tunnel_protocol: TunnelProtocol::None, ..workload("ext", "db", &["192.0.2.7"]) },
        serve(workload("shop", "waypoint-0", &["100.64.3.1"]), WAYPOINT, &[(15008, 15008)]),
    ];
    let services = [service_of, service(WAYPOINT, &["10.96.0.50"])];
    let services = services.into_iter().map(AddressResource::Service);
    let addresses = services.chain(workloads.into_iter().map(AddressResource::Workload)).collect();
    SnapshotWriter::new().apply(Update { addresses, policies: vec![deny], ..Update::default() }).snapshot
}

fn ask(snapshot: &Snapshot, seen: &EndpointTable, source: &str, to: &str) -> Result<Value, ExplainError> {
    let known = Knowledge { snapshot, seen, cluster: "Kubernetes", domain: "cluster.local" };
    explain(&known, Some(source), Some(to))
}

/// By address and by name: the service, every endpoint with what speaks against it, the way taken, and the policy that refuses.
#[tokio::test(start_paused = true)]
async fn a_service() {
    let (snapshot, seen) = (known(false), Arc::<EndpointTable>::default());
    let web = Value::from("Kubernetes//Pod/shop/web-0");
    let _open = seen.begin(&"Kubernetes//Pod/shop/web-0".into());
    seen.failed(&"Kubernetes//Pod/shop/web-0".into(), 8080);
    for to in ["10.96.0.1:80", "web.shop:80", "web.shop.svc.cluster.local:80"] {
        let said = ask(&snapshot, &seen, "other/client", to).unwrap();
        assert_eq!(said["asked"], "10.96.0.1:80");
        assert_eq!(said["addressed"]["service"], WEB);
        assert_eq!(said["source"]["identity"], "spiffe://cluster.local/ns/other/sa/client");
        let endpoints = said["endpoints"].as_array().unwrap();
        assert_eq!((endpoints.len(), &endpoints[0]["uid"]), (2, &web));
        assert_eq!((&endpoints[0]["load"], &endpoints[0]["cooling"]), (&1.into(), &true.into()));
        assert_eq!((&endpoints[0]["why_not"], &endpoints[1]["why_not"]), (&Value::Null, &"not ready".into()));
        assert_eq!(
            (&said["decision"]["way"], &said["decision"]["to"]),
            (&"tunnel".into(), &"destination".into())
        );
        assert_eq!(said["decision"]["workload"], web);
        assert_eq!(said["authorization"]["allowed"], false);
        assert_eq!(said["authorization"]["reason"], "authorization_policy");
        assert_eq!(said["authorization"]["steps"][0]["policy"], "shop/nobody");
    }
    assert_eq!(ask(&snapshot, &seen, "shop/client", "web:80").unwrap()["asked"], "10.96.0.1:80");
}

/// What is at the end decides what is said: a waypoint and its instances, a workload outside, nobody, or a refusal.
#[tokio::test(start_paused = true)]
async fn other_destinations() {
    let seen = EndpointTable::default();
    let said = ask(&known(true), &seen, "plain", "10.96.0.1:80").unwrap();
    assert_eq!(said["waypoints"][0]["name"], WAYPOINT);
    assert_eq!(said["decision"]["to"], "service waypoint");
    assert_eq!(said["endpoints"][0]["uid"], "Kubernetes//Pod/shop/waypoint-0");
    assert_eq!(said["authorization"], Value::Null);
    let snapshot = known(false);
    let way = |to: &str| ask(&snapshot, &seen, "plain", to).unwrap()["decision"].clone();
    assert_eq!(way("192.0.2.7:5432")["way"], "plain");
    assert_eq!(way("192.0.2.9:443")["way"], "passthrough");
    let refused = way("10.96.0.1:99");
    assert_eq!((&refused["way"], &refused["reason"]), (&"refused".into(), &"unknown_port".into()));
}

/// A question that is not understood is answered with why.
#[tokio::test(start_paused = true)]
async fn questions_that_are_none() {
    let (snapshot, seen) = (known(false), EndpointTable::default());
    let error = |source: &str, to: &str| ask(&snapshot, &seen, source, to).unwrap_err();
    assert_eq!(error("nobody", "10.96.0.1:80"), ExplainError::UnknownSource("nobody".into()));
    assert_eq!(error("shop/nobody", "10.96.0.1:80"), ExplainError::UnknownSource("shop/nobody".into()));
    assert_eq!(error("client", "10.96.0.1:80"), ExplainError::AmbiguousSource("client".into()));
    for to in ["10.96.0.1", "web:http", ":80", "fd00::1:80x", "http://web:80"] {
        assert_eq!(error("plain", to), ExplainError::BadDestination(to.into()));
    }
    assert_eq!(error("plain", "example.com:80"), ExplainError::UnknownHost("example.com".into()));
    let known =
        Knowledge { snapshot: &snapshot, seen: &seen, cluster: "Kubernetes", domain: "cluster.local" };
    assert_eq!(explain(&known, None, Some("10.96.0.1:80")), Err(ExplainError::Incomplete));
    assert_eq!(explain(&known, Some("plain"), None), Err(ExplainError::Incomplete));
}
