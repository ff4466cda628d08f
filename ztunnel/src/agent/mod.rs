//! The node agent: decides which pods of its node join, writes each one's redirect rules, hands its namespace to the
//! proxy, and keeps checking that both hold.
//!
//! `source` says what should be, `plan` compares it with what is (pure), `enrol` does it, `zds` talks to the proxy,
//! `report` tells the control plane.

mod enrol;
mod plan;
mod report;
mod source;
mod zds;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use culvert_net::seqpacket::SeqPacketListener;
use culvert_runtime::tasks::Tasks;

pub use plan::{Action, Desired, Enrolled, plan};
pub use zds::{AddError, ZdsServer};

/// Rules and registrations are compared with what should be at least this often, whatever notifications say.
const RESYNC: Duration = Duration::from_secs(2);
/// Changes of files come in bursts: one pass serves those that arrive so close together.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// Enrols the node's pods.
#[derive(Clone, Debug, clap::Args)]
pub struct AgentConfig {
    /// Name of the node that this agent serves.
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Directory of manifests: namespaces and pods with their labels.
    #[arg(long)]
    pub manifests: PathBuf,
    /// State directory: pod status is read from it, redirection status written to it.
    #[arg(long)]
    pub state: PathBuf,
    /// Socket for the proxy; `<state>/nodes/<node>/ztunnel.sock` if absent.
    #[arg(long, env = "ZDS_SOCKET")]
    pub zds_socket: Option<PathBuf>,
    /// Namespaces whose pods never join (C06).
    #[arg(long, value_delimiter = ',', default_value = "kube-system")]
    pub exclude_namespaces: Vec<String>,
    /// Whether pods' DNS goes to the proxy, where a pod does not say (C11).
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub dns_capture: bool,
}

/// Serves until SIGTERM. Rules stay as they are: they must outlive the agent, or a restart would open a gap.
///
/// # Errors
/// The socket cannot be bound or a directory cannot be read at start.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    let node_dir = config.state.join("nodes").join(&config.node);
    let socket = config.zds_socket.clone().unwrap_or_else(|| node_dir.join("ztunnel.sock"));
    let listener =
        SeqPacketListener::bind(&socket).with_context(|| format!("listening on {}", socket.display()))?;
    let tasks = Tasks::new("agent");
    let zds = ZdsServer::new(tasks.clone());
    let mut source = source::DirectorySource::open(&config).context("reading what pods there are")?;
    let reports = report::Reports::open(&node_dir)?;
    let mut enroller = enrol::Enroller::new(zds.clone(), reports);

    // What was enrolled before this agent started is found again before the proxy is told anything: the first snapshot
    // must not make it drop a pod that runs.
    enroller.pass(&source.desired()?).await;
    tasks.spawn("zds accept", zds.clone().serve(listener));
    tracing::info!(node = %config.node, socket = %socket.display(), "agent is ready");

    let mut connected = zds.connected();
    let shutdown = culvert_runtime::signal::shutdown();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            _ = &mut shutdown => break,
            () = source.changed() => tokio::time::sleep(DEBOUNCE).await,
            _ = connected.changed() => {}
            () = tokio::time::sleep(RESYNC) => {}
        }
        match source.desired() {
            Ok(desired) => enroller.pass(&desired).await,
            // What should be is not known: what is stays, rather than un-enrolling everyone.
            Err(error) => tracing::warn!(error = format!("{error:#}"), "pods cannot be listed"),
        }
    }
    tasks.close();
    tasks.abort_all();
    Ok(())
}
