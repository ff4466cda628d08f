//! What the pod sends: `accept -> resolve -> connect -> forward`.

mod accept;
mod connect;
pub mod endpoints;
mod forward;
mod gateway;
mod handover;
mod lookup;
mod resolve;
mod retry;

pub use accept::serve;
pub use connect::{TunnelKey, TunnelPool, pool};
pub use forward::end;
pub use handover::unrestricted;
