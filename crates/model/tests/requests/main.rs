//! Authorization of requests (W53-W58, W63, W64): each rule by itself, then all of them against the specification.

#![allow(clippy::unwrap_used, reason = "what a test writes is known to parse")]

mod agreement;
mod conditions;
mod generate;
mod order;
mod specification;
mod uncertain;
mod wire;
mod world;
