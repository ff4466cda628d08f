//! What the ledger says, and whether it says it about every id exactly once.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};
use serde::Deserialize;

use super::ids;

/// How much users miss a behaviour that is not there.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
pub enum Tag {
    /// The mesh would be called broken.
    Core,
    /// Common.
    Expected,
    /// Rare.
    Advanced,
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Core => "core",
            Self::Expected => "expected",
            Self::Advanced => "advanced",
        })
    }
}

/// One behaviour: what it is, and how it is known to be there.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The behaviour in a few words.
    pub is: String,
    /// Regressions of others and traps may have none.
    pub tag: Option<Tag>,
    /// Every test that fails if the behaviour breaks.
    #[serde(default)]
    pub test: Vec<TestName>,
    /// Ours is another behaviour on purpose; the tests are of ours.
    pub differs: Option<String>,
    /// What of it no test shows yet.
    pub part: Option<String>,
    /// There is no such test, and why.
    pub later: Option<String>,
}

/// Ids that wait together.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Wait {
    /// Ids and spans of ids.
    ids: Vec<String>,
    later: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rows: BTreeMap<String, Row>,
    #[serde(default)]
    wait: Vec<Wait>,
}

/// Where a test is: `package::target::path`, with `lib` for the tests inside a library.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd)]
#[serde(try_from = "String")]
pub struct TestName {
    /// The package as cargo names it.
    pub package: String,
    /// The name of the binary or the file of tests; `lib` for the library.
    pub target: String,
    /// Modules and function, as the test runner prints them.
    pub path: String,
}

impl fmt::Display for TestName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}::{}::{}", self.package, self.target, self.path)
    }
}

impl FromStr for TestName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let mut parts = text.splitn(3, "::");
        match (parts.next(), parts.next(), parts.next()) {
            (Some(package), Some(target), Some(path)) if !path.is_empty() => {
                Ok(Self { package: package.to_owned(), target: target.to_owned(), path: path.to_owned() })
            }
            _ => bail!("{text:?} is no package::target::path"),
        }
    }
}

impl TryFrom<String> for TestName {
    type Error = anyhow::Error;

    fn try_from(text: String) -> anyhow::Result<Self> {
        text.parse()
    }
}

/// The whole ledger, in the order of ids.
#[derive(Clone, Debug)]
pub struct Ledger {
    /// Each id that has a line of its own.
    pub rows: Vec<(String, Row)>,
    /// Ids that wait together, as written, and why.
    pub waiting: Vec<(String, String)>,
}

/// The ledger, and what is wrong with it by itself.
///
/// # Errors
/// If it is not TOML of this shape; a key that is there twice is not.
pub fn parse(text: &str) -> anyhow::Result<(Ledger, Vec<String>)> {
    let file: File = toml::from_str(text).context("the ledger")?;
    let mut problems = Vec::new();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for (id, row) in &file.rows {
        *seen.entry(id.clone()).or_default() += 1;
        problems.extend(row_problem(id, row).map(|it| format!("{id}: {it}")));
    }
    for wait in &file.wait {
        for span in &wait.ids {
            let found =
                ids::expand(span).with_context(|| format!("the ledger: {span:?} is no span of ids"))?;
            for id in found {
                *seen.entry(id).or_default() += 1;
            }
        }
    }
    let every = ids::every();
    for id in &every {
        match seen.get(id) {
            Some(1) => {}
            Some(times) => problems.push(format!("{id} is in the ledger {times} times")),
            None => problems.push(format!("{id} is not in the ledger")),
        }
    }
    problems
        .extend(seen.keys().filter(|id| !every.contains(id)).map(|id| format!("{id}: there is no such id")));
    let mut rows: Vec<(String, Row)> = file.rows.into_iter().collect();
    rows.sort_by_key(|(id, _)| every.iter().position(|it| it == id));
    let waiting = file.wait.into_iter().map(|it| (it.ids.join(", "), it.later)).collect();
    Ok((Ledger { rows, waiting }, problems))
}

fn row_problem(id: &str, row: &Row) -> Option<&'static str> {
    match (row.test.is_empty(), &row.differs, &row.later) {
        (true, _, None) => Some("neither a test nor a reason why there is none"),
        (false, _, Some(_)) => Some("has tests and yet is for later"),
        (true, Some(_), Some(_)) => Some("cannot differ without a test"),
        (true, _, Some(_)) if row.part.is_some() => Some("has no test to show a part"),
        _ if row.tag.is_none() && ids::is_counted(id) => Some("has no tag"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every id but one waits; that one is as given.
    fn ledger_with(row: &str) -> String {
        format!(
            "[rows]\n{row}\n[[wait]]\nlater = \"not yet\"\nids = [\"C01-C85\", \"Z02-Z118\", \"W01-W77\", \"D01-D80\", \
             \"K01-K31\", \"H01-H20\", \"T01-T70\", \"U01-U57\", \"R01-R30\", \"TRAP1-TRAP22\"]\n"
        )
    }

    fn problems(text: &str) -> Vec<String> {
        parse(text).unwrap().1
    }

    #[test]
    fn a_ledger_of_every_id_passes() {
        let text =
            ledger_with(r#"Z01 = { is = "ports", tag = "core", test = ["culvert-a::lib::b::tests::c"] }"#);
        let (ledger, problems) = parse(&text).unwrap();
        assert_eq!(problems, Vec::<String>::new());
        let name = &ledger.rows[0].1.test[0];
        assert_eq!((&*name.package, &*name.target, &*name.path), ("culvert-a", "lib", "b::tests::c"));
    }

    #[test]
    fn ids_are_there_exactly_once() {
        let row = |id: &str| format!(r#"{id} = {{ is = "x", tag = "core", later = "y" }}"#);
        assert_eq!(problems(&ledger_with("")), ["Z01 is not in the ledger"]);
        let twice = [row("Z01"), row("Z02")].join("\n");
        assert_eq!(problems(&ledger_with(&twice)), ["Z02 is in the ledger 2 times"]);
        let unknown = [row("Z01"), row("Z119")].join("\n");
        assert_eq!(problems(&ledger_with(&unknown)), ["Z119: there is no such id"]);
        assert!(parse(&ledger_with(&[row("Z01"), row("Z01")].join("\n"))).is_err(), "one key twice");
    }

    #[test]
    fn a_row_says_one_thing() {
        for (row, wanted) in [
            (r#"is = "x", tag = "core""#, "Z01: neither a test nor a reason why there is none"),
            (
                r#"is = "x", tag = "core", test = ["a::b::c"], later = "y""#,
                "Z01: has tests and yet is for later",
            ),
            (r#"is = "x", tag = "core", differs = "z", later = "y""#, "Z01: cannot differ without a test"),
            (r#"is = "x", tag = "core", part = "z", later = "y""#, "Z01: has no test to show a part"),
            (r#"is = "x", later = "y""#, "Z01: has no tag"),
        ] {
            assert_eq!(problems(&ledger_with(&format!("Z01 = {{ {row} }}"))), [wanted]);
        }
    }

    #[test]
    fn another_shape_is_refused() {
        for row in [r#"later = "y""#, r#"is = "x", why = "y""#, r#"is = "x", test = ["only::two"]"#] {
            assert!(parse(&ledger_with(&format!("Z01 = {{ {row} }}"))).is_err(), "{row}");
        }
    }
}
