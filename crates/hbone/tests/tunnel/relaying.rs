//! From one tunnel to another.

use std::future::pending;

use culvert_hbone::Reason;
use culvert_hbone::copy::{CloseCause, CopyOutcome, IdleLimits, copy_tunnels};
use culvert_hbone::error::StreamError;
use culvert_hbone::io::TunnelIo;
use culvert_hbone::{ClientHandle, TunnelStream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinHandle;

use crate::common::*;

const NEVER: IdleLimits = IdleLimits { open: None, half_closed: None };

/// client -- [tunnel] -- copy -- [tunnel] -- server
struct Relay {
    client: TunnelStream,
    server: TunnelStream,
    copy: JoinHandle<CopyOutcome<()>>,
    _keep: [(ClientHandle, Peer); 2],
}

async fn relay(early: &'static str) -> Relay {
    let (client, near, first, first_peer) = one_tunnel().await;
    let (far, server, second, second_peer) = one_tunnel().await;
    let copy = spawn(copy_tunnels(near, bytes(early), far, NEVER, (), pending()));
    Relay { client, server, copy, _keep: [(first, first_peer), (second, second_peer)] }
}

#[tokio::test]
async fn what_was_received_before_goes_first_and_half_closes_are_kept() {
    let relay = relay("early ").await;
    let (mut client, mut server) = (TunnelIo::new(relay.client), TunnelIo::new(relay.server));
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut heard = String::new();
    server.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "early question");
    server.write_all(b"answer").await.unwrap();
    server.shutdown().await.unwrap();
    let mut heard = String::new();
    client.read_to_string(&mut heard).await.unwrap();
    assert_eq!(heard, "answer");
    let outcome = relay.copy.await.unwrap();
    assert_eq!((outcome.close_cause, outcome.sent, outcome.received), (CloseCause::Clean, 14, 6));
}

#[tokio::test]
async fn much_arrives_whole() {
    let relay = relay("").await;
    let (client, server) = (TunnelIo::new(relay.client), TunnelIo::new(relay.server));
    let sent = noise(5 << 20, 1);
    let expected = digest(&sent);
    let (mut read, write) = tokio::io::split(client);
    let writer = spawn(write_all(write, sent));
    let got = read_all(server).await;
    // The server's half is dropped without an end: a reset, which is what the client hears.
    assert_eq!(digest(&got.unwrap()), expected);
    writer.await.unwrap();
    assert!(read.read_u8().await.is_err());
}

#[tokio::test]
async fn a_reset_passes_either_way() {
    let relay = relay("").await;
    relay.client.reset(Reason::CANCEL);
    let (mut recv, _send) = relay.server.split();
    assert!(matches!(recv.recv().await, Err(StreamError::Reset(_))));
    assert_eq!(relay.copy.await.unwrap().close_cause, CloseCause::ClientReset);

    let relay = self::relay("").await;
    relay.server.reset(Reason::CONNECT_ERROR);
    let (mut recv, _send) = relay.client.split();
    assert!(matches!(recv.recv().await, Err(StreamError::Reset(_))));
    assert_eq!(relay.copy.await.unwrap().close_cause, CloseCause::PeerReset);
}
