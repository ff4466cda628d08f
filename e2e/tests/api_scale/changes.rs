//! Changes of the mesh, each timed from the API server's answer until the proxy decides by it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_e2e::world::PATIENCE;
use futures_util::{StreamExt, TryStreamExt, stream};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::api::{AT_ONCE, Api};
use crate::objects::{self, CLIENT, NAMESPACES, PODS, PORT, Pod, policy_path, ports};

/// How often the proxy is asked.
const POLL: Duration = Duration::from_millis(5);
/// Where [`Change::Target`] leads instead.
const OTHER_PORT: u16 = 9090;

/// A change.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// A pod's label makes a policy that denies everything apply to it, or no longer.
    Quarantine(Pod, bool),
    /// A pod goes.
    Delete(Pod),
    /// A pod gets an address.
    Create(Pod),
    /// A namespace's policy denies this port to the pods of service 0.
    Deny(usize, u16),
    /// The pods of this one's service are reached at this port.
    Target(Pod, u16),
    /// A pod is ready, or no longer.
    Ready(Pod, bool),
}

impl Change {
    fn kind(self) -> &'static str {
        match self {
            Self::Quarantine(..) => "a label makes a policy apply",
            Self::Delete(_) => "a pod is deleted",
            Self::Create(_) => "a pod gets its address",
            Self::Deny(..) => "a policy is edited",
            Self::Target(..) => "a service's port changes",
            Self::Ready(..) => "a pod's readiness changes",
        }
    }

    /// What has to be there before, and is not timed.
    async fn prepare(self, api: &Api) -> Result<()> {
        match self {
            Self::Create(pod) => pod.define(api).await,
            _ => Ok(()),
        }
    }

    async fn write(self, api: &Api) -> Result<()> {
        match self {
            Self::Quarantine(pod, on) => {
                let label = json!(on.then_some("true"));
                api.merge(&pod.path(), &json!({ "metadata": { "labels": { "quarantine": label } } })).await
            }
            Self::Delete(pod) => api.delete(&pod.path()).await,
            Self::Create(pod) => pod.runs(api).await,
            Self::Deny(namespace, port) => {
                let path = format!("{}/port", policy_path(namespace));
                api.merge(&path, &json!({ "spec": objects::denies(port) })).await
            }
            Self::Target(pod, port) => {
                api.merge(&pod.service_path(), &json!({ "spec": { "ports": ports(port) } })).await
            }
            Self::Ready(pod, ready) => {
                let status = if ready { "True" } else { "False" };
                let conditions = json!([{ "type": "Ready", "status": status }]);
                let path = format!("{}/status", pod.path());
                api.merge(&path, &json!({ "status": { "conditions": conditions } })).await
            }
        }
    }

    /// What is asked about it.
    fn page(self) -> String {
        let destination = match self {
            Self::Quarantine(pod, _) | Self::Delete(pod) | Self::Create(pod) => {
                format!("{}:{PORT}", pod.address())
            }
            Self::Deny(namespace, _) => {
                format!("{}:{PORT}", Pod { namespace, service: 0, number: 1 }.address())
            }
            Self::Target(pod, _) | Self::Ready(pod, _) => {
                format!("svc-{}.{}.svc.cluster.local:80", pod.service, pod.namespace())
            }
        };
        format!("/debug/explain?source=app-0/{CLIENT}&destination={destination}")
    }

    /// The names of the resources by which proxies learn of it.
    pub fn names(self) -> Vec<String> {
        match self {
            Self::Quarantine(pod, _) | Self::Delete(pod) | Self::Create(pod) | Self::Ready(pod, _) => {
                vec![pod.uid()]
            }
            Self::Deny(namespace, _) => vec![format!("app-{namespace}/port")],
            Self::Target(pod, _) => (0..PODS).map(|number| Pod { number, ..pod }.uid()).collect(),
        }
    }

    /// Whether the proxy decides by it.
    fn holds(self, explained: &Value) -> bool {
        let allowed = &explained["authorization"]["allowed"];
        let endpoints = || explained["endpoints"].as_array().into_iter().flatten();
        match self {
            Self::Quarantine(_, on) => *allowed == !on,
            Self::Deny(_, port) => *allowed == (port != PORT),
            Self::Delete(_) => explained["addressed"] == "unknown",
            Self::Create(pod) => explained["addressed"]["workload"] == pod.uid().as_str(),
            Self::Target(_, port) => {
                endpoints().count() == PODS && endpoints().all(|it| it["target_port"] == port)
            }
            Self::Ready(pod, ready) => {
                endpoints().any(|it| it["uid"] == pod.uid().as_str() && it["why_not"].is_null() == ready)
            }
        }
    }
}

/// How long changes took, by kind.
#[derive(Debug, Default)]
pub struct Times(Vec<(&'static str, Duration)>);

impl Times {
    /// Makes one change, and waits until the proxy decides by it.
    pub async fn add(&mut self, api: &Api, admin: u16, change: Change) -> Result<()> {
        change.prepare(api).await?;
        ensure!(!change.holds(&explained(admin, change).await?), "{change:?} changes nothing");
        change.write(api).await?;
        let written = Instant::now();
        while !change.holds(&explained(admin, change).await?) {
            ensure!(written.elapsed() < PATIENCE, "{change:?}: not within {PATIENCE:?}");
            tokio::time::sleep(POLL).await;
        }
        self.0.push((change.kind(), written.elapsed()));
        Ok(())
    }

    /// Takes in what was measured.
    pub fn put(&mut self, change: Change, took: Duration) {
        self.0.push((change.kind(), took));
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The time that all but one in a hundred stay below.
    pub fn p99(&self) -> Duration {
        let all = self.0.iter().map(|(_, took)| *took).collect();
        percentile(all, 99)
    }

    /// A line for each kind, and one for all.
    pub fn print(&self, of: &str) {
        let mut kinds: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
        for (kind, took) in &self.0 {
            kinds.entry(kind).or_default().push(*took);
            kinds.entry("~ all").or_default().push(*took);
        }
        println!("        {of}: milliseconds to the decision, p50, p99 and the longest");
        for (kind, took) in kinds {
            let of = |percent| percentile(took.clone(), percent).as_secs_f64() * 1e3;
            println!("          {kind:<32} {:4} {:7.1} {:7.1} {:7.1}", took.len(), of(50), of(99), of(100));
        }
    }
}

fn percentile(mut all: Vec<Duration>, percent: usize) -> Duration {
    all.sort();
    let at = (all.len() * percent).div_ceil(100).max(1) - 1;
    all.get(at).copied().unwrap_or(Duration::MAX)
}

/// One after the other: `rounds` of each kind, over all namespaces.
pub async fn in_sequence(times: &mut Times, api: &Api, admin: u16, rounds: usize) -> Result<()> {
    for round in 0..rounds {
        let (namespace, step) = (round % NAMESPACES, round / NAMESPACES);
        let pod = |first: usize, number: usize| Pod { namespace, service: first + step, number };
        let other = if step % 2 == 0 { PORT } else { 9000 };
        for change in [
            Change::Quarantine(pod(1, 0), true),
            Change::Delete(pod(10, 1)),
            Change::Deny(namespace, other),
            Change::Create(pod(10, 1)),
            Change::Target(pod(20, 0), OTHER_PORT),
            Change::Ready(pod(30, 2), false),
        ] {
            times.add(api, admin, change).await?;
        }
    }
    Ok(())
}

/// All namespaces at once, one change of each kind in each; `step` is another for each burst.
pub fn burst(step: usize) -> Vec<Change> {
    let of = |namespace: usize| {
        let pod = |first: usize, number: usize| Pod { namespace, service: first + step, number };
        [
            Change::Quarantine(pod(60, 0), true),
            Change::Delete(pod(70, 1)),
            Change::Deny(namespace, if step.is_multiple_of(2) { PORT } else { 9000 }),
            Change::Target(pod(80, 0), OTHER_PORT),
            Change::Ready(pod(90, 2), false),
        ]
    };
    (0..NAMESPACES).flat_map(of).collect()
}

/// Makes them, some at once; says when the API server answered each.
pub async fn write_all(api: &Api, admin: u16, changes: Vec<Change>) -> Result<Vec<(Change, OffsetDateTime)>> {
    for change in &changes {
        change.prepare(api).await?;
        ensure!(!change.holds(&explained(admin, *change).await?), "{change:?} changes nothing");
    }
    let write = |change: Change| async move {
        change.write(api).await?;
        Ok((change, OffsetDateTime::now_utc()))
    };
    stream::iter(changes).map(write).buffer_unordered(AT_ONCE).try_collect().await
}

/// Waits until the proxy decides by all of them.
pub async fn all_hold(admin: u16, changes: &[(Change, OffsetDateTime)]) -> Result<()> {
    let started = Instant::now();
    for (change, _) in changes {
        while !change.holds(&explained(admin, *change).await?) {
            ensure!(started.elapsed() < PATIENCE, "{change:?}: not within {PATIENCE:?}");
            tokio::time::sleep(POLL).await;
        }
    }
    Ok(())
}

async fn explained(admin: u16, change: Change) -> Result<Value> {
    let page = page(admin, &change.page()).await?;
    serde_json::from_str(&page).with_context(|| page)
}

/// A page, without a program for each.
pub async fn page(port: u16, path: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: localhost\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
    Ok(body.to_owned())
}
