//! HTTP/2 PING while a connection is open (Z24).
//!
//! Driven inside the connection's own task, so it starts and ends with the connection and cannot race with its close (R28).

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

use crate::config;

/// ```text
/// Resting --interval--> Awaiting --pong--> Resting
///    |                     |------timeout--> the peer is dead
///    +--- connection closed ---> Off
/// ```
#[derive(Debug)]
pub(crate) struct Keepalive {
    ping: Option<h2::PingPong>,
    times: config::Keepalive,
    timer: Pin<Box<Sleep>>,
    awaiting: bool,
}

impl Keepalive {
    /// None if there is nothing to do.
    pub(crate) fn new(times: Option<config::Keepalive>, ping: Option<h2::PingPong>) -> Option<Self> {
        let times = times?;
        Some(Self { ping: Some(ping?), times, timer: Box::pin(sleep(times.interval)), awaiting: false })
    }

    /// Ready, with how long was waited, when the peer did not answer.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        loop {
            let Some(ping) = &mut self.ping else { return Poll::Pending };
            if self.awaiting {
                match ping.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => self.rest(),
                    Poll::Ready(Err(_)) => self.ping = None, // closed meanwhile: the connection reports it, not we
                    Poll::Pending => {
                        ready!(self.timer.as_mut().poll(cx));
                        return Poll::Ready(self.times.timeout);
                    }
                }
            } else {
                ready!(self.timer.as_mut().poll(cx));
                if ping.send_ping(h2::Ping::opaque()).is_err() {
                    self.ping = None;
                    continue;
                }
                self.awaiting = true;
                self.timer.as_mut().reset(Instant::now() + self.times.timeout);
            }
        }
    }

    fn rest(&mut self) {
        self.awaiting = false;
        self.timer.as_mut().reset(Instant::now() + self.times.interval);
    }
}
