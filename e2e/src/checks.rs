//! Many named checks in one test: a world takes seconds to start, so it serves all that fit in it, and one failure does
//! not hide the next.

use std::time::Instant;

use anyhow::Result;

/// Collects outcomes; [`Checks::finish`] fails the test if any check did.
#[derive(Debug, Default)]
pub struct Checks {
    passed: usize,
    failed: Vec<String>,
}

impl Checks {
    /// Runs one check and prints its outcome.
    pub fn check(&mut self, name: &str, check: impl FnOnce() -> Result<()>) {
        let started = Instant::now();
        let outcome = check();
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                println!("ok      {name} ({seconds:.1} s)");
                self.passed += 1;
            }
            Err(error) => {
                println!("FAILED  {name} ({seconds:.1} s): {error:#}");
                self.failed.push(format!("{name}: {error:#}"));
            }
        }
    }

    /// The end of the test.
    ///
    /// # Panics
    /// If a check failed, with every failure; or if there was none at all.
    pub fn finish(self) {
        println!("{} passed, {} failed", self.passed, self.failed.len());
        assert!(self.failed.is_empty(), "failed checks:\n  {}", self.failed.join("\n  "));
        assert!(self.passed > 0, "nothing was checked");
    }
}
