//! Time as a dependency, so that what depends on it (certificate renewal above all) is tested without waiting.

use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;

/// A source of time: wall time, which may jump, and monotonic time, which may not.
pub trait Clock: Debug + Send + Sync + 'static {
    /// Wall time, for what is written in certificates and logs.
    fn now(&self) -> SystemTime;

    /// Monotonic time, for how long something took or has left.
    fn instant(&self) -> Instant;

    /// Resolves once this much monotonic time has passed.
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// A clock that many parts of a process share.
pub type SharedClock = Arc<dyn Clock>;

/// The time of the machine (sleeps are tokio's, so they follow a test's paused time).
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

/// A clock that stands still until it is moved; clones share it.
#[derive(Debug, Clone)]
pub struct ManualClock {
    origin: Instant,
    time: Arc<watch::Sender<ManualTime>>,
}

#[derive(Debug, Clone, Copy)]
struct ManualTime {
    wall: SystemTime,
    elapsed: Duration,
}

impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn instant(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

impl ManualClock {
    /// A clock that shows this wall time.
    #[must_use]
    pub fn new(wall: SystemTime) -> Self {
        let time = watch::Sender::new(ManualTime { wall, elapsed: Duration::ZERO });
        Self { origin: Instant::now(), time: Arc::new(time) }
    }

    /// Moves wall and monotonic time forward and wakes the sleepers whose time has come.
    pub fn advance(&self, by: Duration) {
        self.time.send_modify(|time| {
            time.wall += by;
            time.elapsed += by;
        });
    }

    /// Makes the wall time jump, forward or back, as when an administrator or NTP steps it. Monotonic time stays.
    pub fn set_wall(&self, wall: SystemTime) {
        self.time.send_modify(|time| time.wall = wall);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> SystemTime {
        self.time.borrow().wall
    }

    fn instant(&self) -> Instant {
        self.origin + self.time.borrow().elapsed
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let clock = self.clone();
        let until = self.time.borrow().elapsed.saturating_add(duration);
        Box::pin(async move {
            // The clock lives in this future, so its sender cannot be gone.
            let _ = clock.time.subscribe().wait_for(|time| time.elapsed >= until).await;
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = ManualClock::new(start);
        let begun = clock.instant();
        let mut sleep = clock.sleep(Duration::from_secs(10));
        clock.advance(Duration::from_secs(9));
        assert!((&mut sleep).now_or_never().is_none());
        assert_eq!(clock.now(), start + Duration::from_secs(9));
        clock.set_wall(start);
        assert!((&mut sleep).now_or_never().is_none(), "a jump of the wall clock wakes nobody");
        clock.advance(Duration::from_secs(1));
        assert!(sleep.now_or_never().is_some());
        assert_eq!(clock.now(), start + Duration::from_secs(1));
        assert_eq!(clock.instant() - begun, Duration::from_secs(10));
    }

    #[tokio::test(start_paused = true)]
    async fn the_system_clock_sleeps_on_tokio_time() {
        let begun = tokio::time::Instant::now();
        SystemClock.sleep(Duration::from_secs(3600)).await;
        assert!(begun.elapsed() >= Duration::from_secs(3600));
    }
}
