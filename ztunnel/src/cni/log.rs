//! What became of each pod, in a file of the node (C20): a plugin has no other place that outlives it, and its runtime shows errors only.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::json;

use super::AddRequest;

/// Bytes of a file; one former file is kept. About 4,000 pods each.
const MAX_BYTES: u64 = 1024 * 1024;
const NAME: &str = "culvert-cni.log";
const FORMER: &str = "culvert-cni.log.1";

/// The files, beside the agent's socket.
pub fn files(socket: &Path) -> [PathBuf; 2] {
    [socket.with_file_name(NAME), socket.with_file_name(FORMER)]
}

/// Adds a line. A log that cannot be written keeps no pod from starting.
pub fn write(socket: &Path, pod: &AddRequest, took: Duration, error: Option<&str>) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let line = json!({
        "time": now.as_secs_f64(),
        "namespace": pod.pod_namespace,
        "pod": pod.pod_name,
        "uid": pod.pod_uid,
        "outcome": if error.is_none() { "starts" } else { "waits" },
        "error": error,
        "took_ms": u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
    });
    let [file, former] = files(socket);
    let _ = append(&file, &former, &format!("{line}\n"));
}

/// In one call, so that lines of several plugins at once do not mix.
fn append(file: &Path, former: &Path, line: &str) -> io::Result<()> {
    if fs::metadata(file).is_ok_and(|it| it.len() > MAX_BYTES) {
        fs::rename(file, former)?;
    }
    File::options().append(true).create(true).open(file)?.write_all(line.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C20.
    #[test]
    fn a_full_log_gives_way_to_another() {
        let dir = tempfile::tempdir().unwrap();
        let [file, former] = files(&dir.path().join("socket"));
        let line = "x".repeat(usize::try_from(MAX_BYTES).unwrap());
        append(&file, &former, &line).unwrap();
        append(&file, &former, "y").unwrap();
        assert!(!former.exists());
        append(&file, &former, "z").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "z");
        assert_eq!(fs::read_to_string(&former).unwrap(), line + "y");
    }
}
