//! Finds tests in source, and the ids that they name beside themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::entries::TestName;
use super::ids;
use crate::targets::Targets;

/// One test function as it is written.
#[derive(Debug)]
struct Found {
    name: String,
    /// The modules opened around it in its file.
    modules: Vec<String>,
    /// The ids in its attributes, its doc comment and its body.
    ids: BTreeSet<String>,
}

/// A source file with tests.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    tests: Vec<Found>,
    /// The ids in comments that begin with `asserts`.
    asserted: BTreeSet<String>,
}

/// The sources of every target that the ledger names, read once each.
#[derive(Debug)]
pub struct Sources<'a> {
    targets: &'a Targets,
    read: BTreeMap<PathBuf, Vec<Source>>,
}

impl<'a> Sources<'a> {
    /// Nothing is read yet.
    pub fn new(targets: &'a Targets) -> Self {
        Self { targets, read: BTreeMap::new() }
    }

    /// What is wrong with the claim that this test asserts this id.
    ///
    /// # Errors
    /// If a source cannot be read.
    pub fn check(&mut self, id: &str, test: &TestName) -> anyhow::Result<Option<String>> {
        let Some(main) = self.targets.main_file(&test.package, &test.target) else {
            return Ok(Some(format!("{id}: {test}: no such package or target")));
        };
        // A target that is a directory of its own has its modules there; any other shares its directory.
        let dir = main.parent().unwrap_or(Path::new("")).to_owned();
        let of_its_own = main.file_name().is_some_and(|it| it == "main.rs" || it == "lib.rs");
        if !self.read.contains_key(&dir) {
            self.read.insert(dir.clone(), read_all(&dir)?);
        }
        let sources: Vec<&Source> =
            self.read[&dir].iter().filter(|it| of_its_own || it.path == main).collect();
        let mut modules: Vec<&str> = test.path.split("::").collect();
        let name = modules.pop().unwrap_or_default();
        let candidates: Vec<&Found> = sources
            .iter()
            .flat_map(|it| {
                it.tests.iter().filter(|test| test.name == name && it.leads_to(test, main, &modules))
            })
            .collect();
        if candidates.is_empty() {
            return Ok(Some(format!("{id}: {test}: no such test in the source")));
        }
        // Where a target is one test of many named checks, those name their ids.
        let alone = sources.iter().map(|it| it.tests.len()).sum::<usize>() == 1;
        let named = candidates.iter().any(|it| it.ids.contains(id))
            || alone && sources.iter().any(|it| it.asserted.contains(id));
        Ok((!named).then(|| format!("{id}: {test} does not name it")))
    }
}

impl Source {
    /// Whether these modules lead to a test in it: the last of them are opened around it, those before are the file's path.
    fn leads_to(&self, test: &Found, main: &Path, modules: &[&str]) -> bool {
        let Some((outer, inner)) =
            modules.len().checked_sub(test.modules.len()).and_then(|it| modules.split_at_checked(it))
        else {
            return false;
        };
        let mut parts: Vec<&str> = Vec::new();
        if self.path != main {
            let dir = main.parent().unwrap_or(Path::new(""));
            let relative = self.path.strip_prefix(dir).unwrap_or(&self.path);
            parts.extend(relative.iter().filter_map(|it| it.to_str()).map(|it| it.trim_end_matches(".rs")));
        }
        parts.retain(|it| *it != "mod");
        // `y_tests.rs` may be a module of its own, and is most often the module `tests` of `y.rs`.
        let mut of_tested = parts.clone();
        if let Some(tested) = parts.last().and_then(|it| it.strip_suffix("_tests")) {
            of_tested.pop();
            of_tested.extend([tested, "tests"]);
        }
        inner.iter().eq(test.modules.iter()) && (outer == parts || outer == of_tested)
    }
}

fn read_all(dir: &Path) -> anyhow::Result<Vec<Source>> {
    let mut sources = Vec::new();
    for file in crate::files(dir)? {
        if file.extension().is_some_and(|it| it == "rs") {
            let path = dir.join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            let tests = tests_in(&text);
            let asserted = text
                .lines()
                .filter_map(|line| line.trim_start().strip_prefix("// asserts "))
                .flat_map(ids::named)
                .collect();
            sources.push(Source { path, tests, asserted });
        }
    }
    Ok(sources)
}

/// Every test of a file that rustfmt has formatted.
fn tests_in(text: &str) -> Vec<Found> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    let mut open: Vec<(usize, &str)> = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        open.retain(|(outer, _)| !(*outer == indent && line.trim_start() == "}"));
        if let Some(module) = line.trim_start().strip_suffix(" {").and_then(|it| it.rsplit_once("mod ")) {
            open.push((indent, module.1));
        }
        let Some(attribute) = line.trim_start().strip_prefix("#[") else { continue };
        if !(attribute.starts_with("test]") || attribute.starts_with("tokio::test")) {
            continue;
        }
        let Some(offset) = lines[index..].iter().position(|it| function_name(it).is_some()) else { continue };
        let first = index + offset;
        let name = function_name(lines[first]).unwrap_or_default();
        let above = lines[..index].iter().rev().take_while(|it| is_beside(it)).count();
        let close = format!("{}}}", " ".repeat(indent));
        let end = match lines[first].ends_with('}') {
            true => first + 1,
            false => lines[first..].iter().position(|it| **it == close).map_or(lines.len(), |it| first + it),
        };
        let ids = ids::named(&lines[index - above..end].join("\n"));
        let modules = open.iter().map(|(_, name)| (*name).to_owned()).collect();
        found.push(Found { name: name.to_owned(), modules, ids });
    }
    found
}

fn is_beside(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("///") || line.starts_with("//") && !line.starts_with("//!") || line.starts_with("#[")
}

fn function_name(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let rest = line.strip_prefix("async ").unwrap_or(line).strip_prefix("fn ")?;
    rest.split(['(', '<']).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
//! Z75: of the whole file, which says nothing about one test.

/// Z01: of a function that is no test.
fn helper() {}

/// Z47, Z49: refused.
#[tokio::test(flavor = \"current_thread\")]
async fn refused() {
    // trap 5
    check(\"Z20: why\");
}

#[test]
fn silent() {}

mod tests {
    /// Z58-Z59.
    #[test]
    #[ignore]
    fn inner() {
        if true {
        }
        // Z60
    }

    // Z61 is not there yet.

    #[test]
    fn after() {
    }
}

macro! {
    #[test]
    fn outside() {
    }
}
";

    #[test]
    fn ids_are_those_beside_the_test() {
        let found: Vec<String> = tests_in(TEXT)
            .iter()
            .map(|it| {
                let ids: Vec<&str> = it.ids.iter().map(String::as_str).collect();
                format!("{}::{}: {}", it.modules.join("::"), it.name, ids.join(" "))
            })
            .collect();
        assert_eq!(
            found,
            [
                "::refused: TRAP5 Z20 Z47 Z49",
                "::silent: ",
                "tests::inner: Z58 Z59 Z60",
                "tests::after: ",
                "::outside: ",
            ]
        );
    }

    fn problem(id: &str, test: &str, files: &[(&str, &str)]) -> Option<String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let targets = Targets::for_tests(&[
            ("a", "lib", dir.path().join("a/src/lib.rs")),
            ("a", "many", dir.path().join("a/tests/many/main.rs")),
            ("a", "one", dir.path().join("a/tests/one.rs")),
        ]);
        Sources::new(&targets).check(id, &test.parse().unwrap()).unwrap()
    }

    #[test]
    fn a_test_is_found_in_its_module_only() {
        let files = [
            ("a/src/x.rs", "#[cfg(test)]\nmod tests {\n    /// Z01.\n    #[test]\n    fn same() {}\n}\n"),
            ("a/src/y.rs", "#[path = \"y_tests.rs\"]\nmod tests;\n"),
            ("a/src/y_tests.rs", "/// Z02.\n#[test]\nfn same() {}\n"),
        ];
        assert_eq!(problem("Z01", "a::lib::x::tests::same", &files), None);
        assert_eq!(problem("Z02", "a::lib::y::tests::same", &files), None);
        let wrong = problem("Z01", "a::lib::y::tests::same", &files).unwrap();
        assert_eq!(wrong, "Z01: a::lib::y::tests::same does not name it");
        let gone = problem("Z01", "a::lib::x::tests::gone", &files).unwrap();
        assert_eq!(gone, "Z01: a::lib::x::tests::gone: no such test in the source");
        let astray = problem("Z01", "a::lib::x::other::same", &files).unwrap();
        assert_eq!(astray, "Z01: a::lib::x::other::same: no such test in the source");
        let elsewhere = problem("Z01", "b::lib::same", &files).unwrap();
        assert_eq!(elsewhere, "Z01: b::lib::same: no such package or target");
    }

    #[test]
    fn a_test_of_many_checks_names_ids_at_the_checks() {
        let main = "mod more;\n#[test]\nfn all() {}\n";
        let more = "fn check() {\n    // asserts Z27, Z28\n}\n// Z29 is not asserted.\n";
        let files = [("a/tests/many/main.rs", main), ("a/tests/many/more.rs", more)];
        assert_eq!(problem("Z28", "a::many::all", &files), None);
        assert!(problem("Z29", "a::many::all", &files).is_some());
        let two = format!("{main}#[test]\nfn another() {{}}\n");
        let files = [("a/tests/many/main.rs", two.as_str()), ("a/tests/many/more.rs", more)];
        assert!(problem("Z28", "a::many::all", &files).is_some(), "whose check would it be?");
    }

    #[test]
    fn a_file_of_tests_does_not_lend_its_neighbours() {
        let files = [
            ("a/tests/one.rs", "#[test]\nfn mine() {}\n"),
            ("a/tests/two.rs", "/// Z01.\n#[test]\nfn mine() {}\n"),
        ];
        assert!(problem("Z01", "a::one::mine", &files).is_some());
    }
}
