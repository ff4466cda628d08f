//! `ztunnel proxy` carries traffic, `ztunnel agent` enrols pods; one of each runs on a node.

use std::process::ExitCode;

use clap::Parser;
use culvert_runtime::telemetry::{self, Format};
use culvert_ztunnel::{agent, app, config};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// culvert's node tunnel.
#[derive(Debug, Parser)]
#[command(name = "ztunnel", version)]
struct Cli {
    /// Log lines as text or as JSON.
    #[arg(long, global = true, env = "LOG_FORMAT", default_value = "text")]
    log_format: String,
    /// What is logged: a level, or `target=level` pairs.
    #[arg(long, global = true, env = "LOG_LEVEL", default_value = "info")]
    log_level: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Carry the traffic of this node's enrolled pods.
    Proxy(Box<config::ProxyConfig>),
    /// Enrol this node's pods: redirect rules, hand-over to the proxy, checks.
    Agent(agent::AgentConfig),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = match cli.log_format.as_str() {
        "json" => Format::Json,
        "text" | "plain" => Format::Text,
        other => {
            eprintln!("--log-format: {other:?} is neither text nor json");
            return ExitCode::from(2);
        }
    };
    let telemetry = match telemetry::init(format, &cli.log_level) {
        Ok(telemetry) => telemetry,
        Err(error) => {
            eprintln!("--log-level: {error}");
            return ExitCode::from(2);
        }
    };
    let outcome = match cli.command {
        Command::Proxy(config) => app::run(*config, telemetry.filter()),
        Command::Agent(config) => single_threaded(agent::run(config)),
    };
    let code = match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "ended");
            ExitCode::FAILURE
        }
    };
    drop(telemetry);
    code
}

fn single_threaded(task: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(task)
}
