//! Peers and sockets for the tests.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use culvert_hbone::pool::Spawner;
use culvert_hbone::{
    Client, ClientConfig, ClientHandle, Incoming, LostCause, Server, ServerConfig, TunnelRequest,
    TunnelStream,
};
use http::HeaderMap;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinHandle};

pub const AUTHORITY: &str = "10.0.0.1:80";

/// Tests own no task set: everything a test spawns ends with its runtime.
#[expect(clippy::disallowed_methods, reason = "the test's runtime owns the task")]
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(task)
}

pub fn spawner() -> Spawner {
    Arc::new(|task: Pin<Box<dyn Future<Output = ()> + Send>>| drop(spawn(task)))
}

/// A served connection.
pub struct Peer {
    /// Requests as they come.
    pub incoming: mpsc::Receiver<Incoming>,
    /// Asks for a graceful shutdown.
    pub goaway: Option<oneshot::Sender<()>>,
    /// How it ended.
    pub ended: JoinHandle<Result<(), LostCause>>,
}

/// Serves `io`, handing every request to the test.
pub fn serve(io: DuplexStream, config: ServerConfig) -> Peer {
    let (requests, incoming) = mpsc::channel(1024);
    let (goaway, mut asked) = oneshot::channel();
    let ended = spawn(async move {
        let mut connection = Server::handshake(io, &config).await.expect("handshake");
        let mut waiting = true;
        loop {
            tokio::select! {
                request = connection.accept() => match request {
                    Some(Ok(request)) => drop(requests.send(request).await),
                    Some(Err(cause)) => return Err(cause),
                    None => return Ok(()),
                },
                asked = &mut asked, if waiting => {
                    waiting = false;
                    if asked.is_ok() {
                        connection.graceful_shutdown();
                    }
                }
            }
        }
    });
    Peer { incoming, goaway: Some(goaway), ended }
}

/// Client and server on one in-memory connection.
pub async fn connect(client: ClientConfig, server: ServerConfig) -> (ClientHandle, Peer, AbortHandle) {
    let (near, far) = duplex(64 << 10);
    let peer = serve(far, server);
    let (handle, driver) = Client::handshake(near, &client).await.expect("handshake");
    let driver = spawn(driver);
    (handle, peer, driver.abort_handle())
}

pub fn request() -> TunnelRequest {
    TunnelRequest { authority: AUTHORITY.into(), headers: HeaderMap::new() }
}

/// Both ends of one new tunnel.
pub async fn tunnel(handle: &ClientHandle, peer: &mut Peer) -> (TunnelStream, TunnelStream) {
    let (near, far) = tokio::join!(handle.connect(request()), async {
        let incoming = peer.incoming.recv().await.expect("a request");
        incoming.accept(HeaderMap::new()).expect("the client waits")
    });
    (near.expect("accepted").0, far)
}

/// A connection with one tunnel on it.
pub async fn one_tunnel() -> (TunnelStream, TunnelStream, ClientHandle, Peer) {
    let (handle, mut peer, _) = connect(ClientConfig::default(), ServerConfig::default()).await;
    let (near, far) = tunnel(&handle, &mut peer).await;
    (near, far, handle, peer)
}

/// A connected pair of loopback sockets.
pub async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
    (near.expect("connect"), far.expect("accept").0)
}

/// Bytes that no compression or repetition can stand in for.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

pub fn digest(bytes: &[u8]) -> Vec<u8> {
    Sha256::digest(bytes).to_vec()
}

pub async fn write_all(mut socket: impl AsyncWriteExt + Unpin, bytes: Vec<u8>) {
    socket.write_all(&bytes).await.expect("write");
    socket.shutdown().await.expect("shutdown");
}

pub async fn read_all(mut socket: impl AsyncReadExt + Unpin) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).await.map(|_| bytes)
}

/// Waits for a condition that other tasks bring about.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if holds() {
            return;
        }
        tokio::task::yield_now().await;
    }
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    while tokio::time::Instant::now() < deadline {
        if holds() {
            return;
        }
        tick.tick().await;
    }
    panic!("never happened: {what}");
}

pub fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}
