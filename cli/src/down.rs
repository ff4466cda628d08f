//! `culvert down`: ends a supervisor if one runs, and removes what is left in any case.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use culvert_sandbox::cleanup;
use culvert_sandbox::process::Record;
use culvert_sandbox::state::StateDir;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::args::StateArgs;

/// A supervisor needs at most three times three seconds: containers, programs, what is left.
const PATIENCE: Duration = Duration::from_secs(15);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);

pub(crate) fn down(args: &StateArgs) -> anyhow::Result<ExitCode> {
    let state = args.open()?;
    if !state.root().exists() {
        println!("nothing is up in {}", state.root().display());
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(supervisor) = state.holder().filter(|_| state.in_use()) {
        end(&state, &supervisor)?;
    }
    if !state.root().exists() {
        println!("down");
        return Ok(ExitCode::SUCCESS);
    }
    let _lock = state.lock()?;
    cleanup::cleanup(&state, &[])?;
    println!("down");
    Ok(ExitCode::SUCCESS)
}

fn end(state: &StateDir, supervisor: &Record) -> anyhow::Result<()> {
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        if supervisor.runs() {
            // The process alone: its group may be a terminal's.
            let _ = kill(Pid::from_raw(supervisor.pid), signal);
        }
        let started = Instant::now();
        while started.elapsed() < PATIENCE {
            if !state.in_use() {
                return Ok(());
            }
            std::thread::sleep(POLL);
        }
    }
    bail!("the supervisor, process {}, does not end", supervisor.pid)
}
