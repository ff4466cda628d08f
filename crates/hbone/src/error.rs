//! What can go wrong with a connection, a request and a stream, each named by what failed.

use std::io;
use std::time::Duration;

use h2::Reason;
use http::{HeaderMap, StatusCode};

/// Why a connection ended under its streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LostCause {
    /// The transport ended or broke.
    #[error("transport failed: {0}")]
    Transport(io::ErrorKind),
    /// The peer did not answer a PING in time (Z24).
    #[error("no answer to a PING within {0:?}")]
    Keepalive(Duration),
    /// The peer ended the connection with GOAWAY.
    #[error("peer ended the connection: {0}")]
    GoAway(Reason),
    /// This side ended the connection, for the peer's protocol error or by request.
    #[error("connection ended here: {0}")]
    Local(Reason),
}

/// Why the exchange of prefaces failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// The connection ended first.
    #[error("connection ended in the handshake: {0}")]
    Lost(#[source] LostCause),
    /// The peer did not answer in time.
    #[error("no HTTP/2 handshake within {0:?}")]
    Timeout(Duration),
}

/// Why a tunnel's bytes ended other than by a clean end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// RST_STREAM, from the peer or from the other half of this stream.
    #[error("stream reset: {0}")]
    Reset(Reason),
    /// The connection under the stream ended.
    #[error("connection lost: {cause}")]
    ConnectionLost {
        /// What ended it.
        cause: LostCause,
    },
    /// This half was finished before.
    #[error("stream already finished")]
    Finished,
}

/// Why a CONNECT did not become a tunnel.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The peer answered with something else than 200.
    #[error("peer refused the tunnel with status {status}")]
    Refused {
        /// The peer's answer: 400, 401 or 503 from a ztunnel (Z20).
        status: StatusCode,
        /// Its headers.
        headers: Box<HeaderMap>,
    },
    /// The peer reset the request. `REFUSED_STREAM` promises that it was not processed (RFC 9113 8.7).
    #[error("peer reset the request: {0}")]
    Reset(Reason),
    /// The connection ended or is ending.
    #[error("connection lost before an answer ({cause})")]
    ConnectionLost {
        /// What ended it.
        cause: LostCause,
        /// True if the peer certainly did nothing for this request.
        unprocessed: bool,
    },
    /// All streams of the connection are in use.
    #[error("all {0} streams of the connection are in use")]
    Busy(u32),
    /// No answer in time; the request was reset.
    #[error("no answer to CONNECT within {0:?}")]
    Timeout(Duration),
    /// The authority or a header cannot be sent.
    #[error("request cannot be sent: {0:?} is not an authority")]
    BadAuthority(String),
}

impl LostCause {
    /// The cause that an `h2` error tells of. Resets do not end connections and are for the callers to separate first.
    pub(crate) fn of(error: &h2::Error) -> Self {
        if let Some(io) = error.get_io() {
            return Self::Transport(io.kind());
        }
        let reason = error.reason().unwrap_or(Reason::INTERNAL_ERROR);
        if error.is_remote() { Self::GoAway(reason) } else { Self::Local(reason) }
    }

    /// True for the ways in which a connection ends when there is nothing wrong: the peer closed it.
    pub(crate) fn is_quiet(self) -> bool {
        match self {
            Self::Transport(kind) => matches!(
                kind,
                io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::ConnectionReset
                    | io::ErrorKind::ConnectionAborted
                    | io::ErrorKind::NotConnected
            ),
            Self::GoAway(reason) | Self::Local(reason) => reason == Reason::NO_ERROR,
            Self::Keepalive(_) => false,
        }
    }
}

impl ConnectError {
    /// True if the peer certainly did nothing for the request, so that it may be sent again on another connection.
    #[must_use]
    pub fn is_unprocessed(&self) -> bool {
        match self {
            Self::Reset(reason) => *reason == Reason::REFUSED_STREAM,
            Self::ConnectionLost { unprocessed, .. } => *unprocessed,
            Self::Busy(_) | Self::BadAuthority(_) => true,
            Self::Refused { .. } | Self::Timeout(_) => false,
        }
    }
}
