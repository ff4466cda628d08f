//! What shares a tunnel between two pods as they run, and what waits for whom in it. As root only.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

const WEB: &str = "shop/web.shop.svc.cluster.local";
const SHOP: &str = "shop/shop.shop.svc.cluster.local";
const VIP: &str = "198.18.128.9:80";

/// `shop/cart`, and `shop/web` at 100.64.1.1, both captured. `web` is an endpoint of `WEB`, and of `SHOP`, whose endpoints may
/// have another identity too.
async fn two_pods() -> (World, World) {
    let (authority, netns) = (Authority::new(), namespace());
    let other = Arc::new(neighbour(&netns));
    let web = serve(workload("shop", "web", &["100.64.1.1"]), WEB, &[(80, 8080)]);
    let web = serve(web, SHOP, &[(80, 8080)]);
    let shop = Service {
        subject_alt_names: [identity("shop", "till")].into_iter().collect(),
        ..service(SHOP, &["198.18.128.10"])
    };
    let known = snapshot([cart(), web], [service(WEB, &["198.18.128.9"]), shop]);
    let near = Setup { authority: authority.clone(), netns, name: "cart", dns: None };
    let near = World::start(near, known.clone());
    let far = World::start(Setup { authority, netns: other, name: "web", dns: None }, known);
    for world in [&near, &far] {
        install(&world.netns, &RedirectConfig::default()).unwrap();
    }
    (near, far)
}

/// An application that answers every connection's every byte.
fn echo(world: &World, address: &str) {
    let (listener, tasks) = (world.listen(address), world.tasks.clone());
    world.tasks.spawn("echo", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tasks.spawn("echoed", async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
}

/// One byte there and back.
async fn ask(stream: &mut TcpStream) {
    stream.write_all(b"x").await.unwrap();
    assert_eq!(soon(stream.read_u8()).await.unwrap(), b'x');
}

async fn asked(world: &World, to: &str) -> TcpStream {
    let mut stream = world.dial(None, to).await;
    ask(&mut stream).await;
    stream
}

/// Z21, TRAP18: another destination, another set of expected identities or another source pod is another connection, and the
/// same of all three is the same.
#[tokio::test]
async fn each_part_of_the_key_separates() {
    let (near, far) = two_pods().await;
    echo(&far, "100.64.1.1:8080");
    echo(&far, "100.64.1.1:8081");
    let tunnels = || near.pod.pools[0].stats().connections;
    let mut held = Vec::new();
    for (to, connections, what) in [
        ("100.64.1.1:8080", 1, "the first"),
        ("100.64.1.1:8080", 1, "the same again"),
        (VIP, 1, "a service with the same endpoint, port and identity"),
        ("100.64.1.1:8081", 2, "another destination"),
        ("198.18.128.10:80", 3, "other expected identities"),
        ("198.18.128.10:80", 3, "the same of them"),
    ] {
        held.push(asked(&near, to).await);
        assert_eq!(tunnels(), connections, "{what}");
    }
    // `web` calls itself by the service, and `cart` has no part in that: each pod has pools of its own.
    assert_eq!(far.pod.pools[0].stats().connections, 0);
    drop(held);
    near.end().await;
    far.end().await;
}

/// Z21, TRAP18: the rest of the key: a proxy elsewhere, and each other part by itself.
#[test]
fn keys_differ_by_each_part() {
    let key = |peer: &str, expected: &[&str], destination: &str| crate::outbound::TunnelKey {
        peer: peer.parse().unwrap(),
        expected: expected.iter().map(|account| identity("shop", account)).collect(),
        destination: destination.parse().unwrap(),
    };
    let one = key("100.64.1.1:15008", &["web"], "100.64.1.1:80");
    assert_eq!(one, key("100.64.1.1:15008", &["web"], "100.64.1.1:80"));
    for other in [
        key("100.64.1.2:15008", &["web"], "100.64.1.1:80"),
        key("100.64.1.1:15009", &["web"], "100.64.1.1:80"),
        key("100.64.1.1:15008", &["till"], "100.64.1.1:80"),
        key("100.64.1.1:15008", &["web", "till"], "100.64.1.1:80"),
        key("100.64.1.1:15008", &["web"], "100.64.1.2:80"),
        key("100.64.1.1:15008", &["web"], "100.64.1.1:81"),
    ] {
        assert_ne!(one, other);
    }
}

/// TRAP18, U15: another pod at the address of one that is gone gets a connection of its own, with its own identity proven, and none of
/// the streams meant for the other.
#[tokio::test]
async fn an_address_that_is_reused_gets_a_new_tunnel() {
    let (near, far) = two_pods().await;
    echo(&far, "100.64.1.1:8080");
    let stream = asked(&near, "100.64.1.1:8080").await;
    let pool = &near.pod.pools[0];
    // What the control plane's word of it does.
    let gone: std::net::IpAddr = "100.64.1.1".parse().unwrap();
    assert_eq!(pool.evict(|key, _| key.peer.ip() == gone), 1);
    let next = workload("shop", "next", &["100.64.1.1"]);
    let known = snapshot([cart(), next], []);
    near.pod.shared.state.commit(known.clone());
    let (authority, netns) = (far.authority.clone(), far.netns.clone());
    far.end().await;
    let far = World::start(Setup { authority, netns, name: "next", dns: None }, known);
    echo(&far, "100.64.1.1:8082");
    let _other = soon(asked(&near, "100.64.1.1:8082")).await;
    assert_eq!(pool.stats().dials, 2);
    let live = far.pod.shared.observer.connections.all();
    assert_eq!(live.len(), 1, "nothing of the other pod's");
    drop(stream);
    near.end().await;
    far.end().await;
}

/// Four bulk streams of a pod, and small messages of the same pod to the same destination: what passes of the bulk while one
/// message goes there and back is what stands before it in queues, whatever the machine's speed. On a stream that was there
/// before the bulk, which shares a connection with it, and on one that came later, which does not.
#[test]
fn bulk_does_not_stand_before_a_small_message() {
    // A thread like a worker's.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().event_interval(culvert_runtime::workers::EVENT_INTERVAL);
    runtime.build().unwrap().block_on(small_messages_beside_bulk());
}

async fn small_messages_beside_bulk() {
    let (near, far) = two_pods().await;
    let (moved, listener) = (Arc::new(AtomicUsize::new(0)), far.listen("100.64.1.1:8080"));
    let (tasks, count) = (far.tasks.clone(), moved.clone());
    far.tasks.spawn("app", async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let moved = count.clone();
            tasks.spawn("served", async move {
                let mut buffer = vec![0; 256 << 10];
                loop {
                    match stream.read(&mut buffer).await {
                        Ok(1) => stream.write_all(b"x").await.unwrap(),
                        Ok(n) if n > 1 => drop(moved.fetch_add(n, Ordering::Relaxed)),
                        _ => return,
                    }
                }
            });
        }
    });
    let mut before = asked(&near, VIP).await;
    let connections = || near.pod.pools[0].stats().connections;
    for _ in 0..4 {
        let mut stream = near.dial(None, VIP).await;
        near.tasks.spawn("bulk", async move {
            let chunk = vec![0; 256 << 10];
            while stream.write_all(&chunk).await.is_ok() {}
        });
    }
    let flowing = async |bytes: usize| {
        let from = moved.load(Ordering::Relaxed);
        while moved.load(Ordering::Relaxed) < from + bytes {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    // Until all queues are as full as they get.
    soon(flowing(64 << 20)).await;
    let mut after = asked(&near, VIP).await;
    assert!(connections() > 1, "a connection without bulk");
    for (stream, bound) in [(&mut before, 4 << 20), (&mut after, 4 << 20)] {
        let mut passed: Vec<usize> = Vec::new();
        for _ in 0..21 {
            let from = moved.load(Ordering::Relaxed);
            ask(stream).await;
            passed.push(moved.load(Ordering::Relaxed) - from);
        }
        passed.sort_unstable();
        assert!(passed[10] <= bound, "{} bytes of bulk before a small message, in the median", passed[10]);
    }
    near.end().await;
    far.end().await;
}
