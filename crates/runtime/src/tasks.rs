//! Tasks with an owner: each spawned task has a name, is counted, can be waited for and can be aborted.
//!
//! This is the only place of the workspace that spawns (clippy.toml bans the bare call), so nothing runs that nobody
//! waits for, and a panic is never silent.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

/// Owner of a set of tasks; clones share the set.
///
/// Dropping the last clone does not stop the tasks: an owner that ends calls [`Tasks::close`] and [`Tasks::wait`], then
/// [`Tasks::abort_all`] for what is left. The set itself has no bound; what spawns one task a connection bounds its
/// connections.
#[derive(Clone)]
pub struct Tasks {
    shared: Arc<Shared>,
}

/// What became of a [`Tasks::wait`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum Waited {
    /// Every task ended.
    Finished,
    /// The deadline came first.
    TimedOut {
        /// How many tasks were still running.
        left: usize,
    },
}

/// One spawned task. Dropping it leaves the task running.
#[derive(Debug, Clone)]
pub struct Task {
    abort: AbortHandle,
}

struct Shared {
    name: &'static str,
    tracker: TaskTracker,
    running: Mutex<Running>,
    next_id: AtomicU64,
    panics: AtomicU64,
}

/// Kept beside the tracker so that names can be listed and tasks aborted without any cost while they are polled: a
/// cancellation token inside each task would take a shared lock at every wake-up.
#[derive(Default)]
struct Running {
    tasks: HashMap<u64, Entry>,
    aborted: bool,
}

struct Entry {
    name: &'static str,
    /// Absent only between the insertion and the return of the spawn call.
    abort: Option<AbortHandle>,
}

/// Takes the task out of the list however it ends: by returning, panicking, being aborted, or its runtime going away.
struct Leave {
    shared: Arc<Shared>,
    id: u64,
}

impl Tasks {
    /// An empty set. `name` goes into log lines.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        let shared = Shared {
            name,
            tracker: TaskTracker::new(),
            running: Mutex::default(),
            next_id: AtomicU64::new(0),
            panics: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Spawns on the runtime of the caller.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> Task
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_on(&Handle::current(), name, task)
    }

    /// Spawns on a given runtime, such as one of the [workers](crate::workers). After [`Tasks::abort_all`] the new
    /// task is aborted before its first poll.
    pub fn spawn_on<F>(&self, runtime: &Handle, name: &'static str, task: F) -> Task
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let aborted = {
            let mut running = self.shared.running.lock();
            running.tasks.insert(id, Entry { name, abort: None });
            running.aborted
        };
        let leave = Leave { shared: self.shared.clone(), id };
        let abort = self.shared.tracker.spawn_on(named(leave, name, task), runtime).abort_handle();
        // The lock is not held across the spawn: a runtime that is shutting down drops the future there and then, and
        // with it `leave`, which takes the lock.
        let aborted = {
            let mut running = self.shared.running.lock();
            if let Some(entry) = running.tasks.get_mut(&id) {
                entry.abort = Some(abort.clone());
            }
            aborted || running.aborted
        };
        if aborted {
            abort.abort();
        }
        Task { abort }
    }

    /// Declares that no more tasks are meant to come, which lets [`Tasks::wait`] finish. Tasks may still spawn others
    /// into the set; those are waited for too.
    pub fn close(&self) {
        self.shared.tracker.close();
    }

    /// Waits until the set is closed and empty, for at most `deadline`.
    pub async fn wait(&self, deadline: Duration) -> Waited {
        if tokio::time::timeout(deadline, self.shared.tracker.wait()).await.is_ok() {
            return Waited::Finished;
        }
        match self.len() {
            // The last one ended between the timeout and the count.
            0 if self.shared.tracker.is_closed() => Waited::Finished,
            left => Waited::TimedOut { left },
        }
    }

    /// Aborts what runs at its next await, and everything spawned later; closes the set. [`Tasks::wait`] afterwards tells
    /// when they are gone.
    pub fn abort_all(&self) {
        self.close();
        let handles: Vec<_> = {
            let mut running = self.shared.running.lock();
            running.aborted = true;
            running.tasks.values().filter_map(|entry| entry.abort.clone()).collect()
        };
        for handle in handles {
            handle.abort();
        }
    }

    /// How many tasks have not ended.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.tracker.len()
    }

    /// Whether every task has ended.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.tracker.is_empty()
    }

    /// How many tasks ended in a panic so far.
    #[must_use]
    pub fn panics(&self) -> u64 {
        self.shared.panics.load(Ordering::Relaxed)
    }

    /// The names of the tasks that have not ended, sorted, one for each task: what to log when a drain is late.
    #[must_use]
    pub fn names(&self) -> Vec<&'static str> {
        let mut names: Vec<_> = self.shared.running.lock().tasks.values().map(|entry| entry.name).collect();
        names.sort_unstable();
        names
    }
}

impl Task {
    /// Ends the task at its next await. Nothing happens if it has ended.
    pub fn abort(&self) {
        self.abort.abort();
    }

    /// Whether the task has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.abort.is_finished()
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks").field("name", &self.shared.name).field("len", &self.len()).finish()
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        self.shared.running.lock().tasks.remove(&self.id);
    }
}

/// A combinator and not an `async fn`: that would hold the task twice, as its argument and as what it awaits, and every
/// connection of a proxy is a task.
fn named<F: Future<Output = ()>>(leave: Leave, name: &'static str, task: F) -> impl Future<Output = ()> {
    AssertUnwindSafe(task).catch_unwind().map(move |outcome| {
        let Err(payload) = outcome else { return };
        leave.shared.panics.fetch_add(1, Ordering::Relaxed);
        let reason = payload
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| payload.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("a value that is not text");
        tracing::error!(owner = leave.shared.name, task = name, reason, "task panicked");
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::sync::oneshot;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_task_is_held_once() {
        let large = [0u8; 4096];
        let task = async move {
            pending::<()>().await;
            std::hint::black_box(large);
        };
        let (alone, tasks) = (size_of_val(&task), Tasks::new("test"));
        let leave = Leave { shared: tasks.shared.clone(), id: 0 };
        let held = size_of_val(&named(leave, "large", task));
        assert!(held < alone + 128, "{held} bytes for a task of {alone}");
    }

    #[tokio::test(start_paused = true)]
    async fn waits_for_all_and_says_what_is_left() {
        let tasks = Tasks::new("test");
        let (go, gate) = oneshot::channel::<()>();
        tasks.spawn("quick", async {});
        tasks.spawn("gated", async {
            let _ = gate.await;
        });
        tasks.close();
        assert_eq!(tasks.wait(SOON).await, Waited::TimedOut { left: 1 });
        assert_eq!(tasks.names(), ["gated"]);
        go.send(()).unwrap();
        assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        assert!(tasks.is_empty() && tasks.names().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_set_is_not_finished() {
        let tasks = Tasks::new("test");
        assert_eq!(tasks.wait(SOON).await, Waited::TimedOut { left: 0 });
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_is_counted_and_does_not_spread() {
        let tasks = Tasks::new("test");
        tasks.spawn("bad", async { panic!("on purpose") });
        tasks.spawn("good", async {});
        tasks.close();
        assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        assert_eq!(tasks.panics(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn abort_reaches_present_and_later_tasks() {
        let tasks = Tasks::new("test");
        let first = tasks.spawn("stuck", pending());
        let one = tasks.spawn("single", pending());
        one.abort();
        tasks.abort_all();
        let late = tasks.spawn("late", pending());
        assert_eq!(tasks.wait(SOON).await, Waited::Finished);
        assert!(first.is_finished() && one.is_finished() && late.is_finished());
        assert!(tasks.names().is_empty());
    }

    #[test]
    fn a_runtime_that_went_away_leaves_no_task_behind() {
        let tasks = Tasks::new("test");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = runtime.handle().clone();
        tasks.spawn_on(&handle, "stuck", pending());
        drop(runtime);
        tasks.spawn_on(&handle, "too late", pending());
        assert!(tasks.is_empty() && tasks.names().is_empty());
    }
}
