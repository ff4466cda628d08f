//! The command line, with kubectl's habits: `-f`, `-n`, `-c`, `-o`, `POD -- COMMAND`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use culvert_sandbox::daemon::Role;
use culvert_sandbox::enter;
use culvert_sandbox::plan::Family;
use culvert_sandbox::state::{StateDir, StateError};

pub use crate::output::Output;
pub use mesh::{CHOICE, ChoiceError, ClusterArgs, Mesh, MeshArgs};

pub use look::{
    ApplyArgs, DeleteArgs, Direction, GetArgs, ListArgs, ShapeArgs, Traffic, VersionArgs, WaypointArgs,
    WaypointCommand, WaypointStatusArgs, What,
};

mod look;
mod mesh;

/// Names the state directory, as `--state` does.
const STATE_VARIABLE: &str = "CULVERT_STATE";

/// An ambient service mesh.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the pods of a directory of manifests on this machine, with the mesh
    #[command(
        after_help = "Nodes and pods are network namespaces, cut off from the machine's own interfaces. Root is needed.\n\
        Examples:\n  culvert up -f examples/hello\n  culvert up -f examples/hello --detach"
    )]
    Up(UpArgs),
    /// Run the hello example, check each thing the mesh promises, take it down again
    Demo(DemoArgs),
    /// End everything that `up` started and remove everything it made
    Down(StateArgs),
    /// Show how the mesh is, problems first; exit code 1 if there are any
    #[command(after_help = CHOICE)]
    Status(StatusArgs),
    /// Check whether a cluster can take the mesh and you may install it; once it is there, whether it is well
    #[command(after_help = CHOICE)]
    Check(CheckArgs),
    /// Run a command in a pod
    #[command(after_help = "Example:\n  culvert exec client -- curl -s http://server/")]
    Exec(ExecArgs),
    /// Print the output of a pod, or of controller, agent/NODE, proxy/NODE
    #[command(after_help = CHOICE)]
    Logs(LogsArgs),
    /// Say where a pod's connection would go, and whether it would be let in
    #[command(after_help = concat_examples(
        "Examples:\n  culvert explain client server:80\n  culvert explain -n shop cart 198.18.128.9:80 -o json"
    ))]
    Explain(ExplainArgs),
    /// List what proxies know and hold: workloads, services, policies, certificates, connections; and the proxies
    #[command(after_help = concat_examples(
        "Examples:\n  culvert get workloads -A\n  culvert get certificates --node node-a\n  culvert get proxies -o wide"
    ))]
    Get(GetArgs),
    /// Make, list and remove waypoints of a cluster
    #[command(after_help = concat_examples(
        "Examples:\n  culvert waypoint apply -n shop --enroll-namespace --wait\n  culvert waypoint status -A"
    ))]
    Waypoint(WaypointArgs),
    /// Print versions of this program, of the control plane and of connected proxies
    #[command(after_help = CHOICE)]
    Version(VersionArgs),
    /// Restart programs of the mesh and wait until they are ready
    #[command(after_help = CHOICE)]
    Restart(RestartArgs),
    /// Install the mesh in a Kubernetes cluster, or bring it to this version (runs helm with the chart in this program)
    #[command(
        after_help = "Examples:\n  culvert install\n  culvert install --context staging --set controller.replicas=2"
    )]
    Install(InstallArgs),
    /// Remove the mesh from a Kubernetes cluster; kinds and policies stay
    Uninstall(HelmArgs),
    /// Print a completion script
    Completion {
        /// For which shell.
        shell: Shell,
    },
    /// Enter a pod and become a command
    #[command(name = enter::SUBCOMMAND, hide = true)]
    InternalExec(InternalExecArgs),
    /// What `up --detach` starts
    #[command(hide = true)]
    InternalSupervise(UpArgs),
}

/// Where the state is.
#[derive(Clone, Debug, Args)]
pub struct StateArgs {
    /// State directory of a mesh on this machine; several may be up side by side [default: /run/culvert]
    #[arg(long = "state", value_name = "DIR", env = STATE_VARIABLE, global = true)]
    dir: Option<PathBuf>,
}

/// `culvert up`.
#[derive(Clone, Debug, Args)]
pub struct UpArgs {
    /// Directory of manifests; changes take effect while it runs
    #[arg(short = 'f', long = "filename", value_name = "DIR")]
    pub manifests: PathBuf,
    /// Where the state is.
    #[command(flatten)]
    pub state: StateArgs,
    /// Return when everything is ready and go on in the background
    #[arg(short, long)]
    pub detach: bool,
    /// Address families of pods and services
    #[arg(long, value_enum, default_value_t = FamilyArg::Dual)]
    pub family: FamilyArg,
    /// Pods, services and DNS alone, without the mesh
    #[arg(long)]
    pub no_mesh: bool,
    /// Where the programs `controller` and `ztunnel` are [default: beside this one]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Seconds to wait for everything to be ready
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
    /// Passed on to the controller; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub controller_arg: Vec<OsString>,
    /// Passed on to every agent; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub agent_arg: Vec<OsString>,
    /// Passed on to every proxy; may be repeated
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub proxy_arg: Vec<OsString>,
}

/// `culvert demo`.
#[derive(Clone, Debug, Args)]
pub struct DemoArgs {
    /// How to show the checks
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Leave everything up if a check fails
    #[arg(long)]
    pub keep: bool,
    /// Address families of nodes, pods and services
    #[arg(long, value_enum, default_value_t = FamilyArg::Dual)]
    pub family: FamilyArg,
    /// Where the programs `controller` and `ztunnel` are [default: beside this one]
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// Address families by the names Kubernetes uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FamilyArg {
    /// IPv4 alone.
    Ipv4,
    /// IPv6 alone.
    Ipv6,
    /// Both.
    Dual,
}

/// `culvert status`.
#[derive(Clone, Debug, Args)]
pub struct StatusArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// Only pods, policies and waypoints of this namespace of a cluster
    #[arg(short, long, value_name = "NAME")]
    pub namespace: Option<String>,
    /// All namespaces, as without -n
    #[arg(short = 'A', long, conflicts_with = "namespace")]
    pub all_namespaces: bool,
    /// Only this node of a cluster
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
}

/// `culvert check`.
#[derive(Clone, Debug, Args)]
pub struct CheckArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
    /// What an installation needs, even if the mesh is there already
    #[arg(long)]
    pub pre: bool,
}

/// `culvert exec`.
#[derive(Clone, Debug, Args)]
pub struct ExecArgs {
    /// Where the state is.
    #[command(flatten)]
    pub state: StateArgs,
    /// Which pod.
    #[command(flatten)]
    pub pod: PodArgs,
    /// Accepted as by kubectl; standard input is always passed on
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Accepted as by kubectl; the command has this terminal anyway
    #[arg(short = 't', long)]
    pub tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Which pod, and which container of it.
#[derive(Clone, Debug, Args)]
pub struct PodArgs {
    /// Name of the pod, also as pod/NAME; or controller, agent/NODE, proxy/NODE
    #[arg(value_name = "POD")]
    pub name: String,
    /// Namespace of the pod [default: that of the kubeconfig's context, else default]
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// Container [default: the pod's first]
    #[arg(short, long)]
    pub container: Option<String>,
}

/// `culvert logs`.
#[derive(Clone, Debug, Args)]
pub struct LogsArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Which pod.
    #[command(flatten)]
    pub pod: PodArgs,
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// Of the container that ran before it was restarted, in a cluster
    #[arg(short, long)]
    pub previous: bool,
}

/// `culvert explain`.
#[derive(Clone, Debug, Args)]
pub struct ExplainArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// The pod that would connect
    #[arg(value_name = "POD")]
    pub source: String,
    /// Where to: ADDRESS:PORT, or a name as the pod would ask for it, with a port
    #[arg(value_name = "HOST:PORT")]
    pub destination: String,
    /// Namespace of the pod [default: that of the kubeconfig's context, else default]
    #[arg(short, long)]
    pub namespace: Option<String>,
    /// How to show it
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    pub output: Output,
}

impl ExplainArgs {
    /// The pod that would connect.
    pub fn source(&self) -> PodArgs {
        PodArgs { name: self.source.clone(), namespace: self.namespace.clone(), container: None }
    }
}

/// `culvert restart`.
#[derive(Clone, Debug, Args)]
pub struct RestartArgs {
    /// Which mesh.
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Which program
    #[arg(value_enum)]
    pub role: RoleArg,
    /// Only on this node
    #[arg(long)]
    pub node: Option<String>,
    /// Seconds to wait until everything of it is new and ready, in a cluster
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
}

/// The programs of the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    /// The control plane.
    Controller,
    /// Enrols pods, one a node.
    Agent,
    /// Carries traffic, one a node.
    Proxy,
}

/// `culvert install`.
#[derive(Clone, Debug, Args)]
pub struct InstallArgs {
    /// Where to, and by what.
    #[command(flatten)]
    pub helm: HelmArgs,
    /// Values from a file; may be repeated
    #[arg(short = 'f', long, value_name = "FILE")]
    pub values: Vec<PathBuf>,
    /// One value, such as mesh.trustDomain=example.org; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Show what would be installed and change nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// Which cluster, and by which helm.
#[derive(Clone, Debug, Args)]
pub struct HelmArgs {
    /// Namespace of the installation
    #[arg(short, long, default_value = "culvert-system")]
    pub namespace: String,
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// The kubeconfig [default: KUBECONFIG, then ~/.kube/config]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// The program helm, version 3
    #[arg(long = "helm", value_name = "PROGRAM", default_value = "helm")]
    pub program: PathBuf,
    /// How long to wait until everything is ready
    #[arg(long, value_name = "TIME", default_value = "5m")]
    pub timeout: String,
}

/// `culvert internal-exec`.
#[derive(Clone, Debug, Args)]
pub struct InternalExecArgs {
    /// Network namespace to enter
    #[arg(long)]
    pub netns: PathBuf,
    /// OURS:TARGET, a file shown at another place
    #[arg(long)]
    pub show: Vec<String>,
    /// A mount point to take out of sight
    #[arg(long)]
    pub hide: Vec<PathBuf>,
    /// Host name
    #[arg(long)]
    pub hostname: Option<String>,
    /// Working directory
    #[arg(long)]
    pub cwd: Option<PathBuf>,
    /// The command
    #[arg(last = true, required = true)]
    pub command: Vec<OsString>,
}

/// Examples, and how the mesh is chosen.
fn concat_examples(examples: &str) -> String {
    format!("{examples}\n\n{CHOICE}")
}

impl StateArgs {
    /// The state directory.
    pub fn open(&self) -> Result<StateDir, StateError> {
        StateDir::new(self.dir.as_deref().unwrap_or(mesh::default_state()))
    }

    /// It was named, by the flag or the variable.
    fn given(&self) -> bool {
        self.dir.is_some()
    }

    /// It was named by the flag. The same directory in the variable too says no less.
    fn by_flag(&self) -> bool {
        let variable = mesh::variable(STATE_VARIABLE);
        self.dir.as_ref().is_some_and(|dir| variable.is_none_or(|variable| variable != *dir))
    }
}

impl FamilyArg {
    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        match self {
            FamilyArg::Ipv4 => "ipv4",
            FamilyArg::Ipv6 => "ipv6",
            FamilyArg::Dual => "dual",
        }
    }
}

impl From<FamilyArg> for Family {
    fn from(family: FamilyArg) -> Family {
        match family {
            FamilyArg::Ipv4 => Family::Ipv4,
            FamilyArg::Ipv6 => Family::Ipv6,
            FamilyArg::Dual => Family::Dual,
        }
    }
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Role {
        match role {
            RoleArg::Controller => Role::Controller,
            RoleArg::Agent => Role::Agent,
            RoleArg::Proxy => Role::Proxy,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn arguments_for_programs_may_look_like_flags() {
        let cli = Cli::parse_from([
            "culvert",
            "up",
            "-f",
            "d",
            "--controller-arg=--cert-ttl",
            "--controller-arg=20s",
        ]);
        let Command::Up(up) = cli.command else { panic!("up") };
        assert_eq!(up.controller_arg, ["--cert-ttl", "20s"]);
    }
}
