//! Nodes and pods as network namespaces on one machine, and what a cluster would do for them.
//!
//! [`lab`] makes the namespaces, [`process`] runs commands in them, and [`supervisor`] plays API server, kubelet, kube-proxy
//! ([`serviceproxy`]) and cluster DNS ([`dns`]) for a directory of ordinary manifests. `culvert up`, the demo and the tests
//! use it. Root is needed. Nothing here touches the machine's own interfaces, routes, rules or settings.

pub mod caughtup;
pub mod cleanup;
pub mod cluster;
pub mod container;
pub mod control;
pub mod daemon;
pub mod dns;
pub mod enter;
mod expand;
pub mod lab;
mod manifests;
pub mod plan;
pub mod probe;
pub mod process;
pub mod report;
pub mod serviceproxy;
pub mod state;
pub mod supervisor;
pub mod system;
mod trim;
