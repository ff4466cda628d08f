//! The model's decisions, each against the rows of behaviour that it promises.

mod authorize;
mod balance;
mod dns;
mod resolve;
mod snapshot;
mod wire;
mod world;
