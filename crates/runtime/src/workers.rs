//! Worker threads, each with a runtime of its own: a connection is served by one thread from accept to close, so its two
//! sides never wake each other across threads.

use std::io;
use std::path::Path;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// A fixed set of OS threads, each running a current-thread tokio runtime.
///
/// Dropping it without [`Workers::shutdown`] stops the threads without waiting for them.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<Handle>,
    next: AtomicUsize,
    stop: CancellationToken,
    /// One message from each thread that ended; its capacity is the number of threads, so no thread blocks on it.
    ended: mpsc::Receiver<()>,
}

/// How many workers to run: `N`, `N%` of the cores, or 0 for all (Z03).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerCount {
    /// Every core.
    All,
    /// This many, even if there are fewer cores.
    Exactly(usize),
    /// This part of the cores, rounded up.
    Percent(u8),
}

/// A worker count that is not `N` or `N%`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a number of workers: want N (at most {MAX_WORKERS}), N% (at most 100%) or 0 for all cores"
)]
pub struct BadWorkerCount(String);

/// More threads than any node has cores today.
pub const MAX_WORKERS: usize = 1024;

/// Polls of tasks between two looks at the sockets while there is always a task to poll. A turn of a bulk stream takes about
/// 0.1 ms, so a small message is noticed within 1 ms; tokio's own 61 would make that 6. A thread that has nothing to poll
/// looks at once.
pub const EVENT_INTERVAL: u32 = 8;

impl Workers {
    /// Starts `count` threads (at least one) named `name-0`, `name-1`, ... (Linux shows the first 15 bytes).
    ///
    /// # Errors
    /// If a runtime or a thread cannot be made; those already started are stopped.
    pub fn start(count: usize, name: &str) -> io::Result<Self> {
        let count = count.clamp(1, MAX_WORKERS);
        let stop = CancellationToken::new();
        let guard = stop.clone().drop_guard();
        let (send_ended, ended) = mpsc::sync_channel(count);
        let mut handles = Vec::with_capacity(count);
        for index in 0..count {
            let runtime =
                Builder::new_current_thread().enable_all().event_interval(EVENT_INTERVAL).build()?;
            handles.push(runtime.handle().clone());
            let (stop, send_ended) = (stop.clone(), send_ended.clone());
            thread::Builder::new().name(format!("{name}-{index}")).spawn(move || {
                runtime.block_on(stop.cancelled());
                // Tasks that still run are dropped here, at their last await.
                drop(runtime);
                let _ = send_ended.send(());
            })?;
        }
        let stop = guard.disarm();
        Ok(Self { handles, next: AtomicUsize::new(0), stop, ended })
    }

    /// The runtime of worker `index`, counted modulo the number of workers.
    #[must_use]
    pub fn handle(&self, index: usize) -> &Handle {
        &self.handles[index % self.handles.len()]
    }

    /// The next worker in turn.
    pub fn next(&self) -> &Handle {
        self.handle(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// The worker with the fewest live tasks, the first of equals. Reads one counter a worker.
    #[must_use]
    pub fn least_loaded(&self) -> &Handle {
        let tasks = |handle: &&Handle| handle.metrics().num_alive_tasks();
        self.handles.iter().min_by_key(tasks).expect("at least one worker")
    }

    /// All workers.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Handle> {
        self.handles.iter()
    }

    /// The number of workers, at least 1.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        self.handles.len()
    }

    /// Stops the runtimes, dropping what still runs on them, and waits for their threads to end; returns how many had
    /// not ended after `timeout`. Blocks the calling thread: drain first, and call it outside async code.
    pub fn shutdown(self, timeout: Duration) -> usize {
        self.stop.cancel();
        let deadline = Instant::now() + timeout;
        let mut left = self.handles.len();
        while left > 0 {
            let wait = deadline.saturating_duration_since(Instant::now());
            if self.ended.recv_timeout(wait).is_err() {
                break;
            }
            left -= 1;
        }
        left
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl WorkerCount {
    /// The number of threads on a machine with this many cores: at least 1, at most [`MAX_WORKERS`].
    #[must_use]
    pub fn resolve(self, cores: usize) -> usize {
        let count = match self {
            Self::All => cores,
            Self::Exactly(count) => count,
            Self::Percent(percent) => (cores * usize::from(percent)).div_ceil(100),
        };
        count.clamp(1, MAX_WORKERS)
    }
}

impl FromStr for WorkerCount {
    type Err = BadWorkerCount;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || BadWorkerCount(text.to_owned());
        if let Some(percent) = text.strip_suffix('%') {
            let percent: u8 = percent.parse().map_err(|_| bad())?;
            return if (1..=100).contains(&percent) { Ok(Self::Percent(percent)) } else { Err(bad()) };
        }
        match text.parse::<usize>().map_err(|_| bad())? {
            0 => Ok(Self::All),
            count if count <= MAX_WORKERS => Ok(Self::Exactly(count)),
            _ => Err(bad()),
        }
    }
}

/// The number of workers when nobody asked for one (Z03): the CPU limit rounded up, else a quarter of the cores but at least
/// 2; never more than there are cores.
#[must_use]
pub fn default_count(cores: usize, cpu_limit: Option<f64>) -> usize {
    let wanted = match cpu_limit {
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to the cores below"
        )]
        Some(limit) if limit.is_finite() && limit > 0.0 => limit.ceil() as usize,
        _ => cores.div_ceil(4).max(2),
    };
    wanted.clamp(1, cores.clamp(1, MAX_WORKERS))
}

/// The cores this process may run on.
#[must_use]
pub fn cores() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// The CPU limit of this process's control group, in cores; `None` without one. Inside a container the group's root is
/// mounted at `/sys/fs/cgroup`, which is the only place looked at.
#[must_use]
pub fn cpu_limit() -> Option<f64> {
    cpu_limit_in(Path::new("/sys/fs/cgroup"))
}

fn cpu_limit_in(group: &Path) -> Option<f64> {
    let text = std::fs::read_to_string(group.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    (quota > 0.0 && period > 0.0).then(|| quota / period)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::Tasks;
    use std::collections::HashSet;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn tasks_run_on_the_worker_they_were_given_to() {
        let workers = Workers::start(3, "test").unwrap();
        let tasks = Tasks::new("test");
        let (send, receive) = mpsc::sync_channel(16);
        for _ in 0..2 * workers.len() {
            let send = send.clone();
            tasks.spawn_on(workers.next(), "where am I", async move {
                send.send(thread::current().name().unwrap().to_owned()).unwrap();
            });
        }
        drop(send);
        let names: Vec<_> = receive.iter().collect();
        assert_eq!(names.len(), 6);
        assert_eq!(
            names.iter().map(String::as_str).collect::<HashSet<_>>(),
            ["test-0", "test-1", "test-2"].into()
        );
        assert_eq!(workers.shutdown(SOON), 0);
    }

    #[test]
    fn shutdown_drops_what_still_runs() {
        let workers = Workers::start(2, "test").unwrap();
        let tasks = Tasks::new("test");
        tasks.spawn_on(workers.handle(0), "stuck", std::future::pending());
        assert_eq!(workers.least_loaded().id(), workers.handle(1).id());
        assert_eq!(workers.shutdown(SOON), 0);
        assert!(tasks.is_empty());
    }

    #[test]
    fn a_worker_that_does_not_end_is_reported() {
        let workers = Workers::start(1, "test").unwrap();
        let (entered, wait_entered) = mpsc::channel();
        let (release, gate) = mpsc::channel::<()>();
        Tasks::new("test").spawn_on(workers.handle(0), "blocks", async move {
            entered.send(()).unwrap();
            let _ = gate.recv();
        });
        wait_entered.recv().unwrap();
        assert_eq!(workers.shutdown(Duration::from_millis(1)), 1);
        drop(release);
    }

    /// Z03.
    #[test]
    fn counts() {
        assert_eq!("0".parse(), Ok(WorkerCount::All));
        assert_eq!("3".parse(), Ok(WorkerCount::Exactly(3)));
        assert_eq!("50%".parse(), Ok(WorkerCount::Percent(50)));
        for bad in ["", "x", "-1", "0%", "101%", "1025", "5 %"] {
            assert!(bad.parse::<WorkerCount>().is_err(), "{bad}");
        }
        assert_eq!(WorkerCount::Percent(25).resolve(10), 3);
        assert_eq!(WorkerCount::All.resolve(10), 10);
        assert_eq!(WorkerCount::Exactly(12).resolve(10), 12);

        for (cores, limit, expected) in [
            (1, None, 1),
            (2, None, 2),
            (4, None, 2),
            (16, None, 4),
            (64, None, 16),
            (16, Some(0.5), 1),
            (16, Some(2.5), 3),
            (2, Some(8.0), 2),
            (16, Some(f64::NAN), 4),
        ] {
            assert_eq!(default_count(cores, limit), expected, "{cores} cores, limit {limit:?}");
        }
    }

    /// Z03.
    #[test]
    fn reads_the_cgroup_limit() {
        let group = tempfile::tempdir().unwrap();
        assert_eq!(cpu_limit_in(group.path()), None);
        for (text, expected) in
            [("max 100000\n", None), ("250000 100000\n", Some(2.5)), ("0 0", None), ("junk", None)]
        {
            std::fs::write(group.path().join("cpu.max"), text).unwrap();
            assert_eq!(cpu_limit_in(group.path()), expected, "{text:?}");
        }
    }
}
