//! What a replica does for a cluster besides serving the mesh: it judges what people write before it is stored, and while it leads,
//! says in the status of objects what became of them.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use tokio::sync::watch;

use crate::admission::{self, Heard};
use crate::ca::Serving;
use crate::index::Snapshot;
use crate::provision::{self, run::Provisioner};
use crate::status::{self, policies, routes};
use crate::translate::MeshSettings;

/// What they need.
pub struct Duties {
    /// For writes.
    pub client: kube::Client,
    /// Whether this replica writes.
    pub leading: watch::Receiver<bool>,
    /// Whether the webhook was asked.
    pub heard: Heard,
    /// What makes waypoints.
    pub provisioner: Provisioner,
}

impl Duties {
    /// Opens the webhook's port, if it has one, and starts to write. Until `drain` starts.
    ///
    /// # Errors
    /// If the webhook's address cannot be listened on.
    pub async fn start(
        self,
        webhook: Option<(SocketAddr, Arc<Serving>)>,
        snapshots: watch::Receiver<Arc<Snapshot>>,
        settings: MeshSettings,
        metrics: &Metrics,
        tasks: &Tasks,
        drain: DrainWatcher,
    ) -> anyhow::Result<()> {
        let Self { client, leading, heard, provisioner } = self;
        if let Some((address, serving)) = webhook {
            let bound = admission::start(address, serving, heard, metrics, tasks, drain.clone()).await;
            let address = bound.with_context(|| format!("cannot listen on {address}"))?;
            tracing::info!(%address, "the webhook is served");
        }
        let (publisher, contribution) = policies::contribution();
        let follow =
            policies::run(publisher, snapshots.clone(), settings.clone(), leading.clone(), drain.clone());
        tasks.spawn("policy status", follow);
        let (publisher, of_routes) = routes::contribution();
        let follow = routes::run(publisher, snapshots.clone(), leading.clone(), drain.clone());
        tasks.spawn("route status", follow);
        let waypoints =
            provision::start(provisioner, settings, snapshots, leading.clone(), tasks, drain.clone());
        let contributions = waypoints.into_iter().chain([contribution, of_routes]).collect();
        status::start(client, contributions, leading, metrics, tasks, drain);
        Ok(())
    }
}
