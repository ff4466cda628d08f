//! `culvert install` and `culvert uninstall`: the chart that this program was built with, by helm.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, bail};

use crate::args::{HelmArgs, InstallArgs};

/// Name of the release.
const RELEASE: &str = "culvert";

macro_rules! chart {
    ($($file:literal),* $(,)?) => { [$(($file, include_str!(concat!("../../helm/culvert/", $file)))),*] };
}

/// The chart's files. A test holds that none is missing.
const CHART: [(&str, &str); 21] = chart![
    ".helmignore",
    "Chart.yaml",
    "values.yaml",
    "values.schema.json",
    "files/crds/authorizationpolicies.yaml",
    "files/crds/destinationrules.yaml",
    "files/crds/peerauthentications.yaml",
    "files/crds/requestauthentications.yaml",
    "files/crds/serviceentries.yaml",
    "files/crds/workloadentries.yaml",
    "templates/NOTES.txt",
    "templates/_helpers.tpl",
    "templates/agent.yaml",
    "templates/controller-rbac.yaml",
    "templates/controller.yaml",
    "templates/crds.yaml",
    "templates/gatewayclass.yaml",
    "templates/network-policy.yaml",
    "templates/quota.yaml",
    "templates/webhook.yaml",
    "templates/ztunnel.yaml",
];

/// A directory that goes with its value.
struct Unpacked(PathBuf);

pub(crate) fn install(args: &InstallArgs) -> anyhow::Result<ExitCode> {
    let chart = Unpacked::new()?;
    let mut helm = helm(&args.helm);
    helm.args(["upgrade", "--install", RELEASE]).arg(&chart.0).arg("--create-namespace");
    for file in &args.values {
        helm.arg("--values").arg(file);
    }
    for set in &args.set {
        helm.args(["--set", set]);
    }
    if args.dry_run {
        helm.arg("--dry-run");
    } else {
        helm.arg("--wait");
    }
    run(helm, &args.helm)
}

pub(crate) fn uninstall(args: &HelmArgs) -> anyhow::Result<ExitCode> {
    let mut helm = helm(args);
    helm.args(["uninstall", RELEASE, "--wait"]);
    run(helm, args)
}

fn helm(args: &HelmArgs) -> Command {
    let mut helm = Command::new(&args.program);
    helm.args(["--namespace", &args.namespace]);
    if let Some(context) = &args.context {
        helm.args(["--kube-context", context]);
    }
    if let Some(kubeconfig) = &args.kubeconfig {
        helm.arg("--kubeconfig").arg(kubeconfig);
    }
    helm
}

fn run(mut helm: Command, args: &HelmArgs) -> anyhow::Result<ExitCode> {
    helm.args(["--timeout", &args.timeout]);
    let status = match helm.status() {
        Ok(status) => status,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{:?} was not found: install helm 3 (https://helm.sh), or name it by --helm", args.program)
        }
        Err(error) => return Err(error).with_context(|| format!("starting {:?}", args.program)),
    };
    Ok(exit_code(status))
}

fn exit_code(status: ExitStatus) -> ExitCode {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.map_or(ExitCode::FAILURE, ExitCode::from)
}

impl Unpacked {
    fn new() -> anyhow::Result<Self> {
        let name = format!("culvert-chart-{}-{:016x}", std::process::id(), fastrand::u64(..));
        let dir = std::env::temp_dir().join(name);
        // Fails if it is there: nobody else's directory is written to.
        fs::create_dir(&dir).with_context(|| format!("{}", dir.display()))?;
        let unpacked = Self(dir);
        for (file, text) in CHART {
            let path = unpacked.0.join(file);
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            fs::write(&path, text).with_context(|| format!("{}", path.display()))?;
        }
        Ok(unpacked)
    }
}

impl Drop for Unpacked {
    fn drop(&mut self) {
        // What stays behind is a copy of what is in this program.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn files(dir: &Path, below: &Path, found: &mut BTreeSet<String>) {
        for entry in fs::read_dir(dir.join(below)).unwrap() {
            let entry = entry.unwrap();
            let path = below.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                files(dir, &path, found);
            } else {
                found.insert(path.to_str().unwrap().to_owned());
            }
        }
    }

    #[test]
    fn the_whole_chart_is_in_the_program() {
        let mut there = BTreeSet::new();
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../helm/culvert");
        files(&dir, Path::new(""), &mut there);
        let unpacked = Unpacked::new().unwrap();
        let mut ours = BTreeSet::new();
        files(&unpacked.0, Path::new(""), &mut ours);
        assert_eq!(ours, there);
        let path = unpacked.0.clone();
        drop(unpacked);
        assert!(!path.exists());
    }

    #[test]
    fn a_missing_helm_is_named() {
        let args = HelmArgs {
            namespace: "culvert-system".to_owned(),
            context: None,
            kubeconfig: None,
            program: "/nowhere/helm".into(),
            timeout: "1s".to_owned(),
        };
        let error = uninstall(&args).unwrap_err().to_string();
        assert!(error.contains("/nowhere/helm") && error.contains("--helm"), "{error}");
    }
}
