//! Checks of the repository itself that no other tool makes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use culvert_xtask::{book, layers, root, sizes};

/// Checks of the repository itself.
#[derive(Debug, Parser)]
#[command(name = "xtask")]
struct Cli {
    /// Which check.
    #[command(subcommand)]
    check: Check,
    /// The repository [default: the one this was built in]
    #[arg(long, global = true)]
    root: Option<PathBuf>,
}

/// Which check.
#[derive(Clone, Copy, Debug, clap::Subcommand)]
enum Check {
    /// All of these
    All,
    /// Crates depend on each other in one direction only
    Layers,
    /// No file is too long to read
    Sizes,
    /// Every page of the book is in its table of contents, and every link leads somewhere
    Book,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            for problem in &problems {
                eprintln!("{problem}");
            }
            eprintln!("{} problems", problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<Vec<String>> {
    let root = cli.root.clone().unwrap_or_else(root);
    let mut problems = Vec::new();
    if matches!(cli.check, Check::All | Check::Layers) {
        problems.extend(layers::check(&layers::metadata(&root)?));
    }
    if matches!(cli.check, Check::All | Check::Sizes) {
        problems.extend(sizes::check(&root)?);
    }
    if matches!(cli.check, Check::All | Check::Book) {
        problems.extend(book::check(&root)?);
    }
    Ok(problems)
}
