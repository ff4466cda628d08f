//! A control plane of Kubernetes on loopback, without nodes: etcd, kube-apiserver and helm, and our controller and proxies beside
//! them.
//!
//! Needs `KUBERNETES_BIN`, the directory of kube-apiserver and helm, and Debian's etcd: `make api-server`. Without it
//! [`Cluster::start`] fails.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::programs;
use crate::world::{PATIENCE, wait_for};

/// The token of the kubeconfig: of the group system:masters.
pub const ADMIN: &str = "administrator";
/// What proxies' tokens are for.
pub const AUDIENCE: &str = "istio-ca";
/// Where the chart is installed.
pub const SYSTEM: &str = "culvert-system";
/// The ConfigMap of the trust bundle.
pub const ROOT_CERTIFICATE: &str = "istio-ca-root-cert";
/// The name in the controller's certificate.
pub const CONTROLLER_NAME: &str = "culvert-controller.culvert-system.svc";
/// How a merge patch is sent.
pub const MERGE: &str = "application/merge-patch+json";

/// A control plane of Kubernetes, and what of ours runs beside it. Ends when dropped; after a panic its logs are kept and their
/// place told.
#[derive(Debug)]
pub struct Cluster {
    dir: tempfile::TempDir,
    programs: PathBuf,
    /// Where the API server listens, on 127.0.0.1.
    pub port: u16,
    etcd: String,
    settings: Vec<String>,
    running: Vec<(String, Child)>,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for (_, child) in self.running.iter_mut().rev() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let kept = self.dir.path().to_owned();
            self.dir.disable_cleanup(true);
            eprintln!("logs are in {}", kept.display());
        }
    }
}

impl Cluster {
    /// Starts etcd and an API server, and waits until it is ready.
    ///
    /// # Errors
    /// If a program is missing or does not start; says which.
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// As [`start`](Self::start), with further flags for the API server.
    ///
    /// # Errors
    /// As there.
    pub fn start_with(settings: &[&str]) -> Result<Self> {
        #[allow(clippy::disallowed_methods, reason = "a test's own setting")]
        let programs = std::env::var_os("KUBERNETES_BIN").context(
            "KUBERNETES_BIN is not set: the directory of kube-apiserver and helm (`make api-server` builds it)",
        )?;
        let (port, etcd, peers) = (free_port()?, free_port()?, free_port()?);
        let mut cluster = Self {
            dir: tempfile::tempdir()?,
            programs: programs.into(),
            port,
            etcd: format!("http://127.0.0.1:{etcd}"),
            settings: settings.iter().map(|&setting| setting.to_owned()).collect(),
            running: Vec::new(),
        };
        cluster.write("tokens.csv", &format!("{ADMIN},admin,1,\"system:masters\"\n"))?;
        cluster.write("kubeconfig", &kubeconfig(port))?;
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        cluster.write("accounts.key", &key.serialize_pem())?;
        cluster.write("accounts.pem", &key.public_key_pem())?;
        let mut command = Command::new("etcd");
        command.arg("--data-dir").arg(cluster.path("etcd")).arg("--unsafe-no-fsync");
        command.args(["--listen-client-urls", &cluster.etcd, "--advertise-client-urls", &cluster.etcd]);
        command.args(["--listen-peer-urls", &format!("http://127.0.0.1:{peers}")]);
        cluster.spawn("etcd", command)?;
        cluster.start_api_server()?;
        Ok(cluster)
    }

    /// Starts the API server, again after [`stop`](Self::stop) of `kube-apiserver`, and waits until it is ready.
    ///
    /// # Errors
    /// If it does not get there.
    pub fn start_api_server(&mut self) -> Result<()> {
        self.begin_api_server()?;
        wait_for("the API server", PATIENCE * 6, || Ok((self.get("/readyz")?["text"] == "ok").then_some(())))
            .with_context(|| {
                let log = self.log("kube-apiserver").unwrap_or_default();
                let last: Vec<_> = log.lines().rev().take(5).collect();
                format!("the last of its log, newest first: {last:#?}")
            })
    }

    /// As [`start_api_server`](Self::start_api_server), without waiting.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin_api_server(&mut self) -> Result<()> {
        let mut command = Command::new(self.programs.join("kube-apiserver"));
        let file = |name: &str| self.path(name).display().to_string();
        command.args([
            format!("--etcd-servers={}", self.etcd),
            format!("--secure-port={}", self.port),
            "--bind-address=127.0.0.1".into(),
            format!("--cert-dir={}", file("certificates")),
            format!("--service-account-key-file={}", file("accounts.pem")),
            format!("--service-account-signing-key-file={}", file("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--token-auth-file={}", file("tokens.csv")),
            "--authorization-mode=RBAC".into(),
            "--service-cluster-ip-range=198.18.128.0/20".into(),
        ]);
        command.args(&self.settings);
        self.spawn("kube-apiserver", command)
    }

    /// A file in the cluster's own directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file there.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        fs::write(self.path(name), text).with_context(|| format!("writing {name}"))
    }

    /// All that a program wrote since it was last started.
    ///
    /// # Errors
    /// If none of that name was started.
    pub fn log(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.path(&format!("{name}.log"))).with_context(|| format!("the log of {name}"))
    }

    /// Starts a program that ends with the cluster. What it writes is in its log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(&mut self, name: &str, mut command: Command) -> Result<()> {
        let log = File::create(self.path(&format!("{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {name}: {command:?}"))?;
        self.running.push((name.to_owned(), child));
        Ok(())
    }

    /// Kills a program.
    ///
    /// # Errors
    /// If none of that name runs.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        let at = self.running.iter().position(|(running, _)| running == name);
        let (_, mut child) = self.running.remove(at.with_context(|| format!("{name} does not run"))?);
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Whether a program ended by itself; it is forgotten then, its log is kept.
    ///
    /// # Errors
    /// If none of that name runs.
    pub fn ended(&mut self, name: &str) -> Result<bool> {
        let at = self.running.iter().position(|(running, _)| running == name);
        let at = at.with_context(|| format!("{name} does not run"))?;
        let ended = self.running[at].1.try_wait()?.is_some();
        if ended {
            self.running.remove(at);
        }
        Ok(ended)
    }

    /// The process of a program.
    ///
    /// # Errors
    /// If none of that name runs.
    pub fn pid(&self, name: &str) -> Result<u32> {
        let found = self.running.iter().find(|(running, _)| running == name);
        Ok(found.with_context(|| format!("{name} does not run"))?.1.id())
    }

    /// Forgets all of etcd's history: who was away and asks for what came since gets a 410.
    ///
    /// # Errors
    /// If etcd does not do it.
    pub fn compact(&self) -> Result<()> {
        let ask = |path: &str, body: Value| -> Result<Value> {
            let url = format!("{}/v3/kv/{path}", self.etcd);
            let output = Command::new("curl")
                .args(["-s", "--noproxy", "*", &url, "-d", &body.to_string()])
                .output()?;
            serde_json::from_slice(&output.stdout).with_context(|| format!("etcd: {path}"))
        };
        // Base64 of one zero byte: no key of the API server's, but the answer has the revision.
        let now = ask("range", json!({ "key": "AA==" }))?["header"]["revision"].take();
        let answer = ask("compaction", json!({ "revision": now, "physical": true }))?;
        ensure!(answer["header"].is_object(), "etcd does not compact: {answer}");
        Ok(())
    }

    /// Asks the API server; what is no JSON comes back as `{"text": ...}`.
    ///
    /// # Errors
    /// If curl cannot be run.
    pub fn ask(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Result<Value> {
        let url = format!("https://127.0.0.1:{}{path}", self.port);
        let mut curl = Command::new("curl");
        curl.args(["-sk", "--noproxy", "*", "-X", method, &url]);
        curl.args(["-H", &format!("authorization: Bearer {ADMIN}"), "-H", &format!("content-type: {kind}")]);
        if let Some(body) = body {
            curl.args(["-d", &body.to_string()]);
        }
        let text = String::from_utf8(curl.output()?.stdout)?;
        Ok(serde_json::from_str(&text).unwrap_or_else(|_| json!({ "text": text })))
    }

    /// What is at a path.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn get(&self, path: &str) -> Result<Value> {
        self.ask("GET", path, "application/json", None)
    }

    /// Makes an object; the answer is it, or a Status that says why not.
    ///
    /// # Errors
    /// As [`ask`](Self::ask).
    pub fn make(&self, path: &str, object: &Value) -> Result<Value> {
        self.ask("POST", path, "application/json", Some(object))
    }

    /// As [`make`](Self::make), of what must be accepted.
    ///
    /// # Errors
    /// If it is not, with the API server's words.
    pub fn must_make(&self, path: &str, object: &Value) -> Result<()> {
        let answer = self.make(path, object)?;
        ensure!(answer["kind"] != "Status", "{path}: {answer}");
        Ok(())
    }

    /// Changes an object by a merge patch, which must be accepted.
    ///
    /// # Errors
    /// If it is not, with the API server's words.
    pub fn must_patch(&self, path: &str, change: &Value) -> Result<()> {
        let answer = self.ask("PATCH", path, MERGE, Some(change))?;
        ensure!(answer["kind"].is_string() && answer["kind"] != "Status", "{path}: {answer}");
        Ok(())
    }

    /// Deletes an object at once.
    ///
    /// # Errors
    /// If it was not there, or may not go.
    pub fn must_delete(&self, path: &str) -> Result<()> {
        let answer = self.ask("DELETE", &format!("{path}?gracePeriodSeconds=0"), "application/json", None)?;
        ensure!(answer["kind"].is_string() && answer["status"] != "Failure", "{path}: {answer}");
        Ok(())
    }

    /// Sends many requests, some at once, by one curl: thousands in a minute. Each is a path and a body.
    ///
    /// # Errors
    /// If one is not answered with success; says how the first of them was answered.
    pub fn ask_all(
        &self,
        method: &str,
        kind: &str,
        requests: impl IntoIterator<Item = (String, String)>,
    ) -> Result<()> {
        let mut config = String::new();
        let mut sent = 0;
        for (path, body) in requests {
            let body = body.replace('\\', "\\\\").replace('"', "\\\"");
            let url = format!("https://127.0.0.1:{}{path}", self.port);
            let separator = if sent == 0 { "" } else { "next\n" };
            writeln!(
                config,
                "{separator}url = \"{url}\"\nrequest = \"{method}\"\ndata = \"{body}\"\ninsecure\nnoproxy = \"*\"\n\
                 header = \"authorization: Bearer {ADMIN}\"\nheader = \"content-type: {kind}\"\n\
                 output = \"/dev/null\"\nwrite-out = \"%{{http_code}} %{{url}}\\n\""
            )?;
            sent += 1;
        }
        self.write("requests", &config)?;
        let output = Command::new("curl")
            .args([
                "-s",
                "--parallel",
                "--parallel-max",
                "32",
                "--retry",
                "5",
                "--retry-delay",
                "1",
                "--config",
            ])
            .arg(self.path("requests"))
            .output()
            .context("curl")?;
        let text = String::from_utf8(output.stdout)?;
        // 409: it exists, by an attempt whose answer an etcd on a busy machine was too late for.
        let accepted = |line: &str| line.starts_with('2') || line.starts_with("409 ");
        let good = text.lines().filter(|line| accepted(line)).count();
        let bad = text.lines().find(|line| !accepted(line));
        ensure!(good == sent, "{good} of {sent} were accepted; the first that was not: {bad:?}");
        Ok(())
    }

    /// Makes a pod with the label `app: NAME` on a node. It has no status: nothing runs it.
    ///
    /// # Errors
    /// If it is not accepted.
    pub fn pod(
        &self,
        namespace: &str,
        name: &str,
        node: &str,
        account: &str,
        annotations: &Value,
    ) -> Result<()> {
        let spec = json!({
            "nodeName": node, "serviceAccountName": account, "automountServiceAccountToken": false,
            "containers": [{ "name": "c", "image": "none" }],
        });
        let labels = json!({ "app": name });
        let metadata = json!({ "name": name, "labels": labels, "annotations": annotations });
        self.must_make(
            &format!("/api/v1/namespaces/{namespace}/pods"),
            &json!({ "metadata": metadata, "spec": spec }),
        )
    }

    /// What kubelet would say of a pod that runs and is ready.
    ///
    /// # Errors
    /// If it is not accepted.
    pub fn runs(&self, namespace: &str, name: &str, address: &str) -> Result<()> {
        let status = json!({ "status": {
            "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }],
            "conditions": [{ "type": "Ready", "status": "True" }],
        } });
        self.must_patch(&format!("/api/v1/namespaces/{namespace}/pods/{name}/status"), &status)
    }

    /// A token of a service account that is bound to a pod, as kubelet would ask for it, in a file.
    ///
    /// # Errors
    /// If the API server gives none.
    pub fn token(
        &self,
        file: &str,
        namespace: &str,
        account: &str,
        pod: &str,
        audience: &str,
    ) -> Result<PathBuf> {
        let bound = json!({ "kind": "Pod", "apiVersion": "v1", "name": pod });
        let spec = json!({ "audiences": [audience], "boundObjectRef": bound, "expirationSeconds": 600 });
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.make(&path, &json!({ "spec": spec }))?;
        let token = answer["status"]["token"].as_str().with_context(|| format!("no token: {answer}"))?;
        self.write(file, token)?;
        Ok(self.path(file))
    }

    /// Writes the root certificate that the controller handed out to a namespace into `root.pem`.
    ///
    /// # Errors
    /// If it does not come.
    pub fn root_certificate(&self, namespace: &str) -> Result<PathBuf> {
        let path = format!("/api/v1/namespaces/{namespace}/configmaps/{ROOT_CERTIFICATE}");
        let root = wait_for("the root certificate", PATIENCE, || {
            Ok(self.get(&path)?["data"]["root-cert.pem"].as_str().map(str::to_owned))
        })?;
        self.write("root.pem", &root)?;
        Ok(self.path("root.pem"))
    }

    /// Runs helm; `install` with the chart.
    ///
    /// # Errors
    /// If it fails, with what it says.
    pub fn helm(&self, args: &[&str]) -> Result<()> {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert");
        let mut command = Command::new(self.programs.join("helm"));
        command
            .env("KUBECONFIG", self.path("kubeconfig"))
            .env("HELM_CACHE_HOME", self.path("helm"))
            .args(args);
        if args.first() == Some(&"install") {
            command.arg(chart);
        }
        let output = command.output().context("helm")?;
        ensure!(output.status.success(), "helm {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

fn kubeconfig(port: u16) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{ "name": "test", "cluster": {
            "server": format!("https://127.0.0.1:{port}"), "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "test", "user": { "token": ADMIN } }],
        "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
    })
    .to_string()
}

/// Free when asked; nothing else of these tests takes it in between.
///
/// # Errors
/// If there is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// What a program's page says; empty while nobody listens.
fn page(port: u16, path: &str) -> Result<String> {
    let url = format!("http://127.0.0.1:{port}{path}");
    Ok(String::from_utf8(Command::new("curl").args(["-s", "--noproxy", "*", &url]).output()?.stdout)?)
}

/// A controller, and where it serves.
#[derive(Debug)]
pub struct Controller {
    /// Workloads, policies and certificates.
    pub xds: u16,
    /// Readiness, metrics and what it holds.
    pub pages: u16,
}

impl Controller {
    /// Starts the controller on the API server, and waits until it is ready. Its log is that of `controller`.
    ///
    /// # Errors
    /// If it does not get there.
    pub fn start(cluster: &mut Cluster) -> Result<Self> {
        Self::start_as(cluster, "controller", &[])
    }

    /// As [`start`](Self::start), another one, with its own name and further flags.
    ///
    /// # Errors
    /// As there.
    pub fn start_as(cluster: &mut Cluster, name: &str, flags: &[&str]) -> Result<Self> {
        let controller = Self::begin(cluster, name, flags)?;
        wait_for("the controller", PATIENCE, || {
            Ok((controller.page("/healthz/ready")?.trim() == "ready").then_some(()))
        })
        .with_context(|| cluster.log(name).unwrap_or_default())?;
        Ok(controller)
    }

    /// As [`start_as`](Self::start_as), without waiting.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn begin(cluster: &mut Cluster, name: &str, flags: &[&str]) -> Result<Self> {
        let (xds, pages) = (free_port()?, free_port()?);
        let mut command = Command::new(programs::program("controller")?);
        command.env("KUBECONFIG", cluster.path("kubeconfig"));
        command.args(["--source", "kubernetes", "--untaint-nodes"]);
        command.args([
            "--listen",
            &format!("127.0.0.1:{xds}"),
            "--metrics-listen",
            &format!("127.0.0.1:{pages}"),
        ]);
        command.args(flags);
        cluster.spawn(name, command)?;
        Ok(Self { xds, pages })
    }

    /// One of its pages.
    ///
    /// # Errors
    /// If it is no text.
    pub fn page(&self, path: &str) -> Result<String> {
        page(self.pages, path)
    }

    /// What is sent to proxies.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn index(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.page("/debug/index")?)?)
    }

    /// A workload as proxies get it, by uid.
    ///
    /// # Errors
    /// If it does not answer.
    pub fn workload(&self, uid: &str) -> Result<Option<Value>> {
        let workload = self.index()?["addresses"][uid]["resource"]["workload"].take();
        Ok((!workload.is_null()).then_some(workload))
    }

    /// Starts a proxy that says it is on `node`, waits until its log says `wanted`, and ends it.
    ///
    /// # Errors
    /// If it says something else, with all that it said.
    pub fn proxy_says(&self, cluster: &mut Cluster, node: &str, token: &Path, wanted: &str) -> Result<()> {
        Proxy::start(cluster, "proxy", self.xds, node, token)?;
        let said = wait_for(wanted, PATIENCE, || Ok(cluster.log("proxy")?.contains(wanted).then_some(())));
        cluster.stop("proxy")?;
        said.with_context(|| cluster.log("proxy").unwrap_or_default())
    }
}

/// A proxy without pods, and where its pages are.
#[derive(Debug)]
pub struct Proxy {
    /// Its admin pages.
    pub admin: u16,
    /// Its metrics.
    pub metrics: u16,
}

impl Proxy {
    /// Starts one that says it is on `node`. Its log is that of `name`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(cluster: &mut Cluster, name: &str, xds: u16, node: &str, token: &Path) -> Result<Self> {
        let root = cluster.root_certificate(SYSTEM)?;
        let mut command = Command::new(programs::program("ztunnel")?);
        command.args(["proxy", "--node", node, "--xds-address", &format!("https://127.0.0.1:{xds}")]);
        command.args(["--xds-server-name", CONTROLLER_NAME, "--xds-root-cert"]).arg(root);
        command.arg("--token-file").arg(token).arg("--zds-socket").arg(cluster.path(&format!("{name}.zds")));
        let (admin, metrics, readiness) = (free_port()?, free_port()?, free_port()?);
        for (listen, port) in
            [("--admin-listen", admin), ("--metrics-listen", metrics), ("--readiness-listen", readiness)]
        {
            command.args([listen, &format!("127.0.0.1:{port}")]);
        }
        // Each state that it puts in force is a line in its log.
        command.env("LOG_LEVEL", "info,culvert_ztunnel::control=debug");
        cluster.spawn(name, command)?;
        Ok(Self { admin, metrics })
    }

    /// One of its admin pages; empty while nobody listens.
    ///
    /// # Errors
    /// If it is no text.
    pub fn page(&self, path: &str) -> Result<String> {
        page(self.admin, path)
    }
}
