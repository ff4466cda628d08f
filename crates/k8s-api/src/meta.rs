//! `metadata`, shared by every kind.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Labels or annotations.
pub type StringMap = BTreeMap<String, String>;

/// Object metadata: the fields the mesh reads. Others (managed fields, owners) are ignored for every kind: the API
/// server writes them and none of them selects or restricts anything.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ObjectMeta {
    /// Unique in its namespace for its kind; a DNS-1123 subdomain.
    pub name: String,
    /// `default` where a namespaced manifest does not say; empty for kinds without a namespace.
    pub namespace: String,
    /// The API server's id; empty in a manifest.
    pub uid: String,
    /// The API server counts changes of `spec`; `None` in most manifests, and of kinds that are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
    /// Labels.
    pub labels: StringMap,
    /// Annotations.
    pub annotations: StringMap,
    /// RFC 3339 in UTC as the API server writes it, so that text order is time order. `None` in most manifests.
    pub creation_timestamp: Option<String>,
    /// Set while the object is being deleted.
    pub deletion_timestamp: Option<String>,
}

impl ObjectMeta {
    /// The key by which the oldest of several wins (D26, D42): time of creation, those without one last, then name.
    pub fn age(&self) -> (bool, &str, &str, &str) {
        let created = self.creation_timestamp.as_deref();
        (created.is_none(), created.unwrap_or_default(), &self.namespace, &self.name)
    }
}

/// A selector by labels: every one of them must be present with that value. An empty one selects nothing here; what it
/// means depends on the kind.
pub fn selects(selector: &StringMap, labels: &StringMap) -> bool {
    !selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}
