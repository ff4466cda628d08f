//! Cuts a connection whose client begins a request's head and does not end it, and one that is idle for very long.
//!
//! HTTP/1 only: an HTTP/2 connection is kept alive by PINGs, and a head that is split over frames is bounded by its library.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// From the first byte of a head to its last.
const HEAD: Duration = Duration::from_secs(10);
/// Between requests.
const IDLE: Duration = Duration::from_secs(60 * 60);
/// How HTTP/2 begins: no HTTP/1 method does.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Tells the IO what is going on.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Requests that are being served.
    serving: AtomicU32,
    /// One has been served since the client was last heard: it has begun nothing since.
    served: AtomicBool,
}

/// A request is being served, until this is dropped.
#[derive(Debug)]
pub struct Serving(Watch);

/// IO that is watched.
pub struct Watched<IO> {
    inner: IO,
    watch: Watch,
    timer: Option<Pin<Box<Sleep>>>,
    /// The client has begun a head.
    begun: bool,
    /// Bytes of the preface seen so far; `None` once it is known what is spoken.
    preface: Option<usize>,
    http2: bool,
}

/// Begins to watch.
pub fn watched<IO>(inner: IO) -> (Watched<IO>, Watch) {
    let watch = Watch::default();
    let io =
        Watched { inner, watch: watch.clone(), timer: None, begun: false, preface: Some(0), http2: false };
    (io, watch)
}

impl Watch {
    /// A request is being served from now on.
    pub fn serving(&self) -> Serving {
        self.0.serving.fetch_add(1, Ordering::Relaxed);
        Serving(self.clone())
    }

    fn is_serving(&self) -> bool {
        self.0.serving.load(Ordering::Relaxed) > 0
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.0.served.store(true, Ordering::Relaxed);
        self.0.0.serving.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<IO> Watched<IO> {
    /// Pending as long as the client has time.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let served = self.watch.0.served.swap(false, Ordering::Relaxed);
        let busy = self.http2 || self.watch.is_serving();
        if served || busy {
            self.timer = None;
            self.begun = false;
        }
        if busy {
            return Poll::Pending;
        }
        let patience = if self.begun { HEAD } else { IDLE };
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + patience)));
        timer.as_mut().poll(cx)
    }

    fn heard(&mut self, bytes: &[u8]) {
        if let Some(seen) = self.preface {
            let wanted = &HTTP2[seen..];
            let same = wanted.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            if same == wanted.len() {
                (self.http2, self.preface) = (true, None);
            } else {
                self.preface = (same == bytes.len()).then_some(seen + same);
            }
        }
        let served = self.watch.0.served.swap(false, Ordering::Relaxed);
        if (served || !self.begun) && !self.watch.is_serving() {
            self.begun = true;
            self.timer = None;
        }
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Watched<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        match Pin::new(&mut this.inner).poll_read(cx, buf) {
            Poll::Pending => match this.poll_patience(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            },
            ready => {
                if buf.filled().len() > before {
                    let bytes = &buf.filled()[before..];
                    this.heard(bytes);
                }
                ready
            }
        }
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Watched<IO> {
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

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    async fn fate(said: &[u8], serving: bool) -> (io::Result<u8>, Duration) {
        let (mut client, server) = duplex(1024);
        let (mut io, watch) = watched(server);
        let _serving = serving.then(|| watch.serving());
        client.write_all(said).await.unwrap();
        let mut heard = vec![0; said.len()];
        io.read_exact(&mut heard).await.unwrap();
        let begun = Instant::now();
        let next = tokio::time::timeout(2 * IDLE, io.read_u8()).await.unwrap_or(Ok(0));
        (next, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_has_its_time_and_an_idle_connection_more() {
        let (next, waited) = fate(b"GET / HT", false).await;
        assert_eq!((next.unwrap_err().kind(), waited), (io::ErrorKind::TimedOut, HEAD));
        let (next, waited) = fate(b"", false).await;
        assert_eq!((next.unwrap_err().kind(), waited), (io::ErrorKind::TimedOut, IDLE));
        assert!(fate(b"GET / HT", true).await.0.is_ok(), "a slow body is not the head's business");
        assert!(fate(HTTP2, false).await.0.is_ok());
        assert!(fate(b"PRI /x HTTP/1.1\r\nX-", false).await.0.is_err(), "a method that only begins like it");
        assert!(fate(b"PUT", false).await.0.is_err());
    }

    /// The library reads nothing while it serves a request without a body: the next head's time begins with its first byte.
    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_used_is_not_idle() {
        let (mut client, server) = duplex(1024);
        let (mut io, watch) = watched(server);
        let mut heard = [0; 4];
        for _ in 0..100 {
            client.write_all(b"GET ").await.unwrap();
            io.read_exact(&mut heard).await.unwrap();
            drop(watch.serving());
            let next = tokio::time::timeout(HEAD / 2, io.read_u8()).await;
            assert!(next.is_err(), "{next:?}");
        }
        client.write_all(b"GET ").await.unwrap();
        io.read_exact(&mut heard).await.unwrap();
        let begun = Instant::now();
        assert_eq!(io.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed(), HEAD);
    }
}
