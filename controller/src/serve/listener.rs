//! TLS connections for the gRPC server.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::tasks::Tasks;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

/// Connections at the same time: two (xDS and certificates) for each of 5,000 nodes.
const MAX_CONNECTIONS: usize = 10_000;
/// A handshake is two round trips.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes that are done and not taken yet: the server takes them at once.
const READY: usize = 16;
/// After a failure to accept, such as no more file descriptors.
const PAUSE: Duration = Duration::from_millis(50);

/// One accepted connection. It holds its place among [`MAX_CONNECTIONS`] until it ends.
pub struct Connection {
    stream: TlsStream<TcpStream>,
    _place: OwnedSemaphorePermit,
}

/// Accepts until `drain` starts; then the socket is closed, so that clients go elsewhere.
pub fn accept(
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    tasks: &Tasks,
    drain: DrainWatcher,
) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(READY);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (acceptor, owner) = (TlsAcceptor::from(tls), tasks.clone());
    tasks.spawn("accept", async move {
        loop {
            let next = async {
                let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
                listener.accept().await.map(|(stream, peer)| (stream, peer, place))
            };
            let accepted = tokio::select! {
                _ = drain.started() => break,
                accepted = next => accepted,
            };
            match accepted {
                Ok((stream, peer, place)) => {
                    let (acceptor, ready) = (acceptor.clone(), ready.clone());
                    owner.spawn("handshake", async move {
                        let _ = stream.set_nodelay(true);
                        match timeout(HANDSHAKE, acceptor.accept(stream)).await {
                            // It fails if the server has ended.
                            Ok(Ok(stream)) => {
                                drop(ready.send(Ok(Connection { stream, _place: place })).await)
                            }
                            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
                            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "accept failed");
                    sleep(PAUSE).await;
                }
            }
        }
    });
    ReceiverStream::new(connections)
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
