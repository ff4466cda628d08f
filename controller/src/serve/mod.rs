//! What proxies and people connect to: xDS and certificates on one port, metrics and debug pages on another.
pub mod admin;
pub mod authenticate;
pub mod identities;
mod instances;
pub mod listener;
pub mod proxies;
pub mod views;
