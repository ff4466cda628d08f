//! What a stolen node can ask of the certificate authority: its own pods' identities and nothing else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_e2e::checks::Checks;
use culvert_e2e::world::World;
use culvert_identity::ca_client::{CaClient, CaError, GrpcCaClient};
use culvert_identity::control::{ControlEndpoint, control_channel};
use culvert_identity::csr::CertificateRequest;
use culvert_identity::token::TokenFile;
use culvert_model::identity::Identity;
use nix::sched::{CloneFlags, setns};

/// Where the controller is, seen from a node.
const CONTROLLER: &str = "https://198.18.0.2:15012";
const NAME: &str = "culvert-controller.culvert-system.svc";
const ON_A: &str = "spiffe://cluster.local/ns/mesh/sa/client";
const ON_B: &str = "spiffe://cluster.local/ns/mesh/sa/server";

pub fn run(world: &World, checks: &mut Checks) {
    let token = |node: &str| world.node_dir(node).join("token");
    let cases = [
        ("a node's own pod", "node-a", ON_A, true),
        ("a pod of another node", "node-a", ON_B, false),
        ("a pod of another node, the other way round", "node-b", ON_A, false),
        ("nobody's service account", "node-a", "spiffe://cluster.local/ns/mesh/sa/nobody", false),
        ("a foreign trust domain", "node-a", "spiffe://elsewhere.example/ns/mesh/sa/client", false),
    ];
    for (name, node, identity, allowed) in cases {
        let word = if allowed { "signs" } else { "refuses" };
        checks.check(&format!("the authority {word}: {name}"), || {
            judge(&ask(world, &token(node), identity)?, allowed)
        });
    }
    checks.check("the authority refuses: a token that it did not make", || {
        let file = world.state_dir().join("wrong-token");
        fs::write(&file, "0".repeat(64))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
        let answer = ask(world, &file, ON_A);
        fs::remove_file(&file)?;
        judge(&answer?, false)
    });
}

fn judge(answer: &Result<Vec<String>, CaError>, allowed: bool) -> Result<()> {
    match answer {
        Ok(chain) => ensure!(allowed, "it signed {} certificates", chain.len()),
        Err(CaError::Unauthenticated(_) | CaError::PermissionDenied(_)) => ensure!(!allowed, "{answer:?}"),
        Err(other) => anyhow::bail!("neither signed nor refused: {other}"),
    }
    Ok(())
}

/// Asks from the namespace of node-a: the network is no obstacle, only the token is.
fn ask(world: &World, token: &Path, identity: &str) -> Result<Result<Vec<String>, CaError>> {
    let netns = world.node_netns("node-a")?;
    let roots = world.state_dir().join("controller/root-cert.pem");
    let (token, identity) = (TokenFile::new(token), identity.parse::<Identity>()?);
    // A thread that enters the namespace and never leaves: everything that the client opens is in there.
    let asking = std::thread::spawn(move || {
        setns(&netns, CloneFlags::CLONE_NEWNET)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let channel = control_channel(ControlEndpoint::new(CONTROLLER, NAME, &roots))?;
            let client = GrpcCaClient::new(channel, token, "Kubernetes");
            let request = CertificateRequest::new(&identity)?;
            Ok(client.sign(request.pem(), &identity, Duration::from_secs(60)).await)
        })
    });
    asking.join().ok().context("the thread panicked")?
}
