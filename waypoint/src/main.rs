//! `waypoint proxy` serves what is bound to one Gateway.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use culvert_runtime::config::{Sources, load};
use culvert_runtime::telemetry::{self, Format};
use culvert_waypoint::{app, config};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// culvert's waypoint.
#[derive(Debug, Parser)]
#[command(name = "waypoint", version)]
struct Cli {
    /// Settings file in YAML: a key for each flag, by its name without dashes in front. Flags and variables win.
    #[arg(long, global = true, env = "CONFIG_FILE", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print every setting, its value and where that was written, as a settings file, and end.
    #[arg(long, global = true)]
    print_config: bool,
    /// Log lines as text or as JSON.
    #[arg(long, global = true, env = "LOG_FORMAT", default_value = "text", value_parser = ["text", "plain", "json"])]
    log_format: String,
    /// What is logged: a level, or `target=level` pairs.
    #[arg(long, global = true, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Serve the services and workloads that are bound to the Gateway.
    Proxy(Box<config::ProxyConfig>),
}

fn main() -> ExitCode {
    let loaded = match load::<Cli>(&Sources::of_process(), config::PROGRAM) {
        Ok(loaded) => loaded,
        Err(error) => return error.report(),
    };
    let (cli, effective) = (loaded.settings, loaded.effective);
    if cli.print_config {
        print!("{}", effective.to_yaml());
        return ExitCode::SUCCESS;
    }
    let format = if cli.log_format == "json" { Format::Json } else { Format::Text };
    let telemetry = match telemetry::init(format, &cli.log_level) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("--log-level: {error}");
            return ExitCode::from(2);
        }
    };
    let Command::Proxy(mut config) = cli.command;
    config.effective = effective;
    let code = match app::run(*config, telemetry.filter()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    };
    drop(telemetry);
    code
}
