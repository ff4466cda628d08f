//! The admission webhook (D66, D67): an object of the mesh is judged before it is stored, by the loader that will read it.
//!
//! ```text
//! API server ── TLS, POST /validate ──► serve (bounds) ──► judge (pure) ──► allowed, with warnings, or refused with field and reason
//! ```
//!
//! Every replica serves it, and is ready only when it does. Whether an answer is demanded is the API server's to know: the chart
//! installs the webhook with `failurePolicy: Ignore`, and the leader makes that `Fail` once the API server was [heard](Heard) here,
//! so that a webhook that cannot be reached from where the API server runs never stands in anyone's way.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::ca::Serving;

pub mod judge;
mod serve;
#[cfg(test)]
mod tests;

/// Whether a review was ever asked for and answered here. Clones share it.
#[derive(Clone, Debug)]
pub struct Heard(Arc<watch::Sender<bool>>);

/// What was answered.
#[derive(Clone, Debug, Default)]
struct Counters(Family<Answered, Counter>);

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    verdict: &'static str,
}

impl Default for Heard {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Heard {
    /// Follows it.
    pub fn watch(&self) -> watch::Receiver<bool> {
        self.0.subscribe()
    }

    fn note(&self) {
        self.0.send_if_modified(|heard| !std::mem::replace(heard, true));
    }
}

/// Opens the port and serves until `drain` starts. `serving` is what the port shows; its names must have that of the Service.
///
/// # Errors
/// If the address cannot be listened on.
pub async fn start(
    address: SocketAddr,
    serving: Arc<Serving>,
    heard: Heard,
    metrics: &Metrics,
    tasks: &Tasks,
    drain: DrainWatcher,
) -> std::io::Result<SocketAddr> {
    let counters = Counters::default();
    metrics.register(|registry| {
        let help = "Objects that the API server asked about, by verdict";
        registry.register("culvert_controller_admission_reviews", help, counters.0.clone());
    });
    let port = TcpListener::bind(address).await?;
    let address = port.local_addr()?;
    let server = serve::Server { heard, counters };
    tasks.spawn("admission", server.run(port, serving, tasks.clone(), drain));
    Ok(address)
}
