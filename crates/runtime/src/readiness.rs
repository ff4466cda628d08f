//! Readiness (Z06): a process is ready once every named start-up task is done, and says which ones are not.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

/// The set of start-up tasks; clones share it. Bounded by the code that registers: a name for each part of a program.
///
/// Register everything that readiness depends on before anything can finish: a set that becomes empty is ready.
#[derive(Debug, Clone)]
pub struct Readiness {
    pending: Arc<watch::Sender<Pending>>,
}

/// One start-up task that is not done. Done by [`Task::done`] or by being dropped.
#[derive(Debug)]
#[must_use = "dropping it declares the task done"]
pub struct Task {
    pending: Arc<watch::Sender<Pending>>,
    id: u64,
}

#[derive(Debug, Default)]
struct Pending {
    next_id: u64,
    tasks: BTreeMap<u64, Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    name: &'static str,
    /// What it waits for; empty if it does not say.
    detail: String,
}

impl Readiness {
    /// A set without tasks, which is ready.
    #[must_use]
    pub fn new() -> Self {
        Self { pending: Arc::new(watch::Sender::new(Pending::default())) }
    }

    /// Adds a task. Registering after the set was ready makes it unready again.
    pub fn register(&self, name: &'static str) -> Task {
        let mut id = 0;
        self.pending.send_modify(|pending| {
            id = pending.next_id;
            pending.next_id += 1;
            pending.tasks.insert(id, Unfinished { name, detail: String::new() });
        });
        Task { pending: self.pending.clone(), id }
    }

    /// The names of tasks that are not done, in order of registration.
    #[must_use]
    pub fn pending(&self) -> Vec<&'static str> {
        self.pending.borrow().tasks.values().map(|task| task.name).collect()
    }

    /// The same for a person: `name`, or `name: what it waits for`.
    #[must_use]
    pub fn described(&self) -> Vec<String> {
        let described = |task: &Unfinished| match task.detail.as_str() {
            "" => task.name.to_owned(),
            detail => format!("{}: {detail}", task.name),
        };
        self.pending.borrow().tasks.values().map(described).collect()
    }

    /// Whether no task is pending.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.pending.borrow().tasks.is_empty()
    }

    /// Resolves when no task is pending. Cancel safe.
    pub async fn ready(&self) {
        let mut pending = self.pending.subscribe();
        // The sender is in `self`, so it cannot be gone.
        let _ = pending.wait_for(|pending| pending.tasks.is_empty()).await;
    }
}

impl Default for Readiness {
    fn default() -> Self {
        Self::new()
    }
}

impl Task {
    /// Says that the task is done.
    pub fn done(self) {}

    /// Says what it waits for now, in place of what it said before.
    pub fn waits_for(&self, detail: impl Into<String>) {
        let detail = detail.into();
        self.pending.send_if_modified(|pending| {
            let Some(task) = pending.tasks.get_mut(&self.id) else { return false };
            task.detail = detail;
            false
        });
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.pending.send_modify(|pending| {
            if let Some(task) = pending.tasks.remove(&self.id) {
                tracing::debug!(task = task.name, left = pending.tasks.len(), "start-up task done");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn ready_when_all_tasks_are_done() {
        let readiness = Readiness::new();
        let xds = readiness.register("xds");
        let listeners = readiness.register("listeners");
        let again = readiness.register("xds");
        assert_eq!(readiness.pending(), ["xds", "listeners", "xds"]);
        xds.done();
        drop(again);
        assert_eq!(readiness.ready().now_or_never(), None);
        assert_eq!(readiness.pending(), ["listeners"]);
        drop(listeners);
        assert!(readiness.is_ready());
        assert_eq!(readiness.ready().now_or_never(), Some(()));
    }

    #[test]
    fn a_task_says_what_it_waits_for() {
        let readiness = Readiness::new();
        let lists = readiness.register("first lists");
        assert_eq!(readiness.described(), ["first lists"]);
        lists.waits_for("pods, services");
        lists.waits_for("services");
        assert_eq!(readiness.described(), ["first lists: services"]);
        assert_eq!(readiness.pending(), ["first lists"]);
        lists.done();
        assert!(readiness.is_ready());
    }

    #[tokio::test]
    async fn a_waiter_is_woken() {
        let readiness = Readiness::new();
        let task = readiness.register("state");
        tokio::join!(readiness.ready(), async { task.done() });
    }
}
