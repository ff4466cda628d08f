//! What a connection's driver, its streams and its pool share.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::budget::Budget;
use crate::config::Windows;
use crate::error::{LostCause, StreamError};

/// Bytes of large chunks within [`BULK_WINDOW`] that make a connection one that carries bulk: 10 MB/s. A page with its pictures
/// stays below.
const BULK_BYTES: u64 = 1 << 20;
/// In milliseconds.
const BULK_WINDOW: u64 = 100;
/// For how long a connection counts as one that carries bulk after it last did, milliseconds: bulk that is held up for a
/// moment, by the disk at its source, is bulk still.
const BULK_REST: u64 = 500;
/// Smaller chunks are not bulk, and cost no look at the clock.
const LARGE_CHUNK: usize = 8 << 10;

/// Shared state of one connection. Counters only; the streams themselves belong to `h2`.
#[derive(Debug)]
pub(crate) struct Link {
    /// Streams held here: requests in progress and tunnels not yet dropped.
    streams: AtomicUsize,
    /// Streams waiting for window or buffer right now.
    waiting: AtomicUsize,
    /// When a stream last got capacity or began to wait as the first, in milliseconds since `born`.
    last_progress: AtomicU64,
    /// Upper 32 bits: which [`BULK_WINDOW`] since `born`; lower 32: bytes of large chunks in it.
    bulk: AtomicU64,
    /// Until when the connection counts as one that carries bulk, in milliseconds since `born`.
    bulk_until: AtomicU64,
    born: Instant,
    lost: OnceLock<LostCause>,
    /// When the last stream ended, in milliseconds since `born`.
    idle_since: AtomicU64,
    /// Told when the last stream ends.
    pub(crate) idle: Notify,
    /// Streams of all connections of one pool.
    total: Option<Arc<AtomicUsize>>,
    windows: Windows,
    pub(crate) budget: Budget,
    /// What a stream's peer may send before it is read, as this side last said.
    offered: AtomicU32,
}

/// One stream's place on its connection, given back on drop.
#[derive(Debug)]
pub(crate) struct StreamGuard {
    link: Arc<Link>,
}

/// A stream's wait for capacity, counted while it lives.
#[derive(Debug, Default)]
pub(crate) struct WaitMark {
    waiting: bool,
}

impl Link {
    pub(crate) fn new(windows: Windows, budget: Budget, total: Option<Arc<AtomicUsize>>) -> Arc<Self> {
        Arc::new(Self {
            streams: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            last_progress: AtomicU64::new(0),
            bulk: AtomicU64::new(0),
            bulk_until: AtomicU64::new(0),
            born: Instant::now(),
            lost: OnceLock::new(),
            idle_since: AtomicU64::new(0),
            idle: Notify::new(),
            total,
            windows,
            budget,
            offered: AtomicU32::new(windows.stream_clamped()),
        })
    }

    /// Takes a place if fewer than `limit` are taken.
    pub(crate) fn reserve(self: &Arc<Self>, limit: usize) -> Option<StreamGuard> {
        self.streams
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| (taken < limit).then_some(taken + 1))
            .ok()?;
        if let Some(total) = &self.total {
            total.fetch_add(1, Ordering::AcqRel);
        }
        Some(StreamGuard { link: self.clone() })
    }

    /// When the last stream ended, or the connection began if there was none.
    pub(crate) fn idle_since(&self) -> Instant {
        self.born + Duration::from_millis(self.idle_since.load(Ordering::Acquire))
    }

    pub(crate) fn streams(&self) -> usize {
        self.streams.load(Ordering::Acquire)
    }

    /// Records why the connection ended; the first cause stays.
    pub(crate) fn set_lost(&self, cause: LostCause) {
        let _ = self.lost.set(cause);
    }

    pub(crate) fn lost(&self) -> Option<LostCause> {
        self.lost.get().copied()
    }

    /// The stream error that an `h2` error means on this connection.
    pub(crate) fn stream_error(&self, error: &h2::Error) -> StreamError {
        if let Some(cause) = self.lost() {
            return StreamError::ConnectionLost { cause };
        }
        match error.reason() {
            Some(reason) if error.is_reset() => StreamError::Reset(reason),
            _ => StreamError::ConnectionLost { cause: LostCause::of(error) },
        }
    }

    /// The stream error that the outcome of polling for a reset means on this connection.
    pub(crate) fn reset_error(&self, outcome: Result<h2::Reason, h2::Error>) -> StreamError {
        match (self.lost(), outcome) {
            (Some(cause), _) => StreamError::ConnectionLost { cause },
            (None, Ok(reason)) => StreamError::Reset(reason),
            (None, Err(error)) => StreamError::ConnectionLost { cause: LostCause::of(&error) },
        }
    }

    /// True if streams wait for capacity and none got any for `grace`: the sign that the connection's window, rather than
    /// one stream's, is used up, since another stream of this connection would otherwise still make progress. A single
    /// stalled stream with no other traffic looks the same and is treated the same.
    pub(crate) fn is_stalled(&self, grace: Duration) -> bool {
        if self.waiting.load(Ordering::Acquire) == 0 {
            return false;
        }
        let idle = self.now_ms().saturating_sub(self.last_progress.load(Ordering::Acquire));
        u128::from(idle) >= grace.as_millis()
    }

    /// A stream's window, as this side last said.
    pub(crate) fn offered(&self) -> u32 {
        self.offered.load(Ordering::Relaxed)
    }

    /// Offers the window that the budget allows now, with `set`, if that is another one. It fails while the peer has not
    /// acknowledged the last one; then the next poll tries again.
    pub(crate) fn offer(&self, set: impl FnOnce(u32) -> Result<(), h2::Error>) {
        let windows = &self.windows;
        let window = if self.budget.is_tight() { windows.stream_small() } else { windows.stream_clamped() };
        if window != self.offered() && set(window).is_ok() {
            self.offered.store(window, Ordering::Relaxed);
        }
    }

    /// Notes a chunk that went either way. Only the thread of the connection calls this, so the counts are never contended; a
    /// lost one would only mean that bulk is noticed a little later.
    pub(crate) fn carried(&self, bytes: usize) {
        if bytes < LARGE_CHUNK {
            return;
        }
        let now = self.now_ms();
        let (window, before) = ((now / BULK_WINDOW) & 0xffff_ffff, self.bulk.load(Ordering::Relaxed));
        let sum = if before >> 32 == window { before & 0xffff_ffff } else { 0 } + bytes as u64;
        self.bulk.store(window << 32 | sum.min(0xffff_ffff), Ordering::Relaxed);
        if sum >= BULK_BYTES {
            self.bulk_until.store(now + BULK_REST, Ordering::Relaxed);
        }
    }

    /// True if the connection carries bulk: a small message would wait behind it.
    pub(crate) fn carries_bulk(&self) -> bool {
        let until = self.bulk_until.load(Ordering::Relaxed);
        until > 0 && self.now_ms() < until
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn progress(&self) {
        self.last_progress.store(self.now_ms(), Ordering::Release);
    }
}

impl StreamGuard {
    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }
}

impl Drop for StreamGuard {
    fn drop(&mut self) {
        if let Some(total) = &self.link.total {
            total.fetch_sub(1, Ordering::AcqRel);
        }
        if self.link.streams.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.link.idle_since.store(self.link.now_ms(), Ordering::Release);
            self.link.idle.notify_one();
        }
    }
}

impl WaitMark {
    /// The stream found no capacity.
    pub(crate) fn wait(&mut self, link: &Link) {
        if !self.waiting {
            self.waiting = true;
            if link.waiting.fetch_add(1, Ordering::AcqRel) == 0 {
                link.progress();
            }
        }
    }

    /// The stream got capacity.
    pub(crate) fn granted(&mut self, link: &Link) {
        self.stop(link);
        // Nobody reads the time of progress while nobody waits: save the clock read.
        if link.waiting.load(Ordering::Acquire) > 0 {
            link.progress();
        }
    }

    /// The stream no longer waits.
    pub(crate) fn stop(&mut self, link: &Link) {
        if std::mem::take(&mut self.waiting) {
            link.waiting.fetch_sub(1, Ordering::AcqRel);
        }
    }
}
