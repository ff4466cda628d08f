//! What pods there are and which of them join: from directories, or from a Kubernetes API server.

mod cluster;
mod describe;
mod directory;
mod kubernetes;
mod procfs;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use culvert_net::redirect::RedirectConfig;

use super::Desired;

pub use cluster::{Again, Cluster, PodKey};
pub use directory::DirectorySource;
pub use kubernetes::{Announced, KubernetesSource};
pub use procfs::{kubelet_uid, namespaces};

/// What is said now.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// The pods of this node that should be enrolled.
    pub desired: Vec<Desired>,
    /// Those that run here and should not.
    pub others: Vec<Other>,
    /// Those that should be, run, and cannot be found on the node.
    pub unfound: Vec<Unfound>,
    /// What the kubelet may probe of those that should be, by uid.
    pub probed: BTreeMap<String, BTreeSet<SocketAddr>>,
    /// Nothing is missing: no file that cannot be read is without a former content that holds instead.
    pub complete: bool,
}

/// A pod that stays outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Other {
    /// The pod's uid.
    pub uid: String,
    /// Its network namespace.
    pub netns: PathBuf,
    /// Its namespace is excluded (C06).
    pub excluded: bool,
}

/// A pod that should be enrolled and has no namespace that could be found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unfound {
    /// The pod's uid.
    pub uid: String,
    /// Namespace and name.
    pub name: String,
}

/// Where the pods come from.
#[derive(Debug)]
pub enum Source {
    /// Manifests and status files.
    Directory(Box<DirectorySource>),
    /// An API server.
    Kubernetes(Box<KubernetesSource>),
}

impl View {
    /// Nobody should be enrolled any more.
    pub fn leave(&mut self) {
        let left =
            self.desired.drain(..).map(|pod| Other { uid: pod.uid, netns: pod.netns, excluded: false });
        self.others.extend(left);
        self.unfound.clear();
        self.probed.clear();
    }

    /// Adds a pod that should be enrolled. Where nothing inbound is captured, probes need no exemption.
    fn join(&mut self, pod: Desired, ips: &[IpAddr]) {
        self.probed.insert(pod.uid.clone(), probed(&pod.rules, ips));
        self.desired.push(pod);
    }
}

impl Source {
    /// Resolves when something may have changed.
    pub async fn changed(&mut self) {
        match self {
            Self::Directory(source) => source.changed().await,
            Self::Kubernetes(source) => source.changed().await,
        }
    }

    /// What should be now.
    ///
    /// # Errors
    /// It is not known.
    pub fn view(&mut self) -> anyhow::Result<View> {
        match self {
            Self::Directory(source) => source.view(),
            Self::Kubernetes(source) => source.view(),
        }
    }

    /// Takes in what the CNI plugin said of a pod, and gives its uid; `None` while the pod is not known (C21).
    pub fn announce(&mut self, pod: &Announced) -> Option<String> {
        match self {
            Self::Directory(_) => None,
            Self::Kubernetes(source) => source.announce(pod),
        }
    }
}

fn probed(rules: &RedirectConfig, ips: &[IpAddr]) -> BTreeSet<SocketAddr> {
    if rules.bypass_inbound {
        return BTreeSet::new();
    }
    let ports = |ip| rules.probe_ports.iter().map(move |port| SocketAddr::new(ip, *port));
    ips.iter().copied().flat_map(ports).collect()
}
