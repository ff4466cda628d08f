//! The agent's side of the node-agent protocol (C60-C66).

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::seqpacket::{SeqPacket, SeqPacketListener};
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    AddWorkload, DelWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest, WorkloadResponse, ZdsHello,
    workload_response,
};
use culvert_runtime::tasks::Tasks;
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::metrics::AgentMetrics;

/// C64: each read and write.
const DEADLINE: Duration = Duration::from_secs(5);
/// C64: at most five connections a second.
const ACCEPT_EVERY: Duration = Duration::from_millis(200);
/// Proxies at once: the one that serves, its successor, and one that died without closing.
const MAX_CONNECTIONS: usize = 8;
/// Requests that wait for one connection: the agent sends one at a time, and deletions go to all.
const QUEUE: usize = 16;

/// Pods handed to proxies.
#[derive(Debug)]
pub struct ZdsServer {
    inner: Mutex<Inner>,
    sessions: watch::Sender<Sessions>,
    tasks: Tasks,
    metrics: AgentMetrics,
}

/// Proxies that were told of every pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    /// Those connected now.
    pub connected: usize,
    /// All so far. When it changes, what an earlier proxy acknowledged says nothing any more.
    pub begun: u64,
}

#[derive(Debug, Default)]
struct Inner {
    pods: BTreeMap<String, Pod>,
    connections: Vec<Connection>,
    next: u64,
}

#[derive(Clone, Debug)]
struct Pod {
    info: WorkloadInfo,
    netns: Arc<NetNs>,
}

#[derive(Clone, Debug)]
struct Connection {
    id: u64,
    requests: mpsc::Sender<Request>,
}

#[derive(Debug)]
struct Request {
    payload: Payload,
    netns: Option<Arc<NetNs>>,
    reply: oneshot::Sender<Result<(), AddError>>,
}

/// Why a proxy does not have a pod.
#[derive(Debug, thiserror::Error)]
pub enum AddError {
    /// None is connected (C66).
    #[error("no proxy is connected to the node agent")]
    NoProxy,
    /// It said no.
    #[error("the proxy refused the pod: {0}")]
    Refused(String),
    /// It went away, or did not answer within 5 s.
    #[error("the proxy did not acknowledge the pod: {0}")]
    Lost(String),
}

impl ZdsServer {
    /// No pods, no proxies.
    pub fn new(tasks: Tasks, metrics: AgentMetrics) -> Arc<Self> {
        let sessions = watch::Sender::new(Sessions::default());
        Arc::new(Self { inner: Mutex::default(), sessions, tasks, metrics })
    }

    /// The proxies that have a complete snapshot.
    pub fn sessions(&self) -> watch::Receiver<Sessions> {
        self.sessions.subscribe()
    }

    /// Takes connections for ever.
    pub async fn serve(self: Arc<Self>, listener: SeqPacketListener) {
        loop {
            match listener.accept().await {
                Ok(proxy) if self.inner.lock().connections.len() < MAX_CONNECTIONS => {
                    let server = self.clone();
                    self.tasks.spawn("zds connection", async move { server.connection(proxy).await });
                }
                Ok(_) => {
                    tracing::warn!(limit = MAX_CONNECTIONS, "a proxy's connection was refused: too many")
                }
                Err(error) => tracing::warn!(%error, "a proxy cannot be accepted"),
            }
            // Not a ticking interval: a tick that nobody waited for would give the right to a burst.
            sleep(ACCEPT_EVERY).await;
        }
    }

    /// Hands a pod to the newest proxy, and remembers it for those that come later (C63, C65).
    ///
    /// # Errors
    /// The proxy does not have it; it is remembered all the same.
    pub async fn add(&self, uid: &str, info: WorkloadInfo, netns: Arc<NetNs>) -> Result<(), AddError> {
        let newest = {
            let mut inner = self.inner.lock();
            inner.pods.insert(uid.to_owned(), Pod { info: info.clone(), netns: netns.clone() });
            inner.connections.last().cloned()
        };
        let newest = newest.ok_or(AddError::NoProxy)?;
        let add = AddWorkload { uid: uid.to_owned(), workload_info: Some(info) };
        newest.request(Payload::Add(add), Some(netns)).await
    }

    /// Tells every proxy that a pod is gone: an old one that drains has it too (C65).
    pub async fn del(&self, uid: &str) {
        let connections = {
            let mut inner = self.inner.lock();
            inner.pods.remove(uid);
            inner.connections.clone()
        };
        for connection in connections {
            let del = DelWorkload { uid: uid.to_owned() };
            if let Err(error) = connection.request(Payload::Del(del), None).await {
                tracing::debug!(uid, %error, "a proxy did not acknowledge that a pod is gone");
            }
        }
    }

    /// Pods it would tell a new proxy of.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.inner.lock().pods.len()
    }

    async fn connection(self: Arc<Self>, proxy: SeqPacket) {
        let id = {
            let mut inner = self.inner.lock();
            inner.next += 1;
            inner.next
        };
        let mut complete = false;
        let ended = self.converse(id, &proxy, &mut complete).await;
        self.inner.lock().connections.retain(|c| c.id != id);
        if complete {
            self.sessions.send_modify(|it| it.connected -= 1);
            self.metrics.connected.dec();
        }
        match ended {
            Ok(()) => tracing::info!("a proxy has disconnected"),
            Err(error) => tracing::warn!(%error, "a proxy's connection ended"),
        }
    }

    async fn converse(&self, id: u64, proxy: &SeqPacket, complete: &mut bool) -> Result<(), AddError> {
        let hello = receive(proxy).await?;
        ZdsHello::decode(hello.as_slice()).map_err(|e| lost(format!("hello cannot be decoded: {e}")))?;
        // Listed before the snapshot is taken: a pod that is added meanwhile waits in the queue, and being told of a pod
        // twice changes nothing (C68).
        let (requests, mut queue) = mpsc::channel(QUEUE);
        let pods = {
            let mut inner = self.inner.lock();
            inner.connections.push(Connection { id, requests });
            inner.pods.clone()
        };
        for (uid, pod) in pods {
            let add = AddWorkload { uid: uid.clone(), workload_info: Some(pod.info) };
            match self.exchange(proxy, Payload::Add(add), Some(&pod.netns)).await {
                Err(AddError::Refused(error)) => {
                    tracing::warn!(uid, error, "the proxy refused a pod of the snapshot")
                }
                other => other?,
            }
        }
        self.exchange(proxy, Payload::SnapshotSent(SnapshotSent {}), None).await?;
        *complete = true;
        self.sessions.send_modify(|it| {
            it.connected += 1;
            it.begun += 1;
        });
        self.metrics.connected.inc();
        tracing::info!("a proxy has connected and has every pod");
        loop {
            tokio::select! {
                request = queue.recv() => {
                    let Some(request) = request else { return Ok(()) };
                    let answer = self.exchange(proxy, request.payload, request.netns.as_deref()).await;
                    let fatal = matches!(answer, Err(AddError::Lost(_)));
                    let _ = request.reply.send(answer);
                    if fatal {
                        return Err(lost("it stopped answering"));
                    }
                }
                // Nothing is asked, so nothing may come but the end.
                unasked = proxy.recv() => match unasked {
                    Ok(None) => return Ok(()),
                    Ok(Some(_)) => return Err(lost("it spoke without being asked")),
                    Err(error) => return Err(lost(error)),
                },
            }
        }
    }
}

impl ZdsServer {
    async fn exchange(
        &self,
        proxy: &SeqPacket,
        payload: Payload,
        netns: Option<&NetNs>,
    ) -> Result<(), AddError> {
        let asked = Instant::now();
        let answer = exchange(proxy, payload, netns).await;
        if !matches!(answer, Err(AddError::Lost(_))) {
            self.metrics.zds_round_trip.observe(asked.elapsed().as_secs_f64());
        }
        answer
    }
}

impl Connection {
    async fn request(&self, payload: Payload, netns: Option<Arc<NetNs>>) -> Result<(), AddError> {
        let (reply, answer) = oneshot::channel();
        let gone = || lost("it disconnected");
        self.requests.send(Request { payload, netns, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

async fn exchange(proxy: &SeqPacket, payload: Payload, netns: Option<&NetNs>) -> Result<(), AddError> {
    let request = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
    let fd = netns.map(AsFd::as_fd);
    timeout(DEADLINE, proxy.send(&request, fd)).await.map_err(|_| lost("5 s to write"))?.map_err(lost)?;
    let bytes = receive(proxy).await?;
    let response = WorkloadResponse::decode(bytes.as_slice()).map_err(lost)?;
    match response.payload {
        Some(workload_response::Payload::Ack(ack)) if ack.error.is_empty() => Ok(()),
        Some(workload_response::Payload::Ack(ack)) => Err(AddError::Refused(ack.error)),
        None => Err(lost("it answered with something other than an acknowledgement")),
    }
}

async fn receive(proxy: &SeqPacket) -> Result<Vec<u8>, AddError> {
    let received = timeout(DEADLINE, proxy.recv()).await.map_err(|_| lost("no answer within 5 s"))?;
    match received.map_err(lost)? {
        Some((bytes, _)) => Ok(bytes),
        None => Err(lost("it hung up")),
    }
}

fn lost(error: impl ToString) -> AddError {
    AddError::Lost(error.to_string())
}
