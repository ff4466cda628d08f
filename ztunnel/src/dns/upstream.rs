//! Passing on what is not ours: each upstream in turn, a fresh port and id a query, nothing accepted that does not
//! answer the question asked.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use culvert_model::address::NetworkAddress;
use culvert_model::snapshot::Snapshot;
use culvert_model::workload::Workload;
use culvert_net::netns::NetNs;
use culvert_net::socket::{DialOptions, bind_udp, connect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

use super::answer::Transport;
use crate::config::{DNS_PORT, PROXY_MARK};

/// Times of one query.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long one server may take.
    pub server: Duration,
    /// How long all of them may take together.
    pub all: Duration,
}

/// glibc gives a server 5 s before it asks again; our answer, if only that nobody answered, is there before. Two servers
/// get their 2 s, or one gets them twice.
const PATIENCE: Patience = Patience { server: Duration::from_secs(2), all: Duration::from_millis(4500) };
/// The largest datagram read back. What is longer is told to ask by TCP.
const MAX_DATAGRAM: usize = 4096;
/// Bytes of a message's header (RFC 1035 section 4.1.1).
const HEADER: usize = 12;

/// The servers that queries are passed on to, in order of preference.
#[derive(Clone, Debug)]
pub struct Upstream {
    servers: Arc<[SocketAddr]>,
    netns: Arc<NetNs>,
    patience: Patience,
    /// Which server answered last: one that is dead costs its time once, not at every query.
    preferred: Arc<AtomicUsize>,
}

/// Whether asking `server` on behalf of `client` would be asking the client, or this proxy, again: the cluster's own DNS may
/// be part of the mesh, and what it forwards must not come back to it for ever.
pub fn leads_back(snapshot: &Snapshot, client: &Workload, server: SocketAddr) -> bool {
    let ip = server.ip().to_canonical();
    if ip.is_loopback() || ip.is_unspecified() {
        return server.port() == DNS_PORT;
    }
    let address = NetworkAddress { network: client.network.clone(), address: ip };
    client.addresses.contains(&ip)
        || snapshot
            .service_by_address(&address, &client.namespace)
            .is_some_and(|service| client.services.contains_key(&service.key))
}

impl Upstream {
    /// Asks `servers` from inside the pod's namespace, so that the pod's own network rules hold for its queries.
    pub fn new(servers: Arc<[SocketAddr]>, netns: Arc<NetNs>) -> Self {
        Self { servers, netns, patience: PATIENCE, preferred: Arc::default() }
    }

    /// The servers, in order of preference.
    pub fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// The first usable answer, its id put back to the client's. Servers for which `skip` holds are not asked. One that
    /// fails or refuses (SERVFAIL, NOTIMP, REFUSED) is passed over for the next, and its answer is the answer if nobody has a
    /// better one (Z82). One that was silent over UDP is asked once more, because datagrams get lost.
    ///
    /// # Errors
    /// The last server's failure; `NotConnected` when there is none to ask.
    pub async fn ask(
        &self,
        query: &[u8],
        transport: Transport,
        skip: impl Fn(SocketAddr) -> bool,
    ) -> io::Result<Vec<u8>> {
        let end = Instant::now() + self.patience.all;
        let mut last = io::Error::new(io::ErrorKind::NotConnected, "there is no upstream DNS server to ask");
        let mut unwilling = None;
        let first = self.preferred.load(Ordering::Relaxed);
        let mut order: Vec<usize> =
            (0..self.servers.len()).map(|n| (first + n) % self.servers.len()).collect();
        order.retain(|index| !skip(self.servers[*index]));
        let rounds = if transport == Transport::Udp { 2 } else { 1 };
        for _ in 0..rounds {
            let mut silent = Vec::new();
            for index in order {
                let server = self.servers[index];
                let deadline = end.min(Instant::now() + self.patience.server);
                let asked = match transport {
                    Transport::Udp => timeout_at(deadline, self.ask_udp(server, query)).await,
                    Transport::Tcp => timeout_at(deadline, self.ask_tcp(server, query)).await,
                };
                match asked {
                    Ok(Ok(answer)) if unwilling_code(&answer) => {
                        unwilling.get_or_insert(answer);
                    }
                    Ok(Ok(answer)) => {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Ok(answer);
                    }
                    Ok(Err(error)) => last = error,
                    Err(_) => {
                        silent.push(index);
                        let detail = format!("no answer from {server} in time");
                        last = io::Error::new(io::ErrorKind::TimedOut, detail);
                    }
                }
            }
            order = silent;
        }
        unwilling.ok_or(last)
    }

    async fn ask_udp(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let any: SocketAddr = match server {
            SocketAddr::V4(_) => (IpAddr::from(Ipv4Addr::UNSPECIFIED), 0).into(),
            SocketAddr::V6(_) => (IpAddr::from(Ipv6Addr::UNSPECIFIED), 0).into(),
        };
        let socket = UdpSocket::from_std(self.netns.run(|| bind_udp(any, Some(PROXY_MARK)))?)?;
        socket.connect(server).await?;
        let (id, ours) = with_random_id(query)?;
        socket.send(&ours).await?;
        // One more than is read, so that what was cut off shows.
        let mut buffer = vec![0; MAX_DATAGRAM + 1];
        loop {
            let length = socket.recv(&mut buffer).await?;
            if answers(&buffer[..length], &ours) {
                buffer.truncate(length);
                buffer[..2].copy_from_slice(&id);
                if length > MAX_DATAGRAM {
                    cut(&mut buffer);
                }
                return Ok(buffer);
            }
        }
    }

    async fn ask_tcp(&self, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
        let options = DialOptions { mark: Some(PROXY_MARK), nodelay: true, ..DialOptions::default() };
        let mut stream = connect(&self.netns, server, &options, self.patience.server)
            .await
            .map_err(|e| io::Error::other(e.to_string()))?;
        let (id, ours) = with_random_id(query)?;
        let length = u16::try_from(ours.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(&ours);
        stream.write_all(&framed).await?;
        let length = usize::from(stream.read_u16().await?);
        let mut buffer = vec![0; length];
        stream.read_exact(&mut buffer).await?;
        if !answers(&buffer, &ours) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{server} answered another question"),
            ));
        }
        buffer[..2].copy_from_slice(&id);
        Ok(buffer)
    }
}

/// The client's id, and the query under an id of our own that an attacker cannot know.
fn with_random_id(query: &[u8]) -> io::Result<([u8; 2], Vec<u8>)> {
    let Some(&[a, b]) = query.get(..2) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let mut ours = query.to_vec();
    ours[..2].copy_from_slice(&fastrand::u16(..).to_be_bytes());
    Ok(([a, b], ours))
}

/// The id matches, it is a response, and the question is the same bytes (RFC 5452 section 9.1).
fn answers(response: &[u8], query: &[u8]) -> bool {
    let Some(question) = query.get(HEADER..).and_then(question_length).map(|n| &query[HEADER..HEADER + n])
    else {
        return false;
    };
    response.len() >= HEADER
        && response[..2] == query[..2]
        && response[2] & 0x80 != 0
        && response
            .get(HEADER..HEADER + question.len())
            .is_some_and(|theirs| theirs.eq_ignore_ascii_case(question))
}

/// The server says that it cannot or will not, which another one may.
fn unwilling_code(response: &[u8]) -> bool {
    // SERVFAIL, NOTIMP, REFUSED
    response.get(3).is_some_and(|flags| matches!(flags & 0xf, 2 | 4 | 5))
}

/// Leaves header and question, and the bit that says there was more (RFC 2181 section 9): the client asks by TCP.
fn cut(response: &mut Vec<u8>) {
    let question = response.get(HEADER..).and_then(question_length).unwrap_or(0);
    response.truncate(HEADER + question);
    response[2] |= 0x02;
    response[6..HEADER].fill(0);
}

/// Bytes of the first question: its name, type and class.
fn question_length(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        match *bytes.get(at)? {
            0 => return (at + 5 <= bytes.len()).then_some(at + 5),
            length if length < 64 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
}

#[cfg(test)]
#[path = "upstream_tests.rs"]
mod tests;
