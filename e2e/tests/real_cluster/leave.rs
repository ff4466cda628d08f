//! The mesh is removed: pods go on in plaintext, and nothing of it is left on the nodes.

use anyhow::{Result, ensure};
use culvert_cluster::run;
use culvert_e2e::checks::Checks;

use crate::rollout::NAMESPACE;
use crate::world::{PATIENCE, World};

pub fn check(world: &World, checks: &mut Checks) {
    checks.check("helm uninstall leaves pods talking in plaintext, no rules and no CNI entry", || {
        removed(world)
    });
}

/// C79, C80, H18.
fn removed(world: &World) -> Result<()> {
    world.uninstall()?;
    world.api.wait("plaintext", PATIENCE, |_| {
        let (marker, report) =
            world.marked_request("hello/client", "http://hello.hello.svc.cluster.local/")?;
        Ok((report.hits(marker.as_bytes()) > 0 && report.port(15008) == 0).then_some(()))
    })?;
    for node in world.cluster.nodes() {
        for namespace in node.pod_namespaces()? {
            let net = format!("--net=/run/netns/{namespace}");
            let rules = run(node.command("nsenter")?.args([&net, "--", "nft", "list", "ruleset"]))?;
            ensure!(rules.trim().is_empty(), "rules in {namespace} of {}: {rules}", node.name());
            let routes = run(node.command("nsenter")?.args([&net, "--", "ip", "rule"]))?;
            ensure!(!routes.contains("0x111"), "routing rules in {namespace} of {}: {routes}", node.name());
        }
        let rules = run(node.command("nft")?.args(["list", "ruleset"]))?;
        // kube-proxy's own chains have the names of Services, for as long as it takes its time.
        let ours = rules.lines().find(|line| line.starts_with("table ") && line.contains("culvert"));
        ensure!(ours.is_none(), "rules on {}: {ours:?}", node.name());
        let conf = run(node.command("sh")?.args([
            "-c",
            "cat /etc/cni/net.d/*; ls /opt/cni/bin /etc/cni/net.d /run/culvert 2>/dev/null || true",
        ]))?;
        ensure!(
            !conf.contains("culvert-cni") && !conf.contains("kubeconfig"),
            "left on {}: {conf}",
            node.name()
        );
    }
    // An agent's right to write them goes while it takes them away, and helm keeps no order: one that is left is no more than a text.
    for namespace in ["hello", NAMESPACE] {
        let left = world.pods(namespace)?.iter().filter(|pod| World::redirection(pod).is_some()).count();
        println!("          {left} annotations are left in {namespace}");
    }
    // A new pod starts without it.
    world.api.kubectl(&["-n", NAMESPACE, "rollout", "restart", "deployment/echo"])?;
    world.api.kubectl(&["-n", NAMESPACE, "rollout", "status", "deployment/echo", "--timeout", "60s"])?;
    // Nothing of ours holds an object back.
    world.api.kubectl(&["delete", "crd", "-l", "app.kubernetes.io/part-of=culvert", "--timeout", "30s"])?;
    Ok(())
}
