//! `culvert`: what people type. Each subcommand has its file; this one only chooses.
//!
//! Exit codes: 0 done and well, 1 failed (the reason is on standard error) or problems found, 2 not understood; `exec` gives that
//! of its command.

pub mod args;
mod check;
mod cluster;
mod demo;
mod down;
mod explain;
mod get;
mod install;
mod logs;
mod output;
mod pod;
mod restart;
mod status;
mod table;
mod up;
mod version;
mod waypoint;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{ChoiceError, Cli, Command};

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    // No thread may exist before this: `internal-exec` and `exec` enter namespaces, which only a process with one can do.
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Up(args) => up::up(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Down(args) => down::down(&args),
        Command::Status(args) => status::status(&args),
        Command::Check(args) => check::check(&args),
        Command::Exec(args) => pod::exec(&args),
        Command::Logs(args) => logs::logs(&args),
        Command::Explain(args) => explain::explain(&args),
        Command::Get(args) => get::get(&args),
        Command::Waypoint(args) => waypoint::waypoint(&args),
        Command::Version(args) => version::version(&args),
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
        let misused = error.downcast_ref::<ChoiceError>() == Some(&ChoiceError::Both);
        if misused { ExitCode::from(2) } else { ExitCode::FAILURE }
    })
}
