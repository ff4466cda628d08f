//! Nodes that wait for their agent (C84): the taint that keeps pods away is taken off as soon as the agent's pod there is ready.
//!
//! Whoever makes nodes puts the taint on them (`kubelet --register-with-taints`), so that no pod starts on a node that could not
//! enrol it yet. The leader takes it off and never puts it back: a node whose agent is away for a moment has pods already, and
//! the CNI plugin holds back those that come.

use std::sync::Arc;
use std::time::Duration;

use culvert_k8s_api::object::{Kind, ObjectKey};
use culvert_k8s_api::status::Phase;
use culvert_k8s_api::{Object, core, labels};
use culvert_runtime::drain::DrainWatcher;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use crate::index::{Snapshot, World};

/// The value of label `app` on the agent's pods.
const AGENT: &str = "culvert-agent";
/// From one attempt to the next: the first one's result is seen by then.
const RETRY: Duration = Duration::from_secs(2);
/// One read or write.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nodes that have the taint and whose agent, a pod of `namespace`, is ready.
pub fn due(world: &World, namespace: &str) -> Vec<String> {
    let of = |kind, namespace: &str| {
        let first = ObjectKey { kind, namespace: namespace.to_owned(), name: String::new() };
        let namespace = namespace.to_owned();
        world
            .objects
            .range(first..)
            .take_while(move |(key, _)| key.kind == kind && key.namespace == namespace)
    };
    let tainted = of(Kind::Node, "").filter_map(|(key, manifest)| match &manifest.object {
        Object::Node(node) => node.spec.taints.iter().any(is_ours).then_some(key.name.as_str()),
        _ => None,
    });
    let tainted: Vec<&str> = tainted.collect();
    if tainted.is_empty() {
        return Vec::new();
    }
    let ready = of(Kind::Pod, namespace).filter_map(|(key, manifest)| {
        let status = world.pods.get(&(key.namespace.clone(), key.name.clone()))?;
        let agent = manifest.object.metadata().labels.get(labels::APP).is_some_and(|app| app == AGENT);
        let ready = status.ready && !status.deleted && status.phase == Phase::Running;
        (agent && ready).then_some(status.node_name.as_str())
    });
    let ready: Vec<&str> = ready.collect();
    tainted.into_iter().filter(|node| ready.contains(node)).map(str::to_owned).collect()
}

fn is_ours(taint: &core::Taint) -> bool {
    labels::NOT_READY.contains(&taint.key.as_str())
}

/// Takes it off where that is due, while this replica leads, until `drain` starts.
pub async fn keep(
    client: kube::Client,
    namespace: String,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut leading: watch::Receiver<bool>,
    drain: DrainWatcher,
) {
    let nodes: Api<Node> = Api::all(client);
    let mut next = Instant::now();
    loop {
        let world = Arc::clone(&snapshots.borrow_and_update().world);
        let due = if *leading.borrow_and_update() { due(&world, &namespace) } else { Vec::new() };
        tokio::select! {
            biased;
            _ = drain.started() => return,
            changed = snapshots.changed() => if changed.is_err() { return },
            changed = leading.changed() => if changed.is_err() { return },
            () = sleep_until(next), if !due.is_empty() => {
                for node in due {
                    match timeout(PATIENCE, untaint(&nodes, &node)).await {
                        Ok(Ok(())) => tracing::info!(node, "the agent is ready: the node's taint is taken off"),
                        Ok(Err(error)) => tracing::warn!(node, %error, "cannot take the taint off the node"),
                        Err(_) => tracing::warn!(node, "cannot take the taint off the node: no answer in time"),
                    }
                }
                next = Instant::now() + RETRY;
            }
        }
    }
}

/// Writes back all other taints, unless the node was changed in between.
async fn untaint(nodes: &Api<Node>, name: &str) -> Result<(), kube::Error> {
    let Some(node) = nodes.get_opt(name).await? else { return Ok(()) };
    let taints = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
    let others: Vec<_> = taints.iter().filter(|it| !labels::NOT_READY.contains(&it.key.as_str())).collect();
    if others.len() == taints.len() {
        return Ok(());
    }
    let patch = json!({
        "metadata": { "resourceVersion": node.metadata.resource_version },
        "spec": { "taints": others },
    });
    let params = PatchParams { field_manager: Some("culvert".into()), ..PatchParams::default() };
    nodes.patch_metadata(name, &params, &Patch::Merge(&patch)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use culvert_k8s_api::manifest::parse_file;
    use culvert_k8s_api::status::PodStatus;

    use super::*;
    use crate::index::by_key;

    fn pod(world: &mut World, namespace: &str, name: &str, node: &str, change: impl FnOnce(&mut PodStatus)) {
        let app = if name.starts_with("agent") { AGENT } else { "other" };
        let text = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {app}}}}}\nspec: {{containers: [{{name: c}}]}}\n"
        );
        world.objects.extend(by_key(parse_file("f", &text).objects));
        let mut status = PodStatus {
            uid: name.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            node_name: node.to_owned(),
            pod_ips: Vec::new(),
            phase: Phase::Running,
            ready: true,
            netns: None,
            deleted: false,
        };
        change(&mut status);
        world.pods.insert((namespace.to_owned(), name.to_owned()), status);
    }

    fn node(world: &mut World, name: &str, taints: &str) {
        let text =
            format!("apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{taints: [{taints}]}}\n");
        let parsed = parse_file("f", &text);
        assert_eq!(parsed.errors, []);
        world.objects.extend(by_key(parsed.objects));
    }

    /// C84.
    #[test]
    fn a_node_is_due_when_it_is_tainted_and_its_own_agent_is_ready() {
        let taint = "{key: culvert.dev/not-ready, effect: NoSchedule}";
        let mut world = World::default();
        for name in ["a", "b", "c", "d", "e"] {
            node(&mut world, name, taint);
        }
        node(&mut world, "other", "{key: node.kubernetes.io/not-ready, effect: NoExecute}");
        node(&mut world, "plain", "");
        node(
            &mut world,
            "known",
            "{key: x, value: y, effect: NoSchedule}, {key: cni.istio.io/not-ready, effect: NoSchedule}",
        );
        pod(&mut world, "sys", "agent-a", "a", |_| {});
        pod(&mut world, "sys", "agent-b", "b", |it| it.ready = false);
        pod(&mut world, "sys", "agent-c", "c", |it| it.deleted = true);
        pod(&mut world, "sys", "tunnel-d", "d", |_| {});
        pod(&mut world, "shop", "agent-e", "e", |_| {});
        for name in ["other", "plain", "known"] {
            pod(&mut world, "sys", &format!("agent-{name}"), name, |_| {});
        }
        assert_eq!(due(&world, "sys"), ["a", "known"]);
        assert!(due(&World::default(), "sys").is_empty());
    }
}
