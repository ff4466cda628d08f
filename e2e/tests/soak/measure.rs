//! What programs hold, and what sockets there are, at one moment.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_e2e::world::{World, wait_for};
use culvert_net::NetNs;

/// Unused tunnels are closed 5 s after their last use, threads of the blocking pool end 10 s after theirs, a socket that was
/// closed leaves FIN-WAIT-2 a minute after it.
const QUIET: Duration = Duration::from_secs(75);

/// States of `/proc/net/tcp` that tell of something left behind.
const ESTABLISHED: &str = "01";
const FIN_WAIT_2: &str = "05";
const CLOSE_WAIT: &str = "08";

/// One moment.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub at: Duration,
    pub programs: BTreeMap<String, Program>,
    pub sockets: Sockets,
    /// Where each socket in CLOSE-WAIT is.
    pub close_wait_in: BTreeSet<String>,
}

/// What one program holds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Program {
    pub pid: u64,
    /// KiB.
    pub resident: u64,
    pub descriptors: usize,
    pub threads: u64,
}

/// In all namespaces of nodes, pods and programs together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sockets {
    pub established: usize,
    pub close_wait: usize,
    pub fin_wait_2: usize,
}

/// What there is now.
pub fn sample(world: &World, at: Duration) -> Result<Sample> {
    let status = world.status()?;
    let mut sample = Sample { at, ..Sample::default() };
    for program in status["system"].as_array().context("no programs")? {
        let role = program["role"].as_str().context("a program without a role")?;
        let name = format!("{role} {}", program["node"].as_str().unwrap_or("")).trim().to_owned();
        let pid = program["pid"].as_u64().with_context(|| format!("{name} does not run"))?;
        sample.programs.insert(name, held(pid)?);
    }
    if let Some(pid) = status["supervisor"]["pid"].as_u64() {
        sample.programs.insert("supervisor".to_owned(), held(pid)?);
    }
    let named = ["nodes", "pods", "system"].map(|kind| status[kind].as_array().cloned().unwrap_or_default());
    let paths: BTreeSet<String> =
        named.iter().flatten().filter_map(|it| it["netns"].as_str().map(str::to_owned)).collect();
    ensure!(!paths.is_empty(), "status names no namespaces");
    for path in paths {
        // A pod may go between the look at the list and this.
        let Ok(netns) = NetNs::open(&path) else { continue };
        sample.count(&path, &netns)?;
    }
    Ok(sample)
}

impl Sample {
    fn count(&mut self, path: &str, netns: &NetNs) -> Result<()> {
        for table in ["tcp", "tcp6"] {
            let text = netns.run(|| fs::read_to_string(format!("/proc/thread-self/net/{table}")))?;
            for line in text.lines().skip(1) {
                match line.split_whitespace().nth(3) {
                    Some(ESTABLISHED) => self.sockets.established += 1,
                    Some(FIN_WAIT_2) => self.sockets.fin_wait_2 += 1,
                    Some(CLOSE_WAIT) => {
                        self.sockets.close_wait += 1;
                        self.close_wait_in.insert(format!("{path}: {}", line.trim()));
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Waits until nothing goes on any more: no socket half closed and, if there is a `before`, no program with more descriptors
/// than then, or more threads but for [`SPARE_THREADS`]. What is there when patience ends is the answer as well: the verdict names what is too much.
pub fn quiet(world: &World, before: Option<&Sample>) -> Result<Sample> {
    let mut last = sample(world, Duration::ZERO)?;
    let settled = wait_for("quiet", QUIET, || {
        std::thread::sleep(Duration::from_millis(200));
        let (previous, now) = (std::mem::take(&mut last), sample(world, Duration::ZERO)?);
        last = now;
        let quiet = last.sockets.close_wait == 0 && last.sockets.fin_wait_2 == 0;
        let back = last.programs.iter().all(|(name, now)| match before {
            Some(before) => before.programs.get(name).is_some_and(|then| {
                now.descriptors <= then.descriptors && now.threads <= then.threads + SPARE_THREADS
            }),
            None => previous.programs.get(name).is_some_and(|then| now.descriptors >= then.descriptors),
        });
        // Established are only the programs' own connections; tunnels have fallen idle.
        let few = last.sockets.established <= before.map_or(IDLE_CONNECTIONS, |it| it.sockets.established);
        Ok((quiet && back && few).then_some(()))
    });
    if let Err(error) = settled {
        eprintln!("{error:#}");
    }
    Ok(last)
}

/// Where probes of several pods fall together, the supervisor's pool for blocking calls has a thread more for as long as it probes.
pub const SPARE_THREADS: u64 = 1;

/// Both ends of each proxy's connections to the controller: two for xDS and one for certificates at most, and probes.
const IDLE_CONNECTIONS: usize = 16;

fn held(pid: u64) -> Result<Program> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line =
            status.lines().find(|line| line.starts_with(name)).with_context(|| format!("no {name}"))?;
        Ok(line.split_whitespace().nth(1).context("no value")?.parse()?)
    };
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    Ok(Program { pid, resident: field("VmRSS:")?, descriptors, threads: field("Threads:")? })
}

/// The process numbers of all programs: none may have been replaced.
pub fn pids(sample: &Sample) -> BTreeMap<&str, u64> {
    sample.programs.iter().map(|(name, program)| (name.as_str(), program.pid)).collect()
}
