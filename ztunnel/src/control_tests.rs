//! Deliveries in, commits and answers out.

use bytes::Bytes;
use culvert_proto::security::{Action, Authorization, Scope};
use culvert_proto::workload::{Address, TunnelProtocol, Workload as Message, address};
use culvert_xds::{Generation, RawResource};
use prost::Message as _;

use super::*;

fn pod(name: &str, ip: u8, account: &str) -> RawResource {
    let uid = format!("Kubernetes//Pod/shop/{name}");
    let workload = Message {
        uid: uid.clone(),
        name: name.into(),
        namespace: "shop".into(),
        addresses: vec![vec![100, 64, 1, ip]],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: account.into(),
        ..Message::default()
    };
    let body = Address { r#type: Some(address::Type::Workload(workload)) }.encode_to_vec();
    RawResource { name: uid.into(), version: "1".into(), body: body.into() }
}

fn policy(name: &str, body: Option<Bytes>) -> RawResource {
    let message = Authorization {
        name: name.into(),
        namespace: "shop".into(),
        scope: Scope::Namespace.into(),
        action: Action::Deny.into(),
        ..Authorization::default()
    };
    let body = body.unwrap_or_else(|| message.encode_to_vec().into());
    RawResource { name: format!("shop/{name}").into(), version: "1".into(), body }
}

fn delivery(type_url: &str, generation: &str, added: Vec<RawResource>) -> Delivery {
    Delivery {
        type_url: type_url.into(),
        generation: Generation::parse(generation),
        added,
        removed: Vec::new(),
        nonce: String::new(),
    }
}

fn names(staged: &Staged<u32>) -> Vec<u32> {
    staged.answers.iter().map(|(responder, _)| *responder).collect()
}

/// design.md, generations: both types of one generation take effect together, and are acknowledged together.
#[test]
fn a_generation_is_committed_whole() {
    let mut staging = Staging::new();
    let first = staging.delivered(delivery(ADDRESS_TYPE_URL, "culvert/1", vec![pod("a", 1, "a")]), 1);
    assert!(first.commit.is_none() && first.answers.is_empty());
    let second = staging.delivered(delivery(AUTHORIZATION_TYPE_URL, "culvert/1", vec![policy("p", None)]), 2);
    let changed = second.commit.as_ref().expect("both types are there");
    assert_eq!((changed.workloads.len(), changed.policies.len()), (1, 1));
    assert_eq!(names(&second), [1, 2]);
    assert_eq!(staging.writer.snapshot().sizes(), (1, 0, 1));
}

/// A large push comes in parts: each is acknowledged, none is in force before the last, and a lost connection in between
/// loses none.
#[test]
fn parts_outlive_a_connection_and_wait_for_the_last() {
    let mut staging = Staging::new();
    let part = staging.delivered(delivery(ADDRESS_TYPE_URL, "culvert/1+", vec![pod("a", 1, "a")]), 1);
    assert!(part.commit.is_none());
    assert_eq!(names(&part), [1]);
    let held = staging.delivered(delivery(ADDRESS_TYPE_URL, "culvert/1", vec![pod("b", 2, "b")]), 2);
    assert!(held.answers.is_empty());
    staging.connected();
    // `b` was not acknowledged and comes again; `a` was, and does not.
    staging.delivered(delivery(ADDRESS_TYPE_URL, "culvert/2", vec![pod("b", 2, "b")]), 3);
    let whole = staging.delivered(delivery(AUTHORIZATION_TYPE_URL, "culvert/2", Vec::new()), 4);
    assert!(whole.commit.is_some());
    assert_eq!(names(&whole), [3, 4]);
    assert_eq!(staging.writer.snapshot().sizes(), (2, 0, 0));
}

/// Another control plane's workloads are not in force before its policies have come: nobody gets in meanwhile.
#[test]
fn workloads_without_policies_are_not_in_force() {
    let mut staging = Staging::new();
    let first = staging.delivered(delivery(ADDRESS_TYPE_URL, "2026-11-23/1", vec![pod("a", 1, "a")]), 1);
    assert!(first.commit.is_none());
    assert_eq!(names(&first), [1], "it is acknowledged all the same: nothing more would come");
    let second = staging.delivered(delivery(AUTHORIZATION_TYPE_URL, "2026-11-23/1", Vec::new()), 2);
    assert_eq!(second.commit.expect("both types have come").workloads.len(), 1);
    let third = staging.delivered(delivery(ADDRESS_TYPE_URL, "2026-11-23/2", vec![pod("b", 2, "b")]), 3);
    assert!(third.commit.is_some(), "from now on each response stands alone");
}

/// Z97 and design.md: what cannot be read is refused by name, the rest applied, and a policy among it denies.
#[test]
fn what_cannot_be_read_is_refused_by_name() {
    let mut staging = Staging::new();
    let broken =
        RawResource { name: "broken".into(), version: "1".into(), body: Bytes::from_static(b"\xff") };
    staging.delivered(delivery(ADDRESS_TYPE_URL, "x/1", vec![broken, pod("a", 1, "a")]), 1);
    let bad = policy("bad", Some(Bytes::from_static(b"\xff")));
    let staged =
        staging.delivered(delivery(AUTHORIZATION_TYPE_URL, "x/1", vec![bad, policy("good", None)]), 2);
    assert_eq!(staged.answers[0].1.len(), 1);
    assert_eq!(staged.answers[0].1[0].name, "shop/bad");
    let snapshot = staging.writer.snapshot();
    assert_eq!(snapshot.sizes(), (1, 0, 2));
    assert!(snapshot.policies().any(|policy| policy.undecodable.is_some()));
}

/// Trap 18: a tunnel survives only while the same workload speaks the same protocol at the same address.
#[test]
fn only_what_moved_is_evicted() {
    let mut writer = SnapshotWriter::new();
    let update = |pods: Vec<RawResource>| {
        decode(delivery(ADDRESS_TYPE_URL, "x/1", pods), &mut SnapshotWriter::new()).0
    };
    let old =
        writer.apply(update(vec![pod("same", 1, "a"), pod("moved", 2, "a"), pod("gone", 3, "a")])).snapshot;
    let mut next = update(vec![pod("same", 1, "a"), pod("moved", 9, "a"), pod("new", 3, "b")]);
    next.removed_addresses = vec!["Kubernetes//Pod/shop/gone".into()];
    let applied = writer.apply(next);
    let stale = moved(&old, &applied.snapshot, &applied.changed);
    let ip = |last: u8| IpAddr::from([100, 64, 1, last]);
    assert_eq!(stale, HashSet::from([ip(2), ip(3)]));
}

/// Z94, Z118: the operator's entries are in the node's metadata, and none of them changes who the node is.
#[test]
fn the_node_says_who_it_is_and_what_it_was_told_to() {
    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        proxy: ProxyConfig,
    }
    let line = "ztunnel --node n1 --local-xds f --pod-name p --pod-namespace ns --node-ip 10.0.0.9 \
                --node-metadata DNS_CAPTURE=true --node-metadata NODE_NAME=other";
    let cli = <Cli as clap::Parser>::parse_from(line.split_whitespace());
    let node = node(&cli.proxy);
    assert_eq!(node.id, "ztunnel~10.0.0.9~p.ns~ns.svc.cluster.local");
    let fields = node.metadata.unwrap().fields;
    assert_eq!((&fields["DNS_CAPTURE"], &fields["NODE_NAME"]), (&string("true"), &string("n1")));
}
