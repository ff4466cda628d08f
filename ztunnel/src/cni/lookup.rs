//! Asking the API server whether a pod joins, when the agent is away (C18): a pod that would join does not start then, and neither does
//! one of which it cannot be known.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use culvert_k8s_api::core::Pod;
use culvert_k8s_api::enrolment::{self, Settings};
use culvert_k8s_api::meta::StringMap;
use k8s_openapi::api::core::v1::Namespace;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

/// Both questions to the API server.
const PATIENCE: Duration = Duration::from_secs(5);

/// Whether the pod joins.
pub fn joins(kubeconfig: &Path, settings: &Settings, namespace: &str, name: &str) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let answer = tokio::time::timeout(PATIENCE, decide(kubeconfig, settings, namespace, name)).await;
        answer.context("no answer in time").flatten()
    })
}

async fn decide(kubeconfig: &Path, settings: &Settings, namespace: &str, name: &str) -> anyhow::Result<bool> {
    let file =
        Kubeconfig::read_from(kubeconfig).with_context(|| format!("reading {}", kubeconfig.display()))?;
    let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config)?;
    let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(client.clone(), namespace);
    let pod: Pod = serde_json::from_value(serde_json::to_value(pods.get(name).await?)?)?;
    let labels: StringMap =
        Api::<Namespace>::all(client).get(namespace).await?.metadata.labels.unwrap_or_default();
    Ok(enrolment::decide(&pod, &labels, settings).joins())
}
