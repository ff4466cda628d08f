//! Where the programs under test are.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The path of one of our programs: in the directory that `CULVERT_BIN_DIR` names, or else where cargo puts what it builds,
/// an optimised one first.
///
/// # Errors
/// Names the command that builds the program when it is in none of them.
pub fn program(name: &str) -> Result<PathBuf> {
    let candidates = directories();
    for directory in &candidates {
        let path = directory.join(name);
        if path.is_file() {
            return path.canonicalize().with_context(|| format!("{}", path.display()));
        }
    }
    bail!(
        "no program {name} in {candidates:?}: run `cargo build --release --bin {name}`, or set CULVERT_BIN_DIR"
    )
}

fn directories() -> Vec<PathBuf> {
    // Tests have no command line of their own, so the environment is the only way to point them elsewhere.
    #[expect(clippy::disallowed_methods, reason = "see above")]
    if let Some(directory) = std::env::var_os("CULVERT_BIN_DIR") {
        return vec![PathBuf::from(directory)];
    }
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    // `make build` names the target, so that the programs are static.
    let host = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    vec![target.join(host).join("release"), target.join("release"), target.join("debug")]
}
