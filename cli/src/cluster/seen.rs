//! What was seen of a cluster at one moment, in the few words that the mesh is about. Everything that decides (problems, tables) is a
//! function of it.

use std::collections::{BTreeMap, BTreeSet};

use culvert_k8s_api::core::Pod;
use culvert_k8s_api::enrolment::{EnablementSelectors, Settings, decide};
use culvert_k8s_api::labels;
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::reach::Unreached;

/// Everything that was looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The API server's clock, or ours if it did not answer.
    pub now: Timestamp,
    /// Ahead of the API server's clock by so many seconds, ours (behind if negative).
    pub skew: i64,
    /// What the cluster is called.
    pub name: String,
    /// Version of Kubernetes; `None` if the API server does not answer.
    pub kubernetes: Option<String>,
    /// Why the API server does not answer.
    pub away: Option<String>,
    /// Namespace of the installation.
    pub system: String,
    /// What could not be read, and why.
    pub unread: Vec<(String, String)>,
    /// The controller's Deployment.
    pub controller: Option<Rollout>,
    /// The agent's DaemonSet.
    pub agent: Option<Rollout>,
    /// The proxy's DaemonSet.
    pub proxy: Option<Rollout>,
    /// Namespaces that the agents leave alone.
    pub excluded: Vec<String>,
    /// Who joins, if the agents are told so instead of by labels.
    pub enablement: EnablementSelectors,
    /// The lease of the controller that writes.
    pub lease: Option<Lease>,
    /// Every node.
    pub nodes: Vec<Node>,
    /// The mesh's own pods.
    pub own: Vec<OwnPod>,
    /// Labels of every namespace.
    pub namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Every other pod.
    pub pods: Vec<SeenPod>,
    /// End of the root certificate that pods of the system namespace are given.
    pub root: Option<Timestamp>,
    /// The admission webhook, if there is one.
    pub webhook: Option<Webhook>,
    /// Gateways of a waypoint class; `None` if the cluster has no Gateway API.
    pub waypoints: Option<Vec<Waypoint>>,
    /// Names `namespace/name` of waypoints that something is bound to, and what.
    pub bound: BTreeMap<String, BTreeSet<String>>,
    /// Mesh resources with what the API server and the controller say of them.
    pub policies: Vec<Policy>,
}

/// A Deployment or a DaemonSet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Rollout {
    /// Pods there should be.
    pub desired: i32,
    /// Pods of the newest template.
    pub updated: i32,
    /// Its controller has seen the newest template.
    pub observed: bool,
    /// Version, as the chart labels it.
    pub version: String,
}

/// The leader's lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Lease {
    /// Who has it; empty if nobody.
    pub holder: String,
    /// When it was last renewed.
    pub renewed: Option<Timestamp>,
    /// For how long it is good, seconds.
    pub seconds: i64,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Node {
    /// Its name.
    pub name: String,
    /// Condition Ready is True.
    pub ready: bool,
    /// Since when the condition is as it is.
    pub since: Option<Timestamp>,
    /// What the condition says.
    pub why: String,
    /// When its kubelet last renewed the node's lease.
    pub renewed: Option<Timestamp>,
    /// Runs Linux.
    pub linux: bool,
    /// Kernel, as the node reports it.
    pub kernel: String,
    /// Kubelet, as the node reports it.
    pub kubelet: String,
    /// Processor architecture.
    pub architecture: String,
}

/// Which of the mesh's programs a pod runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Controller,
    Agent,
    Proxy,
}

/// A pod of the mesh itself.
#[derive(Clone, Debug)]
pub(crate) struct OwnPod {
    /// What it runs.
    pub role: Role,
    /// The pod.
    pub pod: SeenPod,
    /// What it says of itself; `None` if it was not asked.
    pub said: Option<Result<Said, Unreached>>,
}

/// What a program said, each its own.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Said {
    Controller(ControllerPage, Vec<PolicyStatus>),
    /// The clock of its node is ahead of the API server's by so many seconds.
    Agent(Option<i64>),
    Proxy(Vec<Certificate>),
}

/// A pod.
#[derive(Clone, Debug, Default)]
pub(crate) struct SeenPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Where it runs; empty if nowhere yet.
    pub node: String,
    /// Pending, Running, Succeeded or Failed.
    pub phase: String,
    /// Condition Ready is True.
    pub ready: bool,
    /// Since when the condition is as it is.
    pub since: Option<Timestamp>,
    /// Why a container waits or the pod is not scheduled, if one does.
    pub why: String,
    /// Restarts of all containers.
    pub restarts: i32,
    /// It is being deleted.
    pub deleted: bool,
    /// Shares the node's network.
    pub host_network: bool,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations, those of the mesh.
    pub annotations: BTreeMap<String, String>,
}

/// The admission webhook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Webhook {
    /// The configuration's name.
    pub name: String,
    /// It has the controller's root.
    pub bundle: bool,
    /// Whether it answered when the API server asked it; `None` if that could not be tried.
    pub answered: Option<Result<(), String>>,
}

/// A Gateway that is a waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Waypoint {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its class.
    pub class: String,
    /// What it is for: service, workload, all or none.
    pub traffic: String,
    /// Condition Programmed; `None` before anybody wrote it.
    pub programmed: Option<bool>,
    /// Reason of the condition.
    pub reason: String,
    /// Its message.
    pub message: String,
    /// Since when.
    pub since: Option<Timestamp>,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// When it was made.
    #[serde(skip)]
    pub created: Option<Timestamp>,
}

/// A mesh resource, and conditions of it that are not as they should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Policy {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Conditions with status False: type, reason, message, since when.
    pub refused: Vec<(String, String, String, Option<Timestamp>)>,
}

/// `/debug/proxies` of a controller.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub(crate) struct ControllerPage {
    /// Version of the controller.
    pub version: String,
    /// The newest generation.
    pub generation: u64,
    /// Proxies connected to this replica.
    pub proxies: Vec<Connected>,
}

/// A proxy as a controller sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Connected {
    /// The node whose token it has.
    pub node: String,
    /// Namespace of its pod, as it says.
    pub namespace: String,
    /// Its pod, as it says.
    pub pod: String,
    /// Its version, as it says.
    pub version: String,
    /// Since when.
    pub connected: Timestamp,
    /// By type: Address, Authorization.
    pub types: BTreeMap<String, Progress>,
}

/// How far a proxy is with one type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Progress {
    /// The generation it has in force.
    pub acked_generation: Option<u64>,
    /// Since when it lacks something newer.
    pub behind_since: Option<Timestamp>,
    /// Responses sent.
    pub sent: u64,
    /// Responses it refused.
    pub nacked: u64,
    /// Why it refused the latest.
    pub last_nack: Option<String>,
}

/// What became of a policy, by a controller.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct PolicyStatus {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Node tunnels enforce it.
    pub accepted: bool,
    /// One word.
    pub reason: String,
    /// For a person.
    pub message: String,
}

/// A certificate that a proxy holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Certificate {
    /// Whose.
    pub identity: String,
    /// Initializing, Available or Unavailable.
    pub state: String,
    /// Serial number, hex.
    pub serial: Option<String>,
    /// Begin of validity.
    pub not_before: Option<Timestamp>,
    /// End of validity.
    pub not_after: Option<Timestamp>,
    /// Fetches that failed since the last that did not.
    #[serde(default)]
    pub failures: u32,
    /// Why the last failed.
    #[serde(default)]
    pub last_error: Option<String>,
}

/// Where a pod stands towards the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Enrolment {
    /// Its traffic goes through the mesh.
    Enabled,
    /// Its rules are in place, and the proxy does not serve it yet.
    Pending,
    /// It should be in the mesh and is not.
    Missing,
    /// It should not be in the mesh and is.
    Stray,
    /// It is none of the mesh's.
    Outside,
}

impl Seen {
    /// Where a pod stands.
    pub(crate) fn enrolment(&self, pod: &SeenPod) -> Enrolment {
        let said = pod.annotations.get(labels::REDIRECTION).map(String::as_str);
        let lives = matches!(pod.phase.as_str(), "Pending" | "Running") && !pod.deleted;
        match (self.should_join(pod) && lives, said) {
            (true, Some("enabled")) => Enrolment::Enabled,
            (true, Some("pending")) => Enrolment::Pending,
            (true, _) => Enrolment::Missing,
            (false, Some("enabled" | "pending")) if lives => Enrolment::Stray,
            (false, _) => Enrolment::Outside,
        }
    }

    /// Whether its labels, and those of its namespace, ask for it: the function that the agents ask.
    fn should_join(&self, pod: &SeenPod) -> bool {
        let mut asked = Pod::default();
        asked.metadata.namespace.clone_from(&pod.namespace);
        asked.metadata.labels.clone_from(&pod.labels);
        asked.metadata.annotations.clone_from(&pod.annotations);
        asked.spec.host_network = pod.host_network;
        let settings = Settings {
            excluded_namespaces: self.excluded.clone(),
            system_namespace: self.system.clone(),
            enablement: self.enablement.clone(),
        };
        let none = BTreeMap::new();
        decide(&asked, self.namespaces.get(&pod.namespace).unwrap_or(&none), &settings).joins()
    }

    /// The mesh's own pods of a role that are not being deleted.
    pub(crate) fn of_role(&self, role: Role) -> impl Iterator<Item = &OwnPod> {
        self.own.iter().filter(move |own| own.role == role && !own.pod.deleted)
    }

    /// The proxies that any controller has a stream to, with that controller's page.
    pub(crate) fn connected(&self) -> impl Iterator<Item = (&OwnPod, &ControllerPage, &Connected)> {
        self.of_role(Role::Controller).flat_map(|own| {
            let page = match &own.said {
                Some(Ok(Said::Controller(page, _))) => Some(page),
                _ => None,
            };
            page.into_iter().flat_map(move |page| page.proxies.iter().map(move |proxy| (own, page, proxy)))
        })
    }

    /// The newest generation that a controller has.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.of_role(Role::Controller)
            .filter_map(|own| match &own.said {
                Some(Ok(Said::Controller(page, _))) => Some(page.generation),
                _ => None,
            })
            .max()
    }
}

impl Connected {
    /// Since when it lacks something of any type.
    pub(crate) fn behind_since(&self) -> Option<Timestamp> {
        self.types.values().filter_map(|progress| progress.behind_since).min()
    }
}

/// Whole seconds from `earlier` to `later`.
pub(crate) fn seconds(earlier: Timestamp, later: Timestamp) -> i64 {
    later.as_second() - earlier.as_second()
}

/// A length of time as kubectl writes ages: `12s`, `3m`, `5h`, `6d`.
pub(crate) fn age(seconds: i64) -> String {
    let seconds = seconds.max(0);
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7_199 => format!("{}m", seconds / 60),
        7_200..=172_799 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        let shown: Vec<_> = [-5, 0, 119, 120, 7_199, 7_200, 172_800].map(age).into();
        assert_eq!(shown, ["0s", "0s", "119s", "2m", "119m", "2h", "2d"]);
    }
}
