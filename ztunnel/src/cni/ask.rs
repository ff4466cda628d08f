//! Asking the agent: one HTTP/1.1 request over its Unix socket, with nothing but the standard library.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::{AddRequest, ENROL};

/// Where the agent takes requests (C16).
pub const PATH: &str = "/cmdadd";
/// Bytes of a request: names, a path and a few addresses are under 2 KiB.
pub const MAX_REQUEST: usize = 16 * 1024;
/// Bytes of an answer: a sentence.
pub const MAX_REPLY: u64 = 16 * 1024;
/// Beyond what the agent takes itself.
const SLACK: Duration = Duration::from_secs(5);

/// What came of asking.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens: the agent is away.
    #[error("the agent is away: {0}")]
    Away(io::Error),
    /// It was reached and then lost, or did not answer in time.
    #[error("the agent did not answer: {0}")]
    Lost(io::Error),
    /// It said no.
    #[error("the agent cannot enrol the pod: {0}")]
    Refused(String),
}

/// Returns when the agent says that the pod may start.
pub fn ask(socket: &Path, request: &AddRequest) -> Result<(), AskError> {
    let stream = UnixStream::connect(socket).map_err(AskError::Away)?;
    let answer = exchange(stream, request).map_err(AskError::Lost)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    match head.split(' ').nth(1) {
        Some("200") => Ok(()),
        Some(_) => Err(AskError::Refused(body.trim().to_owned())),
        None => Err(AskError::Lost(io::ErrorKind::UnexpectedEof.into())),
    }
}

fn exchange(mut stream: UnixStream, request: &AddRequest) -> io::Result<String> {
    stream.set_read_timeout(Some(ENROL + SLACK))?;
    stream.set_write_timeout(Some(SLACK))?;
    let body = serde_json::to_string(request)?;
    write!(
        stream,
        "POST {PATH} HTTP/1.1\r\nhost: agent\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.take(MAX_REPLY).read_to_string(&mut answer)?;
    Ok(answer)
}
