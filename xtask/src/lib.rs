//! Checks of the repository itself, each a function from what is there to a list of problems.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

pub mod book;
pub mod crds;
pub mod layers;
pub mod ledger;
pub mod mutants;
pub mod sizes;
pub mod targets;
pub mod values;

/// The repository this was built in.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// Every file below a directory, relative to it and sorted, without what is built, fetched or hidden.
///
/// # Errors
/// Names the directory that cannot be read.
pub fn files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(dir) = todo.pop() {
        let path = root.join(&dir);
        for entry in fs::read_dir(&path).with_context(|| format!("{}", path.display()))? {
            let entry = entry?;
            let name = entry.file_name();
            let left_out = matches!(name.to_str(), Some("target" | "node_modules" | "bin") | None)
                && entry.file_type()?.is_dir();
            if left_out || name.to_string_lossy().starts_with('.') {
                continue;
            }
            let relative = dir.join(name);
            if entry.file_type()?.is_dir() { todo.push(relative) } else { found.push(relative) }
        }
    }
    found.sort();
    Ok(found)
}
