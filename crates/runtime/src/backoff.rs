//! Exponential backoff with jitter, from an injected source of randomness.

use std::time::Duration;

/// The shape of a backoff.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// The first delay.
    pub min: Duration,
    /// No delay is longer.
    pub max: Duration,
    /// Growth from one delay to the next; at least 1.
    pub factor: f64,
}

/// The delays between attempts of one thing.
///
/// The n-th delay is drawn evenly from the upper half of `min * factor^n`, cut at `max`: half of it keeps many clients
/// that lost the same server from returning in step, the other half keeps one of them from hammering.
#[derive(Debug, Clone)]
pub struct Backoff {
    bounds: Bounds,
    ceiling: Duration,
    random: fastrand::Rng,
}

impl Bounds {
    /// Bounds with a growth of 2.
    #[must_use]
    pub const fn doubling(min: Duration, max: Duration) -> Self {
        Self { min, max, factor: 2.0 }
    }
}

impl Backoff {
    /// A fresh backoff. Bounds that make no sense are mended rather than refused: `max` is at least `min`, and a factor
    /// below 1 (or not a number) counts as 1.
    #[must_use]
    pub fn new(bounds: Bounds, random: fastrand::Rng) -> Self {
        let factor = if bounds.factor >= 1.0 { bounds.factor } else { 1.0 };
        let bounds = Bounds { max: bounds.max.max(bounds.min), factor, ..bounds };
        Self { bounds, ceiling: bounds.min, random }
    }

    /// The delay before the next attempt: from `min / 2` to `max`.
    pub fn next_delay(&mut self) -> Duration {
        let ceiling = self.ceiling;
        let grown = ceiling.as_secs_f64() * self.bounds.factor;
        self.ceiling = Duration::try_from_secs_f64(grown).unwrap_or(self.bounds.max).min(self.bounds.max);
        ceiling.mul_f64(0.5 + self.random.f64() / 2.0)
    }

    /// Starts over at `min`; to be called once an attempt has held, not merely connected.
    pub fn reset(&mut self) {
        self.ceiling = self.bounds.min;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Z98.
    #[test]
    fn grows_to_the_limit_and_starts_over() {
        let bounds = Bounds::doubling(Duration::from_millis(10), Duration::from_secs(15));
        let mut backoff = Backoff::new(bounds, fastrand::Rng::with_seed(1));
        for ceiling in [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000] {
            let ceiling = Duration::from_millis(ceiling);
            let delay = backoff.next_delay();
            assert!(delay >= ceiling / 2 && delay <= ceiling, "{delay:?} for {ceiling:?}");
        }
        backoff.reset();
        assert!(backoff.next_delay() <= bounds.min);
    }

    #[test]
    fn the_same_seed_gives_the_same_delays() {
        let bounds = Bounds::doubling(Duration::from_millis(10), Duration::from_secs(1));
        let delays = |seed| {
            let mut backoff = Backoff::new(bounds, fastrand::Rng::with_seed(seed));
            std::iter::repeat_with(move || backoff.next_delay()).take(8).collect::<Vec<_>>()
        };
        assert_eq!(delays(7), delays(7));
        assert_ne!(delays(7), delays(8));
    }

    proptest! {
        #[test]
        fn never_leaves_its_bounds(min in 0u64..10_000, max in 0u64..100_000, factor in prop::num::f64::ANY, seed: u64) {
            let (min, max) = (Duration::from_millis(min), Duration::from_millis(max));
            let mut backoff = Backoff::new(Bounds { min, max, factor }, fastrand::Rng::with_seed(seed));
            for _ in 0..40 {
                let delay = backoff.next_delay();
                prop_assert!(delay >= min / 2 && delay <= max.max(min));
            }
        }
    }
}
