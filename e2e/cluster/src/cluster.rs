//! The cluster as a whole.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_sandbox::lab::{self, Lab};
use culvert_sandbox::plan::Family;

use crate::api::Api;
use crate::control_plane;
use crate::files::Files;
use crate::images;
use crate::node::{self, Node};
use crate::process::{self, Process};
use crate::shell::run;

/// Names of the nodes.
pub const NODES: [&str; 2] = ["node-a", "node-b"];
/// From a kubelet's start until its node is ready.
const NODE_READY: Duration = Duration::from_secs(60);

/// Where the programs of Kubernetes are.
#[derive(Clone, Debug)]
pub struct Programs(PathBuf);

impl Programs {
    /// In that directory: what `make cluster-programs` builds.
    ///
    /// # Errors
    /// Names what is missing, and what brings it.
    pub fn new(dir: &Path) -> Result<Self> {
        for program in ["kube-apiserver", "kubelet", "kubectl", "helm", "coredns", "pause"] {
            let path = dir.join(program);
            ensure!(path.is_file(), "{} is missing: `make cluster-programs` builds it", path.display());
        }
        for program in ["etcd", "containerd", "runc", "nft", "nsenter"] {
            let found = Command::new("sh").args(["-c", &format!("command -v {program}")]).output()?;
            ensure!(found.status.success(), "{program} is missing: `make setup-cluster` installs it");
        }
        Ok(Self(dir.canonicalize()?))
    }

    /// A program that is built here, or is Debian's.
    pub(crate) fn path(&self, program: &str) -> PathBuf {
        let built = self.0.join(program);
        if built.is_file() { built } else { PathBuf::from(program) }
    }

    /// PATH with them first.
    pub(crate) fn search_path(&self) -> OsString {
        #[expect(clippy::disallowed_methods, reason = "PATH is extended, not read for a setting")]
        let rest = std::env::var_os("PATH").unwrap_or_default();
        let mut path = self.0.clone().into_os_string();
        path.push(":");
        path.push(rest);
        path
    }
}

/// A cluster that runs.
#[derive(Clone, Debug)]
pub struct Cluster {
    files: Files,
    programs: Programs,
    nodes: Vec<Node>,
}

impl Cluster {
    /// Starts one, and returns when its nodes are ready. A cluster that was there before is taken down.
    ///
    /// # Errors
    /// If something of it does not start; the logs are below the state directory.
    pub fn up(files: &Files, programs: Programs) -> Result<Self> {
        Self::down(files)?;
        fs::create_dir_all(files.dir())?;
        let mut lab = Lab::create(&files.namespaces(), Family::Dual)?;
        for name in NODES {
            lab.add_node(name)?;
        }
        // The namespaces outlive this program; `down` removes them.
        std::mem::forget(lab);
        for namespace in
            std::iter::once(files.control_plane()).chain(NODES.map(|name| files.node_namespace(name)))
        {
            // Nobody is there, but without it the API server finds no address of its own.
            let net = format!("--net={}", namespace.display());
            for default in [["-4", "198.18.0.1"], ["-6", "fd00:18::1"]] {
                run(Command::new("nsenter")
                    .args([&net, "--", "ip", default[0], "route", "add", "default", "via", default[1]]))?;
            }
        }
        let names: Vec<String> = NODES.map(str::to_owned).into();
        control_plane::prepare(files, &names)?;
        let cluster = Self::open(files, programs)?;
        let pause = images::pause(files, &cluster.programs.path("pause"))?;
        for node in &cluster.nodes {
            node.boot()?;
        }
        control_plane::begin(files, &cluster.programs, &cluster.api())?;
        for node in &cluster.nodes {
            cluster.api().wait("containerd", Duration::from_secs(20), |_| node.import(&pause).map(Some))?;
        }
        cluster.wait_ready()?;
        Ok(cluster)
    }

    /// One that was started before.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(files: &Files, programs: Programs) -> Result<Self> {
        let dir = files.dir().display();
        ensure!(files.kubeconfig().is_file(), "no cluster runs in {dir}: `make cluster` starts one");
        let node = |(index, name): (usize, &&str)| {
            Ok(Node::new(files.clone(), programs.clone(), name, u16::try_from(index + 1)?))
        };
        let nodes = NODES.iter().enumerate().map(node).collect::<Result<_>>()?;
        Ok(Self { files: files.clone(), programs, nodes })
    }

    /// Ends all that was started in this state directory, and removes it. What is not there is no error.
    ///
    /// # Errors
    /// If a process does not end or a mount does not go.
    pub fn down(files: &Files) -> Result<()> {
        process::end_recorded(files)?;
        node::remove_cgroups(files);
        // Mounts of the nodes went with their namespaces; those of the network namespaces are this machine's.
        lab::unmount(&files.namespaces())?;
        match fs::remove_dir_all(files.dir()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", files.dir().display()))
            }
            _ => Ok(()),
        }
    }

    /// Where it keeps what.
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The API server, for an administrator.
    pub fn api(&self) -> Api {
        Api::new(self.files.clone(), self.programs.clone())
    }

    /// Its nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// A node by its name.
    ///
    /// # Errors
    /// If there is none.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .with_context(|| format!("no node {name:?}: one of {NODES:?}"))
    }

    /// A program of the control plane.
    ///
    /// # Errors
    /// If it was never started.
    pub fn control_plane(&self, program: &str) -> Result<Process> {
        Process::find(&self.files, program)
    }

    /// Starts a program of the control plane again.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn start(&self, program: &str) -> Result<Process> {
        control_plane::start(&self.files, &self.programs, program)
    }

    /// Brings an image archive to every node.
    ///
    /// # Errors
    /// With what containerd's tool said.
    pub fn import(&self, archive: &Path) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(archive))
    }

    /// Returns when every node says that it is ready.
    ///
    /// # Errors
    /// If one does not get there.
    pub fn wait_ready(&self) -> Result<()> {
        for node in &self.nodes {
            let path = format!("/api/v1/nodes/{}", node.name());
            self.api().wait(&format!("node {}", node.name()), NODE_READY, |api| {
                let conditions = api.get(&path)?["status"]["conditions"].take();
                let ready = conditions
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|it| it["type"] == "Ready" && it["status"] == "True");
                Ok(ready.then_some(()))
            })?;
        }
        Ok(())
    }
}
