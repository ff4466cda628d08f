//! The command lines of the system's own programs: the one place that knows them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::daemon::{DaemonSpec, Role, Slot};
use crate::enter::Place;
use crate::lab::{Lab, NetNs, Node};
use crate::plan::{self, Family};
use crate::probe::Probe;
use crate::process::{Start, base_environment};
use crate::state::{self, StateDir, StateError};

/// The controller's port for xDS and certificates.
const XDS_PORT: u16 = 15012;
/// The proxy's readiness port, in its own namespace.
const READINESS_PORT: u16 = 15021;
/// The name in the controller's certificate.
const CONTROLLER_NAME: &str = "culvert-controller.culvert-system.svc";
/// SIGTERM to SIGKILL when everything ends: nobody waits for a drain then.
const GRACE: Duration = Duration::from_secs(3);
/// A proxy that is replaced may finish its connections for this long.
const DRAIN: Duration = Duration::from_secs(35);

/// The programs of the mesh and what is passed on to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Programs {
    /// The `controller` binary.
    pub controller: PathBuf,
    /// The `ztunnel` binary.
    pub ztunnel: PathBuf,
    /// More arguments of the controller.
    pub controller_args: Vec<OsString>,
    /// More arguments of each agent.
    pub agent_args: Vec<OsString>,
    /// More arguments of each proxy.
    pub proxy_args: Vec<OsString>,
}

/// Makes the command lines.
#[derive(Clone, Debug)]
pub struct System {
    programs: Programs,
    state: StateDir,
    manifests: PathBuf,
    family: Family,
}

impl System {
    /// For the manifests in `manifests`.
    pub fn new(programs: Programs, state: StateDir, manifests: PathBuf, family: Family) -> System {
        System { programs, state, manifests, family }
    }

    /// The controller, in its own namespace.
    pub fn controller(&self, lab: &Lab) -> DaemonSpec {
        let dir = self.state.controller();
        let mut command: Vec<OsString> = vec![self.programs.controller.clone().into()];
        option(&mut command, "--manifests", &self.manifests);
        option(&mut command, "--status", self.state.status());
        option(&mut command, "--redirection", self.state.nodes());
        option(&mut command, "--node-tokens", self.token_hashes());
        option(&mut command, "--ca-dir", dir.join("ca"));
        option(&mut command, "--root-cert-out", self.root_certificate());
        option(&mut command, "--listen", format!("[::]:{XDS_PORT}"));
        command.extend(self.programs.controller_args.iter().cloned());
        let connect = Probe::Connect { netns: lab.controller().clone(), target: self.xds() };
        DaemonSpec {
            role: Role::Controller,
            node: None,
            start: start("controller".to_owned(), command, dir.join("controller.log")),
            needs: Vec::new(),
            stale: Vec::new(),
            slots: vec![Slot {
                netns: lab.controller().clone(),
                ready: vec![Probe::File(self.root_certificate()), connect],
            }],
            grace: GRACE,
            drain: GRACE,
        }
    }

    /// A node's agent.
    pub fn agent(&self, name: &str, node: &Node) -> DaemonSpec {
        let mut command: Vec<OsString> = vec![self.programs.ztunnel.clone().into(), "agent".into()];
        option(&mut command, "--node", name);
        option(&mut command, "--manifests", &self.manifests);
        option(&mut command, "--state", self.state.root());
        command.extend(self.programs.agent_args.iter().cloned());
        let log = self.state.node(name).join("logs/agent.log");
        DaemonSpec {
            role: Role::Agent,
            node: Some(name.to_owned()),
            start: start(format!("agent.{name}"), command, log),
            needs: Vec::new(),
            stale: vec![self.zds_socket(name)],
            slots: vec![Slot { netns: node.netns.clone(), ready: vec![Probe::File(self.zds_socket(name))] }],
            grace: GRACE,
            drain: GRACE,
        }
    }

    /// A node's proxy. As in a cluster it has a namespace of its own, and at an update the new one has another: both have
    /// their fixed ports while the old one finishes its connections.
    pub fn proxy(&self, name: &str, node: &Node, namespaces: [NetNs; 2]) -> DaemonSpec {
        let mut command: Vec<OsString> = vec![self.programs.ztunnel.clone().into(), "proxy".into()];
        option(&mut command, "--node", name);
        if let Some(address) = node.addresses.first() {
            option(&mut command, "--node-ip", address.to_string());
        }
        option(&mut command, "--zds-socket", self.zds_socket(name));
        option(&mut command, "--xds-address", format!("https://{}", self.xds()));
        option(&mut command, "--xds-server-name", CONTROLLER_NAME);
        option(&mut command, "--xds-root-cert", self.root_certificate());
        option(&mut command, "--token-file", self.token(name));
        option(
            &mut command,
            "--dns-upstream",
            SocketAddr::new(self.first(plan::dns_addresses()), 53).to_string(),
        );
        command.extend(self.programs.proxy_args.iter().cloned());
        let log = self.state.node(name).join("logs/proxy.log");
        let target = SocketAddr::new(self.loopback(), READINESS_PORT);
        let slots = namespaces.map(|netns| {
            let path = "/healthz/ready".to_owned();
            Slot { netns: netns.clone(), ready: vec![Probe::Get { netns, target, path }] }
        });
        let [first, second] = slots;
        let slots = vec![first, second];
        DaemonSpec {
            role: Role::Proxy,
            node: Some(name.to_owned()),
            start: start(format!("proxy.{name}"), command, log),
            needs: vec![self.root_certificate(), self.zds_socket(name)],
            stale: Vec::new(),
            slots,
            grace: GRACE,
            drain: DRAIN,
        }
    }

    /// Makes a node's token and tells the controller the hashes of all. The files of a node:
    /// `token` (0600), `redirection/`, `logs/`.
    pub fn admit(&self, name: &str) -> Result<(), StateError> {
        let token = state::random_token()?;
        let hash: String =
            Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        state::write_whole(&self.token(name), token.as_bytes(), 0o600)?;
        let mut hashes: BTreeMap<String, String> =
            state::read_json(&self.token_hashes())?.unwrap_or_default();
        hashes.insert(name.to_owned(), hash);
        state::write_json(&self.token_hashes(), &hashes)
    }

    /// An empty list of tokens, which the controller reads at its start.
    pub fn prepare(&self) -> Result<(), StateError> {
        state::write_json(&self.token_hashes(), &BTreeMap::<String, String>::new())
    }

    fn token(&self, node: &str) -> PathBuf {
        self.state.node(node).join("token")
    }

    fn token_hashes(&self) -> PathBuf {
        self.state.controller().join("node-tokens.json")
    }

    fn root_certificate(&self) -> PathBuf {
        self.state.controller().join("root-cert.pem")
    }

    fn zds_socket(&self, node: &str) -> PathBuf {
        self.state.node(node).join("ztunnel.sock")
    }

    fn xds(&self) -> SocketAddr {
        SocketAddr::new(self.first(plan::controller_addresses()), XDS_PORT)
    }

    fn first(&self, addresses: [IpAddr; 2]) -> IpAddr {
        if self.family.v4() { addresses[0] } else { addresses[1] }
    }

    fn loopback(&self) -> IpAddr {
        std::net::Ipv4Addr::LOCALHOST.into()
    }
}

/// System programs see the machine's own files, mounts included: the agent must see namespaces that are mounted later. The
/// namespace they run in comes from their slot.
fn start(label: String, command: Vec<OsString>, log: PathBuf) -> Start {
    Start { label, command, environment: base_environment(), place: Place::default(), log }
}

fn option(command: &mut Vec<OsString>, name: &str, value: impl AsRef<Path>) {
    command.push(name.into());
    command.push(value.as_ref().into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_secret_and_their_hashes_are_not() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::new(dir.path()).unwrap();
        let system = System::new(Programs::default(), state.clone(), "m".into(), Family::Dual);
        system.prepare().unwrap();
        system.admit("a").unwrap();
        system.admit("b").unwrap();
        let file = state.node("a").join("token");
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let token = std::fs::read(&file).unwrap();
        let hashes: BTreeMap<String, String> =
            state::read_json(&state.controller().join("node-tokens.json")).unwrap().unwrap();
        let expected: String = Sha256::digest(&token).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hashes["a"], expected);
        assert_ne!(hashes["b"], expected);
    }
}
