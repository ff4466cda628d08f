//! What is bounded: half-closed copies, header lists, and PING when the connection is closing.

use std::future::pending;
use std::io::ErrorKind;
use std::time::Duration;

use culvert_hbone::copy::{CloseCause, CopyOutcome, IdleLimits, copy_bidirectional, copy_tcp};
use culvert_hbone::{Client, ClientConfig, ConnectError, Keepalive, ServerConfig};
use http::header::HeaderValue;
use http::{HeaderMap, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::time::Instant;

use crate::common::*;

const HOUR: Duration = Duration::from_secs(3600);
const MINUTE: Duration = Duration::from_secs(60);
const LIMITS: IdleLimits = IdleLimits { open: None, half_closed: Some(HOUR) };

type Outcome = CopyOutcome<()>;

/// One side has ended and nothing comes from the other: after the limit both are reset, not before. While both are open the
/// limit does not count.
#[tokio::test(start_paused = true)]
async fn a_half_closed_copy_that_stands_still_ends() {
    for client_first in [true, false] {
        let ((mut client, near), (far, mut server)) = (tcp_pair().await, tcp_pair().await);
        let copy = spawn(async move { copy_tcp(near, far, LIMITS, (), pending::<()>()).await });
        client.write_all(b"x").await.unwrap();
        server.read_exact(&mut [0]).await.unwrap();
        tokio::time::sleep(5 * HOUR).await;
        assert!(!copy.is_finished(), "both sides are open");
        let (ending, open) =
            if client_first { (&mut client, &mut server) } else { (&mut server, &mut client) };
        ending.shutdown().await.unwrap();
        assert_eq!(open.read(&mut [0]).await.unwrap(), 0, "half a close is half a close");
        let begun = Instant::now();
        tokio::time::sleep(HOUR - MINUTE).await;
        assert!(!copy.is_finished());
        let outcome: Outcome = copy.await.unwrap();
        assert_eq!(outcome.close_cause, CloseCause::HalfClosedTimeout);
        assert!(begun.elapsed() <= HOUR + MINUTE, "{:?}", begun.elapsed());
        // The side that is open reads its end again after a reset, but can write no more.
        assert_eq!(open.write_all(b"y").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
    }
}

/// However slow the answer, a half-closed copy in which something moves goes on to its clean end.
#[tokio::test(start_paused = true)]
async fn a_half_closed_copy_that_moves_goes_on() {
    let (near, far, _handle, _peer) = one_tunnel().await;
    let ((mut client, near_tcp), (far_tcp, mut server)) = (tcp_pair().await, tcp_pair().await);
    let near = spawn(async move { copy_bidirectional(near_tcp, near, LIMITS, (), pending::<()>()).await });
    let far = spawn(async move { copy_bidirectional(far_tcp, far, LIMITS, (), pending::<()>()).await });
    client.shutdown().await.unwrap();
    assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
    for _ in 0..5 {
        tokio::time::sleep(HOUR - MINUTE).await;
        server.write_all(b"y").await.unwrap();
        client.read_exact(&mut [0]).await.unwrap();
    }
    server.shutdown().await.unwrap();
    for copy in [near, far] {
        let outcome: Outcome = copy.await.unwrap();
        assert_eq!((outcome.close_cause, outcome.sent + outcome.received), (CloseCause::Clean, 5));
    }
}

/// An idle limit for what is open holds for what is half open too, if it is the shorter one.
#[tokio::test(start_paused = true)]
async fn the_shorter_limit_counts() {
    let ((mut client, near), (far, _server)) = (tcp_pair().await, tcp_pair().await);
    let limits = IdleLimits { open: Some(MINUTE), half_closed: Some(HOUR) };
    let copy = spawn(async move { copy_tcp(near, far, limits, (), pending::<()>()).await });
    client.shutdown().await.unwrap();
    let begun = Instant::now();
    let outcome: Outcome = copy.await.unwrap();
    assert_eq!(outcome.close_cause, CloseCause::HalfClosedTimeout);
    assert!(begun.elapsed() <= 2 * MINUTE, "{:?}", begun.elapsed());
}

fn large(bytes: usize) -> HeaderMap {
    HeaderMap::from_iter([(http::header::VIA, HeaderValue::from_bytes(&vec![b'a'; bytes]).expect("letters"))])
}

/// Z23: a request with more than 64 KB of headers is answered 431 and reaches nobody; the connection goes on.
#[tokio::test]
async fn large_requests_are_refused() {
    let server = ServerConfig::default();
    let limit = server.max_header_list as usize;
    let (handle, mut peer, _) = connect(ClientConfig::default(), server).await;
    let mut ours = request();
    ours.headers = large(limit);
    match handle.connect(ours).await.map(drop) {
        Err(ConnectError::Refused { status, .. }) => {
            assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        }
        other => panic!("{other:?}"),
    }
    assert!(peer.incoming.is_empty());
    let mut ours = request();
    ours.headers = large(limit / 2);
    let (answer, ()) = tokio::join!(handle.connect(ours), async {
        peer.incoming.recv().await.unwrap().refuse(StatusCode::IM_A_TEAPOT, HeaderMap::new()).unwrap();
    });
    assert!(
        matches!(answer, Err(ConnectError::Refused { status: StatusCode::IM_A_TEAPOT, .. })),
        "{answer:?}"
    );
}

/// Z23: an answer with more than 16 KB of headers ends its stream and no other.
#[tokio::test]
async fn large_answers_are_refused() {
    let client = ClientConfig::default();
    let limit = client.max_header_list as usize;
    let (handle, mut peer, _) = connect(client, ServerConfig::default()).await;
    let (answer, ()) = tokio::join!(handle.connect(request()), async {
        let _ = peer.incoming.recv().await.unwrap().refuse(StatusCode::IM_A_TEAPOT, large(limit));
    });
    assert!(matches!(answer, Err(ConnectError::Reset(_))), "{answer:?}");
    tunnel(&handle, &mut peer).await;
}

/// R28: the connection ends while an answer to a PING is awaited, or just when one is to be sent: that is the end of a
/// connection, and no error.
#[tokio::test(start_paused = true)]
async fn a_ping_raced_with_the_end_is_no_error() {
    let keepalive = Keepalive { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) };
    // Before the PING, at its very time, while its answer is awaited.
    for end in [9_999, 10_000, 10_001, 15_000] {
        let (near, far) = duplex(64 << 10);
        let config = ClientConfig { keepalive: Some(keepalive), ..ClientConfig::default() };
        let (handle, driver) = Client::handshake(near, &config).await.unwrap();
        let silent = spawn(async move {
            let mut far = far;
            let mut sink = vec![0; 4096];
            let ends = tokio::time::sleep(Duration::from_millis(end));
            tokio::pin!(ends);
            loop {
                tokio::select! {
                    () = &mut ends => return,
                    read = far.read(&mut sink) => drop(read.unwrap()),
                }
            }
        });
        assert_eq!(driver.await, Ok(()), "the peer closed after {end} ms");
        silent.await.unwrap();
        assert!(handle.unusable().is_some());
    }
    // The accepting side, whose peer goes at the time of its PING.
    for end in [9_999, 10_000, 10_001] {
        let (near, far) = duplex(64 << 10);
        let server = ServerConfig { keepalive: Some(keepalive), ..ServerConfig::default() };
        let peer = serve(far, server);
        let (_handle, driver) =
            Client::handshake(near, &ClientConfig { keepalive: None, ..Default::default() }).await.unwrap();
        let driver = spawn(driver);
        tokio::time::sleep(Duration::from_millis(end)).await;
        driver.abort();
        assert_eq!(peer.ended.await.unwrap(), Ok(()), "the peer closed after {end} ms");
    }
}
