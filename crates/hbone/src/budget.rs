//! A bound on what all stalled readers of the process together make it hold.
//!
//! A stream whose reader does not keep up holds its window's worth at most, 1 MiB by default; a thousand of them hold a GiB. So
//! every stream that holds bytes is charged with its window, and while the charges exceed the budget, connections offer
//! [`SMALL_WINDOW`] instead. A stream that keeps up holds bytes for the moment between two polls only and is hardly ever
//! counted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

/// Window of a stream while the budget is used up: four TLS records. 10,000 more stalled streams hold 640 MB then.
pub const SMALL_WINDOW: u32 = 64 << 10;
/// What the process's budget is unless said otherwise: 512 streams of the default window that stall at the same time.
pub const DEFAULT_LIMIT: u64 = 512 << 20;

static PROCESS: LazyLock<Budget> = LazyLock::new(|| Budget::new(DEFAULT_LIMIT));

/// Bytes that streams may hold. Cheap to clone; clones are one budget.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    limit: u64,
    charged: AtomicU64,
    tight: AtomicBool,
}

/// What one stream is charged with.
#[derive(Debug, Default)]
pub(crate) struct Charge(u32);

impl Budget {
    /// A budget of its own, in bytes.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self(Arc::new(Inner { limit, charged: AtomicU64::new(0), tight: AtomicBool::new(false) }))
    }

    /// The one that connections share unless told otherwise.
    #[must_use]
    pub fn of_process() -> Self {
        PROCESS.clone()
    }

    /// Windows of the streams that hold bytes now: an upper bound of what they hold.
    #[must_use]
    pub fn charged(&self) -> u64 {
        self.0.charged.load(Ordering::Relaxed)
    }

    /// The most that may be charged before windows shrink.
    #[must_use]
    pub fn limit(&self) -> u64 {
        self.0.limit
    }

    /// True from when more than the limit is charged until less than half of it is, so that windows do not flutter.
    #[must_use]
    pub fn is_tight(&self) -> bool {
        self.0.tight.load(Ordering::Relaxed)
    }

    pub(crate) fn charge(&self, charge: &mut Charge, window: u32) {
        if charge.0 == 0 {
            charge.0 = window;
            let before = self.0.charged.fetch_add(window.into(), Ordering::Relaxed);
            if before + u64::from(window) > self.0.limit {
                self.0.tight.store(true, Ordering::Relaxed);
            }
        }
    }

    pub(crate) fn refund(&self, charge: &mut Charge) {
        let window = u64::from(std::mem::take(&mut charge.0));
        if window > 0 {
            let before = self.0.charged.fetch_sub(window, Ordering::Relaxed);
            if before - window < self.0.limit / 2 {
                self.0.tight.store(false, Ordering::Relaxed);
            }
        }
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::of_process()
    }
}

impl PartialEq for Budget {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Budget {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tight_above_the_limit_until_below_half() {
        let budget = Budget::new(100);
        let mut charges: [Charge; 4] = Default::default();
        for charge in &mut charges[..2] {
            budget.charge(charge, 50);
            budget.charge(charge, 50);
        }
        assert_eq!((budget.charged(), budget.is_tight()), (100, false), "once for each stream");
        budget.charge(&mut charges[2], 1);
        assert!(budget.is_tight());
        budget.refund(&mut charges[0]);
        assert!(budget.is_tight(), "51 is more than half");
        budget.refund(&mut charges[2]);
        budget.refund(&mut charges[2]);
        assert!(budget.is_tight(), "50 is not less than half");
        budget.refund(&mut charges[1]);
        assert_eq!((budget.charged(), budget.is_tight()), (0, false));
    }
}
