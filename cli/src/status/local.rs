//! The mesh of `culvert up`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::ExitCode;

use culvert_k8s_api::status::{Redirection, RedirectionStatus};
use culvert_sandbox::cluster::ServiceView;
use culvert_sandbox::container::ContainerState;
use culvert_sandbox::daemon::Role;
use culvert_sandbox::report::{DaemonReport, PodReport, Report};
use culvert_sandbox::state::{self, StateDir};
use serde::Serialize;

use crate::args::Output;
use crate::pod;
use crate::table::render;

/// What is shown.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Status {
    #[serde(flatten)]
    report: Report,
    /// By the pod's uid: what the agents say now.
    redirection: BTreeMap<String, RedirectionStatus>,
}

/// Shows it; exit code 1 if there is a problem.
pub(super) fn status(state: &StateDir, output: Output) -> anyhow::Result<ExitCode> {
    let mut report = pod::report(state)?;
    let redirection = redirection(state, &report);
    if report.mesh {
        report.problems.extend(report.pods.iter().filter_map(|pod| mesh_problem(pod, &redirection)));
    }
    let status = Status { report, redirection };
    match output.data(&status)? {
        Some(data) => print!("{data}"),
        None => print!("{}", status.table()),
    }
    Ok(super::exit_code(status.report.problems.is_empty()))
}

fn redirection(state: &StateDir, report: &Report) -> BTreeMap<String, RedirectionStatus> {
    report
        .pods
        .iter()
        .filter_map(|pod| {
            let status = state::read_json(&state.redirection(&pod.node, &pod.uid)).ok().flatten()?;
            Some((pod.uid.clone(), status))
        })
        .collect()
}

fn mesh_problem(pod: &PodReport, redirection: &BTreeMap<String, RedirectionStatus>) -> Option<String> {
    if !pod.enrolled || pod.deleted {
        return None;
    }
    match redirection.get(&pod.uid) {
        // Enrolled in spite of it, as with an annotation that cannot be read.
        Some(RedirectionStatus { error: Some(error), .. }) => Some(format!("pod {}: mesh: {error}", pod.key)),
        Some(RedirectionStatus { redirection: Redirection::Enabled, .. }) => None,
        _ => Some(format!("pod {}: not in the mesh yet", pod.key)),
    }
}

impl Status {
    fn table(&self) -> String {
        let report = &self.report;
        let mut text = String::new();
        if !report.problems.is_empty() {
            text += "PROBLEMS\n";
            text.extend(report.problems.iter().map(|problem| format!("  {problem}\n")));
            text += "\n";
        }
        let nodes: Vec<_> =
            report.nodes.iter().map(|node| vec![node.name.clone(), addresses(&node.addresses)]).collect();
        text += &render(&["NODE", "IP"], &nodes);
        if !report.system.is_empty() {
            let rows: Vec<_> = report.system.iter().map(daemon_row).collect();
            text += "\n";
            text += &render(&["PROGRAM", "NODE", "READY", "RESTARTS", "PID"], &rows);
        }
        let rows: Vec<_> = report.pods.iter().map(|pod| self.pod_row(pod)).collect();
        text += "\n";
        text += &render(&["NAMESPACE", "POD", "READY", "STATUS", "RESTARTS", "IP", "NODE", "MESH"], &rows);
        let rows: Vec<_> = report.services.iter().map(service_row).collect();
        text += "\n";
        text += &render(&["NAMESPACE", "SERVICE", "CLUSTER-IP", "PORT(S)", "ENDPOINTS"], &rows);
        text
    }

    fn pod_row(&self, pod: &PodReport) -> Vec<String> {
        let ready = |state: &ContainerState| matches!(state, ContainerState::Running { ready: true, .. });
        let count = pod.containers.iter().filter(|container| ready(&container.state)).count();
        let restarts: u32 = pod.containers.iter().map(|container| container.restarts).sum();
        let phase = if pod.deleted { "Terminating".to_owned() } else { format!("{:?}", pod.phase) };
        let mesh = match (pod.enrolled && self.report.mesh, self.redirection.get(&pod.uid)) {
            (_, Some(status)) if status.redirection == Redirection::Enabled => "enabled",
            (true, _) => "pending",
            (false, _) => "-",
        };
        vec![
            pod.key.namespace.clone(),
            pod.key.name.clone(),
            format!("{count}/{}", pod.containers.len()),
            phase,
            restarts.to_string(),
            addresses(&pod.addresses),
            pod.node.clone(),
            mesh.to_owned(),
        ]
    }
}

fn daemon_row(daemon: &DaemonReport) -> Vec<String> {
    let role = match daemon.role {
        Role::Controller => "controller",
        Role::Agent => "agent",
        Role::Proxy => "proxy",
    };
    vec![
        role.to_owned(),
        daemon.node.clone().unwrap_or_else(|| "-".to_owned()),
        if daemon.state.ready { "yes" } else { "no" }.to_owned(),
        daemon.state.restarts.to_string(),
        daemon.state.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
    ]
}

fn service_row(service: &ServiceView) -> Vec<String> {
    let own = match &service.alias {
        Some(alias) => alias.clone(),
        None if service.addresses.is_empty() => "None".to_owned(),
        None => addresses(&service.addresses),
    };
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| format!("{}/{}", port.port, format!("{:?}", port.protocol).to_uppercase()))
        .collect();
    let mut endpoints: Vec<_> =
        service.ports.iter().flat_map(|port| &port.endpoints).map(ToString::to_string).collect();
    endpoints.dedup();
    let endpoints = if endpoints.is_empty() { "<none>".to_owned() } else { endpoints.join(",") };
    vec![service.key.namespace.clone(), service.key.name.clone(), own, ports.join(","), endpoints]
}

fn addresses(addresses: &[IpAddr]) -> String {
    if addresses.is_empty() {
        return "-".to_owned();
    }
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use culvert_k8s_api::status::Phase;
    use culvert_sandbox::cluster::Key;

    #[test]
    fn an_error_shows_whether_or_not_the_pod_is_enrolled() {
        let pod = PodReport {
            key: Key { namespace: "shop".into(), name: "cart".into() },
            uid: "u".into(),
            node: "a".into(),
            addresses: Vec::new(),
            netns: "/n".into(),
            phase: Phase::Running,
            ready: true,
            enrolled: true,
            deleted: false,
            containers: Vec::new(),
        };
        let problem = |redirection, error: Option<&str>| {
            let status = RedirectionStatus { redirection, error: error.map(str::to_owned) };
            mesh_problem(&pod, &BTreeMap::from([("u".to_owned(), status)]))
        };
        assert_eq!(problem(Redirection::Enabled, None), None);
        let why = "exclude-outbound-ports: \"x\" is no port";
        for state in [Redirection::Enabled, Redirection::Pending] {
            assert!(problem(state, Some(why)).is_some_and(|text| text.contains(why)));
        }
        assert!(problem(Redirection::Pending, None).is_some());
    }
}
