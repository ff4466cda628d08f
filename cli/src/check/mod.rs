//! `culvert check`: whether a cluster can take the mesh, whether whoever asks may install it, and, where it is installed, whether it
//! is well.

use std::process::ExitCode;

use serde::Serialize;

use crate::args::{CheckArgs, ClusterArgs, Mesh};
use crate::cluster::gather::{Scope, gather};
use crate::cluster::problems::{Severity, problems};
use crate::cluster::seen::Seen;
use crate::cluster::{Cluster, block_on};
use crate::output::API_VERSION;

mod facts;
mod permissions;
mod verdicts;

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// It will work, with something less.
    Warning,
    /// It will not work.
    Error,
}

/// One check. The names are part of what `-o json` prints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Check {
    /// What was checked.
    pub name: &'static str,
    /// What became of it.
    pub result: Verdict,
    /// What was found.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub action: String,
}

/// What `-o json` prints.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    api_version: &'static str,
    kind: &'static str,
    /// What the cluster is called.
    cluster: String,
    /// The mesh is in it.
    installed: bool,
    checks: Vec<Check>,
}

pub(crate) fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    match args.mesh.choose()? {
        Mesh::Local(state) => anyhow::bail!(
            "`culvert check` is about a cluster (--context, --kubeconfig, --mesh cluster), and this is about {}: `culvert status` \
says how that is",
            state.root().display()
        ),
        Mesh::Cluster(cluster) => block_on(run(&cluster, args)),
    }
}

async fn run(cluster: &ClusterArgs, args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let cluster = Cluster::open(cluster).await?;
    let seen = gather(&cluster, &Scope::default()).await;
    let installed = seen.controller.is_some() || seen.agent.is_some() || seen.proxy.is_some();
    let mut checks = vec![verdicts::api_server(&seen)];
    if seen.away.is_none() {
        let facts = Box::pin(facts::look(&cluster, &seen)).await;
        checks.extend(verdicts::cluster(&seen, &facts));
        if args.pre || !installed {
            checks.push(permissions::install(&cluster).await);
        }
        checks.push(permissions::look(&cluster).await);
        if installed && !args.pre {
            checks.extend(mesh(&seen));
        }
    }
    let failed = checks.iter().filter(|check| check.result == Verdict::Error).count();
    let report =
        Report { api_version: API_VERSION, kind: "CheckReport", cluster: cluster.name(), installed, checks };
    match args.output.data(&report)? {
        Some(data) => print!("{data}"),
        None => print!("{}", page(&report, failed)),
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The problems of a mesh that is there.
fn mesh(seen: &Seen) -> Vec<Check> {
    let found = problems(seen);
    if found.is_empty() {
        return vec![Check::ok("mesh", "all is well (culvert status)")];
    }
    let check = |problem: crate::cluster::problems::Problem| {
        let result = if problem.severity == Severity::Error { Verdict::Error } else { Verdict::Warning };
        let line = problem.line(seen.now);
        let message = line.strip_suffix(&format!("; {}", problem.action)).unwrap_or(&line).to_owned();
        Check { name: "mesh", result, message, action: problem.action }
    };
    found.into_iter().map(check).collect()
}

fn page(report: &Report, failed: usize) -> String {
    let mut page = String::new();
    for check in &report.checks {
        let word = match check.result {
            Verdict::Ok => "ok",
            Verdict::Warning => "warn",
            Verdict::Error => "FAIL",
        };
        page += &format!("{word:<5}{:<20} {}\n", check.name, check.message);
        if !check.action.is_empty() {
            page += &format!("{:<26}{}\n", "", check.action);
        }
    }
    let warnings = report.checks.iter().filter(|check| check.result == Verdict::Warning).count();
    let what = if report.installed { "the mesh that is in" } else { "the mesh can be installed in" };
    page += &match (failed, warnings) {
        (0, 0) => format!("Nothing is wrong with {}\n", report.cluster),
        (0, warnings) => format!("{warnings} to look at; {what} {}\n", report.cluster),
        (failed, _) => format!("{failed} of {} checks fail in {}\n", report.checks.len(), report.cluster),
    };
    page
}

impl Check {
    pub(crate) fn ok(name: &'static str, message: impl Into<String>) -> Self {
        Self { name, result: Verdict::Ok, message: message.into(), action: String::new() }
    }

    pub(crate) fn warning(name: &'static str, message: impl Into<String>, action: impl Into<String>) -> Self {
        Self { name, result: Verdict::Warning, message: message.into(), action: action.into() }
    }

    pub(crate) fn error(name: &'static str, message: impl Into<String>, action: impl Into<String>) -> Self {
        Self { result: Verdict::Error, ..Self::warning(name, message, action) }
    }
}
