//! Messages of the workload API to the model's types and back.
