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
mod socks;

pub use accept::serve;
pub use connect::{MAX_TUNNELS, TunnelKey, TunnelPool, pool};
pub use forward::end;
pub use handover::unrestricted;
pub use socks::serve as serve_socks;
