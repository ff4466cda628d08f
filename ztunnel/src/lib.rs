//! The node tunnel: an agent that enrols the pods of its node, and a proxy that carries their traffic.
//!
//! A connection's path is the order of the file names: `outbound/accept -> resolve -> connect -> forward` at the source,
//! `inbound/accept -> authorize -> deliver` at the destination.

pub mod admin;
pub mod agent;
pub mod app;
pub mod bounds;
pub mod cni;
pub mod config;
pub mod control;
pub mod dns;
pub mod explain;
pub mod headers;
pub mod inbound;
pub mod io;
pub mod observe;
pub mod outbound;
pub mod pods;
pub mod profile;
pub mod state;
pub mod tls;

/// The program's own, so that what a test sees of the heap is what the program shows.
#[cfg(test)]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[cfg(test)]
mod authority;
#[cfg(test)]
mod pod_tests;
#[cfg(test)]
mod world;
