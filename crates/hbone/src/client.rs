//! The dialling side: one connection to a peer, and CONNECT on it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use http::uri::Authority;
use http::{HeaderMap, Method, Request, StatusCode, Uri, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use crate::config::ClientConfig;
use crate::error::{ConnectError, HandshakeError, LostCause, StreamError};
use crate::keepalive::Keepalive;
use crate::link::{Link, StreamGuard};
use crate::stream::{Side, TunnelStream};

/// Starts connections.
#[derive(Debug)]
pub struct Client;

/// A request for a tunnel.
#[derive(Debug, Clone, Default)]
pub struct TunnelRequest {
    /// `:authority`: `ip:port` of a pod or service, or `name:port` (Z16).
    pub authority: String,
    /// Request headers, see [`crate::headers`].
    pub headers: HeaderMap,
}

/// Opens tunnels on one connection. The connection ends when all handles and tunnels are gone.
#[derive(Debug, Clone)]
pub struct ClientHandle {
    h2: h2::client::SendRequest<Bytes>,
    link: Arc<Link>,
    max_streams: u32,
    connect_timeout: Duration,
}

/// Drives one connection; spawn it. It resolves when the connection has ended: `Ok` if in an orderly way, or by a transport
/// failure with no stream open (R28).
#[derive(Debug)]
#[must_use = "a connection makes no progress unless its driver is polled"]
pub struct Driver<IO: AsyncRead + AsyncWrite + Unpin> {
    h2: Option<h2::client::Connection<IO, Bytes>>,
    keepalive: Option<Keepalive>,
    link: Arc<Link>,
}

impl Client {
    /// Sends the preface on `io`. The peer's settings arrive with its first bytes and are not waited for: until then up to
    /// `max_streams` streams are opened, and a peer that wants fewer refuses the rest, which [`ConnectError::is_unprocessed`]
    /// shows.
    ///
    /// # Errors
    /// The connection ended first, or took longer than `handshake_timeout`.
    pub async fn handshake<IO>(
        io: IO,
        config: &ClientConfig,
    ) -> Result<(ClientHandle, Driver<IO>), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        Self::handshake_counted(io, config, None).await
    }

    /// As [`Self::handshake`], counting the connection's streams into `total` too.
    pub(crate) async fn handshake_counted<IO>(
        io: IO,
        config: &ClientConfig,
        total: Option<Arc<AtomicUsize>>,
    ) -> Result<(ClientHandle, Driver<IO>), HandshakeError>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let windows = &config.windows;
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(windows.stream_clamped())
            .initial_connection_window_size(windows.connection(config.max_streams))
            .max_frame_size(windows.frame_clamped())
            .max_send_buffer_size(windows.send_buffer)
            .initial_max_send_streams(config.max_streams as usize)
            .max_header_list_size(config.max_header_list)
            .enable_push(false);
        let (send, mut h2) = timeout(config.handshake_timeout, builder.handshake(io))
            .await
            .map_err(|_| HandshakeError::Timeout(config.handshake_timeout))?
            .map_err(|error| HandshakeError::Lost(LostCause::of(&error)))?;
        let keepalive = Keepalive::new(config.keepalive, h2.ping_pong());
        let link = Link::new(*windows, config.budget.clone(), total);
        let handle = ClientHandle {
            h2: send,
            link: link.clone(),
            max_streams: config.max_streams,
            connect_timeout: config.connect_timeout,
        };
        Ok((handle, Driver { h2: Some(h2), keepalive, link }))
    }
}

impl ClientHandle {
    /// Opens a tunnel. Dropping the future resets the request.
    ///
    /// # Errors
    /// See [`ConnectError`].
    pub async fn connect(&self, request: TunnelRequest) -> Result<(TunnelStream, HeaderMap), ConnectError> {
        let guard = self.reserve().ok_or(ConnectError::Busy(self.limit()))?;
        self.connect_in(guard, request).await
    }

    /// Takes a stream's place, if one is free under our limit and the peer's.
    pub(crate) fn reserve(&self) -> Option<StreamGuard> {
        self.link.reserve(self.limit() as usize)
    }

    pub(crate) fn link(&self) -> &Arc<Link> {
        &self.link
    }

    /// Why no stream can be opened any more, if so: the connection is lost, or the peer sent GOAWAY.
    #[must_use]
    pub fn unusable(&self) -> Option<LostCause> {
        if let Some(cause) = self.link.lost() {
            return Some(cause);
        }
        // A clone has no request pending, so this only asks for the connection's state and registers nothing.
        match self.h2.clone().poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Err(error)) => Some(LostCause::of(&error)),
            Poll::Ready(Ok(())) | Poll::Pending => None,
        }
    }

    /// Streams open or being opened on the connection.
    #[must_use]
    pub fn streams(&self) -> usize {
        self.link.streams()
    }

    fn limit(&self) -> u32 {
        let peer = u32::try_from(self.h2.current_max_send_streams()).unwrap_or(u32::MAX);
        self.max_streams.min(peer)
    }

    /// Opens a tunnel in a place taken before.
    pub(crate) async fn connect_in(
        &self,
        guard: StreamGuard,
        request: TunnelRequest,
    ) -> Result<(TunnelStream, HeaderMap), ConnectError> {
        match timeout(self.connect_timeout, self.exchange(guard, request)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(ConnectError::Timeout(self.connect_timeout)),
        }
    }

    async fn exchange(
        &self,
        guard: StreamGuard,
        request: TunnelRequest,
    ) -> Result<(TunnelStream, HeaderMap), ConnectError> {
        let request = http_request(request)?;
        // Nothing has been sent yet when these two fail.
        let unsent = |error: h2::Error| ConnectError::ConnectionLost {
            cause: self.link.lost().unwrap_or_else(|| LostCause::of(&error)),
            unprocessed: true,
        };
        let mut h2 = self.h2.clone().ready().await.map_err(unsent)?;
        let (response, send) = h2.send_request(request, false).map_err(unsent)?;
        let (head, recv) = response.await.map_err(|error| self.unanswered(&error))?.into_parts();
        if head.status != StatusCode::OK {
            return Err(ConnectError::Refused { status: head.status, headers: Box::new(head.headers) });
        }
        Ok((TunnelStream::new(recv, send, guard, Side::Client), head.headers))
    }

    /// What it means that a request that was sent got no answer. A stream above the last one named by the peer's GOAWAY was
    /// not processed (RFC 9113 6.8); `h2` gives exactly those streams the remote GOAWAY as their error.
    fn unanswered(&self, error: &h2::Error) -> ConnectError {
        match self.link.stream_error(error) {
            StreamError::Reset(reason) => ConnectError::Reset(reason),
            StreamError::ConnectionLost { cause } => {
                ConnectError::ConnectionLost { cause, unprocessed: error.is_go_away() && error.is_remote() }
            }
            StreamError::Finished => unreachable!("an h2 error is a reset or the loss of the connection"),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Future for Driver<IO> {
    type Output = Result<(), LostCause>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(h2) = &mut this.h2 else { return Poll::Ready(Ok(())) };
        this.link.offer(|window| h2.set_initial_window_size(window));
        let cause = match this.keepalive.as_mut().map(|keepalive| keepalive.poll(cx)) {
            Some(Poll::Ready(waited)) => LostCause::Keepalive(waited),
            _ => match std::task::ready!(Pin::new(h2).poll(cx)) {
                Ok(()) => {
                    this.h2 = None;
                    return Poll::Ready(Ok(()));
                }
                Err(error) => LostCause::of(&error),
            },
        };
        this.link.set_lost(cause);
        this.h2 = None; // wakes every stream with an error
        Poll::Ready(if this.link.streams() == 0 && cause.is_quiet() { Ok(()) } else { Err(cause) })
    }
}

fn http_request(request: TunnelRequest) -> Result<Request<()>, ConnectError> {
    let TunnelRequest { authority, headers } = request;
    let parsed = Authority::from_maybe_shared(Bytes::from(authority.clone()))
        .map_err(|_| ConnectError::BadAuthority(authority.clone()))?;
    let uri = Uri::builder().authority(parsed).build().map_err(|_| ConnectError::BadAuthority(authority))?;
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = uri;
    *request.version_mut() = Version::HTTP_2;
    *request.headers_mut() = headers;
    Ok(request)
}
