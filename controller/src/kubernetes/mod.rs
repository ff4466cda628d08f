//! What the controller does with Kubernetes besides reading it: asks who a caller is, elects who writes, keeps the root in a
//! Secret and hands its certificate out.
//!
//! ```text
//! review (whose token)   lease (who leads)   root (Secrets -> authority)   trust (authority -> ConfigMaps, webhook)
//! ```
//!
//! Each part has its logic behind a small trait over what it needs of the API server, so that its tests need none.
pub mod lease;
pub mod review;
pub mod root;
pub mod trust;
