//! The small JSON files by which programs tell each other what is, where there is no API server: the sandbox writes pod
//! and service status (it plays kubelet), each node's agent writes redirection.
//!
//! Every file is written beside its place and renamed over it, so a reader sees a whole file or none.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// `status/pods/<namespace>.<name>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodStatus {
    /// Differs for each incarnation of a pod.
    pub uid: String,
    /// The pod's namespace.
    pub namespace: String,
    /// The pod's name.
    pub name: String,
    /// Where it runs.
    pub node_name: String,
    /// Its addresses; those of the node with `hostNetwork`.
    #[serde(rename = "podIPs", default)]
    pub pod_ips: Vec<IpAddr>,
    /// Where it is in its life.
    pub phase: Phase,
    /// May receive traffic.
    #[serde(default)]
    pub ready: bool,
    /// Path of its network namespace; absent with `hostNetwork`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns: Option<String>,
    /// It is being deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
}

/// Phase of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Phase {
    Pending,
    Running,
    Succeeded,
    Failed,
}

/// `status/services/<namespace>.<name>.json`: the addresses that were assigned.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    /// One a family; empty for a headless service.
    #[serde(rename = "clusterIPs", default)]
    pub cluster_ips: Vec<IpAddr>,
}

/// `nodes/<node>/redirection/<uid>.json`: what the agent did for a pod (C09); no file means not enrolled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RedirectionStatus {
    /// How far it is.
    pub redirection: Redirection,
    /// Why it is only pending.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How far enrolment of a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirection {
    /// Rules are in place and the proxy has acknowledged the pod: it speaks HBONE (C10).
    Enabled,
    /// Rules are in place, the proxy did not acknowledge yet.
    Pending,
}

/// The file's name for an object of a namespace. Neither part holds a slash and a namespace holds no dot, so two objects
/// never share a file.
pub fn file_name(namespace: &str, name: &str) -> String {
    format!("{namespace}.{name}.json")
}

/// The object that a file's name stands for.
pub fn parse_file_name(file_name: &str) -> Option<(&str, &str)> {
    let (namespace, name) = file_name.strip_suffix(".json")?.split_once('.')?;
    (!namespace.is_empty() && !name.is_empty()).then_some((namespace, name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pod_status_has_the_agreed_form() {
        let text = r#"{"uid":"u","namespace":"n","name":"p.q","nodeName":"a","podIPs":["100.64.1.2","fd00:64:1::2"],
            "phase":"Running","ready":true,"netns":"/run/netns/x"}"#;
        let status: PodStatus = serde_json::from_str(text).unwrap();
        assert_eq!(status.pod_ips.len(), 2);
        assert!(!status.deleted);
        let again = serde_json::to_value(&status).unwrap();
        assert_eq!(again, serde_json::from_str::<serde_json::Value>(text).unwrap());
    }

    #[test]
    fn file_names() {
        assert_eq!(parse_file_name(&file_name("n", "a.b")), Some(("n", "a.b")));
        assert_eq!(parse_file_name(".n.json"), None);
        assert_eq!(parse_file_name("n.a.json.tmp"), None);
        assert_eq!(parse_file_name("n.json"), None);
    }

    #[test]
    fn redirection_words() {
        let read: RedirectionStatus = serde_json::from_str(r#"{"redirection":"enabled"}"#).unwrap();
        assert_eq!(read.redirection, Redirection::Enabled);
        assert!(serde_json::from_str::<RedirectionStatus>(r#"{"redirection":"maybe"}"#).is_err());
    }
}
