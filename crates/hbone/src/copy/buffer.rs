//! Buffers of a copy: what to read into, and what waits to be written.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use smallvec::SmallVec;
use tokio::io::AsyncRead;
use tokio_util::io::poll_read_buf;

/// First read of a connection that was idle: holds a usual request head, and what 10,000 such connections read at the same
/// moment is 20 MB.
const MIN_READ: usize = 2 << 10;
/// Largest read: one DATA frame of the default size, which is four whole TLS records. More would save calls, and let a bulk
/// stream keep the thread for longer: what one read brings costs about 0.1 ms until it is delivered.
pub(super) const MAX_READ: usize = (64 << 10) - 9;
/// Most chunks queued and written by one call.
pub(super) const MAX_CHUNKS: usize = 16;

/// A read buffer that follows the traffic: it grows fourfold when a read fills it, shrinks by half when a read leaves seven
/// eighths of it empty, and is given up while there is nothing to read.
#[derive(Debug)]
pub(super) struct ReadBuffer {
    size: usize,
    buf: BytesMut,
}

/// Chunks waiting to be written, in order: at most [`MAX_CHUNKS`].
#[derive(Debug, Default)]
pub(super) struct Queue {
    chunks: SmallVec<[Bytes; 2]>,
    bytes: usize,
}

impl ReadBuffer {
    pub(super) fn new() -> Self {
        Self { size: MIN_READ, buf: BytesMut::new() }
    }

    /// How much the next read would like.
    pub(super) fn want(&self) -> usize {
        self.size
    }

    /// Reads once, at most `room` bytes. Empty bytes are the end.
    pub(super) fn poll_read<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        room: usize,
    ) -> Poll<io::Result<Bytes>> {
        let offer = self.size.min(room);
        if self.buf.capacity() < offer {
            self.buf = BytesMut::with_capacity(offer);
        }
        let mut limited = (&mut self.buf).limit(offer);
        let n = ready!(poll_read_buf(Pin::new(reader), cx, &mut limited))?;
        if n == self.size {
            self.size = (self.size * 4).min(MAX_READ);
        } else if n < self.size / 8 {
            self.size = (self.size / 2).max(MIN_READ);
        }
        // A chunk keeps its whole buffer alive while it is queued. A small one is copied to its own size instead, so that
        // bytes that dribble in cannot hold hundreds of times their size.
        if n * 4 < self.buf.capacity() {
            let chunk = Bytes::copy_from_slice(&self.buf);
            self.buf.clear();
            return Poll::Ready(Ok(chunk));
        }
        Poll::Ready(Ok(std::mem::take(&mut self.buf).freeze()))
    }

    /// Gives the memory up.
    pub(super) fn release(&mut self) {
        self.buf = BytesMut::new();
    }
}

impl Queue {
    pub(super) fn push(&mut self, chunk: Bytes) {
        if !chunk.is_empty() {
            self.bytes += chunk.len();
            self.chunks.push(chunk);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    pub(super) fn is_full(&self, bytes: usize) -> bool {
        self.chunks.len() >= MAX_CHUNKS || self.bytes >= bytes
    }

    /// Length of the first chunk, 0 if there is none.
    pub(super) fn first_len(&self) -> usize {
        self.chunks.first().map_or(0, Bytes::len)
    }

    /// Takes up to `max` bytes of the first chunk, without copying.
    pub(super) fn take_first(&mut self, max: usize) -> Bytes {
        let Some(first) = self.chunks.first_mut() else { return Bytes::new() };
        let part = first.split_to(max.min(first.len()));
        if first.is_empty() {
            self.chunks.remove(0);
        }
        self.bytes -= part.len();
        part
    }

    /// Writes with one call of `write`, which takes the chunks and says how many bytes went.
    pub(super) fn write_with(
        &mut self,
        write: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); MAX_CHUNKS];
        for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
            *slice = IoSlice::new(chunk);
        }
        let n = write(&slices[..self.chunks.len().min(MAX_CHUNKS)])?;
        self.advance(n);
        Ok(n)
    }

    fn advance(&mut self, n: usize) {
        let mut left = n.min(self.bytes);
        self.bytes -= left;
        let mut whole = 0;
        for chunk in &mut self.chunks {
            if left < chunk.len() {
                chunk.advance(left);
                break;
            }
            left -= chunk.len();
            whole += 1;
        }
        self.chunks.drain(..whole);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    #[test]
    fn queue_advances_across_chunks() {
        let mut queue = Queue::default();
        for chunk in ["abc", "", "de", "fghi"] {
            queue.push(Bytes::from_static(chunk.as_bytes()));
        }
        assert_eq!(queue.write_with(|slices| Ok(slices.len() + 1)).unwrap(), 4);
        assert_eq!((queue.first_len(), queue.bytes), (1, 5));
        assert_eq!(queue.take_first(9), "e");
        assert_eq!(queue.take_first(2), "fg");
        assert_eq!(queue.write_with(|_| Ok(2)).unwrap(), 2);
        assert!(queue.is_empty() && !queue.is_full(1));
    }

    /// Z27.
    #[tokio::test]
    async fn read_buffer_grows_with_bulk_and_shrinks_with_dribble() {
        let bulk = vec![7_u8; 2 << 20];
        let mut reader = &bulk[..];
        let mut buffer = ReadBuffer::new();
        let mut sizes = Vec::new();
        for _ in 0..6 {
            sizes.push(poll_fn(|cx| buffer.poll_read(cx, &mut reader, MAX_READ)).await.unwrap().len());
        }
        assert_eq!(sizes, [2 << 10, 8 << 10, 32 << 10, MAX_READ, MAX_READ, MAX_READ]);
        for _ in 0..8 {
            let one = poll_fn(|cx| buffer.poll_read(cx, &mut &b"x"[..], MAX_READ)).await.unwrap();
            assert_eq!(one.len(), 1);
        }
        assert_eq!(buffer.want(), MIN_READ);
        assert_eq!(poll_fn(|cx| buffer.poll_read(cx, &mut &b"abc"[..], 2)).await.unwrap(), "ab");
    }
}
