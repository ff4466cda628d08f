//! One object of the API server, to what the world holds of it. Everything else is dropped here: of a pod with the usual
//! 10 KB of JSON about 1 KB stays.

use std::net::IpAddr;
use std::sync::Arc;

use culvert_k8s_api::manifest::{FileError, Manifest, parse_value};
use culvert_k8s_api::status::{Phase, PodStatus, Redirection, RedirectionStatus};
use culvert_k8s_api::{Kind, Object, ObjectKey, labels};
use kube::core::{DynamicObject, ObjectMeta};
use serde_json::{Map, Value};

use super::kinds::Watched;

/// What an object is worth to the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// The object.
    pub manifest: Arc<Manifest>,
    /// Of a pod that has a node.
    pub pod: Option<PodStatus>,
    /// Of a pod that its node's agent wrote about.
    pub redirection: Option<RedirectionStatus>,
}

/// An object that the strict reader refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong; never empty.
    pub errors: Vec<FileError>,
    /// What is in force in its place if nothing of it ever was good: the most restrictive reading of it.
    pub stand_in: Option<Arc<Manifest>>,
}

/// What errors call an object.
pub fn name_of(kind: &Watched, namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        format!("{} {name}", kind.kind)
    } else {
        format!("{} {namespace}/{name}", kind.kind)
    }
}

/// The key under which the world has it.
pub fn key_of(kind: &Watched, meta: &ObjectMeta) -> ObjectKey {
    let name = meta.name.clone().unwrap_or_default();
    let name = match kind.is {
        Kind::OtherNetworkPolicy => format!("{} {} {name}", kind.api_version(), kind.kind),
        _ => name,
    };
    ObjectKey { kind: kind.is, namespace: meta.namespace.clone().unwrap_or_default(), name }
}

/// Converts. By the same strict reader as a manifest on disk.
///
/// # Errors
/// [`Refused`] with all that is wrong with it.
pub fn convert(kind: &Watched, object: DynamicObject) -> Result<Converted, Refused> {
    let DynamicObject { metadata, data, .. } = object;
    let name = name_of(
        kind,
        metadata.namespace.as_deref().unwrap_or_default(),
        metadata.name.as_deref().unwrap_or_default(),
    );
    let mut document = match data {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    let status = document.remove("status").unwrap_or_default();
    document.insert("apiVersion".to_owned(), kind.api_version().into());
    document.insert("kind".to_owned(), kind.kind.clone().into());
    document.insert("metadata".to_owned(), metadata_of(&metadata));
    // Where a Gateway is, its controller says there, which may be another's.
    if kind.is == Kind::Gateway {
        let read = ["addresses", "conditions"].map(|field| (field.to_owned(), status[field].clone()));
        document.insert("status".to_owned(), read.into_iter().collect::<Map<_, _>>().into());
    }
    let document = Value::Object(document);
    let mut parsed = parse_value(&name, &document);
    let Some(manifest) = parsed.objects.pop().filter(|_| parsed.errors.is_empty()) else {
        if parsed.errors.is_empty() {
            parsed.errors.push(FileError {
                file: name.clone(),
                line: 0,
                field: String::new(),
                value: String::new(),
                reason: "is of a kind or version that is not read".to_owned(),
                expected: String::new(),
            });
        }
        return Err(Refused { errors: parsed.errors, stand_in: stand_in(&name, &document) });
    };
    let mut manifest = Arc::unwrap_or_clone(manifest);
    let (mut pod, mut redirection) = (None, None);
    if let Object::Pod(it) = &mut manifest.object {
        pod = pod_status(&metadata, it.spec.node_name.as_deref(), &status);
        redirection = redirection_of(&metadata);
        slim(it);
    }
    if let Object::Node(it) = &mut manifest.object {
        it.spec.taints.retain(|taint| labels::NOT_READY.contains(&taint.key.as_str()));
    }
    Ok(Converted { manifest: Arc::new(manifest), pod, redirection })
}

/// What stands for a policy that cannot be read: nothing is allowed where it applies, as far as that can be read, else in its whole
/// namespace. A policy that is skipped fails open.
fn stand_in(name: &str, document: &Value) -> Option<Arc<Manifest>> {
    let spec = match document["kind"].as_str()? {
        "AuthorizationPolicy" => serde_json::json!({ "action": "ALLOW" }),
        "PeerAuthentication" => serde_json::json!({ "mtls": { "mode": "STRICT" } }),
        _ => return None,
    };
    let group = document["apiVersion"].as_str()?.split('/').next()?;
    let with = |fields: &[&str]| {
        let mut it = serde_json::json!({
            "apiVersion": format!("{group}/v1"), "kind": document["kind"], "metadata": document["metadata"], "spec": spec,
        });
        for field in fields {
            if let Some(value) = document["spec"].get(field) {
                it["spec"][field] = value.clone();
            }
        }
        let mut parsed = parse_value(name, &it);
        parsed.objects.pop().filter(|_| parsed.errors.is_empty())
    };
    with(&["selector", "targetRef", "targetRefs"]).or_else(|| with(&[]))
}

/// Only what is read: managed fields and what tools write into annotations are most of many objects.
fn metadata_of(meta: &ObjectMeta) -> Value {
    let mut out = Map::new();
    let mut text = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            out.insert(key.to_owned(), value.into());
        }
    };
    text("name", meta.name.clone());
    text("namespace", meta.namespace.clone());
    text("uid", meta.uid.clone());
    let time = |it: &Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>| {
        let value = serde_json::to_value(it.as_ref()?).ok()?;
        value.as_str().map(str::to_owned)
    };
    text("creationTimestamp", time(&meta.creation_timestamp));
    text("deletionTimestamp", time(&meta.deletion_timestamp));
    if let Some(generation) = meta.generation {
        out.insert("generation".to_owned(), generation.into());
    }
    let ours = |(key, value): (&String, &String)| Some((key.clone(), Value::from(value.as_str())));
    let labels: Map<String, Value> = meta.labels.iter().flatten().filter_map(ours).collect();
    let annotations: Map<String, Value> = meta
        .annotations
        .iter()
        .flatten()
        .filter(|(key, _)| key.contains("istio.io/") && *key != labels::REDIRECTION)
        .filter_map(ours)
        .collect();
    out.insert("labels".to_owned(), labels.into());
    out.insert("annotations".to_owned(), annotations.into());
    out.into()
}

/// What only the kubelet reads.
fn slim(pod: &mut culvert_k8s_api::core::Pod) {
    for container in pod.spec.containers.iter_mut().chain(&mut pod.spec.init_containers) {
        container.image = String::new();
        container.command = Vec::new();
        container.args = Vec::new();
        container.env = Vec::new();
        container.working_dir = None;
    }
}

/// `None` until it has a node: it has no address before.
fn pod_status(meta: &ObjectMeta, node: Option<&str>, status: &Value) -> Option<PodStatus> {
    let node = node.filter(|node| !node.is_empty())?;
    let mut pod_ips: Vec<IpAddr> = Vec::new();
    let many = status["podIPs"].as_array().into_iter().flatten().map(|it| &it["ip"]);
    for ip in std::iter::once(&status["podIP"]).chain(many).filter_map(Value::as_str) {
        if let Ok(ip) = ip.parse()
            && !pod_ips.contains(&ip)
        {
            pod_ips.push(ip);
        }
    }
    let mut conditions = status["conditions"].as_array().into_iter().flatten();
    Some(PodStatus {
        uid: meta.uid.clone().unwrap_or_default(),
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        node_name: node.to_owned(),
        pod_ips,
        phase: match status["phase"].as_str() {
            Some("Running") => Phase::Running,
            Some("Succeeded") => Phase::Succeeded,
            Some("Failed") => Phase::Failed,
            // `Unknown` too: nothing says that it may receive traffic.
            _ => Phase::Pending,
        },
        ready: conditions.any(|it| it["type"] == "Ready" && it["status"] == "True"),
        netns: None,
        deleted: meta.deletion_timestamp.is_some(),
    })
}

fn redirection_of(meta: &ObjectMeta) -> Option<RedirectionStatus> {
    let redirection = match meta.annotations.as_ref()?.get(labels::REDIRECTION)?.as_str() {
        "enabled" => Redirection::Enabled,
        "pending" => Redirection::Pending,
        _ => return None,
    };
    Some(RedirectionStatus { redirection, error: None })
}
