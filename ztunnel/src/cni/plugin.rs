//! The plugin's commands, as the CNI specification has them.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use culvert_k8s_api::enrolment::Settings;
use serde::Deserialize;
use serde_json::{Value, json};

use super::ask::{AskError, ask};
use super::{AWAY, AddRequest, PluginConfig, log, lookup};

/// Versions of the specification that are understood.
const VERSIONS: [&str; 5] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0", "0.3.0"];
/// Between two tries.
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes of a configuration with a former result: some KiB.
const MAX_CONFIG: u64 = 1024 * 1024;

/// Codes of errors in the specification.
const UNSUPPORTED: u32 = 1;
const ENVIRONMENT: u32 = 4;
const DECODING: u32 = 6;
const INVALID_CONFIG: u32 = 7;
const TRY_AGAIN: u32 = 11;

/// What the runtime says in the environment.
#[derive(Clone, Debug, Default, Parser)]
#[command(name = "culvert-cni", disable_help_flag = true)]
pub struct Invocation {
    /// What to do; absent if no runtime started this program.
    #[arg(long, env = "CNI_COMMAND")]
    pub command: Option<String>,
    /// Path of the pod's network namespace.
    #[arg(long, env = "CNI_NETNS", default_value = "", value_parser = path)]
    pub netns: PathBuf,
    /// Who the pod is, `KEY=VALUE` joined by semicolons.
    #[arg(long, env = "CNI_ARGS", default_value = "")]
    pub args: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Input {
    #[serde(default)]
    cni_version: String,
    prev_result: Option<Value>,
    #[serde(flatten)]
    plugin: PluginConfig,
}

/// Why it did not succeed.
#[derive(Debug, PartialEq)]
pub struct Failure {
    code: u32,
    message: String,
}

/// Of a pod whose namespace is gone, as after a reboot, the runtime gives an empty one.
fn path(text: &str) -> Result<PathBuf, std::convert::Infallible> {
    Ok(PathBuf::from(text))
}

fn failure(code: u32, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

impl Invocation {
    /// Reads the environment alone.
    pub fn of_process() -> Self {
        Self::try_parse_from(["culvert-cni"]).unwrap_or_default()
    }

    fn arg(&self, name: &str) -> Option<&str> {
        self.args
            .split(';')
            .find_map(|pair| pair.split_once('=').filter(|(key, _)| *key == name))
            .map(|it| it.1)
    }
}

/// Does what the runtime asks. Whatever goes wrong, a panic too, is an error of the plugin (C20): the pod does not start.
pub fn run(invocation: &Invocation) -> ExitCode {
    let mut text = String::new();
    let read = std::io::stdin().take(MAX_CONFIG).read_to_string(&mut text);
    let outcome = match read {
        Ok(_) => shielded(|| execute(invocation, &text)),
        Err(error) => Err(failure(DECODING, format!("configuration cannot be read: {error}"))),
    };
    let (output, code) = match outcome {
        Ok(output) => (output, ExitCode::SUCCESS),
        Err(failure) => (Some(failure.to_json(&text)), ExitCode::FAILURE),
    };
    let written = output.map(|it| std::io::stdout().write_all(it.to_string().as_bytes()));
    if written.is_some_and(|it| it.is_err()) { ExitCode::FAILURE } else { code }
}

fn shielded<T>(command: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(command)).unwrap_or_else(|_| Err(failure(TRY_AGAIN, "the plugin panicked")))
}

impl Failure {
    fn to_json(&self, config: &str) -> Value {
        let version = serde_json::from_str::<Value>(config)
            .ok()
            .and_then(|it| it["cniVersion"].as_str().map(str::to_owned));
        json!({"cniVersion": version.as_deref().unwrap_or("1.0.0"), "code": self.code, "msg": "culvert: the pod cannot be enrolled",
               "details": self.message})
    }
}

/// One command.
pub fn execute(invocation: &Invocation, text: &str) -> Result<Option<Value>, Failure> {
    match invocation.command.as_deref() {
        Some("VERSION") => Ok(Some(json!({"cniVersion": "1.1.0", "supportedVersions": VERSIONS}))),
        // Rules end with the namespace they are in, and the agent learns of the rest by itself. STATUS too: a runtime that hears
        // "not available" starts no pod, not even the agent's (C19).
        Some("CHECK" | "DEL" | "STATUS" | "GC") => Ok(None),
        Some("ADD") => {
            let input: Input = serde_json::from_str(text)
                .map_err(|error| failure(DECODING, format!("configuration cannot be read: {error}")))?;
            add(invocation, input, AWAY).map(Some)
        }
        other => Err(failure(ENVIRONMENT, format!("CNI_COMMAND is {:?}", other.unwrap_or_default()))),
    }
}

/// The former result is given on as it came (C15).
fn add(invocation: &Invocation, input: Input, patience: Duration) -> Result<Value, Failure> {
    if !VERSIONS.contains(&input.cni_version.as_str()) {
        return Err(failure(
            UNSUPPORTED,
            format!("version {:?} of CNI is not one of {VERSIONS:?}", input.cni_version),
        ));
    }
    let Some(result) = input.prev_result else {
        return Err(failure(
            INVALID_CONFIG,
            "there is no prevResult: the plugin must come after the one that makes interfaces",
        ));
    };
    let config = &input.plugin;
    let (Some(namespace), Some(name)) = (invocation.arg("K8S_POD_NAMESPACE"), invocation.arg("K8S_POD_NAME"))
    else {
        // Not Kubernetes that asks: no pod of ours.
        return Ok(result);
    };
    if always_passes(config, namespace, name) {
        return Ok(result);
    }
    let request = AddRequest {
        netns: invocation.netns.clone(),
        pod_name: name.to_owned(),
        pod_namespace: namespace.to_owned(),
        ips: addresses(&result),
        pod_uid: invocation.arg("K8S_POD_UID").map(str::to_owned),
    };
    let begun = Instant::now();
    let admitted = admit(config, &request, patience);
    log::write(
        &config.event_socket,
        &request,
        begun.elapsed(),
        admitted.as_ref().err().map(|it| &*it.message),
    );
    admitted.map(|()| result)
}

/// An agent that is away is waited for: pods of a node that comes up start as soon as it is there.
fn admit(config: &PluginConfig, request: &AddRequest, patience: Duration) -> Result<(), Failure> {
    let until = Instant::now() + patience;
    loop {
        let why = match ask(&config.event_socket, request) {
            Ok(()) => return Ok(()),
            Err(refused @ AskError::Refused(_)) => return Err(failure(TRY_AGAIN, refused.to_string())),
            Err(away @ (AskError::Away(_) | AskError::Lost(_))) => without_agent(config, request, &away),
        };
        match why {
            None => return Ok(()),
            Some(why) if Instant::now() >= until => return Err(failure(TRY_AGAIN, why)),
            Some(_) => std::thread::sleep(PAUSE.min(patience)),
        }
    }
}

/// Excluded namespaces (C06), and what the mesh itself runs on (C19).
fn always_passes(config: &PluginConfig, namespace: &str, name: &str) -> bool {
    let own =
        namespace == config.system_namespace && config.own_pods.iter().any(|prefix| name.starts_with(prefix));
    own || config.exclude_namespaces.iter().any(|excluded| excluded == namespace)
}

/// Why a pod may not start; `None` only for one that certainly stays outside.
fn without_agent(config: &PluginConfig, request: &AddRequest, away: &AskError) -> Option<String> {
    let settings = Settings {
        excluded_namespaces: config.exclude_namespaces.clone(),
        system_namespace: config.system_namespace.clone(),
        enablement: config.enablement_selectors.clone(),
    };
    match lookup::joins(&config.kubeconfig, &settings, &request.pod_namespace, &request.pod_name) {
        Ok(false) => None,
        Ok(true) => Some(format!("the pod is to be enrolled, and {away}")),
        Err(error) => Some(format!(
            "{away}; whether the pod is to be enrolled cannot be known: {error:#}. If the mesh was uninstalled while this node was down, \
             take {} out of its CNI configuration",
            super::PLUGIN
        )),
    }
}

fn addresses(result: &Value) -> Vec<IpAddr> {
    let ips = result["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
    let address = |ip: &Value| ip["address"].as_str()?.split('/').next()?.parse().ok();
    ips.iter().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::thread::JoinHandle;

    use super::*;

    fn invocation(command: &str, namespace: &str, name: &str) -> Invocation {
        Invocation {
            command: Some(command.into()),
            netns: "/run/netns/x".into(),
            args: format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=u"),
        }
    }

    fn result() -> Value {
        json!({"cniVersion": "1.0.0", "interfaces": [{"name": "eth0"}], "dns": {},
               "ips": [{"address": "100.64.1.2/24", "interface": 0}, {"address": "fd00::2/64"}]})
    }

    fn config(dir: &Path, prev_result: Option<Value>) -> String {
        json!({"cniVersion": "1.0.0", "name": "k", "type": "culvert-cni", "eventSocket": dir.join("s"),
               "kubeconfig": dir.join("none"), "excludeNamespaces": ["kube-system"],
               "systemNamespace": "culvert-system", "ownPods": crate::agent::OWN_PODS, "prevResult": prev_result})
        .to_string()
    }

    /// Answers once, and gives what was asked.
    fn agent(dir: &Path, answer: &'static str) -> JoinHandle<AddRequest> {
        let listener = UnixListener::bind(dir.join("s")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let (mut line, mut length) = (String::new(), 0);
            while reader.read_line(&mut line).unwrap() > 2 {
                if let Some(value) = line.strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; length];
            reader.read_exact(&mut body).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            serde_json::from_slice(&body).unwrap()
        })
    }

    /// C15, C16.
    #[test]
    fn an_added_pod_is_announced_and_the_result_given_on() {
        let dir = tempfile::tempdir().unwrap();
        let asked = agent(dir.path(), "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        let given = execute(&invocation("ADD", "shop", "a"), &config(dir.path(), Some(result()))).unwrap();
        assert_eq!(given, Some(result()));
        let request = asked.join().unwrap();
        assert_eq!((request.pod_namespace.as_str(), request.pod_name.as_str()), ("shop", "a"));
        assert_eq!(request.ips, ["100.64.1.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]);
        assert_eq!(request.netns, Path::new("/run/netns/x"));
        let text = serde_json::to_value(&request).unwrap();
        for key in ["Netns", "PodName", "PodNamespace", "IPs"] {
            assert!(text.get(key).is_some(), "{key}");
        }
    }

    /// C17.
    #[test]
    fn a_pod_that_the_agent_cannot_enrol_does_not_start() {
        let dir = tempfile::tempdir().unwrap();
        let asked =
            agent(dir.path(), "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 8\r\n\r\nno proxy");
        let error =
            execute(&invocation("ADD", "shop", "a"), &config(dir.path(), Some(result()))).unwrap_err();
        assert!(error.message.contains("no proxy"), "{error:?}");
        asked.join().unwrap();
    }

    /// C17, C18: neither agent nor API server.
    #[test]
    fn a_pod_of_which_nothing_can_be_known_does_not_start() {
        let dir = tempfile::tempdir().unwrap();
        let text = config(dir.path(), Some(result()));
        let input = serde_json::from_str(&text).unwrap();
        let error = add(&invocation("ADD", "shop", "a"), input, Duration::ZERO).unwrap_err();
        assert_eq!(error.code, TRY_AGAIN);
        let json = error.to_json(&text);
        assert!(json["details"].as_str().unwrap().contains("cannot be known"), "{json}");
        assert_eq!(json["cniVersion"], "1.0.0");
    }

    /// C17, R06: after a reboot pods are there before the agent, and its socket of before may be too.
    #[test]
    fn a_pod_waits_for_an_agent_that_is_on_its_way() {
        let dir = tempfile::tempdir().unwrap();
        drop(UnixListener::bind(dir.path().join("s")).unwrap());
        let text = config(dir.path(), Some(result()));
        let pod = std::thread::spawn(move || {
            let input = serde_json::from_str(&text).unwrap();
            add(&invocation("ADD", "shop", "a"), input, Duration::from_secs(30))
        });
        let log = dir.path().join("culvert-cni.log");
        std::fs::remove_file(dir.path().join("s")).unwrap();
        let asked = agent(dir.path(), "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(pod.join().unwrap(), Ok(result()));
        asked.join().unwrap();
        // C20.
        let line: Value = serde_json::from_str(&std::fs::read_to_string(log).unwrap()).unwrap();
        assert_eq!(
            (&line["pod"], &line["namespace"], &line["outcome"]),
            (&json!("a"), &json!("shop"), &json!("starts"))
        );
    }

    /// C06, C19, R06.
    #[test]
    fn what_the_mesh_runs_on_always_starts() {
        let dir = tempfile::tempdir().unwrap();
        for (namespace, name) in [
            ("kube-system", "coredns-1"),
            ("culvert-system", "culvert-agent-x"),
            ("culvert-system", "ztunnel-y"),
            ("culvert-system", "culvert-controller-z"),
        ] {
            let given = execute(&invocation("ADD", namespace, name), &config(dir.path(), Some(result())));
            assert_eq!(given, Ok(Some(result())), "{namespace}/{name}");
        }
        let text: Value = serde_json::from_str(&config(dir.path(), None)).unwrap();
        let config: PluginConfig = serde_json::from_value(text).unwrap();
        assert!(!always_passes(&config, "culvert-system", "other-1"));
        assert!(!always_passes(&config, "shop", "ztunnel-y"));
    }

    /// C20.
    #[test]
    fn a_panic_is_an_error_like_any_other() {
        let outcome = shielded::<()>(|| panic!("as expected"));
        assert_eq!(outcome, Err(failure(TRY_AGAIN, "the plugin panicked")));
    }

    /// C15, C19, H19: what ends a pod, or asks whether pods may start, never fails for want of an agent or a configuration.
    #[test]
    fn other_commands_do_nothing() {
        for command in ["CHECK", "DEL", "STATUS", "GC"] {
            assert_eq!(execute(&invocation(command, "shop", "a"), ""), Ok(None));
        }
        let versions = execute(&invocation("VERSION", "", ""), "").unwrap().unwrap();
        for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            assert!(versions["supportedVersions"].as_array().unwrap().contains(&json!(version)), "{version}");
        }
        assert!(execute(&invocation("ODD", "", ""), "").is_err());
    }

    #[test]
    fn without_a_former_result_or_of_another_version_it_fails() {
        let dir = tempfile::tempdir().unwrap();
        let add = invocation("ADD", "kube-system", "a");
        assert_eq!(execute(&add, &config(dir.path(), None)).unwrap_err().code, INVALID_CONFIG);
        let old = config(dir.path(), Some(result())).replacen(
            "\"cniVersion\":\"1.0.0\"",
            "\"cniVersion\":\"0.2.0\"",
            1,
        );
        assert_eq!(execute(&add, &old).unwrap_err().code, UNSUPPORTED);
    }

    /// H19: after a reboot there is no namespace to name.
    #[test]
    fn a_pod_whose_namespace_is_gone_can_be_deleted() {
        let words = ["culvert-cni", "--command", "DEL", "--netns", "", "--args", ""];
        let invocation = Invocation::try_parse_from(words).unwrap();
        assert_eq!(invocation.command.as_deref(), Some("DEL"));
        assert_eq!(invocation.netns, PathBuf::new());
    }
}
