//! When a failed attempt may be repeated.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use culvert_model::route::Retry;
use http::{Method, StatusCode};

/// Attempts that a rule may ask for in all; more would only be traffic.
const MAX_ATTEMPTS: u32 = 20;
/// Longest wait between attempts.
const MAX_BACKOFF: Duration = Duration::from_secs(10);
/// Where a rule names none.
const DEFAULT_BACKOFF: Duration = Duration::from_millis(25);
/// Repetitions that may be made beyond the budget's share: a service with few requests must be able to repeat one.
const FREE: u64 = 10;
/// One repetition for so many requests: 20 % more traffic at most.
const EVERY: u64 = 5;

/// Requests and their repetitions, of one worker. When everything fails, repeating everything makes it worse.
///
/// Both halve from time to time, so that it is about the last thousands of requests.
#[derive(Debug, Default)]
pub struct Budget {
    requests: AtomicU64,
    repeated: AtomicU64,
}

impl Budget {
    /// A request came.
    pub fn request(&self) {
        if self.requests.fetch_add(1, Ordering::Relaxed) >= 10_000 {
            self.requests.store(5_000, Ordering::Relaxed);
            self.repeated.store(self.repeated.load(Ordering::Relaxed) / 2, Ordering::Relaxed);
        }
    }

    /// Takes one repetition, if there is one.
    pub fn take(&self) -> bool {
        let allowed = self.requests.load(Ordering::Relaxed) / EVERY + FREE;
        if self.repeated.load(Ordering::Relaxed) >= allowed {
            return false;
        }
        self.repeated.fetch_add(1, Ordering::Relaxed);
        true
    }
}

/// How many attempts may follow the first.
pub fn attempts(retry: Option<&Retry>) -> u32 {
    retry.map_or(0, |retry| retry.attempts.min(MAX_ATTEMPTS))
}

/// Whether a response with this status counts as failed.
pub fn failed(retry: Option<&Retry>, status: StatusCode) -> bool {
    retry.is_some_and(|retry| retry.codes.contains(&status))
}

/// How long to wait before the repetition of this number, from 1: twice as long each time, between half and all of that at random.
pub fn backoff(retry: &Retry, number: u32) -> Duration {
    let first = if retry.backoff.is_zero() { DEFAULT_BACKOFF } else { retry.backoff };
    let most = first.saturating_mul(1 << number.saturating_sub(1).min(10)).min(MAX_BACKOFF.max(first));
    most.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Whether doing it twice is as good as doing it once (RFC 9110 section 9.2.2).
pub fn is_idempotent(method: &Method) -> bool {
    matches!(
        *method,
        Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_a_share() {
        let budget = Budget::default();
        assert_eq!((0..100).filter(|_| budget.take()).count(), 10, "the free ones");
        for _ in 0..100 {
            budget.request();
        }
        assert_eq!((0..100).filter(|_| budget.take()).count(), 20);
    }

    #[test]
    fn waits_grow_and_end() {
        let retry = Retry { attempts: 9, codes: Vec::new(), backoff: Duration::from_millis(100) };
        for (number, most) in [(1, 100), (2, 200), (4, 800), (100, 10_000)] {
            let wait = backoff(&retry, number);
            let most = Duration::from_millis(most);
            assert!(wait <= most && wait >= most / 2, "{number}: {wait:?}");
        }
    }
}
