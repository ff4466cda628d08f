//! The ledger of behaviours, `e2e/behaviour.toml`: what users of ambient meshes rely on, each with the tests that would fail
//! without it. A line may not claim more than there is: every named test has to be in the source, to name the behaviour there,
//! and to have run and passed.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::Context;

use crate::targets::Targets;

pub mod entries;
pub mod ids;
mod page;
pub mod results;
mod scan;

use entries::{Ledger, Tag};
use results::{Outcome, Results};

/// Where it is, and the page made of it.
const LEDGER: &str = "e2e/behaviour.toml";
const PAGE: &str = "docs/reference/behaviour.md";

/// What to check.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct Options {
    /// Do not look at results: the tests have not run yet
    #[arg(long)]
    no_results: bool,
    /// Write docs/reference/behaviour.md anew
    #[arg(long)]
    write: bool,
}

impl Options {
    /// What can be known from the source alone.
    pub const STATIC: Self = Self { no_results: true, write: false };
}

/// What the ledger claims and is not so. Prints the share of behaviours that were shown.
///
/// # Errors
/// If the ledger, a source or the results cannot be read.
pub fn check(root: &Path, options: Options) -> anyhow::Result<Vec<String>> {
    let path = root.join(LEDGER);
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let (ledger, mut problems) = entries::parse(&text)?;
    let targets = Targets::of(root)?;
    let mut sources = scan::Sources::new(&targets);
    for (id, row) in &ledger.rows {
        for test in &row.test {
            problems.extend(sources.check(id, test)?);
        }
    }
    problems.extend(stale_page(root, &page::write(&ledger), options.write)?);
    if !options.no_results {
        let results = Results::read(&targets.directory.join("tiers"), &targets)?;
        problems.extend(results.ambiguous.iter().cloned());
        problems.extend(not_shown(&ledger, &results));
        for share in shares(&ledger, &results) {
            println!("{share}");
            problems.extend(share.short_of());
        }
    }
    Ok(problems)
}

/// Whether the page is what the ledger says now; makes it so if asked to.
fn stale_page(root: &Path, wanted: &str, write: bool) -> anyhow::Result<Option<String>> {
    let path = root.join(PAGE);
    if write {
        fs::write(&path, wanted).with_context(|| format!("{}", path.display()))?;
        return Ok(None);
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    Ok((found != wanted)
        .then(|| format!("{PAGE} is stale: cargo run -p culvert-xtask -- ledger --write --no-results")))
}

/// Named tests that did not run to a good end, each once.
fn not_shown(ledger: &Ledger, results: &Results) -> Vec<String> {
    let mut problems = BTreeSet::new();
    for (id, row) in &ledger.rows {
        for test in &row.test {
            let what = match results.outcome(test) {
                Some(Outcome::Passed) => continue,
                Some(Outcome::Failed) => "failed",
                Some(Outcome::Ignored) => "was ignored",
                Some(Outcome::Unfinished) => "did not come to its end",
                None => "did not run",
            };
            problems.insert(format!("{id}: {test} {what}"));
        }
    }
    problems.into_iter().collect()
}

/// How many behaviours of one importance a test has shown, over what counts.
#[derive(Debug, PartialEq, Eq)]
struct Share {
    tag: Tag,
    rows: usize,
    whole: usize,
    part: usize,
}

impl Share {
    /// The least share of behaviours shown in full, percent. What is advanced may wait.
    fn least(&self) -> usize {
        match self.tag {
            Tag::Core => 95,
            Tag::Expected => 85,
            Tag::Advanced => 0,
        }
    }

    fn short_of(&self) -> Option<String> {
        (self.whole * 100 < self.least() * self.rows).then(|| {
            format!(
                "{} of {} {} behaviours are shown; at least {} % must be",
                self.whole,
                self.rows,
                self.tag,
                self.least()
            )
        })
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tag, rows, whole, part } = self;
        let percent = |shown: usize| 100.0 * shown as f64 / (*rows).max(1) as f64;
        write!(
            f,
            "ledger   {tag:<9} {rows:>3} behaviours: tests that ran show {whole:>3} ({:.1} %), and parts of {part:>2} ({:.1} %)",
            percent(*whole),
            percent(whole + part)
        )
    }
}

fn shares(ledger: &Ledger, results: &Results) -> Vec<Share> {
    [Tag::Core, Tag::Expected, Tag::Advanced]
        .into_iter()
        .map(|tag| {
            let rows: Vec<_> =
                ledger.rows.iter().filter(|(id, row)| ids::is_counted(id) && row.tag == Some(tag)).collect();
            let ran = |row: &entries::Row| {
                !row.test.is_empty() && row.test.iter().all(|it| results.outcome(it) == Some(Outcome::Passed))
            };
            let whole = rows.iter().filter(|(_, row)| ran(row) && row.part.is_none()).count();
            let part = rows.iter().filter(|(_, row)| ran(row) && row.part.is_some()).count();
            Share { tag, rows: rows.len(), whole, part }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_stale_until_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("docs/reference")).unwrap();
        assert!(stale_page(dir.path(), "new", false).unwrap().is_some());
        assert_eq!(stale_page(dir.path(), "new", true).unwrap(), None);
        assert_eq!(stale_page(dir.path(), "new", false).unwrap(), None);
        assert!(stale_page(dir.path(), "newer", false).unwrap().is_some());
    }

    #[test]
    fn a_test_that_did_not_pass_shows_nothing() {
        let rows = r#"
            Z01 = { is = "a", tag = "core", test = ["a::live::good"] }
            Z02 = { is = "b", tag = "core", test = ["a::live::good", "a::live::bad"] }
            Z03 = { is = "c", tag = "expected", test = ["a::live::never"], differs = "d" }
            Z04 = { is = "e", tag = "core", later = "f" }
            Z05 = { is = "g", tag = "core", test = ["a::live::good"], part = "h" }
            W01 = { is = "not counted", tag = "core", test = ["a::live::good"] }
        "#;
        let (ledger, _) = entries::parse(&format!("[rows]\n{rows}")).unwrap();
        let targets = Targets::for_tests(&[("a", "live", "/r/a/tests/live.rs".into())]);
        let dir = tempfile::tempdir().unwrap();
        let log = "Running tests/live.rs (d/live-00)\ntest good ... ok\ntest bad ... FAILED\n";
        fs::write(dir.path().join("unit.log"), log).unwrap();
        let results = Results::read(dir.path(), &targets).unwrap();
        assert_eq!(
            not_shown(&ledger, &results),
            ["Z02: a::live::bad failed", "Z03: a::live::never did not run"]
        );
        let shares = shares(&ledger, &results);
        assert_eq!(
            shares.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [
                "ledger   core        4 behaviours: tests that ran show   1 (25.0 %), and parts of  1 (50.0 %)",
                "ledger   expected    1 behaviours: tests that ran show   0 (0.0 %), and parts of  0 (0.0 %)",
                "ledger   advanced    0 behaviours: tests that ran show   0 (0.0 %), and parts of  0 (0.0 %)",
            ]
        );
        assert_eq!(
            shares.iter().map(Share::short_of).collect::<Vec<_>>(),
            [
                Some("1 of 4 core behaviours are shown; at least 95 % must be".to_owned()),
                Some("0 of 1 expected behaviours are shown; at least 85 % must be".to_owned()),
                None,
            ]
        );
    }

    #[test]
    fn a_share_is_enough_from_its_bound_on() {
        let share = |whole| Share { tag: Tag::Core, rows: 20, whole, part: 20 - whole };
        assert!(share(18).short_of().is_some());
        assert_eq!(share(19).short_of(), None);
    }

    #[test]
    fn this_ledger_claims_nothing_that_the_tests_do_not_say() {
        assert_eq!(check(&crate::root(), Options::STATIC).unwrap(), Vec::<String>::new());
    }
}
