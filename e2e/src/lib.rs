//! What the end-to-end tests share: the programs under test, a real API server, a world of nodes and pods on this machine, and a program that
//! plays both sides of every kind of TCP conversation.

pub mod ambient;
pub mod apiserver;
pub mod checks;
pub mod peer;
pub mod programs;
pub mod world;
