//! Whether a pod joins the mesh: one pure function, so that the agent, the controller and the tools agree.

use crate::core::Pod;
use crate::labels;
use crate::meta::StringMap;

/// Whether a workload with these labels ends tunnels itself (D19, Z54).
pub fn speaks_hbone(of: &StringMap) -> bool {
    of.get(labels::TUNNEL).is_some_and(|value| value.eq_ignore_ascii_case(labels::TUNNEL_HTTP))
}

/// What the decision depends on besides the pod and its namespace's labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Namespaces whose pods never join (C06).
    pub excluded_namespaces: Vec<String>,
    /// Where the mesh's own pods are, of which the tunnel never joins (C05).
    pub system_namespace: String,
}

/// The decision and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// By the pod's own label.
    ByPod,
    /// By its namespace's label.
    ByNamespace,
    /// It stays outside.
    No(Reason),
}

/// Why a pod stays outside. In the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The node's own namespace must not be redirected (C03).
    HostNetwork,
    /// A sidecar serves it (C04).
    Sidecar,
    /// Its namespace is excluded (C06).
    ExcludedNamespace,
    /// It is the tunnel itself (C05).
    Tunnel,
    /// The pod's own label says `none` (C07).
    OptedOut,
    /// Neither it nor its namespace asks (C01).
    NotAsked,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            excluded_namespaces: vec!["kube-system".to_owned()],
            system_namespace: "culvert-system".to_owned(),
        }
    }
}

impl Enrolment {
    /// True if the pod joins.
    pub fn joins(self) -> bool {
        !matches!(self, Self::No(_))
    }
}

/// Decides for a pod. `namespace` is the labels of its namespace; empty if no such object exists.
pub fn decide(pod: &Pod, namespace: &StringMap, settings: &Settings) -> Enrolment {
    let meta = &pod.metadata;
    if pod.spec.host_network {
        return Enrolment::No(Reason::HostNetwork);
    }
    if meta.annotations.contains_key(labels::SIDECAR_STATUS) {
        return Enrolment::No(Reason::Sidecar);
    }
    if settings.excluded_namespaces.contains(&meta.namespace) {
        return Enrolment::No(Reason::ExcludedNamespace);
    }
    let app = meta.labels.get(labels::APP).map(String::as_str);
    if meta.namespace == settings.system_namespace && app == Some(labels::APP_ZTUNNEL) {
        return Enrolment::No(Reason::Tunnel);
    }
    match meta.labels.get(labels::DATAPLANE_MODE).map(String::as_str) {
        Some(labels::MODE_AMBIENT) => Enrolment::ByPod,
        Some(labels::MODE_NONE) => Enrolment::No(Reason::OptedOut),
        // Another value on the pod says nothing, so the namespace's does.
        _ if namespace.get(labels::DATAPLANE_MODE).map(String::as_str) == Some(labels::MODE_AMBIENT) => {
            Enrolment::ByNamespace
        }
        _ => Enrolment::No(Reason::NotAsked),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pod(mode: Option<&str>) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = "shop".into();
        pod.metadata.labels.extend(mode.map(|mode| (labels::DATAPLANE_MODE.into(), mode.into())));
        pod
    }

    fn namespace(mode: Option<&str>) -> StringMap {
        mode.map(|mode| (labels::DATAPLANE_MODE.into(), mode.into())).into_iter().collect()
    }

    #[test]
    fn labels_decide() {
        use Enrolment::{ByNamespace, ByPod, No};
        let table = [
            (None, None, No(Reason::NotAsked)),
            (None, Some("ambient"), ByNamespace),
            (None, Some("none"), No(Reason::NotAsked)),
            (Some("ambient"), None, ByPod),
            (Some("ambient"), Some("none"), ByPod),
            (Some("none"), Some("ambient"), No(Reason::OptedOut)),
            (Some("none"), None, No(Reason::OptedOut)),
            (Some("enabled"), Some("ambient"), ByNamespace),
            (Some(""), None, No(Reason::NotAsked)),
            (None, Some("Ambient"), No(Reason::NotAsked)),
        ];
        for (of_pod, of_namespace, expected) in table {
            let decided = decide(&pod(of_pod), &namespace(of_namespace), &Settings::default());
            assert_eq!(decided, expected, "pod {of_pod:?}, namespace {of_namespace:?}");
        }
    }

    #[test]
    fn the_old_annotation_is_no_input() {
        let mut it = pod(Some("ambient"));
        it.metadata.annotations.insert(labels::REDIRECTION.into(), "disabled".into());
        assert!(decide(&it, &namespace(None), &Settings::default()).joins());
    }

    proptest! {
        /// Written from C01 and C03 to C06 in another way than the code.
        #[test]
        fn agrees_with_the_rows(
            host in any::<bool>(), sidecar in any::<bool>(), tunnel in any::<bool>(),
            place in prop::sample::select(vec!["shop", "kube-system", "culvert-system"]),
            of_pod in prop::option::of(prop::sample::select(vec!["ambient", "none", "other"])),
            of_namespace in prop::option::of(prop::sample::select(vec!["ambient", "none", "other"])),
        ) {
            let mut it = pod(of_pod);
            it.spec.host_network = host;
            it.metadata.namespace = place.into();
            if sidecar {
                it.metadata.annotations.insert(labels::SIDECAR_STATUS.into(), "{}".into());
            }
            if tunnel {
                it.metadata.labels.insert("app".into(), "ztunnel".into());
            }
            let asked = of_pod == Some("ambient") || (of_namespace == Some("ambient") && of_pod != Some("none"));
            let barred = host || sidecar || place == "kube-system" || (tunnel && place == "culvert-system");
            let decided = decide(&it, &namespace(of_namespace), &Settings::default());
            prop_assert_eq!(decided.joins(), asked && !barred);
        }
    }
}
