//! Our programs against a peer that nobody here wrote: a Go program on Istio's own packages (`e2e/interop`) as control
//! plane, certificate authority, node agent and workload for our proxy, and as client of our agent and controller.
//!
//! Real network namespaces: these tests need root, `go`, and our programs (see `culvert_e2e::programs`).
#![allow(clippy::unwrap_used, reason = "helpers of tests, outside the functions marked as such")]

#[path = "../interop_go/mod.rs"]
mod interop_go;

mod agent;
mod controller;
mod inbound;
mod outbound;
mod policy;
mod reconnect;
mod world;
