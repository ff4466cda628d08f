//! etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy and the cluster's DNS server, in one network namespace.

use std::fs;
use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_sandbox::plan;
use serde_json::{Value, json};

use crate::api::Api;
use crate::certificates;
use crate::cluster::Programs;
use crate::files::Files;
use crate::process::Process;

/// Token of a member of system:masters.
pub(crate) const ADMIN: &str = "administrator";
/// Where the API server listens.
pub(crate) const API_ADDRESS: &str = "198.18.0.2";
/// The address of the cluster's DNS service.
pub(crate) const DNS_SERVICE: &str = "198.18.128.10";
/// Name and pods of the cluster.
pub(crate) const DOMAIN: &str = "cluster.local";

/// The programs in the order in which they are started.
pub(crate) const PROGRAMS: [&str; 6] =
    ["etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy", "coredns"];

/// Writes what the programs read.
pub(crate) fn prepare(files: &Files, nodes: &[String]) -> Result<()> {
    let mut addresses: Vec<IpAddr> = plan::controller_addresses().into();
    addresses.extend(plan::service_addresses(1));
    addresses.push(std::net::Ipv4Addr::LOCALHOST.into());
    certificates::write(files, &addresses)?;
    let mut tokens = format!("{ADMIN},admin,1,\"system:masters\"\n");
    let mut known = vec![("kubeconfig".to_owned(), ADMIN.to_owned())];
    for name in ["kube-controller-manager", "kube-scheduler", "kube-proxy"] {
        tokens.push_str(&format!("token-{name},system:{name},{name},\n"));
        known.push((format!("kubeconfig-{name}"), format!("token-{name}")));
    }
    for node in nodes {
        tokens.push_str(&format!("token-{node},system:node:{node},{node},\"system:nodes\"\n"));
        known.push((format!("kubeconfig-{node}"), format!("token-{node}")));
    }
    fs::write(files.at("tokens.csv"), tokens)?;
    for (file, token) in known {
        fs::write(files.at(&file), kubeconfig(files, &token).to_string())?;
    }
    fs::write(files.at("Corefile"), corefile(files))?;
    Ok(())
}

fn kubeconfig(files: &Files, token: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "culvert",
        "clusters": [{ "name": "culvert", "cluster": {
            "server": format!("https://{API_ADDRESS}:6443"), "certificate-authority": files.at("ca.pem") } }],
        "users": [{ "name": "culvert", "user": { "token": token } }],
        "contexts": [{ "name": "culvert", "context": { "cluster": "culvert", "user": "culvert" } }],
    })
}

fn corefile(files: &Files) -> String {
    let [address, _] = plan::dns_addresses();
    format!(
        ".:53 {{\n  bind {address}\n  errors\n  kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{\n    kubeconfig {} culvert\n    ttl 1\n  }}\n}}\n",
        files.kubeconfig().display()
    )
}

/// Starts one of [`PROGRAMS`], also again after it ended.
pub(crate) fn start(files: &Files, programs: &Programs, program: &str) -> Result<Process> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net={}", files.control_plane().display())).arg("--");
    command.arg(programs.path(program));
    command.args(arguments(files, program)?);
    Process::start(files, program, command, false)
}

fn arguments(files: &Files, program: &str) -> Result<Vec<String>> {
    let at = |name: &str| files.at(name).display().to_string();
    let own = format!("--kubeconfig={}", at(&format!("kubeconfig-{program}")));
    let [services4, services6] = plan::service_networks();
    Ok(match program {
        "etcd" => vec![
            format!("--data-dir={}", at("etcd")),
            "--unsafe-no-fsync".into(),
            "--listen-client-urls=http://127.0.0.1:2379".into(),
            "--advertise-client-urls=http://127.0.0.1:2379".into(),
            "--listen-peer-urls=http://127.0.0.1:2380".into(),
        ],
        "kube-apiserver" => vec![
            "--etcd-servers=http://127.0.0.1:2379".into(),
            format!("--advertise-address={API_ADDRESS}"),
            "--secure-port=6443".into(),
            format!("--tls-cert-file={}", at("apiserver.pem")),
            format!("--tls-private-key-file={}", at("apiserver.key")),
            format!("--service-cluster-ip-range={services4},{services6}"),
            format!("--service-account-key-file={}", at("accounts.pem")),
            format!("--service-account-signing-key-file={}", at("accounts.key")),
            "--service-account-issuer=https://kubernetes.default.svc".into(),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--authorization-mode=Node,RBAC".into(),
            "--enable-admission-plugins=NodeRestriction".into(),
            "--allow-privileged=true".into(),
            // Webhooks and services of aggregated APIs are reached at their endpoints.
            "--enable-aggregator-routing=true".into(),
            "--kubelet-preferred-address-types=InternalIP".into(),
        ],
        "kube-controller-manager" => vec![
            own,
            format!("--service-account-private-key-file={}", at("accounts.key")),
            format!("--root-ca-file={}", at("ca.pem")),
            "--use-service-account-credentials=true".into(),
            "--leader-elect=false".into(),
            "--controllers=*,-bootstrap-signer-controller,-token-cleaner-controller".into(),
        ],
        "kube-scheduler" => vec![own, "--leader-elect=false".into()],
        "kube-proxy" => {
            fs::write(files.at("kube-proxy.json"), proxy_config(files, "control-plane").to_string())?;
            vec![format!("--config={}", at("kube-proxy.json"))]
        }
        "coredns" => vec![format!("-conf={}", at("Corefile"))],
        other => anyhow::bail!("{other:?} is no program of the control plane: one of {PROGRAMS:?}"),
    })
}

/// kube-proxy's configuration for a node, or for the control plane's own namespace.
pub(crate) fn proxy_config(files: &Files, host: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "hostnameOverride": host,
        "clientConnection": { "kubeconfig": files.at("kubeconfig-kube-proxy") },
        // The limit belongs to the machine and cannot be written here.
        "conntrack": { "maxPerCore": 0 },
        "detectLocalMode": "InterfaceNamePrefix", "detectLocal": { "interfaceNamePrefix": "veth" },
        "healthzBindAddress": "127.0.0.1:10256", "metricsBindAddress": "127.0.0.1:10249",
        "nftables": { "minSyncPeriod": "100ms", "syncPeriod": "30s" },
    })
}

/// What a cluster has before anybody installs anything: the way to the DNS server.
fn objects(api: &Api) -> Result<()> {
    let [address, _] = plan::dns_addresses();
    let ports = json!([{ "name": "dns", "protocol": "UDP", "port": 53 }, { "name": "dns-tcp", "protocol": "TCP", "port": 53 }]);
    let service = json!({
        "metadata": { "name": "kube-dns", "labels": { "k8s-app": "kube-dns" } },
        "spec": { "clusterIP": DNS_SERVICE, "ports": ports },
    });
    let slice = json!({
        "metadata": { "name": "kube-dns-1", "labels": { "kubernetes.io/service-name": "kube-dns" } },
        "addressType": "IPv4", "ports": ports, "endpoints": [{ "addresses": [address], "conditions": { "ready": true } }],
    });
    api.create("/api/v1/namespaces/kube-system/services", &service)?;
    api.create("/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", &slice).map(drop)
}

/// Starts everything, and returns when the API server answers.
pub(crate) fn begin(files: &Files, programs: &Programs, api: &Api) -> Result<()> {
    for program in PROGRAMS {
        start(files, programs, program)?;
        if program == "kube-apiserver" {
            ready(api).with_context(|| format!("see {}", files.log("kube-apiserver").display()))?;
        }
    }
    api.wait("namespace kube-system", Duration::from_secs(20), |api| {
        Ok((!api.get("/api/v1/namespaces/kube-system")?.is_null()).then_some(()))
    })?;
    objects(api)
}

/// Returns when the API server says that it is ready.
fn ready(api: &Api) -> Result<()> {
    api.wait("the API server", Duration::from_secs(60), |api| {
        Ok((api.get("/readyz")?["text"] == "ok").then_some(()))
    })
}
