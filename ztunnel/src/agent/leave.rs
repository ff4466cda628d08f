//! The end of the agent: for a restart everything stays as it is; when the mesh is uninstalled, nothing does (C79, C80).

use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use kube::{Api, Client};
use tokio::time::Instant;

use super::KubernetesConfig;
use super::attest::Rules;
use super::enrol::Enroller;
use super::source::{Source, View};

/// One question to the API server.
const PATIENCE: Duration = Duration::from_secs(3);
/// For reports to be taken away and peers to learn of it. With what comes before and after it stays under the 30 s that a pod has to end.
const GOING: Duration = Duration::from_secs(10);
const PASS: Duration = Duration::from_millis(100);

/// Whether no agent comes after this one: its DaemonSet is gone or being deleted, or its rights are. Who cannot be asked has not said so.
pub async fn is_for_good(client: &Client, config: &KubernetesConfig) -> bool {
    let sets: Api<DaemonSet> = Api::namespaced(client.clone(), &config.system_namespace);
    match tokio::time::timeout(PATIENCE, sets.get(&config.daemonset)).await {
        Ok(Ok(set)) => set.metadata.deletion_timestamp.is_some(),
        Ok(Err(kube::Error::Api(status))) => matches!(status.code, 401 | 403 | 404),
        Ok(Err(error)) => {
            tracing::warn!(%error, "whether another agent comes cannot be known; everything stays");
            false
        }
        Err(_) => false,
    }
}

/// Un-enrols every pod of the node: first as if its label went, then, if that takes too long, by force. Unlike C80 no pod keeps rules that
/// lead nowhere.
pub async fn release_all<R: Rules>(enroller: &mut Enroller<R>, source: &mut Source) {
    tracing::info!("the mesh is uninstalled: every pod of this node leaves it");
    let until = Instant::now() + GOING;
    while Instant::now() < until {
        let mut view = View { complete: true, ..source.view().unwrap_or_default() };
        view.leave();
        enroller.pass(&view).await;
        if enroller.is_empty() {
            break;
        }
        tokio::time::sleep(PASS).await;
    }
    enroller.abandon().await;
}
