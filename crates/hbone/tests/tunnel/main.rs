//! The tunnel over in-memory IO and over loopback TCP.

mod bounds;
mod common;
mod connection;
mod copying;
mod pooling;
mod relaying;
mod resets;
mod windows;
