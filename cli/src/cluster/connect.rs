//! The API server of the cluster that was named.

use std::future::Future;
use std::time::Duration;

use anyhow::{Context, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::args::ClusterArgs;

/// From a SYN to an answer that a TLS handshake may follow.
const CONNECT: Duration = Duration::from_secs(5);

/// A cluster that can be asked.
#[derive(Clone)]
pub(crate) struct Cluster {
    /// Asks its API server.
    pub client: Client,
    /// Context of the kubeconfig; `None` in a pod.
    pub context: Option<String>,
    /// URL of the API server.
    pub server: String,
    /// Namespace of the context: where commands look without `-n`.
    pub namespace: String,
    /// Namespace of the installation.
    pub system: String,
    /// How long one answer may take.
    pub patience: Duration,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoAnswer {
    /// The API server said no.
    #[error("{message} ({code})")]
    Refused {
        /// HTTP status.
        code: u16,
        /// What it said.
        message: String,
    },
    /// It is away, or something on the way to it.
    #[error("{0}")]
    Away(String),
    /// It took too long.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
}

impl Cluster {
    /// Reads the kubeconfig. Nothing is asked yet.
    ///
    /// # Errors
    /// No kubeconfig, one that cannot be used, or a context that is not in it.
    pub(crate) async fn open(args: &ClusterArgs) -> anyhow::Result<Self> {
        let (mut config, context) = config(args).await?;
        config.connect_timeout = Some(CONNECT);
        // Each call has its own bound, and whoever reads must be told at once.
        config.default_retry = false;
        let server = config.cluster_url.to_string().trim_end_matches('/').to_owned();
        let namespace = config.default_namespace.clone();
        let client = Client::try_from(config).with_context(|| format!("cannot use API server {server}"))?;
        Ok(Self {
            client,
            context,
            server,
            namespace,
            system: args.system_namespace.clone(),
            patience: args.patience(),
        })
    }

    /// An answer within the patience.
    ///
    /// # Errors
    /// See [`NoAnswer`].
    pub(crate) async fn ask<T>(&self, call: impl Future<Output = kube::Result<T>>) -> Result<T, NoAnswer> {
        match tokio::time::timeout(self.patience, call).await {
            Ok(outcome) => outcome.map_err(NoAnswer::from),
            Err(_) => Err(NoAnswer::Late(self.patience)),
        }
    }

    /// What the cluster is called in messages.
    pub(crate) fn name(&self) -> String {
        match &self.context {
            Some(context) => format!("{} (context {context})", self.server),
            None => self.server.clone(),
        }
    }
}

impl From<kube::Error> for NoAnswer {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::Refused { code: status.code, message: status.message.clone() },
            other => Self::Away(chain(&other)),
        }
    }
}

impl NoAnswer {
    /// What was asked for does not exist, the kind of it perhaps.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(self, Self::Refused { code: 404, .. })
    }
}

/// An error and what caused it, each said once: libraries repeat their causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}

async fn config(args: &ClusterArgs) -> anyhow::Result<(Config, Option<String>)> {
    let files = args.files();
    let Some((first, rest)) = files.split_first() else {
        if let Some(context) = &args.context {
            bail!(
                "there is no kubeconfig with a context {context:?} (--kubeconfig, KUBECONFIG, ~/.kube/config)"
            );
        }
        let config = Config::incluster().context(
            "no kubeconfig (--kubeconfig, KUBECONFIG, ~/.kube/config), and this runs in no pod of a cluster",
        )?;
        return Ok((config, None));
    };
    let read = |path: &std::path::PathBuf| {
        Kubeconfig::read_from(path).with_context(|| format!("cannot use kubeconfig {}", path.display()))
    };
    let mut kubeconfig = read(first)?;
    for path in rest {
        kubeconfig = kubeconfig
            .merge(read(path)?)
            .with_context(|| format!("cannot use kubeconfig {}", path.display()))?;
    }
    let context = args.context.clone().or_else(|| kubeconfig.current_context.clone());
    if let Some(context) = &context
        && !kubeconfig.contexts.iter().any(|known| known.name == *context)
    {
        let known: Vec<_> = kubeconfig.contexts.iter().map(|known| known.name.as_str()).collect();
        bail!("no context {context:?} in {}: there is {}", first.display(), known.join(", "));
    }
    let options = KubeConfigOptions { context: context.clone(), ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(kubeconfig, &options)
        .await
        .with_context(|| format!("cannot use kubeconfig {}", first.display()))?;
    Ok((config, context))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn args(kubeconfig: PathBuf, context: Option<&str>) -> ClusterArgs {
        ClusterArgs {
            context: context.map(str::to_owned),
            kubeconfig: Some(kubeconfig),
            system_namespace: "culvert-system".to_owned(),
            request_timeout: 1,
        }
    }

    #[tokio::test]
    async fn a_context_that_is_not_there_is_answered_with_those_that_are() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let text = "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters:\n- {name: c, cluster: {server: 'http://127.0.0.1:1'}}\n\
contexts:\n- {name: a, context: {cluster: c, user: u, namespace: shop}}\n- {name: b, context: {cluster: c, user: u}}\nusers:\n- {name: u, user: {}}\n";
        std::fs::write(&path, text).unwrap();
        let cluster = Cluster::open(&args(path.clone(), None)).await.unwrap();
        assert_eq!((cluster.namespace.as_str(), cluster.context.as_deref()), ("shop", Some("a")));
        assert_eq!(cluster.server, "http://127.0.0.1:1");
        let error = Cluster::open(&args(path, Some("prod"))).await.err().unwrap().to_string();
        assert!(error.contains("\"prod\"") && error.contains("a, b"), "{error}");
        let error = Cluster::open(&args(dir.path().join("none"), None)).await.err().unwrap();
        assert!(format!("{error:#}").contains("none"), "{error:#}");
    }
}
