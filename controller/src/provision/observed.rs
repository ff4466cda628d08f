//! What is known of an object that was made: what of it somebody can edit, and how far it is.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use culvert_k8s_api::labels;
use serde_json::Value;

use super::overlay::Part;

/// One object of ours.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    /// Which of the parts.
    pub part: Part,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// What is known of an object that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// Which one of its name.
    pub uid: String,
    /// It is going.
    pub deleting: bool,
    /// The uid of the Gateway that it was made for.
    pub owner: String,
    /// The class that it was made for.
    pub class: String,
    /// Of everything that somebody can edit.
    pub fingerprint: u64,
    /// Of a Service.
    pub addresses: Vec<IpAddr>,
    /// Of a Deployment: replicas that can be used.
    pub available: u64,
    /// Of a Deployment: why it has none, in Kubernetes' words.
    pub problem: String,
}

impl Observed {
    /// What is to be known of an object of the API server, whose `metadata` is in it.
    pub fn of(object: &Value) -> Self {
        let metadata = &object["metadata"];
        let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
        let owner = owners.filter(|it| it["kind"] == "Gateway").find_map(|it| it["uid"].as_str());
        let mut edited = object.clone();
        edited["status"] = Value::Null;
        for field in ["managedFields", "resourceVersion", "generation", "creationTimestamp"] {
            edited["metadata"][field] = Value::Null;
        }
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let ips = object["spec"]["clusterIPs"].as_array().into_iter().flatten();
        let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        let problem = conditions
            .filter(|it| it["status"] == if it["type"] == "ReplicaFailure" { "True" } else { "False" })
            .filter_map(|it| it["message"].as_str());
        Self {
            uid: text(&metadata["uid"]),
            deleting: metadata["deletionTimestamp"].is_string(),
            owner: owner.unwrap_or_default().to_owned(),
            class: text(&metadata["labels"][labels::GATEWAY_CLASS_NAME]),
            fingerprint: hash(&edited),
            addresses: ips.filter_map(|it| it.as_str()?.parse().ok()).collect(),
            available: object["status"]["availableReplicas"].as_u64().unwrap_or_default(),
            problem: problem.collect::<Vec<_>>().join("; "),
        }
    }
}

/// Of this process alone: never written anywhere.
pub(super) fn hash(value: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.to_string().hash(&mut hasher);
    hasher.finish()
}
