//! Half-close and reset on bare tunnels: neither is ever taken for the other.

use culvert_hbone::io::TunnelIo;
use culvert_hbone::{Reason, StreamError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::common::*;

#[tokio::test]
async fn half_close_each_way_leaves_the_other_open() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (mut near_recv, mut near_send) = near.split();
    let (mut far_recv, mut far_send) = far.split();
    near_send.send(bytes("question")).await.unwrap();
    near_send.finish().unwrap();
    assert_eq!(near_send.finish(), Err(StreamError::Finished));
    assert_eq!(far_recv.recv().await, Ok(Some(bytes("question"))));
    assert_eq!(far_recv.recv().await, Ok(None));
    assert_eq!(far_recv.recv().await, Ok(None));
    far_send.send(bytes("answer")).await.unwrap();
    far_send.finish().unwrap();
    assert_eq!(near_recv.recv().await, Ok(Some(bytes("answer"))));
    assert_eq!(near_recv.recv().await, Ok(None));
}

#[tokio::test]
async fn dropped_sender_resets_with_cancel() {
    for drop_near in [true, false] {
        let (near, far, _handle, _peer) = one_tunnel().await;
        let (gone, other) = if drop_near { (near, far) } else { (far, near) };
        let (_recv, mut send) = gone.split();
        send.send(bytes("part")).await.unwrap();
        drop(send);
        let (mut recv, mut other_send) = other.split();
        let error = loop {
            match recv.recv().await {
                Ok(Some(_)) => {}
                other => break other,
            }
        };
        assert_eq!(error, Err(StreamError::Reset(Reason::CANCEL)));
        assert_eq!(other_send.send(bytes("x")).await, Err(StreamError::Reset(Reason::CANCEL)));
    }
}

#[tokio::test]
async fn reset_code_arrives_also_after_finish_and_while_idle() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (mut near_recv, mut near_send) = near.split();
    near_send.finish().unwrap();
    let (mut far_recv, far_send) = far.split();
    assert_eq!(far_recv.recv().await, Ok(None));
    let mut far_send = far_send;
    let (seen, ()) = tokio::join!(near_send.wait_reset(), async { far_send.reset(Reason::CONNECT_ERROR) });
    assert_eq!(seen, StreamError::Reset(Reason::CONNECT_ERROR));
    assert_eq!(near_recv.recv().await, Err(StreamError::Reset(Reason::CONNECT_ERROR)));
}

#[tokio::test]
async fn sender_blocked_on_the_window_learns_of_the_reset() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (_recv, mut send) = near.split();
    let blocked = spawn(async move { send.send(noise(8 << 20, 1).into()).await });
    let (mut far_recv, mut far_send) = far.split();
    assert!(far_recv.recv().await.unwrap().is_some());
    far_send.reset(Reason::CANCEL);
    assert_eq!(blocked.await.unwrap(), Err(StreamError::Reset(Reason::CANCEL)));
}

#[tokio::test]
async fn receiver_dropped_with_a_finished_sender_resets() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (recv, mut send) = far.split();
    send.finish().unwrap();
    drop((recv, send));
    let (mut near_recv, mut near_send) = near.split();
    assert_eq!(near_recv.recv().await, Ok(None));
    assert!(matches!(near_send.wait_reset().await, StreamError::Reset(_)));
}

#[tokio::test]
async fn plain_io_over_a_tunnel() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (mut near, mut far) = (TunnelIo::new(near), TunnelIo::new(far));
    let sent = noise(3 << 20, 2);
    let expected = digest(&sent);
    let writer = spawn(async move {
        near.write_all(&sent).await.unwrap();
        near.shutdown().await.unwrap();
        near
    });
    let mut received = Vec::new();
    far.read_to_end(&mut received).await.unwrap();
    assert_eq!(digest(&received), expected);
    let mut near = writer.await.unwrap();
    drop(far);
    assert_eq!(near.read(&mut [0]).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}
