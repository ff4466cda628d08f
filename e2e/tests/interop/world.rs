//! Two nodes. On `left` runs our proxy, and its pods `client` and `server` are captured; `right` has only the pod `peer`, where
//! the Go program speaks HBONE itself. The Go program is the control plane and the node agent of `left`.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use base64::Engine;
use culvert_net::redirect::{self, RedirectConfig};
use culvert_sandbox::lab::{Lab, NetNs};
use culvert_sandbox::plan::Family;
use serde_json::{Value, json};

use crate::interop_go::{self, PATIENCE, Peer};

/// Where the Go echo server of a pod listens.
pub const ECHO_PORT: u16 = 8080;
/// The port of the Service in front of `peer`.
pub const SERVICE_PORT: u16 = 80;
/// How often a condition is looked at that nothing announces.
const POLL: std::time::Duration = std::time::Duration::from_millis(10);
/// The controller's namespace on the fabric.
const CONTROL: &str = "198.18.0.2:15012";
/// The name in its certificate: that of Istio's own control plane.
const CONTROL_NAME: &str = "istiod.istio-system.svc";

/// A pod of this world.
pub struct Pod {
    pub name: &'static str,
    pub node: &'static str,
    pub v4: &'static str,
    pub v6: &'static str,
}

/// Captured; makes connections.
pub const CLIENT: Pod = Pod { name: "client", node: "left", v4: "100.64.1.10", v6: "fd00:64:1::10" };
/// Captured; echoes.
pub const SERVER: Pod = Pod { name: "server", node: "left", v4: "100.64.1.11", v6: "fd00:64:1::11" };
/// Not captured: speaks HBONE itself.
pub const PEER: Pod = Pod { name: "peer", node: "right", v4: "100.64.2.10", v6: "fd00:64:2::10" };
/// Addresses of the Service in front of [`PEER`].
pub const SERVICE: [&str; 2] = ["198.18.128.5", "fd00:18:80::5"];

impl Pod {
    pub fn identity(&self) -> String {
        identity(self.name)
    }

    /// `host:port`, IPv4 or IPv6.
    pub fn at(&self, port: u16) -> [String; 2] {
        [self.v4, self.v6].map(|text| SocketAddr::new(text.parse().unwrap(), port).to_string())
    }

    fn addresses(&self) -> Vec<IpAddr> {
        vec![self.v4.parse().unwrap(), self.v6.parse().unwrap()]
    }

    fn workload(&self) -> Value {
        let addresses: Vec<String> = self.addresses().into_iter().map(encode).collect();
        json!({
            "uid": format!("Kubernetes//Pod/default/{}", self.name), "name": self.name, "namespace": "default",
            "addresses": addresses, "tunnelProtocol": "HBONE", "trustDomain": "cluster.local",
            "serviceAccount": self.name, "node": self.node, "canonicalName": self.name, "canonicalRevision": "latest",
            "workloadType": "POD", "workloadName": self.name, "clusterId": "Kubernetes",
        })
    }
}

/// Everything that runs. Fields are dropped in order: processes, namespaces, the directory they are mounted in.
pub struct World {
    pub agent: Peer,
    pub control: Peer,
    pub proxy: OurProgram,
    pub manifest: Value,
    _lab: Lab,
    pub dir: tempfile::TempDir,
    pods: Vec<(&'static str, NetNs)>,
}

/// One of ours, logging to a file. Dropping it kills it, and shows the log when a test has failed.
pub struct OurProgram {
    child: Child,
    log: PathBuf,
}

impl World {
    /// Starts all of it, and waits until the proxy serves both of its pods.
    pub fn start() -> World {
        World::start_with(&[])
    }

    /// As [`World::start`], with more flags for the Go control plane.
    pub fn start_with(control_flags: &[&str]) -> World {
        let dir = tempfile::Builder::new().prefix("interop").tempdir().unwrap();
        let ca = dir.path().join("ca");
        interop_go::run(&["init-ca", "--dir", path(&ca), "--dns", CONTROL_NAME]);
        let token = dir.path().join("token");
        fs::write(&token, "a-token-for-left").unwrap();
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600)).unwrap();

        let mut lab = Lab::create(&dir.path().join("netns"), Family::Dual).expect("namespaces need root");
        lab.add_node("left").unwrap();
        lab.add_node("right").unwrap();
        let pods: Vec<_> = [CLIENT, SERVER, PEER]
            .iter()
            .map(|pod| {
                (pod.name, lab.add_pod(pod.node, &format!("default.{}", pod.name), &pod.addresses()).unwrap())
            })
            .collect();
        for (_, netns) in &pods[..2] {
            let netns = culvert_net::NetNs::open(netns.path()).unwrap();
            redirect::install(&netns, &RedirectConfig::default()).unwrap();
        }

        let manifest = first_manifest();
        let mut control = start_control(&lab, dir.path(), &manifest, control_flags);
        control.wait("listening");
        let mut agent = start_agent(dir.path(), &pods[..2]);
        let proxy = start_proxy(&lab, dir.path());
        agent.wait_for("ack", |ack| ack["for"] == "snapshot");
        World { agent, control, proxy, manifest, dir, _lab: lab, pods }.settled()
    }

    /// The proxy took both resource types.
    fn settled(mut self) -> World {
        let first = self.control.wait("ack")["type"].clone();
        self.control.wait_for("ack", |ack| ack["type"] != first);
        self
    }

    /// Namespace of a pod.
    pub fn netns(&self, pod: &Pod) -> &Path {
        self.pods.iter().find(|(name, _)| *name == pod.name).unwrap().1.path()
    }

    /// Signs a certificate and gives the paths of the certificate and its key.
    pub fn issue(&self, name: &str, flags: &[&str]) -> [String; 2] {
        let ca = self.dir.path().join("ca");
        let mut args = vec!["issue", "--dir", path(&ca), "--name", name];
        args.extend(flags);
        interop_go::run(&args);
        [format!("{name}.pem"), format!("{name}-key.pem")].map(|file| path(&ca.join(file)).to_owned())
    }

    /// The root that all certificates of this world lead to.
    pub fn root(&self) -> String {
        path(&self.dir.path().join("ca/root.pem")).to_owned()
    }

    /// Starts Istio's HBONE server, and an echo behind it, in the pod `peer`.
    pub fn serve_hbone(&self) -> Peer {
        self.serve_hbone_as(&self.issue("peer", &["--identity", &PEER.identity()]))
    }

    /// As [`World::serve_hbone`], with the certificate and key of those paths.
    pub fn serve_hbone_as(&self, [cert, key]: &[String; 2]) -> Peer {
        let echo = format!("[::]:{ECHO_PORT}");
        let root = self.root();
        let args = ["hbone-serve", "--listen", "[::]:15008", "--cert", cert, "--key", key, "--root", &root];
        let mut server = Peer::start_in(Some(self.netns(&PEER)), &[&args[..], &["--echo", &echo]].concat());
        server.wait("listening");
        server
    }

    /// Starts an echo server in the captured pod `server`.
    pub fn serve_echo(&self) -> Peer {
        let echo = format!("[::]:{ECHO_PORT}");
        let mut server = Peer::start_in(Some(self.netns(&SERVER)), &["echo", "--listen", &echo]);
        server.wait("echo-listening");
        server
    }

    /// Connects from the captured pod `client` as an unmodified program would.
    pub fn dial(&self, target: &str, flags: &[&str]) -> Result<Vec<Value>, String> {
        let args = [&["dial", "--target", target], flags].concat();
        interop_go::try_run(Some(self.netns(&CLIENT)), &args)
    }

    /// Tunnels from the pod `peer` with Istio's dialer to the captured pod `server`.
    pub fn tunnel(
        &self,
        credentials: &[String; 2],
        proxy: &str,
        target: &str,
        flags: &[&str],
    ) -> Result<Vec<Value>, String> {
        let root = self.root();
        let [cert, key] = credentials;
        let args = [
            "hbone-dial",
            "--proxy",
            proxy,
            "--target",
            target,
            "--cert",
            cert,
            "--key",
            key,
            "--root",
            &root,
        ];
        interop_go::try_run(Some(self.netns(&PEER)), &[&args[..], flags].concat())
    }

    /// Changes what the control plane serves.
    pub fn publish(&mut self, change: impl FnOnce(&mut Value)) {
        change(&mut self.manifest);
        write_manifest(self.dir.path(), &self.manifest);
        self.control.tell("reload");
        self.control.wait("loaded");
    }
}

impl OurProgram {
    /// Starts one of our programs inside a namespace, or in this process's.
    pub fn start(netns: Option<&NetNs>, name: &str, args: &[&str], log: PathBuf) -> OurProgram {
        let program = culvert_e2e::programs::program(name).unwrap();
        let out = fs::File::create(&log).unwrap();
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out);
        // A process begins in the namespace of the thread that starts it.
        let child = match netns {
            Some(netns) => netns.run(|| command.spawn()).unwrap(),
            None => command.spawn(),
        };
        OurProgram { child: child.unwrap(), log }
    }

    /// What it has written so far.
    pub fn text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for OurProgram {
    fn drop(&mut self) {
        // Both fail only for a process that has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("{} says:\n{}", self.log.display(), self.text());
        }
    }
}

/// Waits until `condition` gives a value, or panics with `what`.
pub fn eventually<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let limit = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < limit, "not within {PATIENCE:?}: {what}");
        // Between two looks, not instead of one.
        std::thread::sleep(POLL);
    }
}

pub fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/default/sa/{account}")
}

pub fn path(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

fn encode(address: IpAddr) -> String {
    let bytes = match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Three workloads and a Service over the one on `right`; no policy.
fn first_manifest() -> Value {
    let hostname = "peer.default.svc.cluster.local";
    let ports = json!([{"servicePort": SERVICE_PORT, "targetPort": ECHO_PORT}]);
    let addresses: Vec<Value> =
        SERVICE.iter().map(|text| json!({"address": encode(text.parse().unwrap())})).collect();
    let mut peer = PEER.workload();
    peer["services"] = json!({format!("default/{hostname}"): {"ports": ports}});
    let service = json!({"name": "peer", "namespace": "default", "hostname": hostname, "addresses": addresses, "ports": ports});
    json!({"workloads": [CLIENT.workload(), SERVER.workload(), peer], "services": [service], "policies": [], "raw": []})
}

fn write_manifest(dir: &Path, manifest: &Value) {
    let (temporary, place) = (dir.join(".manifest"), dir.join("manifest.json"));
    fs::write(&temporary, manifest.to_string()).unwrap();
    fs::rename(temporary, place).unwrap();
}

fn start_control(lab: &Lab, dir: &Path, manifest: &Value, flags: &[&str]) -> Peer {
    write_manifest(dir, manifest);
    let file = |name: &str| path(&dir.join(name)).to_owned();
    let (cert, key) = (file("ca/server.pem"), file("ca/server-key.pem"));
    let (root, root_key) = (file("ca/root.pem"), file("ca/root-key.pem"));
    let (manifest, token) = (file("manifest.json"), file("token"));
    let mut args =
        vec!["serve-xds", "--listen", CONTROL, "--cert", &cert, "--key", &key, "--manifest", &manifest];
    args.extend(["--ca-cert", &root, "--ca-key", &root_key, "--token-file", &token]);
    args.extend(flags);
    Peer::start_in(Some(lab.controller().path()), &args)
}

/// The agent tells every proxy that connects about the captured pods, and ends the snapshot.
fn start_agent(dir: &Path, pods: &[(&'static str, NetNs)]) -> Peer {
    let socket = dir.join("ztunnel.sock");
    let mut agent = Peer::start(&["serve-zds", "--socket", path(&socket)]);
    agent.wait("listening");
    for (name, netns) in pods {
        agent.tell(&format!("add uid-{name} default {name} {name} {}", path(netns.path())));
        agent.wait("waiting");
    }
    agent
}

fn start_proxy(lab: &Lab, dir: &Path) -> OurProgram {
    let file = |name: &str| path(&dir.join(name)).to_owned();
    let (socket, root, token) = (file("ztunnel.sock"), file("ca/root.pem"), file("token"));
    let address = format!("https://{CONTROL}");
    let mut args = vec!["proxy", "--node", "left", "--zds-socket", &socket, "--xds-address", &address];
    args.extend(["--xds-root-cert", &root, "--xds-server-name", CONTROL_NAME, "--token-file", &token]);
    let node = lab.node("left").unwrap();
    OurProgram::start(Some(&node.netns), "ztunnel", &args, dir.join("proxy.log"))
}
