//! What a pod may take, and what a deleted one leaves.

use std::io::ErrorKind;

use culvert_hbone::LostCause;

use super::*;
use crate::observe::limits::Limit;

/// The pod `shop/cart`, by a proxy with more arguments.
pub(super) fn world(arguments: &[&str], known: Arc<Snapshot>) -> World {
    let authority = Authority::new();
    let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
    let (shared, drain) = shared_by(authority.clone(), None, &arguments);
    shared.state.commit(known);
    let netns = namespace();
    let pod = Pod::start(shared, info("cart"), netns.clone()).unwrap();
    World { authority, netns, pod, tasks: Tasks::new("test"), _drain: drain }
}

fn times(world: &World, limit: Limit) -> u64 {
    world.pod.shared.observer.metrics.limits.times(limit)
}

async fn until(what: impl Fn() -> bool) {
    soon(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Z117 differs: a pod's connections are bounded; one more is reset at once and counted, and takes nothing from another pod.
#[tokio::test]
async fn a_pod_beyond_its_bound() {
    let world = world(&["--max-pod-connections=3"], snapshot([cart()], []));
    let other = Pod::start(world.pod.shared.clone(), info("cart"), namespace()).unwrap();
    // They say nothing, and so are in their handshake.
    let mut held = Vec::new();
    for open in 1..=3 {
        held.push(world.dial(None, "127.0.0.1:15008").await);
        until(|| world.pod.places.used().0 == open).await;
    }
    let mut refused = world.dial(None, "127.0.0.1:15008").await;
    assert_eq!(soon(refused.read_u8()).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!((times(&world, Limit::PodConnections), times(&world, Limit::Connections)), (1, 0));
    let at_other = DialOptions::default();
    let _served = connect(&other.netns, "127.0.0.1:15008".parse().unwrap(), &at_other, SOON).await.unwrap();
    until(|| other.places.used().0 == 1).await;
    held.pop();
    until(|| world.pod.places.used().0 == 2).await;
    held.push(world.dial(None, "127.0.0.1:15008").await);
    until(|| world.pod.places.used().0 == 3).await;
    drop(held);
    until(|| world.pod.places.used().0 == 0).await;
    other.stop().await;
    world.end().await;
}

/// A stream beyond the bound is answered as by a destination that does not accept (Z20), and the tunnel goes on.
#[tokio::test]
async fn a_stream_beyond_the_bound() {
    let world = world(&["--max-pod-connections=2"], snapshot([cart()], []));
    let app = world.listen("127.0.0.1:8080");
    let (handle, _) = world.tunnel(&client(), LOCAL).await;
    let stream = soon(open(&handle, "127.0.0.1:8080")).await.unwrap();
    let (accepted, _) = soon(app.accept()).await.unwrap();
    match soon(open(&handle, "127.0.0.1:8080")).await {
        Err(ConnectError::Refused { status, .. }) => assert_eq!(status.as_u16(), 503),
        other => panic!("{:?}", other.map(drop)),
    }
    assert_eq!(times(&world, Limit::PodConnections), 1);
    drop((stream, accepted));
    until(|| world.pod.places.used().0 == 1).await;
    assert!(soon(open(&handle, "127.0.0.1:8080")).await.is_ok());
    world.end().await;
}

/// A client that begins no TLS is let go after 10 s, and counted.
#[tokio::test]
async fn a_handshake_has_its_time() {
    let world = world(&[], snapshot([cart()], []));
    let mut silent = world.dial(None, "127.0.0.1:15008").await;
    until(|| world.pod.places.used().0 == 1 && world.pod.shared.certificates.list().len() == 1).await;
    tokio::time::pause();
    let begun = tokio::time::Instant::now();
    assert_eq!(silent.read(&mut [0]).await.unwrap_or(0), 0);
    assert!(begun.elapsed() <= Duration::from_secs(11), "{:?}", begun.elapsed());
    assert_eq!(times(&world, Limit::HandshakeTime), 1);
    world.end().await;
}

/// A connection of which one side has ended and on which nothing moves is reset after its time; one that is whole is not, unless
/// that was asked for too.
#[tokio::test]
async fn what_stands_still_ends() {
    for (argument, half_close, limit) in [
        ("--half-closed-timeout=300ms", true, Limit::HalfClosedTime),
        ("--idle-timeout=300ms", false, Limit::IdleTime),
    ] {
        let world = world(&[argument], snapshot([cart()], []));
        let app = world.listen("127.0.0.1:8080");
        let (handle, _) = world.tunnel(&client(), LOCAL).await;
        let mut stream = soon(open(&handle, "127.0.0.1:8080")).await.unwrap();
        let (mut accepted, _) = soon(app.accept()).await.unwrap();
        if half_close {
            stream.shutdown().await.unwrap();
            assert_eq!(soon(accepted.read(&mut [0])).await.unwrap(), 0);
        }
        assert!(soon(stream.read_u8()).await.is_err(), "cut, not ended");
        until(|| world.pod.shared.observer.connections.is_empty()).await;
        assert_eq!(times(&world, limit), 1, "{argument}");
        world.end().await;
    }
}

/// A peer that keeps a tunnel without streams for ever is told to go, in an orderly way.
#[tokio::test]
async fn a_tunnel_that_nobody_uses_ends() {
    let world = world(&["--pool-idle=500ms"], snapshot([cart()], []));
    let (handle, _) = world.tunnel(&client(), LOCAL).await;
    until(|| handle.unusable().is_some()).await;
    assert!(matches!(handle.unusable(), Some(LostCause::GoAway(culvert_hbone::Reason::NO_ERROR))));
    assert_eq!(times(&world, Limit::IdleTime), 1);
    world.end().await;
}

/// Z12: a deleted pod's proxy stops at once: its connections end as if they had been torn, without a goodbye to the peer, and nothing
/// of it is left.
#[tokio::test]
async fn a_deleted_pod_says_no_goodbye() {
    let authority = Authority::new();
    let (shared, drain) = shared(&authority, None);
    shared.state.commit(snapshot([cart()], []));
    let (pods, netns) = (Pods::new(shared.clone()), namespace());
    pods.add("uid-cart", info("cart"), netns.clone()).await.unwrap();
    let pod = pods.get("uid-cart").unwrap();
    let world = World { authority, netns, pod, tasks: Tasks::new("test"), _drain: drain };
    let app = world.listen("127.0.0.1:8080");
    let (handle, _) = world.tunnel(&client(), LOCAL).await;
    let mut stream = soon(open(&handle, "127.0.0.1:8080")).await.unwrap();
    let (mut accepted, _) = soon(app.accept()).await.unwrap();
    let begun = std::time::Instant::now();
    pods.remove("uid-cart").await;
    assert!(begun.elapsed() < shared.config.drain_deadline(), "{:?}", begun.elapsed());
    assert_eq!(world.pod.tasks.len(), 0, "{:?}", world.pod.tasks.names());
    assert!(soon(stream.read_u8()).await.is_err());
    assert!(soon(accepted.read_u8()).await.is_err());
    until(|| handle.unusable().is_some()).await;
    let cause = handle.unusable();
    assert!(matches!(cause, Some(LostCause::Transport(_))), "no GOAWAY: {cause:?}");
    assert!(shared.observer.connections.is_empty());
    assert_eq!(shared.places.used().0, 0);
    world.tasks.abort_all();
}
