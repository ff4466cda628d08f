//! Checks of the repository itself that no other tool makes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use culvert_xtask::{book, crds, layers, ledger, mutants, root, sizes, values};

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
#[derive(Clone, Debug, clap::Subcommand)]
enum Check {
    /// All of these
    All,
    /// Crates depend on each other in one direction only
    Layers,
    /// No file is too long to read
    Sizes,
    /// Every page of the book is in its table of contents, and every link leads somewhere
    Book,
    /// The chart's definitions of kinds are fresh; its values, their schema and their page name the same keys
    Chart,
    /// Write the chart's definitions of kinds
    Generate,
    /// Every behaviour in e2e/behaviour.toml has a test that names it, and that ran and passed
    Ledger(ledger::Options),
    /// Nine of ten mutants are noticed by a test, and each survivor in e2e/mutants.toml has a reason
    Mutants(mutants::Options),
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
    if matches!(cli.check, Check::All | Check::Chart) {
        problems.extend(crds::check(&root)?);
        problems.extend(values::check(&root)?);
    }
    match &cli.check {
        Check::Generate => crds::generate(&root)?,
        Check::Ledger(options) => problems.extend(ledger::check(&root, *options)?),
        Check::Mutants(options) => problems.extend(mutants::check(&root, options)?),
        // What can be known before the tests run.
        Check::All => problems.extend(ledger::check(&root, ledger::Options::STATIC)?),
        _ => {}
    }
    Ok(problems)
}
