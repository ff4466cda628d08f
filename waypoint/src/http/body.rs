//! Bodies: how they are named, kept for a repetition, copied for a mirror, and counted.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use parking_lot::Mutex;
use tokio::sync::mpsc;

/// What a body may fail with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// Any body.
pub type Body = UnsyncBoxBody<Bytes, BoxError>;

/// A request's body up to this size can be sent again.
pub const MAX_REPLAY: usize = 64 << 10;
/// Frames of a body that wait for a mirror. One that cannot keep up gets no more: it must not slow the request.
const MIRROR_FRAMES: usize = 16;

/// No body.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A text.
pub fn text(text: impl Into<Bytes>) -> Body {
    Full::new(text.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A request's body, of which attempts are made one after another.
pub struct Replay {
    state: Arc<Mutex<Kept>>,
}

struct Kept {
    /// What the source gave so far, unless it was too much.
    frames: Vec<Kind>,
    bytes: usize,
    too_long: bool,
    /// What is still to come; taken by the attempt that is being made.
    source: Option<Incoming>,
    ended: bool,
    /// The client did not send all of it.
    cut: bool,
    counter: Arc<AtomicU64>,
}

#[derive(Clone)]
enum Kind {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Replay {
    /// `keep`: whether it may have to be sent again.
    pub fn new(source: Incoming, keep: bool, counter: Arc<AtomicU64>) -> Self {
        let ended = source.is_end_stream();
        let kept = Kept {
            frames: Vec::new(),
            bytes: 0,
            too_long: !keep && !ended,
            source: Some(source).filter(|_| !ended),
            ended,
            cut: false,
            counter,
        };
        Self { state: Arc::new(Mutex::new(kept)) }
    }

    /// Whether another attempt can be made: nothing was sent that is no longer here, and no attempt still has what is to come.
    pub fn is_repeatable(&self) -> bool {
        let state = self.state.lock();
        !state.too_long && (state.ended || state.source.is_some())
    }

    /// Whether the client broke it off.
    pub fn is_cut(&self) -> bool {
        self.state.lock().cut
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.ended && state.frames.is_empty()
    }

    /// The body for an attempt. The body of the attempt before must be gone.
    pub fn attempt(&self) -> Body {
        let mut state = self.state.lock();
        let frames: VecDeque<Kind> = state.frames.iter().cloned().collect();
        let source = state.source.take();
        if source.is_none() && frames.is_empty() {
            return empty();
        }
        drop(state);
        Attempt { frames, source, state: self.state.clone() }.boxed_unsync()
    }
}

/// What was kept, then the rest.
struct Attempt {
    frames: VecDeque<Kind>,
    source: Option<Incoming>,
    state: Arc<Mutex<Kept>>,
}

impl HttpBody for Attempt {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(kept) = this.frames.pop_front() {
            return Poll::Ready(Some(Ok(kept.into_frame())));
        }
        let Some(source) = &mut this.source else { return Poll::Ready(None) };
        let frame = ready!(Pin::new(&mut *source).poll_frame(cx));
        let mut state = this.state.lock();
        match frame {
            Some(Ok(frame)) => {
                state.keep(&frame);
                // Who knows the length does not ask for the end.
                state.ended = source.is_end_stream();
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                state.cut = true;
                Poll::Ready(Some(Err(error.into())))
            }
            None => {
                state.ended = true;
                this.source = None;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.source.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let kept: u64 = self.frames.iter().map(Kind::len).sum();
        let rest = self.source.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint);
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + kept);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + kept);
        }
        hint
    }
}

impl Drop for Attempt {
    /// What is left is for the next attempt.
    fn drop(&mut self) {
        if let Some(source) = self.source.take() {
            self.state.lock().source = Some(source);
        }
    }
}

impl Kept {
    fn keep(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            self.counter.fetch_add(data.len() as u64, Ordering::Relaxed);
        }
        if self.too_long {
            return;
        }
        let kind = match (frame.data_ref(), frame.trailers_ref()) {
            (Some(data), _) => Kind::Data(data.clone()),
            (None, Some(trailers)) => Kind::Trailers(trailers.clone()),
            (None, None) => return,
        };
        self.bytes += kind.len() as usize;
        if self.bytes > MAX_REPLAY {
            self.too_long = true;
            self.frames = Vec::new();
        } else {
            self.frames.push(kind);
        }
    }
}

impl Kind {
    fn len(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Trailers(_) => 0,
        }
    }

    fn into_frame(self) -> Frame<Bytes> {
        match self {
            Self::Data(data) => Frame::data(data),
            Self::Trailers(trailers) => Frame::trailers(trailers),
        }
    }
}

/// A body that is copied as it passes; a copy that cannot keep up is cut.
pub fn tee(body: Body) -> (Body, Body) {
    if body.is_end_stream() {
        return (body, empty());
    }
    let (sender, receiver) = mpsc::channel(MIRROR_FRAMES);
    let copy = Copied { receiver, whole: false }.boxed_unsync();
    (Tee { body, sender: Some(sender) }.boxed_unsync(), copy)
}

struct Tee {
    body: Body,
    sender: Option<mpsc::Sender<Option<Bytes>>>,
}

struct Copied {
    receiver: mpsc::Receiver<Option<Bytes>>,
    whole: bool,
}

impl HttpBody for Tee {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        let told = match &frame {
            Some(Ok(frame)) => frame.data_ref().map(|data| Some(data.clone())),
            Some(Err(_)) => {
                this.sender = None;
                None
            }
            // The end, so that what was cut is not taken for it.
            None => Some(None),
        };
        // Who knows the length does not ask for the end.
        let ended = matches!(&frame, Some(Ok(_))) && this.body.is_end_stream();
        for told in told.into_iter().chain(ended.then_some(None)) {
            if this.sender.as_ref().is_some_and(|sender| sender.try_send(told).is_err()) {
                this.sender = None;
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl HttpBody for Copied {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.whole {
            return Poll::Ready(None);
        }
        match ready!(self.receiver.poll_recv(cx)) {
            Some(Some(data)) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Some(None) => {
                self.whole = true;
                Poll::Ready(None)
            }
            None => Poll::Ready(Some(Err("the mirror could not keep up, or the request was cut".into()))),
        }
    }
}

/// Reads a body to its end and throws it away; false if it had none.
pub async fn drain(mut body: Incoming) -> bool {
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(all: &[&'static str]) -> Body {
        let frames =
            all.iter().map(|text| Ok(Frame::data(Bytes::from_static(text.as_bytes())))).collect::<Vec<_>>();
        http_body_util::StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync()
    }

    #[tokio::test]
    async fn a_mirror_gets_the_same() {
        let (body, copy) = tee(chunks(&["one ", "two"]));
        let all = body.collect().await.unwrap().to_bytes();
        let copied = copy.collect().await.unwrap().to_bytes();
        assert_eq!((&all[..], &copied[..]), (&b"one two"[..], &b"one two"[..]));
    }

    #[tokio::test]
    async fn a_mirror_that_cannot_keep_up_is_cut_and_says_so() {
        let many = vec!["x"; MIRROR_FRAMES + 2];
        let (body, copy) = tee(chunks(&many));
        assert_eq!(body.collect().await.unwrap().to_bytes().len(), many.len());
        assert!(copy.collect().await.is_err());
    }
}
