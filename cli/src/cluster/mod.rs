//! A mesh in a Kubernetes cluster, as the command sees it: the API server's objects, and the pages of the mesh's programs through it.
//!
//! ```text
//! connect (kubeconfig)   reach (pages of pods)   gather (objects, pages -> Seen)   problems (Seen -> what is wrong)
//! ```

pub(crate) mod connect;
pub(crate) mod gather;
pub(crate) mod problems;
pub(crate) mod reach;
pub(crate) mod seen;

pub(crate) use connect::Cluster;

/// Runs what talks to a cluster. One thread: it waits for answers almost always.
pub(crate) fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(future);
    // A connection that is still being closed is nobody's concern.
    runtime.shutdown_background();
    outcome
}
