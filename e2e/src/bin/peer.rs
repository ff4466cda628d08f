//! `peer`: plays either side of a TCP conversation, inside a pod. See `culvert_e2e::peer`.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use culvert_e2e::peer::client::{self, Conversation};
use culvert_e2e::peer::load::{self, Load};
use culvert_e2e::peer::server;

#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Answer on the well-known ports, and on more that do the same.
    Serve {
        #[arg(long, default_value_t = 0)]
        extra: u16,
    },
    /// Have one conversation and report it.
    Talk {
        verb: String,
        target: SocketAddr,
        #[arg(long, default_value = "-")]
        id: String,
        #[arg(long, default_value_t = 0)]
        number: u64,
    },
    /// Begin connections at a steady rate and report how they went.
    Load {
        #[arg(long, required = true, value_delimiter = ',')]
        targets: Vec<IpAddr>,
        #[arg(long)]
        port: u16,
        #[arg(long, default_value_t = 1)]
        ports: u16,
        #[arg(long)]
        rate: u32,
        #[arg(long)]
        seconds: u64,
        /// Say each failure when it happens, with its time.
        #[arg(long)]
        tell: bool,
    },
}

fn main() -> ExitCode {
    let _ = culvert_net::socket::raise_nofile_limit();
    let report = match Cli::parse().role {
        Role::Serve { extra } => {
            return match server::run(extra) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("cannot serve: {error}");
                    ExitCode::FAILURE
                }
            };
        }
        Role::Talk { verb, target, id, number } => client::run(&Conversation { verb, target, id, number }),
        Role::Load { targets, port, ports, rate, seconds, tell } => {
            load::run(&Load { targets, port, ports, rate, time: Duration::from_secs(seconds), tell })
        }
    };
    println!("{report}");
    ExitCode::SUCCESS
}
