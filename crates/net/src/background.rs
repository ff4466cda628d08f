//! Work in large pieces that traffic must not wait for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::sys;

/// A thread that works in the background: between [`enter`](Self::enter) and the end of what that returns it runs only where a
/// processor has nothing else to do, and whoever wakes takes its place at once (SCHED_IDLE, see sched(7)).
///
/// On a processor that is never idle it would wait for ever; [`keep_pace`](Self::keep_pace), called by another thread from time to
/// time, brings back one that has been at it for too long.
#[derive(Clone, Debug)]
pub struct Background(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    thread: i32,
    began: Instant,
    /// Nanoseconds after `began` at which it entered; 0 while it is not there.
    since: AtomicU64,
}

/// While this lives, its thread is in the background. Not to be held over an await: the thread is what counts.
#[derive(Debug)]
pub struct Stay<'a>(&'a Inner);

impl Background {
    /// For the calling thread.
    ///
    /// # Errors
    /// Without `CAP_SYS_NICE`: Linux would let the thread in, and never out again.
    pub fn of_this_thread() -> io::Result<Self> {
        // Tried by a thread that ends with it.
        std::thread::scope(|scope| {
            let trial = scope.spawn(|| {
                sys::set_thread_idle(0, true)?;
                sys::set_thread_idle(0, false)
            });
            trial.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
        })?;
        let began = Instant::now();
        Ok(Self(Arc::new(Inner { thread: sys::thread_id(), began, since: AtomicU64::new(0) })))
    }

    /// Enters, after `announce`, which is to wake who calls [`keep_pace`](Self::keep_pace): afterwards it may be too late. To be called by
    /// the thread that this is for.
    pub fn enter(&self, announce: impl FnOnce()) -> Stay<'_> {
        let inner = &*self.0;
        inner.since.store(inner.now(), Ordering::Release);
        announce();
        // It was tried before anybody entered; where it fails after all, the thread stays as it is.
        let _ = sys::set_thread_idle(0, true);
        Stay(inner)
    }

    /// Takes the thread out if it has been in for `patience` or longer; true while it is in. To be called by another thread.
    pub fn keep_pace(&self, patience: Duration) -> bool {
        let since = self.0.since.load(Ordering::Acquire);
        let patience = u64::try_from(patience.as_nanos()).unwrap_or(u64::MAX);
        if since == 0 {
            return false;
        }
        if self.0.now().saturating_sub(since) < patience {
            return true;
        }
        // It may have left by itself meanwhile: then this changes nothing.
        let _ = sys::set_thread_idle(self.0.thread, false);
        false
    }
}

impl Inner {
    /// Never 0.
    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1)
    }
}

impl Drop for Stay<'_> {
    fn drop(&mut self) {
        if self.0.since.swap(0, Ordering::AcqRel) != 0 {
            // It was tried before anybody entered.
            let _ = sys::set_thread_idle(0, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_in_the_background_while_it_stays_and_no_longer_than_patience() {
        let background = Background::of_this_thread().expect("CAP_SYS_NICE");
        assert!(!sys::is_thread_idle(0).unwrap());
        {
            let _stay = background.enter(|| {});
            assert!(sys::is_thread_idle(0).unwrap());
            assert!(background.keep_pace(Duration::from_secs(60)));
            assert!(sys::is_thread_idle(0).unwrap());
            let other = background.clone();
            assert!(!std::thread::spawn(move || other.keep_pace(Duration::ZERO)).join().unwrap());
            assert!(!sys::is_thread_idle(0).unwrap());
        }
        assert!(!sys::is_thread_idle(0).unwrap());
        drop(background.enter(|| {}));
        assert!(!sys::is_thread_idle(0).unwrap());
        // One that is not there is left alone.
        assert!(!background.keep_pace(Duration::ZERO));
    }
}
