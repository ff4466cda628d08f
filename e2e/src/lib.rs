//! Placeholder.

pub mod programs;
