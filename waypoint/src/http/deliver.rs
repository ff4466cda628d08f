//! A response on its way to the client: counted, changed by filters, cut at its deadline, and reported when it is over.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use culvert_model::outcome::Reason;
use http::header::{CONNECTION, UPGRADE};
use http::{HeaderMap, Response, StatusCode};
use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::time::{Sleep, sleep_until, timeout};

use super::Served;
use super::body::{Body, BoxError};
use super::forward::Passed;
use super::head::strip_response;
use super::respond::GRPC_STATUS;
use super::upstream::GiveBack;
use super::watch::Serving;
use crate::endpoint::InProgress;
use crate::observe::Exchange;
use crate::shared::Worker;

/// How long both sides have to change their protocol after they agreed to.
const UPGRADE_TIME: Duration = Duration::from_secs(10);

/// A response of our own.
pub fn local(mut exchange: Exchange, response: Response<Body>, serving: Serving) -> Response<Body> {
    exchange.status = Some(response.status());
    exchange.grpc_status = grpc_status(response.headers());
    exchange.complete = true;
    response.map(|inner| Whole { inner, exchange, _serving: serving }.boxed_unsync())
}

/// A response of an endpoint.
pub fn response(
    served: &Served,
    mut exchange: Exchange,
    passed: Passed,
    client: OnUpgrade,
    serving: Serving,
) -> Response<Body> {
    let Passed { mut response, give_back, in_progress, deadline, changes } = passed;
    exchange.status = Some(response.status());
    exchange.grpc_status = grpc_status(response.headers());
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return upgraded(served, exchange, (response, in_progress, serving), client);
    }
    strip_response(response.headers_mut());
    changes.apply(response.headers_mut());
    let timer = deadline.map(|deadline| Box::pin(sleep_until(deadline)));
    let worker = served.worker.clone();
    let (parts, inner) = response.into_parts();
    let mut passing = Passing {
        inner,
        exchange,
        give_back: Some(give_back),
        timer,
        worker,
        _in_progress: in_progress,
        _serving: serving,
    };
    if passing.inner.is_end_stream() {
        passing.over();
    }
    let mut response = Response::from_parts(parts, passing.boxed_unsync());
    *response.version_mut() = http::Version::default();
    response
}

/// Both sides change to another protocol, whose bytes are then passed both ways.
fn upgraded(
    served: &Served,
    exchange: Exchange,
    (mut response, in_progress, serving): (Response<Incoming>, InProgress, Serving),
    client: OnUpgrade,
) -> Response<Body> {
    let server = hyper::upgrade::on(&mut response);
    let drain = served.shared.drain.clone();
    served.worker.spawn("upgraded", async move {
        let (_held, mut exchange) = ((in_progress, serving), exchange);
        let both = async { tokio::join!(client, server) };
        let Ok((Ok(client), Ok(server))) = timeout(UPGRADE_TIME, both).await else {
            exchange.fail(Reason::UpstreamReset, "the change of protocol was agreed to and not made");
            return;
        };
        let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
        let copied = tokio::select! {
            copied = tokio::io::copy_bidirectional(&mut client, &mut server) => copied,
            () = drain.forced() => {
                exchange.fail(Reason::Draining, "the deadline of the drain passed");
                return;
            }
        };
        match copied {
            Ok((sent, received)) => {
                exchange.request_bytes.fetch_add(sent, std::sync::atomic::Ordering::Relaxed);
                exchange.response_bytes += received;
                exchange.complete = true;
            }
            Err(error) => {
                exchange.fail(Reason::UpstreamReset, format!("after the change of protocol: {error}"))
            }
        }
    });
    let protocol = response.headers().get(UPGRADE).cloned();
    strip_response(response.headers_mut());
    if let Some(protocol) = protocol {
        response.headers_mut().insert(UPGRADE, protocol);
        response.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("upgrade"));
    }
    response.map(|_| super::body::empty())
}

fn grpc_status(headers: &HeaderMap) -> Option<u16> {
    headers.get(GRPC_STATUS)?.to_str().ok()?.parse().ok()
}

/// A body of our own, which is there whole.
struct Whole {
    inner: Body,
    exchange: Exchange,
    _serving: Serving,
}

impl HttpBody for Whole {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            this.exchange.response_bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// An endpoint's body as it passes.
struct Passing {
    inner: Incoming,
    exchange: Exchange,
    give_back: Option<GiveBack>,
    timer: Option<Pin<Box<Sleep>>>,
    worker: Arc<Worker>,
    _in_progress: InProgress,
    _serving: Serving,
}

impl Passing {
    fn over(&mut self) {
        self.exchange.complete = true;
        self.timer = None;
        if let Some(give_back) = self.give_back.take() {
            give_back.give_back(&self.worker);
        }
    }
}

impl HttpBody for Passing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => {
                if let Some(timer) = &mut this.timer {
                    ready!(timer.as_mut().poll(cx));
                    let detail = "the response took longer than its rule allows";
                    this.exchange.fail(Reason::ConnectTimeout, detail);
                    this.timer = None;
                    return Poll::Ready(Some(Err(detail.into())));
                }
                return Poll::Pending;
            }
        };
        match frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.exchange.response_bytes += data.len() as u64;
                }
                if let Some(trailers) = frame.trailers_ref() {
                    this.exchange.grpc_status = grpc_status(trailers).or(this.exchange.grpc_status);
                }
                // Nobody asks again where the length was told and has come.
                if this.inner.is_end_stream() {
                    this.over();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                this.exchange.fail(Reason::UpstreamReset, format!("in the middle of the response: {error}"));
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                this.over();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
