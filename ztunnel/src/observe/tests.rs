//! What a connection leaves behind in metrics and lists.

use culvert_model::outcome::Reason;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::flow::{End, Failure, Security};
use super::*;
use crate::world;

struct World {
    registry: Registry,
    observer: Observer,
}

impl World {
    fn new() -> Self {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        Self { registry, observer: Observer { metrics, connections: Arc::new(Connections::default()) } }
    }

    /// The sample lines of one metric.
    fn samples(&self, name: &str) -> Vec<String> {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text.lines().filter(|line| line.starts_with(&format!("{name}{{"))).map(str::to_owned).collect()
    }
}

fn inbound() -> Flow {
    let mut flow = Flow::new(
        Direction::Inbound,
        "100.64.1.2:40000".parse().unwrap(),
        "100.64.2.3:8080".parse().unwrap(),
    );
    flow.source.workload = Some(Arc::new(world::workload("shop", "client", &["100.64.1.2"])));
    flow.source.identity = Some(world::identity("shop", "client"));
    flow.destination.workload = Some(Arc::new(world::workload("shop", "web", &["100.64.2.3"])));
    flow.destination.identity = Some(world::identity("shop", "web"));
    flow.service = Some(Arc::new(world::service("shop/web.shop.svc.cluster.local", &["198.18.128.1"])));
    flow.security = Security::MutualTls;
    flow
}

/// Z103, Z105: opened, closed and bytes under Istio's names, each with Istio's labels for both ends.
#[test]
fn a_connection_counts_under_istios_names_and_labels() {
    let world = World::new();
    let mut tracked = world.observer.begin(inbound());
    let live = tracked.opened();
    live.count_sent(7);
    live.count_received(9);
    assert_eq!(world.observer.connections.len(), 1);
    tracked.finish(End::Clean);
    assert!(world.observer.connections.is_empty());

    let labels = [
        r#"reporter="destination""#,
        r#"source_workload="client""#,
        r#"source_canonical_service="client""#,
        r#"source_canonical_revision="latest""#,
        r#"source_workload_namespace="shop""#,
        r#"source_principal="spiffe://cluster.local/ns/shop/sa/client""#,
        r#"source_app="client""#,
        r#"source_version="latest""#,
        r#"source_cluster="Kubernetes""#,
        r#"source_region="unknown""#,
        r#"source_zone="unknown""#,
        r#"destination_service="web.shop.svc.cluster.local""#,
        r#"destination_service_name="web""#,
        r#"destination_service_namespace="shop""#,
        r#"destination_workload="web""#,
        r#"destination_canonical_service="web""#,
        r#"destination_canonical_revision="latest""#,
        r#"destination_workload_namespace="shop""#,
        r#"destination_principal="spiffe://cluster.local/ns/shop/sa/web""#,
        r#"destination_app="web""#,
        r#"destination_version="latest""#,
        r#"destination_cluster="Kubernetes""#,
        r#"destination_region="unknown""#,
        r#"destination_zone="unknown""#,
        r#"request_protocol="tcp""#,
        r#"response_flags="-""#,
        r#"connection_security_policy="mutual_tls""#,
    ];
    for (name, value) in [
        ("istio_tcp_connections_opened_total", " 1"),
        ("istio_tcp_connections_closed_total", " 1"),
        ("istio_tcp_sent_bytes_total", " 7"),
        ("istio_tcp_received_bytes_total", " 9"),
    ] {
        let samples = world.samples(name);
        let [sample] = samples.as_slice() else { panic!("{name}: {samples:?}") };
        assert!(sample.ends_with(value), "{sample}");
        for label in labels {
            assert!(sample.contains(label), "{name} lacks {label}: {sample}");
        }
    }
    assert!(world.samples("istio_tcp_connections_failed_total").is_empty());
}

/// A connection that is still open shows its bytes at each scrape, and none of them twice.
#[test]
fn bytes_are_counted_while_they_flow() {
    let world = World::new();
    let mut tracked = world.observer.begin(inbound());
    let live = tracked.opened();
    for (more, total) in [(5, " 5"), (0, " 5"), (6, " 11")] {
        live.count_sent(more);
        world.observer.metrics.traffic(&live);
        assert!(world.samples("istio_tcp_sent_bytes_total")[0].ends_with(total));
    }
    tracked.finish(End::Clean);
    assert!(world.samples("istio_tcp_sent_bytes_total")[0].ends_with(" 11"));
}

/// Z106, Z107 (differs: what is refused early is counted): the flag Istio's dashboards know, and our reason.
#[test]
fn what_never_opened_is_counted_with_its_flag_and_reason() {
    for (reason, flag) in [
        (Reason::AuthorizationPolicy, "DENY"),
        (Reason::PolicyUnavailable, "DENY"),
        (Reason::TlsHandshake, "TLS_FAILURE"),
        (Reason::PeerIdentity, "TLS_FAILURE"),
        (Reason::Http2Handshake, "H2_HANDSHAKE_FAILURE"),
        (Reason::NoCertificate, "IDENTITY_ERROR"),
        (Reason::ConnectTimeout, "NETWORK_POLICY"),
        (Reason::ConnectionRefused, "CONNECT"),
        (Reason::UnknownSource, "CONNECT"),
    ] {
        let world = World::new();
        world.observer.begin(inbound()).finish(End::Failed(Failure::new(reason, "why")));
        let samples = world.samples("istio_tcp_connections_failed_total");
        let [sample] = samples.as_slice() else { panic!("{samples:?}") };
        assert!(sample.contains(&format!(r#"response_flags="{flag}""#)), "{reason}: {sample}");
        assert!(sample.contains(&format!(r#"reason="{reason}""#)), "{reason}: {sample}");
        assert!(world.samples("istio_tcp_connections_opened_total").is_empty());
    }
}

/// Z107 differs: what is refused because a bound is reached counts as a failed connection, and for the bound; what fails later for
/// one does too.
#[test]
fn what_is_refused_for_a_bound_is_counted() {
    let world = World::new();
    let failure = || Failure::new(Reason::Overloaded, "full").beyond(limits::Limit::PodConnections);
    for _ in 0..3 {
        world.observer.refuse(inbound(), failure());
    }
    world.observer.begin(inbound()).finish(End::Failed(failure()));
    let samples = world.samples("istio_tcp_connections_failed_total");
    let [sample] = samples.as_slice() else { panic!("{samples:?}") };
    assert!(sample.contains(r#"reason="overloaded""#) && sample.ends_with(" 4"), "{sample}");
    assert_eq!(world.observer.metrics.limits.times(limits::Limit::PodConnections), 4);
}

/// Failures have a bound of their own, whatever their reasons.
#[test]
fn failed_series_are_bounded() {
    let world = World::new();
    for n in 0..10_050 {
        let mut flow = inbound();
        flow.source.workload =
            Some(Arc::new(world::workload("shop", &format!("client-{}", n / 2), &["100.64.1.2"])));
        let reason = if n % 2 == 0 { Reason::AuthorizationPolicy } else { Reason::ConnectionRefused };
        flow.end = Some(End::Failed(Failure::new(reason, "why")));
        world.observer.metrics.failed(&flow);
    }
    assert_eq!(world.samples("istio_tcp_connections_failed_total").len(), 10_002);
    assert_eq!(world.observer.metrics.series(), (10_000, 10_000));
    assert_eq!(world.observer.metrics.limits.times(limits::Limit::Series), 50);
}

/// A task that is dropped in the middle leaves a record all the same.
#[test]
fn a_dropped_connection_is_reported_once() {
    let world = World::new();
    let mut tracked = world.observer.begin(inbound());
    tracked.opened();
    drop(tracked);
    assert!(world.observer.connections.is_empty());
    assert!(world.samples("istio_tcp_connections_closed_total")[0].ends_with(" 1"));
    drop(world.observer.begin(inbound()));
    assert!(world.samples("istio_tcp_connections_failed_total")[0].contains(r#"reason="draining""#));
}

/// However many peers there are, the series stay bounded: what comes late is counted without its parties.
#[test]
fn series_are_bounded() {
    let world = World::new();
    for n in 0..10_050 {
        let mut flow = inbound();
        flow.source.workload =
            Some(Arc::new(world::workload("shop", &format!("client-{n}"), &["100.64.1.2"])));
        let mut tracked = world.observer.begin(flow);
        tracked.opened();
        tracked.finish(End::Clean);
    }
    let samples = world.samples("istio_tcp_connections_opened_total");
    assert_eq!(samples.len(), 10_001);
    let rest =
        samples.iter().find(|sample| sample.contains(r#"source_workload="unknown""#)).expect("the rest");
    assert!(rest.ends_with(" 50"), "{rest}");
}

/// The first reason for ending a connection stays its reason.
#[tokio::test]
async fn a_connection_is_killed_once() {
    let world = World::new();
    let mut tracked = world.observer.begin(inbound());
    let live = tracked.opened();
    let killed = live.killed();
    live.kill(Failure::new(Reason::AuthorizationPolicyLate, "first"));
    live.kill(Failure::new(Reason::Draining, "second"));
    killed.await;
    assert_eq!(live.killed_for().map(|failure| failure.reason), Some(Reason::AuthorizationPolicyLate));
    tracked.finish(End::Clean);
}
