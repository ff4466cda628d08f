//! How the programs of the mesh are started, watched and restarted, with stand-ins in their places. Needs root.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use common::{SLEEP, World, eventually, pod};
use culvert_sandbox::daemon::Role;
use culvert_sandbox::report::{DaemonReport, Report};

/// What all stand-ins begin with: option values by name, and a note of the whole command line.
const COMMON: &str = r#"#!/usr/bin/python3
import sys, os, socket, json, time, threading, http.server
a = sys.argv[1:]
def opt(name): return a[a.index(name) + 1]
def note(path):
    with open(path, 'a') as f: f.write(json.dumps(a) + '\n')
"#;

const CONTROLLER: &str = r"
note(os.path.join(os.path.dirname(opt('--root-cert-out')), 'line'))
json.load(open(opt('--node-tokens')))
assert os.path.isdir(opt('--status')) and os.path.isdir(opt('--redirection'))
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('::', 15012)); s.listen()
open(opt('--root-cert-out'), 'w').write('root')
time.sleep(1e6)
";

const ZTUNNEL: &str = r"
if a[0] == 'agent':
    node = os.path.join(opt('--state'), 'nodes', opt('--node'))
    note(os.path.join(node, 'agent-line'))
    path = os.path.join(node, 'ztunnel.sock')
    if os.path.exists(path): os.unlink(path)
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); s.bind(path); s.listen()
    while True:
        time.sleep(0.05)
        if not os.path.exists(os.path.join(node, 'hold')):
            pods = os.path.join(opt('--state'), 'status', 'pods')
            for f in os.listdir(pods):
                if f.startswith('.'): continue
                p = json.load(open(os.path.join(pods, f)))
                if p['nodeName'] == opt('--node'):
                    json.dump({'redirection': 'enabled'}, open(os.path.join(node, 'redirection', p['uid'] + '.json'), 'w'))
else:
    note(os.path.join(os.path.dirname(opt('--token-file')), 'proxy-line'))
    assert os.path.exists(opt('--xds-root-cert')) and os.path.exists(opt('--zds-socket'))
    class H(http.server.BaseHTTPRequestHandler):
        def do_GET(self): self.send_response(200 if self.path == '/healthz/ready' else 404); self.end_headers()
    http.server.ThreadingHTTPServer(('', 15021), H).serve_forever()
";

fn programs(world: &World) -> PathBuf {
    let dir = world.dir().join("bin");
    fs::create_dir(&dir).unwrap();
    for (name, body) in [("controller", CONTROLLER), ("ztunnel", ZTUNNEL)] {
        let path = dir.join(name);
        fs::write(&path, COMMON.to_owned() + body).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    dir
}

fn world() -> (World, PathBuf) {
    let ambient = "istio.io/dataplane-mode: ambient";
    let yaml = [pod("in", "a", ambient, SLEEP, ""), pod("out", "b", "", SLEEP, "")].concat();
    let world = World::new(&[("all.yaml", &yaml)]);
    let bin = programs(&world);
    (world, bin)
}

fn up(world: &World, bin: &Path) {
    let bin = bin.to_str().unwrap();
    world.up(&[
        "--bin-dir",
        bin,
        "--controller-arg=--cert-ttl",
        "--controller-arg=20s",
        "--proxy-arg=--extra",
    ]);
}

fn line(path: &Path) -> Vec<String> {
    serde_json::from_str(fs::read_to_string(path).unwrap().lines().next().unwrap()).unwrap()
}

fn program<'a>(report: &'a Report, role: Role, node: &str) -> &'a DaemonReport {
    let found = |daemon: &&DaemonReport| daemon.role == role && daemon.node.as_deref().unwrap_or("") == node;
    report.system.iter().find(found).unwrap()
}

#[test]
fn the_programs_are_started_as_agreed() {
    let (world, bin) = world();
    up(&world, &bin);
    let report = world.report().unwrap();
    assert_eq!(report.system.len(), 5, "a controller, two agents, two proxies");
    assert!(report.system.iter().all(|daemon| daemon.state.ready), "{:#?}", report.system);
    let state = world.state();
    let at = |path: &str| state.join(path).to_str().unwrap().to_owned();
    let manifests = world.manifests().to_str().unwrap().to_owned();
    let controller = line(&state.join("controller/line"));
    let expected = [
        ["--manifests", &manifests].map(str::to_owned),
        ["--status".into(), at("status")],
        ["--redirection".into(), at("nodes")],
        ["--node-tokens".into(), at("controller/node-tokens.json")],
        ["--ca-dir".into(), at("controller/ca")],
        ["--root-cert-out".into(), at("controller/root-cert.pem")],
        ["--listen", "[::]:15012"].map(str::to_owned),
        ["--cert-ttl", "20s"].map(str::to_owned),
    ];
    assert_eq!(controller, expected.concat());
    let agent = line(&state.join("nodes/a/agent-line"));
    assert_eq!(
        agent,
        ["agent", "--node", "a", "--manifests", &manifests, "--state", state.to_str().unwrap()]
    );
    let proxy = line(&state.join("nodes/b/proxy-line"));
    let expected = [
        vec!["proxy".to_owned(), "--node".into(), "b".into(), "--node-ip".into(), "198.18.0.12".into()],
        vec!["--zds-socket".into(), at("nodes/b/ztunnel.sock")],
        vec!["--xds-address".into(), "https://198.18.0.2:15012".into()],
        vec!["--xds-server-name".into(), "culvert-controller.culvert-system.svc".into()],
        vec!["--xds-root-cert".into(), at("controller/root-cert.pem")],
        vec!["--token-file".into(), at("nodes/b/token")],
        vec!["--dns-upstream".into(), "198.18.0.3:53".into(), "--extra".into()],
    ];
    assert_eq!(proxy, expected.concat());
}

#[test]
fn an_enrolled_pod_starts_when_it_is_redirected() {
    let (world, bin) = world();
    // Held before the agent looks for the first time.
    fs::create_dir_all(world.dir().join("hold")).unwrap();
    let script = bin.join("ztunnel");
    let held = fs::read_to_string(&script).unwrap();
    let hold = world.dir().join("hold");
    fs::write(&script, held.replace("os.path.join(node, 'hold')", &format!("{:?}", hold.to_str().unwrap())))
        .unwrap();
    let manifests = world.manifests();
    let args =
        ["up", "-f", manifests.to_str().unwrap(), "--bin-dir", bin.to_str().unwrap(), "-d", "--timeout", "8"];
    let output = world.run(&args);
    assert_eq!(output.status.code(), Some(1));
    assert!(common::text(&output).contains("waits for the mesh"), "{}", common::text(&output));
    let report = world.report().unwrap();
    let ready = |report: &Report, name: &str| report.pods.iter().any(|pod| pod.key.name == name && pod.ready);
    assert!(!ready(&report, "in") && ready(&report, "out") && !report.settled);
    fs::remove_dir(&hold).unwrap();
    world.wait("the pod to start", |report| ready(report, "in") && report.settled);
    assert!(world.ok(&["status"]).contains("enabled"));
}

#[test]
fn restarts_by_request_and_after_a_crash() {
    let (world, bin) = world();
    up(&world, &bin);
    let before = world.report().unwrap();
    for (role, name, node) in
        [(Role::Controller, "controller", ""), (Role::Agent, "agent", "a"), (Role::Proxy, "proxy", "b")]
    {
        let mut args = vec!["restart", name];
        if !node.is_empty() {
            args.extend(["--node", node]);
        }
        world.ok(&args);
        let after = world.report().unwrap();
        let (old, new) = (program(&before, role, node), program(&after, role, node));
        assert!(new.state.ready && new.state.pid != old.state.pid, "{name}: {new:?}");
        assert_eq!(new.state.restarts, 0, "asked for, so not counted as a crash");
    }
    assert_eq!(world.run(&["restart", "proxy", "--node", "nowhere"]).status.code(), Some(1));
    // Each proxy has a namespace of its own, and the one that replaces it another.
    let places = [&before, &world.report().unwrap()]
        .map(|report| program(report, Role::Proxy, "b").state.netns.clone());
    assert_ne!(places[0], places[1]);
    for _ in 0..3 {
        world.ok(&["restart", "proxy"]);
    }
    let code = "curl -s -o /dev/null -w %{http_code} http://127.0.0.1:15021/healthz/ready";
    assert_eq!(world.ok(&["exec", "proxy/b", "--", "sh", "-c", code]), "200");

    let pid = program(&world.report().unwrap(), Role::Agent, "b").state.pid.unwrap();
    let killed = std::process::Command::new("kill").args(["-s", "KILL", &pid.to_string()]).status().unwrap();
    assert!(killed.success());
    world.wait("another agent", |report| {
        let state = &program(report, Role::Agent, "b").state;
        state.ready && state.pid != Some(pid) && state.restarts == 1
    });
    eventually("a line in the log", || world.log().contains("ended by itself"));
}
