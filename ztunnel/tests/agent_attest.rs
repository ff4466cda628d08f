//! Redirect rules that somebody takes away or alters: noticed, the pod held on its node, mended; what leaks is counted. Needs root.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop there")]

mod agent_support;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use agent_support::{World, eventually, ip, own_table, routed, run_in};
use culvert_net::NetNs;
use culvert_net::nft::{Batch, Rule, read_table};
use culvert_net::redirect::{RedirectConfig, Verdict, verify};
use culvert_net::{hold, link};
use serde_json::json;

/// One at a time: they measure, and the machine may have two processors.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// The bound of the issue: plaintext packets leave a pod for no longer than this.
const WINDOW: Duration = Duration::from_millis(50);
const SERVER: &str = "10.1.0.2:8080";

fn intact(pod: &NetNs) -> bool {
    verify(pod, &RedirectConfig::default()).unwrap() == Verdict::Intact
}

/// Takes connections as fast as they come, so that none is kept out by a full queue.
fn plaintext_server(client: &NetNs) {
    let listener = client.run(|| TcpListener::bind(SERVER)).unwrap();
    thread::spawn(move || while listener.accept().is_ok() {});
}

/// Opens connections without a pause until told to stop. Gives the times at which those began that went around the proxy; the
/// others are redirected to a port where nobody listens, hence refused, or held.
fn knock(pod: Arc<NetNs>, stop: Arc<AtomicBool>) -> Receiver<Instant> {
    let (seen, leaks) = channel();
    thread::spawn(move || {
        let server: SocketAddr = SERVER.parse().unwrap();
        pod.run(|| {
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                if TcpStream::connect_timeout(&server, Duration::from_millis(1)).is_ok() {
                    let _ = seen.send(begun);
                }
            }
            Ok(())
        })
    });
    leaks
}

/// Rules flushed by hand, twenty times, while the pod opens connections as fast as it can: each time they are back. The guard stops what
/// would go around the mesh, and counts it; without one (older kernels) it would take at most 50 ms from the first such packet to the last. The agent runs on a thread of its own, as its process does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushed_rules_leak_for_at_most_50_ms() {
    let _alone = ALONE.lock().await;
    let (client, node, netns) = routed();
    let mut world = World::on(node.clone());
    world.start();
    let _proxy = world.proxy().await;
    let pod = world.pod_in("shop", "pod", netns.clone());
    world.enabled(&pod).await;
    assert_eq!(link::node_side(&netns, &node).unwrap(), ["veth2"]);
    plaintext_server(&client);
    let stop = Arc::new(AtomicBool::new(false));
    let leaks = knock(netns.clone(), stop.clone());
    let mut flushes = Vec::new();
    for _ in 0..20 {
        let flushed = Instant::now();
        run_in(&netns, "nft", "flush ruleset");
        eventually("the rules are back", || intact(&netns)).await;
        flushes.push((flushed, flushed.elapsed()));
        eventually("the hold is over", || read_table(&node, hold::TABLE, &[]).is_err()).await;
    }
    stop.store(true, Ordering::Relaxed);
    // Ends when the knocking thread does: one that is preempted tells of a leak late.
    let leaked: Vec<Instant> = leaks.iter().collect();
    let mut windows = Vec::new();
    for (index, (flushed, healed)) in flushes.iter().enumerate() {
        let next = flushes.get(index + 1).map(|(at, _)| *at);
        let mut during = leaked.iter().filter(|at| *at >= flushed && next.is_none_or(|next| **at < next));
        let first = during.next();
        // From the first to the last: the program that flushes takes its time before it does.
        let window = first.zip(during.next_back()).map_or(Duration::ZERO, |(first, last)| *last - *first);
        windows.push((window, *healed));
    }
    let worst = windows.iter().map(|(window, _)| *window).max().unwrap();
    let healed = windows.iter().map(|(_, healed)| *healed).max().unwrap();
    println!(
        "20 flushes: {} connections leaked, over at most {worst:?} each; rules back after at most {healed:?}, the \
         flush's own process included",
        leaked.len()
    );
    assert!(worst <= WINDOW, "{windows:?}");
    assert_eq!(leaked.len(), 0, "the guard lets nothing out");
    world.metric_becomes("culvert_agent_rules_healed_total", |it| it >= 20.0).await;
    world.metric_becomes("culvert_agent_stopped_packets_total", |it| it > 0.0).await;
    world.metric_becomes("culvert_agent_held_interfaces", |it| it == 0.0).await;
    assert!(world.is_enabled(&pod));
    world.stop().await;
}

/// Somebody flushes the rules while the pod sends through the proxy: the connection goes on afterwards, in both directions, and not a
/// byte of it leaves the pod by itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_through_the_proxy_survive_a_flush() {
    use std::io::{Read, Write};
    let _alone = ALONE.lock().await;
    let (client, node, netns) = routed();
    let mut world = World::on(node.clone());
    world.start();
    let _proxy = world.proxy().await;
    let pod = world.pod_in("shop", "pod", netns.clone());
    world.enabled(&pod).await;
    plaintext_server(&client);
    let options = culvert_net::socket::ListenOptions { mark: Some(0x539), ..Default::default() };
    let listener = netns.run(|| culvert_net::socket::listen_tcp_any(15001, &options)).unwrap();
    listener.set_nonblocking(false).unwrap();
    let mut program = netns.run(|| TcpStream::connect(SERVER)).unwrap();
    let (mut at_proxy, _) = listener.accept().unwrap();
    for stream in [&program, &at_proxy] {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    }
    let wire = culvert_net::capture::Capture::start(
        &node,
        "veth2",
        culvert_net::capture::CaptureOptions::default().marker(*b"secret"),
    )
    .unwrap();
    for round in 0..5 {
        run_in(&netns, "nft", "flush ruleset");
        for _ in 0..10 {
            program.write_all(b"secret").unwrap();
            at_proxy.write_all(b"answer").unwrap();
        }
        let mut buf = [0; 60];
        at_proxy.read_exact(&mut buf).unwrap();
        assert_eq!(buf.as_slice(), b"secret".repeat(10), "{round}");
        program.read_exact(&mut buf).unwrap();
        assert_eq!(buf.as_slice(), b"answer".repeat(10), "{round}");
        eventually("the rules are back", || intact(&netns)).await;
    }
    let seen = wire.stop().unwrap();
    assert_eq!((seen.hits(b"secret"), seen.dropped), (0, 0));
    world.stop().await;
}

/// Whatever is altered is mended: a rule added or a chain flushed (noticed at once), a routing rule or route removed (noticed at the
/// next look). A table of somebody else's is left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn altered_rules_are_mended() {
    let _alone = ALONE.lock().await;
    let (_client, node, netns) = routed();
    let mut world = World::on(node);
    world.start();
    let _proxy = world.proxy().await;
    let pod = world.pod_in("shop", "pod", netns.clone());
    world.enabled(&pod).await;
    let mut pass = Batch::new();
    pass.add_rule("culvert", "nat_output", &Rule::new("let all pass").accept());
    pass.commit(&netns).unwrap();
    eventually("the added rule is gone", || intact(&netns)).await;
    run_in(&netns, "nft", "flush chain inet culvert nat_output");
    eventually("the flushed chain is full", || intact(&netns)).await;
    run_in(&netns, "nft", "add table inet theirs");
    ip(&netns, "rule del pref 32764");
    eventually("the routing rule is back", || intact(&netns)).await;
    ip(&netns, "route flush table 100");
    eventually("the route is back", || intact(&netns)).await;
    assert!(run_in(&netns, "nft", "list tables").contains("theirs"));
    // Changed settings are no alteration, nor is leaving.
    world.describe(&pod, &json!({}), &json!({"ambient.istio.io/dns-capture": "false"}), false);
    let without_dns = RedirectConfig { dns_port: None, ..RedirectConfig::default() };
    eventually("the setting holds", || verify(&netns, &without_dns).unwrap() == Verdict::Intact).await;
    world.namespace("shop", "none");
    eventually("nothing is left", || verify(&netns, &without_dns).unwrap() == Verdict::Missing).await;
    world.stop().await;
}

/// Rules that cannot be mended: the pod stays held, and its report stops saying that it is enabled. Here a chain of somebody else's
/// with the name of ours, which cannot be replaced while a program of that owner lives: `owner` tables belong to one netlink socket.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_whose_rules_cannot_be_mended_stays_held() {
    let _alone = ALONE.lock().await;
    let (_client, node, netns) = routed();
    let mut world = World::on(node.clone());
    world.start();
    let _proxy = world.proxy().await;
    let pod = world.pod_in("shop", "pod", netns.clone());
    world.enabled(&pod).await;
    let mut owner = own_table(&world, &netns);
    eventually("it is no longer enabled", || {
        world.report(&pod).is_some_and(|(is, why)| is == "pending" && why.is_some())
    })
    .await;
    assert!(read_table(&node, hold::TABLE, &[]).is_ok());
    assert!(!intact(&netns));
    drop(owner.stdin.take());
    owner.wait().unwrap();
    world.enabled(&pod).await;
    eventually("the hold is over", || read_table(&node, hold::TABLE, &[]).is_err()).await;
    world.stop().await;
}

/// An agent that ended in the middle of a hold: the next one mends the rules and releases the pod.
#[tokio::test]
async fn a_hold_of_a_former_agent_is_released() {
    let _alone = ALONE.lock().await;
    let (_client, node, netns) = routed();
    let mut world = World::on(node.clone());
    let pod = world.pod_in("shop", "pod", netns.clone());
    hold::set(&node, &["veth2".to_owned()].into()).unwrap();
    world.start();
    let _proxy = world.proxy().await;
    world.enabled(&pod).await;
    eventually("the hold is over", || read_table(&node, hold::TABLE, &[]).is_err()).await;
    world.stop().await;
}
