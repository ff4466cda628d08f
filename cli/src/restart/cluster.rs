//! The mesh of a cluster: what kubectl's rollout restart does, or for one node a pod that is deleted so that another comes.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::args::{ClusterArgs, RestartArgs, RoleArg};
use crate::cluster::Cluster;
use crate::cluster::gather::objects;
use crate::cluster::seen::{Rollout, SeenPod};
use crate::get::source::running;

/// Between two looks.
const POLL: Duration = Duration::from_millis(500);

pub(super) async fn restart(cluster: &ClusterArgs, args: &RestartArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(cluster).await?;
    let name = name(args.role);
    let before = running(&cluster, name).await?;
    let deadline = Instant::now() + Duration::from_secs(args.timeout);
    match &args.node {
        Some(node) => replace(&cluster, &before, node).await?,
        None => roll(&cluster, args.role).await?,
    }
    loop {
        let rollout = rollout(&cluster, args.role).await?;
        let pods = running(&cluster, name).await.unwrap_or_default();
        let left = unfinished(&rollout, &before, &pods, args.node.as_deref());
        if left.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() >= deadline {
            bail!("not done after {} s: {}", args.timeout, left.join("; "));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Name of the Deployment or DaemonSet, and of its pods' label `app`.
fn name(role: RoleArg) -> &'static str {
    match role {
        RoleArg::Controller => "culvert-controller",
        RoleArg::Agent => "culvert-agent",
        RoleArg::Proxy => "ztunnel",
    }
}

async fn roll(cluster: &Cluster, role: RoleArg) -> anyhow::Result<()> {
    let patch = Patch::Strategic(template(Timestamp::now()));
    let params = PatchParams::default();
    let (name, system) = (name(role), &cluster.system);
    let done = match role {
        RoleArg::Controller => {
            let api: Api<Deployment> = Api::namespaced(cluster.client.clone(), system);
            cluster.ask(api.patch(name, &params, &patch)).await.map(|_| ())
        }
        RoleArg::Agent | RoleArg::Proxy => {
            let api: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), system);
            cluster.ask(api.patch(name, &params, &patch)).await.map(|_| ())
        }
    };
    done.with_context(|| format!("{system}/{name}"))
}

/// The annotation that kubectl sets: another template, so other pods.
fn template(now: Timestamp) -> Value {
    let annotations = json!({"kubectl.kubernetes.io/restartedAt": now.to_string()});
    json!({"spec": {"template": {"metadata": {"annotations": annotations}}}})
}

async fn replace(cluster: &Cluster, pods: &[SeenPod], node: &str) -> anyhow::Result<()> {
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.system);
    let meant: Vec<&SeenPod> = pods.iter().filter(|pod| pod.node == node).collect();
    if meant.is_empty() {
        bail!("none runs on {node}");
    }
    for pod in meant {
        let deleted = cluster.ask(api.delete(&pod.name, &DeleteParams::default())).await;
        deleted.map(|_| ()).with_context(|| format!("pod {}/{}", pod.namespace, pod.name))?;
    }
    Ok(())
}

async fn rollout(cluster: &Cluster, role: RoleArg) -> anyhow::Result<Rollout> {
    let (name, system) = (name(role), &cluster.system);
    let found = match role {
        RoleArg::Controller => {
            let api: Api<Deployment> = Api::namespaced(cluster.client.clone(), system);
            cluster.ask(api.get(name)).await.map(|it| objects::deployment(&it))
        }
        RoleArg::Agent | RoleArg::Proxy => {
            let api: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), system);
            cluster.ask(api.get(name)).await.map(|it| objects::daemon_set(&it))
        }
    };
    found.with_context(|| format!("{system}/{name}"))
}

/// What is not done yet; empty once every pod that was there is gone and as many as there should be are ready.
fn unfinished(rollout: &Rollout, before: &[SeenPod], now: &[SeenPod], node: Option<&str>) -> Vec<String> {
    let on = |pod: &&SeenPod| node.is_none_or(|node| pod.node == node);
    let old: Vec<&SeenPod> = before.iter().filter(on).collect();
    let still = now.iter().filter(|pod| old.iter().any(|old| old.name == pod.name));
    let mut left: Vec<String> = still.map(|pod| format!("{} is still there", pod.name)).collect();
    let ready = now.iter().filter(on).filter(|pod| pod.ready).count();
    let wanted = match node {
        Some(_) => 1,
        None => usize::try_from(rollout.desired).unwrap_or(0),
    };
    if !rollout.observed || ready < wanted {
        left.push(format!("{ready} of {wanted} are ready"));
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_done_when_the_old_pods_are_gone_and_the_new_ones_ready() {
        let pod = |name: &str, node: &str, ready| SeenPod {
            name: name.into(),
            node: node.into(),
            ready,
            ..SeenPod::default()
        };
        let rollout = Rollout { desired: 2, updated: 2, observed: true, version: String::new() };
        let before = [pod("a1", "a", true), pod("b1", "b", true)];
        let left = |now: &[SeenPod], node| unfinished(&rollout, &before, now, node).len();
        assert_eq!(left(&before, None), 1 + 1);
        assert_eq!(left(&[pod("a2", "a", true), pod("b1", "b", true)], None), 1);
        assert_eq!(left(&[pod("a2", "a", true), pod("b2", "b", false)], None), 1);
        assert_eq!(left(&[pod("a2", "a", true), pod("b2", "b", true)], None), 0);
        assert_eq!(left(&[pod("a2", "a", true), pod("b1", "b", true)], Some("a")), 0);
        assert_eq!(left(&[pod("b1", "b", true)], Some("a")), 1);
        let unseen = Rollout { observed: false, ..rollout };
        assert_eq!(
            unfinished(&unseen, &before, &[pod("a2", "a", true), pod("b2", "b", true)], None).len(),
            1
        );
    }

    #[test]
    fn the_template_changes_as_by_kubectl() {
        let at: Timestamp = "2026-11-30T12:00:00Z".parse().unwrap();
        let annotations = &template(at)["spec"]["template"]["metadata"]["annotations"];
        assert_eq!(annotations["kubectl.kubernetes.io/restartedAt"], "2026-11-30T12:00:00Z");
    }
}
