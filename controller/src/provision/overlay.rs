//! What a person wants otherwise than it is made: parts of objects in a ConfigMap (D60).

use std::collections::BTreeMap;

use culvert_k8s_api::manifest::yaml_map;
use serde_json::{Map, Value};

/// What is made for a Gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Its identity.
    ServiceAccount,
    /// Its address.
    Service,
    /// What runs.
    Deployment,
    /// Only with an overlay.
    HorizontalPodAutoscaler,
    /// Only with an overlay.
    PodDisruptionBudget,
}

/// All of them, in the order in which they are made.
pub const PARTS: [Part; 5] = [
    Part::ServiceAccount,
    Part::Service,
    Part::Deployment,
    Part::HorizontalPodAutoscaler,
    Part::PodDisruptionBudget,
];

/// The overlays of a ConfigMap.
pub type Overlays = BTreeMap<Part, Map<String, Value>>;

impl Part {
    /// Its key in a ConfigMap.
    pub fn key(self) -> &'static str {
        match self {
            Self::ServiceAccount => "serviceAccount",
            Self::Service => "service",
            Self::Deployment => "deployment",
            Self::HorizontalPodAutoscaler => "horizontalPodAutoscaler",
            Self::PodDisruptionBudget => "podDisruptionBudget",
        }
    }

    /// Its kind at the API server.
    pub fn kind(self) -> &'static str {
        match self {
            Self::ServiceAccount => "ServiceAccount",
            Self::Service => "Service",
            Self::Deployment => "Deployment",
            Self::HorizontalPodAutoscaler => "HorizontalPodAutoscaler",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
        }
    }

    /// Group and version.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::ServiceAccount | Self::Service => "v1",
            Self::Deployment => "apps/v1",
            Self::HorizontalPodAutoscaler => "autoscaling/v2",
            Self::PodDisruptionBudget => "policy/v1",
        }
    }

    /// The last part of its path at the API server.
    pub fn plural(self) -> &'static str {
        match self {
            Self::ServiceAccount => "serviceaccounts",
            Self::Service => "services",
            Self::Deployment => "deployments",
            Self::HorizontalPodAutoscaler => "horizontalpodautoscalers",
            Self::PodDisruptionBudget => "poddisruptionbudgets",
        }
    }
}

/// Reads a ConfigMap's `data`.
///
/// # Errors
/// In words, with the key and what is wrong. A key that is not known is an error: it would be forgotten in silence.
pub fn read(data: &BTreeMap<String, String>) -> Result<Overlays, String> {
    let mut overlays = Overlays::new();
    for (key, text) in data {
        let Some(part) = PARTS.into_iter().find(|part| part.key() == key) else {
            let known = PARTS.map(Part::key).join(", ");
            return Err(format!("key {key:?} is none of {known}"));
        };
        let overlay = yaml_map(text).map_err(|error| format!("key {key}: {error}"))?;
        for (field, own) in [("kind", part.kind()), ("apiVersion", part.api_version())] {
            if overlay.get(field).is_some_and(|it| it != own) {
                return Err(format!("key {key}: {field} {} is not {own}", overlay[field]));
            }
        }
        overlays.insert(part, overlay);
    }
    Ok(overlays)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// D60.
    #[test]
    fn a_config_map_is_read_or_refused_with_its_key() {
        let read_ = read(&data(&[
            ("deployment", "spec:\n  replicas: 2\n"),
            ("podDisruptionBudget", "spec: {minAvailable: 1}"),
            ("service", ""),
        ]))
        .unwrap();
        assert_eq!(read_[&Part::Deployment]["spec"]["replicas"], 2);
        assert!(read_[&Part::Service].is_empty() && !read_.contains_key(&Part::HorizontalPodAutoscaler));
        for (key, text, said) in [
            ("deployments", "spec: {}", "key \"deployments\" is none of serviceAccount, service, deployment"),
            ("deployment", "[1]", "key deployment: "),
            ("deployment", "spec: {", "key deployment: "),
            ("service", "kind: Deployment", "key service: kind \"Deployment\" is not Service"),
        ] {
            let error = read(&data(&[(key, text)])).unwrap_err();
            assert!(error.starts_with(said), "{error}");
        }
    }
}
