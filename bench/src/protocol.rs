//! What a measuring client says first: one byte.

/// The server reads to the end and answers with the count, 8 bytes big-endian.
pub const SINK: u8 = b's';
/// The server sends until the client closes or leaves.
pub const SOURCE: u8 = b'd';
/// The server answers each [`REQUEST`] bytes with [`RESPONSE`] bytes.
pub const ECHO: u8 = b'e';
/// The server answers one request and closes first: whoever closes first keeps the port pair for a minute, and a client that
/// did would soon have no port left for this server.
pub const ONE: u8 = b'o';
/// Bytes of a request: a small HTTP GET.
pub const REQUEST: usize = 128;
/// Bytes of a response: a small JSON body.
pub const RESPONSE: usize = 1024;
/// Bytes written at once in bulk.
pub const CHUNK: usize = 256 * 1024;
