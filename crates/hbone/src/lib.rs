//! The HBONE tunnel: TCP byte streams carried as HTTP/2 CONNECT over any IO.
//!
//! TLS is composed by the programs, so everything here runs over any `AsyncRead + AsyncWrite` and is tested in memory.
//! A connection, its streams and its pool are meant to live on one current-thread runtime, where driving the connection
//! and its streams costs no cross-thread wake-up; all types are `Send` nevertheless.
//!
//! | module | what |
//! |---|---|
//! | [`budget`] | what all stalled streams of the process may hold |
//! | [`config`] | windows, limits and times, with their arithmetic |
//! | [`server`] | accept CONNECT requests, answer 200 or refuse |
//! | [`client`] | one connection to a peer, and CONNECT on it |
//! | [`pool`] | connections shared by key: single-flight dials, stripes, idle release, retry |
//! | [`stream`] | the bytes of one tunnel, with half-close, reset and backpressure |
//! | [`io`] | the same as `AsyncRead + AsyncWrite`, for a tunnel inside a tunnel |
//! | [`copy`] | TCP to tunnel and TCP to TCP with the semantics of TCP kept |
//! | [`headers`] | `baggage`, `forwarded`, `traceparent`, `x-forwarded-network` |

pub mod budget;
pub mod client;
pub mod config;
pub mod copy;
pub mod error;
pub mod headers;
pub mod io;
mod keepalive;
mod link;
pub mod pool;
pub mod server;
pub mod stream;

pub use budget::Budget;
pub use client::{Client, ClientHandle, TunnelRequest};
pub use config::{ClientConfig, Keepalive, ServerConfig, Windows};
pub use error::{ConnectError, HandshakeError, LostCause, StreamError};
pub use h2::Reason;
pub use pool::{ConnectionFacts, Pool, PoolConfig};
pub use server::{Incoming, Server, ServerConnection};
pub use stream::{TunnelRecv, TunnelSend, TunnelStream};
