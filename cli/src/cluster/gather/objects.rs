//! Objects of the API server in the few words that the mesh is about.

use std::collections::{BTreeMap, BTreeSet};

use culvert_k8s_api::enrolment::EnablementSelectors;
use culvert_k8s_api::labels;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::coordination::v1::Lease as ApiLease;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Namespace, Node as ApiNode, Pod, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::DynamicObject;
use serde::Deserialize;
use serde_json::Value;

use crate::cluster::seen::{Lease, Node, Policy, PolicyStatus, Rollout, SeenPod, Waypoint, Webhook};

/// Classes whose Gateways are waypoints.
pub(crate) const WAYPOINT_CLASSES: [&str; 2] = ["culvert-waypoint", "istio-waypoint"];
/// Label of a waypoint: what traffic it is for.
pub(crate) const WAYPOINT_FOR: &str = "istio.io/waypoint-for";
/// The chart's label for the version.
const VERSION: &str = "app.kubernetes.io/version";

/// `/debug/policies` of a controller.
#[derive(Debug, Deserialize)]
pub(crate) struct Policies {
    /// What became of each.
    pub policies: Vec<PolicyStatus>,
}

pub(crate) fn deployment(of: &Deployment) -> Rollout {
    let status = of.status.clone().unwrap_or_default();
    Rollout {
        desired: of.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1),
        updated: status.updated_replicas.unwrap_or(0),
        observed: status.observed_generation >= of.metadata.generation,
        version: label(&of.metadata, VERSION),
    }
}

pub(crate) fn daemon_set(of: &DaemonSet) -> Rollout {
    let status = of.status.clone().unwrap_or_default();
    Rollout {
        desired: status.desired_number_scheduled,
        updated: status.updated_number_scheduled.unwrap_or(0),
        observed: status.observed_generation >= of.metadata.generation,
        version: label(&of.metadata, VERSION),
    }
}

/// The namespaces that the agents are told to leave alone.
pub(crate) fn excluded(agent: &DaemonSet) -> Option<Vec<String>> {
    let list = flag(agent, "--exclude-namespaces=")?;
    Some(list.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// Who joins, if the agents are told so instead of by ambient's labels.
pub(crate) fn enablement(agent: &DaemonSet) -> Result<EnablementSelectors, String> {
    match flag(agent, "--enablement-selectors=") {
        Some(text) => text.parse(),
        None => Ok(EnablementSelectors::default()),
    }
}

/// The value of a flag that a program is started with.
fn flag<'a>(of: &'a DaemonSet, name: &str) -> Option<&'a str> {
    let containers =
        of.spec.iter().filter_map(|spec| spec.template.spec.as_ref()).flat_map(|spec| &spec.containers);
    let mut args = containers.filter_map(|container| container.args.as_ref()).flatten();
    args.find_map(|arg| arg.strip_prefix(name))
}

pub(crate) fn lease(of: ApiLease) -> Lease {
    let spec = of.spec.unwrap_or_default();
    Lease {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: spec.renew_time.map(|time| time.0),
        seconds: spec.lease_duration_seconds.unwrap_or(15).into(),
    }
}

/// When the first certificate of the bundle that is still the newest ends: the latest end of all.
pub(crate) fn root_end(of: &ConfigMap) -> Option<Timestamp> {
    let text = of.data.as_ref()?.get("root-cert.pem")?;
    let ends = pem::parse_many(text).ok()?.into_iter().filter_map(|block| {
        let (_, certificate) = x509_parser::parse_x509_certificate(block.contents()).ok()?;
        Timestamp::from_second(certificate.validity().not_after.timestamp()).ok()
    });
    ends.max()
}

pub(crate) fn webhook(of: &ValidatingWebhookConfiguration) -> Webhook {
    let hooks = of.webhooks.as_deref().unwrap_or_default();
    let has_bundle =
        |bundle: &Option<k8s_openapi::ByteString>| bundle.as_ref().is_some_and(|it| !it.0.is_empty());
    Webhook {
        name: of.metadata.name.clone().unwrap_or_default(),
        bundle: hooks.iter().all(|hook| has_bundle(&hook.client_config.ca_bundle)),
        answered: None,
    }
}

pub(crate) fn node(of: &ApiNode, leases: &[ApiLease]) -> Node {
    let name = of.metadata.name.clone().unwrap_or_default();
    let status = of.status.clone().unwrap_or_default();
    let ready = status.conditions.unwrap_or_default().into_iter().find(|it| it.type_ == "Ready");
    let lease = leases.iter().find(|lease| lease.metadata.name.as_ref() == Some(&name));
    let info = status.node_info;
    let of_info = |part: fn(&k8s_openapi::api::core::v1::NodeSystemInfo) -> &String| {
        info.as_ref().map(|info| part(info).clone()).unwrap_or_default()
    };
    Node {
        ready: ready.as_ref().is_some_and(|ready| ready.status == "True"),
        since: ready.as_ref().and_then(|ready| ready.last_transition_time.as_ref()).map(|time| time.0),
        why: ready.and_then(|ready| ready.message.or(ready.reason)).unwrap_or_default(),
        renewed: lease.and_then(|it| it.spec.as_ref()?.renew_time.as_ref()).map(|time| time.0),
        // A node that does not say is taken for one.
        linux: info.as_ref().is_none_or(|info| info.operating_system != "windows"),
        kernel: of_info(|info| &info.kernel_version),
        kubelet: of_info(|info| &info.kubelet_version),
        architecture: of_info(|info| &info.architecture),
        name,
    }
}

pub(crate) fn pod(of: &Pod) -> SeenPod {
    let meta = &of.metadata;
    let spec = of.spec.as_ref();
    let status = of.status.as_ref();
    let conditions = status.and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    let ready = conditions.iter().find(|it| it.type_ == "Ready");
    let containers = status.and_then(|it| it.container_statuses.as_deref()).unwrap_or_default();
    let waits = containers.iter().find_map(waiting);
    let unscheduled = conditions.iter().find(|it| it.type_ == "PodScheduled" && it.status == "False");
    let why = waits.or_else(|| unscheduled.and_then(|it| it.message.clone().or_else(|| it.reason.clone())));
    let ours = |(key, _): &(&String, &String)| key.contains("istio.io/") || key.starts_with("culvert.dev/");
    let annotations = meta.annotations.iter().flatten().filter(ours);
    SeenPod {
        namespace: meta.namespace.clone().unwrap_or_default(),
        name: meta.name.clone().unwrap_or_default(),
        node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_default(),
        phase: status.and_then(|status| status.phase.clone()).unwrap_or_else(|| "Pending".to_owned()),
        ready: ready.is_some_and(|ready| ready.status == "True"),
        since: ready.and_then(|ready| ready.last_transition_time.as_ref()).map(|time| time.0),
        why: why.unwrap_or_default(),
        restarts: containers.iter().map(|container| container.restart_count).sum(),
        deleted: meta.deletion_timestamp.is_some(),
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
        created: meta.creation_timestamp.as_ref().map(|time| time.0),
        labels: meta.labels.clone().unwrap_or_default(),
        annotations: annotations.map(|(key, value)| (key.clone(), value.clone())).collect(),
    }
}

/// Why a container does not run.
fn waiting(container: &ContainerStatus) -> Option<String> {
    let state = container.state.as_ref()?;
    if let Some(waiting) = &state.waiting {
        return waiting.reason.clone();
    }
    let ended = state.terminated.as_ref()?;
    Some(ended.reason.clone().unwrap_or_else(|| format!("exit code {}", ended.exit_code)))
}

pub(crate) fn labels_by_name(of: &[Namespace]) -> BTreeMap<String, BTreeMap<String, String>> {
    let named = of
        .iter()
        .filter_map(|it| Some((it.metadata.name.clone()?, it.metadata.labels.clone().unwrap_or_default())));
    named.collect()
}

/// Who is bound to which waypoint, by its name.
pub(crate) fn bound(
    namespaces: &[Namespace],
    services: &[Service],
    pods: &[Pod],
) -> BTreeMap<String, BTreeSet<String>> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let of_namespaces = namespaces.iter().map(|it| ("namespace", &it.metadata));
    let of_services = services.iter().map(|it| ("service", &it.metadata));
    let of_pods = pods.iter().map(|it| ("pod", &it.metadata));
    for (kind, meta) in of_namespaces.chain(of_services).chain(of_pods) {
        let waypoint = label(meta, labels::USE_WAYPOINT);
        if waypoint.is_empty() || waypoint == labels::WAYPOINT_NONE {
            continue;
        }
        let name = meta.name.as_deref().unwrap_or_default();
        let own = meta.namespace.as_deref().unwrap_or(name);
        let elsewhere = label(meta, labels::USE_WAYPOINT_NAMESPACE);
        let namespace = if elsewhere.is_empty() { own } else { &elsewhere };
        let who = match &meta.namespace {
            Some(namespace) => format!("{kind} {namespace}/{name}"),
            None => format!("{kind} {name}"),
        };
        all.entry(format!("{namespace}/{waypoint}")).or_default().insert(who);
    }
    all
}

/// A Gateway, if it is a waypoint.
pub(crate) fn waypoint(of: &DynamicObject) -> Option<Waypoint> {
    let class = of.data["spec"]["gatewayClassName"].as_str()?;
    WAYPOINT_CLASSES.contains(&class).then_some(())?;
    let programmed = conditions(&of.data["status"]).find(|it| it["type"] == "Programmed");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let condition = programmed.cloned().unwrap_or_default();
    // What the API server writes into a new Gateway says nothing.
    let state = match condition["status"].as_str() {
        Some("True") => Some(true),
        Some("False") => Some(false),
        _ => None,
    };
    let traffic = label(&of.metadata, WAYPOINT_FOR);
    let addresses = of.data["status"]["addresses"].as_array();
    Some(Waypoint {
        namespace: of.metadata.namespace.clone().unwrap_or_default(),
        name: of.metadata.name.clone().unwrap_or_default(),
        class: class.to_owned(),
        traffic: if traffic.is_empty() { "service".to_owned() } else { traffic },
        programmed: state,
        reason: text(&condition["reason"]),
        message: text(&condition["message"]),
        since: state.and_then(|_| time(&condition["lastTransitionTime"])),
        addresses: addresses.into_iter().flatten().map(|it| text(&it["value"])).collect(),
        created: of.metadata.creation_timestamp.as_ref().map(|time| time.0),
    })
}

pub(crate) fn policy(kind: &str, of: &DynamicObject) -> Policy {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let bad = |it: &&Value| {
        let (kind, reason) =
            (it["type"].as_str().unwrap_or_default(), it["reason"].as_str().unwrap_or_default());
        match it["status"].as_str() {
            // The one that is bad when it is true.
            Some("True") => kind.ends_with("Missing"),
            // That nothing is under a policy now, or that it is only tried, is as somebody wants it.
            Some("False") if kind.ends_with("/Enforced") => !matches!(reason, "NoWorkload" | "DryRun"),
            Some("False") => !kind.ends_with("Missing"),
            _ => false,
        }
    };
    let refused = conditions(&of.data["status"]).filter(bad);
    let refused = refused.map(|it| {
        (text(&it["type"]), text(&it["reason"]), text(&it["message"]), time(&it["lastTransitionTime"]))
    });
    Policy {
        kind: kind.to_owned(),
        namespace: of.metadata.namespace.clone().unwrap_or_default(),
        name: of.metadata.name.clone().unwrap_or_default(),
        refused: refused.collect(),
    }
}

/// The conditions of a status.
pub(crate) fn conditions(status: &Value) -> impl Iterator<Item = &Value> {
    status["conditions"].as_array().into_iter().flatten()
}

fn time(of: &Value) -> Option<Timestamp> {
    of.as_str()?.parse().ok()
}

/// The value of a label, empty if there is none.
fn label(meta: &ObjectMeta, name: &str) -> String {
    meta.labels.as_ref().and_then(|labels| labels.get(name)).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_pod_says_why_it_waits() {
        let crashed = pod(&read(json!({
            "metadata": {"name": "z", "namespace": "s", "annotations": {"ambient.istio.io/redirection": "enabled", "x": "y"}},
            "spec": {"nodeName": "a", "containers": []},
            "status": {"phase": "Running",
                "conditions": [{"type": "Ready", "status": "False", "lastTransitionTime": "2026-11-30T04:00:00Z"}],
                "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 3,
                    "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]},
        })));
        assert_eq!((crashed.why.as_str(), crashed.restarts, crashed.ready), ("CrashLoopBackOff", 3, false));
        assert_eq!(crashed.since.unwrap().to_string(), "2026-11-30T04:00:00Z");
        assert_eq!(crashed.annotations.len(), 1);
        let unscheduled = pod(&read(json!({
            "metadata": {"name": "z", "namespace": "s"}, "spec": {"containers": []},
            "status": {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False", "message": "0/2 nodes"}]},
        })));
        assert_eq!((unscheduled.why.as_str(), unscheduled.node.as_str()), ("0/2 nodes", ""));
    }

    #[test]
    fn what_agents_leave_alone_is_read_from_their_flags() {
        let set = |args: Value| -> DaemonSet {
            let container = json!({"name": "agent", "args": args});
            read(
                json!({"metadata": {}, "spec": {"selector": {}, "template": {"spec": {"containers": [container]}}}}),
            )
        };
        let told = excluded(&set(json!(["agent", "--exclude-namespaces=kube-system,x"])));
        assert_eq!(told.unwrap(), ["kube-system", "x"]);
        assert_eq!(excluded(&set(json!(["agent"]))), None);
        assert!(enablement(&set(json!(["agent"]))).unwrap().is_empty());
        let pairs = r#"--enablement-selectors=[{"podSelector":{"matchLabels":{"a":"b"}}}]"#;
        assert!(!enablement(&set(json!([pairs]))).unwrap().is_empty());
        assert!(enablement(&set(json!(["--enablement-selectors=x"]))).is_err());
    }

    #[test]
    fn bindings_name_the_waypoint_and_who() {
        let namespaces: Vec<Namespace> = vec![
            read(json!({"metadata": {"name": "shop", "labels": {"istio.io/use-waypoint": "w"}}})),
            read(json!({"metadata": {"name": "x", "labels": {"istio.io/use-waypoint": "none"}}})),
        ];
        let services: Vec<Service> =
            vec![read(json!({"metadata": {"name": "cart", "namespace": "shop", "labels": {
            "istio.io/use-waypoint": "w", "istio.io/use-waypoint-namespace": "infra"}}}))];
        let all = bound(&namespaces, &services, &[]);
        let names: Vec<_> =
            all.iter().map(|(name, who)| (name.as_str(), who.first().unwrap().as_str())).collect();
        assert_eq!(names, [("infra/w", "service shop/cart"), ("shop/w", "namespace shop")]);
    }

    /// K13.
    #[test]
    fn a_gateway_of_a_waypoint_class_is_a_waypoint() {
        let gateway = |class: &str, status: Value| -> Option<Waypoint> {
            waypoint(&read(json!({
                "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
                "metadata": {"name": "w", "namespace": "shop"},
                "spec": {"gatewayClassName": class}, "status": status,
            })))
        };
        assert_eq!(gateway("nginx", json!({})), None);
        // As the API server fills it in by the kind's default.
        let fresh = json!({"conditions": [{"type": "Programmed", "status": "Unknown", "reason": "Pending"}]});
        assert_eq!(gateway("culvert-waypoint", fresh).unwrap().programmed, None);
        let done = json!({"conditions": [{"type": "Programmed", "status": "True", "reason": "Programmed", "message": "m"}],
            "addresses": [{"value": "198.18.1.1"}]});
        let done = gateway("istio-waypoint", done).unwrap();
        assert_eq!(
            (done.programmed, done.traffic.as_str(), done.addresses.len()),
            (Some(true), "service", 1)
        );
    }

    #[test]
    fn only_what_is_false_counts_against_a_policy() {
        let status = json!({"conditions": [
            {"type": "ZtunnelAccepted", "status": "True", "reason": "Accepted"},
            {"type": "culvert.dev/Enforced", "status": "False", "reason": "NoWorkload"},
            {"type": "istio.io/WaypointMissing", "status": "False", "reason": "x"},
            {"type": "WaypointAccepted", "status": "False", "reason": "AncestorNotBound", "message": "no"}]});
        let of = policy(
            "AuthorizationPolicy",
            &read(json!({
            "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy", "metadata": {"name": "p", "namespace": "n"},
            "spec": {}, "status": status})),
        );
        assert_eq!(of.refused.len(), 1);
        assert_eq!(of.refused[0].1, "AncestorNotBound");
    }
}
