//! What cargo builds of this workspace, and where each part's first source file is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde::Deserialize;

/// Every library, binary and file of tests of the workspace.
#[derive(Debug)]
pub struct Targets {
    /// Package and target, `lib` for the library, and the first file.
    files: BTreeMap<(String, String), PathBuf>,
    /// Where the build goes.
    pub directory: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    target_directory: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
    src_path: PathBuf,
}

impl Targets {
    /// Asks cargo.
    ///
    /// # Errors
    /// If cargo cannot be run, or says no.
    pub fn of(root: &Path) -> anyhow::Result<Self> {
        let output = Command::new(option_env!("CARGO").unwrap_or("cargo"))
            .args(["metadata", "--format-version", "1", "--no-deps"])
            .current_dir(root)
            .output()
            .context("running cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        let metadata: Metadata =
            serde_json::from_slice(&output.stdout).context("reading the answer of cargo metadata")?;
        let mut files = BTreeMap::new();
        for package in metadata.packages {
            for target in package.targets {
                let name = match target.kind.first().map(String::as_str) {
                    Some("lib") => "lib".to_owned(),
                    Some("bin" | "test") => target.name,
                    _ => continue,
                };
                files.insert((package.name.clone(), name), target.src_path);
            }
        }
        Ok(Self { files, directory: metadata.target_directory })
    }

    /// The first file of a target.
    pub fn main_file(&self, package: &str, target: &str) -> Option<&Path> {
        self.files.get(&(package.to_owned(), target.to_owned())).map(PathBuf::as_path)
    }

    /// The package and target that cargo means by a file relative to its package, and the name of what it built of it; all of
    /// them, if several packages have such a file.
    pub fn called(&self, file: &Path, built: &str) -> Vec<(&str, &str)> {
        self.files
            .iter()
            .filter(|((package, target), path)| {
                let name = if target == "lib" { package } else { target };
                path.ends_with(file) && name.replace('-', "_") == built.replace('-', "_")
            })
            .map(|((package, target), _)| (package.as_str(), target.as_str()))
            .collect()
    }

    /// These and no others.
    #[cfg(test)]
    pub fn for_tests(files: &[(&str, &str, PathBuf)]) -> Self {
        let files = files
            .iter()
            .map(|(package, target, path)| (((*package).to_owned(), (*target).to_owned()), path.clone()))
            .collect();
        Self { files, directory: PathBuf::from("target") }
    }
}
