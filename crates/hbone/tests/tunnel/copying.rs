//! TCP through a tunnel, and TCP to TCP, over loopback sockets: what one end does, the other end sees.

use std::future::pending;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use culvert_hbone::copy::{
    CloseCause, CopyObserver, CopyOutcome, IdleLimits, arm_reset, copy_bidirectional, copy_tcp,
};
use culvert_hbone::{ClientHandle, LostCause, Reason};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};

use crate::common::*;

type Outcome = CopyOutcome<()>;

const NEVER: IdleLimits = IdleLimits { open: None, half_closed: None };

/// client -- near copy -- [tunnel] -- far copy -- server; without a tunnel both copies are the same one.
struct Path {
    client: TcpStream,
    server: TcpStream,
    near: JoinHandle<Outcome>,
    far: Option<JoinHandle<Outcome>>,
    _keep: Option<(ClientHandle, Peer)>,
    driver: Option<AbortHandle>,
}

async fn through_tunnel() -> Path {
    let (handle, mut peer, driver) = connect(Default::default(), Default::default()).await;
    let (near, far) = tunnel(&handle, &mut peer).await;
    let ((client, near_tcp), (far_tcp, server)) = (tcp_pair().await, tcp_pair().await);
    Path {
        client,
        server,
        near: spawn(copy_bidirectional(near_tcp, near, NEVER, (), pending())),
        far: Some(spawn(copy_bidirectional(far_tcp, far, NEVER, (), pending()))),
        _keep: Some((handle, peer)),
        driver: Some(driver),
    }
}

async fn direct() -> Path {
    let ((client, near), (far, server)) = (tcp_pair().await, tcp_pair().await);
    let near = spawn(copy_tcp(near, far, NEVER, (), pending()));
    Path { client, server, near, far: None, _keep: None, driver: None }
}

async fn paths() -> [Path; 2] {
    [through_tunnel().await, direct().await]
}

/// Z27.
#[tokio::test]
async fn half_close_each_way() {
    for mut path in paths().await {
        path.client.write_all(b"question").await.unwrap();
        path.client.shutdown().await.unwrap();
        let mut question = Vec::new();
        path.server.read_to_end(&mut question).await.unwrap();
        assert_eq!(question, b"question");
        // The other direction is open still, for as much as the server likes.
        let answer = noise(1 << 20, 4);
        path.server.write_all(&answer).await.unwrap();
        path.server.shutdown().await.unwrap();
        let mut received = Vec::new();
        path.client.read_to_end(&mut received).await.unwrap();
        assert_eq!(digest(&received), digest(&answer));
        let near = path.near.await.unwrap();
        assert_eq!((near.close_cause, near.sent, near.received), (CloseCause::Clean, 8, 1 << 20));
        if let Some(far) = path.far {
            let far = far.await.unwrap();
            assert_eq!((far.close_cause, far.sent, far.received), (CloseCause::Clean, 1 << 20, 8));
        }
    }
}

#[tokio::test]
async fn half_close_by_the_server_first() {
    for mut path in paths().await {
        path.server.write_all(b"banner").await.unwrap();
        path.server.shutdown().await.unwrap();
        let mut banner = Vec::new();
        path.client.read_to_end(&mut banner).await.unwrap();
        assert_eq!(banner, b"banner");
        path.client.write_all(b"still here").await.unwrap();
        path.client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        path.server.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"still here");
        assert_eq!(path.near.await.unwrap().close_cause, CloseCause::Clean);
    }
}

#[tokio::test]
async fn reset_by_the_client_arrives_as_a_reset() {
    for mut path in paths().await {
        path.client.write_all(b"x").await.unwrap();
        assert_eq!(path.server.read(&mut [0; 9]).await.unwrap(), 1);
        arm_reset(&path.client);
        drop(path.client);
        assert_eq!(path.server.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let near = path.near.await.unwrap();
        assert_eq!(
            (near.close_cause, near.error),
            (CloseCause::ClientReset, Some(ErrorKind::ConnectionReset))
        );
        if let Some(far) = path.far {
            let far = far.await.unwrap();
            assert_eq!((far.close_cause, far.reason), (CloseCause::PeerReset, Some(Reason::CANCEL)));
        }
    }
}

/// Z27.
#[tokio::test]
async fn reset_by_the_server_arrives_as_a_reset() {
    for mut path in paths().await {
        path.client.write_all(b"x").await.unwrap();
        assert_eq!(path.server.read(&mut [0; 9]).await.unwrap(), 1);
        arm_reset(&path.server);
        drop(path.server);
        assert_eq!(path.client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        let near = path.near.await.unwrap();
        assert_eq!(near.close_cause, CloseCause::PeerReset);
        if let Some(far) = path.far {
            assert_eq!(near.reason, Some(Reason::CONNECT_ERROR));
            assert_eq!(far.await.unwrap().close_cause, CloseCause::ClientReset);
        }
    }
}

#[tokio::test]
async fn reset_after_half_close_is_still_a_reset() {
    for mut path in paths().await {
        path.client.shutdown().await.unwrap();
        assert_eq!(path.server.read(&mut [0]).await.unwrap(), 0);
        arm_reset(&path.client);
        drop(path.client);
        // The server only reads, and its read side has ended: the reset must reach its socket all the same.
        let error = path.server.ready(tokio::io::Interest::ERROR).await.unwrap();
        assert!(error.is_error());
        assert_eq!(path.near.await.unwrap().close_cause, CloseCause::ClientReset);
    }
}

/// TRAP19.
#[tokio::test]
async fn client_that_aborts_while_blocked_resets_the_server_at_once() {
    for path in paths().await {
        // The server reads nothing, so that every buffer fills and the client is blocked.
        let mut client = path.client;
        let chunk = vec![0; 1 << 20];
        while tokio::time::timeout(Duration::from_millis(300), client.write(&chunk)).await.is_ok() {}
        arm_reset(&client);
        drop(client);
        let error = path.server.ready(tokio::io::Interest::ERROR).await.unwrap();
        assert!(error.is_error());
        assert_eq!(path.near.await.unwrap().close_cause, CloseCause::ClientReset);
    }
}

#[tokio::test]
async fn server_that_aborts_while_the_client_does_not_read_resets_it() {
    for path in paths().await {
        let mut server = path.server;
        let chunk = vec![0; 1 << 20];
        while tokio::time::timeout(Duration::from_millis(300), server.write(&chunk)).await.is_ok() {}
        arm_reset(&server);
        drop(server);
        let error = path.client.ready(tokio::io::Interest::ERROR).await.unwrap();
        assert!(error.is_error());
        assert_eq!(path.near.await.unwrap().close_cause, CloseCause::PeerReset);
    }
}

#[tokio::test]
async fn large_transfers_both_ways_at_once() {
    for path in paths().await {
        let (up, down) = (noise(24 << 20, 5), noise(24 << 20, 6));
        let (up_digest, down_digest) = (digest(&up), digest(&down));
        let (client_read, client_write) = path.client.into_split();
        let (server_read, server_write) = path.server.into_split();
        let writers = [spawn(write_all(client_write, up)), spawn(write_all(server_write, down))];
        let (at_server, at_client) = tokio::join!(spawn(read_all(server_read)), spawn(read_all(client_read)));
        assert_eq!(digest(&at_server.unwrap().unwrap()), up_digest);
        assert_eq!(digest(&at_client.unwrap().unwrap()), down_digest);
        for writer in writers {
            writer.await.unwrap();
        }
        let outcome = path.near.await.unwrap();
        assert_eq!(
            (outcome.close_cause, outcome.sent, outcome.received),
            (CloseCause::Clean, 24 << 20, 24 << 20)
        );
    }
}

#[tokio::test]
async fn lost_connection_resets_both_sockets() {
    let mut path = through_tunnel().await;
    path.client.write_all(b"x").await.unwrap();
    assert_eq!(path.server.read(&mut [0; 9]).await.unwrap(), 1);
    path.driver.unwrap().abort();
    assert_eq!(path.client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_eq!(path.server.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let cause = path.near.await.unwrap().close_cause;
    assert!(matches!(cause, CloseCause::ConnectionLost(LostCause::Transport(_))), "{cause:?}");
}

#[tokio::test]
async fn killed_by_policy_with_its_reason() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let (mut client, near_tcp) = tcp_pair().await;
    let (kill, killed) = oneshot::channel();
    let copy = spawn(copy_bidirectional(near_tcp, near, NEVER, (), killed));
    client.write_all(b"x").await.unwrap();
    let (mut far_recv, _far_send) = far.split();
    assert_eq!(far_recv.recv().await, Ok(Some(bytes("x"))));
    kill.send("policy deny-all").unwrap();
    assert_eq!(copy.await.unwrap().close_cause, CloseCause::Killed(Ok("policy deny-all")));
    assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert!(far_recv.recv().await.is_err());
}

#[tokio::test]
async fn cancelled_copy_resets_both_sides() {
    for mut path in paths().await {
        path.client.write_all(b"x").await.unwrap();
        assert_eq!(path.server.read(&mut [0; 9]).await.unwrap(), 1);
        path.near.abort();
        assert_eq!(path.client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(path.server.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
}

impl CopyObserver for Counts {
    fn on_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    fn on_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[tokio::test]
async fn idle_connection_ends_and_a_busy_one_does_not() {
    let ((mut client, near), (far, mut server)) = (tcp_pair().await, tcp_pair().await);
    let counts = Arc::new(Counts::default());
    let idle = IdleLimits { open: Some(Duration::from_millis(300)), ..NEVER };
    let copy = spawn(copy_tcp(near, far, idle, counts.clone(), pending::<()>()));
    // Bytes for longer than the idle time.
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    for _ in 0..8 {
        tick.tick().await;
        client.write_all(b"ab").await.unwrap();
        server.read_exact(&mut [0; 2]).await.unwrap();
        server.write_all(b"c").await.unwrap();
        client.read_exact(&mut [0; 1]).await.unwrap();
    }
    assert!(!copy.is_finished());
    let outcome = copy.await.unwrap();
    assert_eq!((outcome.close_cause, outcome.sent, outcome.received), (CloseCause::IdleTimeout, 16, 8));
    assert_eq!(counts.sent.load(Ordering::Relaxed), 16);
    assert_eq!(counts.received.load(Ordering::Relaxed), 8);
    assert_eq!(client.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// An idle tunnel is a copy that waits: with no buffer held, this is most of what it costs here.
#[tokio::test]
async fn idle_copy_is_small() {
    let (near, _far, _handle, _peer) = one_tunnel().await;
    let copy = copy_bidirectional(tcp_pair().await.0, near, NEVER, (), pending::<()>());
    let size = size_of_val(&copy);
    assert!(size <= 1536, "{size} bytes");
}
