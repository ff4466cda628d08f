//! `culvert-bench`: what the tunnel costs, beside direct TCP in the same run.
//!
//! Absolute numbers of one machine mean little; each line is printed with its ratio to the direct path between the same
//! two namespaces.

mod client;
mod fairness;
mod probe;
mod protocol;
mod run;
mod scale;
mod server;
mod world;

use anyhow::Context as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;

/// Measures a tunnel beside direct TCP.
#[derive(Debug, Parser)]
#[command(version)]
enum Cli {
    /// Make a mesh of two nodes, measure it and the direct path, print a table.
    Run(RunArgs),
    /// Time small requests, idle and beside bulk streams of the same pod to the same destination.
    Fairness(fairness::FairnessArgs),
    /// Give two proxies a mesh of 100,000 workloads, change all of it, and see what they weigh and whether traffic waits.
    Scale(scale::ScaleArgs),
    /// The control plane of `scale` (runs where the controller runs).
    #[command(hide = true)]
    ScaleControl(scale::control::ControlArgs),
    /// Small requests at a fixed pace (runs inside a pod); prints JSON.
    Probe {
        /// The server.
        #[arg(long)]
        target: SocketAddr,
        /// For how long, seconds.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
    },
    /// Serve every measurement (runs inside a pod).
    Serve {
        /// Where.
        #[arg(long, default_value = "[::]:9000")]
        listen: SocketAddr,
    },
    /// Take one measurement (runs inside a pod); prints JSON.
    Client {
        /// What to measure.
        #[arg(long)]
        measure: client::Measure,
        /// The server.
        #[arg(long)]
        target: SocketAddr,
        /// Connections at once.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// For how long, seconds.
        #[arg(long, default_value_t = 3)]
        seconds: u64,
        /// Bytes a second of bulk uploads, all connections together; as fast as they go if absent.
        #[arg(long)]
        rate: Option<f64>,
    },
}

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The `culvert` program; beside this one if absent.
    #[arg(long)]
    culvert: Option<PathBuf>,
    /// Each measurement's length, seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Times each pair is measured; the median is printed.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A program of ambient's own node tunnel, measured beside ours in the same run: same controller, same agent, same pods.
    #[arg(long, value_name = "PATH")]
    peer_ztunnel: Option<PathBuf>,
    /// Client and server on one node instead of two: handed over within the proxy, and beside it through a tunnel.
    #[arg(long, conflicts_with = "peer_ztunnel")]
    same_node: bool,
    /// `table` or `json`.
    #[arg(short, long, default_value = "table")]
    output: String,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse() {
        Cli::Run(args) => run::run(&args),
        Cli::Scale(args) => scale::run(&args),
        Cli::ScaleControl(args) => block_on(1, scale::control::run(&args)),
        Cli::Probe { target, seconds } => {
            promptly().and_then(|()| block_on(1, probe::probe(target, Duration::from_secs(seconds))))
        }
        Cli::Serve { listen } => promptly().and_then(|()| block_on(2, server::serve(listen))),
        Cli::Fairness(args) => fairness::run(&args),
        Cli::Client { measure, target, connections, seconds, rate } => {
            let load = client::Load { connections, length: Duration::from_secs(seconds), rate };
            block_on(1, client::measure(measure, target, load))
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("culvert-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What measures must not wait for its turn on a busy machine, or it measures its own waiting. Threads inherit it.
fn promptly() -> anyhow::Result<()> {
    culvert_net::prompt_thread().context("scheduling")
}

fn block_on(threads: usize, task: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut builder = if threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(threads);
        builder
    };
    builder.enable_all().build()?.block_on(task)
}
