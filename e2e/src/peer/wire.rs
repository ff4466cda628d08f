//! What both sides use: data that can be told apart, ways of ending, and names for what the kernel says.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use socket2::SockRef;

/// Bytes written or read at once.
pub const BLOCK: usize = 128 * 1024;
/// A conversation that makes no progress for so long has failed; longer than any pause in one.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Data that differs from block to block, so that a lost, doubled or swapped block changes the digest.
#[derive(Debug)]
pub struct Pattern {
    block: Vec<u8>,
    index: u64,
}

/// Bytes counted and digested.
#[derive(Debug, Default)]
pub struct Seen {
    digest: Sha256,
    /// How many.
    pub bytes: u64,
}

impl Pattern {
    /// The same data for the same seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut state = seed | 1;
        let mut block = vec![0; BLOCK];
        for word in block.chunks_exact_mut(8) {
            // xorshift64: noise enough to be told apart.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        Self { block, index: 0 }
    }

    /// The next block, at most `limit` bytes of it.
    pub fn next(&mut self, limit: u64) -> &[u8] {
        self.block[..8].copy_from_slice(&self.index.to_le_bytes());
        self.index += 1;
        &self.block[..usize::try_from(limit).unwrap_or(BLOCK).min(BLOCK)]
    }

    /// Writes `bytes` of it. On failure says how far it came.
    ///
    /// # Errors
    /// What the socket said.
    pub fn send(&mut self, stream: &mut TcpStream, bytes: u64, sent: &mut Seen) -> io::Result<()> {
        let end = sent.bytes.saturating_add(bytes);
        while sent.bytes < end {
            let block = self.next(end - sent.bytes);
            stream.write_all(block)?;
            sent.take(block);
        }
        Ok(())
    }
}

impl Seen {
    /// Counts these too.
    pub fn take(&mut self, bytes: &[u8]) {
        self.digest.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    /// `{"bytes":N,"sha256":"..."}`.
    #[must_use]
    pub fn report(self) -> Value {
        let digest: String = self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        json!({"bytes": self.bytes, "sha256": digest})
    }
}

/// Reads until the other side ends or `limit` bytes came; says which way it ended.
pub fn drain(stream: &mut TcpStream, limit: u64, seen: &mut Seen) -> &'static str {
    let mut block = vec![0; BLOCK];
    let end = seen.bytes.saturating_add(limit);
    while seen.bytes < end {
        let most = usize::try_from(end - seen.bytes).unwrap_or(BLOCK).min(BLOCK);
        match stream.read(&mut block[..most]) {
            Ok(0) => return "eof",
            Ok(length) => seen.take(&block[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return name(&error),
        }
    }
    "limit"
}

/// One line, without its newline; byte for byte, so that nothing after it is taken.
///
/// # Errors
/// What the socket said; an end before the newline is [`io::ErrorKind::UnexpectedEof`].
pub fn line(stream: &mut TcpStream) -> io::Result<String> {
    const LONGEST: usize = 1024;
    let mut text = Vec::new();
    let mut byte = [0];
    while text.len() < LONGEST {
        stream.read_exact(&mut byte)?;
        if byte[0] == b'\n' {
            return String::from_utf8(text).map_err(io::Error::other);
        }
        text.push(byte[0]);
    }
    Err(io::Error::other("a line without an end"))
}

/// What the kernel said, by its usual name.
#[must_use]
pub fn name(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionReset => "ECONNRESET",
        io::ErrorKind::ConnectionRefused => "ECONNREFUSED",
        io::ErrorKind::ConnectionAborted => "ECONNABORTED",
        io::ErrorKind::BrokenPipe => "EPIPE",
        io::ErrorKind::HostUnreachable => "EHOSTUNREACH",
        io::ErrorKind::NetworkUnreachable => "ENETUNREACH",
        io::ErrorKind::UnexpectedEof => "eof",
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "timeout",
        _ => "other",
    }
}

/// Ends the connection by a reset, whatever lies in its buffers.
pub fn reset(stream: TcpStream) {
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}

/// Sends a FIN and goes on reading.
///
/// # Errors
/// If the connection is gone.
pub fn half_close(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)
}

/// Both timeouts, and no delay for small writes.
///
/// # Errors
/// If the connection is gone.
pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)
}

/// `ok`, or what the kernel said.
#[must_use]
pub fn outcome(result: &io::Result<()>) -> &'static str {
    match result {
        Ok(()) => "ok",
        Err(error) => name(error),
    }
}
