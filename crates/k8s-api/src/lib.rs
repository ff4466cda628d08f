//! The Kubernetes objects the mesh reads, and how a directory of manifests becomes them.
//!
//! Core kinds ([`core`]) accept and ignore fields they do not know: real manifests carry many. Mesh kinds
//! ([`security`], [`networking`]) refuse an unknown field in their `spec`: one that is skipped there may fail open. In [`routes`] it
//! breaks the rule that it stands in.
//! No client and no clock; [`manifest`] is the only module that touches a file system.
pub mod core;
pub mod discovery;
pub mod enrolment;
pub mod gateway;
pub mod labels;
pub mod manifest;
pub mod meta;
pub mod network_policy;
pub mod networking;
pub mod object;
pub mod routes;
pub mod security;
pub mod status;
mod unenforced;
pub mod values;

pub use meta::ObjectMeta;
pub use object::{Kind, Object, ObjectKey};
