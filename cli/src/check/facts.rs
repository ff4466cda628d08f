//! What a check looks at beyond what the status shows: definitions of kinds, and what else is in the cluster that could get in the way.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use kube::api::{ListParams, PartialObjectMeta};
use kube::core::ObjectList;

use crate::cluster::Cluster;
use crate::cluster::connect::NoAnswer;
use crate::cluster::gather::list;
use crate::cluster::seen::Seen;

/// Annotation of a Gateway API definition.
const BUNDLE: &str = "gateway.networking.k8s.io/bundle-version";
/// Annotation of the same: standard or experimental.
const CHANNEL: &str = "gateway.networking.k8s.io/channel";
/// Whoever helm installed something for.
const RELEASE: &str = "meta.helm.sh/release-name";

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    /// Kinds of the mesh's API by plural and group, and whose they are: a helm release, or what else is known.
    pub kinds: Result<BTreeMap<String, String>, String>,
    /// Version and channel of the Gateway API, if it is there.
    pub gateway_api: Option<(String, String)>,
    /// Other control planes and node programs that do what the mesh does: `namespace/name`.
    pub others: Result<Vec<String>, String>,
    /// Settings of Cilium, if it is there.
    pub cilium: Option<BTreeMap<String, String>>,
    /// What pod security the installation's namespace enforces.
    pub pod_security: Option<String>,
}

pub(crate) async fn look(cluster: &Cluster, seen: &Seen) -> Facts {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    let all = ListParams::default();
    let names = ListParams::default().limit(500);
    let daemon_sets: Api<DaemonSet> = Api::all(cluster.client.clone());
    let deployments: Api<Deployment> = Api::all(cluster.client.clone());
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), "kube-system");
    let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
    let (definitions, sets, deployments, cilium, namespace) = tokio::join!(
        cluster.ask(definitions.list_metadata(&names)),
        list(cluster, &daemon_sets, &all),
        list(cluster, &deployments, &all),
        cluster.ask(maps.get_opt("cilium-config")),
        cluster.ask(namespaces.get_opt(&cluster.system)),
    );
    let gateway_api = definitions.as_ref().ok().and_then(gateway_api);
    let others = sets.and_then(|sets| Ok(others(&sets, &deployments?, &seen.system)));
    let labels = namespace.ok().flatten().and_then(|it| it.metadata.labels);
    Facts {
        kinds: definitions.map(|it| kinds(&it)).map_err(|error: NoAnswer| error.to_string()),
        gateway_api,
        others: others.map_err(|error| error.to_string()),
        cilium: cilium.ok().flatten().and_then(|map| map.data),
        pod_security: labels.and_then(|labels| labels.get("pod-security.kubernetes.io/enforce").cloned()),
    }
}

fn others(sets: &[DaemonSet], deployments: &[Deployment], system: &str) -> Vec<String> {
    let metas = sets.iter().map(|it| &it.metadata).chain(deployments.iter().map(|it| &it.metadata));
    let named = metas.filter_map(|meta| Some((meta.namespace.as_deref()?, meta.name.as_deref()?)));
    let others = named.filter(|(namespace, name)| *namespace != system && is_another(name));
    others.map(|(namespace, name)| format!("{namespace}/{name}")).collect()
}

/// Programs that take pods' traffic as this mesh does.
fn is_another(name: &str) -> bool {
    matches!(
        name,
        "ztunnel" | "istiod" | "istio-cni-node" | "culvert-controller" | "culvert-agent" | "linkerd-cni"
    ) || name.starts_with("istiod-")
}

/// Of the groups that the mesh's kinds are in.
fn kinds(definitions: &ObjectList<PartialObjectMeta<CustomResourceDefinition>>) -> BTreeMap<String, String> {
    let ours = |name: &str| name.ends_with(".security.istio.io") || name.ends_with(".networking.istio.io");
    let named = definitions.items.iter().filter_map(|it| Some((it.metadata.name.clone()?, &it.metadata)));
    named
        .filter(|(name, _)| ours(name))
        .map(|(name, meta)| {
            let part_of = meta.labels.as_ref().and_then(|labels| labels.get("app.kubernetes.io/part-of"));
            let release = meta.annotations.as_ref().and_then(|it| it.get(RELEASE));
            let owner = part_of.or(release).cloned().unwrap_or_default();
            (name, owner)
        })
        .collect()
}

fn gateway_api(
    definitions: &ObjectList<PartialObjectMeta<CustomResourceDefinition>>,
) -> Option<(String, String)> {
    let gateways = definitions
        .items
        .iter()
        .find(|it| it.metadata.name.as_deref() == Some("gateways.gateway.networking.k8s.io"))?;
    let annotation = |name| gateways.metadata.annotations.as_ref().and_then(|it| it.get(name)).cloned();
    Some((annotation(BUNDLE).unwrap_or_default(), annotation(CHANNEL).unwrap_or_default()))
}
