//! Our controller, read as Istio's node proxy reads one.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use culvert_sandbox::lab::Lab;
use culvert_sandbox::plan::Family;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::interop_go::{self, Peer};
use crate::world::{OurProgram, eventually, path};

const ADDRESS: &str = "198.18.0.2:15012";
/// The name in the certificate of its port.
const NAME: &str = "culvert-controller.culvert-system.svc";
const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
const POLICY_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

const MESH: &str = "\
apiVersion: v1
kind: Namespace
metadata:
  name: default
  labels:
    istio.io/dataplane-mode: ambient
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: server
  namespace: default
---
apiVersion: v1
kind: Pod
metadata:
  name: client
  namespace: default
  labels:
    app: client
spec:
  nodeName: left
  serviceAccountName: client
  containers:
  - name: main
    image: none
---
apiVersion: v1
kind: Pod
metadata:
  name: server
  namespace: default
  labels:
    app: server
    version: v1
spec:
  nodeName: right
  serviceAccountName: server
  containers:
  - name: main
    image: none
---
apiVersion: v1
kind: Service
metadata:
  name: server
  namespace: default
spec:
  selector:
    app: server
  ports:
  - name: http
    port: 80
    targetPort: 8080
";

const POLICY: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: allow-client
  namespace: default
spec:
  selector:
    matchLabels:
      app: server
  action: ALLOW
  rules:
  - from:
    - source:
        principals: [\"cluster.local/ns/default/sa/client\"]
    to:
    - operation:
        ports: [\"8080\"]
";

/// The controller over a directory, in a namespace of its own.
struct Control {
    _controller: OurProgram,
    lab: Lab,
    // After the namespaces, which are mounted in it.
    dir: tempfile::TempDir,
}

impl Control {
    fn start() -> Control {
        Control::start_with(&[("mesh.yaml", MESH), ("policy.yaml", POLICY)])
    }

    fn start_with(files: &[(&str, &str)]) -> Control {
        let dir = tempfile::Builder::new().prefix("interop").tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        for folder in ["manifests", "state/status/pods", "state/status/services", "state/controller/ca"] {
            fs::create_dir_all(file(folder)).unwrap();
        }
        for (name, text) in files {
            fs::write(file("manifests").join(name), text).unwrap();
        }
        write_status(dir.path(), "client", "left", "100.64.1.10");
        write_status(dir.path(), "server", "right", "100.64.2.10");
        let addresses = json!({"clusterIPs": ["198.18.128.5"]});
        fs::write(file("state/status/services/default.server.json"), addresses.to_string()).unwrap();
        write_tokens(dir.path(), &["left", "right"]);

        let lab = Lab::create(&file("netns"), Family::Dual).expect("namespaces need root");
        let text = |name: &str| path(&file(name)).to_owned();
        let (manifests, status, nodes) = (text("manifests"), text("state/status"), text("state/nodes"));
        let (tokens, ca, root) = (
            text("state/controller/node-tokens.json"),
            text("state/controller/ca"),
            text("state/controller/root-cert.pem"),
        );
        let mut args = vec!["--manifests", &manifests, "--status", &status, "--redirection", &nodes];
        args.extend([
            "--node-tokens",
            &tokens,
            "--ca-dir",
            &ca,
            "--root-cert-out",
            &root,
            "--listen",
            ADDRESS,
        ]);
        let controller =
            OurProgram::start(Some(lab.controller()), "controller", &args, file("controller.log"));
        let control = Control { _controller: controller, dir, lab };
        eventually("the controller listens", || {
            let connect = || std::net::TcpStream::connect(ADDRESS);
            (control.root().exists() && control.lab.controller().run(connect).unwrap().is_ok()).then_some(())
        });
        control
    }

    fn root(&self) -> PathBuf {
        self.dir.path().join("state/controller/root-cert.pem")
    }

    fn arguments(&self, command: &str, node: &str) -> Vec<String> {
        let token = self.dir.path().join(format!("{node}.token"));
        let root = self.root();
        let fixed = [
            command,
            "--address",
            ADDRESS,
            "--server-name",
            NAME,
            "--root-cert",
            path(&root),
            "--token-file",
        ];
        fixed.into_iter().chain([path(&token)]).map(str::to_owned).collect()
    }

    /// Runs a client of the Go program with the token of `node`.
    fn run(&self, command: &str, node: &str, flags: &[&str]) -> Result<Vec<Value>, String> {
        let mut arguments = self.arguments(command, node);
        arguments.extend(flags.iter().map(|flag| (*flag).to_owned()));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        interop_go::try_run(Some(self.lab.controller().path()), &arguments)
    }

    fn follow(&self, node: &str) -> Peer {
        let mut arguments = self.arguments("xds-client", node);
        arguments.extend(["--node", node, "--follow"].map(str::to_owned));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut client = Peer::start_in(Some(self.lab.controller().path()), &arguments);
        client.wait_for("synced", |event| event["phase"] == "following");
        client
    }

    fn manifest(&self, name: &str, text: &str) {
        write_whole(&self.dir.path().join("manifests").join(name), text);
    }
}

/// What kubelet and the node's agent would say of an enrolled pod.
fn write_status(dir: &Path, name: &str, node: &str, address: &str) {
    let status = json!({
        "uid": format!("uid-{name}"), "namespace": "default", "name": name, "nodeName": node, "podIPs": [address],
        "phase": "Running", "ready": true, "netns": "/nowhere",
    });
    fs::write(dir.join(format!("state/status/pods/default.{name}.json")), status.to_string()).unwrap();
    let redirection = dir.join(format!("state/nodes/{node}/redirection"));
    fs::create_dir_all(&redirection).unwrap();
    fs::write(redirection.join(format!("uid-{name}.json")), r#"{"redirection":"enabled"}"#).unwrap();
}

fn write_tokens(dir: &Path, nodes: &[&str]) {
    let mut hashes = serde_json::Map::new();
    for node in nodes {
        let token = format!("the-token-of-node-{node}-0123456789abcdef");
        let file = dir.join(format!("{node}.token"));
        fs::write(&file, &token).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
        let hash: String =
            Sha256::digest(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        hashes.insert((*node).to_owned(), hash.into());
    }
    fs::write(dir.join("state/controller/node-tokens.json"), Value::from(hashes).to_string()).unwrap();
    fs::write(dir.join("unknown.token"), "nobody-was-given-this-token-0123456789").unwrap();
}

fn write_whole(place: &Path, text: &str) {
    let temporary = place.with_extension("tmp");
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, place).unwrap();
}

fn named<'a>(events: &'a [Value], name: &str) -> &'a Value {
    let resources = interop_go::of(events, "resource");
    resources
        .into_iter()
        .find(|event| event["name"] == name)
        .unwrap_or_else(|| panic!("no {name} in {events:#?}"))
}

/// D01, D08, D11, D13, D14, Z95.
#[test]
fn istios_client_reads_every_resource_once() {
    let control = Control::start();
    let events = control.run("xds-client", "left", &["--node", "left", "--reconnect"]).unwrap();
    let server = named(&events, "Kubernetes//Pod/default/server");
    let workload = &server["resource"]["workload"];
    assert_eq!(workload["uid"], server["name"]);
    assert_eq!(workload["addresses"], json!(["ZEACCg=="]), "100.64.2.10");
    assert_eq!(workload["tunnelProtocol"], "HBONE");
    assert_eq!((&workload["serviceAccount"], &workload["node"]), (&"server".into(), &"right".into()));
    assert_eq!(
        (&workload["canonicalName"], &workload["canonicalRevision"]),
        (&"server".into(), &"v1".into())
    );
    let hostname = "default/server.default.svc.cluster.local";
    let ports = &workload["services"][hostname]["ports"][0];
    assert_eq!((&ports["servicePort"], &ports["targetPort"]), (&80.into(), &8080.into()));
    assert_eq!(workload["authorizationPolicies"], json!(["default/allow-client"]));

    let service = &named(&events, hostname)["resource"]["service"];
    assert_eq!(service["addresses"][0]["address"], "xhKABQ==", "198.18.128.5");
    assert_eq!(service["ports"][0]["servicePort"], 80);

    let policy = &named(&events, "default/allow-client")["resource"];
    assert_eq!((&policy["name"], &policy["scope"]), (&"allow-client".into(), &"WORKLOAD_SELECTOR".into()));
    let text = policy["groups"].to_string();
    assert!(text.contains("cluster.local/ns/default/sa/client") && text.contains("8080"), "{text}");

    let synced = interop_go::of(&events, "synced");
    assert_eq!(synced.len(), 2);
    assert_eq!(
        synced[1]["received"], 0,
        "a second stream with the versions held brings nothing: {:?}",
        synced[1]
    );
}

#[test]
fn an_empty_mesh_is_answered_too() {
    let control = Control::start_with(&[]);
    // A proxy is ready only when each type was answered once (Z06).
    let events = control.run("xds-client", "left", &["--node", "left"]).unwrap();
    assert_eq!(interop_go::of(&events, "synced")[0]["addresses"], 0);
}

/// D13.
#[test]
fn a_change_on_disk_arrives_at_istios_client() {
    let control = Control::start();
    let mut client = control.follow("left");
    control.manifest("policy.yaml", &POLICY.replace("8080", "9090"));
    let changed = client.wait_for("resource", |event| {
        event["name"] == "default/allow-client" && event["resource"].to_string().contains("9090")
    });
    assert_eq!(changed["type"], POLICY_TYPE);

    fs::remove_file(control.dir.path().join("manifests/policy.yaml")).unwrap();
    client
        .wait_for("removed", |event| event["type"] == POLICY_TYPE && event["name"] == "default/allow-client");

    fs::remove_file(control.dir.path().join("state/status/pods/default.server.json")).unwrap();
    let gone =
        |event: &Value| event["type"] == ADDRESS_TYPE && event["name"] == "Kubernetes//Pod/default/server";
    client.wait_for("removed", gone);

    // What changed is known to the client: a new stream repeats none of it.
    client.tell("reconnect");
    let synced = client.wait_for("synced", |event| event["phase"] == "following");
    assert_eq!(synced["received"], 0, "{synced}");
    client.finish();
}

#[test]
fn a_proxy_is_believed_only_with_its_nodes_token() {
    let control = Control::start();
    let refused = control.run("xds-client", "unknown", &["--node", "left"]).unwrap_err();
    assert!(refused.contains("Unauthenticated"), "{refused}");
    let other = control.run("xds-client", "left", &["--node", "right"]).unwrap_err();
    assert!(other.contains("PermissionDenied") || other.contains("Unauthenticated"), "{other}");
}

/// D07, D50, TRAP15.
#[test]
fn istios_client_gets_certificates_of_its_own_node_only() {
    let control = Control::start();
    let identity = |account: &str| format!("spiffe://cluster.local/ns/default/sa/{account}");
    let events =
        control.run("ca-client", "left", &["--identity", &identity("client"), "--ttl", "30m"]).unwrap();
    let chain = interop_go::of(&events, "chain")[0];
    let leaf = &chain["certificates"][0];
    assert_eq!(leaf["uris"], json!([identity("client")]));
    assert_eq!((&leaf["dns"], &leaf["isCA"]), (&json!([]), &false.into()));
    for fact in ["serverAuth", "clientAuth", "digitalSigning"] {
        assert_eq!(leaf[fact], true, "{fact} of {leaf}");
    }
    // RFC 5280, 4.2.1.6: the name is critical when the subject is empty.
    assert!(leaf["subject"] != "" || leaf["sanCritical"] == true, "{leaf}");
    let lifetime = leaf["notAfter"].as_i64().unwrap() - leaf["notBefore"].as_i64().unwrap();
    assert!((1800..=1800 + 300).contains(&lifetime), "asked for 1800 s, got {lifetime}");
    let root = chain["certificates"].as_array().unwrap().last().unwrap();
    assert_eq!(root["isCA"], true);

    let (client, server) = (identity("client"), identity("server"));
    let cases: [(&str, &str, Vec<&str>); 4] = [
        ("a pod of another node", "left", vec!["--identity", &server]),
        ("nobody's", "left", vec!["--identity", "spiffe://cluster.local/ns/default/sa/nobody"]),
        (
            "another trust domain",
            "left",
            vec!["--identity", "spiffe://elsewhere.example/ns/default/sa/client"],
        ),
        ("no node's token", "unknown", vec!["--identity", &client]),
    ];
    for (case, node, flags) in &cases {
        let refused = control.run("ca-client", node, flags);
        assert!(refused.as_ref().is_err_and(|text| text.contains("refused")), "{case}: {refused:?}");
    }
    // The metadata says who is meant, whatever the request for a certificate names: it is no way to another's identity.
    let flags = ["--identity", &server, "--impersonated", &client];
    let mixed = control.run("ca-client", "left", &flags).unwrap_err();
    assert!(mixed.contains("refused") || mixed.contains(&format!("the leaf is for [{client}]")), "{mixed}");
    control.run("ca-client", "right", &["--identity", &server]).unwrap();
}
