//! The mesh of a cluster: what was seen, as data. The form is part of the interface; docs/reference/cli.md describes it.

use std::collections::BTreeMap;
use std::process::ExitCode;

use k8s_openapi::jiff::Timestamp;
use serde::Serialize;

use super::{exit_code, table};
use crate::args::{ClusterArgs, StatusArgs};
use crate::cluster::Cluster;
use crate::cluster::gather::{Scope, gather};
use crate::cluster::problems::{Problem, problems};
use crate::cluster::seen::{Connected, Enrolment, OwnPod, Role, Said, Seen, SeenPod, Waypoint};
use crate::output::API_VERSION;

/// What `-o json` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Status {
    api_version: &'static str,
    kind: &'static str,
    /// The cluster.
    pub cluster: ClusterView,
    /// What is wrong, the worst first; empty if all is well.
    pub problems: Vec<Problem>,
    /// Lists and pages that could not be had; what is shown of them is less than there is.
    pub unread: Vec<String>,
    /// Controllers.
    pub control_plane: ControlPlane,
    /// Nodes with their agent and proxy.
    pub nodes: Vec<NodeView>,
    /// Namespaces with a pod in the mesh, or a label that asks for it.
    pub namespaces: Vec<NamespaceView>,
    /// Pods that are in the mesh, should be or should not be.
    pub pods: Vec<PodView>,
    /// Waypoints; absent without the Gateway API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waypoints: Option<Vec<Waypoint>>,
    /// Mesh resources.
    pub policies: Vec<PolicyView>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ClusterView {
    /// What it is called: the server, and the context.
    pub name: String,
    /// Namespace of the installation.
    pub system_namespace: String,
    /// Version of Kubernetes, if it answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<String>,
    /// When this was seen, by the API server's clock.
    pub seen: Timestamp,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ControlPlane {
    /// Version, as a controller says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Replicas there should be.
    pub desired: i32,
    /// Pods.
    pub replicas: Vec<ReplicaView>,
    /// Who writes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// When the leader last said so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lease_renewed: Option<Timestamp>,
    /// The newest generation of configuration.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// End of the root certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub root_not_after: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ReplicaView {
    /// The pod.
    pub pod: String,
    /// Its node.
    pub node: String,
    /// It is ready.
    pub ready: bool,
    /// Restarts of its containers.
    pub restarts: i32,
    /// Proxies connected to it.
    pub proxies: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeView {
    /// Its name.
    pub name: String,
    /// It is Ready.
    pub ready: bool,
    /// Kernel, kubelet.
    pub kernel: String,
    pub kubelet: String,
    /// Its agent, absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent: Option<ProgramView>,
    /// Its proxy, absent if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proxy: Option<ProgramView>,
    /// What controllers know of the proxy, absent if it is connected to none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub configuration: Option<ConfigurationView>,
    /// Certificates of its pods, absent if the proxy could not be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub certificates: Option<CertificatesView>,
    /// Pods in the mesh.
    pub enrolled: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ProgramView {
    /// The pod.
    pub pod: String,
    /// It is ready.
    pub ready: bool,
    /// Restarts of its containers.
    pub restarts: i32,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ConfigurationView {
    /// The controller's pod.
    pub controller: String,
    /// What the proxy says its version is.
    pub version: String,
    /// Since when it is connected.
    pub connected: Timestamp,
    /// The generation that it has of everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// Seconds that it is behind; 0 if it has all.
    pub behind_seconds: i64,
    /// By type.
    pub types: BTreeMap<String, crate::cluster::seen::Progress>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CertificatesView {
    /// All that it should have.
    pub total: usize,
    /// Those that it has.
    pub valid: usize,
    /// When the first of them ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_not_after: Option<Timestamp>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NamespaceView {
    /// Its name.
    pub name: String,
    /// Its label asks for its pods to be in the mesh.
    pub labelled: bool,
    /// Pods that should be in the mesh.
    pub pods: usize,
    /// Pods that are.
    pub enrolled: usize,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodView {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Where it stands.
    pub mesh: Enrolment,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PolicyView {
    /// Its kind.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

pub(super) async fn status(cluster: &ClusterArgs, args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(cluster).await?;
    let scope = Scope { namespace: args.namespace.clone(), node: args.node.clone() };
    let seen = gather(&cluster, &scope).await;
    let status = Status::new(&seen);
    match args.output.data(&status)? {
        Some(data) => print!("{data}"),
        None => print!("{}", table::page(&status, args.output.is_wide())),
    }
    Ok(exit_code(status.problems.is_empty()))
}

impl Status {
    pub(super) fn new(seen: &Seen) -> Self {
        Self {
            api_version: API_VERSION,
            kind: "MeshStatus",
            cluster: ClusterView {
                name: seen.name.clone(),
                system_namespace: seen.system.clone(),
                kubernetes: seen.kubernetes.clone(),
                seen: seen.now,
            },
            problems: problems(seen),
            unread: seen.unread.iter().map(|(what, _)| what.clone()).collect(),
            control_plane: control_plane(seen),
            nodes: nodes(seen),
            namespaces: namespaces(seen),
            pods: pods(seen),
            waypoints: seen.waypoints.clone(),
            policies: seen
                .policies
                .iter()
                .map(|it| PolicyView {
                    kind: it.kind.clone(),
                    namespace: it.namespace.clone(),
                    name: it.name.clone(),
                })
                .collect(),
        }
    }
}

fn control_plane(seen: &Seen) -> ControlPlane {
    let mut version = None;
    let replicas = seen.of_role(Role::Controller).map(|own| {
        let page = match &own.said {
            Some(Ok(Said::Controller(page, _))) => Some(page),
            _ => None,
        };
        version = version.take().or_else(|| page.map(|page| page.version.clone()));
        ReplicaView {
            pod: own.pod.name.clone(),
            node: own.pod.node.clone(),
            ready: own.pod.ready,
            restarts: own.pod.restarts,
            proxies: page.map_or(0, |page| page.proxies.len()),
        }
    });
    let replicas = replicas.collect();
    let lease = seen.lease.as_ref();
    ControlPlane {
        version: version.or_else(|| seen.controller.as_ref().map(|it| it.version.clone())),
        desired: seen.controller.as_ref().map_or(0, |it| it.desired),
        replicas,
        leader: lease.map(|it| it.holder.clone()).filter(|holder| !holder.is_empty()),
        lease_renewed: lease.and_then(|it| it.renewed),
        generation: seen.generation(),
        root_not_after: seen.root,
    }
}

fn nodes(seen: &Seen) -> Vec<NodeView> {
    let mut enrolled: BTreeMap<&str, usize> = BTreeMap::new();
    for pod in seen.pods.iter().filter(|pod| seen.enrolment(pod) == Enrolment::Enabled) {
        *enrolled.entry(&pod.node).or_default() += 1;
    }
    seen.nodes
        .iter()
        .map(|node| {
            let proxy = best(seen, Role::Proxy, &node.name);
            NodeView {
                name: node.name.clone(),
                ready: node.ready,
                kernel: node.kernel.clone(),
                kubelet: node.kubelet.clone(),
                agent: best(seen, Role::Agent, &node.name).map(program),
                proxy: proxy.map(program),
                configuration: proxy.and_then(|proxy| configuration(seen, &proxy.pod)),
                certificates: proxy.and_then(|proxy| certificates(seen, proxy)),
                enrolled: enrolled.get(node.name.as_str()).copied().unwrap_or_default(),
            }
        })
        .collect()
}

/// Of several pods on a node, as during an update, one that is ready.
fn best<'a>(seen: &'a Seen, role: Role, node: &str) -> Option<&'a OwnPod> {
    seen.of_role(role).filter(|own| own.pod.node == node).max_by_key(|own| (own.pod.ready, own.pod.created))
}

fn program(own: &OwnPod) -> ProgramView {
    ProgramView { pod: own.pod.name.clone(), ready: own.pod.ready, restarts: own.pod.restarts }
}

fn configuration(seen: &Seen, proxy: &SeenPod) -> Option<ConfigurationView> {
    let (own, _, connected) = seen.connected().find(|(_, _, connected)| connected.pod == proxy.name)?;
    let behind = connected.behind_since().map_or(0, |since| seen.now.as_second() - since.as_second());
    Some(ConfigurationView {
        controller: own.pod.name.clone(),
        version: connected.version.clone(),
        connected: connected.connected,
        generation: generation(connected),
        behind_seconds: behind.max(0),
        types: connected.types.clone(),
    })
}

/// The generation that a proxy has of every type; `None` while it lacks one.
pub(super) fn generation(of: &Connected) -> Option<u64> {
    of.types.values().map(|progress| progress.acked_generation).min().flatten()
}

fn certificates(seen: &Seen, proxy: &OwnPod) -> Option<CertificatesView> {
    let Some(Ok(Said::Proxy(list))) = &proxy.said else { return None };
    let valid =
        list.iter().filter(|it| it.state == "Available" && it.not_after.is_none_or(|end| end > seen.now));
    let ends = list.iter().filter_map(|it| it.not_after).min();
    Some(CertificatesView { total: list.len(), valid: valid.count(), next_not_after: ends })
}

fn namespaces(seen: &Seen) -> Vec<NamespaceView> {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for pod in &seen.pods {
        let (should, is) = match seen.enrolment(pod) {
            Enrolment::Enabled => (1, 1),
            Enrolment::Pending | Enrolment::Missing => (1, 0),
            Enrolment::Stray => (0, 1),
            Enrolment::Outside => continue,
        };
        let count = counts.entry(&pod.namespace).or_default();
        *count = (count.0 + should, count.1 + is);
    }
    let mode = |labels: &BTreeMap<String, String>| {
        labels.get(culvert_k8s_api::labels::DATAPLANE_MODE).map(String::as_str)
            == Some(culvert_k8s_api::labels::MODE_AMBIENT)
    };
    seen.namespaces
        .iter()
        .filter(|(name, labels)| mode(labels) || counts.contains_key(name.as_str()))
        .map(|(name, labels)| {
            let (pods, enrolled) = counts.get(name.as_str()).copied().unwrap_or_default();
            NamespaceView { name: name.clone(), labelled: mode(labels), pods, enrolled }
        })
        .collect()
}

fn pods(seen: &Seen) -> Vec<PodView> {
    let all = seen.pods.iter().map(|pod| PodView {
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        node: pod.node.clone(),
        mesh: seen.enrolment(pod),
    });
    all.filter(|pod| pod.mesh != Enrolment::Outside).collect()
}
