//! Reads a pod's queries, over UDP and TCP, IPv4 and IPv6.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_net::socket::exhausted;
use culvert_runtime::tasks::Tasks;
use smallvec::SmallVec;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::answer::{Action, Asker, Transport, decide, server_failure};
use super::upstream::{Upstream, leads_back};
use crate::observe::Metrics;
use crate::observe::limits::Limit;
use crate::state::State;

/// Queries of one pod under way at once: at 4.5 s a query that is 56 a second even when upstream is dead. What
/// comes beyond is dropped, and the resolver asks again.
pub const MAX_IN_FLIGHT: usize = 256;
/// A TCP client that asks nothing for so long is closed.
const TCP_IDLE: Duration = Duration::from_secs(10);
/// After a socket failed.
const PAUSE: Duration = Duration::from_millis(100);
/// The largest query read from a datagram.
const MAX_QUERY: usize = 4096;

/// The sockets of one pod, opened inside its namespace.
#[derive(Debug)]
pub struct DnsSockets {
    /// Loopback, one for each family.
    pub udp: Vec<std::net::UdpSocket>,
    /// Loopback, one for each family.
    pub tcp: Vec<std::net::TcpListener>,
}

/// One pod's DNS.
#[derive(Debug)]
pub struct DnsServer {
    /// The pod's workload uid.
    pub client: culvert_model::Str,
    /// What the proxy knows.
    pub state: Arc<State>,
    /// Where other names are asked.
    upstream: Upstream,
    /// `cluster.local`.
    pub cluster_domain: culvert_model::Str,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Owner of the tasks.
    pub tasks: Tasks,
    in_flight: Arc<Semaphore>,
}

impl DnsServer {
    /// A server that answers for the pod with workload uid `client` and asks `upstream` about everything else; `in_flight` are its places.
    pub fn new(
        client: culvert_model::Str,
        state: Arc<State>,
        upstream: Upstream,
        cluster_domain: culvert_model::Str,
        metrics: Arc<Metrics>,
        tasks: Tasks,
        in_flight: Arc<Semaphore>,
    ) -> Arc<Self> {
        Arc::new(Self { client, state, upstream, cluster_domain, metrics, tasks, in_flight })
    }

    /// Serves until its tasks are aborted.
    ///
    /// # Errors
    /// A socket that tokio cannot take over.
    pub fn serve(self: &Arc<Self>, sockets: DnsSockets) -> io::Result<()> {
        for udp in sockets.udp {
            let socket = Arc::new(UdpSocket::from_std(udp)?);
            self.tasks.spawn("dns udp", self.clone().serve_udp(socket));
        }
        for tcp in sockets.tcp {
            let listener = TcpListener::from_std(tcp)?;
            self.tasks.spawn("dns tcp", self.clone().serve_tcp(listener));
        }
        Ok(())
    }

    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0; MAX_QUERY];
        loop {
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                // An earlier answer met a closed port: the error belongs to that client, not to the socket.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => {
                    self.pause(&error, "DNS over UDP cannot be read").await;
                    continue;
                }
            };
            let Some(permit) = self.permit() else { continue };
            let (server, socket, query) = (self.clone(), socket.clone(), buffer[..length].to_vec());
            self.tasks.spawn("dns query", async move {
                if let Some(response) = server.answer(&query, Transport::Udp).await {
                    let _ = socket.send_to(&response, client).await;
                }
                drop(permit);
            });
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    self.pause(&error, "DNS over TCP cannot be accepted").await;
                    continue;
                }
            };
            let Some(permit) = self.permit() else { continue };
            let server = self.clone();
            self.tasks.spawn("dns stream", async move {
                let _ = server.serve_stream(stream).await;
                drop(permit);
            });
        }
    }

    /// A place for one more query, or stream of queries.
    fn permit(&self) -> Option<OwnedSemaphorePermit> {
        let permit = self.in_flight.clone().try_acquire_owned().ok();
        if permit.is_none() {
            let limits = &self.metrics.limits;
            limits.reached(Limit::DnsQueries);
            if let Some(others) = limits.line_due(Limit::DnsQueries) {
                tracing::warn!(pod = %self.client, others, "too many DNS queries under way: one was dropped");
            }
        }
        permit
    }

    /// After a socket failed, most likely for want of descriptors: trying again at once would spin.
    async fn pause(&self, error: &io::Error, what: &'static str) {
        let limits = &self.metrics.limits;
        if exhausted(error) {
            limits.reached(Limit::Descriptors);
        }
        if limits.line_due(Limit::Descriptors).is_some() {
            tracing::warn!(pod = %self.client, %error, "{what}");
        }
        tokio::time::sleep(PAUSE).await;
    }

    async fn serve_stream(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let length = usize::from(timeout(TCP_IDLE, stream.read_u16()).await??);
            let mut query = vec![0; length];
            timeout(TCP_IDLE, stream.read_exact(&mut query)).await??;
            let Some(response) = self.answer(&query, Transport::Tcp).await else {
                return Ok(());
            };
            let mut framed = u16::try_from(response.len()).map_err(io::Error::other)?.to_be_bytes().to_vec();
            framed.extend_from_slice(&response);
            timeout(TCP_IDLE, stream.write_all(&framed)).await??;
        }
    }

    async fn answer(&self, query: &[u8], transport: Transport) -> Option<Vec<u8>> {
        self.metrics.dns_requests.inc();
        let (action, circular) = {
            let snapshot = self.state.load();
            let client = snapshot.workload_by_uid(&self.client);
            let asker = Asker {
                snapshot: &snapshot,
                client: client.map(AsRef::as_ref),
                cluster_domain: &self.cluster_domain,
            };
            let action = decide(query, transport, &asker, &mut |bound| fastrand::u64(..bound.max(1)));
            let circular: SmallVec<[SocketAddr; 2]> = match (&action, client) {
                (Action::Forward, Some(client)) => {
                    let servers = self.upstream.servers().iter().copied();
                    servers.filter(|server| leads_back(&snapshot, client, *server)).collect()
                }
                _ => SmallVec::new(),
            };
            (action, circular)
        };
        match action {
            Action::Respond(bytes) => Some(bytes),
            Action::Ignore => None,
            Action::Forward => self.forward(query, transport, &circular).await,
        }
    }

    async fn forward(&self, query: &[u8], transport: Transport, circular: &[SocketAddr]) -> Option<Vec<u8>> {
        self.metrics.dns_upstream_requests.inc();
        let begun = Instant::now();
        let asked = self.upstream.ask(query, transport, |server| circular.contains(&server)).await;
        self.metrics.dns_upstream_duration.observe(begun.elapsed().as_secs_f64());
        match asked {
            Ok(answer) => Some(answer),
            Err(error) => {
                self.metrics.dns_upstream_failures.inc();
                tracing::debug!(pod = %self.client, %error, "upstream DNS did not answer");
                server_failure(query)
            }
        }
    }
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
