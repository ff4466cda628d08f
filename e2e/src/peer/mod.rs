//! Both sides of TCP conversations, for pods: a server whose clients say by a first line what it shall do, and a client
//! that reports as JSON what it saw. Neither knows of a mesh; a conversation through it and one beside it must look equal.
//!
//! Blocking sockets and a thread each, on purpose: what is reported is what the kernel says, without a runtime between.

pub mod client;
pub mod load;
pub mod server;
pub mod wire;

/// The server does what the first line says.
pub const COMMAND_PORT: u16 = 9000;
/// The server speaks first.
pub const BANNER_PORT: u16 = 9001;
/// Every connection is reset as soon as it is accepted.
pub const RESET_PORT: u16 = 9002;
/// Every connection is closed as soon as it is accepted.
pub const CLOSE_PORT: u16 = 9003;
/// Nobody listens.
pub const NOBODY_PORT: u16 = 9004;
/// First of the ports that all do what [`COMMAND_PORT`] does.
pub const FIRST_EXTRA_PORT: u16 = 20_000;

/// What the server says first on [`BANNER_PORT`].
pub const BANNER: &str = "220 peer is ready\n";

/// A half-closed side goes on in so many pieces of [`PIECE`] bytes, [`PAUSE_MS`] apart: a FIN that cut the other direction
/// as well would lose them.
pub const PIECES: u64 = 4;
/// Size of one piece, bytes.
pub const PIECE: u64 = 64 * 1024;
/// Time between pieces.
pub const PAUSE_MS: u64 = 100;
/// What the other side sends before it half-closes, bytes.
pub const BEFORE: u64 = 256 * 1024;
/// A reset in the middle of a transfer comes after so many bytes.
pub const MIDDLE: u64 = 4 * 1024 * 1024;
