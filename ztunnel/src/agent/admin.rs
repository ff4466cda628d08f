//! What the agent tells people and kubelets: metrics, readiness, liveness, log filter (C76, C77).

use std::net::SocketAddr;

use culvert_runtime::admin::{AdminServer, text};
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics as Registry;
use culvert_runtime::readiness::Readiness;
use culvert_runtime::tasks::Tasks;
use culvert_runtime::telemetry::FilterHandle;
use http::StatusCode;

use super::metrics::AgentMetrics;
use crate::app::bind;

/// Where the agent listens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::Args)]
pub struct AgentPorts {
    /// Metrics.
    #[arg(long = "metrics-listen", default_value = "[::]:15014")]
    pub metrics: SocketAddr,
    /// Readiness and liveness.
    #[arg(long = "readiness-listen", default_value = "[::]:8000")]
    pub readiness: SocketAddr,
    /// Log filter.
    #[arg(long = "admin-listen", default_value = "127.0.0.1:15010")]
    pub admin: SocketAddr,
}

/// Opens the ports.
///
/// # Errors
/// One cannot be bound.
pub fn serve(
    tasks: &Tasks,
    ports: &AgentPorts,
    registry: &Registry,
    metrics: &AgentMetrics,
    readiness: &Readiness,
    filter: Option<&FilterHandle>,
    drain: &DrainWatcher,
) -> anyhow::Result<()> {
    let admin = AdminServer::new();
    let admin = match filter {
        Some(filter) => admin.logging(filter),
        None => admin,
    };
    let servers = [
        ("metrics", ports.metrics, AdminServer::new().metrics(registry)),
        ("readiness", ports.readiness, health(readiness, metrics)),
        ("admin", ports.admin, admin),
    ];
    for (name, address, server) in servers {
        let listener = bind(name, address)?;
        let drain = drain.clone();
        tasks.spawn(name, async move {
            if let Err(error) = server.serve(listener, drain).await {
                tracing::error!(port = name, %error, "no longer served");
            }
        });
    }
    Ok(())
}

/// `/readyz` and `/healthz/ready`: what a proxy needs to connect is there. `/healthz`: the agent has not got stuck.
fn health(readiness: &Readiness, metrics: &AgentMetrics) -> AdminServer {
    let (pending, metrics) = (readiness.clone(), metrics.clone());
    AdminServer::new()
        .readiness(readiness.clone())
        .route("GET", "/readyz", "whether this process is ready", move |_| {
            std::future::ready(match pending.pending().as_slice() {
                [] => text(StatusCode::OK, "ready\n"),
                names => text(StatusCode::SERVICE_UNAVAILABLE, format!("pending:\n{}\n", names.join("\n"))),
            })
        })
        .route("GET", "/healthz", "whether this process goes on", move |_| {
            std::future::ready(match metrics.stalled() {
                false => text(StatusCode::OK, "alive\n"),
                true => text(StatusCode::INTERNAL_SERVER_ERROR, "nothing has been done for a minute\n"),
            })
        })
}
