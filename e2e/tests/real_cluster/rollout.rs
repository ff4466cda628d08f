//! What is replaced under load: the tunnel on both nodes, the controller, an application.

use anyhow::Result;
use culvert_e2e::checks::Checks;
use serde_json::json;

use crate::load::{Load, MARKER};
use crate::world::{SYSTEM, World, echo, unread};

/// Where the load is.
pub const NAMESPACE: &str = "load";
/// New connections a second, from each of two pods.
const RATE: u32 = 20;
/// Longer than any of the replacements takes.
const SECONDS: u64 = 30;

/// An application of two pods, in the mesh.
pub fn application(world: &World, checks: &mut Checks) {
    checks.check("an application of two pods is in the mesh", || {
        let labels = json!({ "istio.io/dataplane-mode": "ambient" });
        world
            .api
            .create("/api/v1/namespaces", &json!({ "metadata": { "name": NAMESPACE, "labels": labels } }))?;
        world.api.apply(&echo(NAMESPACE, 2))?;
        world.wait_ready(NAMESPACE, 2)?;
        world.wait_redirection(NAMESPACE, Some("enabled"), crate::world::MOMENT)
    });
}

pub fn run(world: &World, checks: &mut Checks) {
    application(world, checks);
    // H14.
    checks.check("the tunnel is replaced on both nodes under load: 0 failed", || {
        replaced(world, SYSTEM, "daemonset/ztunnel")
    });
    checks.check("the controller is replaced under load: 0 failed", || {
        replaced(world, SYSTEM, "deployment/culvert-controller")
    });
    checks.check("the agent is replaced on both nodes under load: 0 failed", || {
        replaced(world, SYSTEM, "daemonset/culvert-agent")
    });
    checks.check("the application is replaced under load: 0 failed", || {
        replaced(world, NAMESPACE, "deployment/echo")
    });
}

fn replaced(world: &World, namespace: &str, what: &str) -> Result<()> {
    let (outcomes, report) = world.capture(MARKER, || {
        let loads = ["node-a", "node-b"]
            .map(|node| Load::start(world, NAMESPACE, &format!("load-{node}"), node, RATE, SECONDS));
        world.api.kubectl(&["-n", namespace, "rollout", "restart", what])?;
        world.api.kubectl(&["-n", namespace, "rollout", "status", what, "--timeout", "90s"])?;
        loads.into_iter().map(|load| load?.finish()).collect::<Result<Vec<_>>>()
    })?;
    unread(&report, MARKER)?;
    outcomes.iter().try_for_each(|outcome| outcome.none_failed())
}
