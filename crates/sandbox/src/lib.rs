//! Nodes and pods as network namespaces on one machine, and what a cluster would do for them.

pub mod cleanup;
pub mod enter;
pub mod lab;
pub mod plan;
pub mod process;
pub mod state;
