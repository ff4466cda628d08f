//! The node tunnel: an agent that enrols the pods of its node, and a proxy that carries their traffic.
//!
//! A connection's path is the order of the file names: `outbound/accept -> resolve -> connect -> forward` at the source,
//! `inbound/accept -> authorize -> deliver` at the destination.

pub mod admin;
pub mod agent;
pub mod app;
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
pub mod state;
pub mod tls;

#[cfg(test)]
mod authority;
#[cfg(test)]
mod pod_tests;
#[cfg(test)]
mod world;
