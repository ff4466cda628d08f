//! `ztunnel proxy` carries traffic, `ztunnel agent` enrols pods; one of each runs on a node. `ztunnel cni` is the CNI plugin.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use culvert_runtime::config::{Sources, load};
use culvert_runtime::telemetry::{self, Format};
use culvert_ztunnel::{agent, app, cni, config};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// culvert's node tunnel.
#[derive(Debug, Parser)]
#[command(name = "ztunnel", version)]
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
    /// Carry the traffic of this node's enrolled pods.
    Proxy(Box<config::ProxyConfig>),
    /// Enrol this node's pods: redirect rules, hand-over to the proxy, checks.
    Agent(Box<agent::AgentConfig>),
    /// Be the CNI plugin: a container runtime starts this, with its question in the environment and on standard input.
    Cni,
}

fn main() -> ExitCode {
    // Before all else: it starts for each pod, and the runtime gives it neither arguments nor settings.
    let invocation = cni::Invocation::of_process();
    if invocation.command.is_some() {
        return cni::run(&invocation);
    }
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
    let outcome = match cli.command {
        Command::Proxy(mut config) => {
            config.effective = effective;
            app::run(*config, telemetry.filter())
        }
        Command::Agent(config) => single_threaded(agent::run(*config, telemetry.filter())),
        Command::Cni => return cni::run(&cni::Invocation::default()),
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
