//! What `cargo mutants` found: a mutant that no test notices is a line that no test holds. Most must be noticed, and those that
//! are not stand in `e2e/mutants.toml` with a reason.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde::Deserialize;

/// Survivors, each with its reason.
const LIST: &str = "e2e/mutants.toml";
/// The least share that tests must notice, percent.
const LEAST: usize = 90;

/// Which outcomes to look at.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Directories that `cargo mutants -o` wrote, each with all mutants of its files
    #[arg(required = true)]
    outcomes: Vec<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    survivors: BTreeMap<String, String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    noticed: usize,
    survived: BTreeMap<String, usize>,
}

/// Too few noticed, a survivor without a reason, or a reason for what does not survive. Prints the share.
///
/// # Errors
/// If the list or an outcome cannot be read, or nothing was tried.
pub fn check(root: &Path, options: &Options) -> anyhow::Result<Vec<String>> {
    let path = root.join(LIST);
    let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
    let list: List = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
    let mut counts = Counts::default();
    for directory in &options.outcomes {
        counts.read(directory)?;
    }
    judge(&counts, &list)
}

fn judge(counts: &Counts, list: &List) -> anyhow::Result<Vec<String>> {
    let survived: usize = counts.survived.values().sum();
    let all = counts.noticed + survived;
    ensure!(all > 0, "no mutant was tried");
    println!(
        "mutants  {all} tried, {} noticed ({:.1} %), {survived} survived",
        counts.noticed,
        100.0 * counts.noticed as f64 / all as f64
    );
    let mut problems = Vec::new();
    if counts.noticed * 100 < LEAST * all {
        problems
            .push(format!("tests notice {} of {all} mutants; at least {LEAST} % must be", counts.noticed));
    }
    let found: BTreeSet<_> = counts.survived.keys().collect();
    let listed: BTreeSet<_> = list.survivors.keys().collect();
    problems.extend(found.difference(&listed).map(|it| format!("survives, and {LIST} has no reason: {it}")));
    problems.extend(listed.difference(&found).map(|it| format!("{LIST} lists what does not survive: {it}")));
    problems.extend(
        list.survivors
            .iter()
            .filter(|(_, why)| why.trim().is_empty())
            .map(|(it, _)| format!("{LIST}: no reason: {it}")),
    );
    Ok(problems)
}

impl Counts {
    /// A mutant that made the tests hang was noticed; one that does not compile was not tried.
    fn read(&mut self, directory: &Path) -> anyhow::Result<()> {
        let directory = directory.join("mutants.out");
        let lines = |name: &str| {
            let path = directory.join(name);
            let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            anyhow::Ok(text.lines().map(without_place).collect::<Vec<_>>())
        };
        self.noticed += lines("caught.txt")?.len() + lines("timeout.txt")?.len();
        for mutant in lines("missed.txt")? {
            *self.survived.entry(mutant).or_default() += 1;
        }
        Ok(())
    }
}

/// `src/a.rs:12:5: replace ...` without line and column, which every edit above would change.
fn without_place(line: &str) -> String {
    let mut parts = line.splitn(4, ':');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(file), Some(_), Some(_), Some(what)) => format!("{file}:{what}"),
        _ => line.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(caught: &str, timeout: &str, missed: &str) -> Counts {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("mutants.out");
        fs::create_dir(&out).unwrap();
        for (name, text) in [("caught.txt", caught), ("timeout.txt", timeout), ("missed.txt", missed)] {
            fs::write(out.join(name), text).unwrap();
        }
        let mut counts = Counts::default();
        counts.read(dir.path()).unwrap();
        counts
    }

    fn list(text: &str) -> List {
        toml::from_str(&format!("[survivors]\n{text}")).unwrap()
    }

    #[test]
    fn what_survives_needs_a_reason_and_a_reason_a_survivor() {
        let caught = (0..18).map(|n| format!("a.rs:{n}:1: replace b\n")).collect::<String>();
        let found = counts(&caught, "a.rs:1:2: replace with loop\n", "a.rs:3:9: replace c with d\n");
        let known = r#""a.rs: replace c with d" = "the same by arithmetic""#;
        assert_eq!(judge(&found, &list(known)).unwrap(), Vec::<String>::new());
        let problems = judge(&found, &list(r#""a.rs: replace e" = " ""#)).unwrap();
        assert_eq!(
            problems,
            [
                "survives, and e2e/mutants.toml has no reason: a.rs: replace c with d",
                "e2e/mutants.toml lists what does not survive: a.rs: replace e",
                "e2e/mutants.toml: no reason: a.rs: replace e",
            ]
        );
    }

    #[test]
    fn nine_of_ten_must_be_noticed() {
        let known = r#""a.rs: x" = "y""#;
        let nine = (0..9).map(|n| format!("a.rs:{n}:1: b\n")).collect::<String>();
        assert!(judge(&counts(&nine, "", "a.rs:1:1: x\n"), &list(known)).unwrap().is_empty());
        let found = judge(&counts(&nine, "", "a.rs:1:1: x\na.rs:2:1: x\n"), &list(known)).unwrap();
        assert_eq!(found, ["tests notice 9 of 11 mutants; at least 90 % must be"]);
        assert!(judge(&counts("", "", ""), &List::default()).is_err());
    }
}
