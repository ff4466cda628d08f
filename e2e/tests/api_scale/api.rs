//! Requests that are timed, to the API server: a client that is there already, instead of a program for each.

use std::path::Path;

use anyhow::{Context, Result};
use culvert_e2e::apiserver::MERGE;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

/// Requests in flight.
pub const AT_ONCE: usize = 32;

/// A client.
#[derive(Clone)]
pub struct Api(kube::Client);

impl Api {
    pub async fn open(kubeconfig: &Path) -> Result<Self> {
        let config = Kubeconfig::read_from(kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
        Ok(Self(kube::Client::try_from(config)?))
    }

    async fn send(&self, method: &str, path: &str, kind: &str, body: String) -> Result<()> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(body.into_bytes())?;
        self.0.request_text(request).await.map(drop).with_context(|| format!("{method} {path}"))
    }

    pub async fn make(&self, path: &str, object: String) -> Result<()> {
        self.send("POST", path, "application/json", object).await
    }

    pub async fn merge(&self, path: &str, change: &Value) -> Result<()> {
        self.send("PATCH", path, MERGE, change.to_string()).await
    }

    /// At once: no kubelet is there to end anything.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", &format!("{path}?gracePeriodSeconds=0"), "application/json", String::new()).await
    }
}
