//! A large mesh: 100,000 workloads and 10,000 services. Alone in its process, because it weighs the process.

#![allow(clippy::unwrap_used, reason = "what a test writes is known to parse")]

use std::time::Duration;

use culvert_model::address::NetworkAddress;
use culvert_model::snapshot::{Snapshot, SnapshotWriter, Update};
use culvert_model::wire;
use culvert_proto::workload as proto;
use prost::Message;

const WORKLOADS: u32 = 100_000;
const SERVICES: u32 = 10_000;

fn service(i: u32) -> (String, Vec<u8>) {
    let namespace = format!("namespace-{}", i % 200);
    let hostname = format!("service-{i}.{namespace}.svc.cluster.local");
    let port = proto::Port { service_port: 80, target_port: 8080, ..Default::default() };
    let message = proto::Service {
        name: format!("service-{i}"),
        namespace: namespace.clone(),
        hostname: hostname.clone(),
        addresses: vec![proto::NetworkAddress {
            address: (0x0a60_0000 + i).to_be_bytes().to_vec(),
            ..Default::default()
        }],
        ports: vec![port],
        canonical: true,
        ..Default::default()
    };
    let body = proto::Address { r#type: Some(proto::address::Type::Service(message)) }.encode_to_vec();
    (format!("{namespace}/{hostname}"), body)
}

fn workload(i: u32) -> (String, Vec<u8>) {
    let service = i % SERVICES;
    let namespace = format!("namespace-{}", service % 200);
    let name = format!("service-{service}-7d9f8b6c5-{i:05}");
    let uid = format!("Kubernetes//Pod/{namespace}/{name}");
    let port = proto::Port { service_port: 80, target_port: 8080, ..Default::default() };
    let message = proto::Workload {
        uid: uid.clone(),
        name,
        namespace: namespace.clone(),
        addresses: vec![(0x6440_0000 + i).to_be_bytes().to_vec()],
        tunnel_protocol: proto::TunnelProtocol::Hbone.into(),
        service_account: format!("service-{service}"),
        node: format!("node-{}", i % 1000),
        canonical_name: format!("service-{service}"),
        canonical_revision: "latest".into(),
        workload_name: format!("service-{service}"),
        services: [(
            format!("{namespace}/service-{service}.{namespace}.svc.cluster.local"),
            proto::PortList { ports: vec![port] },
        )]
        .into(),
        authorization_policies: vec!["istio-system/istio_converted_static_strict".into()],
        cluster_id: "Kubernetes".into(),
        ..Default::default()
    };
    let body = proto::Address { r#type: Some(proto::address::Type::Workload(message)) }.encode_to_vec();
    (uid, body)
}

fn decoded((name, body): (String, Vec<u8>)) -> wire::AddressResource {
    wire::address(&name, &body).unwrap()
}

/// How long a thousand updates of one workload each take.
fn updates(writer: &mut SnapshotWriter, mut keep: impl FnMut(Snapshot)) -> Duration {
    let begun = computed();
    for i in 0..1000 {
        let mut address = decoded(workload(i));
        if let wire::AddressResource::Workload(workload) = &mut address {
            workload.capacity = 7;
        }
        keep(writer.apply(Update { addresses: vec![address], ..Update::default() }).snapshot);
    }
    computed() - begun
}

/// Bytes that the process holds in memory.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// Time that this thread spent computing: other work on the machine does not count.
fn computed() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

/// The last workloads of a large mesh load as quickly as the first ones, at most 1,300 bytes a workload (a proxy may hold 2 KB,
/// what the protocol and the allocator need included), and one more update takes no time to speak of, even with every earlier
/// snapshot still held. All bounds of time are ratios within this run: the machines that tests run on differ by more than a
/// regression would.
#[test]
fn a_large_mesh() {
    let mut writer = SnapshotWriter::new();
    let before = resident();
    let mut spent = Vec::new();
    // As a control plane sends them: in responses of a few thousand.
    for first in (0..SERVICES + WORKLOADS).step_by(5000) {
        let made: Vec<_> = (first..first + 5000)
            .map(|i| if i < SERVICES { service(i) } else { workload(i - SERVICES) })
            .collect();
        let begun = computed();
        let addresses = made.iter().map(|(name, body)| wire::address(name, body).unwrap()).collect();
        writer.apply(Update { addresses, ..Update::default() });
        spent.push(computed() - begun);
    }
    let weight = resident().saturating_sub(before) / u64::from(WORKLOADS);
    println!(
        "loaded in {:?}, {weight} bytes a workload with its share of everything",
        spent.iter().sum::<Duration>()
    );
    assert_eq!(writer.snapshot().sizes(), (WORKLOADS as usize, SERVICES as usize, 0));
    // The first two responses are services, which have less in them.
    let [early, late] = [&spent[2..7], &spent[spent.len() - 5..]].map(|some| some.iter().min().unwrap());
    assert!(*late < *early * 4, "{spent:?}");
    assert!(weight <= 1300, "{weight} bytes a workload");

    let mut held = Vec::new();
    let large = updates(&mut writer, |snapshot| held.push(snapshot));
    // What an update costs does not grow with the mesh. A ratio, so that it holds on a slow machine too.
    let mut few = SnapshotWriter::new();
    let addresses = (0..4000).map(|i| decoded(workload(i))).collect();
    few.apply(Update { addresses, ..Update::default() });
    let mut also_held = Vec::new();
    let small = updates(&mut few, |snapshot| also_held.push(snapshot));
    println!("an update takes {:?}, among 4,000 workloads {:?}", large / 1000, small / 1000);
    assert!(large < small * 5, "{large:?} among {WORKLOADS} workloads, {small:?} among 4,000");

    let address =
        |i: u32| NetworkAddress { network: "".into(), address: (0x6440_0000 + i).to_be_bytes().into() };
    let begun = computed();
    for i in 0..WORKLOADS {
        assert!(writer.snapshot().workload_by_address(&address(i)).is_some());
    }
    println!("a look-up takes {:?}", (computed() - begun) / WORKLOADS);
    assert_eq!(held[0].workload_by_address(&address(5)).unwrap().capacity, 1);
    assert_eq!(held[999].workload_by_address(&address(5)).unwrap().capacity, 7);
}
