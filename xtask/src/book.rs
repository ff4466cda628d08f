//! Every page of the book is in its table of contents, and every link between files leads somewhere.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::Context;

/// Pages that nobody can find, and links that lead nowhere, in every Markdown file.
///
/// # Errors
/// If a file cannot be read.
pub fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let files = crate::files(root)?;
    let pages: Vec<&PathBuf> =
        files.iter().filter(|it| it.extension().is_some_and(|it| it == "md")).collect();
    let mut problems = Vec::new();
    let mut listed = BTreeSet::new();
    for page in pages.iter().copied() {
        let path = root.join(page);
        let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        for link in links(&text) {
            let target = resolve(page, &link);
            if !root.join(&target).exists() {
                problems.push(format!("{}: no file at {link}", page.display()));
            } else if page.as_path() == Path::new("docs/SUMMARY.md") && !listed.insert(target) {
                problems.push(format!("docs/SUMMARY.md lists {link} twice"));
            }
        }
    }
    for page in pages {
        if page.starts_with("docs") && !page.ends_with("SUMMARY.md") && !listed.contains(page) {
            problems.push(format!("{}: not in docs/SUMMARY.md", page.display()));
        }
    }
    Ok(problems)
}

/// The targets of links within the repository, without their anchors. Code is left out.
fn links(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut in_block = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
            continue;
        }
        if in_block {
            continue;
        }
        // Parts between backticks alternate with those outside.
        let outside: String = line.split('`').step_by(2).collect::<Vec<_>>().join("`");
        for part in outside.split("](").skip(1) {
            let Some((target, _)) = part.split_once(')') else { continue };
            let target = target.split('#').next().unwrap_or_default();
            if !target.is_empty() && !target.contains("://") && !target.starts_with("mailto:") {
                found.push(target.to_owned());
            }
        }
    }
    found
}

/// A link as a path from the root.
fn resolve(page: &Path, link: &str) -> PathBuf {
    let mut path = page.parent().unwrap_or(Path::new("")).to_owned();
    for part in Path::new(link).components() {
        match part {
            Component::ParentDir => {
                path.pop();
            }
            Component::Normal(part) => path.push(part),
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(files: &[(&str, &str)]) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        check(dir.path()).unwrap()
    }

    #[test]
    fn a_whole_book_passes() {
        let problems = book(&[
            ("README.md", "[book](docs/SUMMARY.md), [web](https://example.com), [here](#here)"),
            ("docs/SUMMARY.md", "- [one](a/one.md)"),
            ("docs/a/one.md", "[home](../../README.md#top) `[code](none.md)`\n```\n[block](none.md)\n```\n"),
        ]);
        assert_eq!(problems, Vec::<String>::new());
    }

    #[test]
    fn a_link_to_nothing_and_a_page_nobody_lists_are_named() {
        let problems = book(&[
            ("docs/SUMMARY.md", "- [one](one.md)\n- [one](one.md)"),
            ("docs/one.md", "[gone](gone.md)"),
            ("docs/lost.md", ""),
        ]);
        assert_eq!(
            problems,
            [
                "docs/SUMMARY.md lists one.md twice",
                "docs/one.md: no file at gone.md",
                "docs/lost.md: not in docs/SUMMARY.md"
            ]
        );
    }

    #[test]
    fn this_book_is_whole() {
        assert_eq!(check(&crate::root()).unwrap(), Vec::<String>::new());
    }
}
