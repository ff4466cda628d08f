//! Delta xDS, both ends: a client that keeps what it accepted across reconnects, and a server that sends each client only
//! what that client lacks.
//!
//! The protocol itself is two state machines without IO, [`state`] (client) and [`stream`] (server); [`client`] and
//! [`server`] move their messages over gRPC. TLS is the caller's: the client is given a way to make a channel, the server is
//! a tonic service.
//!
//! # Generations
//! Resources of different types change together. Our server marks each response with the generation it leads to, in
//! `system_version_info`: `culvert/12`. A push that is too large for one message is sent as several responses for the same
//! type; all but the last are marked `culvert/12+` ("more follows"), and the last alone `culvert/12`. A stream moves all its
//! types to one generation, and waits for all their answers, before it takes up the next one, so a client that commits only
//! when every type shows the same generation always gets there ([`gate`]). Numbers are compared within one connection only:
//! a restarted server may count from 1 again. Any other text is a foreign control plane's, whose every response stands alone.
//!
//! A client that sets `CULVERT_GENERATIONS: "true"` in its node's metadata is also told, by an empty response, of a
//! generation that changed nothing for a type.

pub mod client;
pub mod gate;
pub mod resources;
pub mod server;
pub mod state;
pub mod stream;

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use culvert_proto::discovery::Node;
use prost_types::value::Kind;

/// The generated client and server of `envoy.service.discovery.v3.AggregatedDiscoveryService`.
#[allow(missing_docs, clippy::all, clippy::too_many_lines, reason = "generated")]
pub mod service {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

/// Key in the node's metadata by which a client asks to be told of every generation of every type.
pub const GENERATIONS_KEY: &str = "CULVERT_GENERATIONS";

/// A resource as it came over the wire: named and versioned, its body not decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawResource {
    /// Unique among the resources of its type. Shared, so that who keeps the resource need not keep its name twice.
    pub name: Arc<str>,
    /// Equal versions mean equal bodies; says nothing about order.
    pub version: String,
    /// The encoded message of the type that the delivery names.
    pub body: Bytes,
}

/// What a response's `system_version_info` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Generation {
    /// Of our server.
    Ours {
        /// The generation that this response leads to.
        number: u64,
        /// Whether this response completes it for its type.
        last: bool,
    },
    /// Of another control plane: each response stands alone.
    Foreign(String),
}

impl Generation {
    /// Reads `system_version_info`; anything not written by our server is foreign.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let ours = |text: &str| {
            let number = text.strip_prefix("culvert/")?;
            let (number, last) = number.strip_suffix('+').map_or((number, true), |number| (number, false));
            let digits = number.bytes().all(|byte| byte.is_ascii_digit());
            Some(Self::Ours { number: number.parse().ok().filter(|_| digits)?, last })
        };
        ours(text).unwrap_or_else(|| Self::Foreign(text.to_owned()))
    }

    /// Whether nothing more follows that belongs with this response.
    #[must_use]
    pub fn is_last(&self) -> bool {
        !matches!(self, Self::Ours { last: false, .. })
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours { number, last: true } => write!(f, "culvert/{number}"),
            Self::Ours { number, last: false } => write!(f, "culvert/{number}+"),
            Self::Foreign(text) => f.write_str(text),
        }
    }
}

/// A node of this id that asks for generations.
#[must_use]
pub fn node_with_generations(id: impl Into<String>) -> Node {
    let yes = prost_types::Value { kind: Some(Kind::StringValue("true".to_owned())) };
    let metadata = prost_types::Struct { fields: [(GENERATIONS_KEY.to_owned(), yes)].into() };
    Node { id: id.into(), cluster: String::new(), metadata: Some(metadata) }
}

fn wants_generations(node: &Node) -> bool {
    let value = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(GENERATIONS_KEY));
    match value.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(text)) => text == "true",
        Some(Kind::BoolValue(yes)) => *yes,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_read_back() {
        for last in [true, false] {
            let generation = Generation::Ours { number: u64::MAX, last };
            assert_eq!(Generation::parse(&generation.to_string()), generation);
        }
        for foreign in
            ["", "12", "culvert/", "culvert/+", "culvert/+1", "culvert/1x", "2026-01-02T03:04:05Z/7"]
        {
            assert_eq!(Generation::parse(foreign), Generation::Foreign(foreign.to_owned()));
        }
    }

    #[test]
    fn a_node_asks_for_generations() {
        assert!(wants_generations(&node_with_generations("n")));
        assert!(!wants_generations(&Node::default()));
    }
}
