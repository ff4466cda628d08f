//! Many requests at once to the API server: one connection pool, instead of a program for each request.

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

    async fn send(&self, method: &str, path: &str, kind: &str, body: String) -> Result<String> {
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", kind)
            .body(body.into_bytes())?;
        self.0.request_text(request).await.with_context(|| format!("{method} {path}"))
    }

    pub async fn get(&self, path: &str) -> Result<String> {
        self.send("GET", path, "application/json", String::new()).await
    }

    pub async fn make(&self, path: &str, object: String) -> Result<()> {
        self.send("POST", path, "application/json", object).await.map(drop)
    }

    pub async fn merge(&self, path: &str, change: &Value) -> Result<()> {
        self.send("PATCH", path, MERGE, change.to_string()).await.map(drop)
    }

    /// At once: no kubelet is there to end anything.
    pub async fn delete(&self, path: &str) -> Result<()> {
        self.send("DELETE", &format!("{path}?gracePeriodSeconds=0"), "application/json", String::new())
            .await
            .map(drop)
    }
}
