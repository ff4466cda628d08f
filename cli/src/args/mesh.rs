//! Which mesh a command is about: that of `culvert up` on this machine, or that of a Kubernetes cluster.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use culvert_sandbox::state::{DEFAULT_DIR, StateDir};

use super::StateArgs;

/// What `--help` says below the flags of every command that knows both kinds of mesh.
pub const CHOICE: &str = "Which mesh: --mesh says it. Otherwise --state means that of `culvert up`, --context and --kubeconfig \
that of a\ncluster; then the variables CULVERT_STATE and KUBECONFIG, in this order; then a mesh that is up on this machine;\n\
then the cluster of ~/.kube/config, or the one whose pod this runs in.\n\n\
Exit codes: 0 all is well, 1 something is not or it failed, 2 the command line was not understood.";

/// Which mesh.
#[derive(Clone, Debug, Args)]
pub struct MeshArgs {
    /// The mesh of `culvert up`, or that of a cluster; auto chooses as said below
    #[arg(long = "mesh", value_name = "WHICH", value_enum, default_value_t = Which::Auto, global = true)]
    pub which: Which,
    /// Where the state of a mesh on this machine is.
    #[command(flatten)]
    pub state: StateArgs,
    /// How to reach a cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// How to reach a cluster.
#[derive(Clone, Debug, Args)]
pub struct ClusterArgs {
    /// Context of the kubeconfig [default: its current one]
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
    /// The kubeconfig [default: KUBECONFIG, then ~/.kube/config]
    #[arg(long, value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// Namespace that the mesh is installed in
    #[arg(short = 'i', long, value_name = "NAME", default_value = "culvert-system", global = true)]
    pub system_namespace: String,
    /// Seconds to wait for one answer of a cluster
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=600), global = true)]
    pub request_timeout: u64,
}

/// Value of `--mesh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Which {
    /// Whichever there is.
    #[default]
    Auto,
    /// That of `culvert up` on this machine.
    Local,
    /// That of a Kubernetes cluster.
    Cluster,
}

/// The mesh that was chosen.
#[derive(Debug)]
pub enum Mesh {
    /// That of `culvert up`.
    Local(StateDir),
    /// That of a cluster.
    Cluster(ClusterArgs),
}

/// What the choice depends on.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    which: Which,
    state_flag: bool,
    state_variable: bool,
    cluster_flag: bool,
    kubeconfig_variable: bool,
    local_is_up: bool,
    home_kubeconfig: bool,
    in_a_pod: bool,
}

/// Why none was chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// Flags of both.
    #[error(
        "--state is about the mesh of `culvert up`, --context and --kubeconfig are about a cluster's: give one of them"
    )]
    Both,
    /// Nothing there.
    #[error(
        "there is no mesh to ask: none is up in {local} (`culvert up` starts one, --state names another), and no cluster is known \
(no --context, --kubeconfig or KUBECONFIG, no ~/.kube/config, and this runs in no pod)"
    )]
    Nothing {
        /// Where a local mesh would be.
        local: PathBuf,
    },
}

impl MeshArgs {
    /// The mesh that is meant.
    ///
    /// # Errors
    /// Flags contradict each other (an [`ChoiceError::Both`]), there is no mesh, or the state directory cannot be used.
    pub fn choose(&self) -> anyhow::Result<Mesh> {
        let state = self.state.open()?;
        let facts = Facts {
            which: self.which,
            state_flag: self.state.by_flag(),
            state_variable: self.state.given(),
            cluster_flag: self.cluster.by_flag(),
            kubeconfig_variable: variable("KUBECONFIG").is_some(),
            local_is_up: state.in_use(),
            home_kubeconfig: home_kubeconfig().is_some_and(|path| path.is_file()),
            in_a_pod: variable("KUBERNETES_SERVICE_HOST").is_some(),
        };
        match choose(facts, state.root())? {
            Which::Cluster => Ok(Mesh::Cluster(self.cluster.clone())),
            Which::Local | Which::Auto => Ok(Mesh::Local(state)),
        }
    }
}

impl ClusterArgs {
    fn by_flag(&self) -> bool {
        self.context.is_some() || self.kubeconfig.is_some()
    }

    /// How long to wait for one answer.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(self.request_timeout)
    }

    /// The files to read, in order: that of the flag, those of KUBECONFIG, the one of the home directory. Empty if there is none.
    pub fn files(&self) -> Vec<PathBuf> {
        if let Some(file) = &self.kubeconfig {
            return vec![file.clone()];
        }
        match variable("KUBECONFIG") {
            Some(paths) => std::env::split_paths(&paths).filter(|path| path.is_file()).collect(),
            None => home_kubeconfig().into_iter().filter(|path| path.is_file()).collect(),
        }
    }
}

impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mesh::Local(state) => write!(f, "the mesh on this machine, {}", state.root().display()),
            Mesh::Cluster(_) => write!(f, "the mesh of a cluster"),
        }
    }
}

/// Never answers [`Which::Auto`].
fn choose(facts: Facts, local: &Path) -> Result<Which, ChoiceError> {
    match facts.which {
        Which::Auto if facts.state_flag && facts.cluster_flag => Err(ChoiceError::Both),
        Which::Auto if facts.state_flag => Ok(Which::Local),
        Which::Auto if facts.cluster_flag => Ok(Which::Cluster),
        Which::Auto if facts.state_variable => Ok(Which::Local),
        Which::Auto if facts.kubeconfig_variable => Ok(Which::Cluster),
        Which::Auto if facts.local_is_up => Ok(Which::Local),
        Which::Auto if facts.home_kubeconfig || facts.in_a_pod => Ok(Which::Cluster),
        Which::Auto => Err(ChoiceError::Nothing { local: local.to_owned() }),
        forced => Ok(forced),
    }
}

fn home_kubeconfig() -> Option<PathBuf> {
    Some(PathBuf::from(variable("HOME")?).join(".kube/config"))
}

/// An environment variable that is not empty.
#[allow(
    clippy::disallowed_methods,
    reason = "this is where the command line is read; these variables belong to kubectl"
)]
pub(super) fn variable(name: &str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Where a local mesh is without `--state`.
pub(super) fn default_state() -> &'static Path {
    Path::new(DEFAULT_DIR)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_win_over_variables_and_those_over_what_is_there() {
        let all = Facts {
            state_variable: true,
            kubeconfig_variable: true,
            local_is_up: true,
            home_kubeconfig: true,
            in_a_pod: true,
            ..Facts::default()
        };
        let no_state = Facts { state_variable: false, ..all };
        let nothing_said = Facts { kubeconfig_variable: false, ..no_state };
        let not_up = Facts { local_is_up: false, ..nothing_said };
        let table = [
            (Facts { state_flag: true, ..all }, Ok(Which::Local)),
            (Facts { cluster_flag: true, ..all }, Ok(Which::Cluster)),
            (all, Ok(Which::Local)),
            (no_state, Ok(Which::Cluster)),
            (nothing_said, Ok(Which::Local)),
            (not_up, Ok(Which::Cluster)),
            (Facts { home_kubeconfig: false, ..not_up }, Ok(Which::Cluster)),
            (Facts { which: Which::Local, ..no_state }, Ok(Which::Local)),
            (Facts { which: Which::Cluster, ..all }, Ok(Which::Cluster)),
            (Facts { state_flag: true, cluster_flag: true, ..all }, Err(ChoiceError::Both)),
        ];
        for (facts, expected) in table {
            assert_eq!(choose(facts, Path::new("/s")), expected, "{facts:?}");
        }
    }

    #[test]
    fn where_there_is_nothing_both_kinds_are_named() {
        let error = choose(Facts::default(), Path::new("/run/x")).unwrap_err().to_string();
        for part in
            ["/run/x", "culvert up", "--state", "--context", "--kubeconfig", "KUBECONFIG", "~/.kube/config"]
        {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
}
