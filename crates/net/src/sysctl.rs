//! Settings of the calling thread's network namespace, below `/proc/sys/net`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const HERE: &str = "/proc/sys/net";

static WRITABLE: OnceLock<PathBuf> = OnceLock::new();

/// Says where else `/proc/sys/net` is mounted: a container has it read-only in its usual place. The first word holds.
pub fn writable_at(dir: PathBuf) {
    let _ = WRITABLE.set(dir);
}

/// Writes a setting, such as `ipv4/tcp_migrate_req`.
///
/// # Errors
/// The kernel has no such setting or refuses the value, or everything is read-only.
pub(crate) fn write(setting: &str, value: &str) -> io::Result<()> {
    let at = |dir: &Path| std::fs::write(dir.join(setting), value);
    match (at(Path::new(HERE)), WRITABLE.get()) {
        (Err(error), Some(dir)) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => at(dir),
        (outcome, _) => outcome,
    }
}
