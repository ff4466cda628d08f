//! One direction of a copy, from any source to any sink.
//!
//! ```text
//! wait until readable -> wait for room in the sink -> read -> write all -> again
//!                                              end of source -> finish the sink -> done
//! ```
//! Nothing is read that cannot be passed on, so a blocked sink leaves the bytes with their sender. After [`TURN`] bytes the
//! other tasks of the thread have their turn.

use std::io;
use std::net::Shutdown;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use tokio::net::TcpStream;
use tokio::net::tcp::ReadHalf;

use super::buffer::{MAX_READ, Queue, ReadBuffer};
use crate::error::StreamError;
use crate::stream::{TunnelRecv, TunnelSend};

/// Bytes that one poll of a direction moves at most: one large read.
const TURN: u64 = MAX_READ as u64;

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Socket(io::ErrorKind),
    Tunnel(StreamError),
}

/// Which end of a direction failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    Source,
    Sink,
}

/// Where bytes come from.
pub(super) trait Source {
    /// Ready when [`Self::poll_fill`] would give something; costs no memory.
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>>;
    /// How many bytes the next fill would like.
    fn want(&self) -> usize;
    /// Adds about `room` bytes at most; false at the end.
    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
        queue: &mut Queue,
    ) -> Poll<Result<bool, Fault>>;
    /// `n` bytes were passed on.
    fn passed_on(&mut self, n: usize);
    /// Nothing will be read for a while.
    fn rest(&mut self);
}

/// Where bytes go.
pub(super) trait Sink {
    /// How many bytes, at most `want`, can be taken without piling up.
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, Fault>>;
    /// Takes from the queue, at least one byte.
    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Fault>>;
    /// Ends the direction cleanly.
    fn finish(&mut self) -> Result<(), Fault>;
    /// Nothing will be written for a while.
    fn rest(&mut self);
}

/// The state of one direction.
#[derive(Debug)]
pub(super) struct Pump {
    queue: Queue,
    state: State,
    moved: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Waiting for the source: its failure shows there.
    Reading,
    /// Waiting for the sink, with or without bytes in the queue.
    Blocked,
    /// The source ended; its last bytes are being written.
    Flushing,
    Done,
}

#[derive(Debug)]
pub(super) struct TcpSource<'a> {
    read: ReadHalf<'a>,
    buffer: ReadBuffer,
}

#[derive(Debug)]
pub(super) struct TcpSink<'a> {
    socket: &'a TcpStream,
}

#[derive(Debug)]
pub(super) struct TunnelSource {
    recv: TunnelRecv,
}

#[derive(Debug)]
pub(super) struct TunnelSink {
    send: TunnelSend,
    /// Capacity granted and not used.
    room: usize,
}

impl Pump {
    pub(super) fn new() -> Self {
        Self { queue: Queue::default(), state: State::Reading, moved: 0 }
    }

    /// One that passes these on first.
    pub(super) fn beginning_with(early: Bytes) -> Self {
        let mut pump = Self::new();
        if !early.is_empty() {
            pump.queue.push(early);
        }
        pump
    }

    pub(super) fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// True while a failure of the source would show by itself.
    pub(super) fn is_reading(&self) -> bool {
        self.state == State::Reading
    }

    /// Bytes passed on.
    pub(super) fn moved(&self) -> u64 {
        self.moved
    }

    /// Moves what can be moved now; the task is woken for the rest. See [`Self::is_done`].
    pub(super) fn poll<A: Source, B: Sink>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut A,
        sink: &mut B,
        passed: impl Fn(u64),
    ) -> Result<(), (At, Fault)> {
        match self.poll_inner(cx, source, sink, passed) {
            Poll::Ready(Err(failed)) => Err(failed),
            Poll::Ready(Ok(())) => Ok(()),
            Poll::Pending => {
                source.rest();
                if self.state == State::Reading {
                    sink.rest();
                }
                Ok(())
            }
        }
    }

    fn poll_inner<A: Source, B: Sink>(
        &mut self,
        cx: &mut Context<'_>,
        source: &mut A,
        sink: &mut B,
        passed: impl Fn(u64),
    ) -> Poll<Result<(), (At, Fault)>> {
        let in_source = |fault| (At::Source, fault);
        let in_sink = |fault| (At::Sink, fault);
        let turn = self.moved + TURN;
        loop {
            if self.moved >= turn && self.state != State::Done {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            while !self.queue.is_empty() {
                let n = ready!(sink.poll_write(cx, &mut self.queue)).map_err(in_sink)?;
                source.passed_on(n);
                self.moved += n as u64;
                passed(n as u64);
            }
            match self.state {
                State::Done => return Poll::Ready(Ok(())),
                State::Flushing => {
                    sink.finish().map_err(in_sink)?;
                    self.state = State::Done;
                    continue;
                }
                State::Reading | State::Blocked => {}
            }
            self.state = State::Reading;
            ready!(source.poll_ready(cx)).map_err(in_source)?;
            self.state = State::Blocked;
            let room = ready!(sink.poll_room(cx, source.want())).map_err(in_sink)?;
            self.state = State::Reading;
            let more = ready!(source.poll_fill(cx, room, &mut self.queue)).map_err(in_source)?;
            self.state = if more { State::Blocked } else { State::Flushing };
        }
    }
}

impl<'a> TcpSource<'a> {
    pub(super) fn new(read: ReadHalf<'a>) -> Self {
        Self { read, buffer: ReadBuffer::new() }
    }
}

impl Source for TcpSource<'_> {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        self.read.as_ref().poll_read_ready(cx).map_err(|error| Fault::Socket(error.kind()))
    }

    fn want(&self) -> usize {
        self.buffer.want()
    }

    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
        queue: &mut Queue,
    ) -> Poll<Result<bool, Fault>> {
        // `poll_read` rather than `try_read`: after a read that did not fill the buffer it knows that the socket is empty,
        // which saves the read that would only say so.
        let chunk = ready!(self.buffer.poll_read(cx, &mut self.read, room))
            .map_err(|error| Fault::Socket(error.kind()))?;
        let more = !chunk.is_empty();
        queue.push(chunk);
        Poll::Ready(Ok(more))
    }

    fn passed_on(&mut self, _: usize) {}

    fn rest(&mut self) {
        self.buffer.release();
    }
}

impl<'a> TcpSink<'a> {
    pub(super) fn new(socket: &'a TcpStream) -> Self {
        Self { socket }
    }
}

impl Sink for TcpSink<'_> {
    fn poll_room(&mut self, _: &mut Context<'_>, _: usize) -> Poll<Result<usize, Fault>> {
        Poll::Ready(Ok(MAX_READ)) // polled with an empty queue only
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Fault>> {
        loop {
            match queue.write_with(|slices| self.socket.try_write_vectored(slices)) {
                Ok(0) => return Poll::Ready(Err(Fault::Socket(io::ErrorKind::WriteZero))),
                Ok(n) => return Poll::Ready(Ok(n)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Poll::Ready(Err(Fault::Socket(error.kind()))),
            }
            ready!(self.socket.poll_write_ready(cx)).map_err(|error| Fault::Socket(error.kind()))?;
        }
    }

    fn finish(&mut self) -> Result<(), Fault> {
        match socket2::SockRef::from(self.socket).shutdown(Shutdown::Write) {
            // Closed by the other end already, which its direction reports if it was a reset.
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(Fault::Socket(error.kind())),
            _ => Ok(()),
        }
    }

    fn rest(&mut self) {}
}

impl TunnelSource {
    pub(super) fn new(recv: TunnelRecv) -> Self {
        Self { recv }
    }
}

impl Source for TunnelSource {
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Fault>> {
        Poll::Ready(Ok(())) // filling costs no memory of ours
    }

    fn want(&self) -> usize {
        MAX_READ
    }

    fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        room: usize,
        queue: &mut Queue,
    ) -> Poll<Result<bool, Fault>> {
        while !queue.is_full(room) {
            match self.recv.poll_recv(cx) {
                Poll::Ready(Ok(Some(chunk))) => queue.push(chunk),
                Poll::Ready(Ok(None)) => return Poll::Ready(Ok(false)),
                // What came before the reset is passed on first; the next fill meets it again.
                Poll::Ready(Err(error)) if queue.is_empty() => return Poll::Ready(Err(Fault::Tunnel(error))),
                Poll::Pending if queue.is_empty() => return Poll::Pending,
                Poll::Ready(Err(_)) | Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(true))
    }

    fn passed_on(&mut self, n: usize) {
        self.recv.release(n);
    }

    fn rest(&mut self) {}
}

impl TunnelSink {
    pub(super) fn new(send: TunnelSend) -> Self {
        Self { send, room: 0 }
    }

    /// See [`TunnelSend::poll_reset`].
    pub(super) fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        self.send.poll_reset(cx)
    }

    pub(super) fn reset(&mut self, reason: Reason) {
        self.send.reset(reason);
    }
}

impl Sink for TunnelSink {
    fn poll_room(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, Fault>> {
        self.room = ready!(self.send.poll_capacity(cx, want)).map_err(Fault::Tunnel)?;
        Poll::Ready(Ok(self.room))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, queue: &mut Queue) -> Poll<Result<usize, Fault>> {
        if self.room == 0 {
            ready!(self.poll_room(cx, queue.first_len()))?;
        }
        let chunk = queue.take_first(self.room);
        let n = chunk.len();
        self.room -= n;
        self.send.send_now(chunk).map_err(Fault::Tunnel)?;
        Poll::Ready(Ok(n))
    }

    fn finish(&mut self) -> Result<(), Fault> {
        self.room = 0;
        self.send.finish().map_err(Fault::Tunnel)
    }

    fn rest(&mut self) {
        if self.room > 0 {
            self.room = 0;
            self.send.release_capacity();
        }
    }
}
