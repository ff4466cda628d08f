//! `culvert logs`.

use std::process::ExitCode;

use crate::args::{LogsArgs, Mesh};
use crate::cluster::block_on;

mod cluster;
mod local;

pub(crate) fn logs(args: &LogsArgs) -> anyhow::Result<ExitCode> {
    match args.mesh.choose()? {
        Mesh::Local(state) => local::logs(&state, args),
        Mesh::Cluster(cluster) => block_on(cluster::logs(&cluster, args)),
    }
}
