//! The CNI plugin (C15-C19): the runtime starts it for each pod, after the plugin that made the pod's interface. It asks the agent and
//! lets the pod start only when its traffic is the mesh's, or when it is certain that it should not be.

mod ask;
mod log;
mod lookup;
mod plugin;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use culvert_k8s_api::enrolment::EnablementSelectors;
use serde::{Deserialize, Serialize};

pub use ask::{MAX_REPLY, MAX_REQUEST, PATH};
pub use log::files as log_files;
#[cfg(test)]
pub(crate) use lookup::joins;
#[cfg(test)]
pub(crate) use plugin::execute;
pub use plugin::{Invocation, run};

/// The plugin's name: of its file, and its `type` in a configuration.
pub const PLUGIN: &str = "culvert-cni";
/// How long a pod waits for an agent that is away, and for the API server in its place. With one last answer of the agent and of the API server
/// the plugin takes about a minute at most, and kubelet gives a sandbox four. It makes another one afterwards.
pub const AWAY: Duration = Duration::from_secs(30);
/// How long the agent may take to have a pod enrolled; the plugin waits a little longer for its answer. Kubelet gives a sandbox minutes.
pub const ENROL: Duration = Duration::from_secs(15);

/// What the plugin tells the agent (C16).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct AddRequest {
    /// Path of the pod's network namespace.
    pub netns: PathBuf,
    /// The pod's name.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
    /// Its addresses.
    #[serde(rename = "IPs")]
    pub ips: Vec<IpAddr>,
    /// Its uid, where the runtime gives it.
    #[serde(rename = "PodUID", default, skip_serializing_if = "Option::is_none")]
    pub pod_uid: Option<String>,
}

/// The plugin's part of the configuration. The agent writes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginConfig {
    /// [`PLUGIN`].
    #[serde(rename = "type")]
    pub kind: String,
    /// Where the agent listens.
    pub event_socket: PathBuf,
    /// Its own way to the API server, for when the agent is away.
    pub kubeconfig: PathBuf,
    /// Namespaces whose pods never join (C06).
    pub exclude_namespaces: Vec<String>,
    /// Which pods join, in place of ambient's labels (C02).
    #[serde(default, skip_serializing_if = "EnablementSelectors::is_empty")]
    pub enablement_selectors: EnablementSelectors,
    /// Where the mesh's own pods are.
    pub system_namespace: String,
    /// Names of pods there begin with one of these: they always start, or a node could not come back after a reboot (C19).
    pub own_pods: Vec<String>,
}
