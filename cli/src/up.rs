//! `culvert up`: in the foreground until Ctrl-C, or in the background.

use std::ffi::OsString;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use culvert_runtime::tasks::Tasks;
use culvert_runtime::{signal, telemetry};
use culvert_sandbox::caughtup::caught_up;
use culvert_sandbox::process::Record;
use culvert_sandbox::report::Report;
use culvert_sandbox::state::{self, StateDir};
use culvert_sandbox::supervisor::{self, Options};
use culvert_sandbox::system::Programs;
use tokio_util::sync::CancellationToken;

use crate::args::UpArgs;

/// How often the report is looked at while waiting.
const POLL: Duration = Duration::from_millis(50);
/// The supervisor waits for news almost always; the work is in other processes.
const THREADS: usize = 2;

pub(crate) fn up(args: &UpArgs) -> anyhow::Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root: run this with sudo");
    }
    if args.detach { detach(args) } else { supervise(args, true) }
}

/// What [`detach`] started: the same as a foreground `up`, without anybody watching.
pub(crate) fn supervise_in_background(args: &UpArgs) -> anyhow::Result<ExitCode> {
    // A session of its own, so that closing the terminal does not end it.
    nix::unistd::setsid().context("cannot leave the terminal's session")?;
    supervise(args, false)
}

fn supervise(args: &UpArgs, announce: bool) -> anyhow::Result<ExitCode> {
    let options = options(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let _telemetry = telemetry::init(telemetry::Format::Text, "info")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let tasks = Tasks::new("up");
        let stopper = stop.clone();
        tasks.spawn("signals", async move {
            match signal::shutdown().await {
                Ok(signal) => tracing::info!(?signal, "ending everything"),
                Err(error) => tracing::error!(%error, "signals cannot be caught"),
            }
            stopper.cancel();
        });
        if announce {
            tasks.spawn("announce", announce_ready(options.state.clone(), Duration::from_secs(args.timeout)));
        }
        supervisor::run(options, stop).await?;
        tracing::info!("everything is gone");
        Ok(ExitCode::SUCCESS)
    })
}

/// Says once what came up, or what did not.
async fn announce_ready(state: StateDir, timeout: Duration) {
    let own = Record::own("supervisor");
    let started = tokio::time::Instant::now();
    while started.elapsed() < timeout {
        if let Some(report) = settled(&state, &own) {
            println!("{}", summary(&report));
            println!("`culvert status` shows more; Ctrl-C ends everything.");
            return;
        }
        tokio::time::sleep(POLL).await;
    }
    println!("not everything is ready after {} s:", timeout.as_secs());
    let report = state::read_json::<Report>(&state.report()).ok().flatten();
    report.into_iter().flat_map(|report| report.problems).for_each(|problem| println!("  {problem}"));
}

fn detach(args: &UpArgs) -> anyhow::Result<ExitCode> {
    let options = options(args)?;
    let state = options.state;
    if state.in_use() {
        bail!("{} is in use by another `culvert up`", state.root().display());
    }
    std::fs::create_dir_all(state.root())
        .with_context(|| format!("cannot create {}", state.root().display()))?;
    let log_path = state.supervisor_log();
    let log = File::options()
        .create(true)
        .append(true)
        .open(&log_path)
        .with_context(|| format!("cannot write {}", log_path.display()))?;
    let child = Command::new(&options.helper)
        .args(background_arguments(args, &state, &options.manifests))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {}", options.helper.display()))?;
    wait_until_settled(child, &state, Duration::from_secs(args.timeout))
}

fn wait_until_settled(mut child: Child, state: &StateDir, timeout: Duration) -> anyhow::Result<ExitCode> {
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let started = Instant::now();
    let problems = loop {
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(state.supervisor_log()).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(5).collect();
            eprintln!("{}", last.into_iter().rev().collect::<Vec<_>>().join("\n"));
            bail!("the supervisor ended ({status}): see {}", state.supervisor_log().display());
        }
        // A crashed run may have left a report: only the child's own counts.
        let report = state::read_json::<Report>(&state.report()).ok().flatten();
        let report = report.filter(|report| report.supervisor.pid == pid);
        if let Some(report) = report.as_ref().filter(|report| ready(state, report)) {
            println!("{}", summary(report));
            return Ok(ExitCode::SUCCESS);
        }
        if started.elapsed() >= timeout {
            break report.map(|report| report.problems).unwrap_or_default();
        }
        std::thread::sleep(POLL);
    };
    eprintln!("not everything is ready after {} s (it goes on in the background):", timeout.as_secs());
    problems.iter().for_each(|problem| eprintln!("  {problem}"));
    Ok(ExitCode::FAILURE)
}

fn settled(state: &StateDir, supervisor: &Record) -> Option<Report> {
    let report = state::read_json::<Report>(&state.report()).ok().flatten()?;
    (report.supervisor == *supervisor && ready(state, &report)).then_some(report)
}

/// Everything has come up, and the proxies have heard of it: the first connection finds its endpoints.
fn ready(state: &StateDir, report: &Report) -> bool {
    // A controller that tells nothing cannot be waited for.
    let heard =
        || caught_up(state, report).unwrap_or_else(|error| error.kind() == ErrorKind::ConnectionRefused);
    report.settled && heard()
}

fn summary(report: &Report) -> String {
    let outside = if report.mesh { "" } else { ", no mesh" };
    let counts = [report.nodes.len(), report.pods.len(), report.services.len()];
    let [nodes, pods, services] = counts;
    let problems: String = report.problems.iter().map(|problem| format!("\n  {problem}")).collect();
    let but = if problems.is_empty() { "" } else { ", but:" };
    format!("ready: {nodes} nodes, {pods} pods, {services} services{outside}{but}{problems}")
}

/// The same command line for the background, with paths that hold wherever it starts.
fn background_arguments(args: &UpArgs, state: &StateDir, manifests: &Path) -> Vec<OsString> {
    let mut line: Vec<OsString> = vec!["internal-supervise".into(), "--filename".into(), manifests.into()];
    line.extend(["--state".into(), state.root().into()]);
    line.extend(["--family".into(), args.family.name().into()]);
    if args.no_mesh {
        line.push("--no-mesh".into());
    }
    if let Some(dir) = &args.bin_dir {
        line.extend(["--bin-dir".into(), dir.into()]);
    }
    let passed = [
        ("--controller-arg", &args.controller_arg),
        ("--agent-arg", &args.agent_arg),
        ("--proxy-arg", &args.proxy_arg),
    ];
    for (option, values) in passed {
        for value in values {
            line.extend([option.into(), value.clone()]);
        }
    }
    line
}

fn options(args: &UpArgs) -> anyhow::Result<Options> {
    let state = args.state.open()?;
    let manifests = std::path::absolute(&args.manifests)?;
    if !manifests.is_dir() {
        bail!("{} is no directory of manifests", manifests.display());
    }
    let helper = std::env::current_exe().context("cannot find this executable")?;
    let programs = if args.no_mesh { None } else { Some(programs(args, &helper)?) };
    Ok(Options { manifests, state, family: args.family.into(), helper, programs })
}

fn programs(args: &UpArgs, own: &Path) -> anyhow::Result<Programs> {
    let dir = match (&args.bin_dir, own.parent()) {
        (Some(dir), _) => std::path::absolute(dir)?,
        (None, Some(dir)) => dir.to_owned(),
        (None, None) => PathBuf::from("."),
    };
    let find = |name: &str| {
        let path = dir.join(name);
        if path.is_file() {
            Ok(path)
        } else {
            bail!(
                "{} is missing: build it, name its directory by --bin-dir, or use --no-mesh",
                path.display()
            )
        }
    };
    Ok(Programs {
        controller: find("controller")?,
        ztunnel: find("ztunnel")?,
        controller_args: args.controller_arg.clone(),
        agent_args: args.agent_arg.clone(),
        proxy_args: args.proxy_arg.clone(),
    })
}
