//! Settings of a tunnel connection: windows, limits and times.

use std::time::Duration;

use crate::budget::{Budget, SMALL_WINDOW};

/// Largest window HTTP/2 can express (RFC 9113 6.9.1).
const MAX_WINDOW: u64 = (1 << 31) - 1;

/// Bytes of a frame's header (RFC 9113 4.1).
const FRAME_HEADER: u32 = 9;

/// Flow control of one connection, as this side advertises and buffers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Bytes a peer may send on one stream before the reader has passed them on. Also the most that one stalled reader
    /// makes this process hold for a stream. 1 MiB carries 1 GB/s at 1 ms round trip and 20 MB/s at 50 ms.
    pub stream: u32,
    /// Largest DATA frame accepted, 16 KiB to 16 MiB - 1 (RFC 9113 4.2). Streams take turns by frames, so another stream's
    /// bytes wait for one frame of each that has any: 64 KiB are 0.05 ms at 10 Gbit/s, or 0.04 ms of encryption. With its
    /// header the default fills four TLS records exactly.
    pub frame: u32,
    /// Bytes one stream may have queued towards the connection. A stream and its connection share one thread, so more
    /// than one read's worth does not overlap any work. With the frame being written, a stream holds at most
    /// `send_buffer + frame` = 128 KiB of a slow peer's bytes in this process; all else stays in the source's kernel buffer.
    pub send_buffer: usize,
}

/// HTTP/2 PING on an open connection (Z24): a dead peer is found within `interval + timeout`, 30 s by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    /// Time from one answered PING to the next.
    pub interval: Duration,
    /// How long an answer may take before the connection counts as lost.
    pub timeout: Duration,
}

/// Settings of the accepting side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerConfig {
    /// Flow control.
    pub windows: Windows,
    /// What streams may hold together; while it is used up, they have smaller windows.
    pub budget: Budget,
    /// Streams a peer may have open at once (Z23: 200). Tunnels still being torn down after a peer's reset count too, up to
    /// twice this number, so that a peer that opens and resets in a loop cannot pile up work here.
    pub max_concurrent_streams: u32,
    /// Largest decoded header list in bytes (Z23: 64 KB).
    pub max_header_list: u32,
    /// Streams that the peer reset before they were accepted; one more ends the connection (rapid reset, CVE-2023-44487).
    pub max_pending_accept_resets: usize,
    /// Streams reset by this side for the peer's errors in the life of a connection; one more ends it. Refusals count.
    pub max_error_resets: usize,
    /// How long the exchange of prefaces may take.
    pub handshake_timeout: Duration,
    /// PING, or `None` for no PING.
    pub keepalive: Option<Keepalive>,
}

/// Settings of the dialling side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientConfig {
    /// Flow control.
    pub windows: Windows,
    /// What streams may hold together; while it is used up, they have smaller windows.
    pub budget: Budget,
    /// Streams opened on one connection at once (Z22: 100). The peer's SETTINGS may lower it.
    pub max_streams: u32,
    /// Largest decoded header list of a response in bytes (Z23: 16 KB).
    pub max_header_list: u32,
    /// How long to wait for the answer to a CONNECT. The peer gives its own TCP connect 10 s (Z25) and answers 503 after
    /// that; 15 s leave room for its answer.
    pub connect_timeout: Duration,
    /// How long the exchange of prefaces may take.
    pub handshake_timeout: Duration,
    /// PING, or `None` for no PING.
    pub keepalive: Option<Keepalive>,
}

impl Windows {
    /// Window of a whole connection: every stream's window at once, so that stalled streams, however many, never keep
    /// another from sending (trap 19). 200 x 1 MiB = 200 MiB for a server, 100 MiB for a client; cut at 2^31 - 1.
    #[must_use]
    pub fn connection(&self, max_streams: u32) -> u32 {
        let all = u64::from(self.stream) * u64::from(max_streams);
        u32::try_from(all.clamp(65_535, MAX_WINDOW)).expect("clamped to 31 bits")
    }

    /// Stream window within what HTTP/2 can express.
    pub(crate) fn stream_clamped(&self) -> u32 {
        self.stream.clamp(1, (1 << 31) - 1)
    }

    /// Stream window while the budget is used up.
    pub(crate) fn stream_small(&self) -> u32 {
        self.stream_clamped().min(SMALL_WINDOW)
    }

    /// Frame size within what HTTP/2 allows.
    pub(crate) fn frame_clamped(&self) -> u32 {
        self.frame.clamp(16_384, (1 << 24) - 1)
    }
}

impl Default for Windows {
    fn default() -> Self {
        Self { stream: 1 << 20, frame: (64 << 10) - FRAME_HEADER, send_buffer: 64 << 10 }
    }
}

impl Default for Keepalive {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), timeout: Duration::from_secs(20) }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            windows: Windows::default(),
            budget: Budget::default(),
            max_concurrent_streams: 200,
            max_header_list: 64 << 10,
            max_pending_accept_resets: 20,
            max_error_resets: 1024,
            handshake_timeout: Duration::from_secs(10),
            keepalive: Some(Keepalive::default()),
        }
    }
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            windows: Windows::default(),
            budget: Budget::default(),
            max_streams: 100,
            max_header_list: 16 << 10,
            connect_timeout: Duration::from_secs(15),
            handshake_timeout: Duration::from_secs(10),
            keepalive: Some(Keepalive::default()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Z23.
    #[test]
    fn connection_window_covers_all_streams_within_the_protocol_limit() {
        let windows = Windows::default();
        assert_eq!(windows.connection(200), 200 << 20);
        assert_eq!(windows.connection(u32::MAX), (1 << 31) - 1);
        assert_eq!(Windows { stream: 1, ..windows }.connection(1), 65_535);
    }
}
