//! A real Kubernetes on one machine: kube-apiserver, etcd, controller-manager, scheduler, kubelet, containerd and runc, two nodes,
//! without a container engine, a registry or a network.
//!
//! ```text
//!  namespace controller                 namespace fabric        node.node-a: namespaces of network, mounts and processes
//!  etcd, kube-apiserver, ... ──────────── bridge ────────────── containerd, kubelet, kube-proxy, pods
//!  cluster DNS, kube-proxy                   │
//!                                            └───────────────── node.node-b: the same
//! ```
//!
//! [`up`](Cluster::up) starts it in about 12 seconds once its programs are built (`make cluster-programs`), [`open`](Cluster::open)
//! finds one that runs, [`down`](Cluster::down) ends it. Everything is below one state directory, with the process ids of all that
//! was started. Nothing has a route to the machine's own interfaces; the machine's rules are not touched.

pub mod api;
mod certificates;
mod control_plane;
pub mod files;
pub mod images;
mod node;
mod process;
mod shell;

mod cluster;

pub use api::Api;
pub use cluster::{Cluster, Programs};
pub use node::Node;
pub use process::Process;
pub use shell::run;
