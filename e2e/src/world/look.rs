//! Looking into a running world: status, logs, the proxies' pages.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_net::NetNs;
use serde_json::Value;

use super::{Family, PATIENCE, Pod, World, said, wait_for};

/// The proxy's admin page, in the proxy's namespace.
const ADMIN: ([u8; 4], u16) = ([127, 0, 0, 1], 15000);

impl World {
    /// `culvert status -o json`.
    ///
    /// # Errors
    /// If nothing is up.
    pub fn status(&self) -> Result<Value> {
        let output = self.command().args(["status", "-o", "json"]).output()?;
        // Problems make the exit code 1, and are in what it prints.
        ensure!(!output.stdout.is_empty(), "culvert status: {}", said(&output));
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// A pod's address.
    ///
    /// # Errors
    /// If it has none of that family.
    pub fn address(&self, pod: Pod, family: Family) -> Result<IpAddr> {
        let status = self.status()?;
        let found = find(&status["pods"], |p| p["namespace"] == pod.0 && p["name"] == pod.1)
            .with_context(|| format!("no pod {pod:?}"))?;
        of_family(&found["podIPs"], family).with_context(|| format!("{pod:?} has no {family:?} address"))
    }

    /// A Service's address, from its status file.
    ///
    /// # Errors
    /// If it has none of that family.
    pub fn service_address(&self, namespace: &str, name: &str, family: Family) -> Result<IpAddr> {
        let file = self.state_dir().join(format!("status/services/{namespace}.{name}.json"));
        let status: Value = serde_json::from_str(&fs::read_to_string(&file)?)?;
        of_family(&status["clusterIPs"], family).with_context(|| format!("{status}"))
    }

    /// The process of a program of the mesh.
    ///
    /// # Errors
    /// If it does not run.
    pub fn pid(&self, role: &str, node: Option<&str>) -> Result<i32> {
        let status = self.status()?;
        let wanted = |p: &Value| p["role"] == role && p["node"].as_str() == node;
        let found = find(&status["system"], wanted).with_context(|| format!("no {role}"))?;
        let pid = found["pid"].as_i64().with_context(|| format!("{role} does not run: {found}"))?;
        Ok(i32::try_from(pid)?)
    }

    /// Whether the program runs and says that it is ready.
    ///
    /// # Errors
    /// If nothing is up.
    pub fn ready(&self, role: &str, node: Option<&str>) -> Result<bool> {
        let status = self.status()?;
        let wanted = |p: &Value| p["role"] == role && p["node"].as_str() == node;
        Ok(find(&status["system"], wanted).is_some_and(|p| p["ready"] == true))
    }

    /// The namespace of a pod.
    ///
    /// # Errors
    /// If there is no such pod.
    pub fn pod_netns(&self, pod: Pod) -> Result<NetNs> {
        let status = self.status()?;
        let found = find(&status["pods"], |p| p["namespace"] == pod.0 && p["name"] == pod.1)
            .with_context(|| format!("no pod {pod:?}"))?;
        open(&found["netns"])
    }

    /// The namespace of a node.
    ///
    /// # Errors
    /// If there is no such node.
    pub fn node_netns(&self, node: &str) -> Result<NetNs> {
        let status = self.status()?;
        let found =
            find(&status["nodes"], |n| n["name"] == node).with_context(|| format!("no node {node}"))?;
        open(&found["netns"])
    }

    /// A node's directory: `token`, `logs/`.
    #[must_use]
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.state_dir().join("nodes").join(node)
    }

    /// A page of a node's proxy.
    ///
    /// # Errors
    /// If it does not answer with JSON.
    pub fn admin(&self, node: &str, page: &str) -> Result<Value> {
        let status = self.status()?;
        let proxy = find(&status["system"], |p| p["role"] == "proxy" && p["node"] == node);
        // The program's own namespace: two proxies of a node stand side by side while one takes over from the other.
        let netns = open(&proxy.with_context(|| format!("no proxy on {node}"))?["netns"])?;
        let mut stream =
            netns.run(|| TcpStream::connect_timeout(&SocketAddr::from(ADMIN), Duration::from_secs(2)))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(stream, "GET {page} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{page}: {head}");
        serde_json::from_str(body).with_context(|| format!("{page}: {body:?}"))
    }

    /// Every access log line of a node's proxies so far.
    ///
    /// # Errors
    /// If there is no log.
    pub fn access_log(&self, node: &str) -> Result<Vec<Value>> {
        let lines = self.log_lines(&self.node_dir(node).join("logs/proxy.log"))?;
        Ok(lines.into_iter().filter(|line| line["target"] == "access").collect())
    }

    /// Waits for an access log line of a node's proxy.
    ///
    /// # Errors
    /// If none comes; the last lines there are.
    pub fn wait_for_access(&self, node: &str, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let look = || Ok(self.access_log(node)?.into_iter().find(|line| wanted(line)));
        wait_for("an access log line", PATIENCE, look).with_context(|| {
            let log = self.access_log(node).unwrap_or_default();
            let last: Vec<_> = log.iter().rev().take(5).map(Value::to_string).collect();
            format!("the last of {} lines on {node}: {}", log.len(), last.join("\n"))
        })
    }

    /// What the peer in a pod says about the conversation `id`.
    ///
    /// # Errors
    /// If it says nothing.
    pub fn server_says(&self, pod: Pod, id: &str) -> Result<Value> {
        let log = self.state_dir().join(format!("pods/{}.{}/stdout.log", pod.0, pod.1));
        let look = || Ok(self.log_lines(&log)?.into_iter().find(|line| line["id"] == id));
        wait_for(&format!("the server's word on {id}"), PATIENCE, look)
    }

    /// Lines of JSON; others, and one that is being written, are left out.
    fn log_lines(&self, log: &PathBuf) -> Result<Vec<Value>> {
        let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
        Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }
}

fn find(list: &Value, wanted: impl Fn(&Value) -> bool) -> Option<&Value> {
    list.as_array()?.iter().find(|item| wanted(item))
}

fn of_family(addresses: &Value, family: Family) -> Option<IpAddr> {
    let all = addresses.as_array()?.iter().filter_map(|text| text.as_str()?.parse().ok());
    all.into_iter().find(|address: &IpAddr| address.is_ipv4() == (family == Family::V4))
}

fn open(path: &Value) -> Result<NetNs> {
    let path = path.as_str().context("no namespace")?;
    NetNs::open(path).with_context(|| format!("opening {path}"))
}
