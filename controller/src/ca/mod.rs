//! The embedded certificate authority: a root that outlives restarts, and the service that signs with it.
//!
//! ```text
//! store (key and root on disk) -> authority (signs) <- request (what a CSR may say)
//!                                     ^        \-> serving (the controller's own TLS)
//!                                  service (who may ask for whom)
//! ```

pub mod authority;
pub mod request;
pub mod service;
pub mod serving;
mod store;

#[cfg(test)]
mod tests;

pub use authority::{Authority, AuthorityError, IssueError, Issued, Material};
pub use service::{CaConfig, CaMetrics, NodeAuthenticator, NodeIdentities, service};
pub use serving::{Serving, server_config};
