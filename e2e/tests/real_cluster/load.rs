//! Load from a pod, open-loop, that goes on whatever happens to the cluster: it is a pod of its own, and what it says is read from the
//! node's disk, so that neither the API server nor a kubelet is needed.

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use culvert_cluster::Node;
use serde_json::{Value, json};

use crate::world::{PATIENCE, World};

/// What the client sends first on each connection: it must not be read on the wire.
pub const MARKER: &str = "echo load";

/// Load that runs.
pub struct Load<'a> {
    world: &'a World,
    node: &'a Node,
    namespace: String,
    name: String,
    seconds: u64,
}

/// How a load went.
#[derive(Debug)]
pub struct Outcome {
    /// Connections that were begun.
    pub total: u64,
    /// When, in seconds of the epoch, the failed ones had begun, and why they failed.
    pub failures: Vec<(f64, String)>,
    /// Longest time from connect to answer.
    pub slowest: Duration,
}

impl<'a> Load<'a> {
    /// Starts `rate` connections a second to the Service `echo` of the namespace, from a pod on `node`; the first has begun when this
    /// returns.
    pub fn start(
        world: &'a World,
        namespace: &str,
        name: &str,
        node: &str,
        rate: u32,
        seconds: u64,
    ) -> Result<Self> {
        let service = world.api.get(&format!("/api/v1/namespaces/{namespace}/services/echo"))?;
        let targets: Vec<&str> = service["spec"]["clusterIPs"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        ensure!(!targets.is_empty(), "the service echo has no address");
        let (rate, length) = (rate.to_string(), seconds.to_string());
        let command = [
            "peer",
            "load",
            "--targets",
            &targets.join(","),
            "--port",
            "9000",
            "--rate",
            &rate,
            "--seconds",
            &length,
            "--tell",
        ];
        // One of its own: what an earlier one said may still lie on the node's disk.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name = format!("{name}-{}", STARTED.fetch_add(1, Ordering::Relaxed));
        let pod = json!({
            "metadata": { "name": name, "labels": { "app": name } },
            "spec": { "nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0,
                "containers": [{ "name": "main", "image": "culvert.test/peer:1", "command": command }] },
        });
        world.api.create(&format!("/api/v1/namespaces/{namespace}/pods"), &pod)?;
        let load =
            Self { world, node: world.cluster.node(node)?, namespace: namespace.to_owned(), name, seconds };
        world.api.wait("the load's begin", PATIENCE, |_| Ok(load.lines()?.first().cloned()))?;
        Ok(load)
    }

    /// What it said so far.
    fn lines(&self) -> Result<Vec<Value>> {
        let mut lines = Vec::new();
        let prefix = format!("{}_{}_", self.namespace, self.name);
        for pod in fs::read_dir(self.node.dir().join("var/log/pods"))?.flatten() {
            if pod.file_name().to_string_lossy().starts_with(&prefix) {
                let text = fs::read_to_string(pod.path().join("main/0.log")).unwrap_or_default();
                // Time, stream and a tag stand before what was said.
                lines.extend(
                    text.lines().filter_map(|line| serde_json::from_str(line.splitn(4, ' ').nth(3)?).ok()),
                );
            }
        }
        Ok(lines)
    }

    /// Waits for its end; the pod is removed.
    pub fn finish(self) -> Result<Outcome> {
        let patience = Duration::from_secs(self.seconds) + PATIENCE;
        let last = self.world.api.wait("the load's end", patience, |_| {
            Ok(self.lines()?.into_iter().find(|line| line["total"].is_u64()))
        })?;
        let failures = self.lines()?.into_iter().filter_map(|line| {
            Some((line["failed_at"].as_f64()?, line["error"].as_str().unwrap_or_default().to_owned()))
        });
        let outcome = Outcome {
            total: last["total"].as_u64().context("a total")?,
            failures: failures.collect(),
            slowest: Duration::from_secs_f64(last["max"].as_f64().unwrap_or_default()),
        };
        self.world.api.delete(&format!("/api/v1/namespaces/{}/pods/{}", self.namespace, self.name))?;
        Ok(outcome)
    }
}

impl Outcome {
    /// Every connection was answered.
    pub fn none_failed(&self) -> Result<()> {
        println!("          {} connections, slowest {} ms", self.total, self.slowest.as_millis());
        ensure!(self.total > 0, "there was no load");
        ensure!(
            self.failures.is_empty(),
            "{} of {} failed, first {:?}",
            self.failures.len(),
            self.total,
            self.failures[0]
        );
        Ok(())
    }
}

/// Seconds of the epoch.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
