//! The `culvert` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    culvert_cli::main()
}
