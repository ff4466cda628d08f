//! The Go peer against itself, on the loopback interface and without our programs: when this fails, the peer is at fault.
#![allow(clippy::unwrap_used, reason = "helpers of tests, outside the functions marked as such")]

mod interop_go;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use interop_go::Peer;
use serde_json::{Value, json};

/// A directory with a root, a server certificate, and a token.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let place = Place(tempfile::tempdir().unwrap());
        interop_go::run(&["init-ca", "--dir", &place.file("ca")]);
        fs::write(place.path("token"), "a-token").unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Certificate and key for one of the mesh.
    fn issue(&self, account: &str) -> [String; 2] {
        let identity = format!("spiffe://cluster.local/ns/default/sa/{account}");
        interop_go::run(&["issue", "--dir", &self.file("ca"), "--name", account, "--identity", &identity]);
        [self.file(&format!("ca/{account}.pem")), self.file(&format!("ca/{account}-key.pem"))]
    }

    fn publish(&self, workloads: &[&str]) {
        let workloads: Vec<Value> =
            workloads.iter().map(|uid| json!({"uid": uid, "addresses": ["wAACBw=="]})).collect();
        let policies = json!([{"name": "p", "namespace": "default", "scope": "NAMESPACE"}]);
        let manifest = json!({"workloads": workloads, "policies": policies});
        fs::write(self.path("manifest.json"), manifest.to_string()).unwrap();
    }

    fn serve_xds(&self) -> (Peer, String) {
        let [cert, key, root, root_key] = ["server.pem", "server-key.pem", "root.pem", "root-key.pem"]
            .map(|name| self.file(&format!("ca/{name}")));
        let (manifest, token) = (self.file("manifest.json"), self.file("token"));
        let mut args = vec!["serve-xds", "--listen", "127.0.0.1:0", "--cert", &cert, "--key", &key];
        args.extend([
            "--ca-cert",
            &root,
            "--ca-key",
            &root_key,
            "--manifest",
            &manifest,
            "--token-file",
            &token,
        ]);
        let mut server = Peer::start(&args);
        let address = server.wait("listening")["address"].as_str().unwrap().to_owned();
        (server, address)
    }

    fn client<'a>(&self, root: &'a str, token: &'a str, command: &'a str, address: &'a str) -> Vec<&'a str> {
        vec![command, "--address", address, "--root-cert", root, "--token-file", token]
    }
}

#[test]
fn resources_changes_and_a_second_stream() {
    let place = Place::new();
    place.publish(&["a", "b"]);
    let (mut server, address) = place.serve_xds();
    let (root, token) = (place.file("ca/root.pem"), place.file("token"));
    let mut args = place.client(&root, &token, "xds-client", &address);
    args.push("--follow");
    let mut client = Peer::start(&args);
    let synced = client.wait_for("synced", |event| event["phase"] == "following");
    assert_eq!(
        (&synced["received"], &synced["addresses"], &synced["policies"]),
        (&0.into(), &2.into(), &1.into())
    );
    assert_eq!(client.of("resource").len(), 3);

    place.publish(&["b", "c"]);
    server.tell("reload");
    client.wait_for("resource", |event| event["name"] == "c");
    client.wait_for("removed", |event| event["name"] == "a");
    assert_eq!(client.of("resource").len(), 4, "what did not change is not sent again");

    client.tell("reconnect");
    let synced = client.wait_for("synced", |event| event["phase"] == "following");
    assert_eq!((&synced["received"], &synced["addresses"]), (&0.into(), &2.into()));
    client.finish();
    for _ in 0..7 {
        server.wait("ack");
    }
    assert!(server.of("nack").is_empty() && server.of("stray-nonce").is_empty());
}

#[test]
fn certificates_need_a_token_and_one_identity() {
    let place = Place::new();
    place.publish(&[]);
    let (mut server, address) = place.serve_xds();
    let (root, token) = (place.file("ca/root.pem"), place.file("token"));
    let identity = "spiffe://cluster.local/ns/default/sa/a";
    let ask = |token: &str, identity: &str, impersonated: &str| {
        let args = place.client(&root, token, "ca-client", &address);
        let args = [&args[..], &["--identity", identity, "--impersonated", impersonated]].concat();
        interop_go::try_run(None, &args)
    };
    let events = ask(&token, identity, identity).unwrap();
    let chain = interop_go::of(&events, "chain")[0];
    assert_eq!(chain["certificates"][0]["uris"], json!([identity]));
    assert_eq!(server.wait("certificate")["identity"], identity);
    let other = place.file("other");
    fs::write(&other, "another-token").unwrap();
    let refusals = [
        (&other, identity, identity),
        (&token, identity, "spiffe://x/ns/a/sa/b"),
        (&token, "https://a", "https://a"),
    ];
    for (token, identity, impersonated) in refusals {
        assert!(ask(token, identity, impersonated).unwrap_err().contains("refused"));
        server.wait("certificate-refused");
    }
}

#[test]
fn a_namespace_passes_from_agent_to_proxy() {
    let place = Place::new();
    let socket = place.file("zds.sock");
    let mut agent = Peer::start(&["serve-zds", "--socket", &socket]);
    agent.wait("listening");
    agent.tell("add uid-1 default a account /proc/self/ns/net");
    agent.wait("waiting");
    let mut proxy = Peer::start(&["zds-client", "--socket", &socket]);
    let add = proxy.wait("message");
    assert_eq!(
        (&add["kind"], &add["uid"], &add["serviceAccount"]),
        (&"add".into(), &"uid-1".into(), &"account".into())
    );
    let own = fs::metadata(Path::new("/proc/self/ns/net")).unwrap();
    assert_eq!(add["descriptors"][0]["inode"], own.ino());
    assert_eq!(add["descriptors"][0]["kind"], "network namespace");
    assert_eq!(proxy.wait("message")["kind"], "snapshot");
    agent.tell("del uid-1");
    assert_eq!(proxy.wait("message")["kind"], "del");
    for kind in ["add", "snapshot", "del"] {
        let ack = agent.wait("ack");
        assert_eq!((&ack["for"], &ack["error"]), (&kind.into(), &"".into()));
    }
}

#[test]
fn a_tunnel_carries_bytes_and_checks_both_ends() {
    let place = Place::new();
    let ([cert, key], [client_cert, client_key]) = (place.issue("server"), place.issue("client"));
    let root = place.file("ca/root.pem");
    let args = ["hbone-serve", "--listen", "127.0.0.1:0", "--cert", &cert, "--key", &key, "--root", &root];
    let mut server = Peer::start(&[&args[..], &["--echo", "127.0.0.1:0"]].concat());
    let target = server.wait("echo-listening")["address"].as_str().unwrap().to_owned();
    let proxy = server.wait("listening")["address"].as_str().unwrap().to_owned();
    let dial = |cert: &str, key: &str, expect: &str, bytes: &str| {
        let args = [
            "hbone-dial",
            "--proxy",
            &proxy,
            "--target",
            &target,
            "--cert",
            cert,
            "--key",
            key,
            "--root",
            &root,
        ];
        interop_go::try_run(None, &[&args[..], &["--expect", expect, "--bytes", bytes]].concat())
    };
    let expected = "spiffe://cluster.local/ns/default/sa/server";
    let events = dial(&client_cert, &client_key, expected, "10000000").unwrap();
    assert_eq!(interop_go::of(&events, "echo")[0]["bytes"], 10_000_000);
    let connect = server.wait("connect");
    assert_eq!(connect["peer"], json!(["spiffe://cluster.local/ns/default/sa/client"]));
    assert_eq!(connect["authority"], target);
    assert!(dial(&client_cert, &client_key, "spiffe://cluster.local/ns/default/sa/other", "1").is_err());
    let stranger = Place::new();
    let [cert, key] = stranger.issue("client");
    assert!(dial(&cert, &key, expected, "1").is_err(), "another root");
}
