//! Questions to a port inside a namespace: readiness of pods, as a kubelet asks, and of the system's own programs. A kubelet asks from its
//! node and as root; the node's agent lets such a question through to a pod of the mesh.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::lab::NetNs;

/// Longest answer read: the status line is in it.
const MAX_ANSWER: usize = 1024;

/// What to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Probe {
    /// The port takes a connection.
    Connect {
        /// From where.
        netns: NetNs,
        /// The port.
        target: SocketAddr,
    },
    /// An HTTP GET answers with a status from 200 to 399, as a kubelet counts it.
    Get {
        /// From where.
        netns: NetNs,
        /// The port.
        target: SocketAddr,
        /// The path.
        path: String,
    },
    /// The file is there.
    File(PathBuf),
}

impl Probe {
    /// Asks once, for at most `timeout`. The error says why the answer is no.
    pub async fn ask(&self, timeout: Duration) -> io::Result<()> {
        match self {
            Probe::File(path) => tokio::fs::metadata(path).await.map(drop),
            Probe::Connect { netns, target } => {
                tokio::time::timeout(timeout, connect(netns, *target)).await?.map(drop)
            }
            Probe::Get { netns, target, path } => {
                let status = tokio::time::timeout(timeout, get(netns, *target, path)).await??;
                if (200..400).contains(&status) {
                    Ok(())
                } else {
                    Err(io::Error::other(format!("{path} answered {status}")))
                }
            }
        }
    }
}

async fn connect(netns: &NetNs, target: SocketAddr) -> io::Result<TcpStream> {
    let make = if target.is_ipv4() { TcpSocket::new_v4 } else { TcpSocket::new_v6 };
    let socket = netns.run(make).map_err(io::Error::other)??;
    socket.connect(target).await
}

/// The status of an answer to a GET.
async fn get(netns: &NetNs, target: SocketAddr, path: &str) -> io::Result<u16> {
    let mut stream = connect(netns, target).await?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: culvert-probe\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    let status = loop {
        if stream.read_buf(&mut answer).await? == 0 || answer.len() >= MAX_ANSWER {
            break None;
        }
        if let Some(end) = answer.iter().position(|byte| *byte == b'\n') {
            break std::str::from_utf8(&answer[..end]).ok().and_then(status_of);
        }
    };
    status.ok_or_else(|| io::Error::other("no HTTP answer"))
}

fn status_of(line: &str) -> Option<u16> {
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_lines() {
        assert_eq!(status_of("HTTP/1.1 200 OK\r"), Some(200));
        assert_eq!(status_of("HTTP/1.0 503\r"), Some(503));
        assert_eq!(status_of("220 smtp"), None);
    }
}
