//! culvert's waypoint: requests and streams to the services and workloads that are bound to one Gateway, routed and judged.
//!
//! A connection's path by file names: `accept` (TLS, HTTP/2, CONNECT) -> `target` -> `detect`, then `http/` for requests (`head` ->
//! `authorize` -> `route` -> `filters` -> `forward` -> `upstream` -> `deliver`) or `tcp`, both by `endpoint` and `connect`.

pub mod accept;
mod admin;
pub mod app;
pub mod config;
pub mod connect;
pub mod control;
mod detect;
pub mod endpoint;
pub mod http;
mod io;
pub mod observe;
pub mod shared;
pub mod state;
pub mod target;
mod tcp;
pub mod tls;

#[cfg(test)]
mod tests;
