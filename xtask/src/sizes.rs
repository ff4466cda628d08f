//! No file is too long to read in one sitting.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// Lines a file that people write may have. New files aim at 400; this is where it stops.
pub const LIMIT: usize = 700;

/// What people write; everything else is data or generated.
const WRITTEN: [&str; 9] = ["rs", "go", "proto", "sh", "py", "md", "toml", "yaml", "yml"];

/// A table that is looked up by id, not read.
const TABLE: &str = "e2e/behaviour.toml";

/// The files over [`LIMIT`].
///
/// # Errors
/// If a file cannot be read.
pub fn check(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    for file in crate::files(root)? {
        let written = file.extension().and_then(|it| it.to_str()).is_some_and(|it| WRITTEN.contains(&it));
        if !written || file == Path::new(TABLE) {
            continue;
        }
        let path = root.join(&file);
        let lines = fs::read(&path)
            .with_context(|| format!("{}", path.display()))?
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        if lines > LIMIT {
            problems.push(format!("{}: {lines} lines, {LIMIT} at most: split it by topic", file.display()));
        }
    }
    Ok(problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_file_is_named_and_data_is_not_counted() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("target")).unwrap();
        for (name, lines) in
            [("long.rs", LIMIT + 1), ("right.rs", LIMIT), ("data.json", 9999), ("target/built.rs", 9999)]
        {
            fs::write(dir.path().join(name), "x\n".repeat(lines)).unwrap();
        }
        let problems = check(dir.path()).unwrap();
        assert_eq!(problems.len(), 1, "{problems:?}");
        assert!(problems[0].starts_with("long.rs: 701 lines"), "{problems:?}");
    }

    #[test]
    fn this_repository_has_no_file_that_is_too_long() {
        assert_eq!(check(&crate::root()).unwrap(), Vec::<String>::new());
    }
}
