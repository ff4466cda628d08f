//! The accepting side: CONNECT requests on one connection.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, Method, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::config::ServerConfig;
use crate::error::{HandshakeError, LostCause, StreamError};
use crate::keepalive::Keepalive;
use crate::link::{Link, StreamGuard};
use crate::stream::{Side, TunnelStream};

/// Starts connections.
#[derive(Debug)]
pub struct Server;

/// One accepted connection. It lives only while it is polled: keep calling [`Self::accept`] until it returns `None`, also
/// while tunnels run and after a shutdown was asked for.
#[derive(Debug)]
pub struct ServerConnection<IO> {
    h2: Option<h2::server::Connection<IO, Bytes>>,
    keepalive: Option<Keepalive>,
    link: Arc<Link>,
    max_live: usize,
}

/// A request that waits for an answer. Dropped without one, it is reset with `INTERNAL_ERROR`.
#[derive(Debug)]
pub struct Incoming {
    /// CONNECT, from a peer that means well.
    pub method: Method,
    /// `:authority` as sent, such as `10.0.0.1:80`; empty if there was none.
    pub authority: String,
    /// Request headers.
    pub headers: HeaderMap,
    recv: h2::RecvStream,
    respond: Responder,
    guard: StreamGuard,
    link: Arc<Link>,
}

/// The answer's half of a request, reset unless it was answered.
#[derive(Debug)]
struct Responder {
    inner: h2::server::SendResponse<Bytes>,
    answered: bool,
}

/// Why a request is not a tunnel request; the answer is 400 (Z20).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Another method.
    #[error("method {0} is not CONNECT")]
    Method(Method),
    /// No `:authority`.
    #[error("CONNECT without an authority")]
    NoAuthority,
    /// No `host:port`, or a port of 0.
    #[error("authority {0:?} is not host:port")]
    Authority(String),
}

impl Server {
    /// Exchanges prefaces on `io`.
    ///
    /// # Errors
    /// The connection ended first, or took longer than `handshake_timeout`.
    pub async fn handshake<IO>(io: IO, config: &ServerConfig) -> Result<ServerConnection<IO>, HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let windows = &config.windows;
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(windows.stream_clamped())
            .initial_connection_window_size(windows.connection(config.max_concurrent_streams))
            .max_frame_size(windows.frame_clamped())
            .max_send_buffer_size(windows.send_buffer)
            .max_concurrent_streams(config.max_concurrent_streams)
            .max_header_list_size(config.max_header_list)
            .max_pending_accept_reset_streams(config.max_pending_accept_resets)
            .max_local_error_reset_streams(Some(config.max_error_resets));
        let mut h2 = timeout(config.handshake_timeout, builder.handshake(io))
            .await
            .map_err(|_| HandshakeError::Timeout(config.handshake_timeout))?
            .map_err(|error| HandshakeError::Lost(LostCause::of(&error)))?;
        let keepalive = Keepalive::new(config.keepalive, h2.ping_pong());
        // Twice: a reset stream no longer counts for HTTP/2, but its tunnel may still be on its way down here.
        let max_live = 2 * config.max_concurrent_streams as usize;
        Ok(ServerConnection {
            h2: Some(h2),
            keepalive,
            link: Link::new(*windows, config.budget.clone(), None),
            max_live,
        })
    }
}

impl<IO> ServerConnection<IO>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    /// The next request, driving all streams of the connection meanwhile. `None` when the connection has ended in an orderly
    /// way, or by a transport failure with no stream open, which is nobody's loss (R28). Cancel safe.
    ///
    /// # Errors
    /// Why the connection was lost, once; then `None`.
    pub async fn accept(&mut self) -> Option<Result<Incoming, LostCause>> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    /// As [`Self::accept`].
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Incoming, LostCause>>> {
        let Some(h2) = &mut self.h2 else { return Poll::Ready(None) };
        self.link.offer(|window| h2.set_initial_window_size(window));
        if let Some(Poll::Ready(waited)) = self.keepalive.as_mut().map(|keepalive| keepalive.poll(cx)) {
            return Poll::Ready(self.lose(LostCause::Keepalive(waited)));
        }
        loop {
            return match h2.poll_accept(cx) {
                Poll::Pending => Poll::Pending,
                Poll::Ready(None) => {
                    self.h2 = None;
                    Poll::Ready(None)
                }
                Poll::Ready(Some(Err(error))) => Poll::Ready(self.lose(LostCause::of(&error))),
                Poll::Ready(Some(Ok((request, mut respond)))) => match self.link.reserve(self.max_live) {
                    Some(guard) => Poll::Ready(Some(Ok(Incoming::new(request, respond, guard)))),
                    None => {
                        respond.send_reset(Reason::ENHANCE_YOUR_CALM);
                        continue;
                    }
                },
            };
        }
    }

    /// Tells the peer to open no more streams (GOAWAY); those open run on, and [`Self::accept`] returns `None` after the last.
    pub fn graceful_shutdown(&mut self) {
        if let Some(h2) = &mut self.h2 {
            h2.graceful_shutdown();
        }
    }

    /// Ends the connection and all its streams. Poll [`Self::accept`] until `None` for the GOAWAY to be sent.
    pub fn abrupt_shutdown(&mut self, reason: Reason) {
        self.link.set_lost(LostCause::Local(reason));
        if let Some(h2) = &mut self.h2 {
            h2.abrupt_shutdown(reason);
        }
    }

    /// Tunnels and unanswered requests of this connection.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.link.streams()
    }

    fn lose(&mut self, cause: LostCause) -> Option<Result<Incoming, LostCause>> {
        self.link.set_lost(cause);
        self.h2 = None; // wakes every stream with an error
        self.keepalive = None;
        if self.link.streams() == 0 && cause.is_quiet() { None } else { Some(Err(cause)) }
    }
}

impl Incoming {
    fn new(
        request: http::Request<h2::RecvStream>,
        respond: h2::server::SendResponse<Bytes>,
        guard: StreamGuard,
    ) -> Self {
        let (head, recv) = request.into_parts();
        Self {
            method: head.method,
            authority: head.uri.authority().map(ToString::to_string).unwrap_or_default(),
            headers: head.headers,
            recv,
            respond: Responder { inner: respond, answered: false },
            link: guard.link().clone(),
            guard,
        }
    }

    /// Checks that this asks for a tunnel to `host:port`; the host may be an address or a name (Z16).
    ///
    /// # Errors
    /// What is wrong; answer 400 (Z20).
    pub fn validate_connect(&self) -> Result<(&str, u16), BadRequest> {
        if self.method != Method::CONNECT {
            return Err(BadRequest::Method(self.method.clone()));
        }
        if self.authority.is_empty() {
            return Err(BadRequest::NoAuthority);
        }
        split_authority(&self.authority).ok_or_else(|| BadRequest::Authority(self.authority.clone()))
    }

    /// Ready when the peer gives the request up or the connection is lost, so that a dial for it can stop. Cancel safe.
    pub async fn abandoned(&mut self) -> StreamError {
        let outcome = poll_fn(|cx| self.respond.inner.poll_reset(cx)).await;
        self.link.reset_error(outcome)
    }

    /// Answers 200 with `headers`: the tunnel is open. Only after the destination is connected (Z20).
    ///
    /// # Errors
    /// The peer gave up, or the connection was lost.
    pub fn accept(mut self, headers: HeaderMap) -> Result<TunnelStream, StreamError> {
        let send = self.answer(StatusCode::OK, headers, false)?;
        Ok(TunnelStream::new(self.recv, send, self.guard, Side::Server))
    }

    /// Answers with `status` and ends the stream.
    ///
    /// # Errors
    /// The peer gave up, or the connection was lost.
    pub fn refuse(mut self, status: StatusCode, headers: HeaderMap) -> Result<(), StreamError> {
        self.answer(status, headers, true).map(drop)
    }

    /// Resets the request without an answer.
    pub fn reset(mut self, reason: Reason) {
        self.respond.answered = true;
        self.respond.inner.send_reset(reason);
    }

    fn answer(
        &mut self,
        status: StatusCode,
        headers: HeaderMap,
        end: bool,
    ) -> Result<h2::SendStream<Bytes>, StreamError> {
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        let error = match self.respond.inner.send_response(response, end) {
            Ok(send) => {
                self.respond.answered = true;
                return Ok(send);
            }
            Err(error) => error,
        };
        // The usual cause is that the stream has ended, which h2 reports as misuse: ask for the reason.
        match self.respond.inner.poll_reset(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(outcome) => Err(self.link.reset_error(outcome)),
            Poll::Pending => Err(self.link.stream_error(&error)),
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if !self.answered {
            self.inner.send_reset(Reason::INTERNAL_ERROR);
        }
    }
}

/// `host` and `port` of an authority; the host of an IPv6 address comes without its brackets.
#[must_use]
pub fn split_authority(authority: &str) -> Option<(&str, u16)> {
    let (host, port) = authority.rsplit_once(':')?;
    if port.is_empty() || port.len() > 5 || !port.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let port: u16 = port.parse().ok().filter(|port| *port != 0)?;
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host = match bracketed {
        Some(inner) => inner.parse::<std::net::Ipv6Addr>().ok().map(|_| inner)?,
        None if host.is_empty() || host.contains([':', '@', '[', ']']) => return None,
        None => host,
    };
    Some((host, port))
}

#[cfg(test)]
mod tests {
    use super::split_authority;

    #[test]
    fn authority_is_host_and_port() {
        assert_eq!(split_authority("10.0.0.1:80"), Some(("10.0.0.1", 80)));
        assert_eq!(split_authority("[fd00::1]:443"), Some(("fd00::1", 443)));
        assert_eq!(split_authority("web.default.svc:8080"), Some(("web.default.svc", 8080)));
        for bad in ["", "host", "host:", ":80", "h:0", "h:65536", "h:+80", "fd00::1:80", "[x]:80", "u@h:80"] {
            assert_eq!(split_authority(bad), None, "{bad}");
        }
    }
}
