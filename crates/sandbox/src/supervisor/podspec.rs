//! From a pod's manifest to what its containers run with: environment, files, probes. Pure but for the paths.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_k8s_api::core::{Container, Pod, Probe as ProbeSpec, Protocol};

use crate::cluster::{self, Key};
use crate::container::{ContainerSpec, Readiness};
use crate::dns;
use crate::enter::Place;
use crate::expand::expand;
use crate::lab::NetNs;
use crate::probe::Probe;
use crate::process::{Start, base_environment};
use crate::state::StateDir;

/// Kubernetes' default between SIGTERM and SIGKILL.
const GRACE_SECONDS: u32 = 30;
/// Kubernetes' default between two probes is 10 s; here people wait for it.
const PERIOD_SECONDS: u32 = 1;

/// What a pod was given.
#[derive(Clone, Debug)]
pub struct Given {
    /// Which pod.
    pub key: Key,
    /// Its incarnation.
    pub uid: String,
    /// Its node.
    pub node: String,
    /// The node's addresses.
    pub node_addresses: Vec<IpAddr>,
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Its namespace.
    pub netns: NetNs,
    /// From where a kubelet would probe: its node's namespace.
    pub probe_from: NetNs,
    /// Where its files lie.
    pub state: StateDir,
    /// Where the agent says that it is redirected, if it is enrolled.
    pub gate: Option<PathBuf>,
}

impl Given {
    /// Its resolv.conf.
    pub fn resolv_conf(&self, nameservers: &[IpAddr]) -> String {
        let domain = dns::DOMAIN;
        let namespace = &self.key.namespace;
        let servers: String = nameservers.iter().map(|server| format!("nameserver {server}\n")).collect();
        format!("{servers}search {namespace}.svc.{domain} svc.{domain} {domain}\noptions ndots:5\n")
    }

    /// Its hosts file.
    pub fn hosts(&self) -> String {
        let own: String =
            self.addresses.iter().map(|address| format!("{address}\t{}\n", self.key.name)).collect();
        format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own}")
    }

    /// Its directory.
    pub fn dir(&self) -> PathBuf {
        self.state.pod(&self.key.namespace, &self.key.name)
    }

    /// The log of a container: the first has the plain name.
    pub fn log(&self, pod: &Pod, container: &Container) -> PathBuf {
        let first = pod.spec.containers.first().is_some_and(|first| first.name == container.name);
        self.dir().join(if first {
            "stdout.log".to_owned()
        } else {
            format!("{}.stdout.log", container.name)
        })
    }

    /// What `container` runs with; `None` if it names no command, which only an image could supply.
    pub fn container(&self, pod: &Pod, container: &Container) -> Option<ContainerSpec> {
        let variables = self.variables(pod, container);
        let command: Vec<OsString> = container
            .command
            .iter()
            .chain(&container.args)
            .map(|word| expand(word, &variables).into())
            .collect();
        if container.command.is_empty() {
            return None;
        }
        let mut environment = base_environment();
        environment.extend(variables.into_iter().map(|(name, value)| (name.into(), value.into())));
        let label = format!("pod.{}.{}", self.key.dotted(), container.name);
        let seconds = pod.spec.termination_grace_period_seconds.unwrap_or(GRACE_SECONDS);
        Some(ContainerSpec {
            pod: self.key.clone(),
            uid: self.uid.clone(),
            name: container.name.clone(),
            start: Start {
                label,
                command,
                environment,
                place: Place {
                    cwd: container.working_dir.clone().map(PathBuf::from),
                    ..Place::of_pod(&self.state, &self.key, self.netns.path())
                },
                log: self.log(pod, container),
            },
            restart: pod.spec.restart_policy,
            readiness: container.readiness_probe.as_ref().and_then(|probe| self.readiness(pod, probe)),
            gate: self.gate.clone(),
            grace: Duration::from_secs(seconds.into()),
        })
    }

    /// The environment of a container: later variables may use earlier ones.
    fn variables(&self, pod: &Pod, container: &Container) -> BTreeMap<String, String> {
        let mut variables = BTreeMap::from([("HOSTNAME".to_owned(), self.key.name.clone())]);
        for variable in &container.env {
            let value = match (&variable.value, &variable.value_from) {
                (Some(value), _) => Some(expand(value, &variables)),
                (None, Some(source)) => {
                    source.field_ref.as_ref().and_then(|field| self.field(pod, &field.field_path))
                }
                (None, None) => Some(String::new()),
            };
            if let Some(value) = value {
                variables.insert(variable.name.clone(), value);
            }
        }
        variables
    }

    /// A field of the pod, as the downward API names it.
    fn field(&self, pod: &Pod, path: &str) -> Option<String> {
        let quoted = |prefix: &str| path.strip_prefix(prefix)?.strip_suffix("']");
        Some(match path {
            "metadata.name" => self.key.name.clone(),
            "metadata.namespace" => self.key.namespace.clone(),
            "metadata.uid" => self.uid.clone(),
            "spec.nodeName" => self.node.clone(),
            "spec.serviceAccountName" => pod.service_account().to_owned(),
            "status.podIP" => self.addresses.first()?.to_string(),
            "status.podIPs" => join(&self.addresses),
            "status.hostIP" => self.node_addresses.first()?.to_string(),
            "status.hostIPs" => join(&self.node_addresses),
            _ => match (quoted("metadata.labels['"), quoted("metadata.annotations['")) {
                (Some(label), _) => pod.metadata.labels.get(label)?.clone(),
                (_, Some(annotation)) => pod.metadata.annotations.get(annotation)?.clone(),
                _ => return None,
            },
        })
    }

    fn readiness(&self, pod: &Pod, probe: &ProbeSpec) -> Option<Readiness> {
        let address = *self.addresses.first()?;
        let target = |port| Some(SocketAddr::new(address, cluster::number_of(port, pod, Protocol::Tcp)?));
        let netns = self.probe_from.clone();
        let question = if let Some(get) = &probe.http_get {
            let path = get.path.clone().unwrap_or_else(|| "/".to_owned());
            Probe::Get { netns, target: target(&get.port)?, path }
        } else {
            Probe::Connect { netns, target: target(&probe.tcp_socket.as_ref()?.port)? }
        };
        let seconds = |value: Option<u32>, default: u32| Duration::from_secs(value.unwrap_or(default).into());
        Some(Readiness {
            probe: question,
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, PERIOD_SECONDS).max(Duration::from_millis(100)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_millis(100)),
            failures: probe.failure_threshold.unwrap_or(3).max(1),
        })
    }
}

/// The machine's name service order with host names taken from files and DNS only: another source would ask a resolver
/// outside the sandbox.
pub fn nsswitch(machine: &Path) -> String {
    let text = std::fs::read_to_string(machine).unwrap_or_default();
    let mut lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with("hosts:")).collect();
    lines.push("hosts: files dns");
    lines.join("\n") + "\n"
}

fn join(addresses: &[IpAddr]) -> String {
    addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_k8s_api::core::{EnvVar, EnvVarSource, FieldRef};

    fn given() -> Given {
        Given {
            key: Key { namespace: "shop".into(), name: "web-0".into() },
            uid: "u".into(),
            node: "a".into(),
            node_addresses: vec!["198.18.0.11".parse().unwrap()],
            addresses: ["100.64.1.5", "fd00:64:1::5"].map(|a| a.parse().unwrap()).to_vec(),
            netns: NetNs::at("/n"),
            probe_from: NetNs::at("/m"),
            state: StateDir::new(Path::new("/s")).unwrap(),
            gate: None,
        }
    }

    fn variable(name: &str, value: &str) -> EnvVar {
        EnvVar { name: name.into(), value: Some(value.into()), ..EnvVar::default() }
    }

    fn from(name: &str, path: &str) -> EnvVar {
        let field_ref = Some(FieldRef { field_path: path.into() });
        EnvVar { name: name.into(), value_from: Some(EnvVarSource { field_ref }), ..EnvVar::default() }
    }

    #[test]
    fn environment_and_arguments() {
        let container = Container {
            name: "c".into(),
            command: vec!["serve".into(), "--on=$(IP):$(PORT)".into()],
            args: vec!["$(URL)".into(), "$$(PORT)".into()],
            env: vec![
                variable("PORT", "80"),
                from("IP", "status.podIP"),
                variable("URL", "http://$(IP):$(PORT)/"),
                from("APP", "metadata.labels['app']"),
                from("NODE", "spec.nodeName"),
            ],
            ..Container::default()
        };
        let mut pod = Pod::default();
        pod.metadata.labels.insert("app".into(), "web".into());
        pod.spec.containers.push(container.clone());
        let spec = given().container(&pod, &container).unwrap();
        assert_eq!(spec.start.command, ["serve", "--on=100.64.1.5:80", "http://100.64.1.5:80/", "$(PORT)"]);
        let has = |name: &str, value: &str| spec.start.environment.contains(&(name.into(), value.into()));
        assert!(has("APP", "web") && has("NODE", "a") && has("HOSTNAME", "web-0"));
        assert_eq!(spec.start.log, Path::new("/s/pods/shop.web-0/stdout.log"));
    }

    #[test]
    fn a_container_without_a_command_cannot_run() {
        let container = Container { name: "c".into(), image: "nginx".into(), ..Container::default() };
        assert!(given().container(&Pod::default(), &container).is_none());
    }

    #[test]
    fn the_resolver_asks_the_cluster() {
        let text = given().resolv_conf(&["198.18.0.3".parse().unwrap()]);
        assert_eq!(
            text,
            "nameserver 198.18.0.3\nsearch shop.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
        );
    }

    #[test]
    fn names_come_from_files_and_dns_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("nsswitch.conf");
        std::fs::write(&file, "passwd: files\nhosts: files mymachines resolve [!UNAVAIL=return] dns\n")
            .unwrap();
        assert_eq!(nsswitch(&file), "passwd: files\nhosts: files dns\n");
        assert_eq!(nsswitch(&dir.path().join("none")), "hosts: files dns\n");
    }
}
