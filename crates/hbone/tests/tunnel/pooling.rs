//! The pool: who shares a connection, who dials, and what is never reused.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use culvert_hbone::pool::{OpenError, Opened, PoolStats};
use culvert_hbone::{ConnectError, ConnectionFacts, Pool, PoolConfig, ServerConfig};
use http::{HeaderMap, StatusCode};
use parking_lot::Mutex;
use tokio::io::{DuplexStream, duplex};
use tokio::sync::oneshot;

use crate::common::*;

type TestPool = Pool<&'static str, io::Error>;

/// A destination that answers every CONNECT, with its connections in the order of their dials.
#[derive(Clone, Default)]
struct World {
    dials: Arc<AtomicUsize>,
    goaways: Arc<Mutex<Vec<Option<oneshot::Sender<()>>>>>,
    connections: Arc<Mutex<Vec<tokio::task::AbortHandle>>>,
    /// How dials come out.
    valid_until: Arc<Mutex<Option<SystemTime>>>,
    fingerprint: Arc<AtomicU64>,
    failing: Arc<AtomicUsize>,
    refusing: Arc<AtomicUsize>,
    server: Arc<Mutex<ServerConfig>>,
}

impl World {
    fn dial(&self) -> impl Future<Output = io::Result<(DuplexStream, ConnectionFacts)>> + Send + use<> {
        let world = self.clone();
        async move {
            world.dials.fetch_add(1, Ordering::SeqCst);
            // Others get their turn before the dial is through.
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            if world.failing.load(Ordering::SeqCst) > 0 {
                return Err(io::ErrorKind::HostUnreachable.into());
            }
            let (near, far) = duplex(64 << 10);
            world.accept(far);
            let facts = ConnectionFacts {
                valid_until: *world.valid_until.lock(),
                fingerprint: world.fingerprint.load(Ordering::SeqCst),
                ..ConnectionFacts::default()
            };
            Ok((near, facts))
        }
    }

    /// Serves one connection, holding each tunnel until the client ends it.
    fn accept(&self, io: DuplexStream) {
        let mut peer = serve(io, self.server.lock().clone());
        self.goaways.lock().push(peer.goaway.take());
        self.connections.lock().push(peer.ended.abort_handle());
        let refusing = self.refusing.clone();
        spawn(async move {
            while let Some(incoming) = peer.incoming.recv().await {
                if refusing.load(Ordering::SeqCst) > 0 {
                    let _ = incoming.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
                } else if let Ok(stream) = incoming.accept(HeaderMap::new()) {
                    spawn(async move {
                        let (mut recv, mut send) = stream.split();
                        while let Ok(Some(chunk)) = recv.recv().await {
                            recv.release(chunk.len());
                        }
                        let _ = send.finish();
                    });
                }
            }
        });
    }

    fn dials(&self) -> usize {
        self.dials.load(Ordering::SeqCst)
    }
}

fn pool(config: PoolConfig) -> TestPool {
    Pool::new(config, spawner())
}

async fn open(pool: &TestPool, world: &World) -> Result<Opened, OpenError<io::Error>> {
    pool.open(&"key", &|| world.dial(), request()).await
}

async fn open_many(
    pool: &TestPool,
    world: &World,
    count: usize,
) -> Vec<Result<Opened, OpenError<io::Error>>> {
    let tasks: Vec<_> = (0..count)
        .map(|_| {
            let (pool, world) = (pool.clone(), world.clone());
            spawn(async move { open(&pool, &world).await })
        })
        .collect();
    let mut opened = Vec::new();
    for task in tasks {
        opened.push(task.await.expect("no panic"));
    }
    opened
}

/// Z22.
#[tokio::test]
async fn a_hundred_at_once_share_one_dial() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let opened = open_many(&pool, &world, 100).await;
    assert!(opened.iter().all(Result::is_ok));
    assert_eq!(opened.iter().flatten().filter(|opened| !opened.reused).count(), 1);
    assert_eq!(pool.stats(), PoolStats { connections: 1, streams: 100, dials: 1, ..PoolStats::default() });
    drop(opened);
    eventually("all places are free", || pool.stats().streams == 0).await;
}

/// Z22.
#[tokio::test]
async fn two_hundred_and_fifty_streams_make_three_connections() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let opened = open_many(&pool, &world, 250).await;
    assert!(opened.iter().all(Result::is_ok));
    assert_eq!((world.dials(), pool.stats().connections), (3, 3));
    assert_eq!(pool.stats().streams, 250);
}

/// Z21.
#[tokio::test]
async fn keys_share_nothing() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let a = pool.open(&"a", &|| world.dial(), request()).await.unwrap();
    let b = pool.open(&"b", &|| world.dial(), request()).await.unwrap();
    assert_ne!(a.connection, b.connection);
    assert_eq!(world.dials(), 2);
}

#[tokio::test]
async fn one_failed_dial_fails_all_who_waited_and_only_them() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    world.failing.store(1, Ordering::SeqCst);
    for result in open_many(&pool, &world, 50).await {
        match result {
            Err(OpenError::Dial(error)) => assert_eq!(error.kind(), io::ErrorKind::HostUnreachable),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((world.dials(), pool.stats().dial_failures), (1, 1));
    world.failing.store(0, Ordering::SeqCst);
    open(&pool, &world).await.unwrap();
}

#[tokio::test]
async fn cancelled_dialler_hands_its_turn_on() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let stuck = {
        let pool = pool.clone();
        spawn(async move {
            let dial = std::future::pending::<io::Result<(DuplexStream, ConnectionFacts)>>;
            pool.open(&"key", &dial, request()).await.map(drop)
        })
    };
    eventually("the dial has begun", || pool.stats().dials == 1).await;
    let waiter = {
        let (pool, world) = (pool.clone(), world.clone());
        spawn(async move { open(&pool, &world).await })
    };
    tokio::task::yield_now().await;
    assert_eq!(world.dials(), 0);
    stuck.abort();
    assert!(!waiter.await.unwrap().unwrap().reused);
}

#[tokio::test]
async fn expired_connection_gets_no_new_stream_and_keeps_its_own() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    // Valid at the dial, but within the margin.
    *world.valid_until.lock() = Some(SystemTime::now() + Duration::from_millis(900));
    let first = open(&pool, &world).await.unwrap();
    *world.valid_until.lock() = Some(SystemTime::now() + Duration::from_secs(3600));
    let second = open(&pool, &world).await.unwrap();
    let third = open(&pool, &world).await.unwrap();
    assert_ne!(first.connection, second.connection);
    assert_eq!((second.connection, third.reused), (third.connection, true));
    // The first tunnel still works to its end.
    let (mut recv, mut send) = first.stream.split();
    send.send(bytes("old but open")).await.unwrap();
    send.finish().unwrap();
    assert_eq!(recv.recv().await, Ok(None));
    drop((recv, send));
    eventually("the expired connection closes", || pool.stats().connections == 1).await;
}

/// TRAP18.
#[tokio::test]
async fn evicted_connection_is_not_reused() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    world.fingerprint.store(1, Ordering::SeqCst);
    let old = open(&pool, &world).await.unwrap();
    world.fingerprint.store(2, Ordering::SeqCst);
    assert_eq!(pool.evict(|key, facts| *key == "key" && facts.fingerprint == 1), 1);
    let new = open(&pool, &world).await.unwrap();
    assert_eq!((old.facts.fingerprint, new.facts.fingerprint), (1, 2));
    assert_eq!(pool.evict(|_, facts| facts.fingerprint == 1), 0);
    drop(old);
    eventually("the evicted connection closes", || pool.stats().connections == 1).await;
}

#[tokio::test]
async fn dial_overtaken_by_an_eviction_serves_its_caller_only() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let dialling = {
        let (pool, world) = (pool.clone(), world.clone());
        spawn(async move { open(&pool, &world).await })
    };
    eventually("the dial has begun", || world.dials() == 1).await;
    pool.evict(|_, _| true);
    let first = dialling.await.unwrap().unwrap();
    let second = open(&pool, &world).await.unwrap();
    assert_ne!(first.connection, second.connection);
    assert_eq!(world.dials(), 2);
}

#[tokio::test]
async fn draining_peer_gets_no_new_stream() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let first = open(&pool, &world).await.unwrap();
    world.goaways.lock()[0].take().unwrap().send(()).unwrap();
    // Whatever the race between the GOAWAY and each request, none of them fails.
    let mut last = first.connection;
    for _ in 0..50 {
        last = open(&pool, &world).await.unwrap().connection;
    }
    assert_ne!(first.connection, last);
    let (mut recv, mut send) = first.stream.split();
    send.finish().unwrap();
    assert_eq!(recv.recv().await, Ok(None));
}

#[tokio::test]
async fn connection_that_died_in_the_pool_is_replaced_unseen() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    drop(open(&pool, &world).await.unwrap());
    eventually("idle", || pool.stats().streams == 0).await;
    world.connections.lock()[0].abort();
    let opened = open_many(&pool, &world, 20).await;
    assert!(opened.iter().all(Result::is_ok), "{opened:?}");
    assert_eq!(world.dials(), 2);
}

#[tokio::test]
async fn refusal_is_final() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    world.refusing.store(1, Ordering::SeqCst);
    match open(&pool, &world).await {
        Err(OpenError::Connect(ConnectError::Refused { status, .. })) => {
            assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((world.dials(), pool.stats().retries), (1, 0));
}

#[tokio::test]
async fn peer_with_a_small_limit_is_spread_over_connections() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    *world.server.lock() = ServerConfig { max_concurrent_streams: 10, ..ServerConfig::default() };
    let mut held = Vec::new();
    for _ in 0..35 {
        held.push(open(&pool, &world).await.unwrap());
    }
    assert_eq!(pool.stats().connections, 4);
}

/// Z22.
#[tokio::test(start_paused = true)]
async fn idle_connection_closes_after_its_time_and_not_before() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let idle = PoolConfig::default().idle_timeout;
    let first = open(&pool, &world).await.unwrap();
    tokio::time::sleep(2 * idle).await;
    assert_eq!(pool.stats().connections, 1, "a stream keeps it open");
    drop(first);
    tokio::time::sleep(idle - Duration::from_secs(1)).await;
    let second = open(&pool, &world).await.unwrap();
    assert!(second.reused);
    drop(second);
    tokio::time::sleep(idle - Duration::from_secs(1)).await;
    assert_eq!(pool.stats().connections, 1, "its time began anew");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(pool.stats().connections, 0);
    assert!(!open(&pool, &world).await.unwrap().reused);
}

#[tokio::test(start_paused = true)]
async fn streams_that_wait_for_window_send_new_ones_elsewhere() {
    let config = PoolConfig { max_stalled: 2, ..PoolConfig::default() };
    let (world, pool) = (World::default(), pool(config));
    let mut held = Vec::new();
    let mut connections = Vec::new();
    for _ in 0..4 {
        // A peer that reads nothing: no task of World takes these bytes.
        let opened = pool.open(&"stalled", &|| silent_peer(&world), request()).await.unwrap();
        connections.push(opened.connection);
        let (recv, mut send) = opened.stream.split();
        let writer = spawn(async move { send.send(noise(4 << 20, 8).into()).await });
        tokio::time::sleep(Duration::from_secs(1)).await;
        held.push((recv, writer));
    }
    assert_eq!(connections, [1, 2, 1, 2], "two are passed over, more are used again");
}

/// Four bulk streams and a small one have a connection each; once the bulk rests, they share again.
#[tokio::test(start_paused = true)]
async fn bulk_has_connections_of_its_own() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let mut bulk = Vec::new();
    for _ in 0..6 {
        let opened = open(&pool, &world).await.unwrap();
        let connection = opened.connection;
        let (recv, mut send) = opened.stream.split();
        send.send(noise(2 << 20, 1).into()).await.unwrap();
        bulk.push((connection, recv, send));
    }
    let connections: Vec<_> = bulk.iter().map(|(connection, ..)| *connection).collect();
    assert_eq!(connections, [1, 2, 3, 4, 1, 2], "four are passed over, with more the least used is used");
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Four small messages of four streams are no bulk.
    for _ in 0..4 {
        let opened = open(&pool, &world).await.unwrap();
        assert_eq!(opened.connection, 1, "nothing is bulk any more");
        let (recv, mut send) = opened.stream.split();
        send.send(noise(100 << 10, 1).into()).await.unwrap();
        bulk.push((opened.connection, recv, send));
    }
}

/// A small stream beside four bulk ones has a connection without any.
#[tokio::test(start_paused = true)]
async fn a_small_stream_is_kept_away_from_bulk() {
    let (world, pool) = (World::default(), pool(PoolConfig { max_bulk: 5, ..PoolConfig::default() }));
    let mut bulk = Vec::new();
    for _ in 0..4 {
        let (recv, mut send) = open(&pool, &world).await.unwrap().stream.split();
        send.send(noise(2 << 20, 1).into()).await.unwrap();
        bulk.push((recv, send));
    }
    for _ in 0..3 {
        assert_eq!(open(&pool, &world).await.unwrap().connection, 5);
    }
}

/// With no connection left to make, a busy one is better than none.
#[tokio::test(start_paused = true)]
async fn bulk_shares_where_no_connection_is_left() {
    let config = PoolConfig { max_connections: 1, ..PoolConfig::default() };
    let (world, pool) = (World::default(), pool(config));
    let (_recv, mut send) = open(&pool, &world).await.unwrap().stream.split();
    send.send(noise(2 << 20, 1).into()).await.unwrap();
    assert_eq!(open(&pool, &world).await.unwrap().connection, 1);
}

/// Accepts every tunnel and never reads from it.
fn silent_peer(
    world: &World,
) -> impl Future<Output = io::Result<(DuplexStream, ConnectionFacts)>> + Send + use<> {
    let config = world.server.lock().clone();
    async move {
        let (near, far) = duplex(64 << 10);
        let mut peer = serve(far, config);
        spawn(async move {
            let mut held = Vec::new();
            while let Some(incoming) = peer.incoming.recv().await {
                held.extend(incoming.accept(HeaderMap::new()));
            }
        });
        Ok((near, ConnectionFacts::default()))
    }
}

#[tokio::test]
async fn limit_of_connections_holds() {
    let config = PoolConfig { max_connections_per_key: 2, ..PoolConfig::default() };
    let (world, pool) = (World::default(), pool(config));
    *world.server.lock() = ServerConfig { max_concurrent_streams: 1, ..ServerConfig::default() };
    let _first = open(&pool, &world).await.unwrap();
    let _second = open(&pool, &world).await.unwrap();
    assert!(matches!(open(&pool, &world).await, Err(OpenError::Exhausted(2))));
}

#[tokio::test]
async fn drain_waits_for_streams_and_admits_no_more() {
    let (world, pool) = (World::default(), pool(PoolConfig::default()));
    let opened = open(&pool, &world).await.unwrap();
    let draining = {
        let pool = pool.clone();
        spawn(async move { pool.drain().await })
    };
    tokio::task::yield_now().await;
    assert!(matches!(open(&pool, &world).await, Err(OpenError::Draining)));
    assert!(!draining.is_finished());
    drop(opened);
    draining.await.unwrap();
    assert_eq!(pool.stats().connections, 0);
}
