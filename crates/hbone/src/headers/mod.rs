//! Headers that HBONE peers exchange. Parsers take what any peer may send: they are bounded and never panic, and what they
//! yield serves logs and metrics only, never a decision.

pub mod baggage;
pub mod forwarded;
pub mod traceparent;

use http::HeaderName;

pub use baggage::Baggage;
pub use forwarded::Forwarded;
pub use traceparent::Traceparent;

/// `baggage`: who the sender is (Z17), in the 200 response who the destination is (Z18).
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// `forwarded`: the original client (Z17).
pub const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
/// `traceparent`: W3C trace context (Z17).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// `x-forwarded-network`: the sender's network, on the inner CONNECT of a tunnel in a tunnel only (Z19).
pub const X_FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// The network named by an `x-forwarded-network` value: visible ASCII, 1 to 253 bytes (the length of a DNS name).
#[must_use]
pub fn parse_network(value: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(value).ok()?.trim();
    let fits = !text.is_empty() && text.len() <= 253 && text.bytes().all(|b| b.is_ascii_graphic());
    fits.then_some(text)
}
