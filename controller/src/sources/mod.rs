//! Where the world comes from.

use self::directory::Directory;
use self::kubernetes::Kubernetes;
use self::watch::Watch;
use crate::auth::NodeTokens;
use crate::index::World;

pub mod directory;
mod json_dir;
pub mod kubernetes;
pub mod watch;

/// What tells the single writer what is.
#[derive(Debug)]
pub enum Source {
    /// Files. The node tokens lie beside them and are read again with them.
    Directory {
        /// What was read.
        directory: Box<Directory>,
        /// What says when to read again.
        watch: Box<Watch>,
        /// Who may connect.
        tokens: NodeTokens,
    },
    /// The API server.
    Kubernetes(Box<Kubernetes>),
}

impl Source {
    /// Waits until something may have changed, and takes it in; false if nothing ever will again. Cancel safe.
    pub async fn changed(&mut self) -> bool {
        match self {
            Self::Directory { directory, watch, tokens } => {
                let dirty = watch.changed().await;
                if dirty.tokens {
                    match tokens.reload() {
                        Ok(true) => tracing::info!("node tokens changed"),
                        Ok(false) => {}
                        Err(error) => tracing::warn!(%error, "node tokens stay as they were"),
                    }
                }
                directory.refresh(dirty);
                true
            }
            Self::Kubernetes(kubernetes) => kubernetes.changed().await,
        }
    }

    /// What is; `None` while that is not known as a whole.
    pub fn world(&mut self) -> Option<World> {
        match self {
            Self::Directory { directory, .. } => Some(directory.world()),
            Self::Kubernetes(kubernetes) => kubernetes.world(),
        }
    }

    /// What is waited for before the world is known.
    pub fn missing(&self) -> Vec<String> {
        match self {
            Self::Directory { .. } => Vec::new(),
            Self::Kubernetes(kubernetes) => kubernetes.missing(),
        }
    }
}
