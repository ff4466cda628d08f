//! What the controller does with Kubernetes besides reading it: asks who a caller is, elects who writes, keeps the root in a
//! Secret and hands its certificate out.
//!
//! ```text
//! review (whose token)   lease (who leads)   root (Secrets -> authority)   trust (authority -> ConfigMaps, webhook)
//! ```
//!
//! Each part has its logic behind a small trait over what it needs of the API server, so that its tests need none.
use std::sync::Arc;

use culvert_runtime::clock::SystemClock;
use culvert_runtime::drain::DrainWatcher;
use culvert_runtime::metrics::Metrics;
use culvert_runtime::tasks::Tasks;
use tokio::sync::watch;

use crate::admission::Heard;
use crate::ca::{Authority, NodeAuthenticator};

pub mod duties;
pub mod lease;
pub mod review;
pub mod root;
pub mod taint;
pub mod trust;

/// Who this replica is.
#[derive(Clone, Debug)]
pub struct Replica {
    /// The installation's namespace: Secrets and the lease are there.
    pub namespace: String,
    /// The pod's name: no other replica has it.
    pub pod: String,
    /// Whose pods may ask for every identity on their node.
    pub trusted: Vec<review::TrustedProxy>,
}

/// What serving needs of Kubernetes.
pub struct Identity {
    /// Signs, as the Secrets say.
    pub authority: Arc<Authority>,
    /// Says who calls.
    pub authenticator: Arc<dyn NodeAuthenticator>,
    /// Whether this replica writes; what writes looks before each write.
    pub leading: watch::Receiver<bool>,
    /// Whether the webhook of this replica was asked; the leader makes it one that must answer then.
    pub heard: Heard,
}

/// Opens the root and starts everything above; it ends when `drain` starts.
///
/// # Errors
/// [`root::RootError`] if there is nothing to sign with.
pub async fn start(
    client: kube::Client,
    replica: Replica,
    metrics: &Metrics,
    tasks: &Tasks,
    drain: DrainWatcher,
) -> Result<Identity, root::RootError> {
    let secrets = || root::KubeSecrets::new(client.clone(), &replica.namespace);
    let roots = root::Roots::open(secrets(), Arc::new(SystemClock)).await?;
    let authority = roots.authority();
    let leases = lease::KubeLease::new(client.clone(), &replica.namespace);
    let election = lease::Election::new(leases, replica.pod);
    let leading = election.leading();
    let (gauge, problem) = (election.gauge(), roots.problem());
    metrics.register(|registry| {
        registry.register("culvert_controller_leader", "1 while this replica is the one that writes", gauge);
        let help = "1 while a Secret of the root cannot be used and what was good before stays in force";
        registry.register("culvert_ca_root_problem", help, problem);
    });
    let changed = watch::Sender::new(0);
    tasks.spawn("root", roots.run(changed.subscribe(), leading.clone(), drain.clone()));
    tasks.spawn("root secrets", secrets().follow(changed, drain.clone()));
    tasks.spawn("election", election.run(drain.clone()));
    let (to, signed) = (client.clone(), authority.clone());
    tasks.spawn("trust bundles", trust::keep_bundles(to, signed, leading.clone(), drain.clone()));
    let (to, signed) = (client.clone(), authority.clone());
    let heard = Heard::default();
    tasks.spawn("webhook bundle", trust::keep_webhook(to, signed, heard.watch(), leading.clone(), drain));
    let authenticator = review::TokenReviews::new(client, replica.trusted);
    Ok(Identity { authority, authenticator, leading, heard })
}
