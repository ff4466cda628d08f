//! Backpressure: bounded buffering, and no stream in another's way (trap 19).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use culvert_hbone::budget::SMALL_WINDOW;
use culvert_hbone::{
    Budget, ClientConfig, ConnectionFacts, Keepalive, Pool, PoolConfig, ServerConfig, TunnelRequest,
    TunnelStream, Windows,
};
use http::Response;
use tokio::io::{DuplexStream, duplex};

use crate::common::*;

/// Bytes that the bulk streams delivered.
static MOVED: AtomicUsize = AtomicUsize::new(0);

/// Sends until nothing more is taken, and returns how much that was.
async fn fill(stream: TunnelStream) -> (TunnelStream, usize) {
    let (recv, mut send) = stream.split();
    let mut sent = 0;
    // Nothing else runs while this future is polled to Pending again and again; time only jumps when all tasks are stuck.
    while let Ok(Ok(room)) =
        tokio::time::timeout(std::time::Duration::from_millis(50), send.ready_capacity(64 << 10)).await
    {
        send.send_now(vec![0; room].into()).expect("open");
        sent += room;
    }
    send.release_capacity();
    (TunnelStream::join(recv, send), sent)
}

fn configs() -> (ClientConfig, ServerConfig) {
    let keepalive = None::<Keepalive>;
    (
        ClientConfig { keepalive, ..ClientConfig::default() },
        ServerConfig { keepalive, ..ServerConfig::default() },
    )
}

/// TRAP19, Z23.
#[tokio::test(start_paused = true)]
async fn slow_reader_bounds_what_is_in_flight_and_stalls_nobody_else() {
    let (client, server) = configs();
    let (handle, mut peer, _) = connect(client, server).await;
    let mut stalled = Vec::new();
    for _ in 0..20 {
        let (near, far) = tunnel(&handle, &mut peer).await;
        let (near, sent) = fill(near).await;
        let windows = Windows::default();
        let bound = windows.stream as usize + windows.send_buffer;
        assert!(sent >= windows.stream as usize && sent <= bound, "{sent} of {bound}");
        stalled.push((near, far));
    }
    // 20 streams hold all of their windows; a further one still moves 8 MiB.
    let (near, far) = tunnel(&handle, &mut peer).await;
    let data = noise(8 << 20, 3);
    let expected = digest(&data);
    let writer = spawn(async move {
        let (_recv, mut send) = near.split();
        send.send(data.into()).await.unwrap();
        send.finish().unwrap();
        _recv
    });
    let (mut recv, _send) = far.split();
    let mut received = Vec::new();
    while let Some(chunk) = recv.recv().await.unwrap() {
        received.extend_from_slice(&chunk);
        recv.release(chunk.len());
    }
    assert_eq!(digest(&received), expected);
    drop(writer.await.unwrap());
    // And the stalled ones go on once they are read.
    let (near, far) = stalled.swap_remove(7);
    let (mut far_recv, _far_send) = far.split();
    let chunk = far_recv.recv().await.unwrap().unwrap();
    assert!(!chunk.is_empty());
    drop(near);
}

/// TRAP19.
#[tokio::test]
async fn bulk_streams_do_not_stop_a_small_one() {
    let (client, server) = configs();
    let (handle, mut peer, _) = connect(client, server).await;
    let mut bulk = Vec::new();
    for seed in 0..4 {
        let (near, far) = tunnel(&handle, &mut peer).await;
        let data = noise(16 << 20, seed);
        let expected = digest(&data);
        bulk.push(spawn(async move {
            let (_recv, mut send) = near.split();
            send.send(data.into()).await.unwrap();
            send.finish().unwrap();
            _recv
        }));
        bulk.push(spawn(async move {
            let (mut recv, _send) = far.split();
            let mut received = Vec::new();
            while let Some(chunk) = recv.recv().await.unwrap() {
                received.extend_from_slice(&chunk);
                MOVED.fetch_add(chunk.len(), Ordering::Relaxed);
                recv.release(chunk.len());
            }
            assert_eq!(digest(&received), expected);
            recv
        }));
    }
    let (near, far) = tunnel(&handle, &mut peer).await;
    let (mut near_recv, mut near_send) = near.split();
    let (mut far_recv, mut far_send) = far.split();
    // A task of its own: the runtime looks at the test's main future only once in 61 polls.
    let small = spawn(async move {
        let before = MOVED.load(Ordering::Relaxed);
        for _ in 0..10 {
            near_send.send(bytes("ping")).await.unwrap();
            assert_eq!(far_recv.recv().await, Ok(Some(bytes("ping"))));
            far_recv.release(4);
            far_send.send(bytes("pong")).await.unwrap();
            assert_eq!(near_recv.recv().await, Ok(Some(bytes("pong"))));
            near_recv.release(4);
        }
        (MOVED.load(Ordering::Relaxed) - before) / 10
    });
    let between = small.await.unwrap();
    let still_running = bulk.iter().filter(|task| !task.is_finished()).count();
    // A message waits for what is ahead of it: one frame of each bulk stream, and the one being written.
    let bound = 2 * 5 * Windows::default().frame as usize;
    assert!(between <= bound, "{between} bulk bytes passed for each round of the small stream");
    assert!(still_running > 0, "the rounds were answered while bulk ran");
    // Kept to the end: a receiver dropped before END_STREAM resets its stream.
    let mut ends = Vec::new();
    for task in bulk {
        ends.push(task.await.unwrap());
    }
}

/// A peer with ambient's windows: 4 MiB a stream, 16 MiB a connection. It reads what is for port 80, and nothing else.
async fn ambient_peer(io: DuplexStream, read: Arc<AtomicUsize>) {
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(4 << 20)
        .initial_connection_window_size(16 << 20)
        .max_frame_size(1 << 20)
        .max_concurrent_streams(200);
    let mut connection = builder.handshake::<_, Bytes>(io).await.expect("handshake");
    let mut held = Vec::new();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        held.push(respond.send_response(Response::new(()), false).expect("the client waits"));
        let reads = request.uri().authority().expect("CONNECT").as_str().ends_with(":80");
        let (mut body, read) = (request.into_body(), read.clone());
        spawn(async move {
            while reads && let Some(Ok(chunk)) = body.data().await {
                body.flow_control().release_capacity(chunk.len()).expect("was received");
                read.fetch_add(chunk.len(), Ordering::Relaxed);
            }
            std::future::pending::<()>().await;
            drop(body);
        });
    }
}

/// TRAP19, U34: five streams that nobody reads use up an ambient peer's connection window. A stream opened after that has
/// another connection, and moves its bytes.
#[tokio::test(start_paused = true)]
async fn stalled_streams_send_new_ones_elsewhere_at_an_ambient_peer() {
    let (client, _) = configs();
    let pool: Pool<&str, std::io::Error> =
        Pool::new(PoolConfig { client, ..PoolConfig::default() }, spawner());
    let read = Arc::new(AtomicUsize::new(0));
    let dial = || async {
        let (near, far) = duplex(64 << 10);
        spawn(ambient_peer(far, read.clone()));
        Ok((near, ConnectionFacts::default()))
    };
    let ask = |authority: &str| TunnelRequest { authority: authority.into(), ..request() };
    let mut stalled = Vec::new();
    for _ in 0..5 {
        stalled.push(pool.open(&"k", &dial, ask("10.0.0.1:81")).await.unwrap());
    }
    assert!(stalled.iter().all(|opened| opened.connection == 1));
    let (mut sent, mut held) = (0, Vec::new());
    for opened in stalled {
        let (recv, mut send) = opened.stream.split();
        sent += 1;
        held.push(recv);
        // It waits for window for ever.
        spawn(async move { send.send(noise(8 << 20, sent).into()).await });
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let opened = pool.open(&"k", &dial, ask("10.0.0.1:80")).await.unwrap();
    assert_eq!(opened.connection, 2, "the first one is stuck");
    let (_recv, mut send) = opened.stream.split();
    let all = 8 << 20;
    let moved = tokio::time::timeout(Duration::from_secs(10), send.send(noise(all, 9).into())).await;
    moved.expect("it moves").unwrap();
    eventually("all of it arrives", || read.load(Ordering::Relaxed) == all).await;
}

/// TRAP19: while stalled readers hold all of the budget, other streams have small windows, and still move; when the readers
/// catch up, the windows are whole again.
#[tokio::test(start_paused = true)]
async fn stalled_readers_are_bounded_together() {
    let (client, server) = configs();
    let budget = Budget::new(2 << 20);
    let server = ServerConfig { budget: budget.clone(), ..server };
    let (handle, mut peer, _) = connect(client, server).await;
    let full = Windows::default().stream as usize;
    let mut stalled = Vec::new();
    for _ in 0..3 {
        let (near, far) = tunnel(&handle, &mut peer).await;
        let (near, sent) = fill(near).await;
        assert!(sent >= full);
        let (mut recv, send) = far.split();
        // Read and not passed on.
        let first = recv.recv().await.unwrap().unwrap();
        stalled.push((near, recv, send, first.len()));
    }
    assert_eq!(budget.charged(), 3 * full as u64);
    assert!(budget.is_tight());
    // The connection says so at its next turn.
    let (near, mut far) = tunnel(&handle, &mut peer).await;
    let (near, sent) = fill(near).await;
    let bound = SMALL_WINDOW as usize + Windows::default().send_buffer;
    assert!(sent <= bound, "{sent} of {bound}");
    // It moves all the same.
    let (recv, mut send) = near.split();
    let sending = spawn(async move {
        send.send(noise(4 << 20, 1).into()).await.unwrap();
        (recv, send)
    });
    let (mut far_recv, far_send) = far.split();
    let mut moved = 0;
    while moved < sent + (4 << 20) {
        let chunk = far_recv.recv().await.unwrap().unwrap();
        moved += chunk.len();
        far_recv.release(chunk.len());
    }
    sending.await.unwrap();
    far = TunnelStream::join(far_recv, far_send);
    for (_, recv, ..) in &mut stalled {
        recv.release(full);
    }
    assert_eq!(budget.charged(), 0);
    assert!(!budget.is_tight());
    let (near, _far) = tunnel(&handle, &mut peer).await;
    let (_near, sent) = fill(near).await;
    assert!(sent >= full, "{sent}");
    drop(far);
}
