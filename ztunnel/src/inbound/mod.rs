//! What the pod receives: `accept -> authorize -> deliver`, over HBONE or in plaintext.

mod accept;
mod authorize;
mod deliver;
mod plaintext;
mod proxy_protocol;
mod rejudge;
mod target;

pub use accept::{Peer, serve as serve_hbone};
pub use deliver::{begin, open};
pub use plaintext::serve as serve_plaintext;
#[cfg(test)]
pub use proxy_protocol::header as proxy_header;
pub use rejudge::{judge_again, rejudge};
