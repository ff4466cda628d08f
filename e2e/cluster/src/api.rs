//! Requests to the API server, from inside the control plane's namespace.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::Programs;
use crate::control_plane::{ADMIN, API_ADDRESS};
use crate::files::Files;
use crate::process::POLL;

/// An administrator's view of the cluster.
#[derive(Clone, Debug)]
pub struct Api {
    files: Files,
    programs: Programs,
}

impl Api {
    pub(crate) fn new(files: Files, programs: Programs) -> Self {
        Self { files, programs }
    }

    /// A command in the control plane's namespace, with KUBECONFIG set and the cluster's programs first in PATH.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.files.control_plane().display())).arg("--").arg(program);
        command.env("KUBECONFIG", self.files.kubeconfig()).env("PATH", self.programs.search_path());
        command.env("HELM_CACHE_HOME", self.files.at("helm")).env("HELM_CONFIG_HOME", self.files.at("helm"));
        for proxy in ["http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"] {
            command.env_remove(proxy);
        }
        command
    }

    /// `kubectl ARGS`; what it said.
    ///
    /// # Errors
    /// If it fails; with what it said.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        crate::run(self.command("kubectl").args(args))
    }

    /// `kubectl apply -f -`, with that text.
    ///
    /// # Errors
    /// If the text is refused; with what kubectl said.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        let mut command = self.command("kubectl");
        command.args(["apply", "--server-side", "--force-conflicts", "-f", "-"]);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("piped")?.write_all(yaml.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl apply: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Asks; what is no JSON comes back as `{"text": ...}`.
    ///
    /// # Errors
    /// If the API server does not answer.
    pub fn ask(&self, method: &str, path: &str, kind: &str, body: Option<&Value>) -> Result<Value> {
        let mut curl = self.command("curl");
        curl.args(["-s", "--max-time", "20", "--noproxy", "*", "-X", method, "--cacert"]);
        curl.arg(self.files.at("ca.pem")).arg(format!("https://{API_ADDRESS}:6443{path}"));
        curl.args(["-H", &format!("authorization: Bearer {ADMIN}"), "-H", &format!("content-type: {kind}")]);
        if let Some(body) = body {
            curl.args(["-d", &body.to_string()]);
        }
        let text = crate::run(&mut curl).with_context(|| format!("{method} {path}"))?;
        Ok(serde_json::from_str(&text).unwrap_or_else(|_| json!({ "text": text })))
    }

    /// An object or a list. What is not there is null.
    ///
    /// # Errors
    /// If the API server does not answer or refuses.
    pub fn get(&self, path: &str) -> Result<Value> {
        let answer = self.ask("GET", path, "application/json", None)?;
        if answer["kind"] == "Status" && answer["status"] == "Failure" {
            ensure!(answer["code"] == 404, "GET {path}: {}", answer["message"]);
            return Ok(Value::Null);
        }
        Ok(answer)
    }

    /// Makes an object.
    ///
    /// # Errors
    /// If it is refused.
    pub fn create(&self, path: &str, object: &Value) -> Result<Value> {
        accepted(&format!("POST {path}"), self.ask("POST", path, "application/json", Some(object))?)
    }

    /// Merges into an object.
    ///
    /// # Errors
    /// If it is refused.
    pub fn patch(&self, path: &str, patch: &Value) -> Result<Value> {
        let answer = self.ask("PATCH", path, "application/merge-patch+json", Some(patch))?;
        accepted(&format!("PATCH {path}"), answer)
    }

    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// If it is refused.
    pub fn delete(&self, path: &str) -> Result<()> {
        let answer = self.ask("DELETE", path, "application/json", None)?;
        ensure!(answer["status"] != "Failure" || answer["code"] == 404, "DELETE {path}: {answer}");
        Ok(())
    }

    /// Looks until `look` finds something.
    ///
    /// # Errors
    /// `what`, if that takes longer than `patience`; with the last error of `look`.
    pub fn wait<T>(
        &self,
        what: &str,
        patience: Duration,
        mut look: impl FnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let started = Instant::now();
        loop {
            let seen = look(self);
            match seen {
                Ok(Some(found)) => return Ok(found),
                _ if started.elapsed() < patience => std::thread::sleep(POLL),
                Ok(None) => bail!("{what}: not within {patience:?}"),
                Err(error) => return Err(error.context(format!("{what}: not within {patience:?}"))),
            }
        }
    }
}

fn accepted(what: &str, answer: Value) -> Result<Value> {
    ensure!(answer["kind"] != "Status", "{what}: {}", answer["message"]);
    Ok(answer)
}
