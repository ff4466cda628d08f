//! Inbound: whether a connection may reach a workload.
