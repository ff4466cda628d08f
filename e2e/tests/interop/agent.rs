//! Our node agent, read as Istio's node proxy reads one.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use culvert_net::redirect::{self, RedirectConfig, Verdict};
use culvert_sandbox::lab::{Lab, NetNs};
use culvert_sandbox::plan::Family;
use serde_json::{Value, json};

use crate::interop_go::Peer;
use crate::world::{OurProgram, eventually, path};

/// A node with our agent and no proxy.
struct Node {
    _agent: OurProgram,
    state: PathBuf,
    manifests: PathBuf,
    lab: Lab,
    _dir: tempfile::TempDir,
}

impl Node {
    fn start() -> Node {
        let dir = tempfile::Builder::new().prefix("interop").tempdir().unwrap();
        let (state, manifests) = (dir.path().join("state"), dir.path().join("manifests"));
        for folder in ["status/pods", "status/services", "nodes/left/redirection"] {
            fs::create_dir_all(state.join(folder)).unwrap();
        }
        fs::create_dir_all(&manifests).unwrap();
        let namespace = "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: default\n  labels:\n    istio.io/dataplane-mode: ambient\n";
        fs::write(manifests.join("namespace.yaml"), namespace).unwrap();
        let mut lab = Lab::create(&dir.path().join("netns"), Family::Dual).expect("namespaces need root");
        lab.add_node("left").unwrap();
        let args = ["agent", "--node", "left", "--manifests", path(&manifests), "--state", path(&state)];
        let agent = OurProgram::start(None, "ztunnel", &args, dir.path().join("agent.log"));
        Node { _agent: agent, state, manifests, lab, _dir: dir }
    }

    fn socket(&self) -> PathBuf {
        self.state.join("nodes/left/ztunnel.sock")
    }

    fn connect(&self) -> Peer {
        let socket = self.socket();
        eventually("the agent listens", || socket.exists().then_some(()));
        let mut proxy = Peer::start(&["zds-client", "--socket", path(&socket)]);
        proxy.wait("connected");
        proxy
    }

    /// Makes a pod's namespace, its manifest and its status, as kubelet would.
    fn add_pod(&self, name: &str, host: u8, labels: &str) -> NetNs {
        let address = format!("100.64.1.{host}");
        let netns =
            self.lab.add_pod("left", &format!("default.{name}"), &[address.parse().unwrap()]).unwrap();
        let manifest = format!(
            "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: default\n  labels:\n    app: {name}\n{labels}\
             spec:\n  nodeName: left\n  serviceAccountName: {name}-account\n  containers:\n  - name: main\n    image: none\n"
        );
        write_whole(&self.manifests.join(format!("{name}.yaml")), &manifest);
        let status = json!({
            "uid": format!("uid-{name}"), "namespace": "default", "name": name, "nodeName": "left", "podIPs": [address],
            "phase": "Running", "ready": true, "netns": path(netns.path()),
        });
        write_whole(&self.status(name), &status.to_string());
        netns
    }

    fn remove_pod(&self, name: &str) {
        fs::remove_file(self.status(name)).unwrap();
        fs::remove_file(self.manifests.join(format!("{name}.yaml"))).unwrap();
    }

    fn status(&self, name: &str) -> PathBuf {
        self.state.join(format!("status/pods/default.{name}.json"))
    }

    fn redirection(&self, uid: &str) -> Option<Value> {
        let file = self.state.join(format!("nodes/left/redirection/{uid}.json"));
        serde_json::from_slice(&fs::read(file).ok()?).ok()
    }
}

fn write_whole(place: &Path, text: &str) {
    let temporary = place.with_extension("tmp");
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, place).unwrap();
}

fn check_add(message: &Value, name: &str, netns: &NetNs) {
    assert_eq!(message["kind"], "add", "{message}");
    assert_eq!((&message["name"], &message["namespace"]), (&name.into(), &"default".into()));
    assert_eq!(message["serviceAccount"], format!("{name}-account"));
    assert_eq!(message["uid"], format!("uid-{name}"));
    let descriptor = &message["descriptors"][0];
    assert_eq!(
        descriptor["kind"], "network namespace",
        "the first descriptor is the pod's namespace: {message}"
    );
    let file = fs::metadata(netns.path()).unwrap();
    assert_eq!(
        (descriptor["inode"].as_u64(), descriptor["device"].as_u64()),
        (Some(file.ino()), Some(file.dev()))
    );
}

/// TRAP6, C62, C63.
#[test]
fn the_snapshot_and_what_follows_are_what_istios_proxy_expects() {
    let node = Node::start();
    let first = node.add_pod("first", 10, "");
    node.add_pod("outside", 11, "    istio.io/dataplane-mode: none\n");
    let plain = eventually("the first pod has rules", || node.redirection("uid-first"));
    assert_eq!(plain["redirection"], "pending", "no proxy has acknowledged it: {plain}");

    let mut proxy = node.connect();
    check_add(&proxy.wait("message"), "first", &first);
    assert_eq!(proxy.wait("message")["kind"], "snapshot");
    eventually("the first pod is enrolled", || {
        node.redirection("uid-first").filter(|status| status["redirection"] == "enabled")
    });
    let inside = culvert_net::NetNs::open(first.path()).unwrap();
    assert_eq!(redirect::verify(&inside, &RedirectConfig::default()).unwrap(), Verdict::Intact);

    let second = node.add_pod("second", 12, "");
    // The first pod may be told once more, which changes nothing (C68).
    let is_second = |message: &Value| message["uid"] == "uid-second";
    check_add(&proxy.wait_for("message", is_second), "second", &second);
    eventually("the second pod is enrolled", || {
        node.redirection("uid-second").filter(|status| status["redirection"] == "enabled")
    });

    node.remove_pod("second");
    let del = proxy.wait_for("message", |message| message["kind"] == "del");
    assert_eq!(del["uid"], "uid-second");
    eventually("its status goes", || node.redirection("uid-second").is_none().then_some(()));
    assert!(node.redirection("uid-outside").is_none());
}

/// TRAP6.
#[test]
fn a_second_proxy_gets_the_whole_snapshot_and_both_hear_of_deletions() {
    let node = Node::start();
    let first = node.add_pod("first", 10, "");
    let mut old = node.connect();
    old.wait_for("message", |message| message["kind"] == "snapshot");
    let mut new = node.connect();
    check_add(&new.wait("message"), "first", &first);
    assert_eq!(new.wait("message")["kind"], "snapshot");

    // Adds go to the newest connection only, deletions to all (C65).
    let second = node.add_pod("second", 12, "");
    let is_second = |message: &Value| message["uid"] == "uid-second";
    check_add(&new.wait_for("message", is_second), "second", &second);
    node.remove_pod("first");
    for proxy in [&mut old, &mut new] {
        let del = proxy.wait_for("message", |message| message["kind"] == "del");
        assert_eq!(del["uid"], "uid-first");
    }
    let adds = old.of("message").into_iter().filter(|message| message["uid"] == "uid-second").count();
    assert_eq!(adds, 0, "{:?}", old.seen);
}

#[test]
fn a_refused_pod_stays_pending() {
    let node = Node::start();
    node.add_pod("first", 10, "");
    let socket = node.socket();
    eventually("the agent listens", || socket.exists().then_some(()));
    let mut proxy = Peer::start(&["zds-client", "--socket", path(&socket), "--refuse", "uid-first"]);
    proxy.wait_for("message", |message| message["uid"] == "uid-first");
    let status = eventually("the refusal is told", || {
        let told =
            |status: &Value| status["error"].as_str().is_some_and(|text| text.contains("refused as asked"));
        node.redirection("uid-first").filter(told)
    });
    assert_eq!(status["redirection"], "pending");
}
