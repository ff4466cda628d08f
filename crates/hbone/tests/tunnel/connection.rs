//! Requests, answers, shutdown and keepalive on one connection.

use std::io;
use std::time::Duration;

use culvert_hbone::server::BadRequest;
use culvert_hbone::{
    Client, ClientConfig, ConnectError, Keepalive, LostCause, Reason, ServerConfig, StreamError,
};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::time::{Instant, timeout};

use crate::common::*;

#[tokio::test]
async fn request_and_answer_carry_their_headers() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let mut ours = request();
    ours.headers.insert("baggage", HeaderValue::from_static("service.name=a"));
    let (answer, _held) = tokio::join!(handle.connect(ours), async {
        let incoming = peer.incoming.recv().await.unwrap();
        assert_eq!(incoming.validate_connect(), Ok(("10.0.0.1", 80)));
        assert_eq!(incoming.headers["baggage"], "service.name=a");
        let headers = HeaderMap::from_iter([(http::header::SERVER, HeaderValue::from_static("b"))]);
        incoming.accept(headers).unwrap()
    });
    assert_eq!(answer.unwrap().1[http::header::SERVER], "b");
}

#[tokio::test]
async fn refusal_surfaces_with_its_status_and_headers() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let (answer, ()) = tokio::join!(handle.connect(request()), async {
        let headers = HeaderMap::from_iter([(http::header::VIA, HeaderValue::from_static("rbac"))]);
        peer.incoming.recv().await.unwrap().refuse(StatusCode::UNAUTHORIZED, headers).unwrap();
    });
    match answer {
        Err(ConnectError::Refused { status: StatusCode::UNAUTHORIZED, headers }) => {
            assert_eq!(headers[http::header::VIA], "rbac");
        }
        other => panic!("{other:?}"),
    }
    eventually("the place is free again", || handle.streams() == 0).await;
}

#[tokio::test]
async fn unanswered_request_is_reset_not_left_hanging() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let (answer, ()) = tokio::join!(handle.connect(request()), async {
        drop(peer.incoming.recv().await.unwrap());
    });
    assert!(matches!(answer, Err(ConnectError::Reset(Reason::INTERNAL_ERROR))), "{answer:?}");
}

#[tokio::test]
async fn client_that_gives_up_is_seen_before_the_answer() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let waiting = spawn(async move { handle.connect(request()).await.map(drop) });
    let mut incoming = peer.incoming.recv().await.unwrap();
    waiting.abort();
    assert_eq!(incoming.abandoned().await, StreamError::Reset(Reason::CANCEL));
    assert_eq!(incoming.accept(HeaderMap::new()).map(drop), Err(StreamError::Reset(Reason::CANCEL)));
}

#[tokio::test]
async fn other_methods_reach_the_caller_to_be_refused() {
    let (near, far) = duplex(4096);
    let mut peer = serve(far, ServerConfig::default());
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    spawn(connection);
    let mut get = Request::new(());
    *get.uri_mut() = "http://h:1/".parse().unwrap();
    *get.version_mut() = Version::HTTP_2;
    let (response, _) = send.send_request(get, true).unwrap();
    let incoming = peer.incoming.recv().await.unwrap();
    assert_eq!(incoming.validate_connect(), Err(BadRequest::Method(Method::GET)));
    incoming.refuse(StatusCode::BAD_REQUEST, HeaderMap::new()).unwrap();
    assert_eq!(response.await.unwrap().status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn bad_authority_is_an_error_not_a_request() {
    let (handle, _peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    for bad in ["", "a b:1", "http://x/"] {
        let mut ours = request();
        ours.authority = bad.into();
        assert!(matches!(handle.connect(ours).await, Err(ConnectError::BadAuthority(_))), "{bad}");
    }
}

#[tokio::test(start_paused = true)]
async fn silence_after_connect_times_out() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let begun = Instant::now();
    let answer = handle.connect(request()).await;
    assert!(matches!(answer, Err(ConnectError::Timeout(_))), "{answer:?}");
    assert_eq!(begun.elapsed(), ClientConfig::default().connect_timeout);
    let mut incoming = peer.incoming.recv().await.unwrap();
    assert_eq!(incoming.abandoned().await, StreamError::Reset(Reason::CANCEL));
}

/// Z23.
#[tokio::test]
async fn our_limit_and_the_peers_bound_the_streams() {
    for (ours, theirs) in [(2, 200), (100, 2)] {
        let client = ClientConfig { max_streams: ours, ..ClientConfig::default() };
        let server = ServerConfig { max_concurrent_streams: theirs, ..ServerConfig::default() };
        let (handle, mut peer, _) = connect(client, server).await;
        let first = tunnel(&handle, &mut peer).await;
        let _second = tunnel(&handle, &mut peer).await;
        assert!(matches!(handle.connect(request()).await, Err(ConnectError::Busy(2))));
        drop(first);
        tunnel(&handle, &mut peer).await;
    }
}

/// Z08.
#[tokio::test]
async fn graceful_shutdown_finishes_streams_and_takes_no_more() {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let (near, far) = tunnel(&handle, &mut peer).await;
    peer.goaway.take().unwrap().send(()).unwrap();
    eventually("the client knows", || handle.unusable().is_some()).await;
    let refused = handle.connect(request()).await.map(drop).unwrap_err();
    assert!(refused.is_unprocessed(), "{refused:?}");

    let (mut near_recv, mut near_send) = near.split();
    let (mut far_recv, mut far_send) = far.split();
    near_send.send(bytes("late")).await.unwrap();
    near_send.finish().unwrap();
    far_send.finish().unwrap();
    assert_eq!(far_recv.recv().await, Ok(Some(bytes("late"))));
    assert_eq!(far_recv.recv().await, Ok(None));
    assert_eq!(near_recv.recv().await, Ok(None));
    drop((near_recv, near_send, far_recv, far_send));
    assert_eq!(peer.ended.await.unwrap(), Ok(()));
}

#[tokio::test]
async fn abrupt_end_of_the_transport_is_a_loss_on_both_sides() {
    let (handle, mut peer, driver) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let (near, far) = tunnel(&handle, &mut peer).await;
    driver.abort(); // drops the client's transport
    let (mut near, _keep) = near.split();
    let (mut far, _keep_far) = far.split();
    assert!(matches!(near.recv().await, Err(StreamError::ConnectionLost { .. })));
    assert!(matches!(far.recv().await, Err(StreamError::ConnectionLost { .. })));
}

#[tokio::test]
async fn end_of_an_idle_connection_is_not_an_error() {
    let (handle, peer, driver) = connect(ClientConfig::default(), ServerConfig::default()).await;
    driver.abort();
    assert_eq!(peer.ended.await.unwrap(), Ok(()));
    assert!(handle.unusable().is_some());
    assert!(handle.connect(request()).await.unwrap_err().is_unprocessed());
}

/// Z24. A peer that reads and never answers.
#[tokio::test(start_paused = true)]
async fn client_finds_a_dead_peer() {
    let (near, mut far) = duplex(64 << 10);
    let config = ClientConfig { connect_timeout: Duration::from_secs(3600), ..ClientConfig::default() };
    let (handle, driver) = Client::handshake(near, &config).await.unwrap();
    let driver = spawn(driver);
    let waiting = spawn(async move { handle.connect(request()).await.map(drop) });
    let reader = spawn(async move {
        let mut sink = vec![0; 4096];
        while far.read(&mut sink).await.unwrap() > 0 {}
    });
    let begun = Instant::now();
    let cause = LostCause::Keepalive(Duration::from_secs(20));
    assert_eq!(driver.await.unwrap(), Err(cause));
    assert_eq!(begun.elapsed(), Duration::from_secs(30));
    assert!(waiting.await.unwrap().is_err());
    reader.await.unwrap();
}

/// Z24.
#[tokio::test(start_paused = true)]
async fn server_finds_a_dead_peer_and_its_streams_learn_why() {
    let (mut near, far) = duplex(64 << 10);
    let mut peer = serve(far, ServerConfig::default());
    // Preface, empty SETTINGS, and a CONNECT to "h:1" in literals, then silence.
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let block = b"\x02\x07CONNECT\x01\x03h:1";
    let mut frame = vec![0, 0, u8::try_from(block.len()).unwrap(), 1, 4, 0, 0, 0, 1];
    frame.extend_from_slice(block);
    near.write_all(&frame).await.unwrap();
    let incoming = timeout(Duration::from_secs(1), peer.incoming.recv()).await.unwrap().unwrap();
    assert_eq!(incoming.validate_connect(), Ok(("h", 1)));
    let (mut recv, _send) = incoming.accept(HeaderMap::new()).unwrap().split();
    let cause = LostCause::Keepalive(Duration::from_secs(20));
    assert_eq!(recv.recv().await, Err(StreamError::ConnectionLost { cause }));
    assert_eq!(peer.ended.await.unwrap(), Err(cause));
}

/// Z24.
#[tokio::test(start_paused = true)]
async fn living_peers_are_kept() {
    let quick = Some(Keepalive { interval: Duration::from_secs(1), timeout: Duration::from_secs(2) });
    let client = ClientConfig { keepalive: quick, ..ClientConfig::default() };
    let server = ServerConfig { keepalive: quick, ..ServerConfig::default() };
    let (handle, mut peer, _) = connect(client, server).await;
    let (near, far) = tunnel(&handle, &mut peer).await;
    tokio::time::advance(Duration::from_secs(1)).await;
    for _ in 0..100 {
        let _ = timeout(Duration::from_millis(500), peer.incoming.recv()).await;
    }
    let (_recv, mut send) = near.split();
    send.send(bytes("alive")).await.unwrap();
    assert_eq!(far.split().0.recv().await, Ok(Some(bytes("alive"))));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_says_nothing_fails_the_handshake() {
    let (_near, far) = duplex(64);
    let config = ServerConfig::default();
    let failed = culvert_hbone::Server::handshake(far, &config).await.map(drop).unwrap_err();
    assert_eq!(failed, culvert_hbone::HandshakeError::Timeout(config.handshake_timeout));
    let (near, far) = duplex(64);
    drop(near);
    let failed = culvert_hbone::Server::handshake(far, &config).await.map(drop).unwrap_err();
    assert!(
        matches!(
            failed,
            culvert_hbone::HandshakeError::Lost(LostCause::Transport(
                io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe
            ))
        ),
        "{failed:?}"
    );
}

fn h2_connect(
    send: &mut h2::client::SendRequest<bytes::Bytes>,
) -> (h2::client::ResponseFuture, h2::SendStream<bytes::Bytes>) {
    let mut connect = Request::new(());
    *connect.method_mut() = Method::CONNECT;
    *connect.uri_mut() = http::Uri::from_static("h:1");
    send.send_request(connect, false).expect("open")
}

/// Reset streams no longer count against the protocol's limit, but the work they began here does.
#[tokio::test]
async fn work_begun_for_reset_streams_is_bounded() {
    let (near, far) = duplex(64 << 10);
    let mut peer = serve(far, ServerConfig { max_concurrent_streams: 5, ..ServerConfig::default() });
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    spawn(connection);
    for taken in 1..=10 {
        let (response, mut stream) = h2_connect(&mut send);
        eventually("the request is delivered", || peer.incoming.len() == taken).await;
        stream.send_reset(Reason::CANCEL);
        drop(response);
    }
    let (response, _stream) = h2_connect(&mut send);
    assert_eq!(response.await.unwrap_err().reason(), Some(Reason::ENHANCE_YOUR_CALM));
    assert_eq!(peer.incoming.len(), 10);
    // Work that ends makes room.
    drop(peer.incoming.recv().await.unwrap());
    let (_response, _stream) = h2_connect(&mut send);
    eventually("the request is delivered", || peer.incoming.len() == 10).await;
}

/// A peer that resets its requests faster than they can be accepted (rapid reset).
#[tokio::test]
async fn a_flood_of_resets_ends_the_connection() {
    let (near, far) = duplex(1 << 20);
    let peer = serve(far, ServerConfig { max_pending_accept_resets: 3, ..ServerConfig::default() });
    let (mut near_read, mut near_write) = tokio::io::split(near);
    let mut flood = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    for stream in (1..200_u32).step_by(2) {
        flood.extend_from_slice(b"\0\0\x0e\x01\x04");
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(b"\x02\x07CONNECT\x01\x03h:1");
        flood.extend_from_slice(b"\0\0\x04\x03\0");
        flood.extend_from_slice(&stream.to_be_bytes());
        flood.extend_from_slice(&8_u32.to_be_bytes());
    }
    near_write.write_all(&flood).await.unwrap();
    let mut answer = Vec::new();
    near_read.read_to_end(&mut answer).await.unwrap();
    let calm = answer.windows(15).any(|window| window == b"too_many_resets");
    assert!(calm, "the GOAWAY says why: {answer:?}");
    assert_eq!(peer.ended.await.unwrap(), Err(LostCause::Local(Reason::ENHANCE_YOUR_CALM)));
}

#[tokio::test]
async fn abrupt_shutdown_ends_streams_on_both_sides() {
    let (near, far) = duplex(64 << 10);
    let (handle, driver) = Client::handshake(near, &ClientConfig::default()).await.unwrap();
    spawn(driver);
    let client = spawn(async move {
        let (stream, _) = handle.connect(request()).await.unwrap();
        let (mut recv, _send) = stream.split();
        recv.recv().await
    });
    let mut server = culvert_hbone::Server::handshake(far, &ServerConfig::default()).await.unwrap();
    let incoming = server.accept().await.unwrap().unwrap();
    let (mut recv, _send) = incoming.accept(HeaderMap::new()).unwrap().split();
    // Let the 200 out before the end.
    assert!(timeout(Duration::from_millis(50), server.accept()).await.is_err());
    server.abrupt_shutdown(Reason::NO_ERROR);
    assert!(server.accept().await.is_none());
    let cause = LostCause::Local(Reason::NO_ERROR);
    assert_eq!(recv.recv().await, Err(StreamError::ConnectionLost { cause }));
    let at_client = client.await.unwrap();
    assert!(matches!(at_client, Err(StreamError::ConnectionLost { .. })), "{at_client:?}");
}

/// Z23: 64 KB of request headers are taken and more are refused; 16 KB of response headers likewise. The connection lives on.
#[tokio::test]
async fn header_lists_are_bounded() {
    // As RFC 9113 counts it: name, value and 32 for each field.
    let header = |size: usize| {
        let mut headers = HeaderMap::new();
        let fields = size / 4096;
        for n in 0..fields {
            let name = http::HeaderName::try_from(format!("x-{n}")).unwrap();
            headers.insert(name, HeaderValue::from_str(&"v".repeat(4000)).unwrap());
        }
        headers
    };
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let ask = |size| culvert_hbone::TunnelRequest { headers: header(size), ..request() };
    let (answer, ()) = tokio::join!(handle.connect(ask(60 << 10)), async {
        let incoming = peer.incoming.recv().await.unwrap();
        assert_eq!(incoming.headers.len(), 15);
        let _ = incoming.refuse(StatusCode::BAD_REQUEST, HeaderMap::new());
    });
    assert!(
        matches!(answer, Err(ConnectError::Refused { status: StatusCode::BAD_REQUEST, .. })),
        "{answer:?}"
    );
    let refused = handle.connect(ask(72 << 10)).await.map(drop).unwrap_err();
    match &refused {
        ConnectError::Refused { status, .. } => {
            assert_eq!(*status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        }
        ConnectError::Reset(_) => {}
        other => panic!("{other:?}"),
    }
    for (size, taken) in [(12 << 10, true), (24 << 10, false)] {
        let (answer, _held) = tokio::join!(handle.connect(request()), async {
            peer.incoming.recv().await.unwrap().accept(header(size))
        });
        assert_eq!(answer.is_ok(), taken, "{size}: {answer:?}");
    }
    let _alive = tunnel(&handle, &mut peer).await;
}

/// R28: a connection that ends while a PING waits for its answer has ended, and is not reported as broken.
#[tokio::test(start_paused = true)]
async fn a_ping_does_not_race_with_the_close() {
    for waited in [Duration::from_millis(9_999), Duration::from_secs(10), Duration::from_secs(29)] {
        let (near, far) = duplex(64 << 10);
        let (_handle, driver) = Client::handshake(near, &ClientConfig::default()).await.unwrap();
        let driver = spawn(driver);
        tokio::time::sleep(waited).await;
        drop(far);
        assert_eq!(driver.await.unwrap(), Ok(()), "after {waited:?}");
    }
    // The same for the other side, with the answer on its way.
    let (near, far) = duplex(64 << 10);
    let peer = serve(far, ServerConfig::default());
    let (_handle, driver) = Client::handshake(near, &ClientConfig::default()).await.unwrap();
    let driver = spawn(driver);
    tokio::time::sleep(Duration::from_secs(10)).await;
    driver.abort();
    assert_eq!(peer.ended.await.unwrap(), Ok(()));
}
