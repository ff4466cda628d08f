//! Requests to a running supervisor: one line of JSON each way over a Unix socket that only root may use.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use culvert_runtime::tasks::Tasks;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader as AsyncBufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::daemon::Role;
use crate::supervisor::Event;

/// Longest request line.
const MAX_REQUEST: u64 = 4096;
/// A client that says nothing is dropped after this long.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest work on a request: a restarted program is ready long before.
const WORK: Duration = Duration::from_secs(60);

/// What can be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Request {
    /// Restart programs of the mesh; answered when the new ones are ready.
    Restart {
        /// Which kind.
        role: Role,
        /// On one node only.
        node: Option<String>,
    },
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Reply {
    /// Done.
    Done,
    /// Not done, and why.
    Failed(String),
}

/// Sends a request to the supervisor behind `socket` and waits for its reply.
pub fn ask(socket: &Path, request: &Request) -> io::Result<Reply> {
    let mut stream = StdUnixStream::connect(socket)?;
    stream.set_read_timeout(Some(WORK + PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply)?;
    Ok(serde_json::from_str(&reply)?)
}

/// Takes requests on `socket`, one at a time, until the supervisor is gone.
pub async fn serve(listener: UnixListener, events: mpsc::Sender<Event>, tasks: Tasks) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let events = events.clone();
                // Only root connects, by hand or from a test: a handful at a time.
                tasks.spawn("control client", async move {
                    if let Err(error) = converse(stream, &events).await {
                        tracing::debug!(%error, "a request was not answered");
                    }
                });
            }
            Err(_) => tokio::time::sleep(PATIENCE).await,
        }
    }
}

/// Opens the socket, for root alone.
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn converse(stream: UnixStream, events: &mpsc::Sender<Event>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut reader = AsyncBufReader::new(read.take(MAX_REQUEST));
    tokio::time::timeout(PATIENCE, reader.read_line(&mut line)).await??;
    let reply = match serde_json::from_str(&line) {
        Ok(request) => {
            let (reply, answer) = oneshot::channel();
            let _ = events.send(Event::Request(request, reply)).await;
            match tokio::time::timeout(WORK, answer).await {
                Ok(Ok(reply)) => reply,
                _ => Reply::Failed("the supervisor did not finish it in time".to_owned()),
            }
        }
        Err(error) => Reply::Failed(format!("not understood: {error}")),
    };
    let mut bytes = serde_json::to_vec(&reply)?;
    bytes.push(b'\n');
    write.write_all(&bytes).await
}
