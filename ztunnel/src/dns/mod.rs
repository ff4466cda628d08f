//! The DNS proxy of each pod (Z76-Z84): names of the mesh are answered here, everything else goes to the cluster's DNS.
//!
//! `server` reads queries, `answer` decides what each means, `upstream` passes on what is not ours. `lookup` and `names` ask for
//! the proxy itself, where a workload has a name instead of an address (Z42).

mod answer;
#[cfg(test)]
pub mod fake;
mod lookup;
mod names;
mod resolv;
mod server;
mod upstream;

pub use lookup::ask;
pub use names::{Answer, LookupError, MAX_NAMES, Names};
pub use resolv::servers;
pub use server::{DnsServer, DnsSockets, MAX_IN_FLIGHT};
pub use upstream::{Upstream, leads_back};
