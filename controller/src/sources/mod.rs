//! Where the world comes from.
pub mod directory;
mod json_dir;
pub mod watch;
