//! Describing a world.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Pod, World, said};
use crate::programs::program;

/// What a world will be made of.
#[derive(Debug)]
pub struct WorldBuilder {
    name: String,
    peer: PathBuf,
    files: Vec<(String, String)>,
    arguments: Vec<String>,
}

impl WorldBuilder {
    pub(super) fn new(name: &str, peer: &Path) -> Self {
        // One connection, one line of JSON.
        let arguments = ["--proxy-arg=--log-format", "--proxy-arg=json"].map(str::to_owned).to_vec();
        Self { name: name.to_owned(), peer: peer.to_owned(), files: Vec::new(), arguments }
    }

    /// A namespace, in its own file `ns-NAME.yaml`, so that a test may edit it.
    #[must_use]
    pub fn namespace(self, name: &str, mesh: bool) -> Self {
        self.manifest(&format!("ns-{name}.yaml"), &namespace(name, mesh))
    }

    /// A pod that does nothing by itself, with a service account of its name.
    #[must_use]
    pub fn client(self, pod: Pod, node: &str) -> Self {
        self.pod(pod, node, "sleep, infinity", "")
    }

    /// A pod that runs the peer's server, with `extra` more ports, ready when it listens.
    #[must_use]
    pub fn server(self, pod: Pod, node: &str, extra: u16) -> Self {
        let command = format!("'{}', serve, --extra, '{extra}'", self.peer.display());
        let probe = ", readinessProbe: {tcpSocket: {port: 9000}}";
        self.pod(pod, node, &command, probe)
    }

    /// A Service for the pods labelled `app`, with the peer's ports.
    #[must_use]
    pub fn service(self, namespace: &str, name: &str, app: &str) -> Self {
        let yaml = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\nspec:\n  \
             selector: {{app: {app}}}\n  ipFamilyPolicy: PreferDualStack\n  ports:\n    \
             - {{name: command, port: 9000}}\n    - {{name: banner, port: 9001}}\n"
        );
        self.manifest(&format!("service-{namespace}-{name}.yaml"), &yaml)
    }

    /// Any manifest.
    #[must_use]
    pub fn manifest(mut self, file: &str, yaml: &str) -> Self {
        self.files.push((file.to_owned(), yaml.to_owned()));
        self
    }

    /// Every manifest of a folder of `examples/`, so that what users are shown is what was run.
    ///
    /// # Errors
    /// If there is no such example, or none of its files can be read.
    pub fn example(mut self, name: &str) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
        let entries = fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))?;
        for entry in entries {
            let path = entry?.path();
            let text = fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            self = self.manifest(&file, &text);
        }
        ensure!(!self.files.is_empty(), "{} holds no manifest", folder.display());
        Ok(self)
    }

    /// One more argument of `culvert up`, such as `--controller-arg=--cert-ttl`.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Starts it and waits until everything is ready.
    ///
    /// # Errors
    /// Without root, without the programs, or when something does not become ready.
    pub fn start(self) -> Result<World> {
        let culvert = program("culvert")?;
        // A socket's path must be short: see the sandbox's state directory.
        let dir = std::env::temp_dir().join(format!("cve2e-{}-{}", self.name, std::process::id()));
        fs::create_dir_all(dir.join("m"))?;
        for (file, yaml) in &self.files {
            fs::write(dir.join("m").join(file), yaml)?;
        }
        let world = World { culvert, peer: self.peer, dir };
        let output = world.up(&self.arguments).output().context("culvert up")?;
        if !output.status.success() {
            world.keep_logs();
        }
        ensure!(output.status.success(), "culvert up: {}", said(&output));
        Ok(world)
    }

    fn pod(self, pod: Pod, node: &str, command: &str, more: &str) -> Self {
        let Pod(namespace, name) = pod;
        let yaml = format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, namespace: {namespace}}}\n---\n\
             apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}, labels: {{app: {name}}}}}\n\
             spec:\n  nodeName: {node}\n  serviceAccountName: {name}\n  terminationGracePeriodSeconds: 1\n  \
             containers:\n    - {{name: main, image: peer, command: [{command}]{more}}}\n"
        );
        self.manifest(&format!("pod-{namespace}-{name}.yaml"), &yaml)
    }
}

impl World {
    fn up(&self, arguments: &[String]) -> Command {
        let mut command = self.command();
        command.args(["up", "--detach", "-f"]).arg(self.dir.join("m")).args(arguments);
        command
    }
}

/// A namespace's manifest, in the mesh or not.
#[must_use]
pub fn namespace(name: &str, mesh: bool) -> String {
    let labels = if mesh { ", labels: {istio.io/dataplane-mode: ambient}" } else { "" };
    format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {name}{labels}}}\n")
}
