//! The messages culvert speaks with control planes, node agents and certificate authorities, made from `proto/*.proto`.
//!
//! Only messages: a service's stub is generated where it is used, and turning a message into something the mesh
//! reasons about is `culvert_model::wire`.
#![allow(missing_docs, reason = "generated; the .proto files carry the text")]
#![allow(clippy::large_enum_variant, reason = "generated")]

use bytes::Bytes;

/// What exists in the mesh: `istio.workload`.
pub mod workload {
    include!(concat!(env!("OUT_DIR"), "/istio.workload.rs"));

    /// The node-agent protocol: `istio.workload.zds`.
    pub mod zds {
        include!(concat!(env!("OUT_DIR"), "/istio.workload.zds.rs"));
    }
}

/// L4 authorization: `istio.security`.
pub mod security {
    include!(concat!(env!("OUT_DIR"), "/istio.security.rs"));
}

/// The certificate API: `istio.v1.auth`.
pub mod ca {
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}

/// Delta xDS: `envoy.service.discovery.v3`.
pub mod discovery {
    include!(concat!(env!("OUT_DIR"), "/envoy.service.discovery.v3.rs"));
}

/// What this mesh adds to the workload API, in extensions: `culvert.workload.v1`.
pub mod culvert {
    include!(concat!(env!("OUT_DIR"), "/culvert.workload.v1.rs"));
}

/// Routes and policies of a waypoint: `culvert.waypoint.v1`.
pub mod waypoint {
    include!(concat!(env!("OUT_DIR"), "/culvert.waypoint.v1.rs"));
}

/// Name of the extension of a service that holds a [`culvert::SessionAffinity`].
pub const SESSION_AFFINITY_EXTENSION: &str = "culvert.dev/session-affinity";
/// Type URL of [`culvert::SessionAffinity`].
pub const SESSION_AFFINITY_TYPE_URL: &str = "type.googleapis.com/culvert.workload.v1.SessionAffinity";

/// A `google.protobuf.FileDescriptorSet` of all of them, for reading messages from JSON.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// `google.protobuf.Any`, its body shared instead of copied.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    /// Names the type of `value`.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The encoded message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Type URL of [`workload::Address`] resources.
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";
/// Name of the extension of a workload that holds a [`culvert::Pod`].
pub const POD_EXTENSION: &str = "culvert.dev/pod";
/// Type URL of [`culvert::Pod`].
pub const POD_TYPE_URL: &str = "type.googleapis.com/culvert.workload.v1.Pod";
/// Type URL of [`security::Authorization`] resources.
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";
/// Type URL of [`waypoint::Route`] resources.
pub const ROUTE_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.Route";
/// Type URL of [`waypoint::Policy`] resources.
pub const POLICY_TYPE_URL: &str = "type.googleapis.com/culvert.waypoint.v1.Policy";
/// Key in the metadata of an xDS node: `namespace/name` of the Gateway whose waypoint asks. Such a client may ask for routes and
/// policies of requests, and gets its own.
pub const GATEWAY_METADATA: &str = "CULVERT_GATEWAY";
