//! The mesh of `culvert up`: logs are files.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use culvert_sandbox::state::StateDir;

use crate::args::LogsArgs;
use crate::pod;

/// Between two looks for more.
const POLL: Duration = Duration::from_millis(100);
/// Read at once.
const BLOCK: usize = 64 * 1024;

pub(super) fn logs(state: &StateDir, args: &LogsArgs) -> anyhow::Result<ExitCode> {
    if args.previous {
        anyhow::bail!("--previous is about a cluster: here a log goes on when its program is restarted");
    }
    let report = pod::report(state)?;
    let log = match pod::program(&report, &args.pod.name)? {
        Some(program) => program.log.clone(),
        None => pod::container(pod::find(&report, &args.pod)?, &args.pod)?.log.clone(),
    };
    let mut file = match File::open(&log) {
        Ok(file) => file,
        // Not started yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound && !args.follow => {
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => appear(&log, state)?,
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", log.display())),
    };
    if let Some(lines) = args.tail {
        skip_to_last(&mut file, lines)?;
    }
    let outcome = copy(&mut file, &mut io::stdout().lock())
        .and_then(|()| if args.follow { follow(file, &log, state) } else { Ok(()) });
    match outcome {
        // Whoever reads has seen enough (`culvert logs | head`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        outcome => {
            outcome.map(|()| ExitCode::SUCCESS).with_context(|| format!("cannot read {}", log.display()))
        }
    }
}

/// Copies what comes, until nothing is up any more. A pod that was made again has a new file.
fn follow(mut file: File, log: &Path, state: &StateDir) -> io::Result<()> {
    while state.in_use() {
        std::thread::sleep(POLL);
        copy(&mut file, &mut io::stdout().lock())?;
        let Ok(now) = std::fs::metadata(log) else { continue };
        if now.ino() != file.metadata()?.ino() {
            file = File::open(log)?;
        } else if now.len() < file.stream_position()? {
            file.rewind()?;
        }
    }
    Ok(())
}

fn appear(log: &Path, state: &StateDir) -> anyhow::Result<File> {
    while state.in_use() {
        if let Ok(file) = File::open(log) {
            return Ok(file);
        }
        std::thread::sleep(POLL);
    }
    File::open(log).with_context(|| format!("cannot read {}", log.display()))
}

fn copy(from: &mut File, to: &mut impl Write) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        let length = from.read(&mut block)?;
        if length == 0 {
            return to.flush();
        }
        to.write_all(&block[..length])?;
    }
}

/// Moves to where the last `lines` lines begin, reading backwards.
fn skip_to_last(file: &mut File, lines: usize) -> io::Result<()> {
    let mut end = file.seek(SeekFrom::End(0))?;
    let mut block = vec![0; BLOCK];
    let mut newlines = 0;
    let mut last = true;
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        let length = (end - start) as usize;
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut block[..length])?;
        for (index, byte) in block[..length].iter().enumerate().rev() {
            // The newline that ends the last line does not begin another.
            if *byte == b'\n' && !std::mem::take(&mut last) {
                newlines += 1;
            }
            last = false;
            if newlines == lines {
                file.seek(SeekFrom::Start(start + index as u64 + 1))?;
                return Ok(());
            }
        }
        end = start;
    }
    file.rewind()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tail(text: &str, lines: usize) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, text).unwrap();
        let mut file = File::open(&path).unwrap();
        skip_to_last(&mut file, lines).unwrap();
        let mut rest = String::new();
        file.read_to_string(&mut rest).unwrap();
        rest
    }

    #[test]
    fn the_last_lines() {
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail("a\nb\nc", 2), "b\nc");
        assert_eq!(tail("a\nb\n", 5), "a\nb\n");
        assert_eq!(tail("", 5), "");
        assert_eq!(tail("a\n", 0), "");
        let long = "x".repeat(BLOCK) + "\nlast\n";
        assert_eq!(tail(&long, 1), "last\n");
    }
}
