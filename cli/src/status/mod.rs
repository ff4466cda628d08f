//! `culvert status`: problems first.

use std::process::ExitCode;

use crate::args::{Mesh, StatusArgs};
use crate::cluster::block_on;

mod cluster;
mod local;
mod table;

pub(crate) fn status(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    match args.mesh.choose()? {
        Mesh::Local(state) => local::status(&state, args.output),
        Mesh::Cluster(cluster) => block_on(cluster::status(&cluster, args)),
    }
}

/// 0 if all is well, 1 if not.
fn exit_code(well: bool) -> ExitCode {
    if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
