//! A tunnel as `AsyncRead + AsyncWrite`, for what wants plain IO: TLS inside a tunnel (Z26), a test, a small tool.
//!
//! [`crate::copy`] is faster for moving bytes: it copies nothing and sees resets at once.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::error::StreamError;
use crate::stream::{TunnelRecv, TunnelSend, TunnelStream};

/// One tunnel's bytes as plain IO. `shutdown` is END_STREAM; dropped without it, the stream is reset.
#[derive(Debug)]
pub struct TunnelIo {
    recv: TunnelRecv,
    send: TunnelSend,
    /// What was received and not yet read: one frame at most.
    held: Bytes,
    finished: bool,
}

impl TunnelIo {
    /// Wraps a tunnel.
    #[must_use]
    pub fn new(stream: TunnelStream) -> Self {
        let (recv, send) = stream.split();
        Self { recv, send, held: Bytes::new(), finished: false }
    }
}

impl AsyncRead for TunnelIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.held.is_empty() {
            match ready!(this.recv.poll_recv(cx))? {
                Some(bytes) => this.held = bytes,
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = this.held.len().min(buf.remaining());
        buf.put_slice(&this.held[..n]);
        this.held.advance(n);
        this.recv.release(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for TunnelIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = ready!(self.send.poll_capacity(cx, buf.len()))?;
        self.send.send_now(Bytes::copy_from_slice(&buf[..n]))?;
        Poll::Ready(Ok(n))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The connection's task writes what is queued. Who only waits to write hears here that nobody listens any more.
        match self.send.poll_reset(cx) {
            Poll::Ready(error) if !self.finished => Poll::Ready(Err(error.into())),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.finished {
            self.send.finish()?;
            self.finished = true;
        }
        Poll::Ready(Ok(()))
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Reset(_) => io::ErrorKind::ConnectionReset,
            StreamError::ConnectionLost { .. } => io::ErrorKind::ConnectionAborted,
            StreamError::Finished => io::ErrorKind::BrokenPipe,
        };
        Self::new(kind, error)
    }
}
