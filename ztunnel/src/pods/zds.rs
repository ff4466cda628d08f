//! The proxy's side of the node-agent protocol (C60-C70): one request at a time, each acknowledged.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use culvert_net::netns::NetNs;
use culvert_net::seqpacket::SeqPacket;
use culvert_proto::workload::zds::workload_request::Payload;
use culvert_proto::workload::zds::{
    Ack, AddWorkload, Version, WorkloadRequest, WorkloadResponse, ZdsHello, workload_response,
};
use culvert_runtime::backoff::{Backoff, Bounds};
use prost::Message;

use super::{PodInfo, Pods};

/// C70: between attempts to reach the agent.
const BACKOFF_MIN: Duration = Duration::from_millis(10);
const BACKOFF_MAX: Duration = Duration::from_secs(15);

/// Why a session with the agent ended.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    /// The agent cannot be reached or hung up: try again.
    #[error("node agent: {0}")]
    Io(#[from] std::io::Error),
    /// The agent sent something that the protocol does not allow: the process must not go on with half a picture.
    #[error("node agent broke the protocol: {0}")]
    Protocol(String),
}

/// Follows the agent until it breaks the protocol; pods go on being served while it is away.
///
/// # Errors
/// [`ZdsError::Protocol`]; the process should end (C70).
pub async fn run(socket: &Path, pods: Arc<Pods>) -> Result<(), ZdsError> {
    let mut backoff = Backoff::new(Bounds::doubling(BACKOFF_MIN, BACKOFF_MAX), fastrand::Rng::new());
    loop {
        match session(socket, &pods, &mut backoff).await {
            Err(ZdsError::Io(error)) => {
                let wait = backoff.next_delay();
                tracing::info!(%error, ?wait, "the node agent is away; pods go on being served");
                tokio::time::sleep(wait).await;
            }
            Err(error) => return Err(error),
            Ok(never) => match never {},
        }
    }
}

async fn session(
    socket: &Path,
    pods: &Arc<Pods>,
    backoff: &mut Backoff,
) -> Result<std::convert::Infallible, ZdsError> {
    let agent = SeqPacket::connect(socket).await?;
    let hello = ZdsHello { version: Version::V1.into() };
    agent.send(&hello.encode_to_vec(), None).await?;
    pods.session_started();
    loop {
        let Some((bytes, fds)) = agent.recv().await? else {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the agent hung up").into());
        };
        backoff.reset();
        let request = WorkloadRequest::decode(bytes.as_slice())
            .map_err(|e| ZdsError::Protocol(format!("a request cannot be decoded: {e}")))?;
        let outcome = handle(request, fds, pods).await?;
        let ack = Ack { error: outcome.err().unwrap_or_default() };
        let response = WorkloadResponse { payload: Some(workload_response::Payload::Ack(ack)) };
        agent.send(&response.encode_to_vec(), None).await?;
    }
}

async fn handle(
    request: WorkloadRequest,
    mut fds: Vec<OwnedFd>,
    pods: &Arc<Pods>,
) -> Result<Result<(), String>, ZdsError> {
    match request.payload {
        Some(Payload::Add(add)) => {
            let fd = match (fds.pop(), fds.is_empty()) {
                (Some(fd), true) => fd,
                _ => {
                    return Err(ZdsError::Protocol(format!(
                        "pod {:?} came without exactly one namespace",
                        add.uid
                    )));
                }
            };
            Ok(add_pod(add, fd, pods).await)
        }
        Some(Payload::Keep(keep)) => {
            pods.keep(&keep.uid).map_err(|()| {
                ZdsError::Protocol(format!("pod {:?} was to be kept after the snapshot was sent", keep.uid))
            })?;
            Ok(Ok(()))
        }
        Some(Payload::Del(del)) => {
            pods.remove(&del.uid).await;
            Ok(Ok(()))
        }
        Some(Payload::SnapshotSent(_)) => {
            pods.snapshot_complete().await;
            Ok(Ok(()))
        }
        None => {
            Err(ZdsError::Protocol("a request is empty or of a kind that this version does not know".into()))
        }
    }
}

async fn add_pod(add: AddWorkload, fd: OwnedFd, pods: &Arc<Pods>) -> Result<(), String> {
    let Some(info) = add.workload_info else {
        return Err(format!(
            "pod {:?} came without workload_info (name, namespace, service account)",
            add.uid
        ));
    };
    let netns =
        NetNs::from_fd(fd).map_err(|e| format!("the namespace of pod {:?} cannot be used: {e}", add.uid))?;
    let info = PodInfo {
        name: info.name.into(),
        namespace: info.namespace.into(),
        service_account: info.service_account.into(),
        native_tunnel: info.native_tunnel,
    };
    pods.add(&add.uid, info, Arc::new(netns)).await
}
