//! What proxies and people connect to: xDS and certificates on one port, metrics and debug pages on another.
pub mod admin;
pub mod authenticate;
pub mod identities;
pub mod listener;
pub mod proxies;
