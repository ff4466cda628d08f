//! The mesh of a cluster: logs as the kubelet keeps them, of pods and of the mesh's programs by their role and node.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use futures_util::AsyncReadExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::LogParams;

use crate::args::{ClusterArgs, LogsArgs};
use crate::cluster::Cluster;
use crate::cluster::seen::SeenPod;
use crate::get::source::running;

/// Read at once.
const BLOCK: usize = 64 * 1024;

/// Whose log.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Whose<'a> {
    /// A program of the mesh: the label of its pods, and the node if one is named.
    Program(&'static str, Option<&'a str>),
    /// Any pod.
    Pod(&'a str),
}

pub(super) async fn logs(cluster: &ClusterArgs, args: &LogsArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(cluster).await?;
    let (namespace, pods) = match whose(&args.pod.name) {
        Whose::Pod(name) => {
            let namespace = args.pod.namespace.clone().unwrap_or_else(|| cluster.namespace.clone());
            (namespace, vec![name.to_owned()])
        }
        Whose::Program(app, node) => {
            let pods = chosen(running(&cluster, app).await?, node);
            if pods.is_empty() {
                bail!("no {} runs on {}", args.pod.name, node.unwrap_or("any node"));
            }
            (cluster.system.clone(), pods)
        }
    };
    if args.follow && pods.len() > 1 {
        bail!("{} is {} pods, of which one can be followed: {}", args.pod.name, pods.len(), pods.join(", "));
    }
    let api: Api<Pod> = Api::namespaced(cluster.client.clone(), &namespace);
    for pod in &pods {
        if pods.len() > 1 {
            println!("==> {pod} <==");
        }
        match print(&cluster, &api, pod, args).await {
            // Whoever reads has seen enough (`culvert logs | head`).
            Err(error) if is_closed(&error) => return Ok(ExitCode::SUCCESS),
            outcome => outcome.with_context(|| format!("log of pod {namespace}/{pod}"))?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn whose(name: &str) -> Whose<'_> {
    let (role, node) = name.split_once('/').map_or((name, None), |(role, node)| (role, Some(node)));
    match (role, node) {
        ("controller", node) => Whose::Program("culvert-controller", node),
        ("agent", Some(node)) => Whose::Program("culvert-agent", Some(node)),
        ("proxy", Some(node)) => Whose::Program("ztunnel", Some(node)),
        ("pod" | "pods", Some(name)) => Whose::Pod(name),
        _ => Whose::Pod(name),
    }
}

/// The pods of a node, or of all: a controller may be named by its pod too.
fn chosen(pods: Vec<SeenPod>, place: Option<&str>) -> Vec<String> {
    let meant =
        pods.into_iter().filter(|pod| place.is_none_or(|place| pod.node == place || pod.name == place));
    meant.map(|pod| pod.name).collect()
}

async fn print(cluster: &Cluster, api: &Api<Pod>, pod: &str, args: &LogsArgs) -> anyhow::Result<()> {
    let params = LogParams {
        container: args.pod.container.clone(),
        follow: args.follow,
        previous: args.previous,
        tail_lines: args.tail.and_then(|lines| i64::try_from(lines).ok()),
        ..LogParams::default()
    };
    let mut stream = std::pin::pin!(cluster.ask(api.log_stream(pod, &params)).await?);
    let mut block = vec![0; BLOCK];
    let mut out = io::stdout().lock();
    loop {
        // A followed log may be silent for as long as it likes; one that is not followed is sent at once.
        let read = stream.read(&mut block);
        let length = if args.follow {
            read.await?
        } else {
            tokio::time::timeout(cluster.patience, read).await.context("the log stopped coming")??
        };
        if length == 0 {
            out.flush()?;
            return Ok(());
        }
        out.write_all(&block[..length])?;
        if args.follow {
            out.flush()?;
        }
    }
}

fn is_closed(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_named_by_role_and_node_as_on_this_machine() {
        assert_eq!(whose("controller"), Whose::Program("culvert-controller", None));
        assert_eq!(whose("proxy/a"), Whose::Program("ztunnel", Some("a")));
        assert_eq!(whose("agent/a"), Whose::Program("culvert-agent", Some("a")));
        assert_eq!(whose("pod/agent"), Whose::Pod("agent"));
        assert_eq!(whose("proxy"), Whose::Pod("proxy"));
        let pod =
            |name: &str, node: &str| SeenPod { name: name.into(), node: node.into(), ..SeenPod::default() };
        let all = vec![pod("c-1", "a"), pod("c-2", "b")];
        assert_eq!(chosen(all.clone(), None), ["c-1", "c-2"]);
        assert_eq!(chosen(all.clone(), Some("b")), ["c-2"]);
        assert_eq!(chosen(all, Some("c-1")), ["c-1"]);
    }
}
