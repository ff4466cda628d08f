//! `culvert waypoint`: the Gateways that are waypoints (K10 to K14).

use std::process::ExitCode;

use anyhow::bail;

use crate::args::{Mesh, WaypointArgs, WaypointCommand};
use crate::cluster::block_on;
use crate::output::yaml;

mod apply;
mod list;
mod manifest;

pub(crate) fn waypoint(args: &WaypointArgs) -> anyhow::Result<ExitCode> {
    // Nobody need be asked for it.
    if let WaypointCommand::Generate(shape) = &args.command {
        print!("{}", yaml(&manifest::gateway(shape, args.namespace.as_deref()))?);
        return Ok(ExitCode::SUCCESS);
    }
    let cluster = match args.mesh.choose()? {
        Mesh::Cluster(cluster) => cluster,
        Mesh::Local(state) => bail!(
            "there are no waypoints in a mesh of `culvert up` yet, and this is about {}; --context, --kubeconfig or --mesh cluster \
are about a cluster",
            state.root().display()
        ),
    };
    let namespace = args.namespace.as_deref();
    block_on(async {
        let cluster = crate::cluster::Cluster::open(&cluster).await?;
        match &args.command {
            WaypointCommand::Generate(_) => Ok(ExitCode::SUCCESS),
            WaypointCommand::Apply(args) => apply::apply(&cluster, namespace, args).await,
            WaypointCommand::Delete(args) => apply::delete(&cluster, namespace, args).await,
            WaypointCommand::List(args) => list::list(&cluster, namespace, args).await,
            WaypointCommand::Status(args) => list::status(&cluster, namespace, args).await,
        }
    })
}
