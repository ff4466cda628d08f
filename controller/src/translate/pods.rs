//! Pod to `istio.workload.Workload` (D17 to D23, D28).

use culvert_k8s_api::core::Pod;
pub(super) use culvert_k8s_api::enrolment::speaks_hbone;
use culvert_k8s_api::labels;
use culvert_k8s_api::meta::StringMap;
use culvert_k8s_api::status::{Phase, PodStatus, Redirection};
use culvert_proto::workload as proto;

use super::endpoints::{Endpoint, Targets};
use super::network_policy::NetworkPolicies;
use super::services::ip_bytes;
use super::slices::Slices;
use super::view::View;
use super::waypoints::{Asks, Traffic};
use super::{Names, Translation};

/// Converts every pod that has an address and has not ended (D17).
pub(super) fn convert_all(
    view: &View<'_>,
    targets: &Targets<'_>,
    slices: &Slices<'_>,
    names: &Names,
    restricted: &NetworkPolicies<'_>,
    out: &mut Translation,
) {
    for ((namespace, name), pod) in &view.pods {
        let key = ((*namespace).to_owned(), (*name).to_owned());
        let Some(status) = view.world.pods.get(&key) else { continue };
        if status.pod_ips.is_empty() || matches!(status.phase, Phase::Succeeded | Phase::Failed) {
            continue;
        }
        let mut workload = convert(view, pod, status);
        workload.services = targets.of(namespace, &pod.metadata.labels, Endpoint::Pod(pod));
        workload.services.extend(slices.of(namespace, name));
        workload.authorization_policies = names.of(namespace, &pod.metadata.labels);
        // A pod without a network of its own is nobody's to hand a connection to.
        if !pod.spec.host_network {
            workload.extensions.push(restricted.extension(namespace, &pod.metadata.labels, &status.uid));
        }
        out.insert(workload.uid.clone(), proto::address::Type::Workload(workload));
    }
}

fn convert(view: &View<'_>, pod: &Pod, status: &PodStatus) -> proto::Workload {
    let (meta, settings) = (&pod.metadata, view.settings);
    let host = pod.spec.host_network;
    let native = !host && speaks_hbone(&meta.labels);
    let redirected = view
        .world
        .redirection
        .get(&(status.node_name.clone(), status.uid.clone()))
        .is_some_and(|it| it.redirection == Redirection::Enabled);
    let hbone = native || (!host && redirected);
    // Terminating takes it out of load balancing at once (D18).
    let healthy = status.phase == Phase::Running && status.ready && !status.deleted;
    let workload_name = meta.labels.get(labels::WORKLOAD_NAME).unwrap_or(&meta.name);
    proto::Workload {
        uid: super::pod_uid(settings, &meta.namespace, &meta.name),
        name: meta.name.clone(),
        namespace: meta.namespace.clone(),
        addresses: status.pod_ips.iter().copied().map(ip_bytes).collect(),
        network: settings.network.clone(),
        tunnel_protocol: tunnel(hbone).into(),
        trust_domain: settings.trust_domain.clone(),
        service_account: pod.service_account().to_owned(),
        waypoint: view.waypoint(Asks { meta, traffic: Traffic::Workload }).0,
        node: status.node_name.clone(),
        canonical_name: canonical_name(&meta.labels, workload_name),
        canonical_revision: canonical_revision(&meta.labels),
        workload_type: proto::WorkloadType::Pod.into(),
        workload_name: workload_name.clone(),
        native_tunnel: native,
        status: health(healthy).into(),
        cluster_id: settings.cluster_id.clone(),
        locality: node_locality(view, &status.node_name),
        network_mode: if host { proto::NetworkMode::HostNetwork } else { proto::NetworkMode::Standard }
            .into(),
        ..proto::Workload::default()
    }
}

pub(super) fn tunnel(hbone: bool) -> proto::TunnelProtocol {
    if hbone { proto::TunnelProtocol::Hbone } else { proto::TunnelProtocol::None }
}

pub(super) fn health(healthy: bool) -> proto::WorkloadStatus {
    if healthy { proto::WorkloadStatus::Healthy } else { proto::WorkloadStatus::Unhealthy }
}

/// The first of the labels of D28 that is there, else the workload's own name.
pub(super) fn canonical_name(of: &StringMap, workload: &str) -> String {
    let names = [labels::CANONICAL_NAME, labels::K8S_APP_NAME, labels::APP];
    first(of, &names).unwrap_or(workload).to_owned()
}

/// The first of the labels of D28 that is there, else `latest`.
pub(super) fn canonical_revision(of: &StringMap) -> String {
    let names = [labels::CANONICAL_REVISION, labels::K8S_APP_VERSION, labels::VERSION];
    first(of, &names).unwrap_or("latest").to_owned()
}

fn first<'a>(of: &'a StringMap, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| of.get(*name)).map(String::as_str).filter(|value| !value.is_empty())
}

pub(super) fn node_locality(view: &View<'_>, node: &str) -> Option<proto::Locality> {
    let of = &view.nodes.get(node)?.metadata.labels;
    let label = |name: &str| of.get(name).cloned().unwrap_or_default();
    let locality = proto::Locality {
        region: label(labels::TOPOLOGY_REGION),
        zone: label(labels::TOPOLOGY_ZONE),
        subzone: label(labels::TOPOLOGY_SUBZONE),
    };
    (locality != proto::Locality::default()).then_some(locality)
}
