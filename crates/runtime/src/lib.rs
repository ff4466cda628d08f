//! The chassis of every culvert process: who owns a task, how a process drains, when it is ready, where its settings,
//! logs and metrics come from.
//!
//! Nothing here knows about meshes. A program is put together from these in the order its `main` reads: configuration,
//! telemetry, workers, application, then [`signal::shutdown`] and a drain with a deadline.

pub mod admin;
pub mod backoff;
pub mod clock;
pub mod config;
pub mod drain;
pub mod metrics;
pub mod readiness;
pub mod signal;
pub mod tasks;
pub mod telemetry;
pub mod units;
pub mod workers;
