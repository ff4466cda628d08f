//! What happens in a pod while its redirect rules are away. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod common;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use common::{CLIENT, POD, PROXY_MARK, SOON, World, addr, dial, exchange, listen, listen_any, udp, within};
use culvert_net::NetNs;
use culvert_net::capture::{Capture, CaptureOptions};
use culvert_net::redirect::{Guard, RedirectConfig, Verdict, install, stopped, verify};
use culvert_net::socket::{DialOptions, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn nft(ns: &NetNs, args: &str) -> bool {
    ns.run(|| Command::new("nft").args(args.split(' ')).status()).unwrap().success()
}

async fn is_silent(ns: &NetNs, to: SocketAddr) -> bool {
    tokio::time::timeout(Duration::from_millis(300), dial(ns, to, None)).await.is_err()
}

fn config() -> RedirectConfig {
    RedirectConfig {
        exclude_outbound_ports: BTreeSet::from([7000]),
        exclude_inbound_ports: BTreeSet::from([7001]),
        ..RedirectConfig::default()
    }
}

/// Somebody flushes all rules: what would get around the proxy is stopped and counted, what is excluded goes on, and connections through
/// the proxy wait until the rules are back.
#[tokio::test]
async fn a_flush_lets_nothing_out_and_breaks_nothing() {
    let world = World::new();
    install(&world.pod, &config()).unwrap();
    let guard = Guard::open(&world.pod).unwrap();
    guard.guard(&config()).unwrap();
    assert_eq!(stopped(&world.pod), Some(0));
    let (outbound, inbound) =
        (listen_any(&world.pod, 15001, Some(PROXY_MARK)), listen_any(&world.pod, 15006, Some(PROXY_MARK)));
    // Something is there, so that a connection which gets through is seen.
    let _elsewhere = listen_any(&world.client, 8080, None);
    let app = listen_any(&world.pod, 8080, None);
    let excluded = (listen_any(&world.client, 7000, None), listen_any(&world.pod, 7001, None));
    for family in [0, 1] {
        let (out, into) = (addr(CLIENT[family], 8080), addr(POD[family], 8080));
        let mut program = dial(&world.pod, out, None).await.unwrap();
        let (mut at_proxy, _) = within(outbound.accept()).await.unwrap();
        let mut peer = dial(&world.client, into, None).await.unwrap();
        let (mut from_peer, _) = within(inbound.accept()).await.unwrap();
        let dialing = DialOptions {
            mark: Some(PROXY_MARK),
            source: Some(addr(CLIENT[family], 0)),
            ..Default::default()
        };
        let mut to_app = connect(&world.pod, into, &dialing, SOON).await.unwrap();
        let (mut served, _) = within(app.accept()).await.unwrap();
        exchange(&mut program, &mut at_proxy).await;
        exchange(&mut peer, &mut from_peer).await;
        exchange(&mut to_app, &mut served).await;
        assert_eq!(stopped(&world.pod), Some(0), "nothing is stopped while the rules are in force");

        let wire =
            Capture::start(&world.router, "veth2", CaptureOptions::default().marker(*b"leak")).unwrap();
        assert!(nft(&world.pod, "flush ruleset"));
        assert_eq!(verify(&world.pod, &config()).unwrap(), Verdict::Missing);
        program.write_all(b"leak").await.unwrap();
        at_proxy.write_all(b"back").await.unwrap();
        from_peer.write_all(b"leak").await.unwrap();
        served.write_all(b"leak").await.unwrap();
        assert!(is_silent(&world.pod, out).await && is_silent(&world.client, into).await);
        let query = udp(&world.pod, addr(POD[family], 0), None);
        let _ = query.send_to(b"leak", addr(CLIENT[family], 53)).await;
        let _kept = dial(&world.pod, addr(CLIENT[family], 7000), None).await.unwrap();
        within(excluded.0.accept()).await.unwrap();
        let _kept = dial(&world.client, addr(POD[family], 7001), None).await.unwrap();
        within(excluded.1.accept()).await.unwrap();
        let seen = wire.stop().unwrap();
        assert_eq!((seen.hits(b"leak"), seen.dropped), (0, 0));
        assert!(stopped(&world.pod).unwrap() >= 6, "{:?}", stopped(&world.pod));

        install(&world.pod, &config()).unwrap();
        let mut four = [0; 4];
        for (stream, expected) in
            [(&mut at_proxy, b"leak"), (&mut program, b"back"), (&mut peer, b"leak"), (&mut to_app, b"leak")]
        {
            within(stream.read_exact(&mut four)).await.unwrap();
            assert_eq!(&four, expected);
        }
        exchange(&mut program, &mut at_proxy).await;
        exchange(&mut peer, &mut from_peer).await;
        exchange(&mut to_app, &mut served).await;
        guard.guard(&config()).unwrap();
        assert_eq!(stopped(&world.pod), Some(0));
    }
}

/// Root in the pod can change the redirect rules, but not the guard; it ends with its socket, and is no part of a pod that leaves.
#[tokio::test]
async fn nobody_else_removes_a_guard() {
    let world = World::new();
    let server = listen(&world.client, addr(CLIENT[0], 8080));
    let config = config();
    install(&world.pod, &config).unwrap();
    let guard = Guard::open(&world.pod).unwrap();
    guard.guard(&config).unwrap();
    for command in [
        "delete table inet culvert_guard",
        "flush table inet culvert_guard",
        "flush chain inet culvert_guard output",
    ] {
        assert!(!nft(&world.pod, command), "{command}");
    }
    assert!(nft(&world.pod, "flush ruleset"));
    assert!(is_silent(&world.pod, addr(CLIENT[0], 8080)).await);
    guard.guard(&config.return_path_only()).unwrap();
    assert_eq!(stopped(&world.pod), None);
    let _app = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    within(server.accept()).await.unwrap();
    guard.guard(&config).unwrap();
    assert!(is_silent(&world.pod, addr(CLIENT[0], 8080)).await);
    drop(guard);
    let deadline = std::time::Instant::now() + SOON;
    while stopped(&world.pod).is_some() {
        assert!(std::time::Instant::now() < deadline);
    }
    let _app = dial(&world.pod, addr(CLIENT[0], 8080), None).await.unwrap();
    within(server.accept()).await.unwrap();
}
