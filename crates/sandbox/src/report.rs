//! The supervisor's account of everything, written as one file whenever something changes: what `culvert status` shows and
//! what other commands look things up in.

use std::net::IpAddr;
use std::path::PathBuf;

use culvert_k8s_api::status::Phase;
use serde::{Deserialize, Serialize};

use crate::cluster::{Key, ServiceView};
use crate::container::ContainerState;
use crate::daemon::{DaemonState, Role};
use crate::plan::Family;
use crate::process::Record;

/// Everything.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// The supervisor's own process.
    pub supervisor: Record,
    /// The directory of manifests.
    pub manifests: PathBuf,
    /// Address families in use.
    pub family: Family,
    /// Whether the mesh's programs run.
    pub mesh: bool,
    /// Everything has come up at least once, or ended as it should.
    pub settled: bool,
    /// What is wrong, most important first.
    pub problems: Vec<String>,
    /// Nodes by name.
    pub nodes: Vec<NodeReport>,
    /// The mesh's programs.
    pub system: Vec<DaemonReport>,
    /// Pods by namespace and name.
    pub pods: Vec<PodReport>,
    /// Services by namespace and name.
    pub services: Vec<ServiceView>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeReport {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its namespace.
    pub netns: PathBuf,
}

/// A program of the mesh.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DaemonReport {
    /// What it is.
    pub role: Role,
    /// Its node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What it is doing.
    #[serde(flatten)]
    pub state: DaemonState,
    /// Its log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodReport {
    /// Which pod.
    #[serde(flatten)]
    pub key: Key,
    /// Its incarnation.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// Its addresses.
    #[serde(rename = "podIPs")]
    pub addresses: Vec<IpAddr>,
    /// Its namespace file; the node's with `hostNetwork`.
    pub netns: PathBuf,
    /// Where it is in its life.
    pub phase: Phase,
    /// It takes traffic.
    pub ready: bool,
    /// Its labels ask for the mesh.
    pub enrolled: bool,
    /// It is being removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
    /// Its containers.
    pub containers: Vec<ContainerReport>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerReport {
    /// Its name.
    pub name: String,
    /// What it is doing.
    #[serde(flatten)]
    pub state: ContainerState,
    /// How often it was started again.
    pub restarts: u32,
    /// Its log.
    pub log: PathBuf,
}

impl Report {
    /// The pod with this key.
    pub fn pod(&self, key: &Key) -> Option<&PodReport> {
        self.pods.iter().find(|pod| pod.key == *key)
    }
}
