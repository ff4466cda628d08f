//! Finding a pod's interface on its node, and holding its traffic there. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use common::{CLIENT, POD, World, addr, dial, exchange, ip, listen, listen_any, within};
use culvert_net::link::node_side;
use culvert_net::nft::read_table;
use culvert_net::redirect::{RedirectConfig, install};
use culvert_net::socket::{DialOptions, connect, original_destination};
use culvert_net::{NetNs, hold};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[test]
fn a_pods_interfaces_are_found_and_no_others() {
    let world = World::new();
    assert_eq!(node_side(&world.pod, &world.router).unwrap(), ["veth2"]);
    assert_eq!(node_side(&world.client, &world.router).unwrap(), ["veth1"]);
    // A second pair, a macvlan on the first (whose parent is another index of the same namespace) and a pair inside the pod.
    ip(&world.pod, "link add link eth0 name mac1 type macvlan");
    ip(&world.pod, "link add in1 type veth peer name in2");
    assert_eq!(node_side(&world.pod, &world.router).unwrap(), ["veth2"]);
    // Not attached here at all, though the indices are the same.
    assert!(node_side(&world.pod, &world.client).unwrap().is_empty());
    assert!(node_side(&NetNs::create().unwrap(), &world.router).unwrap().is_empty());
}

#[tokio::test]
async fn a_held_pod_neither_sends_nor_receives_until_it_is_released() {
    let world = World::new();
    let server = listen(&world.client, addr(CLIENT[0], 8080));
    let mut app = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    let (mut served, _) = within(server.accept()).await.unwrap();
    exchange(&mut app, &mut served).await;

    // An interface that went away in between holds nobody up.
    hold::set(&world.router, &BTreeSet::from(["veth2".to_owned(), "gone".to_owned()])).unwrap();
    let short = Duration::from_millis(200);
    for (from, to) in [(&world.pod, CLIENT), (&world.client, POD)] {
        for ip in to {
            let refused = connect(from, addr(ip, 9), &DialOptions::default(), short).await.unwrap_err();
            assert!(matches!(refused, culvert_net::socket::DialError::TimedOut(_)), "{refused}");
        }
    }
    app.write_all(b"held").await.unwrap();
    served.write_all(b"kept").await.unwrap();
    let mut buf = [0; 4];
    assert!(tokio::time::timeout(short, served.read_exact(&mut buf)).await.is_err());

    hold::set(&world.router, &BTreeSet::new()).unwrap();
    assert!(read_table(&world.router, hold::TABLE, &[]).is_err());
    within(served.read_exact(&mut buf)).await.unwrap();
    assert_eq!(&buf, b"held");
    within(app.read_exact(&mut buf)).await.unwrap();
    assert_eq!(&buf, b"kept");
}

/// Without its routing rule an answer to the proxy would leave in plaintext, to the client that sent the request in a tunnel.
#[tokio::test]
async fn answers_to_the_proxy_never_leave_the_pod() {
    let world = World::new();
    install(&world.pod, &RedirectConfig::default()).unwrap();
    let target = addr(POD[0], 8080);
    let app = listen(&world.pod, target);
    let options = DialOptions {
        mark: Some(common::PROXY_MARK),
        source: Some(addr(CLIENT[0], 0)),
        ..DialOptions::default()
    };
    let mut proxy = connect(&world.pod, target, &options, common::SOON).await.unwrap();
    let (mut served, _) = within(app.accept()).await.unwrap();
    exchange(&mut proxy, &mut served).await;

    let capture = culvert_net::capture::Capture::start(&world.client, "eth0", Default::default()).unwrap();
    ip(&world.pod, "rule del pref 32764");
    served.write_all(b"secret").await.unwrap();
    // Something that does get through after it: by then a leak would have been seen.
    let open = listen_any(&world.pod, 15001, Some(common::PROXY_MARK));
    let _app = dial(&world.pod, addr(CLIENT[0], 80), None).await.unwrap();
    let (accepted, _) = within(open.accept()).await.unwrap();
    assert_eq!(original_destination(&accepted).unwrap(), addr(CLIENT[0], 80));
    assert!(
        connect(
            &world.pod,
            addr(CLIENT[0], 9),
            &DialOptions { mark: Some(common::PROXY_MARK), ..DialOptions::default() },
            common::SOON
        )
        .await
        .is_err()
    );
    let report = capture.stop().unwrap();
    assert!(report.packets > 0 && report.dropped == 0);
    assert_eq!(report.port(8080), 0, "{report:?}");
}
