//! The mesh's vocabulary and every decision that is a pure function of one snapshot of it.
//!
//! Nothing here does IO, keeps time or rolls its own dice: what varies is passed in. Messages of the wire become these
//! types in [`wire`], and only there.

pub mod address;
pub mod authorize;
pub mod balance;
pub mod dns;
pub mod identity;
pub mod outcome;
pub mod policy;
pub mod request;
pub mod resolve;
pub mod route;
pub mod service;
pub mod snapshot;
mod trace;
pub mod wire;
pub mod workload;

/// A shared, immutable string: names repeat across thousands of workloads and are compared far more often than made.
pub type Str = std::sync::Arc<str>;
