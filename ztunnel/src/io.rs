//! What sits between sockets and the tunnel: larger reads below TLS, byte counts, and the ways a connection is ended from
//! outside.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::BufMut;
use culvert_hbone::copy::CopyObserver;
use culvert_model::outcome::Reason;
use culvert_runtime::drain::DrainWatcher;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::io::poll_read_buf;

use crate::observe::flow::Failure;
use crate::observe::{Flow, Live, Phase};

/// Records that rustls may hold unwritten: those of one DATA frame, so that each leaves in one write. Held only while the peer is
/// slow to read; at most this a connection, and a small message waits for it.
pub const TLS_WRITE_BUFFER: usize = 66 * 1024;
/// Bytes that a connection may read, and as many that it may write, before the other tasks of its thread have their turn: about
/// 0.1 ms of encryption and delivery.
const TURN: usize = 64 * 1024;
/// What one `recv` may bring: four TLS records instead of one. Held only while it is not empty.
const READ_AHEAD: usize = 64 * 1024;
/// Below this the reader asks for so little (a record's header) that its own buffer is no place to read into.
const SMALL_READ: usize = 64 * 1024;

/// A TCP stream that reads ahead: TLS asks for one record at a time, and a `recv` for each would cost more than copying
/// from a buffer. The buffer exists only between a read that filled it and the reads that empty it, so that an idle
/// connection holds none.
#[derive(Debug)]
pub struct ReadAhead {
    stream: TcpStream,
    held: Vec<u8>,
    taken: usize,
    /// How much the last read brought: a connection of small messages gets a small buffer.
    appetite: usize,
    read: Turn,
    written: Turn,
}

/// What may still be moved before the others have their turn.
#[derive(Debug)]
struct Turn(usize);

impl Turn {
    /// Pending once when the turn is over, and woken again after the tasks that are ready now.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.0 > 0 {
            return Poll::Ready(());
        }
        self.0 = TURN;
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn take(&mut self, bytes: usize) {
        self.0 = self.0.saturating_sub(bytes);
    }
}

impl ReadAhead {
    /// Nothing read yet. The kernel is told to queue little.
    pub fn new(stream: TcpStream) -> Self {
        // A kernel that will not only queues more.
        let _ = culvert_net::socket::tune_tunnel(&stream);
        Self { stream, held: Vec::new(), taken: 0, appetite: 4096, read: Turn(TURN), written: Turn(TURN) }
    }

    /// The socket itself.
    pub fn get_ref(&self) -> &TcpStream {
        &self.stream
    }

    fn fill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.read.poll(cx));
        // Readiness first, memory second.
        ready!(self.stream.poll_read_ready(cx))?;
        let mut buffer = Vec::with_capacity(self.appetite);
        let mut limited = (&mut buffer).limit(self.appetite);
        // Through `poll_read`, which after a read that did not fill the buffer knows that the socket is empty: `try_read` would
        // need another call to be told so.
        let length = ready!(poll_read_buf(Pin::new(&mut self.stream), cx, &mut limited))?;
        self.appetite = if length == self.appetite {
            (self.appetite * 4).min(READ_AHEAD)
        } else {
            (length * 2).next_power_of_two().clamp(4096, READ_AHEAD)
        };
        self.read.take(length);
        self.held = buffer;
        self.taken = 0;
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for ReadAhead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.taken == this.held.len() {
            if buf.remaining() >= SMALL_READ {
                ready!(this.read.poll(cx));
                let before = buf.filled().len();
                ready!(Pin::new(&mut this.stream).poll_read(cx, buf))?;
                this.read.take(buf.filled().len() - before);
                return Poll::Ready(Ok(()));
            }
            ready!(this.fill(cx))?;
        }
        let available = &this.held[this.taken..];
        let length = available.len().min(buf.remaining());
        buf.put_slice(&available[..length]);
        this.taken += length;
        if this.taken == this.held.len() {
            this.held = Vec::new();
            this.taken = 0;
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ReadAhead {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.written.poll(cx));
        let written = ready!(Pin::new(&mut this.stream).poll_write(cx, bytes))?;
        this.written.take(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        ready!(this.written.poll(cx));
        let written = ready!(Pin::new(&mut this.stream).poll_write_vectored(cx, bytes))?;
        this.written.take(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// Which end of the connection the socket of a copy belongs to; the other end is the tunnel or the second socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one who opened the connection.
    Source,
    /// The one it is for.
    Destination,
}

/// Counts a copy's bytes into the connection's totals, and notes when the first went each way.
#[derive(Debug)]
pub struct Counting {
    live: Arc<Live>,
    side: Side,
    since: Instant,
    /// Microseconds after `since`, at least 1; 0 while nothing has gone that way.
    first_sent: AtomicU32,
    first_received: AtomicU32,
}

impl Counting {
    /// For a copy whose first socket is on `side`.
    pub fn new(live: Arc<Live>, side: Side) -> Self {
        let never = || AtomicU32::new(0);
        Self { live, side, since: Instant::now(), first_sent: never(), first_received: never() }
    }

    /// Writes the first bytes' times into the flow.
    pub fn phases(&self, flow: &mut Flow) {
        for (phase, at) in
            [(Phase::FirstSent, &self.first_sent), (Phase::FirstReceived, &self.first_received)]
        {
            let micros = at.load(Ordering::Relaxed);
            if micros > 0 {
                flow.mark_after(Phase::Open, phase, micros);
            }
        }
    }

    fn note(&self, first: &AtomicU32) {
        if first.load(Ordering::Relaxed) == 0 {
            let micros = u32::try_from(self.since.elapsed().as_micros()).unwrap_or(u32::MAX);
            first.store(micros.max(1), Ordering::Relaxed);
        }
    }

    fn towards_destination(&self, bytes: u64) {
        self.note(&self.first_sent);
        self.live.count_sent(bytes);
    }

    fn towards_source(&self, bytes: u64) {
        self.note(&self.first_received);
        self.live.count_received(bytes);
    }
}

impl CopyObserver for &Counting {
    fn on_sent(&self, bytes: u64) {
        match self.side {
            Side::Source => self.towards_destination(bytes),
            Side::Destination => self.towards_source(bytes),
        }
    }

    fn on_received(&self, bytes: u64) {
        match self.side {
            Side::Source => self.towards_source(bytes),
            Side::Destination => self.towards_destination(bytes),
        }
    }
}

/// Resolves when the connection has to end although both its sides would go on.
pub fn killed(
    live: &Arc<Live>,
    drain: DrainWatcher,
) -> impl Future<Output = Failure> + Send + 'static + use<> {
    let live = live.clone();
    async move {
        let killed = live.killed();
        tokio::select! {
            () = killed => live.killed_for().cloned().unwrap_or_else(|| {
                Failure::new(Reason::Internal, "the connection was ended without a reason")
            }),
            () = drain.forced() => Failure::new(Reason::Draining, "the deadline of the drain passed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    async fn pair() -> (TcpStream, ReadAhead) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (client, accepted) =
            tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (client.unwrap(), ReadAhead::new(accepted.unwrap().0))
    }

    /// Whatever the sizes of the reads, the bytes are the same and nothing stays held once they are taken.
    #[tokio::test]
    async fn reads_of_any_size_see_the_same_bytes() {
        let (mut writer, mut reader) = pair().await;
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| n.wrapping_mul(31) as u8).collect();
        let expected = sent.clone();
        let write = async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        };
        let read = async {
            let mut all = Vec::new();
            for size in [1, 5, 4096, 16 * 1024, SMALL_READ, 100_000].into_iter().cycle() {
                let mut buffer = vec![0; size];
                match reader.read(&mut buffer).await.unwrap() {
                    0 => break,
                    length => all.extend_from_slice(&buffer[..length]),
                }
            }
            all
        };
        let ((), all) = tokio::join!(write, read);
        assert_eq!(all.len(), expected.len());
        assert!(all == expected);
        assert_eq!(reader.held.capacity(), 0, "an idle connection holds no buffer");
    }
}
