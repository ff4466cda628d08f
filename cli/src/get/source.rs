//! Where answers come from: the proxies' admin pages and the controllers' pages, in the namespaces of this machine or through an API
//! server; or a dump in a file.

use std::path::Path;

use anyhow::{Context, bail};
use culvert_net::netns::NetNs;
use culvert_sandbox::daemon::Role as LocalRole;
use culvert_sandbox::report::Report;
use culvert_sandbox::state::StateDir;
use futures_util::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::ListParams;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::args::{ClusterArgs, What};
use crate::cluster::Cluster;
use crate::cluster::gather::list;
use crate::cluster::gather::objects;
use crate::cluster::reach::{DUMP, Place, each};
use crate::cluster::seen::SeenPod;
use crate::{explain, pod};

/// The proxy's admin page.
const ADMIN: u16 = 15000;
/// The controller's pages.
const PAGES: u16 = 15014;

/// Who can be asked.
pub(crate) enum Source {
    /// The mesh of `culvert up`.
    Local(Box<Report>),
    /// A cluster's, and what its client's tasks run on.
    Cluster(Box<(Runtime, Cluster)>),
    /// A dump that was written down.
    File(Value),
}

/// What one of them said.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Who said it, for messages: `proxy/NODE`, or the pod.
    pub from: String,
    /// On which node; empty for a controller.
    pub node: String,
    /// The page, or why there is none.
    pub outcome: Result<Value, String>,
}

impl Source {
    pub(crate) fn local(state: &StateDir) -> anyhow::Result<Self> {
        Ok(Self::Local(Box::new(pod::report(state)?)))
    }

    pub(crate) fn cluster(args: &ClusterArgs) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let cluster = runtime.block_on(Cluster::open(args))?;
        Ok(Self::Cluster(Box::new((runtime, cluster))))
    }

    pub(crate) fn file(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let dump = serde_json::from_slice(&text).with_context(|| format!("{} is no JSON", path.display()))?;
        Ok(Self::File(dump))
    }

    /// Where a cluster's context looks without `-n`.
    pub(crate) fn namespace(&self) -> Option<String> {
        match self {
            Self::Cluster(of) => Some(of.1.namespace.clone()),
            _ => None,
        }
    }

    /// Asks for one kind of thing: certificates and connections are each proxy's own, the rest every proxy has.
    ///
    /// # Errors
    /// Nobody can be asked at all. Of several that can, each has its own outcome.
    pub(crate) fn ask(&self, what: What, node: Option<&str>) -> anyhow::Result<Vec<Answer>> {
        let (page, all) = match what {
            What::Certificates => ("/certificates", true),
            What::Connections => ("/connections", true),
            What::Proxies => ("/debug/proxies", true),
            _ => ("/config_dump", false),
        };
        match self {
            Self::File(dump) => {
                let part = match what {
                    What::Certificates => dump["certificates"].clone(),
                    What::Connections => dump["connections"].clone(),
                    What::Proxies => bail!("a proxy's dump does not say how far other proxies are"),
                    _ => dump.clone(),
                };
                let node = dump["node"].as_str().unwrap_or_default().to_owned();
                Ok(vec![Answer { from: "the file".to_owned(), node, outcome: Ok(part) }])
            }
            Self::Local(report) if what == What::Proxies => {
                local(report, LocalRole::Controller, None, PAGES, page, all)
            }
            Self::Local(report) => local(report, LocalRole::Proxy, node, ADMIN, page, all),
            Self::Cluster(of) => of.0.block_on(async {
                let cluster = &of.1;
                if what == What::Proxies {
                    controllers(cluster, page).await
                } else {
                    proxies(cluster, node, page, all).await
                }
            }),
        }
    }
}

fn local(
    report: &Report,
    role: LocalRole,
    node: Option<&str>,
    port: u16,
    page: &str,
    all: bool,
) -> anyhow::Result<Vec<Answer>> {
    let meant = report.system.iter().filter(|daemon| daemon.role == role);
    let meant = meant.filter(|daemon| node.is_none_or(|node| daemon.node.as_deref() == Some(node)));
    let meant: Vec<_> = meant.take(if all { usize::MAX } else { 1 }).collect();
    if meant.is_empty() {
        bail!(
            "{}",
            node.map_or("no such program runs".to_owned(), |node| format!("no proxy runs on {node}"))
        );
    }
    let answers = meant.into_iter().map(|daemon| {
        let ask = || -> anyhow::Result<Value> {
            let netns = daemon.state.netns.as_ref().context("it does not run")?;
            explain::get(&NetNs::open(netns)?, port, page)
        };
        let node = daemon.node.clone().unwrap_or_default();
        let from = if node.is_empty() { "controller".to_owned() } else { format!("proxy/{node}") };
        Answer { from, node, outcome: ask().map_err(|error| format!("{error:#}")) }
    });
    Ok(answers.collect())
}

/// Pods of one of the mesh's programs that run.
pub(crate) async fn running(cluster: &Cluster, app: &str) -> anyhow::Result<Vec<SeenPod>> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &cluster.system);
    let selected = ListParams::default().labels(&format!("app={app}"));
    let pods = list(cluster, &pods, &selected)
        .await
        .with_context(|| format!("pods of {app}, {}", cluster.name()))?;
    let mut pods: Vec<SeenPod> = pods.iter().map(objects::pod).filter(|pod| !pod.deleted).collect();
    if pods.is_empty() {
        bail!(
            "no pod of {app} in namespace {} of {}: is it installed there? (-i NAMESPACE)",
            cluster.system,
            cluster.name()
        );
    }
    // Those that are ready first.
    pods.sort_by(|a, b| (!a.ready, &a.node, &a.name).cmp(&(!b.ready, &b.node, &b.name)));
    Ok(pods)
}

/// The proxy of a node: during an update the one that is ready.
pub(crate) async fn proxy_of(cluster: &Cluster, node: &str) -> anyhow::Result<SeenPod> {
    let pods = running(cluster, "ztunnel").await?;
    pods.into_iter().find(|pod| pod.node == node).with_context(|| format!("no proxy runs on {node}"))
}

async fn proxies(
    cluster: &Cluster,
    node: Option<&str>,
    page: &str,
    all: bool,
) -> anyhow::Result<Vec<Answer>> {
    let meant = match node {
        Some(node) => vec![proxy_of(cluster, node).await?],
        None => {
            let mut pods = running(cluster, "ztunnel").await?;
            // One a node: during an update there are two.
            let mut nodes = std::collections::BTreeSet::new();
            pods.retain(|pod| nodes.insert(pod.node.clone()));
            pods.truncate(if all { usize::MAX } else { 1 });
            pods
        }
    };
    let asked = each(meant, |proxy| async move {
        let place = Place { namespace: &proxy.namespace, pod: &proxy.name, port: ADMIN };
        let outcome = cluster.forwarded(place, page, DUMP).await.and_then(|page| page.json());
        let outcome = outcome.map_err(|why| why.to_string());
        Answer { from: format!("proxy/{}", proxy.node), node: proxy.node.clone(), outcome }
    });
    let mut answers: Vec<Answer> = asked.collect().await;
    answers.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(answers)
}

async fn controllers(cluster: &Cluster, page: &str) -> anyhow::Result<Vec<Answer>> {
    let pods = running(cluster, "culvert-controller").await?;
    let asked = each(pods, |pod| async move {
        let place = Place { namespace: &pod.namespace, pod: &pod.name, port: PAGES };
        let outcome = cluster.served(place, page).await.and_then(|page| page.json());
        Answer {
            from: pod.name.clone(),
            node: String::new(),
            outcome: outcome.map_err(|why| why.to_string()),
        }
    });
    let mut answers: Vec<Answer> = asked.collect().await;
    answers.sort_by(|a, b| a.from.cmp(&b.from));
    Ok(answers)
}
