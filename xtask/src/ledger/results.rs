//! Reads what `cargo test` printed: which tests ran, and how each ended.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Context;

use super::entries::TestName;
use crate::targets::Targets;

/// How a test ended.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Outcome {
    /// It was there and was not run.
    Ignored,
    /// It passed.
    Passed,
    /// It began and its end was never printed.
    Unfinished,
    /// It failed.
    Failed,
}

/// Every test of the logs. One that ran twice ended as its worse run did; one that was ignored in one run and ran in another ran.
#[derive(Debug, Default)]
pub struct Results {
    outcomes: BTreeMap<TestName, Outcome>,
    /// Targets of several packages that a log does not tell apart.
    pub ambiguous: Vec<String>,
}

impl Results {
    /// Everything in a directory's `*.log`.
    ///
    /// # Errors
    /// If the directory or a log cannot be read, or there is none.
    pub fn read(dir: &Path, targets: &Targets) -> anyhow::Result<Self> {
        let mut results = Self::default();
        let mut logs = 0;
        for entry in fs::read_dir(dir).with_context(|| format!("no results in {}", dir.display()))? {
            let path = entry?.path();
            if path.extension().is_some_and(|it| it == "log") {
                // Programs under test print what they like.
                let bytes = fs::read(&path).with_context(|| format!("{}", path.display()))?;
                results.add(&String::from_utf8_lossy(&bytes), targets);
                logs += 1;
            }
        }
        anyhow::ensure!(logs > 0, "no results in {}", dir.display());
        Ok(results)
    }

    /// How a test ended, if it was there.
    pub fn outcome(&self, test: &TestName) -> Option<Outcome> {
        self.outcomes.get(test).copied()
    }

    fn add(&mut self, log: &str, targets: &Targets) {
        let mut of: Option<(&str, &str)> = None;
        let mut pending: Option<TestName> = None;
        let mut in_failures = false;
        for line in log.lines() {
            let line = plain(line);
            let line = line.trim_end();
            if let Some((file, built)) = running(line) {
                self.end(pending.take(), Outcome::Unfinished);
                in_failures = false;
                let called = targets.called(Path::new(file), built);
                if called.len() > 1 {
                    self.ambiguous.push(format!("{file} is in {} packages: rename one", called.len()));
                }
                of = called.first().copied().filter(|_| called.len() == 1);
            } else if line.starts_with("test result: ") || line.trim_start().starts_with("Doc-tests ") {
                self.end(pending.take(), Outcome::Unfinished);
                in_failures = false;
                if !line.starts_with("test result: ") {
                    of = None;
                }
            } else if line == "failures:" {
                in_failures = true;
            } else if let (Some((package, target)), Some((path, rest))) = (of, begun(line)) {
                self.end(pending.take(), Outcome::Unfinished);
                let test = TestName {
                    package: package.to_owned(),
                    target: target.to_owned(),
                    path: path.strip_suffix(" - should panic").unwrap_or(path).to_owned(),
                };
                match outcome(rest) {
                    Some(outcome) => self.end(Some(test), outcome),
                    None => pending = Some(test),
                }
            } else if let (true, Some((package, target)), Some(path)) =
                (in_failures, of, line.strip_prefix("    "))
            {
                let (package, target, path) = (package.to_owned(), target.to_owned(), path.to_owned());
                let test = TestName { package, target, path };
                if self.outcomes.contains_key(&test) {
                    self.end(Some(test), Outcome::Failed);
                }
            } else if let Some(outcome) = outcome(line).filter(|_| pending.is_some()) {
                // What the test's programs printed came between its name and its end.
                self.end(pending.take(), outcome);
            }
        }
        self.end(pending, Outcome::Unfinished);
    }

    fn end(&mut self, test: Option<TestName>, outcome: Outcome) {
        if let Some(test) = test {
            let worst = self.outcomes.entry(test).or_insert(outcome);
            *worst = outcome.max(*worst);
        }
    }
}

/// `     Running tests/x.rs (target/debug/deps/x-0123456789abcdef)`: the file and the name of what was built.
fn running(line: &str) -> Option<(&str, &str)> {
    let rest = line.trim_start().strip_prefix("Running ")?;
    let (file, built) =
        rest.strip_prefix("unittests ").unwrap_or(rest).strip_suffix(')')?.split_once(" (")?;
    let (_, built) = built.rsplit_once('/')?;
    Some((file, built.rsplit_once('-')?.0))
}

/// `test a::b ... ` and what follows.
fn begun(line: &str) -> Option<(&str, &str)> {
    line.strip_prefix("test ")?.split_once(" ...").map(|(path, rest)| (path, rest.trim_start()))
}

/// The last word, if it is how a test ends.
fn outcome(rest: &str) -> Option<Outcome> {
    // A test that takes long or is timed has more after the word.
    match rest.split(" <").next().unwrap_or(rest) {
        "ok" => Some(Outcome::Passed),
        "FAILED" => Some(Outcome::Failed),
        text if text == "ignored" || text.starts_with("ignored, ") => Some(Outcome::Ignored),
        _ => None,
    }
}

/// Without the escapes that colour it.
fn plain(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let end = part.find(|c: char| c.is_ascii_alphabetic()).map_or(part.len(), |it| it + 1);
        text.push_str(&part[end..]);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn targets() -> Targets {
        Targets::for_tests(&[
            ("culvert-a", "lib", PathBuf::from("/r/a/src/lib.rs")),
            ("culvert-a", "prog", PathBuf::from("/r/a/src/main.rs")),
            ("culvert-a", "live", PathBuf::from("/r/a/tests/live.rs")),
            ("culvert-b", "lib", PathBuf::from("/r/b/src/lib.rs")),
            ("culvert-b", "deep", PathBuf::from("/r/b/tests/deep/main.rs")),
        ])
    }

    fn results(logs: &[&str]) -> Results {
        let mut results = Results::default();
        for log in logs {
            results.add(log, &targets());
        }
        results
    }

    fn of(results: &Results, test: &str) -> Option<Outcome> {
        results.outcome(&test.parse().unwrap())
    }

    const LOG: &str = "\
   Compiling culvert-a v0.1.0
     Running unittests src/lib.rs (target/debug/deps/culvert_a-0123456789abcdef)

running 4 tests
test x::tests::good ... ok
test x::tests::bad ... FAILED
test x::tests::left_out ... ignored, takes long
test x::tests::dies - should panic ... ok

failures:

---- x::tests::bad stdout ----
a reason

failures:
    x::tests::bad

test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s

     Running tests/deep/main.rs (/elsewhere/target/release/deps/deep-fedcba9876543210)

running 2 tests
test noisy ... a program says: test it ...
ok
test \u{1b}[1mcut\u{1b}[0m ... ";

    #[test]
    fn every_end_is_read() {
        let results = results(&[LOG]);
        for (test, outcome) in [
            ("culvert-a::lib::x::tests::good", Some(Outcome::Passed)),
            ("culvert-a::lib::x::tests::bad", Some(Outcome::Failed)),
            ("culvert-a::lib::x::tests::left_out", Some(Outcome::Ignored)),
            ("culvert-a::lib::x::tests::dies", Some(Outcome::Passed)),
            ("culvert-b::deep::noisy", Some(Outcome::Passed)),
            ("culvert-b::deep::cut", Some(Outcome::Unfinished)),
            ("culvert-b::lib::x::tests::good", None),
            ("culvert-a::prog::x::tests::good", None),
        ] {
            assert_eq!(of(&results, test), outcome, "{test}");
        }
    }

    #[test]
    fn what_a_test_is_listed_to_have_failed_with_counts() {
        let log = "Running tests/live.rs (d/live-00)\ntest one ... noise ok\nok\n\nfailures:\n    one\n\ntest result: FAILED.\n";
        assert_eq!(of(&results(&[log]), "culvert-a::live::one"), Some(Outcome::Failed));
    }

    #[test]
    fn the_worse_of_two_runs_counts_and_a_run_beats_none() {
        let log = |end: &str| format!("Running tests/live.rs (d/live-00)\ntest one ... {end}\n");
        let both = |a: &str, b: &str| of(&results(&[&log(a), &log(b)]), "culvert-a::live::one");
        assert_eq!(both("ok", "FAILED"), Some(Outcome::Failed));
        assert_eq!(both("FAILED", "ok"), Some(Outcome::Failed));
        assert_eq!(both("ignored", "ok"), Some(Outcome::Passed));
    }

    #[test]
    fn two_packages_with_one_file_are_not_told_apart() {
        let targets = Targets::for_tests(&[
            ("culvert-a", "live", PathBuf::from("/r/a/tests/live.rs")),
            ("culvert-b", "live", PathBuf::from("/r/b/tests/live.rs")),
        ]);
        let mut results = Results::default();
        results.add("Running tests/live.rs (d/live-00)\ntest one ... ok\n", &targets);
        assert_eq!(results.ambiguous, ["tests/live.rs is in 2 packages: rename one"]);
        assert_eq!(of(&results, "culvert-a::live::one"), None);
    }

    #[test]
    fn doc_tests_belong_to_nobody() {
        let log = "Running tests/live.rs (d/live-00)\n   Doc-tests culvert_a\ntest one ... ok\n";
        assert_eq!(of(&results(&[log]), "culvert-a::live::one"), None);
    }

    #[test]
    fn a_directory_without_logs_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Results::read(dir.path(), &targets()).is_err());
        fs::write(dir.path().join("unit.log"), LOG).unwrap();
        assert!(Results::read(dir.path(), &targets()).is_ok());
    }
}
