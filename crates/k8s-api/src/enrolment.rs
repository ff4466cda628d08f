//! Whether a pod joins the mesh: one pure function, so that the agent, the controller and the tools agree.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::core::Pod;
use crate::labels;
use crate::meta::StringMap;
use crate::network_policy::LabelSelector;

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
    /// Who joins, instead of ambient's labels.
    pub enablement: EnablementSelectors,
}

/// Who joins, as data (C02): a pod joins if one of the pairs matches it and its namespace. None, and ambient's labels decide. Read from a
/// list in JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EnablementSelectors(Vec<EnablementSelector>);

/// Both must match.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct EnablementSelector {
    #[serde(deserialize_with = "strict")]
    pod_selector: LabelSelector,
    #[serde(deserialize_with = "strict")]
    namespace_selector: LabelSelector,
}

/// The decision and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enrolment {
    /// By the pod's own label.
    ByPod,
    /// By its namespace's label.
    ByNamespace,
    /// By selectors that were given in place of the labels.
    BySelector,
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
            enablement: EnablementSelectors::default(),
        }
    }
}

impl EnablementSelectors {
    /// None was given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn matches(&self, pod: &StringMap, namespace: &StringMap) -> bool {
        self.0.iter().any(|it| it.pod_selector.matches(pod) && it.namespace_selector.matches(namespace))
    }
}

impl FromStr for EnablementSelectors {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read: Self = serde_json::from_str(text).map_err(|error| {
            format!("{error}; wanted is [{{\"podSelector\":{{...}},\"namespaceSelector\":{{...}}}}]")
        })?;
        match read.0.iter().position(|it| *it == EnablementSelector::default()) {
            Some(at) => Err(format!("pair {at} has no selector, and would match every pod")),
            None => Ok(read),
        }
    }
}

/// A selector in which nothing is misspelt: what is not read would select more.
fn strict<'de, D: serde::Deserializer<'de>>(from: D) -> Result<LabelSelector, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", default, deny_unknown_fields)]
    #[derive(Default)]
    struct Selector {
        match_labels: StringMap,
        match_expressions: Vec<Expression>,
    }
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Expression {
        key: String,
        operator: Operator,
        #[serde(default)]
        values: Vec<String>,
    }
    #[derive(Debug, Deserialize)]
    enum Operator {
        In,
        NotIn,
        Exists,
        DoesNotExist,
    }
    let read = Selector::deserialize(from)?;
    let requirement = |it: Expression| crate::network_policy::Requirement {
        key: it.key,
        operator: format!("{:?}", it.operator),
        values: it.values,
    };
    Ok(LabelSelector {
        match_labels: read.match_labels,
        match_expressions: read.match_expressions.into_iter().map(requirement).collect(),
    })
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
        Some(labels::MODE_NONE) => Enrolment::No(Reason::OptedOut),
        _ if !settings.enablement.is_empty() => match settings.enablement.matches(&meta.labels, namespace) {
            true => Enrolment::BySelector,
            false => Enrolment::No(Reason::NotAsked),
        },
        Some(labels::MODE_AMBIENT) => Enrolment::ByPod,
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

    /// C02: ambient's labels written as selectors decide as the labels do, and others in their place.
    #[test]
    fn selectors_in_place_of_the_labels_decide() {
        let given = |text: &str| Settings { enablement: text.parse().unwrap(), ..Settings::default() };
        let same = given(
            r#"[{"podSelector":{"matchLabels":{"istio.io/dataplane-mode":"ambient"}}},
                {"podSelector":{"matchExpressions":[{"key":"istio.io/dataplane-mode","operator":"NotIn","values":["none"]}]},
                 "namespaceSelector":{"matchLabels":{"istio.io/dataplane-mode":"ambient"}}}]"#,
        );
        let modes = [None, Some("ambient"), Some("none"), Some("other")];
        for (of_pod, of_namespace) in modes.into_iter().flat_map(|it| modes.map(|other| (it, other))) {
            let joins =
                |settings: &Settings| decide(&pod(of_pod), &namespace(of_namespace), settings).joins();
            assert_eq!(joins(&same), joins(&Settings::default()), "{of_pod:?} {of_namespace:?}");
        }
        let team =
            given(r#"[{"namespaceSelector":{"matchExpressions":[{"key":"team","operator":"Exists"}]}}]"#);
        let of_team = StringMap::from_iter([("team".to_owned(), "a".to_owned())]);
        assert_eq!(decide(&pod(None), &of_team, &team), Enrolment::BySelector);
        assert!(!decide(&pod(Some("none")), &of_team, &team).joins());
        assert!(!decide(&pod(Some("ambient")), &namespace(Some("ambient")), &team).joins());
    }

    /// C02.
    #[test]
    fn a_selector_that_would_select_more_than_was_meant_is_refused() {
        for wrong in [
            "",
            "{}",
            "[{}]",
            r#"[{"podSelector":{}}]"#,
            r#"[{"podselector":{"matchLabels":{"a":"b"}}}]"#,
            r#"[{"podSelector":{"matchLabel":{"a":"b"}}}]"#,
            r#"[{"podSelector":{"matchExpressions":[{"key":"a","operator":"in","values":["b"]}]}}]"#,
            r#"[{"podSelector":{"matchExpressions":[{"operator":"Exists"}]}}]"#,
        ] {
            assert!(wrong.parse::<EnablementSelectors>().is_err(), "{wrong}");
        }
        assert!("[]".parse::<EnablementSelectors>().unwrap().is_empty());
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
