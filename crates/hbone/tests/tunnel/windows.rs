//! Backpressure: bounded buffering, and no stream in another's way (trap 19).

use std::sync::atomic::{AtomicUsize, Ordering};

use culvert_hbone::{ClientConfig, Keepalive, ServerConfig, TunnelStream, Windows};

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
