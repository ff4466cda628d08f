//! `culvert restart`.

use std::process::ExitCode;

use crate::args::{Mesh, RestartArgs};
use crate::cluster::block_on;

mod cluster;
mod local;

pub(crate) fn restart(args: &RestartArgs) -> anyhow::Result<ExitCode> {
    match args.mesh.choose()? {
        Mesh::Local(state) => local::restart(&state, args),
        Mesh::Cluster(cluster) => block_on(cluster::restart(&cluster, args)),
    }
}
