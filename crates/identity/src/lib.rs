//! Who a workload is, proven: keys, certificate requests, the client of the certificate authority, renewal, and the TLS
//! configurations that check a peer's identity.
//!
//! The way of a certificate: [`csr`] makes a key and a request, [`ca_client`] has it signed over [`control`]'s channel,
//! [`certificate`] checks what came back, [`manager`] keeps it fresh, and [`tls`] turns it into rustls configurations whose
//! peers [`verify`] judges.

pub mod bundle;
pub mod ca_client;
pub mod certificate;
pub mod control;
pub mod csr;
pub mod manager;
pub mod tls;
pub mod token;
pub mod verify;

#[cfg(test)]
mod fixture;

/// The certificate service's stubs, client and server, made from `proto/ca.proto` (D07).
pub mod stub {
    #![allow(missing_docs, clippy::all, clippy::pedantic, rust_2018_idioms, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/istio.v1.auth.rs"));
}
