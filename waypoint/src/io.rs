//! IO that begins with bytes that were read before, and sockets as a tunnel wants them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Records that rustls may hold unwritten: those of one DATA frame, so that each leaves in one write.
pub const TLS_WRITE_BUFFER: usize = 66 * 1024;

/// A socket below TLS.
pub type Tuned = TcpStream;

/// A connected socket that is to carry a tunnel: the kernel is told to queue little.
pub fn tuned(stream: TcpStream) -> Tuned {
    // A kernel that will not only queues more.
    let _ = culvert_net::socket::tune_tunnel(&stream);
    stream
}

/// IO of which the first bytes have been read already.
#[derive(Debug)]
pub struct Begun<IO> {
    early: Bytes,
    inner: IO,
}

impl<IO> Begun<IO> {
    /// `early` comes before what `inner` has.
    pub fn new(early: Bytes, inner: IO) -> Self {
        Self { early, inner }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Begun<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.early.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let n = self.early.len().min(buf.remaining());
        buf.put_slice(&self.early[..n]);
        self.early.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Begun<IO> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
