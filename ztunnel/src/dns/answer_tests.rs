//! Queries as bytes in, answers as bytes out.

use culvert_model::snapshot::{SnapshotWriter, Update};
use culvert_model::wire;
use culvert_proto::workload::{Address, NetworkAddress, Service, TunnelProtocol, Workload, address};
use hickory_proto::op::Query;
use prost::Message as _;

use super::*;

const CLIENT: &str = "Kubernetes//Pod/shop/client";

fn resource(kind: address::Type, name: &str) -> wire::AddressResource {
    wire::address(name, &Address { r#type: Some(kind) }.encode_to_vec()).unwrap()
}

/// A client, a service `web.shop` with one IPv4 address, and `big.shop` with 60.
fn snapshot() -> Snapshot {
    let client = Workload {
        uid: CLIENT.into(),
        name: "client".into(),
        namespace: "shop".into(),
        addresses: vec![vec![100, 64, 1, 2]],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: "cluster.local".into(),
        service_account: "client".into(),
        ..Workload::default()
    };
    let service = |name: &str, addresses: u8| Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local"),
        addresses: (1..=addresses)
            .map(|n| NetworkAddress { address: vec![198, 18, 128, n], ..NetworkAddress::default() })
            .collect(),
        ..Service::default()
    };
    let addresses = vec![
        resource(address::Type::Workload(client), CLIENT),
        resource(address::Type::Service(service("web", 1)), "shop/web.shop.svc.cluster.local"),
        resource(address::Type::Service(service("big", 60)), "shop/big.shop.svc.cluster.local"),
    ];
    SnapshotWriter::new().apply(Update { addresses, ..Update::default() }).snapshot
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn ask(message: &Message, transport: Transport) -> Action {
    let snapshot = snapshot();
    let client = snapshot.workload_by_uid(CLIENT);
    let asker =
        Asker { snapshot: &snapshot, client: client.map(AsRef::as_ref), cluster_domain: "cluster.local" };
    decide(&message.to_vec().unwrap(), transport, &asker, &mut |_| 0)
}

fn answer(message: &Message, transport: Transport) -> Message {
    match ask(message, transport) {
        Action::Respond(bytes) => Message::from_vec(&bytes).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Z80, Z81: the service's address, authoritative, 30 s, under the client's id and question.
#[test]
fn a_name_of_the_mesh_is_answered() {
    let asked = query("WEB.shop.svc.cluster.local.", RecordType::A);
    let answered = answer(&asked, Transport::Udp);
    assert_eq!(answered.metadata.id, 0x1234);
    assert_eq!(answered.metadata.message_type, MessageType::Response);
    assert!(answered.metadata.authoritative && answered.metadata.recursion_desired);
    assert_eq!(answered.queries, asked.queries);
    assert_eq!(answered.answers.len(), 1);
    assert_eq!(answered.answers[0].ttl, 30);
    assert_eq!(answered.answers[0].data, RData::A(A("198.18.128.1".parse().unwrap())));
}

/// Z82: the name is known, the family is not: no error and no answer.
#[test]
fn a_missing_family_is_no_data() {
    let answered = answer(&query("web.shop.svc.cluster.local.", RecordType::AAAA), Transport::Udp);
    assert_eq!(answered.metadata.response_code, ResponseCode::NoError);
    assert!(answered.answers.is_empty());
}

/// Z78: a name completed by a search domain is answered through its canonical name.
#[test]
fn a_stripped_search_domain_gives_a_cname() {
    let asked = query("web.shop.svc.cluster.local.shop.svc.cluster.local.", RecordType::A);
    let answered = answer(&asked, Transport::Udp);
    let [first, second] = answered.answers.as_slice() else { panic!("{:?}", answered.answers) };
    assert!(matches!(&first.data, RData::CNAME(name) if name.0.to_ascii() == "web.shop.svc.cluster.local."));
    assert_eq!(second.name.to_ascii(), "web.shop.svc.cluster.local.");
}

/// Z77, Z82: other names and other types are somebody else's.
#[test]
fn what_is_not_ours_is_forwarded() {
    for (name, kind) in [("example.com.", RecordType::A), ("web.shop.svc.cluster.local.", RecordType::MX)] {
        assert!(matches!(ask(&query(name, kind), Transport::Udp), Action::Forward), "{name} {kind}");
    }
}

/// RFC 1035 4.2.1 and RFC 6891 6.2.5: what does not fit a datagram is truncated, and whole over TCP or with EDNS.
#[test]
fn a_long_answer_is_truncated_over_udp() {
    let mut asked = query("big.shop.svc.cluster.local.", RecordType::A);
    let truncated = answer(&asked, Transport::Udp);
    assert!(truncated.metadata.truncation);
    assert!(truncated.answers.is_empty());
    assert_eq!(answer(&asked, Transport::Tcp).answers.len(), 60);
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    asked.set_edns(edns);
    let whole = answer(&asked, Transport::Udp);
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 60);
    assert!(whole.edns.is_some(), "EDNS is answered with EDNS");
}

/// Two servers must never answer each other's errors, and a broken query must not be passed on.
#[test]
fn what_is_no_query_gets_no_answer() {
    let snapshot = snapshot();
    let asker = Asker { snapshot: &snapshot, client: None, cluster_domain: "cluster.local" };
    let decide = |bytes: &[u8]| super::decide(bytes, Transport::Udp, &asker, &mut |_| 0);
    let mut response = query("web.shop.svc.cluster.local.", RecordType::A);
    response.metadata.message_type = MessageType::Response;
    assert!(matches!(decide(&response.to_vec().unwrap()), Action::Ignore));
    assert!(matches!(decide(b""), Action::Ignore));
    let mut broken = query("web.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    broken.truncate(14);
    let Action::Respond(bytes) = decide(&broken) else { panic!("a broken query is told so") };
    assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::FormErr);
}

/// Z83: a pod that is not known (yet) gets no wrong answer.
#[test]
fn an_unknown_client_gets_servfail() {
    let snapshot = snapshot();
    let asker = Asker { snapshot: &snapshot, client: None, cluster_domain: "cluster.local" };
    let asked = query("web.shop.svc.cluster.local.", RecordType::A).to_vec().unwrap();
    let Action::Respond(bytes) = decide(&asked, Transport::Udp, &asker, &mut |_| 0) else {
        panic!("no answer")
    };
    assert_eq!(Message::from_vec(&bytes).unwrap().metadata.response_code, ResponseCode::ServFail);
}
