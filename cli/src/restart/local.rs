//! The mesh of `culvert up`: its supervisor restarts programs.

use std::process::ExitCode;

use anyhow::{Context, bail};
use culvert_sandbox::control::{self, Reply, Request};
use culvert_sandbox::state::StateDir;

use crate::args::RestartArgs;

pub(super) fn restart(state: &StateDir, args: &RestartArgs) -> anyhow::Result<ExitCode> {
    let request = Request::Restart { role: args.role.into(), node: args.node.clone() };
    let reply = control::ask(&state.control_socket(), &request)
        .with_context(|| format!("nothing is up in {}", state.root().display()))?;
    match reply {
        Reply::Done => Ok(ExitCode::SUCCESS),
        Reply::Failed(why) => bail!("{why}"),
    }
}
