//! A sandbox of its own for each test, driven by the built `culvert` only.

#![allow(dead_code, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "test code")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use culvert_sandbox::report::Report;

/// Longest wait for anything: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// Manifests by file name; nothing runs yet.
    pub fn new(manifests: &[(&str, &str)]) -> World {
        let world = World { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(world.manifests()).unwrap();
        for (name, text) in manifests {
            world.write(name, text);
        }
        world
    }

    pub fn manifests(&self) -> PathBuf {
        self.dir.path().join("m")
    }

    pub fn state(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.manifests().join(name), text).unwrap();
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.manifests().join(name)).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_culvert"));
        command.args(args).env("CULVERT_STATE", self.state()).stdin(Stdio::null());
        command
    }

    /// Runs `culvert` to its end.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `culvert`, which must succeed; its standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}\n{}", text(&output), self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts in the background and waits until ready.
    pub fn up(&self, more: &[&str]) {
        let manifests = self.manifests();
        let mut args = vec!["up", "-f", manifests.to_str().unwrap(), "--detach"];
        args.extend(more);
        self.ok(&args);
    }

    /// Starts in the foreground and waits until ready.
    pub fn up_in_foreground(&self) -> Child {
        let manifests = self.manifests();
        let args = ["up", "-f", manifests.to_str().unwrap(), "--no-mesh"];
        let child = self.command(&args).stdout(Stdio::null()).spawn().unwrap();
        self.wait("ready", |report| {
            report.settled && report.supervisor.pid == i32::try_from(child.id()).unwrap()
        });
        child
    }

    /// `culvert exec` of a shell command; standard output and error, and the exit code.
    pub fn sh(&self, pod: &str, script: &str) -> (i32, String) {
        let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
        let output = self.run(&["exec", "-n", namespace, name, "--", "sh", "-c", script]);
        (output.status.code().unwrap(), text(&output))
    }

    pub fn report(&self) -> Option<Report> {
        let output = self.run(&["status", "-o", "json"]);
        // Problems make the exit code 1, and are in what it prints.
        (!output.stdout.is_empty()).then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// Waits until the status is as `wanted` says.
    pub fn wait(&self, what: &str, wanted: impl Fn(&Report) -> bool) -> Report {
        let started = Instant::now();
        loop {
            let report = self.report();
            if let Some(report) = report.as_ref().filter(|report| wanted(report)) {
                return report.clone();
            }
            assert!(started.elapsed() < PATIENCE, "no {what}: {report:#?}\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.state().join("supervisor.log")).unwrap_or_default()
    }

    /// Mounts below this world's directory.
    pub fn mounts(&self) -> usize {
        let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
        text.lines().filter(|line| line.contains(self.dir.path().to_str().unwrap())).count()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let output = self.run(&["down"]);
        assert!(output.status.success() || std::thread::panicking(), "{}", text(&output));
    }
}

pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

pub fn endpoints(report: &Report, service: &str) -> usize {
    let view = report.services.iter().find(|view| view.key.name == service).expect("the service");
    view.ports[0].endpoints.len()
}

/// Waits until `done` says so.
pub fn eventually(what: &str, done: impl Fn() -> bool) {
    let started = Instant::now();
    while !done() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Links, routes and settings of the machine's own namespace.
pub fn machine() -> Vec<String> {
    let mut seen: Vec<String> = fs::read_dir("/sys/class/net")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    seen.sort();
    for file in ["net/route", "sys/net/ipv4/ip_forward", "sys/net/ipv6/conf/all/forwarding"] {
        seen.push(fs::read_to_string(format!("/proc/{file}")).unwrap_or_default());
    }
    seen
}

/// A pod that runs a command.
pub fn pod(name: &str, node: &str, labels: &str, command: &str, more: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}\n\
         spec:\n  nodeName: {node}\n  terminationGracePeriodSeconds: 1\n  containers:\n  - name: main\n    image: none\n    \
         command: {command}\n{more}"
    )
}

pub const SLEEP: &str = "[sleep, \"1000000\"]";

/// A web server on port 8080 in both families that answers with the pod's name.
pub fn web(name: &str, node: &str, labels: &str) -> String {
    let script = "import http.server,os,socket\n\
        class H(http.server.BaseHTTPRequestHandler):\n\
        \x20 protocol_version='HTTP/1.1'\n\
        \x20 def do_GET(self):\n\
        \x20  b=os.environ['HOSTNAME'].encode()\n\
        \x20  self.send_response(200);self.send_header('Content-Length',str(len(b)));self.end_headers();self.wfile.write(b)\n\
        class S(http.server.ThreadingHTTPServer):\n\
        \x20 address_family=socket.AF_INET6\n\
        S(('::',8080),H).serve_forever()\n";
    let command = serde_json::to_string(&["python3", "-c", script]).unwrap();
    let more =
        "    ports: [{name: http, containerPort: 8080}]\n    readinessProbe: {tcpSocket: {port: http}}\n";
    pod(name, node, labels, &command, more)
}

pub fn service(name: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n"
    )
}
