//! Keeps logs bounded: the programs write their files themselves, so that they survive a crash of the supervisor.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::state::StateDir;

/// A log that grew beyond this is moved to `NAME.1`, over the one before: at most twice this for each log, and what is
/// written between two looks.
const MAX_LOG: u64 = 64 * 1024 * 1024;
/// Between two looks.
const PAUSE: Duration = Duration::from_secs(10);

/// Looks after the logs of a sandbox for as long as it runs.
pub(crate) async fn trim_logs(state: StateDir) {
    loop {
        tokio::time::sleep(PAUSE).await;
        for log in logs(&state) {
            if let Err(error) = trim(&log, MAX_LOG) {
                tracing::warn!(log = %log.display(), %error, "cannot trim the log");
            }
        }
    }
}

fn logs(state: &StateDir) -> Vec<PathBuf> {
    let below = |dir: PathBuf| -> Vec<PathBuf> {
        fs::read_dir(dir)
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default()
    };
    let pods = below(state.root().join("pods")).into_iter().flat_map(below);
    let nodes = below(state.nodes()).into_iter().flat_map(|node| below(node.join("logs")));
    let all = pods.chain(nodes).chain(below(state.controller())).chain([state.supervisor_log()]);
    all.filter(|path| path.extension().is_some_and(|extension| extension == "log")).collect()
}

/// Moves the content: the file itself stays, since a program has it open (for appending, so it goes on at the new end).
fn trim(log: &Path, limit: u64) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > limit => {
            let mut old = log.as_os_str().to_owned();
            old.push(".1");
            fs::copy(log, &old)?;
            File::options().write(true).open(log)?.set_len(0)
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_long_log_starts_again_and_its_writer_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path()).unwrap();
        let log = state.pod("n", "p").join("stdout.log");
        fs::create_dir_all(log.parent().unwrap()).unwrap();
        let mut writer = File::options().create(true).append(true).open(&log).unwrap();
        writer.write_all(b"first").unwrap();
        assert_eq!(logs(&state), [log.clone(), state.supervisor_log()]);
        trim(&log, 5).unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"first");
        trim(&log, 4).unwrap();
        writer.write_all(b"second").unwrap();
        assert_eq!(fs::read(&log).unwrap(), b"second");
        assert_eq!(fs::read(log.with_extension("log.1")).unwrap(), b"first");
        trim(&dir.path().join("none.log"), 0).unwrap();
    }
}
