//! The model's decisions, each against the rows of behaviour that it promises.

#![allow(clippy::unwrap_used, reason = "what a test writes is known to parse")]

mod affinity;
mod authorize;
mod balance;
mod bound;
mod destinations;
mod dns;
mod far_waypoint;
mod outcome;
mod resolve;
mod route;
mod route_wire;
mod snapshot;
mod wire;
mod world;
