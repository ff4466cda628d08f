//! `culvert`: what people type. Each subcommand has its file; this one only chooses.
//!
//! Exit codes: 0 done, 1 failed (the reason is on standard error), 2 not understood; `exec` gives that of its command.

pub mod args;
mod demo;
mod down;
mod explain;
mod install;
mod logs;
mod pod;
mod restart;
mod status;
mod table;
mod up;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    // No thread may exist before this: `internal-exec` and `exec` enter namespaces, which only a process with one can do.
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Up(args) => up::up(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Down(args) => down::down(&args),
        Command::Status(args) => status::status(&args),
        Command::Exec(args) => pod::exec(&args),
        Command::Logs(args) => logs::logs(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Restart(args) => restart::restart(&args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "culvert", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::InternalExec(args) => return pod::internal_exec(&args),
        Command::InternalSupervise(args) => up::supervise_in_background(&args),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}
