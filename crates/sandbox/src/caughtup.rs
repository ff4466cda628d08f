//! Whether the mesh has heard: pods may be ready and their proxies too, while the news of it is still on its way from the
//! controller to the proxies. What `up` calls ready includes its arrival.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde::Deserialize;

use crate::lab::NetNs;
use crate::plan;
use crate::report::Report;
use crate::state::StateDir;

/// Where the controller tells what it knows.
const DEBUG_PORT: u16 = 15014;
/// Each question, and each wait for more of its answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Longest answer read: some 100,000 workloads.
const MAX_ANSWER: u64 = 128 << 20;

/// The part of `/debug/index` that counts here.
#[derive(Debug, Deserialize)]
struct Index {
    generation: u64,
    addresses: BTreeMap<String, Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    resource: Resource,
}

#[derive(Debug, Deserialize)]
struct Resource {
    workload: Option<Workload>,
}

#[derive(Debug, Deserialize)]
struct Workload {
    status: String,
    tunnel: Option<String>,
}

/// The part of `/debug/clients` that counts here.
#[derive(Debug, Deserialize)]
struct Clients {
    clients: Vec<Client>,
}

#[derive(Debug, Deserialize)]
struct Client {
    peer: Peer,
    types: BTreeMap<String, Type>,
}

#[derive(Debug, Deserialize)]
struct Peer {
    name: String,
}

#[derive(Debug, Deserialize)]
struct Type {
    acked_generation: Option<u64>,
}

/// True once the controller knows every pod as `report` shows it and every node's proxy has put that in force.
///
/// # Errors
/// The controller cannot be asked, or answers something else.
pub fn caught_up(state: &StateDir, report: &Report) -> io::Result<bool> {
    if !report.mesh {
        return Ok(true);
    }
    let index: Index = ask(state, report, "/debug/index")?;
    if !knows(&index, report) {
        return Ok(false);
    }
    let clients: Clients = ask(state, report, "/debug/clients")?;
    Ok(report.nodes.iter().all(|node| has(&clients, &node.name, index.generation)))
}

fn knows(index: &Index, report: &Report) -> bool {
    report.pods.iter().filter(|pod| pod.ready).all(|pod| {
        let name = format!("Kubernetes//Pod/{}/{}", pod.key.namespace, pod.key.name);
        let workload = index.addresses.get(&name).and_then(|entry| entry.resource.workload.as_ref());
        workload.is_some_and(|known| {
            known.status == "HEALTHY" && (!pod.enrolled || known.tunnel.as_deref() == Some("HBONE"))
        })
    })
}

fn has(clients: &Clients, node: &str, generation: u64) -> bool {
    clients.clients.iter().any(|client| {
        client.peer.name == node
            && !client.types.is_empty()
            && client.types.values().all(|it| it.acked_generation.is_some_and(|acked| acked >= generation))
    })
}

fn ask<T: for<'de> Deserialize<'de>>(state: &StateDir, report: &Report, path: &str) -> io::Result<T> {
    let addresses = report.family.keep(plan::controller_addresses());
    let address = *addresses.first().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let target = SocketAddr::new(address, DEBUG_PORT);
    let netns = NetNs::at(state.netns().join("controller"));
    let mut stream =
        netns.run(|| TcpStream::connect_timeout(&target, TIMEOUT)).map_err(io::Error::other)??;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // Version 1.0: the answer ends with the connection, and comes in one piece.
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {target}\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
    let body = answer
        .windows(4)
        .position(|window| window == b"\r\n\r\n")
        .map(|end| &answer[end + 4..])
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path}: no HTTP answer")))?;
    serde_json::from_slice(body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(node: &str, acked: &[Option<u64>]) -> Clients {
        let types = acked
            .iter()
            .enumerate()
            .map(|(n, acked)| (n.to_string(), Type { acked_generation: *acked }))
            .collect();
        Clients { clients: vec![Client { peer: Peer { name: node.to_owned() }, types }] }
    }

    #[test]
    fn every_type_of_every_node_counts() {
        assert!(has(&clients("a", &[Some(7), Some(8)]), "a", 7));
        assert!(!has(&clients("a", &[Some(7), Some(6)]), "a", 7));
        assert!(!has(&clients("a", &[Some(7), None]), "a", 7));
        assert!(!has(&clients("a", &[]), "a", 7), "connected, and nothing acknowledged");
        assert!(!has(&clients("b", &[Some(7)]), "a", 7));
    }
}
