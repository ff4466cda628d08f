//! The controller: what exists goes in (from a directory or from Kubernetes), what each proxy needs comes out.
//!
//! ```text
//! sources/  ->  index/  ->  translate/  ->  serve/
//! what is       one writer   pure            xDS, certificates (ca/), debug pages
//! ```
pub mod admission;
pub mod app;
pub mod args;
pub mod auth;
pub mod ca;
pub mod gateways;
pub mod index;
pub mod kubernetes;
pub mod metrics;
pub mod provision;
pub mod serve;
pub mod sources;
pub mod status;
pub mod translate;
