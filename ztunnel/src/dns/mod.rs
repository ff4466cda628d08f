//! The DNS proxy of each pod (Z76-Z84): names of the mesh are answered here, everything else goes to the cluster's DNS.
//!
//! `server` reads queries, `answer` decides what each means, `upstream` passes on what is not ours.

mod answer;
mod server;
mod upstream;

pub use server::{DnsServer, DnsSockets};
