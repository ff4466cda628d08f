//! Where a cluster keeps what.

use std::path::{Path, PathBuf};

/// The default state directory: on a real file system, because containers' layers are kept below it.
pub const DEFAULT: &str = "/var/tmp/culvert-cluster";

/// The state directory.
#[derive(Clone, Debug)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// Below `dir`, which need not exist.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Anything by its name.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Network namespaces.
    pub fn namespaces(&self) -> PathBuf {
        self.at("ns")
    }

    /// The control plane's namespace.
    pub fn control_plane(&self) -> PathBuf {
        self.namespaces().join("controller")
    }

    /// A node's network namespace.
    pub fn node_namespace(&self, node: &str) -> PathBuf {
        self.namespaces().join(format!("node.{node}"))
    }

    /// What a node has of its own of the file system.
    pub fn node(&self, node: &str) -> PathBuf {
        self.at(&format!("node-{node}"))
    }

    /// What a program said.
    pub fn log(&self, label: &str) -> PathBuf {
        self.at(&format!("logs/{label}.log"))
    }

    /// Records of started processes.
    pub fn processes(&self) -> PathBuf {
        self.at("processes")
    }

    /// How an administrator reaches the cluster, from inside the control plane's namespace.
    pub fn kubeconfig(&self) -> PathBuf {
        self.at("kubeconfig")
    }
}
