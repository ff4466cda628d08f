//! The bytes of one tunnel.
//!
//! A tunnel keeps what TCP promises: END_STREAM is a half-close and RST_STREAM a reset, and neither is ever taken for the
//! other (RFC 9113 8.5). A sender that is dropped without [`TunnelSend::finish`] resets the stream, so that a task that
//! fails or is cancelled can never look like a clean end.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use h2::Reason;

use crate::budget::Charge;
use crate::error::StreamError;
use crate::link::{StreamGuard, WaitMark};

/// One CONNECT stream, both directions.
#[derive(Debug)]
pub struct TunnelStream {
    recv: TunnelRecv,
    send: TunnelSend,
}

/// Bytes from the peer.
#[derive(Debug)]
pub struct TunnelRecv {
    inner: h2::RecvStream,
    guard: Arc<StreamGuard>,
    /// Bytes given to the caller and not yet released.
    unreleased: usize,
    charge: Charge,
    ended: bool,
}

/// Bytes to the peer.
#[derive(Debug)]
pub struct TunnelSend {
    inner: h2::SendStream<Bytes>,
    guard: Arc<StreamGuard>,
    wait: WaitMark,
    state: SendState,
    side: Side,
}

/// Which end of the connection this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It sent the CONNECT.
    Client,
    /// It answered the CONNECT.
    Server,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SendState {
    Open,
    Finished,
    Reset,
}

impl TunnelStream {
    pub(crate) fn new(
        recv: h2::RecvStream,
        send: h2::SendStream<Bytes>,
        guard: StreamGuard,
        side: Side,
    ) -> Self {
        let guard = Arc::new(guard);
        Self {
            recv: TunnelRecv {
                inner: recv,
                guard: guard.clone(),
                unreleased: 0,
                charge: Charge::default(),
                ended: false,
            },
            send: TunnelSend { inner: send, guard, wait: WaitMark::default(), state: SendState::Open, side },
        }
    }

    /// The two directions. Dropping either early resets the stream: the sender at once, the receiver when both are gone.
    #[must_use]
    pub fn split(self) -> (TunnelRecv, TunnelSend) {
        (self.recv, self.send)
    }

    /// The tunnel of two directions that [`Self::split`] parted. They must be of one stream.
    #[must_use]
    pub fn join(recv: TunnelRecv, send: TunnelSend) -> Self {
        debug_assert!(Arc::ptr_eq(&recv.guard, &send.guard), "halves of one stream");
        Self { recv, send }
    }

    /// Which end of the connection this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.send.side
    }

    /// HTTP/2 stream identifier, for logs.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.send.inner.stream_id().as_u32()
    }

    /// Resets the stream in both directions.
    pub fn reset(mut self, reason: Reason) {
        self.send.reset(reason);
    }
}

impl TunnelRecv {
    /// The next bytes; `None` is END_STREAM, a clean half-close. Cancel safe.
    ///
    /// The bytes stay charged to the stream's window until [`Self::release`]: a caller that releases only what it has
    /// passed on makes a slow reader slow the peer.
    ///
    /// # Errors
    /// A reset, or the loss of the connection; never presented as an end.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// As [`Self::recv`].
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        if self.ended {
            return Poll::Ready(Ok(None));
        }
        loop {
            match ready!(self.inner.poll_data(cx)) {
                Some(Ok(bytes)) if bytes.is_empty() => {} // END_STREAM on an empty frame: the next poll says so
                Some(Ok(bytes)) => {
                    self.unreleased += bytes.len();
                    let link = self.guard.link();
                    link.carried(bytes.len());
                    link.budget.charge(&mut self.charge, link.offered());
                    return Poll::Ready(Ok(Some(bytes)));
                }
                Some(Err(error)) => return Poll::Ready(Err(self.guard.link().stream_error(&error))),
                None => {
                    self.ended = true;
                    return Poll::Ready(Ok(None));
                }
            }
        }
    }

    /// Gives `n` bytes of window back to the peer, once they have been passed on. More than was received counts as all.
    pub fn release(&mut self, n: usize) {
        let n = n.min(self.unreleased);
        self.unreleased -= n;
        if self.unreleased == 0 {
            self.guard.link().budget.refund(&mut self.charge);
        }
        if n > 0 {
            // Fails only if more is released than was received, which the line above excludes.
            let _ = self.inner.flow_control().release_capacity(n);
        }
    }

    /// True once END_STREAM was delivered.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.ended
    }
}

impl TunnelSend {
    /// Sends all of `bytes`, waiting for window and buffer as needed; the bytes are split, not copied. If cancelled, a part
    /// may have been sent: reset the stream then.
    ///
    /// # Errors
    /// A reset, the loss of the connection, or [`StreamError::Finished`].
    pub async fn send(&mut self, mut bytes: Bytes) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let capacity = self.ready_capacity(bytes.len()).await?;
            let part = bytes.split_to(capacity.min(bytes.len()));
            self.send_now(part)?;
        }
        Ok(())
    }

    /// Waits until something can be sent and says how much, at most `want` (not 0): a copier sizes its read by it. What is
    /// not used stays reserved from the connection's window until [`Self::release_capacity`].
    ///
    /// # Errors
    /// As [`Self::send`].
    pub async fn ready_capacity(&mut self, want: usize) -> Result<usize, StreamError> {
        poll_fn(|cx| self.poll_capacity(cx, want)).await
    }

    /// As [`Self::ready_capacity`].
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn poll_capacity(&mut self, cx: &mut Context<'_>, want: usize) -> Poll<Result<usize, StreamError>> {
        self.check_open()?;
        self.inner.reserve_capacity(want);
        loop {
            let capacity = self.inner.capacity();
            if capacity > 0 {
                self.wait.granted(self.guard.link());
                return Poll::Ready(Ok(capacity.min(want)));
            }
            match self.inner.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(_)) | None) => {
                    self.wait.stop(self.guard.link());
                    return Poll::Ready(Err(self.closed_error()));
                }
                Poll::Pending => {
                    self.wait.wait(self.guard.link());
                    return Poll::Pending;
                }
            }
        }
    }

    /// Gives reserved capacity back, so that an idle stream holds none of the connection's window.
    pub fn release_capacity(&mut self) {
        if self.state == SendState::Open {
            self.inner.reserve_capacity(0);
        }
        self.wait.stop(self.guard.link());
    }

    /// Queues bytes within the capacity that [`Self::poll_capacity`] gave. Nothing waits: bytes beyond it are buffered.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_now(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.check_open()?;
        if bytes.is_empty() {
            return Ok(()); // peers count empty frames as abuse
        }
        self.guard.link().carried(bytes.len());
        self.inner.send_data(bytes, false).map_err(|_| self.closed_error())
    }

    /// Ends this direction cleanly (END_STREAM) after what was sent.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.check_open()?;
        self.inner.send_data(Bytes::new(), true).map_err(|_| self.closed_error())?;
        self.state = SendState::Finished;
        self.wait.stop(self.guard.link());
        Ok(())
    }

    /// Resets the stream in both directions; queued bytes are dropped, as TCP drops them on RST. Does nothing if the stream
    /// was reset before.
    pub fn reset(&mut self, reason: Reason) {
        if self.state != SendState::Reset {
            self.state = SendState::Reset;
            self.inner.send_reset(reason);
        }
        self.wait.stop(self.guard.link());
    }

    /// Ready once the peer reset the stream or the connection is lost, also while nothing is sent or received and also
    /// after [`Self::finish`]. Pending for ever after a clean end of both directions.
    pub fn poll_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        if self.state == SendState::Reset {
            return Poll::Ready(StreamError::Finished);
        }
        let outcome = ready!(self.inner.poll_reset(cx));
        Poll::Ready(self.guard.link().reset_error(outcome))
    }

    /// As [`Self::poll_reset`].
    pub async fn wait_reset(&mut self) -> StreamError {
        poll_fn(|cx| self.poll_reset(cx)).await
    }

    /// Which end of the connection this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    fn check_open(&self) -> Result<(), StreamError> {
        if self.state == SendState::Open { Ok(()) } else { Err(StreamError::Finished) }
    }

    /// Why a stream that was open here cannot send.
    fn closed_error(&mut self) -> StreamError {
        match self.inner.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => self.guard.link().reset_error(outcome),
            Poll::Pending => StreamError::Finished,
        }
    }
}

impl Drop for TunnelRecv {
    fn drop(&mut self) {
        self.guard.link().budget.refund(&mut self.charge);
    }
}

impl Drop for TunnelSend {
    fn drop(&mut self) {
        if self.state == SendState::Open {
            self.reset(Reason::CANCEL);
        }
        self.wait.stop(self.guard.link());
    }
}
