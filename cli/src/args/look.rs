//! `culvert get`, `culvert waypoint`, `culvert version`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::MeshArgs;
use crate::output::Output;

/// `culvert get`.
#[derive(Clone, Debug, Args)]
pub struct GetArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// What to list
    #[arg(value_enum)]
    pub what: What,
    /// Only this one: a name, or NAMESPACE/NAME
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// Namespace [default: that of the kubeconfig's context]
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// What the proxy of this node has [default: of certificates and connections all, of the rest the first that is ready]
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Only workloads with this address
    #[arg(long, value_name = "IP")]
    pub address: Option<std::net::IpAddr>,
    /// Only connections of this direction
    #[arg(long, value_enum)]
    pub direction: Option<Direction>,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Without column headings
    #[arg(long)]
    pub no_headers: bool,
    /// From a file that the proxy's /config_dump was written to, and no mesh
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["node", "which", "context", "kubeconfig"])]
    pub file: Option<PathBuf>,
}

/// What can be listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// Pods and what else has an address, as a proxy knows them.
    #[value(alias = "workload", alias = "wl")]
    Workloads,
    /// Services, as a proxy knows them.
    #[value(alias = "service", alias = "svc")]
    Services,
    /// Policies, as a proxy knows them.
    #[value(alias = "policy", alias = "pol")]
    Policies,
    /// Certificates of nodes' pods.
    #[value(alias = "certificate", alias = "cert", alias = "certs")]
    Certificates,
    /// Open connections.
    #[value(alias = "connection", alias = "conn")]
    Connections,
    /// Proxies, and how far each is behind the controller.
    #[value(alias = "proxy")]
    Proxies,
    /// All of these.
    All,
}

/// Which way a connection goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    /// Accepted by the pod.
    Inbound,
    /// Opened by the pod.
    Outbound,
}

/// `culvert version`.
#[derive(Clone, Debug, Args)]
pub struct VersionArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Only of this program
    #[arg(long)]
    pub client: bool,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// `culvert waypoint`.
#[derive(Clone, Debug, Args)]
pub struct WaypointArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Namespace [default: that of the kubeconfig's context]
    #[arg(short, long, value_name = "NAME", global = true)]
    pub namespace: Option<String>,
    /// What to do.
    #[command(subcommand)]
    pub command: WaypointCommand,
}

/// What can be done about waypoints.
#[derive(Clone, Debug, Subcommand)]
pub enum WaypointCommand {
    /// Print a waypoint's manifest and change nothing
    Generate(ShapeArgs),
    /// Make a waypoint, or change it
    Apply(ApplyArgs),
    /// Remove waypoints
    Delete(DeleteArgs),
    /// List waypoints
    List(ListArgs),
    /// Show waypoints' conditions; exit code 1 if one is not programmed
    Status(WaypointStatusArgs),
}

/// What a waypoint is like.
#[derive(Clone, Debug, Args)]
pub struct ShapeArgs {
    /// Its name
    #[arg(long, value_name = "NAME", default_value = "waypoint")]
    pub name: String,
    /// Which traffic it is for
    #[arg(long = "for", value_enum, value_name = "TRAFFIC")]
    pub traffic: Option<Traffic>,
    /// Its class
    #[arg(long, value_name = "NAME", default_value = "culvert-waypoint")]
    pub class: String,
}

/// Which traffic a waypoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Traffic {
    /// To services; so it is without saying.
    Service,
    /// To pods by their own address.
    Workload,
    /// Both.
    All,
    /// Neither.
    None,
}

/// `culvert waypoint apply`.
#[derive(Clone, Debug, Args)]
pub struct ApplyArgs {
    /// What it is like.
    #[command(flatten)]
    pub shape: ShapeArgs,
    /// Label the namespace, so that its services use the waypoint
    #[arg(long)]
    pub enroll_namespace: bool,
    /// With --enroll-namespace, even if the namespace uses another one
    #[arg(long)]
    pub overwrite: bool,
    /// Wait until it is programmed
    #[arg(short, long)]
    pub wait: bool,
    /// Seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    pub waypoint_timeout: u64,
}

/// `culvert waypoint delete`.
#[derive(Clone, Debug, Args)]
pub struct DeleteArgs {
    /// Which
    #[arg(value_name = "NAME", required_unless_present = "all")]
    pub names: Vec<String>,
    /// All of the namespace
    #[arg(long, conflicts_with = "names")]
    pub all: bool,
}

/// `culvert waypoint list`.
#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// All namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

/// `culvert waypoint status`.
#[derive(Clone, Debug, Args)]
pub struct WaypointStatusArgs {
    /// Only this one
    #[arg(value_name = "NAME")]
    pub name: Option<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Wait until they are programmed
    #[arg(short, long)]
    pub wait: bool,
    /// Seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    pub waypoint_timeout: u64,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

impl Traffic {
    /// The label's value.
    pub fn name(self) -> &'static str {
        match self {
            Traffic::Service => "service",
            Traffic::Workload => "workload",
            Traffic::All => "all",
            Traffic::None => "none",
        }
    }
}
