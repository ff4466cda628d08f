//! `culvert exec`, and the hidden subcommand by which the supervisor starts containers.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use culvert_sandbox::cluster::Key;
use culvert_sandbox::container::ContainerState;
use culvert_sandbox::daemon::Role;
use culvert_sandbox::enter::{EnterError, Place};
use culvert_sandbox::report::{ContainerReport, DaemonReport, PodReport, Report};
use culvert_sandbox::state::{self, StateDir};

use crate::args::{ExecArgs, InternalExecArgs, PodArgs};

/// Half a second in all.
const ENVIRONMENT_LOOKS: u32 = 50;
const ENVIRONMENT_POLL: Duration = Duration::from_millis(10);

pub(crate) fn exec(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let state = args.state.open()?;
    let report = report(&state)?;
    if let Some(program) = program(&report, &args.pod.name)? {
        let netns = program.state.netns.clone().context("it does not run")?;
        let failure = match (Place { netns, ..Place::default() }).exec_with(&args.command, None) {
            Ok(never) => match never {},
            Err(failure) => failure,
        };
        return Ok(explain(&failure));
    }
    let pod = find(&report, &args.pod)?;
    let container = container(pod, &args.pod)?;
    let ContainerState::Running { pid, .. } = container.state else {
        bail!("container {} of pod {} does not run", container.name, pod.key);
    };
    // The container's own environment, as kubectl does it.
    let environment =
        environment(pid).with_context(|| format!("cannot read the environment of process {pid}"))?;
    let place = Place::of_pod(&state, &pod.key, &pod.netns);
    let failure = match place.exec_with(&args.command, Some(environment)) {
        Ok(never) => match never {},
        Err(failure) => failure,
    };
    Ok(explain(&failure))
}

pub(crate) fn internal_exec(args: &InternalExecArgs) -> ExitCode {
    let show = args
        .show
        .iter()
        .filter_map(|pair| pair.split_once(':'))
        .map(|(ours, target)| (ours.into(), target.into()))
        .collect();
    let place = Place {
        netns: args.netns.clone(),
        show,
        hide: args.hide.clone(),
        hostname: args.hostname.clone(),
        cwd: args.cwd.clone(),
    };
    match place.exec_with(&args.command, None) {
        Ok(never) => match never {},
        Err(failure) => explain(&failure),
    }
}

/// The report of the supervisor that runs in `state`.
pub(crate) fn report(state: &StateDir) -> anyhow::Result<Report> {
    if !state.in_use() {
        bail!("nothing is up in {} (see `culvert up`)", state.root().display());
    }
    state::read_json(&state.report())?.context("the supervisor has only just started: try again")
}

/// The program of the mesh that a name such as `proxy/node-a` or `controller` stands for; `None` if it looks like a pod's.
pub(crate) fn program<'a>(report: &'a Report, name: &str) -> anyhow::Result<Option<&'a DaemonReport>> {
    let role = match name.split_once('/').map_or(name, |(role, _)| role) {
        "proxy" => Role::Proxy,
        "agent" => Role::Agent,
        "controller" => Role::Controller,
        _ => return Ok(None),
    };
    let node = name.split_once('/').map(|(_, node)| node);
    // A pod may have such a name; only with a slash, or if there is one, is it a program.
    let found = report.system.iter().find(|daemon| daemon.role == role && daemon.node.as_deref() == node);
    match (found, node) {
        (None, Some(_)) => bail!("no program {name}"),
        (found, _) => Ok(found),
    }
}

pub(crate) fn find<'a>(report: &'a Report, args: &PodArgs) -> anyhow::Result<&'a PodReport> {
    let name = args.name.strip_prefix("pod/").or(args.name.strip_prefix("pods/")).unwrap_or(&args.name);
    let namespace = args.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let key = Key { namespace, name: name.to_owned() };
    report.pod(&key).with_context(|| {
        let elsewhere: Vec<_> = report
            .pods
            .iter()
            .filter(|pod| pod.key.name == name)
            .map(|pod| format!("-n {}", pod.key.namespace))
            .collect();
        if elsewhere.is_empty() {
            format!("no pod {key}")
        } else {
            format!("no pod {key}; there is one with {}", elsewhere.join(", "))
        }
    })
}

/// The container that was named, or the pod's first (whose log has the plain name).
pub(crate) fn container<'a>(pod: &'a PodReport, args: &PodArgs) -> anyhow::Result<&'a ContainerReport> {
    let wanted = |container: &&ContainerReport| match &args.container {
        Some(name) => container.name == *name,
        None => container.log.ends_with("stdout.log"),
    };
    let names = || pod.containers.iter().map(|c| c.name.as_str()).collect::<Vec<_>>().join(", ");
    pod.containers.iter().find(wanted).with_context(|| format!("pod {} has only {}", pod.key, names()))
}

/// The environment of a process. It is empty for the moment in which the process becomes its command.
fn environment(pid: i32) -> std::io::Result<Vec<(OsString, OsString)>> {
    let path = format!("/proc/{pid}/environ");
    let mut bytes = std::fs::read(&path)?;
    for _ in 0..ENVIRONMENT_LOOKS {
        if !bytes.is_empty() {
            break;
        }
        std::thread::sleep(ENVIRONMENT_POLL);
        bytes = std::fs::read(&path)?;
    }
    Ok(bytes
        .split(|byte| *byte == 0)
        .filter_map(|pair| {
            let equals = pair.iter().position(|byte| *byte == b'=')?;
            Some((
                OsString::from_vec(pair[..equals].to_vec()),
                OsString::from_vec(pair[equals + 1..].to_vec()),
            ))
        })
        .collect())
}

fn explain(failure: &EnterError) -> ExitCode {
    eprintln!("culvert: {failure}");
    ExitCode::from(failure.exit_code())
}
